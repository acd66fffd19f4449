"""Retrofits a memory to a trained model (arXiv 2203.08913, section 4.4: a pretrained model learns to use one quickly).

A model that was trained with memorizing layers but without memories (``knn_memories=None``) continues training with
memories after ``open_gates``. One without memorizing layers gets new ones, whose gate starts closed (``retrofit``).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from lm_core.checks import typed
from memorizing_transformer.model.knn_attention import GATE_START
from memorizing_transformer.model.transformer import MemorizingTransformer


@typed
def retrofit(
    model: MemorizingTransformer, *, memorizing_layers: int | Sequence[int] | None = None, **settings: Any
) -> MemorizingTransformer:
    """A copy of ``model`` with an attention to the memory after the plain attention of some layers.

    The new attention's output gate starts at tanh(0) = 0: before training the copy computes the same as ``model``.

    Args:
        model: a model without memorizing layers.
        memorizing_layers: layers that get a memory, counted from 1; the middle one by default.
        **settings: constructor arguments to replace, such as ``max_knn_memories``.

    Raises:
        ValueError: the model has memorizing layers already, a layer does not exist, or settings change other layers.
    """
    if model.memorizing_layers:
        raise ValueError(
            f"model must have no memorizing layers, got {list(model.memorizing_layers)}; train it with memories"
        )
    chosen = max(1, model.depth // 2) if memorizing_layers is None else memorizing_layers
    added = {"memorizing_layers": chosen, "gate_output": True, "knn_memories_directory": model.knn_memories_directory}
    twin = MemorizingTransformer.from_config(model.config, **{**added, **settings}).to(
        model.device, model.token_emb.weight.dtype
    )
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    changed = [*unexpected, *(name for name in missing if ".attentions.1." not in name)]
    if changed:
        raise ValueError(f"settings must keep the model's layers, got {sorted(settings)}, which change {changed[0]}")
    return twin.train(model.training)


@typed
def open_gates(model: MemorizingTransformer, part: float = 0.5) -> bool:
    """Opens, in place, the sigmoid gates of a model that was trained without its memory.

    A gate starts nearly closed, because an untrained model retrieves nothing useful. A model trained without memories
    has learned to match contexts in its window, but its gates have not moved: with gates at 0.5 it learns to use a
    memory in fewer steps (``tests/benchmarks/study_memorizing_transformer_gain.py``). Trained gates stay as they are.

    Args:
        model: a model with memorizing layers.
        part: weight of the memory in each head's output, between 0 and 1.

    Returns:
        Whether a gate was opened.

    Raises:
        ValueError: ``part`` is not between 0 and 1.
    """
    if not 0 < part < 1:
        raise ValueError(f"part must be between 0 and 1, got {part}")
    gates = [attention.gate for attention in model.memory_attentions() if attention.gate is not None]
    untrained = [gate for gate in gates if bool((gate == GATE_START).all())]
    with torch.no_grad():
        for gate in untrained:
            gate.fill_(math.log(part / (1 - part)))
    return bool(untrained)
