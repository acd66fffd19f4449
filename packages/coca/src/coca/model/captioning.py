"""The running state of captions, and how they begin; the search itself is that of ``lm_core.generation``.

Generation runs the text without CLS: no token sees it.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.checks import check_ids
from lm_core.generation.decoding import prompt_rows
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


def prefix_rows(
    prefix: Any, mask: Tensor | None, *, count: int, bos_id: int | None, num_tokens: int
) -> list[Int[Tensor, " n"]]:
    """The beginning of each of ``count`` captions, without padding.

    Args:
        prefix: ids ``(n,)`` for all, ``(b, n)``, or a list of 1-D tensors; None takes ``bos_id``.
        mask: True at real tokens of a padded ``prefix``.
        count: captions.
        bos_id: of the model.
        num_tokens: ids are below it.

    Raises:
        ValueError: there is neither a prefix nor a ``bos_id``, or the prefix does not fit the captions.
    """
    if prefix is None:
        if bos_id is None:
            raise ValueError("prefix must be given, since the model was made without a bos_id")
        prefix = torch.tensor([bos_id])
    if isinstance(prefix, Tensor) and prefix.ndim == 1:
        prefix = prefix.expand(count, -1)
    rows = prompt_rows(prefix, mask)
    if len(rows) != count:
        raise ValueError(f"prefix must have a row for each of the {count} images, got {len(rows)}")
    for row in rows:
        check_ids(row, num_tokens, "prefix")
    return rows
