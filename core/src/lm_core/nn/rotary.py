"""Rotary position embedding (arXiv 2104.09864) and its length-extrapolating form xPos (arXiv 2212.10554).

Layout: half rotation, ``rotate_half(cat(x1, x2)) = cat(-x2, x1)``, base 10000. The sine carries the minus sign.

Angles and scales are computed in float32 (float64 for float64 inputs) in a model of any dtype, because bfloat16
cannot distinguish adjacent positions beyond 256.

xPos multiplies queries by ``zeta ** (p / 512)`` and keys by ``zeta ** (-p / 512)``; only differences of positions
matter. No single origin is safe: at position 32,768 the factors overflow. So keys stay UNSCALED (also in a cache) and
``xpos_blocks`` returns both factors for one block of queries at a time, with the block's first position as origin: keys
before the block then only shrink, and inside a block of 1,024 the factor is at most ``(0.4 / 1.4) ** -2``, about 12.
Scaling does not change the relative error, so float32 and bfloat16 take longer blocks and need fewer masks.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_core.checks import check_positive, typed
from lm_core.nn.norms import statistics_dtype

# Powers of zeta in a block: its largest factor is 12 in float16 (maximum 65,504) and 22,000 in dtypes of wider range.
XPOS_POWERS_HALF, XPOS_POWERS = 2, 8


def rotate_half(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Maps ``cat(x1, x2)`` to ``cat(-x2, x1)`` along the last dimension."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary(
    x: Float[Tensor, "... n d"], cos: Float[Tensor, "... #n d"], sin: Float[Tensor, "... #n d"]
) -> Float[Tensor, "... n d"]:
    """Rotates ``x``: ``x * cos(angle) + rotate_half(x) * sin(angle)``.

    Args:
        x: queries or keys.
        cos: cosines from ``RotaryEmbedding``.
        sin: sines from ``RotaryEmbedding``, which include the minus sign of ``rotate_half``: the halves are only
            swapped, a third of the work.

    Returns:
        The rotated features, computed in the dtype of ``cos`` and returned in that of ``x``.
    """
    wide = x if x.dtype == cos.dtype else x.to(cos.dtype)
    rotated = torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin)
    return rotated if x.dtype == cos.dtype else rotated.to(x.dtype)


@dataclass(frozen=True)
class XPosBlock:
    """One block of queries ``start:stop``, which attends to keys ``:key_stop`` (all of them if not causal)."""

    start: int
    stop: int
    key_stop: int
    query_scale: Tensor | None
    key_scale: Tensor


class RotaryEmbedding(nn.Module):
    """Angles for ``apply_rotary`` and scales for xPos.

    Args:
        dim: feature size of a head; even.
        theta: base of the geometric progression of wavelengths.
        use_xpos: True for a model that applies the decaying scales of ``xpos_blocks``.
        scale_base: positions over which xPos scales by one power of zeta.
    """

    @typed
    def __init__(self, dim: int, *, theta: float = 10000.0, use_xpos: bool = False, scale_base: float = 512.0) -> None:
        super().__init__()
        check_positive(dim, "dim")
        if dim % 2:
            raise ValueError(f"dim_head must be even for rotary embeddings, got {dim}")
        for name, value in (("theta", theta), ("scale_base", scale_base)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        self.dim = dim
        self.theta = theta
        self.use_xpos = use_xpos
        self.scale_base = scale_base
        # A plain attribute, not a buffer: `.bfloat16()` must not convert it. The key holds all that a table depends on.
        self._tables: dict[tuple[torch.device, torch.dtype, float], tuple[Tensor, Tensor]] = {}
        self._log_zetas: dict[tuple[torch.device, torch.dtype, float], Tensor] = {}

    def forward(
        self,
        positions: Int[Tensor, "*b n"] | tuple[int, int],
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | None = None,
    ) -> tuple[Float[Tensor, "*b n d"], Float[Tensor, "*b n d"]]:
        """Cosine and signed sine of the angles at ``positions``, float64 if ``dtype`` is and float32 otherwise.

        The sine's first half is negated, as ``apply_rotary`` expects.

        Args:
            positions: any integers, or the two ends of a range, which is read from a table.
            dtype: dtype of queries and keys.
            device: device of the angles of a range.
        """
        if isinstance(positions, Tensor):
            return self._angles(positions, dtype)
        start, stop = positions
        device = torch.device("cpu") if device is None else device
        if torch.compiler.is_compiling():
            return self._angles(torch.arange(start, stop, device=device), dtype)
        key = (device, statistics_dtype(dtype), self.theta)
        table = self._tables.get(key)
        if table is None or table[0].shape[0] < stop:
            length = max(64, 1 << (stop - 1).bit_length())
            # A table made under inference_mode could not be used by the next training step.
            with torch.inference_mode(False), torch.no_grad():
                table = self._angles(torch.arange(length, device=device), dtype)
            self._tables[key] = table
        return table[0][start:stop], table[1][start:stop]

    def at_range(self, start: int, stop: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine at positions ``start:stop``, each ``(stop - start, d)``, from a table that grows."""
        angles: tuple[Tensor, Tensor] = self((start, stop), dtype, device=device)
        return angles

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.dim, 2, device=positions.device, dtype=statistics_dtype(dtype)) / self.dim
        angles = rearrange(positions, "... -> ... 1") * self.theta**-exponents
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def xpos_blocks(
        self,
        query_positions: Int[Tensor, "*b i"],
        key_positions: Int[Tensor, "*b j"],
        *,
        dtype: torch.dtype = torch.float32,
        block: int | None = None,
    ) -> tuple[XPosBlock, ...]:
        """Splits queries into blocks with their scales (arXiv 2212.10554, equation 13, up to the origin).

        The queries are the last ``i`` of the ``j`` keys, as in causal attention with a cache.

        Args:
            query_positions: positions of the queries, ``(i,)`` or one row for each batch element ``(b, i)``.
            key_positions: positions of cached and new keys.
            dtype: dtype of queries and keys; scales are float64 if it is and float32 otherwise.
            block: queries in a block; by default 2 x ``scale_base`` (1,024) for float16 and 8 x (4,096) otherwise.
        """
        if block is None:
            powers = XPOS_POWERS_HALF if dtype == torch.float16 else XPOS_POWERS
            block = max(1, int(powers * self.scale_base))
        i, j = query_positions.shape[-1], key_positions.shape[-1]
        log_zeta = self._log_zeta(query_positions.device, dtype)
        blocks = []
        # One block needs no range, with which torch.compile would specialise on the length.
        for start in range(0, i, block) if i > block else (0,):
            stop = start + block if start + block < i else i
            key_stop = j - i + stop
            origin = query_positions[..., start : start + 1]
            # A single query is at the origin: its scale is one.
            query_scale = None
            if stop - start > 1:
                query_scale = _scale(query_positions[..., start:stop] - origin, log_zeta)
            key_scale = _scale(origin - key_positions[..., :key_stop], log_zeta)
            blocks.append(XPosBlock(start, stop, key_stop, query_scale, key_scale))
        return tuple(blocks)

    def _log_zeta(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            return self._new_log_zeta(device, dtype)
        key = (device, statistics_dtype(dtype), self.scale_base)
        if key not in self._log_zetas:
            with torch.inference_mode(False), torch.no_grad():
                self._log_zetas[key] = self._new_log_zeta(device, dtype)
        return self._log_zetas[key]

    def _new_log_zeta(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        even = torch.arange(0, self.dim, 2, device=device, dtype=statistics_dtype(dtype))
        return ((even + 0.4 * self.dim) / (1.4 * self.dim)).log() / self.scale_base


def _scale(distance: Tensor, log_zeta: Tensor) -> Tensor:
    scale = (rearrange(distance, "... n -> ... n 1") * log_zeta).exp()
    return torch.cat((scale, scale), dim=-1)
