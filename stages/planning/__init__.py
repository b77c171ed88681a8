"""Metadata to a plan: which clip goes to which bucket, shard and row."""
