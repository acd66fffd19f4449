"""lm_core: the parts every language model needs, one concept a module."""

__version__ = "0.1.0"
