"""Composition of a frozen anchor with frozen augments."""
