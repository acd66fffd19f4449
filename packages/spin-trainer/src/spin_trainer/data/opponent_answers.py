"""The opponent's side of an iteration: its answers to all prompts, and its log-probabilities of both answers.

Both are made once an iteration and kept on disk (``RowStore``). Which rows share a batch, and which random numbers a
batch draws, depends on the data and the seed only: so a resumed run, and a run on another number of processes, makes
the same answers. A batch that a kill interrupted is generated again and only its missing rows are written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lm_core.data.epochs import seed_of
from lm_core.distributed import barrier, rank, world_size
from lm_core.generation.decoding import Filter
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_p
from lm_core.training.accelerator import Precision, autocast
from spin_trainer.data.row_store import RowStore, name_of_function
from spin_trainer.data.sft_data import to_tensor
from spin_trainer.model.response_scores import collate, response_log_probs


class Interrupted(Exception):
    """Ctrl-C while rows were made; those that are done are on disk."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_seq_len: longest prompt with answer.
        temperature: 0 takes the most likely token.
        filter_fn: called as ``filter_fn(logits, **filter_kwargs)``; None for none.
        filter_kwargs: its arguments.
        eos_id: token or tokens that end an answer.
        batch_size: prompts at a time; part of what decides the draws.
        seed: of the draws.
        precision: of matrix products.
    """

    max_seq_len: int
    temperature: float = 0.7
    filter_fn: Callable[..., Tensor] | None = top_p
    filter_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"thres": 0.9})
    eos_id: int | tuple[int, ...] | None = None
    batch_size: int = 16
    seed: int = 0
    precision: Precision = "fp32"

    def description(self) -> dict[str, Any]:
        """JSON values for a fingerprint."""
        return {
            "max_seq_len": self.max_seq_len,
            "temperature": self.temperature,
            "filter": name_of_function(self.filter_fn),
            "filter_kwargs": repr(sorted(self.filter_kwargs.items())),
            "eos_id": self.eos_id if self.eos_id is None or isinstance(self.eos_id, int) else list(self.eos_id),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.precision,
        }


def nucleus(mass: float | None) -> dict[str, Any]:
    """Arguments of ``Sampling`` and ``SPINTrainer`` that sample from the nucleus of this mass; None for no filter."""
    return {
        "filter_fn": None if mass is None else top_p,
        "filter_kwargs": {} if mass is None else {"thres": mass},
    }


@dataclass(frozen=True)
class Answer:
    """What the opponent said.

    Attributes:
        tokens: its answer, EOS included.
        finished: whether it ended by EOS, not at the length limit.
    """

    tokens: tuple[int, ...]
    finished: bool


def answer_prompts(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Answer]:
    """Answers of ``model`` to prompts of different lengths, each filled up to ``max_seq_len``.

    Args:
        model: a ``CausalLM``.
        prompts: token ids.
        sampling: how answers are drawn.
        seed: of this batch's draws.

    Raises:
        ValueError: a prompt leaves no room, or as ``lm_core.generation.generate.generate``.
    """
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) >= sampling.max_seq_len:
        raise ValueError(f"max_seq_len must exceed the longest prompt ({max(lengths)}), got {sampling.max_seq_len}")
    room = sampling.max_seq_len - min(lengths)
    limit = getattr(model, "max_length", None)
    if limit is not None and max(lengths) + room > limit >= sampling.max_seq_len:
        # each row fits, but not the shortest row's room behind the longest prompt
        middle = len(prompts) // 2
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        answers: dict[int, Answer] = {}
        for number, part in enumerate((order[:middle], order[middle:])):
            found = answer_prompts(model, [prompts[row] for row in part], sampling, seed_of(seed, number))
            answers |= dict(zip(part, found, strict=True))
        return [answers[row] for row in range(len(prompts))]
    device = next(model.parameters()).device
    filters: tuple[Filter, ...] = ()
    if sampling.filter_fn is not None:
        filters = (partial(sampling.filter_fn, **sampling.filter_kwargs),)
    with autocast(sampling.precision, device):
        generation = generate(
            model,
            [to_tensor(prompt) for prompt in prompts],
            max_new_tokens=room,
            temperature=sampling.temperature,
            filters=filters,
            eos_id=sampling.eos_id,
            generator=torch.Generator(device).manual_seed(seed),
        )
    answers_in_order = []
    rows = zip(generation.tokens.tolist(), generation.lengths.tolist(), generation.finished.tolist(), strict=True)
    for (tokens, length, finished), prompt_length in zip(rows, lengths, strict=True):
        own_room = sampling.max_seq_len - prompt_length
        answers_in_order.append(Answer(tuple(tokens[: min(length, own_room)]), finished and length <= own_room))
    return answers_in_order


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first (so that a lack of memory shows at once)."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def fill(
    store: RowStore,
    batches: Sequence[list[int]],
    work: Callable[[int, list[int]], Iterable[Mapping[str, Any]]],
    *,
    description: str,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Makes the rows that a store lacks, each process its share of the batches, until all processes are done.

    Args:
        store: where rows are kept.
        batches: row numbers of each batch.
        work: gets the number of a batch and its rows, and gives a dict with "row" for each.
        description: of the progress bar.
        stop: asked between batches; True leaves the rest.
    """
    share = [(number, rows) for number, rows in enumerate(batches) if number % world_size() == rank()]
    todo = [(number, rows) for number, rows in share if any(row not in store.rows for row in rows)]
    for number, rows in tqdm(todo, desc=description, unit="batch", disable=rank() != 0 or not todo, leave=False):
        if stop():
            break
        store.append(work(number, rows))
    barrier()
    store.refresh()


@torch.no_grad()
def opponent_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], precision: Precision
) -> list[float]:
    """Summed log-probability of each answer under ``model``, in nats."""
    device = next(model.parameters()).device
    ids, answer, mask = collate(prompts, answers, device)
    with autocast(precision, device):
        scores = response_log_probs(model, ids, answer, mask)
    return [float(score) for score in scores.cpu()]
