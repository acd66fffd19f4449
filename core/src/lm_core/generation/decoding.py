"""What every decoding strategy shares: the protocol of a causal language model, prompts, and the model's running state.

Prompts are left-padded before the model sees them, so the newest token is always the last one.

Legend: b batch, n sequence, v vocabulary, d feature.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checks import check_ids
from lm_core.nn.masking import left_pad

Filter = Callable[[Tensor], Tensor]

# An output weight is copied for decoding if that takes no more room than this,
_COPIED_BYTES = 128 * 2**20
# and if so many tokens are to follow: the copy costs about as much as it saves on a dozen.
_TOKENS_WORTH_A_COPY = 16


class Cache(Protocol):
    """What a model keeps between calls. It is opaque but for this."""

    def reorder(self, index: Tensor) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; the batch size may change."""


@runtime_checkable
class CausalLM(Protocol):
    """A causal language model: ids ``(b, n)`` to logits ``(b, n, v)``.

    ``mask (b, cached + n)`` is True at real tokens; positions are ``mask.cumsum(-1) - 1``. A model that decodes
    incrementally also has ``init_cache(batch_size, max_length)`` and accepts ``cache=``: ids are then the new tokens.
    ``hidden(ids, *, mask, cache)`` with ``output_weight (v, d)`` spares the full logits. ``max_length``, if present
    and not None, bounds prompt and new tokens together.
    """

    def __call__(self, ids: Tensor, *, mask: Tensor | None = None, cache: Any = None, **kwargs: Any) -> Tensor:
        """Logits of the given positions."""


@dataclass(frozen=True)
class Generation:
    """What was generated, without the prompt.

    Attributes:
        tokens: ``(b, new)`` token ids, right-padded with ``pad_id``.
        lengths: ``(b,)`` new tokens of each row, its EOS included.
        log_probs: ``(b, new)`` float32 log-probabilities of the tokens under the distribution they were drawn from
            (at temperature 0 the unfiltered one of temperature 1, in beam search the filtered one); 0 at padding.
        finished: ``(b,)`` whether the row ended with EOS, not at the length limit.
    """

    tokens: Int[Tensor, "b new"]
    lengths: Int[Tensor, " b"]
    log_probs: Float[Tensor, "b new"]
    finished: Bool[Tensor, " b"]


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own mode is restored on leaving, also by an exception."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def by_columns(weight: Tensor) -> Tensor:
    """A copy of a weight ``(v, d)`` laid out column by column.

    On a CPU a product of a few rows with a weight that is wider than deep reads it two to three times as fast so.
    """
    return weight.detach().t().contiguous().t()


