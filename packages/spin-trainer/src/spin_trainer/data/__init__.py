"""Supervised data, opponents' answers and pairs."""
