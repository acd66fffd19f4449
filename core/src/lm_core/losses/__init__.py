"""Losses and log-probabilities that never hold the full logits."""
