"""The running state of captions; the search itself is that of ``lm_core.generation``.

Generation runs the text without CLS: no token sees it.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.nn.kv_cache import KVCache


class CoCaCache(KVCache):
    """Keys and values of the text in every layer, and of the image in the multimodal ones."""

    def __init__(self, *, layers: int, batch_size: int, max_length: int) -> None:
        super().__init__(layers=layers, batch_size=batch_size, max_length=max_length)
        # Layer number to keys and values; empty before the first forward.
        self.image: dict[int, tuple[Tensor, Tensor]] = {}
        self._image_of_row = torch.arange(batch_size)

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Row ``r`` becomes what row ``index[r]`` was, its image too."""
        super().reorder(index)
        if index.device.type == "cpu":
            # The beams of an image change places among themselves: their image stays where it is.
            before, self._image_of_row = self._image_of_row, self._image_of_row[index]
            if torch.equal(before, self._image_of_row):
                return
        self.image = {layer: (keys[index], values[index]) for layer, (keys, values) in self.image.items()}
