"""Training on image-text pairs."""
