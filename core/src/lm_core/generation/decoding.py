"""Common parts of all decoding strategies: prompts, checks, and a model's running state.

Prompts are left-padded before the model sees them, so the newest token is always the last one.

Legend: b batch, n sequence, v vocabulary, d feature.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_core.adapters import as_causal_lm
from lm_core.causal_lm import device_of, eval_mode
from lm_core.checks import check_ids, check_positive
from lm_core.generation.sampling import apply_repetition_penalty, forbid_repeated_ngrams, min_p, top_k, top_p
from lm_core.generation.static_step import (
    CapturedStep,
    compiled_step,
    last_logits,
    reason_against_static_steps,
    rounded_capacity,
    warn_of_fallback,
)
from lm_core.generation.weight_layout import WeightLayout
from lm_core.nn.kv_cache import selected_rows
from lm_core.nn.masking import left_pad

Filter = Callable[[Tensor], Tensor]
# Logits ``(rows, v)`` and the index ``(rows,)`` of each row's sequence in the result, since ended rows leave the batch.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


# A check whether every row has ended synchronises an accelerator, so it is made only every so many steps.
STEPS_BETWEEN_CHECKS_ON_ACCELERATOR = 16
# A short generation is not worth capturing a CUDA graph.
_STEPS_WORTH_A_GRAPH = 16


class Decoder:
    """A model with the tokens it has read: ids, mask and cache grow and are reordered together.

    As a context manager it puts the model in evaluation mode with its weights laid out for decoding. Arguments and
    errors are those of ``lm_core.generation.generate.generate``.

    With ``compile``, and on CUDA, steps are static where the model can (``lm_core.generation.static_step``); on CUDA
    ``step`` captures a whole step into a graph, what ``choose`` does included.

    Attributes:
        eos_ids: the tokens that end a row.
    """

    def __init__(
        self,
        model: Any,
        prompt: Any,
        *,
        mask: Tensor | None,
        prompt_lengths: Tensor | None,
        max_new_tokens: int,
        min_new_tokens: int,
        eos_id: int | Sequence[int] | None,
        repetition_penalty: float,
        no_repeat_ngram_size: int,
        num_return_sequences: int,
        use_cache: bool,
        compile: bool,
        model_kwargs: dict[str, Any],
    ) -> None:
        self._model = model = as_causal_lm(model)
        self.eos_ids = as_eos_ids(eos_id)
        check_positive(max_new_tokens, "max_new_tokens")
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(f"min_new_tokens must be in [0, max_new_tokens = {max_new_tokens}], got {min_new_tokens}")
        if not 0.0 < repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}")
        if no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size must not be negative, got {no_repeat_ngram_size}")
        check_positive(num_return_sequences, "num_return_sequences")
        # prompts, left-padded
        prompts = prompt_rows(prompt, mask, prompt_lengths)
        ids, padding = left_padded([row for row in prompts for _ in range(num_return_sequences)], device_of(model))
        check_fits(model, ids, self.eos_ids, max_new_tokens)
        b, n = ids.shape
        total = n + max_new_tokens
        self._repetition_penalty = repetition_penalty
        self._min_length = n + min_new_tokens if min_new_tokens else 0
        self._no_repeat_ngram_size = no_repeat_ngram_size
        self._kwargs = model_kwargs
        # Decided once: later the number of rows may happen to equal another size.
        self._row_kwargs = {name for name, value in model_kwargs.items() if _rows_of(value) == len(prompts)}
        if num_return_sequences > 1:
            index = torch.arange(len(prompts), device=ids.device).repeat_interleave(num_return_sequences)
            self._kwargs = self._selected_kwargs(index)
        # how a step runs, and the cache
        self._compile = compile
        self._captures = ids.is_cuda and max_new_tokens >= _STEPS_WORTH_A_GRAPH
        self._graph: CapturedStep | None = None
        self._captured_logits: Tensor | None = None  # of a graph that holds the model's part of a step only
        self._tries_static = False
        self._is_static = False
        self._steps = 0
        self._cache: Any = None
        self._capacity = total
        # Equal prompts, such as those of several samples, are read only once.
        self._copies: Tensor | None = None
        self._prompt = ids
        self._prompt_mask = padding
        if use_cache and hasattr(model, "init_cache") and _cache_reaches(model, padding, n, total):
            first, copies = distinct_rows(ids, padding)
            if first.shape[0] < b and not self._row_kwargs:
                self._copies = copies
                self._prompt = ids[first]
                self._prompt_mask = None if padding is None else padding[first]
            self._cache = self._new_cache(self._prompt.shape[0], total)
        elif compile:
            warn_of_fallback(model, "the model decodes without a cache")
        self._layout = WeightLayout(
            model, steps=0 if self._cache is None else max_new_tokens, compiled=compile and self._tries_static
        )
        # ids and mask, allocated for all tokens to come; `_position` is `_length` on the device
        self._length = n
        self._position = torch.tensor(n, device=ids.device)
        self._ids = F.pad(ids, (0, max_new_tokens))
        self._mask = None if padding is None else F.pad(padding, (0, self._capacity - n), value=True)
        self._context = ExitStack()

    def __enter__(self) -> "Decoder":
        self._context.enter_context(eval_mode(self._model))
        self._context.enter_context(self._layout)
        return self

    def __exit__(self, *error: object) -> None:
        self._graph = None
        self._context.close()

    @property
    def ids(self) -> Tensor:
        """``(b, n)`` tokens read or to be read next."""
        return self._ids[:, : self._length]

    @property
    def mask(self) -> Tensor | None:
        """``(b, n)`` True at real tokens; None without padding."""
        return None if self._mask is None else self._mask[:, : self._length]

    def prompts(self) -> list[list[int]]:
        """The rows' tokens without padding."""
        if self.mask is None:
            return self.ids.tolist()
        return [row[keep].tolist() for row, keep in zip(self.ids, self.mask, strict=True)]

    @property
    def keeps_rows(self) -> bool:
        """True if another number of rows would compile the step again."""
        return self._compile and self._is_static

    def step(self, choose: Callable[[Tensor], Tensor], generators: Sequence[torch.Generator] | None = None) -> None:
        """Decodes one token of every row.

        Args:
            choose: maps float32 logits ``(b, v)`` after the last token, with the repetition penalty and the minimum
                length, to tokens ``(b,)``. It may reorder the rows.
            generators: CUDA generators from which ``choose`` draws, if it can be captured into a CUDA graph; None if it
                cannot.
        """
        # The first step loads what is needed; under `compile` the second one compiles.
        if self._captures and self._graph is None and self._is_static and self._steps > 1 + self._compile:
            self._capture(choose, generators)
        if self._graph is None:
            self._choose_next(choose, self._read())
        else:
            self._graph.replay()
            if self._captured_logits is not None:
                self._choose_next(choose, self._captured_logits)
        self._length += 1
        self._steps += 1

    def reorder(self, index: Tensor) -> None:
        """Replaces row ``r`` by the former row ``index[r]``."""
        if index.shape[0] != self._ids.shape[0]:
            self._graph = None  # another one is captured for the new number of rows
        self._ids = selected_rows(self._ids, index, in_place=self._is_static)
        if self._mask is not None:
            self._mask = selected_rows(self._mask, index, in_place=self._is_static)
        if self._cache is not None:
            self._cache.reorder(index)
        self._kwargs = self._selected_kwargs(index)

    def _selected_kwargs(self, index: Tensor) -> dict[str, Any]:
        return {
            name: _selected(value, index) if name in self._row_kwargs else value for name, value in self._kwargs.items()
        }

    def _new_cache(self, rows: int, total: int) -> Any:
        model = self._model
        if not self._compile and not self._captures:
            return model.init_cache(rows, total)
        reason = reason_against_static_steps(model)
        if reason is None and "static" not in inspect.signature(model.init_cache).parameters:
            reason = f"the cache of {type(model).__name__} has no static form"
        if reason is not None:
            warn_of_fallback(model, reason)
            self._captures = False
            return model.init_cache(rows, total)
        self._tries_static = True
        self._capacity = rounded_capacity(total, getattr(model, "max_length", None))
        return model.init_cache(rows, self._capacity, static=True)

    def _read(self) -> Tensor:
        """Logits ``(b, v)`` after the tokens that the model has not read yet."""
        if self._steps == 0:
            return self._read_prompt()
        # The step after the prompt shows which weights are read for single tokens.
        if self._steps == 1:
            with self._layout.first_step():
                return self._read_step()
        return self._read_step()

    def _read_prompt(self) -> Tensor:
        logits = self._logits_of(self._prompt, self._prompt_mask, **self._kwargs)
        if self._cache is None:
            return logits
        self._kwargs = {}
        if self._copies is not None:
            logits = logits[self._copies]
            self._cache.reorder(self._copies)
        if self._tries_static:
            self._begin_static_steps()
        return logits

    def _begin_static_steps(self) -> None:
        try:
            self._cache.begin_steps()
        except ValueError as error:
            warn_of_fallback(self._model, str(error))
        else:
            self._is_static = True

    def _read_step(self) -> Tensor:
        if not self._is_static:
            ids = self.ids if self._cache is None else self.ids[:, -1:]
            return self._logits_of(ids, self.mask, product=self._layout.product, **self._kwargs)
        ids = self._ids.index_select(1, (self._position - 1).view(1))
        if self._compile and self._steps > 1:
            return self._compiled_logits(ids)
        return self._logits_of(ids, self._mask, product=self._layout.product)

    def _logits_of(self, ids: Tensor, mask: Tensor | None, **inputs: Any) -> Tensor:
        # Read once: an adapter inspects its model at each access.
        hidden_of = getattr(self._model, "hidden", None)
        return last_logits(self._model, hidden_of, ids, mask=mask, cache=self._cache, **inputs)

    def _compiled_logits(self, ids: Tensor) -> Tensor:
        model, rows = self._model, ids.shape[0]
        step = compiled_step(model, rows, self._capacity, is_masked=self._mask is not None)
        hidden_of = getattr(model, "hidden", None)
        weight = None if hidden_of is None else self._layout.laid_out(model.output_weight)
        try:
            return step(model, hidden_of, ids, mask=self._mask, cache=self._cache, output_weight=weight)
        except Exception as error:
            # A step that has run before is compiled: the error is not torch.compile's.
            if self._steps > 2:
                raise
            self._compile = False
            first_line = str(error).strip().partition("\n")[0]
            warn_of_fallback(model, f"torch.compile failed with {type(error).__name__}: {first_line}")
            return self._logits_of(ids, self._mask, product=self._layout.product)

    def _choose_next(self, choose: Callable[[Tensor], Tensor], logits: Tensor) -> None:
        """Processes the logits, and appends the tokens that ``choose`` takes; all work is on the device."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._repetition_penalty != 1.0 or self._no_repeat_ngram_size:
            # The newest token last, after as many columns as there will be: shapes do not depend on the step.
            columns = torch.arange(self._ids.shape[1], device=logits.device) + self._position
            ids = self._ids.index_select(1, columns.remainder(self._ids.shape[1]))
            seen = (columns >= self._ids.shape[1]).expand_as(ids)
            if self._mask is not None:
                seen = seen & self._mask.index_select(1, columns.remainder(self._ids.shape[1]))
            if self._repetition_penalty != 1.0:
                logits = apply_repetition_penalty(logits, ids, self._repetition_penalty, seen)
            if self._no_repeat_ngram_size:
                logits = forbid_repeated_ngrams(logits, ids, self._no_repeat_ngram_size, seen)
        if self._min_length and self.eos_ids:
            too_short = self._position < self._min_length
            logits = torch.where(too_short, without_tokens(logits, self.eos_ids), logits)
        token = choose(logits)
        self._ids.index_copy_(1, self._position.view(1), token.unsqueeze(-1))
        self._position.add_(1)

    def _capture(self, choose: Callable[[Tensor], Tensor], generators: Sequence[torch.Generator] | None) -> None:
        self._captured_logits = None

        def step() -> None:
            logits = self._read()
            if generators is None:
                self._captured_logits = logits
            else:
                self._choose_next(choose, logits)

        try:
            self._graph = CapturedStep(step, self._ids.device, generators or ())
        except RuntimeError as error:
            self._captures = False
            first_line = str(error).strip().partition("\n")[0]
            warn_of_fallback(self._model, f"capturing a CUDA graph failed with {type(error).__name__}: {first_line}")


def _cache_reaches(model: Any, mask: Tensor | None, n: int, total: int) -> bool:
    """False if the sequence grows past ``max_cached_length``, at which the model changes its positions."""
    limit = getattr(model, "max_cached_length", None)
    if limit is None or total <= limit:
        return True
    return (n if mask is None else int(mask.sum(dim=1).min())) > limit


def _rows_of(value: Any) -> int | None:
    """First size of a tensor, or ``batch_size`` of an object with ``selected(rows)``, such as memories."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else None
    return getattr(value, "batch_size", None) if hasattr(value, "selected") else None


