"""Supervised data, the opponent's answers, and their storage."""
