"""The diffusion transformer, its objectives, and the frozen VAE and text encoder."""