def _selected(value: Any, index: Tensor) -> Any:
    return value[index] if isinstance(value, Tensor) else value.selected(index.tolist())


def distinct_rows(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices of one row of each set of equal rows, and for every row the position of its equal among them."""
    rows = [tuple(row) for row in (ids if mask is None else ids.masked_fill(~mask, -1)).tolist()]
    first = {row: index for index, row in reversed(list(enumerate(rows)))}
    positions = {row: position for position, row in enumerate(first)}
    copies = [positions[row] for row in rows]
    return torch.tensor(list(first.values()), device=ids.device), torch.tensor(copies, device=ids.device)


def prompt_rows(prompt: Any, mask: Tensor | None = None, prompt_lengths: Tensor | None = None) -> list[Tensor]:
    """The prompts without padding, each a 1-D tensor.

    Raises:
        ValueError: a shape does not fit, or a prompt is empty.
        TypeError: the prompt holds no integers.
    """
    if mask is not None and prompt_lengths is not None:
        raise ValueError("give mask or prompt_lengths, not both")
    if isinstance(prompt, (list, tuple)):
        if mask is not None or prompt_lengths is not None:
            raise ValueError(
                "mask and prompt_lengths are for a tensor of prompts; a list of prompts has its own lengths"
            )
        rows = list(prompt)
    else:
        rows = _unpadded_rows(prompt, mask, prompt_lengths)
    if not rows:
        raise ValueError("prompt must hold at least one row, got none")
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dtype.is_floating_point or row.dtype in (torch.bool, torch.complex64):
            raise TypeError(f"prompt must hold integer token ids, row {index} is {getattr(row, 'dtype', type(row))}")
        if row.ndim != 1:
            raise ValueError(f"each prompt of a list must be 1-D, row {index} has shape {tuple(row.shape)}")
        if row.shape[0] == 0:
            raise ValueError(f"prompt must hold at least one token a row, row {index} is empty")
    return rows


def left_padded(rows: list[Tensor], device: torch.device | None) -> tuple[Tensor, Tensor | None]:
    """Rows as ids ``(b, n)`` and their mask, which is None if no row is padded."""
    rows = [row.to(device=device or row.device, dtype=torch.long) for row in rows]
    if len({row.shape[0] for row in rows}) == 1:
        return torch.stack(rows), None
    return left_pad(rows, 0)


def _unpadded_rows(prompt: Any, mask: Tensor | None, prompt_lengths: Tensor | None) -> list[Tensor]:
    if not isinstance(prompt, Tensor):
        raise TypeError(f"prompt must be a tensor of token ids or a list of them, got {type(prompt).__name__}")
    if prompt.ndim != 2:
        raise ValueError(f"prompt must have shape (b, n), got {tuple(prompt.shape)}")
    if prompt_lengths is not None:
        if prompt_lengths.is_floating_point() or prompt_lengths.dtype == torch.bool:
            raise TypeError(f"prompt_lengths must be integers, got dtype {prompt_lengths.dtype}")
        if prompt_lengths.shape != prompt.shape[:1]:
            raise ValueError(f"prompt_lengths must have shape {(prompt.shape[0],)}, got {tuple(prompt_lengths.shape)}")
        if bool(((prompt_lengths < 1) | (prompt_lengths > prompt.shape[1])).any()):
            raise ValueError(f"prompt_lengths must be in [1, {prompt.shape[1]}], got {prompt_lengths.tolist()}")
        return [row[: int(length)] for row, length in zip(prompt, prompt_lengths, strict=True)]
    if mask is None:
        return list(prompt)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True at real tokens), got dtype {mask.dtype}")
    if mask.shape != prompt.shape:
        raise ValueError(f"mask must have the prompt's shape {tuple(prompt.shape)}, got {tuple(mask.shape)}")
    return [row[keep] for row, keep in zip(prompt, mask, strict=True)]


def check_fits(model: Any, ids: Tensor, eos_ids: tuple[int, ...], max_new_tokens: int) -> None:
    """Raises ``ValueError`` for an id outside the model's vocabulary or more tokens than its limit, if known."""
    weight = getattr(model, "output_weight", None)
    if weight is not None:
        check_ids(ids, weight.shape[0], "prompt")
        if any(eos_id >= weight.shape[0] for eos_id in eos_ids):
            raise ValueError(f"eos_id must be below the vocabulary's size {weight.shape[0]}, got {eos_ids}")
    limit = getattr(model, "max_length", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"prompt ({ids.shape[1]} tokens) and max_new_tokens ({max_new_tokens}) exceed the model's limit of {limit}"
        )


def as_eos_ids(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The end tokens, of which there may be none, one or several, as a tuple."""
    if eos_id is None:
        return ()
    eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    if any(isinstance(id_, bool) or not isinstance(id_, int) for id_ in eos_ids):
        raise TypeError(f"eos_id must be an integer or several, got {eos_id!r}")
    if any(id_ < 0 for id_ in eos_ids):
        raise ValueError(f"eos_id must not be negative, got {eos_id}")
    return eos_ids


def is_any(token: Tensor, ids: tuple[int, ...]) -> Tensor:
    """True where ``token`` is one of ``ids``."""
    result = torch.zeros_like(token, dtype=torch.bool)
    for id_ in ids:
        result = result | (token == id_)
    return result


def without_tokens(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """A copy of the logits in which those of ``ids`` are minus infinity."""
    if not ids:
        return logits
    logits = logits.clone()
    for id_ in ids:  # one by one: a list would be copied to the device
        logits[:, id_] = -torch.inf
    return logits


def run_on_the_device(filters: Sequence[Filter]) -> bool:
    """True if these filters are known not to wait for the device, so that a CUDA graph can hold them."""
    ours = (top_k, top_p, min_p, without_tokens)
    return all(isinstance(filter_, partial) and filter_.func in ours for filter_ in filters)
