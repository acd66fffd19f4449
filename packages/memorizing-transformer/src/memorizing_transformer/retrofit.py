"""Giving a trained model a memory (arXiv 2203.08913, section 4.4: a pretrained model learns to use one quickly).

A model that was trained with memorizing layers but without memories (``knn_memories=None``) needs nothing of this: it
is simply trained on with memories. One without memorizing layers gets new ones, behind a gate that begins closed.
"""

from collections.abc import Sequence
from typing import Any

from lm_core._checks import typed
from memorizing_transformer.transformer import MemorizingTransformer


@typed
def retrofit(
    model: MemorizingTransformer, *, memorizing_layers: int | Sequence[int] | None = None, **settings: Any
) -> MemorizingTransformer:
    """A copy of ``model`` with an attention to the memory behind the plain attention of some layers.

    Its gate begins at tanh(0) = 0: before any training the copy computes what ``model`` does.

    Args:
        model: without memorizing layers.
        memorizing_layers: layers to give one, counted from 1; the middle one by default.
        **settings: constructor arguments to replace, such as ``max_knn_memories``.

    Raises:
        ValueError: the model has memorizing layers already, or a layer does not exist.
    """
    if model.memorizing_layers:
        raise ValueError(
            f"model must have no memorizing layers, got {list(model.memorizing_layers)}; train it on with memories"
        )
    chosen = max(1, model.depth // 2) if memorizing_layers is None else memorizing_layers
    twin = MemorizingTransformer.from_config(
        model.config, **{"memorizing_layers": chosen, "gate_output": True, **settings}
    ).to(model.device, model.token_emb.weight.dtype)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    fresh = {name for name in missing if ".attentions.1." in name}
    assert not unexpected
    assert fresh == set(missing)
    return twin.train(model.training)
