"""How good a run is, measured and shown."""
