"""The page that shows a dataset."""
