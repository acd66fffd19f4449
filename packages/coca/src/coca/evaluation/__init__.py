"""Zero-shot classification, retrieval, held-out losses and the picture of results."""
