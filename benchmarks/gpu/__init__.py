"""What one GPU does: the rates that the arithmetic assumed, then the model and the encoders at full size."""
