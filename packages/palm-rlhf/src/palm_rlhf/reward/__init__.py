"""Reward models and their training."""
