"""The Memorizing Transformer."""
