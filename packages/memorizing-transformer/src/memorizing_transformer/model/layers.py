"""All layers of the model, and the loop over them that whole segments and pieces of one share.

T5 relative bias on local attention is learned once for the plain and once for the memorizing layers.

Legend: b batch, i queries, j keys (remembered ones, then the segment's), d feature, h heads.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.attention import LocalAttention
from memorizing_transformer.model.block import Attention, Block, FeedForward
from memorizing_transformer.model.knn_attention import KNNAttention
from memorizing_transformer.model.relative_position import RelativePositionBias
from memorizing_transformer.model.segment import Documents, additive

# Takes the number of an attention and its new keys and values, returns all that may be attended to.
RememberOf = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# A model from token ids (b, i), with the keywords of ``Layers.forward``, to what its output layer is applied to.
FeaturesOf = Callable[..., Tensor]


class Layers(nn.Module):
    """The layers between the embedding and the last norm.

    Args:
        dim: features of the residual stream.
        depth: how many layers.
        memorizing_layers: those with a memory, counted from 1, in ascending order.
        xl_memory_layers: those with an XL window, likewise.
        shift_knn: how many memories farther up a memorizing layer searches.
        plain: arguments of ``LocalAttention`` other than ``dim``.
        memorizing: arguments of ``KNNAttention`` other than ``dim``.
        feed_forward: arguments of ``FeedForward`` other than ``dim``.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        memorizing_layers: Sequence[int],
        xl_memory_layers: Sequence[int],
        shift_knn: int,
        plain: dict[str, Any],
        memorizing: dict[str, Any],
        feed_forward: dict[str, Any],
    ) -> None:
        super().__init__()
        self.shift_knn = shift_knn
        scale = plain["dim_head"] ** 0.5
        self.position_bias = RelativePositionBias(heads=plain["heads"], scale=scale, look_back=True)
        # here a head that looked back from the start would drown what the memory finds
        self.knn_position_bias = RelativePositionBias(heads=memorizing["heads"], scale=scale)
        # unused without memorizing layers, and processes that train together expect a gradient of all that needs one
        self.knn_position_bias.requires_grad_(bool(memorizing_layers))
        self.blocks = nn.ModuleList()
        for layer in range(1, depth + 1):
            xl = xl_memory_layers.index(layer) if layer in xl_memory_layers else None
            memory = memorizing_layers.index(layer) if layer in memorizing_layers else None
            attentions = []
            if memory is None or memorizing["gate_output"]:
                attentions.append(Attention(dim, LocalAttention(dim=dim, **plain), xl=xl, memory=None))
            if memory is not None:
                behind = bool(attentions)
                attention = KNNAttention(dim=dim, **memorizing)
                attentions.append(Attention(dim, attention, xl=None if behind else xl, memory=memory))
            self.blocks.append(Block(dim=dim, attentions=attentions, feed_forward=FeedForward(dim=dim, **feed_forward)))

    def attentions(self) -> list[Attention]:
        """All attentions in the order they are applied."""
        return [one for block in self.blocks for one in block.attentions]  # type: ignore[union-attr]

    def forward(
        self,
        h: Float[Tensor, "b i d"],
        *,
        distances: Int[Tensor, "#b i j"],
        visible: Bool[Tensor, "#b i j"],
        past: int,
        documents: Documents | None,
        memories: KNNMemoryList | None,
        remember: RememberOf,
    ) -> Float[Tensor, "b i d"]:
        """Applies all layers to a segment or a piece of one.

        Args:
            h: embedded tokens.
            distances: position of the query minus that of the key.
            visible: which keys each query may see.
            past: how many of the columns are the XL window's.
            documents: of the queries; those that do not continue what came before use no memory.
            memories: to search; None for local attention alone.
            remember: called for each attention, by its number.
        """
        plain = additive(self.position_bias(distances), visible)
        memorizing = additive(self.knn_position_bias(distances), visible)
        reads_memory = None if documents is None else documents.ids == 0
        number = 0
        for block in self.blocks:
            for one in block.attentions:  # type: ignore[union-attr]
                columns = slice(None) if one.xl is not None else slice(past, None)
                step = partial(remember, number)
                normed = one.norm(h)
                if isinstance(one.inner, KNNAttention):
                    h = h + one.inner.attend(
                        normed,
                        bias=memorizing[..., columns],
                        memory=memories[min(one.memory + self.shift_knn, len(memories) - 1)] if memories else None,
                        reads_memory=reads_memory,
                        remember=step,
                    )
                else:
                    h = h + one.inner(normed, bias=plain[..., columns], remember=step)
                number += 1
            h = block.feed(h)  # type: ignore[operator]
        return h
