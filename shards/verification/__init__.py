"""Checking that a dataset is what was written."""
