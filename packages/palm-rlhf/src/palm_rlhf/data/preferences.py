"""Preference data of reward models: pairs of responses to a prompt, or responses with a label.

A JSONL line has ``prompt``, ``chosen``, ``rejected`` and optionally ``margin``; or ``prompt``, ``response``, ``label``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.data.rows import load_rows


@dataclass(frozen=True)
class Preference:
    """One pair: ids of the prompt, of the better and of the worse response, and the margin between these two."""

    prompt: Int[Tensor, " p"]
    chosen: Int[Tensor, " c"]
    rejected: Int[Tensor, " r"]
    margin: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """A response with its reward or its bin."""

    prompt: Int[Tensor, " p"]
    response: Int[Tensor, " r"]
    label: float


def load_preferences(source: Any, *, tokenizer: Any = None) -> list[Preference | Labelled]:
    """Examples from rows (mappings of text or ids), or from any source of ``lm_core.data.rows``.

    The tokenizer's EOS is appended to text responses, as in a finished response of a policy.

    Raises:
        ValueError: there are none, a column is missing, or a text is empty.
        FileNotFoundError: there is no such file.
    """
    examples = [_example(row, index, tokenizer) for index, row in enumerate(load_rows(source, name="pairs"))]
    if not examples:
        raise ValueError("pairs must hold at least one example, got none")
    if len({type(example) for example in examples}) > 1:
        raise ValueError("pairs must be all pairs or all labelled responses, got both")
    return examples


def _example(row: Any, index: int, tokenizer: Any) -> Preference | Labelled:
    if isinstance(row, Preference | Labelled):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(f"pairs[{index}] must be a row with prompt, chosen and rejected, got {type(row).__name__}")

    def ids(name: str, *, ends: bool) -> Tensor:
        value = row[name]
        if isinstance(value, str):
            if tokenizer is None:
                raise ValueError(f"pairs[{index}] is text, which needs a tokenizer, got tokenizer=None")
            eos = getattr(tokenizer, "eos_id", None)
            value = [*tokenizer.encode(value), *([eos] if ends and eos is not None else [])]
        tensor = torch.as_tensor(value)
        if tensor.ndim != 1 or tensor.numel() == 0 or tensor.is_floating_point():
            raise ValueError(f"pairs[{index}] must have token ids or text in {name!r}, got {row[name]!r}"[:200])
        return tensor.long()

    for names in (("prompt", "chosen", "rejected"), ("prompt", "response", "label")):
        if all(name in row for name in names):
            if "label" in names:
                return Labelled(ids("prompt", ends=False), ids("response", ends=True), float(row["label"]))
            return Preference(
                prompt=ids("prompt", ends=False),
                chosen=ids("chosen", ends=True),
                rejected=ids("rejected", ends=True),
                margin=float(row.get("margin", 0.0)),
            )
    raise ValueError(
        f"pairs[{index}] must have prompt, chosen and rejected, or prompt, response and label, got {sorted(row)}"
    )
