"""The opponent's answers to prompts, and its log-probabilities of answers.

Both are computed once per iteration and stored on disk (``RowStore``). Batches and their random numbers depend on
data, batch size, seed and iteration alone: resumed runs and runs on any number of processes generate the same answers.
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
    """Sampling settings.

    Attributes:
        max_seq_len: maximum length of a prompt with its answer, in tokens.
        temperature: sampling temperature; 0 is greedy.
        filter_fn: logits filter, called as ``filter_fn(logits, **filter_kwargs)``; None for no filter.
        filter_kwargs: arguments of ``filter_fn``.
        eos_id: token or tokens that end an answer.
        batch_size: prompts per batch; the sampled tokens depend on it.
        seed: sampling seed.
        precision: precision of matrix products.
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
        """The settings as JSON values, for a fingerprint."""
        plain = ("max_seq_len", "temperature", "batch_size", "seed", "precision")
        return {
            **{name: getattr(self, name) for name in plain},
            "filter": name_of_function(self.filter_fn),
            "filter_kwargs": repr(sorted(self.filter_kwargs.items())),
            "eos_id": list(self.eos_id) if isinstance(self.eos_id, tuple) else self.eos_id,
        }


def nucleus(mass: float | None) -> dict[str, Any]:
    """Arguments of ``Sampling`` and ``SPINTrainer`` for top-p sampling with this mass; None for no filter."""
    if mass is None:
        return {"filter_fn": None, "filter_kwargs": {}}
    return {"filter_fn": top_p, "filter_kwargs": {"thres": mass}}


@dataclass(frozen=True)
class Answer:
    """An answer of the opponent.

    Attributes:
        tokens: token ids, EOS included.
        finished: True if it ended with EOS, False if the length limit cut it off.
    """

    tokens: tuple[int, ...]
    finished: bool


def answer_prompts(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Answer]:
    """Samples an answer of a ``CausalLM`` to each prompt, up to ``max_seq_len`` tokens with the prompt.

    Raises:
        ValueError: a prompt leaves no room for an answer; see also ``lm_core.generation.generate.generate``.
    """
    # room after the shortest prompt: the most tokens that an answer can have
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) >= sampling.max_seq_len:
        raise ValueError(f"max_seq_len must exceed the longest prompt ({max(lengths)}), got {sampling.max_seq_len}")
    room = sampling.max_seq_len - min(lengths)
    limit = getattr(model, "max_length", None)
    if limit is not None and max(lengths) + room > limit >= sampling.max_seq_len:
        # padded, the batch would exceed the model's limit: answer its shorter and its longer half separately
        middle = len(prompts) // 2
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        answers: dict[int, Answer] = {}
        for index, part in enumerate((order[:middle], order[middle:])):
            part_answers = answer_prompts(model, [prompts[row] for row in part], sampling, seed_of(seed, index))
            answers |= dict(zip(part, part_answers, strict=True))
        return [answers[row] for row in range(len(prompts))]
    # generate all rows up to that room, then cut each where its own prompt leaves less
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
    """Row indices in batches of similar length, longest first, so that running out of memory shows early."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def opponent_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], precision: Precision
) -> list[float]:
    """Log-probability of each answer under ``model``, summed over its tokens, in nats."""
    device = next(model.parameters()).device
    scores: list[float] = ResponseScores(model, precision=precision)(*collate(prompts, answers, device)).tolist()
    return scores
