"""The frozen model that reads: where its stream can be changed, how wide it is there, and whether it decodes cached.

Legend: b batch, n sequence, d feature.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calm_pytorch.model.blocks import BlocksFunction, find_blocks, recomputed_parts
from calm_pytorch.model.decoder_stack import as_fast_causal_lm
from calm_pytorch.model.hooks import HiddenPosition, one_each, read_hiddens, running_order
from lm_core.adapters.huggingface import undisturbed


class Anchor:
    """The reading side of a composition; what is found out about the model leaves it as it was.

    Args:
        model: a causal language model of any kind ``as_causal_lm`` knows.
        blocks: as for ``find_blocks``.
        extract: as for ``find_blocks``.
        positions: whether the stream is changed behind a block or before it; one for all, or one each.
        device: where the model is.

    Attributes:
        language_model: the model in the protocol of ``lm_core.generation.generate.CausalLM``.
        blocks: in the order they run in.
        positions: of each block.
        dims: features at each block.
        caches: whether the blocks also run when the model decodes from a cache.

    Raises:
        ValueError: blocks or positions do not fit the model.
        TypeError: the model is no causal language model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str | Sequence[nn.Module | str] | None,
        extract: BlocksFunction | None,
        positions: HiddenPosition | Sequence[HiddenPosition],
        device: torch.device,
    ) -> None:
        self.language_model: Any = as_fast_causal_lm(model)
        found = find_blocks(model, blocks, extract, "anchor")
        each = one_each(positions, len(found), "anchor_hidden_position")
        probe = torch.zeros(1, 2, dtype=torch.long, device=device)
        order = running_order(lambda: self.language_model(probe), model, found, each, "anchor")
        self.blocks = tuple(found[i] for i in order)
        self.positions = tuple(each[i] for i in order)
        with undisturbed(model):
            hiddens = self._read(probe)
            for layer, hidden in enumerate(hiddens, start=1):
                if hidden.ndim != 3:
                    raise ValueError(f"anchor: layer {layer} must give (b, n, d), got shape {tuple(hidden.shape)}")
            self.caches = hasattr(self.language_model, "init_cache") and self._blocks_run_with_a_cache(probe)
        self.dims = tuple(hidden.shape[-1] for hidden in hiddens)

    def _read(self, ids: Tensor, **kwargs: Any) -> list[Tensor]:
        return read_hiddens(partial(self.language_model, ids, **kwargs), self.blocks, self.positions, where="anchor")

    def _blocks_run_with_a_cache(self, probe: Tensor) -> bool:
        cache = self.language_model.init_cache(1, 3)
        try:
            for ids in (probe, probe[:, :1]):
                self._read(ids, cache=cache)
        except RuntimeError:
            return False
        return True

    def recomputed(self, model: nn.Module, first_layer: int) -> list[nn.Module]:
        """The modules whose activations are computed again in a backward pass that ends at a layer."""
        return recomputed_parts(model, self.blocks[first_layer - 1 :])
