"""cramlab."""
