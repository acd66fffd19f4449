"""Supervised fine-tuning data: reads ids, texts and chats as prompts and human answers in token ids.

Accepted rows: ``(sequence, prompt_len)`` pairs of ids; ``(prompt, answer)`` texts; dicts with the columns ``prompt``
and ``response`` (or ``completion``, ``answer``); dicts with ``messages``, the last of which is the answer. A chat is
formatted by the tokenizer's own template; the text that it adds in front of an answer belongs to the prompt, so
generation and training see the same text.

A truncated answer gets no EOS: the model must not learn that the answer ends there.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lm_core.data.rows import iterate_rows

ANSWER_COLUMNS = ("response", "completion", "answer")
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


class SFTDataset(Sequence[Example]):
    """Examples with a fingerprint of their content; ``dropped`` counts the rows left out for a prompt too long."""

    def __init__(self, examples: Sequence[Example], dropped: int = 0) -> None:
        self.examples = list(examples)
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.prompt, example.response)).encode())
        return digest.hexdigest()


def as_sft_dataset(
    source: Any,
    *,
    max_seq_len: int,
    tokenizer: Any = None,
    eos_id: int | None = None,
    pad_id: int | None = -1,
    overlong: Overlong = "error",
    name: str = "train_sft_dataset",
) -> SFTDataset:
    """Reads a dataset into memory.

    Args:
        source: files, a dataset or a sequence, see ``lm_core.data.rows``; the module docstring lists the row formats.
        max_seq_len: maximum length of a prompt with its answer, in tokens; longer answers are truncated.
        tokenizer: tokenizer of texts and chats, with the protocol of ``lm_core.tokenizers``.
        eos_id: token that ends answers; by default the tokenizer's.
        pad_id: padding id; it is removed from the end of sequences.
        overlong: handling of prompts that leave no room for an answer: "error", or "drop" the row.
        name: argument name in error messages.

    Raises:
        ValueError, TypeError: a row is invalid; the message names it.
        FileNotFoundError: a file does not exist.
    """
    if isinstance(source, SFTDataset):
        return source
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len must be at least 2, got {max_seq_len}")
    if eos_id is None and tokenizer is not None:
        eos_id = tokenizer.eos_id
    # encode, check and truncate each row
    examples: list[Example] = []
    dropped = 0
    for where, row in iterate_rows(source, name=name):
        prompt, response = _encoded(row, tokenizer, eos_id, pad_id, where)
        if not prompt:
            raise ValueError(f"{where} must have a prompt of at least one token, got none")
        if not response:
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
        examples.append(Example(tuple(prompt), tuple(response[:room]), len(response) > room))
    if not examples:
        raise ValueError(f"{name} must hold at least one row, got none ({dropped} with a prompt too long)")
    # without EOS in any complete answer the policy would never learn to stop
    whole = [example for example in examples if not example.truncated]
    if eos_id is not None and whole and not any(example.response[-1] == eos_id for example in whole):
        raise ValueError(
            f"{name} must have answers that end with eos_id {eos_id}, none does: the opponent ends its own with it, "
            "so the player would learn nothing but to leave it out"
        )
    return SFTDataset(examples, dropped)


def _encoded(
    row: Any, tokenizer: Any, eos_id: int | None, pad_id: int | None, where: str
) -> tuple[list[int], list[int]]:
    if isinstance(row, Mapping):
        if "messages" in row:
            return _chat(list(row["messages"]), tokenizer, eos_id, where)
        answers = [row[column] for column in ANSWER_COLUMNS if column in row]
        if "prompt" not in row or not answers:
            raise ValueError(
                f"{where} must have the columns 'messages', or 'prompt' and one of {list(ANSWER_COLUMNS)}, "
                f"got {sorted(row)}"
            )
        prompt, answer = row["prompt"], answers[0]
        if _is_list(prompt):
            reply = answer if _is_list(answer) and answer else [{"role": "assistant", "content": answer}]
            return _chat([*prompt, *reply], tokenizer, eos_id, where)
        return _text(prompt, answer, tokenizer, eos_id, where)
    if _is_list(row) and len(row) == 2:
        if isinstance(row[0], str):
            return _text(row[0], row[1], tokenizer, eos_id, where)
        return _ids(row[0], row[1], pad_id, where)
    raise TypeError(
        f"{where} must be (sequence, prompt_len), (prompt, answer) or a dict, "
        f"got {type(row).__name__} {str(row)[:60]!r}"
    )


def _ids(sequence: Any, prompt_len: Any, pad_id: int | None, where: str) -> tuple[list[int], list[int]]:
    try:
        ids = torch.as_tensor(sequence)
        length = int(prompt_len)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where} must be (token ids, prompt_len), got {_kinds(sequence, prompt_len)}") from error
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{where} must hold 1-D integer ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    values: list[int] = ids.tolist()
    while values and values[-1] == pad_id:
        values.pop()
    if length < 1:
        raise ValueError(f"{where} must have a prompt_len of at least 1, got {length}")
    if any(value < 0 for value in values):
        raise ValueError(f"{where} must hold ids of at least 0 (pad_id is {pad_id}), got {min(values)}")
    if length >= len(values):
        raise ValueError(f"{where} must have answer tokens after its prompt_len {length}, got {len(values)} tokens")
    return values[:length], values[length:]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _kinds(*parts: Any) -> str:
    return ", ".join(type(part).__name__ for part in parts)


def _check_ends(tokenizer: Any, eos_id: int | None, where: str) -> int:
    """Returns the id that ends an answer, after checking that tokenizer and id are set."""
    if tokenizer is None:
        raise ValueError(f"{where} holds text, so a tokenizer is needed, got tokenizer=None")
    if eos_id is None:
        raise ValueError(f"{where} holds text, so answers need an end: the tokenizer has no eos_id, pass eos_id")
    return eos_id


def _text(prompt: Any, answer: Any, tokenizer: Any, eos_id: int | None, where: str) -> tuple[list[int], list[int]]:
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise TypeError(f"{where} must have texts as prompt and answer, got {_kinds(prompt, answer)}")
    end = _check_ends(tokenizer, eos_id, where)
    return tokenizer.encode(prompt), [*tokenizer.encode(answer), end] if answer else []


def _chat(messages: list[Any], tokenizer: Any, eos_id: int | None, where: str) -> tuple[list[int], list[int]]:
    end = _check_ends(tokenizer, eos_id, where)
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"{where} must have messages with 'role' and 'content', got {str(message)[:60]!r}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise ValueError(f"{where} must end with an answer of the assistant after a question, got the roles {roles}")
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ValueError(f"{where} is a chat, but {type(tokenizer).__name__} has no apply_chat_template")
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            f"{where}: the chat template must write a conversation so that it begins with its own prompt, it does not"
        )
    response = whole[len(prompt) :]
    if end not in response:
        raise ValueError(
            f"{where}: the chat template must end an answer with eos_id {end}, it does not; pass the id that does"
        )
    # the template's text after the end of a turn is never generated, so it is not learned
    return prompt, response[: response.index(end) + 1]
