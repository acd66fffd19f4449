"""The layers of the model: pre-norm attention, in some layers a second one to the memory, and a feed-forward.

The T5 bias of local attention is learned once for the plain and once for the memorizing layers.

Legend: b batch, i queries, j keys (past ones, then the new ones), g key heads, h heads, d feature of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.attention import LocalAttention, RelativePositionBias
from memorizing_transformer.model.knn_attention import MemorizingAttention
from memorizing_transformer.model.segment import Past, Place, View


class Attention(nn.Module):
    """Pre-norm attention of either kind with its residual connection."""

    def __init__(self, dim: int, inner: LocalAttention | MemorizingAttention, place: Place) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = inner
        self.place = place

    def forward(
        self, h: Float[Tensor, "b i dim"], **reading: Any
    ) -> tuple[Float[Tensor, "b i dim"], Float[Tensor, "b g i 2 d"]]:
        """Returns the residual stream after the attention, and the new keys and values.

        ``reading`` has the arguments of ``LocalAttention.forward`` or ``MemorizingAttention.forward``.
        """
        out, kv = self.inner(self.norm(h), **reading)
        return h + out, kv

    def reading(
        self, biases: tuple[Tensor, Tensor], *, view: View, past: Past, memories: KNNMemoryList | None
    ) -> dict[str, Any]:
        """The arguments of ``forward``; ``biases`` are for plain and for memorizing attentions."""
        bias = biases[isinstance(self.inner, MemorizingAttention)]
        # without an XL window there are no keys for the first columns
        bias = bias if self.place.reads_xl is not None else bias[..., past.width :]
        reading: dict[str, Any] = {"bias": bias, "past": past.of(self.place)}
        if self.place.reads_memory is not None and memories:
            reading |= {"memory": memories[self.place.reads_memory], "may_recall": view.continues_document}
        return reading


class Block(nn.Module):
    """One layer: an attention, or two (a plain one and a gated one to the memory), and a feed-forward."""

    def __init__(self, *, dim: int, attentions: Sequence[Attention], ff_mult: int, ff_dropout: float) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.ff_norm = nn.LayerNorm(dim)
        inner = dim * ff_mult
        self.ff = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Dropout(ff_dropout), nn.Linear(inner, dim))

    def forward(
        self, h: Float[Tensor, "b i dim"], readings: Sequence[dict[str, Any]]
    ) -> tuple[Float[Tensor, "b i dim"], list[Tensor]]:
        """Returns the residual stream after the layer, and the new keys and values of its attentions.

        ``readings`` has the arguments of each attention.
        """
        kept = []
        for attention, reading in zip(self.attentions, readings, strict=True):
            h, kv = attention(h, **reading)
            kept.append(kv)
        return h + self.ff(self.ff_norm(h)), kept


class Layers(nn.Module):
    """The layers between the embedding and the last norm.

    Layers with a memory or an XL window are counted from 1, in ascending order; a layer reads the memory ``shift_knn``
    and the window ``shift_xl`` places farther up, or the last one. ``plain`` and ``memorizing`` are the arguments of
    ``LocalAttention`` and ``MemorizingAttention`` other than ``dim``.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        memorizing_layers: Sequence[int],
        xl_memory_layers: Sequence[int],
        shift_knn: int,
        shift_xl: int,
        plain: dict[str, Any],
        memorizing: dict[str, Any],
        ff_mult: int,
        ff_dropout: float,
    ) -> None:
        super().__init__()
        scale = plain["dim_head"] ** 0.5
        self.position_bias = RelativePositionBias(heads=plain["heads"], scale=scale, look_back=True)
        # no look_back: it would outweigh the retrieved keys
        self.knn_position_bias = RelativePositionBias(heads=memorizing["heads"], scale=scale)
        # DDP expects a gradient for every parameter that requires one, but a bias may have no layer that uses it
        plain_layers = set(range(1, depth + 1)).difference(() if memorizing["gate_output"] else memorizing_layers)
        self.position_bias.requires_grad_(bool(plain_layers))
        self.knn_position_bias.requires_grad_(bool(memorizing_layers))
        self.blocks = nn.ModuleList()
        number = 0
        for layer in range(1, depth + 1):
            xl = xl_memory_layers.index(layer) if layer in xl_memory_layers else None
            memory = memorizing_layers.index(layer) if layer in memorizing_layers else None
            inner: list[LocalAttention | MemorizingAttention] = []
            if memory is None or memorizing["gate_output"]:
                inner.append(LocalAttention(dim=dim, **plain))
            if memory is not None:
                inner.append(MemorizingAttention(dim=dim, **memorizing))
            attentions = []
            for attention in inner:
                # with two attentions, the first has the XL window and the second the memory
                own_xl = xl if attention is inner[0] else None
                own_knn = memory if attention is inner[-1] else None
                place = Place(
                    number=number,
                    key_heads=attention.projections.key_heads,
                    xl=own_xl,
                    memory=own_knn,
                    reads_xl=None if own_xl is None else min(own_xl + shift_xl, len(xl_memory_layers) - 1),
                    reads_memory=None if own_knn is None else min(own_knn + shift_knn, len(memorizing_layers) - 1),
                )
                attentions.append(Attention(dim, attention, place))
                number += 1
            self.blocks.append(Block(dim=dim, attentions=attentions, ff_mult=ff_mult, ff_dropout=ff_dropout))

    def places(self) -> list[Place]:
        """Places of all attentions, in the order of application."""
        return [attention.place for block in self.blocks for attention in block.attentions]  # type: ignore[union-attr]

    def forward(
        self, h: Float[Tensor, "b i dim"], *, view: View, past: Past, memories: KNNMemoryList | None
    ) -> tuple[Float[Tensor, "b i dim"], list[Tensor]]:
        """Applies all layers to a segment or a piece of one.

        Args:
            h: embedded tokens.
            view: which keys each token may see.
            past: keys and values before the tokens.
            memories: memories to search; None for local attention only.

        Returns:
            The residual stream, and the new keys and values ``(b, g, i, 2, d)`` of each attention.
        """
        hidden = ~view.visible.unsqueeze(1)
        biases = (
            self.position_bias(view.distances).masked_fill(hidden, -torch.inf),
            self.knn_position_bias(view.distances).masked_fill(hidden, -torch.inf),
        )
        kept: list[Tensor] = []
        for block in self.blocks:
            # outside of the block: with --compile, layers that read other windows and memories share compiled code
            attentions: Any = block.attentions
            readings = [each.reading(biases, view=view, past=past, memories=memories) for each in attentions]
            h, new = block(h, readings)
            kept += new
        return h, kept
