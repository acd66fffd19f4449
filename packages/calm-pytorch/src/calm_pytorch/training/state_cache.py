"""States of static prompts, computed once and reused in every epoch.

Frozen augments give the same states for the same prompt. They are kept on the CPU, in the dtype of the model, without
padding.

Legend: b batch, m prompt positions, c augment features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from calm_pytorch.model.calm import CALM
from calm_pytorch.model.composed_lm import AugmentStates

# Prompts that are read as one batch.
_READ_TOGETHER = 8


class StateCache:
    """Augment states of the examples of a dataset that were seen.

    Args:
        calm: the composition, all of whose augments read prompts.
        size: number of examples.

    Raises:
        ValueError: an augment shares the anchor's sequence, whose states belong to no prompt.
    """

    def __init__(self, calm: CALM, size: int) -> None:
        if any(augment.shared_sequence for augment in calm.augments):
            raise ValueError("cache_augment_states needs augments that all read prompts, got one with shared_sequence")
        self.calm = calm
        self.size = size
        # for each example and augment the states (m, c) of each layer that is read
        self.rows: dict[int, list[list[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def states(self, indices: Sequence[int], prompts: Callable[[Sequence[int]], tuple[Any, Any]]) -> AugmentStates:
        """States of a batch of examples; those that are not held yet are computed.

        Prompts are read in groups that depend on the index alone, since states of other groups differ by rounding: a
        resumed run continues bit for bit, although it computes its states again.

        Args:
            indices: indices of the examples.
            prompts: prompt and prompt_mask, as for ``CALM.forward``, of the examples of these indices.
        """
        for group in sorted({index // _READ_TOGETHER for index in indices if index not in self.rows}):
            together = range(group * _READ_TOGETHER, min((group + 1) * _READ_TOGETHER, self.size))
            self._keep(together, self.calm.augment_states(*prompts(together)))
        device = next(self.calm.trainable_parameters()).device
        hiddens, masks = [], []
        for augment in range(len(self.calm.augments)):
            rows = [self.rows[index][augment] for index in indices]
            lengths = torch.tensor([len(row[0]) for row in rows])
            longest = int(lengths.max())
            layers = zip(*rows, strict=True)
            hiddens.append(tuple(pad_sequence(list(layer), batch_first=True).to(device) for layer in layers))
            mask = torch.arange(longest) < lengths.unsqueeze(-1)
            masks.append(None if bool(mask.all()) else mask.to(device))
        return AugmentStates(tuple(hiddens), tuple(masks))

    def _keep(self, indices: Sequence[int], states: AugmentStates) -> None:
        for row, index in enumerate(indices):
            kept = []
            for layers, mask in zip(states.hiddens, states.masks, strict=True):
                real = slice(None) if mask is None else mask[row]
                kept.append([hidden[row][real].cpu().clone() for hidden in layers])
            self.rows[index] = kept
