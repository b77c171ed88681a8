"""The embedded dataset of moving shapes: the renderer that makes it and the checker that reads it back."""
