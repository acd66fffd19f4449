"""Hidden states of examples, computed once and reused in every epoch.

Frozen augments give the same states for the same prompt, so reading a prompt in each epoch is wasted; and so is running
the frozen anchor up to its first connection, where it can begin behind it. States are kept on the CPU, without their
padding, in the dtype the model gave them.

Legend: b batch, n anchor positions, m prompt positions, c augment features, d anchor features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from calm_pytorch.model.composed_lm import AnchorStart, AugmentStates


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
        # for each example and augment: the states (m, c) of each layer that is read; and the anchor's (n, d), or none
        self.rows: dict[int, tuple[list[list[Tensor]], list[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for read, start in self.rows.values() for layers in (*read, start) for t in layers)

    def states(
        self, indices: Sequence[int], prompt: Any, prompt_mask: Any = None, seq: Int[Tensor, "b n"] | None = None
    ) -> AugmentStates:
        """States of a batch of examples; those that are not held yet are computed.

        Args:
            indices: of the examples.
            prompt: as for ``CALM.forward``; only looked at if an example is new.
            prompt_mask: as for ``CALM.forward``.
            seq: as for ``CALM.augment_states``.
        """
        if any(index not in self.rows for index in indices):
            states: AugmentStates = self.calm.augment_states(prompt, prompt_mask, seq=seq)
            self._keep(indices, states, seq)
            return states
        device = next(self.calm.trainable_parameters()).device
        hiddens, masks = [], []
        for number in range(len(self.calm.augments)):
            rows = [self.rows[index][0][number] for index in indices]
            lengths = [row[0].shape[0] for row in rows]
            longest = max(lengths)
            layers = tuple(pad_sequence([row[layer] for row in rows], True).to(device) for layer in range(len(rows[0])))
            hiddens.append(layers)
            even = min(lengths) == longest
            mask = None if even else torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
            masks.append(None if mask is None else mask.to(device))
        starts = [self.rows[index][1] for index in indices]
        start = None if seq is None or not all(starts) else self._start([one for (one,) in starts], seq)
        return AugmentStates(tuple(hiddens), tuple(masks), start)

    def _start(self, rows: list[Tensor], seq: Tensor) -> AnchorStart:
        ids = self.calm.tokens_read(seq)
        hidden = rows[0].new_zeros(*ids.shape, rows[0].shape[-1])
        for target, row in zip(hidden, rows, strict=True):
            target[: len(row)] = row
        return AnchorStart(ids, hidden.to(seq.device))

    def _keep(self, indices: Sequence[int], states: AugmentStates, seq: Tensor | None) -> None:
        for row, index in enumerate(indices):
            kept = []
            for layers, mask in zip(states.hiddens, states.masks, strict=True):
                real = slice(None) if mask is None else mask[row]
                kept.append([hidden[row][real].cpu().clone() for hidden in layers])
            start = []
            if states.anchor is not None and seq is not None:
                length = int((seq[row, :-1] != self.calm.pad_id).sum())
                start = [states.anchor.hidden[row, :length].cpu().clone()]
            self.rows[index] = kept, start
