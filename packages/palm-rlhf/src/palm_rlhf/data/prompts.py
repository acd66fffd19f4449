"""Prompts of a policy, from ids, text, chats, JSONL files or Hugging Face datasets.

Each pass over the prompts is a new permutation. Their order is a function of the seed and of the number taken so far,
so a resumed run needs only that number.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.checks import check_ids
from lm_core.data.conversations import prompt_of_chat
from lm_core.data.rows import SUFFIXES, iterate_rows
from lm_core.data.text_files import COMPRESSED
from lm_core.generation.decoding import prompt_rows
from lm_core.tokenizers import HuggingFaceTokenizer, full_text, prompt_ids
from lm_core.tokenizers import as_tokenizer as as_known_tokenizer

# a word without spaces that ends like a file, such as "prompts.jsonl" or "data/train.txt.gz"
_FILE_NAME = re.compile(
    rf"\S+({'|'.join(re.escape(suffix) for suffix in SUFFIXES)})({'|'.join(map(re.escape, COMPRESSED))})?"
)
PROMPT_COLUMNS = ("prompt", "messages", "text", "query")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: token ids, 1-D, at least one.
        text: the prompt as text; None without a text or a tokenizer.
        columns: other columns of its dataset row, for rewards that check answers.
        messages: the messages of a chat, whose text is then that of the template, markers included; None otherwise.
    """

    ids: Int[Tensor, " n"]
    text: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class PromptFiles:
    """Sources of prompts in files: paths, folders, globs or names on the hub; a text file has one prompt per line.

    ``name`` is the argument's name in errors.
    """

    sources: tuple[str | Path, ...]
    name: str = "prompts_path"

    def rows(self) -> list[tuple[str, Any]]:
        """All rows with their locations, such as "p.jsonl, line 2,"."""
        return [
            (where.rstrip(","), row)
            for source in self.sources
            for where, row in iterate_rows(source, text_rows="line", name=self.name)
        ]


def load_prompts(
    source: Any, *, tokenizer: Any = None, template_kwargs: Mapping[str, Any] | None = None
) -> list[Prompt]:
    """Prompts of any of the accepted forms.

    Args:
        source: ids ``(b, n)``, a list of 1-D tensors or of lists of ids; texts; chats (lists of messages with "role"
            and "content"); rows (mappings) with a column "prompt" (or "messages", "text", "query") of text, chat or
            ids; a Hugging Face dataset of rows; ``PromptFiles``, a ``Path``, an existing path, or a name that ends like
            a file of these formats, of any source of ``lm_core.data.rows`` with such rows.
        tokenizer: tokenizer of texts and chats; see ``as_tokenizer``.
        template_kwargs: further arguments of the chat template, such as ``enable_thinking``.

    Raises:
        ValueError: there is no prompt, one is empty, or text or chat comes without a tokenizer for it.
        TypeError: a form that is none of these.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Tensor):
        return [Prompt(row.long().cpu(), _decoded(row, tokenizer)) for row in prompt_rows(source)]
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        source = PromptFiles((source,))
    if isinstance(source, PromptFiles):
        rows = source.rows()
        if tokenizer is not None and not hasattr(tokenizer, "encode"):
            source = [row.get("text", row.get("prompt")) for _, row in rows]
    if tokenizer is not None and not hasattr(tokenizer, "encode"):
        texts = [source] if isinstance(source, str) else source
        if texts and all(isinstance(text, str) for text in texts):
            return load_prompts(tokenizer(list(texts)))
        tokenizer = None
    if not isinstance(source, PromptFiles):
        rows = list(iterate_rows([source] if isinstance(source, str) else source, name="prompts"))
    prompts = [_prompt(row, where, tokenizer, template_kwargs) for where, row in rows]
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    return prompts


def _is_path(text: str) -> bool:
    try:
        return _FILE_NAME.fullmatch(text) is not None or Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, or with a zero byte
        return False


def as_tokenizer(tokenizer: Any) -> Any:
    """``lm_core.tokenizers.as_tokenizer``, also of a function from texts to ids, the form of PaLM-rlhf-pytorch.

    Raises:
        TypeError: it is none of these.
    """
    is_function = callable(tokenizer) and not hasattr(tokenizer, "encode")
    has_both = hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")
    of_transformers = hasattr(tokenizer, "eos_token_id") or hasattr(tokenizer, "tokenizer")
    if isinstance(tokenizer, str | Path) or (of_transformers and not isinstance(tokenizer, HuggingFaceTokenizer)):
        return as_known_tokenizer(tokenizer)
    if tokenizer is not None and not is_function and not has_both:
        raise TypeError(f"tokenizer must have encode and decode, got {type(tokenizer).__name__}")
    return tokenizer


def check_prompts(prompts: Sequence[Prompt], vocab_size: int | None) -> None:
    """Raises ``ValueError`` unless there are prompts and all their ids are below ``vocab_size``."""
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if vocab_size is not None:
        check_ids(torch.cat([prompt.ids for prompt in prompts]), vocab_size, "prompts")


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of the prompts and of the columns of their rows, to recognise the data of a run."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.ids.tolist(), sorted(prompt.columns.items(), key=str))).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def _prompt(entry: Any, where: str, tokenizer: Any, template_kwargs: Mapping[str, Any] | None) -> Prompt:
    columns: dict[str, Any] = {}
    if isinstance(entry, Prompt):
        return entry
    if isinstance(entry, Mapping):
        column = next((name for name in PROMPT_COLUMNS if entry.get(name) is not None), None)
        if column is None:
            raise ValueError(f"{where} must have a column out of {PROMPT_COLUMNS}, got {sorted(entry)}")
        columns = {str(name): value for name, value in entry.items() if name != column}
        entry = entry[column]
    messages, text = None, None
    if isinstance(entry, str):
        if tokenizer is None:
            raise ValueError(f"{where} is text, which needs a tokenizer, got tokenizer=None")
        try:
            ids, text = torch.tensor(prompt_ids(tokenizer, entry), dtype=torch.long), entry
        except ValueError as error:  # a lone surrogate
            raise ValueError(f"{where}: {error}") from error
    elif isinstance(entry, Sequence) and entry and isinstance(entry[0], Mapping):
        if getattr(tokenizer, "apply_chat_template", None) is None:
            raise ValueError(f"{where} is a chat, which needs a tokenizer with apply_chat_template")
        chat = prompt_of_chat(tokenizer, entry, template_kwargs=template_kwargs, where=where)
        ids, messages = torch.tensor(chat), entry
        text = full_text(tokenizer, ids)
    else:
        if isinstance(entry, Sequence) and all(type(value) is int for value in entry):
            entry = torch.tensor(list(entry), dtype=torch.long)
        if not isinstance(entry, Tensor) or entry.ndim != 1 or entry.is_floating_point() or entry.dtype == torch.bool:
            raise TypeError(f"{where} must be token ids, a text or a chat, got {entry!r}"[:200])
        ids, text = entry.long().cpu(), _decoded(entry, tokenizer)
    if ids.numel() == 0:
        raise ValueError(f"{where} must hold at least one token, it is empty")
    return Prompt(ids, text, columns, messages)


def _decoded(ids: Tensor, tokenizer: Any) -> str | None:
    return None if tokenizer is None else str(tokenizer.decode(ids.tolist()))
