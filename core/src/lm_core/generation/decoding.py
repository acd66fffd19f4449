"""Common parts of all decoding strategies: prompts, checks, and a model's running state.

Prompts are left-padded before the model sees them, so the newest token is always the last one.

Legend: b batch, n sequence, v vocabulary, d feature.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_core.adapters import as_causal_lm
from lm_core.causal_lm import device_of, eval_mode
from lm_core.checks import check_ids, check_positive
from lm_core.generation.sampling import apply_repetition_penalty
from lm_core.generation.weight_layout import WeightLayout
from lm_core.nn.masking import left_pad

Filter = Callable[[Tensor], Tensor]


class Decoder:
    """A model with the tokens it has read: ids, mask and cache grow and are reordered together.

    As a context manager it puts the model in evaluation mode with its weights laid out for decoding. Arguments and
    errors are those of ``lm_core.generation.generate.generate``.

    Attributes:
        ids: ``(b, n)`` tokens read or to be read next.
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
        use_cache: bool,
        model_kwargs: dict[str, Any],
    ) -> None:
        self._model = model = as_causal_lm(model)
        self.eos_ids = as_eos_ids(eos_id)
        check_positive(max_new_tokens, "max_new_tokens")
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(f"min_new_tokens must be in [0, max_new_tokens = {max_new_tokens}], got {min_new_tokens}")
        if not 0.0 < repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}")
        # prompts, left-padded
        ids, padding = left_padded(prompt_rows(prompt, mask, prompt_lengths), device_of(model))
        check_fits(model, ids, self.eos_ids, max_new_tokens)
        b, n = ids.shape
        self._repetition_penalty = repetition_penalty
        self._min_length = n + min_new_tokens
        self._kwargs = model_kwargs
        # Decided once: later the number of rows may happen to equal another size.
        self._row_kwargs = {name for name, value in model_kwargs.items() if _rows_of(value) == b}
        # ids and mask, allocated for all tokens to come
        self._length = n
        self._ids = F.pad(ids, (0, max_new_tokens))
        self._mask = None if padding is None else F.pad(padding, (0, max_new_tokens), value=True)
        self._cache: Any = None
        self._copies: Tensor | None = None
        # cache and weight layout
        self._unread = ids
        self._unread_mask = padding
        if use_cache and hasattr(model, "init_cache") and _cache_reaches(model, padding, n, n + max_new_tokens):
            # Equal prompts, such as those of several samples, are read only once.
            first, copies = distinct_rows(ids, padding)
            if first.shape[0] < b and not self._row_kwargs:
                self._copies = copies
                self._unread = ids[first]
                self._unread_mask = None if padding is None else padding[first]
            self._cache = model.init_cache(self._unread.shape[0], n + max_new_tokens)
        self._layout = WeightLayout(model, steps=0 if self._cache is None else max_new_tokens)
        self._steps = 0
        self._context = ExitStack()

    def __enter__(self) -> "Decoder":
        self._context.enter_context(eval_mode(self._model))
        self._context.enter_context(self._layout)
        return self

    def __exit__(self, *error: object) -> None:
        self._context.close()

    @property
    def ids(self) -> Tensor:
        return self._ids[:, : self._length]

    @property
    def mask(self) -> Tensor | None:
        return None if self._mask is None else self._mask[:, : self._length]

    def next_logits(self) -> Tensor:
        """Float32 logits ``(b, v)`` after the last token, with the repetition penalty and the minimum length."""
        # The step after the prompt shows which weights are read for single tokens.
        if self._steps == 1:
            with self._layout.first_step():
                logits = self._read()
        else:
            logits = self._read()
        self._steps += 1
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._repetition_penalty != 1.0:
            logits = apply_repetition_penalty(logits, self.ids, self._repetition_penalty, self.mask)
        if self._length < self._min_length:
            logits = without_tokens(logits, self.eos_ids)
        return logits

    def _read(self) -> Tensor:
        """Logits ``(b, v)`` after the tokens that the model has not read yet."""
        model, inputs = self._model, {"mask": self._unread_mask}
        if self._cache is not None:
            inputs["cache"] = self._cache
        logits: Tensor
        # Read once: an adapter inspects its model at each access.
        hidden_of = getattr(model, "hidden", None)
        if hidden_of is not None:
            hidden = hidden_of(self._unread, **inputs, **self._kwargs)[:, -1]
            layer = getattr(model, "output_layer", None)
            if layer is None:
                weight = model.output_weight
                # Not for the prompt: a beam search then has fewer rows than the layout is chosen for.
                logits = self._layout.product(hidden, weight) if self._steps else F.linear(hidden, weight)
            else:
                logits = layer(hidden)
        else:
            logits = model(self._unread, **inputs, **self._kwargs)[:, -1]
        if self._cache is not None:
            self._kwargs = {}
            if self._copies is not None:
                logits = logits[self._copies]
                self._cache.reorder(self._copies)
                self._copies = None
        return logits

    def append(self, token: Tensor) -> None:
        """Appends ``token (b,)`` to the rows."""
        self._ids.select(1, self._length).copy_(token)
        self._length += 1
        self._unread = self.ids if self._cache is None else token.unsqueeze(-1)
        self._unread_mask = self.mask

    def reorder(self, index: Tensor) -> None:
        """Replaces row ``r`` by the former row ``index[r]``; every appended token must have been read."""
        self._ids = self._ids[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        if self._cache is not None:
            self._cache.reorder(index)
        self._kwargs = {
            name: _selected(value, index) if name in self._row_kwargs else value for name, value in self._kwargs.items()
        }


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
    logits[:, list(ids)] = -torch.inf
    return logits
