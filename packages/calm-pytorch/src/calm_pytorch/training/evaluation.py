"""Mean losses on held-out examples: of a composition, and of its anchor alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calm_pytorch.model.calm import CALM
from calm_pytorch.model.inputs import IGNORED, labels_of, real_tokens
from calm_pytorch.training.data import Batches
from lm_core.causal_lm import eval_mode
from lm_core.checks import check_positive, typed
from lm_core.distributed import all_reduce_sum, rank, world_size
from lm_core.losses.losses import token_log_probs


@dataclass(frozen=True)
class Evaluation:
    """Scores on held-out examples.

    Attributes:
        loss: mean loss a token of the composition, in nats.
        anchor_loss: that of the anchor alone.
        tokens: number of tokens that count.
    """

    loss: float
    anchor_loss: float
    tokens: int


@typed
@torch.no_grad()
def evaluate(
    calm: CALM,
    dataset: Any,
    *,
    data_kwarg_names: Sequence[str] = ("seq", "mask", "prompt"),
    collate_fn: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Scores a composition and its anchor alone on examples, sharded over the processes.

    Args:
        calm: the composition.
        dataset: with ``len`` and ``dataset[i]``, as for ``FineTuner``.
        data_kwarg_names: names of the entries of a tuple.
        collate_fn: makes a batch of examples; torch's default stacks tensors.
        batch_size: examples in a batch.

    Raises:
        ValueError: ``batch_size`` is below 1, or no token counts.
    """
    check_positive(batch_size, "batch_size")
    batches = Batches(data_kwarg_names, collate_fn, next(calm.trainable_parameters()).device)

    def values(batch: dict[str, Any]) -> list[Any]:
        seq, counted = batch["seq"], labels_of(batch["seq"], batch.get("mask"), calm.pad_id) != IGNORED
        real = real_tokens(seq, None, calm.pad_id)
        ids = seq if real is None else seq.masked_fill(~real, 0)
        alone = token_log_probs(calm.anchor, ids, mask=real)
        return [calm(**batch, reduction="sum"), -(alone * counted).sum(), counted.sum()]

    with eval_mode(calm):
        loss, anchor_loss, tokens = sums_over(dataset, batches, batch_size, 3, values)
    if tokens == 0:
        raise ValueError("dataset must have tokens that count in the loss, got none")
    return Evaluation(loss / tokens, anchor_loss / tokens, round(tokens))


def sums_over(
    dataset: Any, batches: Batches, batch_size: int, count: int, values: Callable[[dict[str, Any]], Sequence[Any]]
) -> list[float]:
    """Sums of ``count`` values of each batch; the processes share the batches, and each gets the sums over all."""
    totals = torch.zeros(count, device=batches.device)
    for start in range(rank() * batch_size, len(dataset), batch_size * world_size()):
        batch = batches.of(dataset, range(start, min(start + batch_size, len(dataset))))
        totals += torch.stack([torch.as_tensor(value, device=batches.device).float() for value in values(batch)])
    sums: list[float] = all_reduce_sum(totals).tolist()
    return sums
