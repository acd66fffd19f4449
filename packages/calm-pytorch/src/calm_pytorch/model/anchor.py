"""The frozen anchor: the blocks at which its residual stream is changed, their widths, and cached decoding.

Legend: b batch, n sequence, d feature.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calm_pytorch.model.blocks import Blocks, BlocksFunction, hidden_widths
from calm_pytorch.model.hooks import HiddenPosition
from lm_core.adapters import as_causal_lm
from lm_core.adapters.huggingface import undisturbed


class Anchor:
    """The frozen model that reads the augments; inspecting it leaves it unchanged.

    Args:
        model: a causal language model of any kind ``as_causal_lm`` knows.
        blocks: as for ``find_blocks``.
        extract: as for ``find_blocks``.
        positions: "output" changes the stream after a block, "input" before it; one for all, or one each.
        device: device of the model.

    Attributes:
        model: the model.
        language_model: the same in the protocol of ``lm_core.generation.decoding.CausalLM``.
        blocks: where its stream can be changed.
        dims: features at each block.
        decodes: whether the blocks also run when the model decodes from a cache.

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
        self.model = model
        self.language_model: Any = as_causal_lm(model)
        probe = torch.zeros(1, 2, dtype=torch.long, device=device)
        run = partial(self.language_model, probe)
        self.blocks = Blocks.found(
            model, blocks, extract, positions, run=run, where="anchor", argument="anchor_hidden_position"
        )
        with undisturbed(model):
            self.dims = hidden_widths(self.blocks.read(run), "anchor")
            self.decodes = hasattr(self.language_model, "init_cache") and self._blocks_run_with_a_cache(probe)

    def _blocks_run_with_a_cache(self, probe: Tensor) -> bool:
        cache = self.language_model.init_cache(1, 3)
        try:
            for ids in (probe, probe[:, :1]):
                self.blocks.read(partial(self.language_model, ids, cache=cache))
        except RuntimeError:
            return False
        return True
