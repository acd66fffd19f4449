"""Prompts without answers, as texts or chats: what a policy answers when it rewards itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_core.data.conversations import check_messages, prompt_of_chat
from lm_core.tokenizers import message_text, prompt_ids
from spin_trainer.data.sft_data import Example, Overlong, RowReader, SFTDataset, naming, read_rows


@dataclass(frozen=True)
class Prompt(Example):
    """A prompt without an answer, ``response`` is empty.

    Attributes:
        text: the question: the text, or the last message of the user.
        messages: the chat; None for a text.
        columns: further columns of the row.
    """

    text: str = field(kw_only=True)
    messages: list[dict[str, Any]] | None = field(kw_only=True)
    columns: Mapping[str, Any] = field(kw_only=True, hash=False, compare=False)


def as_prompt_dataset(
    source: Any,
    *,
    max_seq_len: int,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
    overlong: Overlong = "error",
    name: str = "train_dataset",
) -> SFTDataset:
    """Reads prompts into memory, as a dataset of ``Prompt``.

    Rows are texts, ``{"prompt": text or messages}`` or ``{"messages": [...]}``, from which an answer at the end is left
    out. Further arguments and errors are those of ``spin_trainer.data.sft_data.as_sft_dataset``.
    """
    reader = RowReader.of(tokenizer, None, None, template_kwargs)
    prompts: dict[str, tuple[str, list[dict[str, Any]] | None, Mapping[str, Any]]] = {}

    def encode(row: Any, where: str) -> tuple[list[int], list[list[int]]]:
        columns = dict(row) if isinstance(row, Mapping) else {"prompt": row}
        value = columns.pop("prompt", None)
        if value is None:
            value = columns.pop("messages", None)
        if isinstance(value, str):
            prompts[where] = value, None, columns
            with naming(where):
                return prompt_ids(reader.tokenizer, value), []
        if not isinstance(value, Sequence):
            raise TypeError(
                f"{where} must be a text, or have a prompt or messages, got {type(row).__name__} {str(row)[:60]!r}"
            )
        messages = check_messages(value, where)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(f"{where} must end with a question of the user, got {[m['role'] for m in messages]}")
        prompts[where] = message_text(messages[-1]), messages, columns
        ids = prompt_of_chat(reader.tokenizer, messages, template_kwargs=template_kwargs, where=where)
        return ids, []

    rows, dropped = read_rows(source, encode, max_seq_len=max_seq_len, overlong=overlong, name=name)
    examples = []
    for row in rows:
        text, messages, columns = prompts[row.where]
        examples.append(Prompt(row.prompt, (), text=text, messages=messages, columns=columns))
    return SFTDataset(examples, dropped)
