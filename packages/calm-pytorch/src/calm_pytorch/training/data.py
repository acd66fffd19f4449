"""Examples of a data set as arguments of ``CALM.forward``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calm_pytorch.training.state_cache import StateCache


class Batches:
    """Makes batches of examples.

    Args:
        names: of what an example holds, where it is a tuple.
        collate_fn: makes a batch of examples; torch's default stacks tensors.
        device: where the tensors go.
    """

    def __init__(
        self, names: Sequence[str], collate_fn: Callable[[list[Any]], Any] | None, device: torch.device
    ) -> None:
        self.names, self.collate_fn, self.device = tuple(names), collate_fn, device

    def of(self, dataset: Any, indices: Sequence[int], cache: StateCache | None = None) -> dict[str, Any]:
        """The examples of these indices, as arguments.

        Args:
            dataset: with ``dataset[i]``.
            indices: of the examples.
            cache: whose states take the place of prompts.

        Raises:
            ValueError: an example holds another number of things than there are names.
        """
        from torch.utils.data import default_collate

        batch = (self.collate_fn or default_collate)([dataset[index] for index in indices])
        if not isinstance(batch, dict):
            if len(batch) != len(self.names):
                raise ValueError(f"data_kwarg_names must name what an example holds, got {self.names} for {len(batch)}")
            batch = dict(zip(self.names, batch, strict=True))
        batch = {name: _moved(value, self.device) for name, value in batch.items()}
        if cache is not None:
            prompt, mask = batch.pop("prompt", None), batch.pop("prompt_mask", None)
            batch["augment_states"] = cache.states(indices, prompt, mask)
        return batch


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return [_moved(entry, device) for entry in value]
    return value
