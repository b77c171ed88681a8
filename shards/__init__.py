"""The latent-shard format: schema, writer, reader, index and loader."""
