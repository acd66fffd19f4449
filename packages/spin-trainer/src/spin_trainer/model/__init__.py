"""The self-play loss, the reference model and response log-probabilities."""
