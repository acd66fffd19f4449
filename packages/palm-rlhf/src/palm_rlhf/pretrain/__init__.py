"""Pretraining on packed documents."""
