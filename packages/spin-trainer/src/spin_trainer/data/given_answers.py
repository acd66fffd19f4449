"""Answers made elsewhere: rows of prompts to answer, written for another engine, and its answers, read back.

A row of answers belongs to the row of the dataset with the same number. It has ``answer_ids`` (token ids) or a text in
``answer`` (or ``response``, ``completion``, ``generated``); several answers to a prompt are a list. ``finished`` is
False for answers that a length limit cut off. Where a row has ``row`` or ``prompt_ids``, as exported prompts do, they
are compared with the dataset's. Ids are exact; a text is encoded again, perhaps in other tokens than were sampled.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_core.data.conversations import ANSWER_COLUMNS
from lm_core.data.rows import iterate_rows
from spin_trainer.data.opponent_answers import Answer
from spin_trainer.data.sft_data import SFTDataset

TEXT_COLUMNS = (*ANSWER_COLUMNS, "generated")


def prompt_rows(dataset: SFTDataset, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts of a dataset for another engine: row number, text and token ids."""
    return [
        {"row": index, "prompt": tokenizer.decode(example.prompt), "prompt_ids": list(example.prompt)}
        for index, example in enumerate(dataset)
    ]


def read_answers(
    source: Any,
    dataset: SFTDataset,
    *,
    max_seq_len: int,
    tokenizer: Any = None,
    eos_ids: Sequence[int] = (),
    count: int = 1,
    name: str = "answers",
) -> list[Answer]:
    """Reads ``count`` answers to each example of ``dataset``: those of the first prompt, of the second, and so on.

    Args:
        source: files, a dataset or a sequence of rows, see ``lm_core.data.rows``.
        dataset: prompts that were answered.
        max_seq_len: maximum length of a prompt with its answer, in tokens; longer answers are truncated.
        tokenizer: tokenizer of texts.
        eos_ids: tokens that end an answer; finished texts get the one that ends most human answers.
        count: answers to each prompt.
        name: argument name in error messages.

    Raises:
        ValueError, TypeError: a row is invalid or belongs to another prompt, or their number is wrong.
    """
    last = Counter(example.response[-1] for example in dataset if example.response)
    end = next((token for token, _ in last.most_common() if token in eos_ids), eos_ids[0] if eos_ids else None)
    answers: list[Answer] = []
    rows = 0
    for index, (where, row) in enumerate(iterate_rows(source, name=name)):
        rows += 1
        if not isinstance(row, Mapping):
            raise TypeError(f"{where} must have the column 'answer' or 'answer_ids', got {type(row).__name__}")
        if index >= len(dataset):
            continue  # counted, for the error below
        prompt = dataset[index].prompt
        for column, expected in (("row", index), ("prompt_ids", list(prompt))):
            value = row.get(column)
            if value is not None and (list(value) if column == "prompt_ids" else value) != expected:
                raise ValueError(f"{where} must answer row {index} of the data, but its {column} is {str(value)[:60]}")
        parts = _answers_of(row, where, count)
        finished = row.get("finished")
        flags = list(finished) if isinstance(finished, list) else [finished] * count
        if len(flags) != count or not all(flag is None or isinstance(flag, bool) for flag in flags):
            raise ValueError(f"{where} must have true or false in finished, got {finished!r}")
        for part, flag in zip(parts, flags, strict=True):
            ids = _ids(part, where, tokenizer, end if flag is not False else None)
            room = max_seq_len - len(prompt)
            ends = ids[-1] in eos_ids
            if any(token in eos_ids for token in ids[:-1]):
                raise ValueError(f"{where} must have no end token before the end of an answer, got {ids[:20]}")
            answers.append(Answer(tuple(ids[:room]), ends and len(ids) <= room))
    if rows != len(dataset):
        raise ValueError(f"{name} must have one row for each of the {len(dataset)} prompts, got {rows}")
    return answers


def _answers_of(row: Mapping[str, Any], where: str, count: int) -> list[Any]:
    column = next((name for name in ("answer_ids", *TEXT_COLUMNS) if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"{where} must have the column 'answer' or 'answer_ids', got {sorted(row)}")
    value = row[column]
    nested = isinstance(value, list) and bool(value) and not isinstance(value[0], int)
    parts = value if nested else [value]
    if len(parts) != count:
        raise ValueError(f"{where} must have {count} answer(s) in {column}, got {len(parts)}")
    return parts


def _ids(value: Any, where: str, tokenizer: Any, end: int | None) -> list[int]:
    """Token ids of an answer; a text gets the end token."""
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(f"{where} holds text, so a tokenizer is needed, got tokenizer=None")
        ids = [*tokenizer.encode(value), *([] if end is None else [end])]
    elif not isinstance(value, Tensor) and value == []:
        ids = []
    else:
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where} must have a text or token ids as answer, got {str(value)[:60]!r}") from error
        if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise TypeError(f"{where} must have a text or token ids as answer, got {str(value)[:60]!r}")
        ids = tensor.tolist()
    if not ids:
        raise ValueError(f"{where} must have an answer of at least one token, got none")
    return ids
