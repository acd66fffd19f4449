"""Preference data of reward models: pairs of responses to a prompt, or responses with a label.

| columns of a row | example |
|---|---|
| ``prompt``, ``chosen``, ``rejected``, optionally ``margin`` | a pair |
| ``chosen``, ``rejected`` that begin with the same words or messages (hh-rlhf) | a pair; that beginning is the prompt |
| ``prompt``, ``response`` or ``completion``, ``label`` | a response with its reward, its bin, or true and false |

Prompts and responses are texts, chats (lists of messages) or token ids.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.data.conversations import NoBorderError, check_messages, conversation_ids, with_explicit_prompt
from lm_core.data.rows import iterate_rows
from lm_core.tokenizers import end_ids, prompt_ids


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


def load_preferences(
    source: Any, *, tokenizer: Any = None, template_kwargs: Mapping[str, Any] | None = None
) -> list[Preference | Labelled]:
    """Examples from rows (mappings, see the module's table), or from any source of ``lm_core.data.rows``.

    The tokenizer's EOS is appended to text responses, as in a finished response of a policy; responses of a chat are
    those of the tokenizer's template, up to its end of the turn. Chats that the template does not write as a prompt
    followed by an answer are dropped, and a warning counts them. ``template_kwargs`` are further arguments of the
    template, such as ``enable_thinking``.

    Raises:
        ValueError: there are none, a column is missing or empty, or its value cannot be read; row and column are named.
        FileNotFoundError: there is no such file.
    """
    rows = [(where.rstrip(","), row) for where, row in iterate_rows(source, name="pairs")]
    examples: list[Preference | Labelled] = []
    dropped: list[str] = []
    for where, row in rows:
        try:
            examples.append(_example(row, where, tokenizer, template_kwargs))
        except NoBorderError:
            dropped.append(where)
    if dropped:
        warnings.warn(
            f"{len(dropped)} of {len(rows)} pairs dropped, the first {dropped[0]}: the chat template does not write "
            "them as a prompt followed by an answer",
            stacklevel=2,
        )
    if not examples:
        raise ValueError("pairs must hold at least one example, got none")
    if len({type(example) for example in examples}) > 1:
        raise ValueError("pairs must be all pairs or all labelled responses, got both")
    return examples


def _example(row: Any, where: str, tokenizer: Any, template_kwargs: Mapping[str, Any] | None) -> Preference | Labelled:
    if isinstance(row, Preference | Labelled):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a row with prompt, chosen and rejected, got {type(row).__name__}")
    row = {name: value for name, value in row.items() if value is not None}
    if "completion" in row and "response" not in row:
        row["response"] = row["completion"]
    if "prompt" not in row and {"chosen", "rejected"} <= set(row):
        row = with_explicit_prompt(row, where)
    responses = next((names for names in (("chosen", "rejected"), ("response",)) if set(names) <= set(row)), ())
    if "prompt" not in row or not responses or (responses == ("response",) and "label" not in row):
        raise ValueError(
            f"{where} must have prompt, chosen and rejected, or prompt, response and label, got {sorted(row)}"
        )
    prompt, encoded = _ids(row, responses, where, tokenizer, template_kwargs)
    if responses == ("response",):
        return Labelled(prompt, encoded[0], _number(row, "label", where))
    margin = _number(row, "margin", where) if "margin" in row else 0.0
    return Preference(prompt=prompt, chosen=encoded[0], rejected=encoded[1], margin=margin)


def _ids(
    row: Mapping[str, Any],
    responses: Sequence[str],
    where: str,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Ids of the prompt and of each response."""
    if _is_chat(row["prompt"]):
        chats = [
            conversation_ids(
                tokenizer,
                [*row["prompt"], *_messages(row[name], f"{where}, {name!r}")],
                answer=len(row["prompt"]),
                template_kwargs=template_kwargs,
                where=f"{where}, {name!r}",
            )
            for name in responses
        ]
        # a policy's response ends with the turn: templates may write a line break after it
        ends = end_ids(tokenizer)
        answers = [answer for _, answer in chats]
        borders = [next((n for n, id_ in enumerate(ids, start=1) if id_ in ends), len(ids)) for ids in answers]
        cut = [torch.tensor(answer[:border]) for answer, border in zip(answers, borders, strict=True)]
        return torch.tensor(chats[0][0]), cut

    def ids(name: str, *, ends: bool) -> Tensor:
        value = row[name]
        if isinstance(value, str):
            if tokenizer is None:
                raise ValueError(f"{where} is text, which needs a tokenizer, got tokenizer=None")
            eos = getattr(tokenizer, "eos_id", None)
            try:
                value = prompt_ids(tokenizer, value) if name == "prompt" else list(tokenizer.encode(value))
            except ValueError as error:  # a lone surrogate
                raise ValueError(f"{where}, {name!r}: {error}") from error
            value += [eos] if ends and eos is not None else []
        try:
            tensor = torch.as_tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{where} must have token ids or text in {name!r}, got {value!r}"[:200]) from error
        if tensor.ndim != 1 or tensor.numel() == 0 or tensor.is_floating_point():
            raise ValueError(f"{where} must have token ids or text in {name!r}, got {row[name]!r}"[:200])
        return tensor.long()

    return ids("prompt", ends=False), [ids(name, ends=True) for name in responses]


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A response to a chat as messages."""
    return check_messages([{"role": "assistant", "content": value}] if isinstance(value, str) else value, where)


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    try:
        number = float(row[name])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must have a number in {name!r}, got {row[name]!r}")
    return number
