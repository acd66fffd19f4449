"""Weights of other implementations: CoCa-pytorch and open_clip."""

from coca.interop.coca_pytorch import convert_state_dict, from_coca_pytorch, load_coca_pytorch
from coca.interop.open_clip import from_open_clip, to_open_clip

__all__ = ["convert_state_dict", "from_coca_pytorch", "from_open_clip", "load_coca_pytorch", "to_open_clip"]
