"""A run: its settings, its data, its steps, and what it leaves."""
