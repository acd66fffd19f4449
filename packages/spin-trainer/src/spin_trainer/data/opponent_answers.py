"""The opponent's side of an iteration: its answers to all prompts, and its log-probabilities of both answers.

Both are made once an iteration and kept on disk (``RowStore``). Which rows share a batch, and which random numbers a
batch draws, depends on the data and the seed only: so a resumed run, and a run on another number of processes, makes
the same answers. A batch that a kill interrupted is generated again and only its missing rows are written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm_core.data.epochs import seed_of
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_p
from lm_core.training.accelerator import Precision, autocast
from spin_trainer.data.row_store import name_of_function
from spin_trainer.model.response_scores import ResponseScores, collate


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
        as_they_are = ("max_seq_len", "temperature", "batch_size", "seed", "precision")
        return {
            **{name: getattr(self, name) for name in as_they_are},
            "filter": name_of_function(self.filter_fn),
            "filter_kwargs": repr(sorted(self.filter_kwargs.items())),
            "eos_id": list(self.eos_id) if isinstance(self.eos_id, tuple) else self.eos_id,
        }


def nucleus(mass: float | None) -> dict[str, Any]:
    """Arguments of ``Sampling`` and ``SPINTrainer`` that sample from the nucleus of this mass; None for no filter."""
    if mass is None:
        return {"filter_fn": None, "filter_kwargs": {}}
    return {"filter_fn": top_p, "filter_kwargs": {"thres": mass}}


@dataclass(frozen=True)
class Answer:
    """The opponent's answer to a prompt.

    Attributes:
        tokens: token ids, EOS included.
        finished: whether it ended by EOS, not at the length limit.
    """

    tokens: tuple[int, ...]
    finished: bool


def answer_prompts(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Answer]:
    """Answers of a ``CausalLM`` to prompts of token ids, each filled up to ``max_seq_len`` and drawn by ``seed``.

    Raises:
        ValueError: a prompt leaves no room, or as ``lm_core.generation.generate.generate``.
    """
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) >= sampling.max_seq_len:
        raise ValueError(f"max_seq_len must exceed the longest prompt ({max(lengths)}), got {sampling.max_seq_len}")
    room = sampling.max_seq_len - min(lengths)
    limit = getattr(model, "max_length", None)
    if limit is not None and max(lengths) + room > limit >= sampling.max_seq_len:
        # each row fits, but not the shortest row's room after the longest prompt
        middle = len(prompts) // 2
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        answers: dict[int, Answer] = {}
        for number, part in enumerate((order[:middle], order[middle:])):
            found = answer_prompts(model, [prompts[row] for row in part], sampling, seed_of(seed, number))
            answers |= dict(zip(part, found, strict=True))
        return [answers[row] for row in range(len(prompts))]
    device = next(model.parameters()).device
    filter_fn = sampling.filter_fn
    with autocast(sampling.precision, device):
        generation = generate(
            model,
            [torch.tensor(prompt) for prompt in prompts],
            max_new_tokens=room,
            temperature=sampling.temperature,
            filters=() if filter_fn is None else (partial(filter_fn, **sampling.filter_kwargs),),
            eos_id=sampling.eos_id,
            generator=torch.Generator(device).manual_seed(seed),
        )
    rows = zip(generation.tokens.tolist(), generation.lengths.tolist(), generation.finished.tolist(), strict=True)
    rooms = [sampling.max_seq_len - length for length in lengths]
    return [
        Answer(tuple(tokens[: min(length, room)]), finished and length <= room)
        for (tokens, length, finished), room in zip(rows, rooms, strict=True)
    ]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first (so that a lack of memory shows at once)."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def opponent_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], precision: Precision
) -> list[float]:
    """Summed log-probability of each answer under ``model``, in nats."""
    device = next(model.parameters()).device
    scores: list[float] = ResponseScores(model, precision=precision)(*collate(prompts, answers, device)).tolist()
    return scores
