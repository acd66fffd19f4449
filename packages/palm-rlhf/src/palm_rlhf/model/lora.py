"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a frozen block, stored outside it: several scopes share one base.

Layout and initialisation are those of peft: ``A (r, in)`` Kaiming-uniform, ``B (out, r)`` zeros, scale ``alpha / r``
(``alpha / sqrt(r)`` rank-stabilised, arXiv 2312.03732). The product ``B A`` is never formed in a forward: at
2,048 x 2,048 and r = 8 that would be eleven times slower.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.checks import check_positive, check_probability, typed
from lm_core.nn.parallel_block import ParallelBlock

TARGETS = ("q", "k", "v", "o", "ff_in", "ff_out")
ATTENTION_TARGETS = ("q", "k", "v", "o")
# Parts of the fused projection, in the order of its output.
PROJECTED_TARGETS = ("q", "k", "v", "ff_in")


class LoRA(nn.Module):
    """``x -> scale * B A dropout(x)``.

    Args:
        dim: input features.
        dim_out: output features.
        r: rank.
        alpha: numerator of the scale; ``r`` by default, so that the scale is one.
        dropout: dropout on the input, in training mode.
        rank_stabilized: divides by ``sqrt(r)`` instead of ``r``.
    """

    @typed
    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        r: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim, "dim")
        check_positive(dim_out, "dim_out")
        check_positive(r, "r")
        check_probability(dropout, "dropout")
        _check_alpha(alpha, "alpha")
        self.r = r
        self.alpha = float(r if alpha is None else alpha)
        self.scale = self.alpha / (math.sqrt(r) if rank_stabilized else r)
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(r, dim))
        self.B = nn.Parameter(torch.zeros(dim_out, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Applies ``A``, then ``B``; the product ``B A`` is never formed."""
        return F.linear(F.linear(self.dropout(x), self.A), self.B) * self.scale

    def delta(self) -> Float[Tensor, "o i"]:
        """Weight ``(out, in)`` that merging adds."""
        return self.scale * (self.B @ self.A)


class BlockLoRA(nn.ModuleDict):
    """The adapters of one block, by target name: its ``lm_core.nn.parallel_block.Adapters``."""

    def __init__(self, adapters: dict[str, LoRA], dims: dict[str, tuple[int, int]]) -> None:
        super().__init__(adapters)
        self._sizes = [dims[target][1] for target in PROJECTED_TARGETS]

    def after_projection(self, x: Tensor, projected: Tensor) -> Tensor:
        """The output of the fused projection with the adapters of its parts."""
        parts = projected.split(self._sizes, dim=-1)
        targets = zip(PROJECTED_TARGETS, parts, strict=True)
        return torch.cat([self._add(target, x, part) for target, part in targets], dim=-1)

    def after_output(self, attended: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        """The block's output with the adapters of both output matrices."""
        return self._add("ff_out", inner, self._add("o", attended, out))

    def _add(self, target: str, x: Tensor, out: Tensor) -> Tensor:
        return out + self[target](x) if target in self else out

    def by_target(self) -> dict[str, LoRA]:
        """The adapters as a dictionary with their type."""
        return dict(self.items())  # type: ignore[arg-type]


@dataclass(frozen=True)
class LoRASettings:
    """Settings of a scope; stored in checkpoints and exports."""

    r: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    targets: tuple[str, ...]


class LoRAScope(nn.ModuleList):
    """One fine-tuning scope: a ``BlockLoRA`` for each block of the model."""

    def __init__(self, *, depth: int, dims: dict[str, tuple[int, int]], settings: LoRASettings) -> None:
        super().__init__()
        self.settings = settings
        shared = asdict(settings)
        targets = shared.pop("targets")
        self.extend(
            BlockLoRA({target: LoRA(*dims[target], **shared) for target in targets}, dims) for _ in range(depth)
        )

    def blocks(self) -> list[BlockLoRA]:
        """The adapters of each block of the model, in order."""
        return list(self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class MergedScope:
    """A scope that was merged into the base; ``unmerge_finetune_params`` takes it to undo the merge."""

    scope: str
    modules: LoRAScope


def lora_settings(
    *, r: int, alpha: float | None, dropout: float, rank_stabilized: bool, targets: Sequence[str]
) -> LoRASettings:
    """Checked settings of a scope.

    Raises:
        ValueError: a target is unknown or given twice, there is none, or a number is out of range.
    """
    check_positive(r, "lora_r")
    check_probability(dropout, "lora_dropout")
    _check_alpha(alpha, "lora_alpha")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets or len(set(targets)) != len(targets):
        raise ValueError(f"lora_targets must be distinct names out of {TARGETS}, got {tuple(targets)}")
    return LoRASettings(r, float(r if alpha is None else alpha), dropout, rank_stabilized, tuple(targets))


def _check_alpha(alpha: float | None, name: str) -> None:
    if alpha is not None and not 0.0 < alpha < math.inf:
        raise ValueError(f"{name} must be a positive number, got {alpha}")


def target_dims(block: ParallelBlock) -> dict[str, tuple[int, int]]:
    """Input and output features of every LoRA target of a block."""
    dim, (qk_dim, kv_dim, ff_in_dim) = block.norm.gamma.shape[0], block.in_dims
    return {
        "q": (dim, block.attn_dim),
        "k": (dim, qk_dim - block.attn_dim),
        "v": (dim, kv_dim),
        "o": (block.attn_dim, dim),
        "ff_in": (dim, ff_in_dim),
        "ff_out": (block.ff_dim, dim),
    }


def target_weights(block: ParallelBlock) -> dict[str, Tensor]:
    """The weight ``(out, in)`` of every LoRA target of a block, as views of its two fused matrices."""
    qk_dim, kv_dim, ff_in_dim = block.in_dims
    sizes = (block.attn_dim, qk_dim - block.attn_dim, kv_dim, ff_in_dim)
    weights = dict(zip(("q", "k", "v", "ff_in"), block.proj_in.weight.detach().split(sizes), strict=True))
    weights["o"], weights["ff_out"] = block.proj_out.weight.detach().split((block.attn_dim, block.ff_dim), dim=1)
    return weights
