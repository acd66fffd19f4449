"""Supervised fine-tuning data: reads ids, texts and chats as prompts and human answers in token ids.

Accepted rows: ``(sequence, prompt_len)`` pairs of ids; ``(prompt, answer)`` texts; dicts with the columns ``prompt``
and ``response`` (or ``completion``, ``answer``); dicts with ``messages``, the last of which is the answer. A chat is
formatted by the tokenizer's own template; the text that it adds in front of an answer belongs to the prompt, so
generation and training see the same text. A warning counts rows in which no prompt leads to the answer.

A truncated answer gets no EOS: the model must not learn that the answer ends there.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lm_core.data.conversations import (
    ANSWER_COLUMNS,
    NoBorderError,
    check_messages,
    conversation_ids,
    text_answer_ids,
)
from lm_core.data.epochs import held_out_split
from lm_core.data.rows import iterate_rows
from lm_core.generation.decoding import as_eos_ids
from lm_core.tokenizers import as_tokenizer

Overlong = Literal["error", "drop"]


@dataclass(frozen=True)
class Example:
    """One prompt with its human answer.

    Attributes:
        prompt: token ids, at least one.
        response: token ids, at least one; ends with EOS unless it was truncated or had none.
        truncated: whether the length limit truncated the answer.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    truncated: bool = False

    @property
    def all_answers(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of every answer of the row."""
        return (self.response,)


class SFTDataset(Sequence[Example]):
    """Examples with a fingerprint of their content.

    Args:
        examples: the examples.
        dropped: number of rows left out, for a prompt too long or a chat template without a border of the answer.
    """

    def __init__(self, examples: Sequence[Example], dropped: int = 0) -> None:
        self.examples = list(examples)
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def split(self, fraction: float, *, seed: int = 0) -> "tuple[SFTDataset, SFTDataset]":
        """Two datasets of the same rows, drawn with ``seed``: all but a fraction, and this fraction.

        Raises:
            ValueError: one of them would be empty.
        """
        count = round(len(self) * fraction)
        if not 0 < count < len(self):
            raise ValueError(f"validation_fraction {fraction} of {len(self)} rows leaves one part empty")
        train, held_out = held_out_split(self, count, seed, "validation")
        return SFTDataset(train, self.dropped), SFTDataset(held_out, self.dropped)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.prompt, *example.all_answers)).encode())
        return digest.hexdigest()


def as_sft_dataset(
    source: Any,
    *,
    max_seq_len: int,
    tokenizer: Any = None,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = -1,
    template_kwargs: Mapping[str, Any] | None = None,
    overlong: Overlong = "error",
    name: str = "train_sft_dataset",
) -> SFTDataset:
    """Reads a dataset into memory.

    Args:
        source: files, a dataset or a sequence, see ``lm_core.data.rows``; the module docstring lists the row formats.
        max_seq_len: maximum length of a prompt with its answer, in tokens; longer answers are truncated.
        tokenizer: tokenizer of texts and chats: a transformers tokenizer, a folder or hub name, or an object with the
            protocol of ``lm_core.tokenizers``.
        eos_id: token or tokens that end answers, by default the tokenizer's, which ends texts.
        pad_id: padding id; it is removed from the end of sequences, but for one that ends the answer.
        template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        overlong: handling of prompts that leave no room for an answer: "error", or "drop" the row.
        name: argument name in error messages.

    Raises:
        ValueError, TypeError: a row is invalid; the message names it.
        FileNotFoundError: a file does not exist.
    """
    if isinstance(source, SFTDataset):
        return source
    reader = RowReader.of(tokenizer, eos_id, pad_id, template_kwargs)
    rows, dropped = read_rows(
        source,
        lambda row, where: _one_answer(reader.encoded(row, where)),
        max_seq_len=max_seq_len,
        overlong=overlong,
        name=name,
    )
    examples = [Example(row.prompt, *row.answers[0]) for row in rows]
    check_answers_end(examples, reader.ends, name)
    return SFTDataset(examples, dropped)


def _one_answer(encoded: tuple[list[int], list[int]]) -> tuple[list[int], list[list[int]]]:
    prompt, answer = encoded
    return prompt, [answer]


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a row that fits: its prompt, and its answers with whether each was truncated."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[tuple[int, ...], bool], ...]
    where: str
    row: Any


def read_rows(
    source: Any,
    encode: Callable[[Any, str], tuple[list[int], list[list[int]]]],
    *,
    max_seq_len: int,
    overlong: Overlong,
    name: str,
) -> tuple[list[EncodedRow], int]:
    """Encodes, checks and truncates the rows of a source; returns them and the number of rows left out.

    Args:
        source: see ``as_sft_dataset``.
        encode: returns prompt and answers of a row, whose place for errors is the second argument.
        max_seq_len: see ``as_sft_dataset``.
        overlong: see ``as_sft_dataset``.
        name: see ``as_sft_dataset``.
    """
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len must be at least 2, got {max_seq_len}")
    rows: list[EncodedRow] = []
    dropped = 0
    reason: str | None = None
    for where, row in iterate_rows(source, name=name):
        try:
            prompt, answers = encode(row, where)
        except NoBorderError as error:
            reason = reason or str(error)
            dropped += 1
            continue
        if not prompt:
            raise ValueError(f"{where} must have a prompt of at least one token, got none")
        if not all(answers):
            raise ValueError(f"{where} must have an answer of at least one token after its prompt, got none")
        if len(prompt) >= max_seq_len:
            if overlong == "error":
                raise ValueError(
                    f"{where} must leave room for an answer below max_seq_len {max_seq_len}, its prompt has "
                    f'{len(prompt)} tokens (overlong="drop" leaves such rows out)'
                )
            dropped += 1
            continue
        room = max_seq_len - len(prompt)
        cut = tuple((tuple(answer[:room]), len(answer) > room) for answer in answers)
        rows.append(EncodedRow(tuple(prompt), cut, where, row))
    if not rows:
        left_out = f"{dropped} left out" + (f", such as: {reason}" if reason else " with a prompt too long")
        raise ValueError(f"{name} must hold at least one row, got none ({left_out})")
    if reason is not None:
        warnings.warn(f"{name}: {dropped} of {dropped + len(rows)} rows left out, such as: {reason}", stacklevel=3)
    return rows, dropped


def check_answers_end(examples: Sequence[Example], ends: Sequence[int], name: str) -> None:
    """Raises ``ValueError`` if no complete answer ends with an end token: the policy would never learn to stop."""
    whole = [example for example in examples if not example.truncated]
    if ends and whole and not any(example.response[-1] in ends for example in whole):
        raise ValueError(
            f"{name} must have answers that end with eos_id {' or '.join(map(str, ends))}, none does: the policy ends "
            "its own with it, so it would only learn to leave it out"
        )


def training_and_validation(
    read: Callable[..., SFTDataset], sources: Mapping[str, Any], *, fraction: float, seed: int
) -> tuple[SFTDataset, SFTDataset | None]:
    """Reads training and held-out data; without the latter, a fraction of the former may be held out.

    Args:
        read: reads a source, as ``read(source, name=name)``.
        sources: the source of the training data and the source of the held-out data or None, by argument name.
        fraction: fraction to hold out, 0 for none.
        seed: seed of the rows that are held out.

    Raises:
        ValueError: both held-out data and a fraction are given; see also ``as_sft_dataset``.
    """
    (train_name, train_source), (valid_name, valid_source) = sources.items()
    train = read(train_source, name=train_name)
    valid = None if valid_source is None else read(valid_source, name=valid_name)
    if fraction > 0:
        if valid is not None:
            raise ValueError(
                f"pass validation data or validation_fraction, not both; got a {valid_name} and {fraction}"
            )
        return train.split(fraction, seed=seed)
    return train, valid


@dataclass(frozen=True)
class RowReader:
    """Splits rows into the token ids of prompt and answer."""

    tokenizer: Any
    ends: tuple[int, ...]
    pad_id: int | None
    template_kwargs: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        eos_id: int | Sequence[int] | None,
        pad_id: int | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> "RowReader":
        """A reader from the arguments of ``as_sft_dataset``."""
        tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
        ends = as_eos_ids(tokenizer.eos_id if eos_id is None and tokenizer is not None else eos_id)
        return cls(tokenizer, ends, pad_id, template_kwargs or {})

    def encoded(self, row: Any, where: str) -> tuple[list[int], list[int]]:
        """Prompt and answer of a row; ``where`` names it in errors."""
        if isinstance(row, Mapping):
            # tables that mix formats have None in the columns of the others
            empty = sorted(name for name, value in row.items() if value is None)
            row = {name: value for name, value in row.items() if value is not None}
            if "messages" in row:
                return self.chat(row["messages"], where)
            answers = [row[column] for column in ANSWER_COLUMNS if column in row]
            if "prompt" not in row or not answers:
                raise ValueError(
                    f"{where} must have the columns 'messages', or 'prompt' and one of {list(ANSWER_COLUMNS)}, "
                    f"got {sorted(row)}{f' and None in {empty}' if empty else ''}"
                )
            prompt, answer = row["prompt"], answers[0]
            if _is_list(prompt):
                reply = answer if _is_list(answer) and answer else [{"role": "assistant", "content": answer}]
                return self.chat([*prompt, *reply], where)
            return self._text(prompt, answer, where)
        if _is_list(row) and len(row) == 2:
            if isinstance(row[0], str):
                return self._text(row[0], row[1], where)
            return self.ids(row[0], row[1], where)
        raise TypeError(
            f"{where} must be (sequence, prompt_len), (prompt, answer) or a dict, "
            f"got {type(row).__name__} {str(row)[:60]!r}"
        )

    def ids(self, sequence: Any, prompt_len: Any, where: str) -> tuple[list[int], list[int]]:
        try:
            ids = torch.as_tensor(sequence)
            length = int(prompt_len)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where} must be (token ids, prompt_len), got {_kinds(sequence, prompt_len)}") from error
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{where} must hold 1-D integer ids, got {ids.dtype} of shape {tuple(ids.shape)}")
        values: list[int] = ids.tolist()
        padded = len(values)
        while values and values[-1] == self.pad_id:
            values.pop()
        if self.pad_id in self.ends and len(values) < padded:
            values.append(self.ends[self.ends.index(self.pad_id)])
        if length < 1:
            raise ValueError(f"{where} must have a prompt_len of at least 1, got {length}")
        if any(value < 0 for value in values):
            raise ValueError(f"{where} must hold ids of at least 0 (pad_id is {self.pad_id}), got {min(values)}")
        if length >= len(values):
            raise ValueError(f"{where} must have answer tokens after its prompt_len {length}, got {len(values)} tokens")
        return values[:length], values[length:]

    def _text(self, prompt: Any, answer: Any, where: str) -> tuple[list[int], list[int]]:
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise TypeError(f"{where} must have texts as prompt and answer, got {_kinds(prompt, answer)}")
        ends = self._ends(where)
        with naming(where):
            ids, response = text_answer_ids(self.tokenizer, prompt, answer)
            end = self.tokenizer.eos_id if self.tokenizer.eos_id in ends else ends[0]
            return ids, [*response, end] if answer else []

    def chat(self, messages: Any, where: str) -> tuple[list[int], list[int]]:
        ends = self._ends(where)
        checked = check_messages(messages, where)
        if len(checked) < 2 or checked[-1]["role"] != "assistant":
            roles = [message["role"] for message in checked]
            raise ValueError(
                f"{where} must end with an answer of the assistant after a question, got the roles {roles}"
            )
        prompt, response = conversation_ids(self.tokenizer, checked, template_kwargs=self.template_kwargs, where=where)
        for index, token in enumerate(response):
            if token in ends:
                # the template's text after the end of a turn is never generated, so it is not learned
                return prompt, response[: index + 1]
        raise NoBorderError(
            f"{where}: the chat template must end an answer with eos_id {' or '.join(map(str, ends))}, it does not; "
            "pass the id that does"
        )

    def _ends(self, where: str) -> tuple[int, ...]:
        """The ids that end an answer, after checking that tokenizer and ids are set."""
        if self.tokenizer is None:
            raise ValueError(f"{where} holds text, so a tokenizer is needed, got tokenizer=None")
        if not self.ends:
            raise ValueError(f"{where} holds text, so answers need an end: the tokenizer has no eos_id, pass eos_id")
        return self.ends


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _kinds(*parts: Any) -> str:
    return ", ".join(type(part).__name__ for part in parts)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Context in which the tokenizer's refusal of a text (a lone surrogate) names the row."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds a text that the tokenizer cannot encode: {error}") from error
