"""Losses and log-probabilities that never materialise the full logits."""
