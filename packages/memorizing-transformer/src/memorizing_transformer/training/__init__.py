"""Training on documents in order, evaluation and retrofitting."""
