"""Inference engines of other libraries that draw responses for the trainers."""
