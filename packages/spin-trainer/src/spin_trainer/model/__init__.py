"""SPIN's loss, reference and response scores."""
