"""Picture of the strength with which each anchor layer reads each augment position.

Legend: n anchor positions, m augment positions.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_core.causal_lm import eval_mode


@torch.no_grad()
def read_strengths(calm: Any, seq: Tensor, prompt: Any = None) -> list[tuple[str, Tensor]]:
    """Name and strengths ``(n, m)`` of each connection: attention weights times gates, averaged over heads and rows.

    Args:
        calm: the composition, with plain attention options.
        seq: ``(b, n)`` tokens of the anchor, without padding.
        prompt: as for ``CALM.forward``.
    """
    named: dict[str, Tensor] = {}
    with eval_mode(calm), contextlib.ExitStack() as hooks:
        for index, (augment, attentions) in enumerate(zip(calm.augments, calm.cross_attns, strict=True)):
            for (augment_layer, anchor_layer), attention in zip(augment.connections, attentions, strict=True):
                name = f"augment {index}, layer {augment_layer} → anchor layer {anchor_layer}"

                def keep(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    named[name] = module.weights(*args, **kwargs).mean(dim=(0, 1))

                hooks.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)
        calm(seq, prompt=prompt, return_loss=False)
    return list(named.items())


def draw_attention(
    calm: Any,
    seq: Tensor,
    prompt: Any = None,
    *,
    output: str | Path = "attention.png",
    anchor_labels: Sequence[str] | None = None,
    augment_labels: Sequence[str] | None = None,
) -> Path:
    """Draws ``read_strengths``, one panel for each connection.

    Args:
        calm: the composition.
        seq: as for ``read_strengths``.
        prompt: as for ``read_strengths``.
        output: a ``.png``.
        anchor_labels: names of the anchor's positions.
        augment_labels: names of the augment's positions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    panels = read_strengths(calm, seq, prompt)
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    image: Any = None
    for place, (title, strengths) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        image = axes.imshow(strengths.cpu().numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("augment position")
        if (place - 1) % columns == 0:
            axes.set_ylabel("anchor position")
        if augment_labels is not None:
            axes.set_xticks(range(len(augment_labels)), augment_labels)
        if anchor_labels is not None:
            axes.set_yticks(range(len(anchor_labels)), anchor_labels)
    figure.colorbar(image, ax=figure.axes, label="mean weight times gate", shrink=0.8)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, format="png")
    return target
