"""Training of the cross-attentions."""
