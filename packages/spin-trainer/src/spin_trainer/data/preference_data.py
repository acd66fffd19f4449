"""Preference data: prompts with a chosen and a rejected answer, as texts, chats or token ids.

| columns of a row | example |
|---|---|
| ``prompt``, ``chosen``, ``rejected`` | three texts, three lists of messages, or three lists of token ids |
| ``chosen``, ``rejected`` that begin with the same messages or words | that beginning is the prompt |
| ``prompt`` as text, ``chosen``, ``rejected`` as whole chats | the chats count; ``prompt`` repeats their question |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_core.data.conversations import with_explicit_prompt
from spin_trainer.data.opponent_answers import Answer
from spin_trainer.data.sft_data import Example, Overlong, RowReader, SFTDataset, check_answers_end, read_rows


@dataclass(frozen=True)
class Preference(Example):
    """One prompt with its chosen answer, ``response``, and the rejected one."""

    rejected: Answer = field(kw_only=True)

    @property
    def all_answers(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of both answers."""
        return self.response, self.rejected.tokens


def rejected_answers(dataset: SFTDataset) -> list[Answer]:
    """The rejected answer of every ``Preference`` of a dataset."""
    return [example.rejected for example in dataset.examples if isinstance(example, Preference)]


def as_preference_dataset(
    source: Any,
    *,
    max_seq_len: int,
    tokenizer: Any = None,
    eos_id: int | Sequence[int] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    overlong: Overlong = "error",
    name: str = "train_dataset",
) -> SFTDataset:
    """Reads preference data into memory, as a dataset of ``Preference``.

    Args:
        source: files, a dataset or a sequence, see ``lm_core.data.rows``; the module docstring lists the row formats.
        max_seq_len: maximum length of a prompt with an answer, in tokens; longer answers are truncated.
        tokenizer: see ``spin_trainer.data.sft_data.as_sft_dataset``.
        eos_id: see ``spin_trainer.data.sft_data.as_sft_dataset``.
        template_kwargs: see ``spin_trainer.data.sft_data.as_sft_dataset``.
        overlong: see ``spin_trainer.data.sft_data.as_sft_dataset``.
        name: argument name in error messages.

    Raises:
        ValueError, TypeError: a row is invalid; the message names it.
        FileNotFoundError: a file does not exist.
    """
    if isinstance(source, SFTDataset):
        if not all(isinstance(example, Preference) for example in source):
            raise TypeError(f"{name} must hold preferences, got an SFTDataset without rejected answers")
        return source
    reader = RowReader.of(tokenizer, eos_id, None, template_kwargs)
    rows, dropped = read_rows(
        source, lambda row, where: _encoded(row, where, reader), max_seq_len=max_seq_len, overlong=overlong, name=name
    )
    examples = [
        Preference(row.prompt, *row.answers[0], rejected=Answer(row.answers[1][0], not row.answers[1][1]))
        for row in rows
    ]
    check_answers_end(examples, reader.ends, name)
    return SFTDataset(examples, dropped)


def _encoded(row: Any, where: str, reader: RowReader) -> tuple[list[int], list[list[int]]]:
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{where} must have the columns 'prompt', 'chosen' and 'rejected', got {type(row).__name__} "
            f"{str(row)[:60]!r}"
        )
    row = {name: value for name, value in row.items() if value is not None}
    if not {"chosen", "rejected"} <= set(row):
        raise ValueError(f"{where} must have the columns 'prompt', 'chosen' and 'rejected', got {sorted(row)}")
    chats = [_is_chat(row[name]) for name in ("chosen", "rejected")]
    if "prompt" not in row or (all(chats) and isinstance(row["prompt"], str)):
        row = with_explicit_prompt(row, where)
    prompt = row["prompt"]
    if _is_ids(prompt):
        encoded = [reader.ids([*prompt, *_ids(row[name], name, where)], len(prompt), where) for name in ANSWERS]
    else:
        encoded = [reader.encoded({"prompt": prompt, "response": row[name]}, where) for name in ANSWERS]
    (prompt_ids, chosen), (other_prompt, rejected) = encoded
    if prompt_ids != other_prompt:
        raise ValueError(f"{where} must have one prompt before both answers, but the chat template writes two")
    return prompt_ids, [chosen, rejected]


ANSWERS = ("chosen", "rejected")


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], int)


def _ids(value: Any, name: str, where: str) -> Sequence[int]:
    if not _is_ids(value):
        raise TypeError(f"{where} has a prompt of token ids, so {name} must be token ids too, got {str(value)[:60]!r}")
    return value
