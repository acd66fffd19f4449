"""Images with captions, preprocessing and batches of pairs."""
