"""Crash-safe checkpoints, pretrained folders and atomic file writes."""