class Decoder:
    """The model with all it has read: ids, mask and cache grow and are reordered together."""

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor | None,
        room: int,
        use_cache: bool,
        model_kwargs: dict[str, Any],
    ) -> None:
        b, n = ids.shape
        self._model = model
        self._kwargs = model_kwargs
        # Decided once: later the number of rows may happen to equal another size.
        self._row_kwargs = {
            name for name, value in model_kwargs.items() if isinstance(value, Tensor) and value.shape[:1] == (b,)
        }
        self._length = n
        self._ids = F.pad(ids, (0, room))
        self._mask = None if mask is None else F.pad(mask, (0, room), value=True)
        self._cache = model.init_cache(b, n + room) if use_cache and hasattr(model, "init_cache") else None
        self._unread = ids
        self._room = room
        self._output_weight: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        return self._ids[:, : self._length]

    @property
    def mask(self) -> Tensor | None:
        return None if self._mask is None else self._mask[:, : self._length]

    def next_logits(self) -> Tensor:
        """Float32 logits ``(b, v)`` behind the last token."""
        model, inputs = self._model, {"mask": self.mask}
        if self._cache is not None:
            inputs["cache"] = self._cache
        if hasattr(model, "hidden"):
            hidden = model.hidden(self._unread, **inputs, **self._kwargs)[:, -1]
            logits = F.linear(hidden, self._weight_for_one_position())
        else:
            logits = model(self._unread, **inputs, **self._kwargs)[:, -1]
        if self._cache is not None:
            self._kwargs = {}
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _weight_for_one_position(self) -> Tensor:
        """The model's output weight, asked for once, in the layout that is read fastest."""
        if self._output_weight is None:
            weight: Tensor = self._model.output_weight
            (v, d), rows = weight.shape, self._ids.shape[0]
            few = rows <= 4 and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
            worth_it = self._room >= _TOKENS_WORTH_A_COPY and v >= 2 * d and weight.nbytes <= _COPIED_BYTES
            self._output_weight = by_columns(weight) if few and worth_it else weight
        return self._output_weight

    def append(self, token: Tensor) -> None:
        """Makes ``token (b,)`` the newest of each row."""
        self._ids.select(1, self._length).copy_(token)
        self._length += 1
        self._unread = self.ids if self._cache is None else token.unsqueeze(-1)

    def reorder(self, index: Tensor) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; every token has been read or is about to be appended."""
        self._ids = self._ids[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        if self._cache is not None:
            self._cache.reorder(index)
        self._kwargs = {
            name: value[index] if name in self._row_kwargs else value for name, value in self._kwargs.items()
        }


def language_model(model: Any) -> Any:
    """``model`` itself where it decodes incrementally, else what ``as_causal_lm`` makes of it."""
    if hasattr(model, "init_cache"):
        return model
    from lm_core.adapters import as_causal_lm

    return as_causal_lm(model)


def prompt_rows(prompt: Any, mask: Tensor | None = None, prompt_lengths: Tensor | None = None) -> list[Tensor]:
    """The prompts without their padding, one 1-D tensor each.

    Raises:
        ValueError: a shape does not fit, or a prompt is empty.
        TypeError: the prompt holds no integers.
    """
    if mask is not None and prompt_lengths is not None:
        raise ValueError("give mask or prompt_lengths, not both")
    if isinstance(prompt, (list, tuple)):
        if mask is not None or prompt_lengths is not None:
            raise ValueError("a list of prompts has lengths of its own: mask and prompt_lengths go with a tensor")
        rows = list(prompt)
    else:
        rows = _unpadded_rows(prompt, mask, prompt_lengths)
    if not rows:
        raise ValueError("prompt must hold at least one row, got none")
    for number, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dtype.is_floating_point or row.dtype in (torch.bool, torch.complex64):
            raise TypeError(f"prompt must hold integer token ids, row {number} is {getattr(row, 'dtype', type(row))}")
        if row.ndim != 1:
            raise ValueError(f"each prompt of a list must be 1-D, row {number} has shape {tuple(row.shape)}")
        if row.shape[0] == 0:
            raise ValueError(f"prompt must hold at least one token a row, row {number} is empty")
    return rows


def left_padded(rows: list[Tensor], device: torch.device | None) -> tuple[Tensor, Tensor | None]:
    """Rows as ids ``(b, n)`` and their mask, which is None where no row is padded."""
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


def check_settings(max_new_tokens: int, min_new_tokens: int, temperature: float, repetition_penalty: float) -> None:
    """Raises ``ValueError`` naming the first setting that is out of range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens must be in [0, max_new_tokens = {max_new_tokens}], got {min_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
    if not 0.0 < repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}")


def check_fits(model: Any, ids: Tensor, eos_ids: tuple[int, ...], max_new_tokens: int) -> None:
    """Raises unless the model knows every id and has room for all tokens, as far as it tells its sizes."""
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
    """The end tokens as a tuple, whichever way they were given."""
    if eos_id is None:
        return ()
    eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
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
    """The logits with those of ``ids`` at minus infinity."""
    if not ids:
        return logits
    logits = logits.clone()
    logits[:, list(ids)] = -torch.inf
    return logits


def device_of(model: Any) -> torch.device | None:
    """Where the model's parameters are; None if it has none."""
    if not isinstance(model, nn.Module):
        return None
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device
