"""The opponent's answers to prompts, and its log-probabilities of answers.

Both are computed once per iteration and stored on disk (``RowStore``). Batches and their random numbers depend on
data, batch size, seed and iteration alone: resumed runs and runs on any number of processes generate the same answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lm_core.cli.text_generation import SamplingFlags
from lm_core.data.epochs import seed_of
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_p as nucleus
from lm_core.training.accelerator import Precision, autocast
from spin_trainer.data.row_store import name_of_function
from spin_trainer.model.response_scores import ResponseScores, collate

Engine = Literal["lm_core", "vllm"]


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingFlags):
    """Sampling settings; temperature, top-k, top-p, min-p and repetition penalty as in ``SamplingFlags``.

    Attributes:
        max_seq_len: maximum length of a prompt with its answer, in tokens.
        max_new_tokens: maximum length of an answer; None is what ``max_seq_len`` leaves.
        own_filters: further logits filters, ``(b, v) -> (b, v)``.
        eos_id: token or tokens that end an answer.
        batch_size: prompts per batch; the sampled tokens depend on it.
        seed: sampling seed.
        precision: precision of matrix products.
        engine: engine that generates: "lm_core", or "vllm".
    """

    max_seq_len: int
    max_new_tokens: int | None = None
    temperature: float = 0.7
    top_p: float | None = 0.9
    own_filters: tuple[Callable[[Tensor], Tensor], ...] = ()
    eos_id: int | tuple[int, ...] | None = None
    batch_size: int = 16
    seed: int = 0
    precision: Precision = "fp32"
    engine: Engine = "lm_core"

    def description(self) -> dict[str, Any]:
        """The settings as JSON values, for a fingerprint."""
        names = ("max_seq_len", "temperature", "batch_size", "seed", "precision")
        described: dict[str, Any] = {name: getattr(self, name) for name in names}
        described["eos_id"] = list(self.eos_id) if isinstance(self.eos_id, tuple) else self.eos_id
        # as version 0.1.0 wrote them, so that its runs resume; newer settings only where they are set
        described["filter"] = None if self.top_p is None else name_of_function(nucleus)
        described["filter_kwargs"] = repr([] if self.top_p is None else [("thres", self.top_p)])
        newer = {"max_new_tokens": None, "top_k": None, "min_p": None, "repetition_penalty": 1.0, "engine": "lm_core"}
        described |= {name: getattr(self, name) for name, off in newer.items() if getattr(self, name) != off}
        if self.own_filters:
            described["own_filters"] = [name_of_function(function) for function in self.own_filters]
        return described


def original_filter(filter_fn: Callable[..., Tensor] | None, filter_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of ``Sampling`` that the original's filter arguments change: ``filter_fn`` takes the place of top-p."""
    arguments = dict(filter_kwargs or {})
    if filter_fn is nucleus and set(arguments) <= {"thres"}:
        return {"top_p": arguments["thres"]} if arguments else {}
    return {"top_p": None, "own_filters": () if filter_fn is None else (partial(filter_fn, **arguments),)}


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
    """Samples an answer of a ``CausalLM`` or an engine to each prompt, up to ``max_seq_len`` tokens with the prompt.

    Raises:
        ValueError: a prompt leaves no room for an answer; see also ``lm_core.generation.generate.generate``.
    """
    # room after the shortest prompt: the most tokens that an answer can have
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) >= sampling.max_seq_len:
        raise ValueError(f"max_seq_len must exceed the longest prompt ({max(lengths)}), got {sampling.max_seq_len}")
    rooms = [min(sampling.max_seq_len - length, sampling.max_new_tokens or sampling.max_seq_len) for length in lengths]
    room = max(rooms)
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
    ids = [torch.tensor(prompt) for prompt in prompts]
    common: dict[str, Any] = {
        "max_new_tokens": room,
        "temperature": sampling.temperature,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_id": sampling.eos_id,
    }
    if sampling.engine != "lm_core":
        kinds = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
        generation = model.generate(
            ids, **common, **kinds, return_kept=False, generator=torch.Generator().manual_seed(seed)
        )
    else:
        device = next(model.parameters()).device
        filters = (*sampling.filters(), *sampling.own_filters)
        with autocast(sampling.precision, device):
            generator = torch.Generator(device).manual_seed(seed)
            generation = generate(model, ids, **common, filters=filters, generator=generator)
    rows = zip(generation.tokens.tolist(), generation.lengths.tolist(), generation.finished.tolist(), strict=True)
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
