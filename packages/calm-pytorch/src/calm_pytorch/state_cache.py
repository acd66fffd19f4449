"""Hidden states of static prompts, read once for each example and reused in every epoch.

Frozen augments give the same states for the same prompt, so reading a prompt in each epoch is wasted. States are kept
on the CPU, without their padding, in the dtype the augment gave them.

Legend: m prompt positions, c augment features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calm_pytorch.composed_lm import AugmentStates


class StateCache:
    """States of each example that was seen.

    Args:
        calm: the composition, all of whose augments read prompts.

    Raises:
        ValueError: an augment shares the anchor's sequence, whose states belong to no prompt.
    """

    def __init__(self, calm: Any) -> None:
        if any(augment.shared_sequence for augment in calm.augments):
            raise ValueError("cache_augment_states needs augments that all read prompts, got one with shared_sequence")
        self.calm = calm
        # for each example and augment: the states (m, c) of each layer that is read
        self.rows: dict[int, list[list[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for row in self.rows.values() for layers in row for t in layers)

    def states(self, indices: Sequence[int], prompt: Any, prompt_mask: Any = None) -> AugmentStates:
        """States of a batch of examples; those that are not held yet are read from ``prompt``.

        Args:
            indices: of the examples.
            prompt: as for ``CALM.forward``; only looked at if an example is new.
            prompt_mask: as for ``CALM.forward``.
        """
        if any(index not in self.rows for index in indices):
            states = self.calm.augment_states(prompt, prompt_mask)
            self._keep(indices, states)
            return states
        device = next(self.calm.trainable_parameters()).device
        hiddens, masks = [], []
        for number in range(len(self.calm.augments)):
            rows = [self.rows[index][number] for index in indices]
            lengths = [row[0].shape[0] for row in rows]
            longest = max(lengths)
            layers = tuple(
                torch.nn.utils.rnn.pad_sequence([row[layer] for row in rows], batch_first=True).to(device)
                for layer in range(len(rows[0]))
            )
            hiddens.append(layers)
            even = min(lengths) == longest
            mask = None if even else torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
            masks.append(None if mask is None else mask.to(device))
        return AugmentStates(tuple(hiddens), tuple(masks))

    def _keep(self, indices: Sequence[int], states: AugmentStates) -> None:
        for row, index in enumerate(indices):
            kept = []
            for layers, mask in zip(states.hiddens, states.masks, strict=True):
                real = slice(None) if mask is None else mask[row]
                kept.append([hidden[row][real].cpu().clone() for hidden in layers])
            self.rows[index] = kept
