"""Layers of a language model: attention, rotary embedding, norms, feed-forward, key/value cache, masks."""
