"""Examples as arguments of ``CALM.forward``: batches of any data set, and pieces of texts."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_flatten

from calm_pytorch.training.state_cache import StateCache
from lm_core.checkpoints.tensor_files import hash_of
from lm_core.data.conversations import (
    ANSWER_COLUMNS,
    NoBorderError,
    assistant_mask,
    conversation_ids,
    text_answer_ids,
)
from lm_core.data.rows import WholeFile, iterate_rows
from lm_core.tokenizers import prompt_ids

# Maximum number of examples that are hashed, evenly spaced, of a dataset that may have to read files.
_HASHED = 2000


class Batches:
    """Makes batches of examples.

    Args:
        names: names of the entries of an example that is a tuple.
        collate_fn: makes a batch of examples; torch's default stacks tensors.
        device: device that the tensors are moved to.
    """

    def __init__(
        self, names: Sequence[str], collate_fn: Callable[[list[Any]], Any] | None, device: torch.device
    ) -> None:
        self.names = tuple(names)
        self.collate_fn = collate_fn
        self.device = device

    def of(self, dataset: Any, indices: Sequence[int], cache: StateCache | None = None) -> dict[str, Any]:
        """The examples of these indices, as arguments.

        Args:
            dataset: with ``dataset[i]``.
            indices: indices of the examples.
            cache: whose states take the place of prompts.

        Raises:
            ValueError: an example holds another number of things than there are names.
        """
        from accelerate.utils import send_to_device
        from torch.utils.data import default_collate

        batch = (self.collate_fn or default_collate)([dataset[index] for index in indices])
        if not isinstance(batch, dict):
            if len(batch) != len(self.names):
                raise ValueError(f"data_kwarg_names must name what an example holds, got {self.names} for {len(batch)}")
            batch = dict(zip(self.names, batch, strict=True))
        batch = send_to_device(batch, self.device)
        if cache is not None:

            def prompts(group: Sequence[int]) -> tuple[Any, Any]:
                together = self.of(dataset, group)
                return together.get("prompt"), together.get("prompt_mask")

            batch = {name: value for name, value in batch.items() if name not in ("prompt", "prompt_mask")}
            batch["augment_states"] = cache.states(indices, prompts)
        return batch


def fingerprint_of(dataset: Any) -> str:
    """A hash by which a resumed run knows its data: the dataset's ``fingerprint``, or one of its examples.

    All of a list are hashed, and 2,000 evenly spaced ones of any other dataset; examples that differ each time they are
    read are left out.
    """
    known = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if isinstance(known, str | int):
        return str(known)
    count = len(dataset)
    digest = hashlib.sha256(str(count).encode())
    hashed = count if isinstance(dataset, list | tuple) else min(count, _HASHED)
    for index in (place * count // hashed for place in range(hashed)):
        first, again = (_bytes_of(dataset[index]) for _ in range(2))
        digest.update(first if first == again else b"")
    return digest.hexdigest()[:16]


def _bytes_of(example: Any) -> bytes:
    """Hash of tensors, arrays, numbers and texts; of other objects, whose repr is no value, only the type counts."""
    tensors, others = [], []
    for index, leaf in enumerate(tree_flatten(example)[0]):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            leaf = torch.as_tensor(leaf)
        if isinstance(leaf, Tensor):
            tensors.append((str(index), leaf))
        else:
            plain = isinstance(leaf, str | bytes | bool | int | float | np.generic | None)
            others.append(leaf if plain else type(leaf))
    return hash_of(tensors, repr(others)).encode()


@dataclass(frozen=True)
class Answered:
    """A prompt with its answer, both texts or lists of messages; or messages with an answer that is text."""

    prompt: Any
    answer: Any


class TextExamples:
    """Pieces of texts in the anchor's ids; with static prompts each augment reads the piece before.

    The last piece of a text may be shorter. With prompts, a text that is too short for two whole pieces is cut in the
    middle. Chats become texts by the tokenizer's template, and the assistant's tokens count in the loss. Of a prompt
    with an answer only the answer and its end count, and augments that read prompts read that prompt.

    Args:
        documents: results of ``read_documents``.
        tokenizer: tokenizer of the anchor, in the protocol of ``lm_core.tokenizers``.
        length: tokens of a piece.
        readers: for each augment that reads a prompt its tokenizer, or None if it takes the anchor's ids; without
            any, examples have no prompt.
        pad_id: fills shorter pieces of a batch.
        template_kwargs: further arguments of the chat template, such as ``enable_thinking``.

    Attributes:
        documents: number of documents.
        left_out: number of those without an example: too short, or chats in which nothing counts.
        fingerprint: hash of the examples.

    Raises:
        ValueError: there is no example, or a chat does not suit the template; it is named.
    """

    def __init__(
        self,
        documents: Iterable[tuple[str, Any]],
        tokenizer: Any,
        length: int,
        *,
        readers: Sequence[Any] = (),
        pad_id: int = -1,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.pad_id = pad_id
        self.documents = self.left_out = 0
        # ids, which of them count, and ids of each prompt
        self.examples: list[tuple[list[int], list[bool], list[list[int]]]] = []
        for where, document in documents:
            ids, counted, asked = _ids_of(document, tokenizer, template_kwargs, where)
            self.documents += 1
            before = len(self.examples)
            reads_before = bool(readers) and asked is None
            for start in range(min(length, len(ids) // 2) if reads_before else 0, len(ids), length):
                piece = slice(start, start + length)
                prompt = ids[max(start - length, 0) : start] if asked is None else asked
                # the first token has no label, and a prompt must have one
                if any(counted[piece][1:]) and (prompt or not readers):
                    prompts = [prompt if own is None else prompt_ids(own, tokenizer.decode(prompt)) for own in readers]
                    self.examples.append((ids[piece], counted[piece], prompts))
            self.left_out += len(self.examples) == before
        if not self.examples:
            raise ValueError(f"data must hold a text of at least {3 if readers else 2} tokens, got none")
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr(example).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[list[int], list[bool], list[list[int]]]:
        """Ids of the sequence, which of them count, and ids of each prompt."""
        return self.examples[index]

    def collate(self, examples: Sequence[tuple[list[int], list[bool], list[list[int]]]]) -> dict[str, Any]:
        """A batch as arguments of ``CALM.forward``."""

        def padded(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

        sequences, counted, prompts = zip(*examples, strict=True)
        batch: dict[str, Any] = {"seq": padded(sequences, self.pad_id), "mask": padded(counted, False)}
        reads = [padded(rows, self.pad_id) for rows in zip(*prompts, strict=True)]
        return {**batch, "prompt": reads} if reads else batch


def _ids_of(
    document: Any, tokenizer: Any, template_kwargs: Mapping[str, Any] | None, where: str
) -> tuple[list[int], list[bool], list[int] | None]:
    """Ids of a document, which of them count in the loss, and those of the prompt of a document with an answer."""
    try:
        if isinstance(document, Answered):
            prompt, answer = _answered_ids(document, tokenizer, template_kwargs, where)
            return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer), prompt
        if not isinstance(document, str):
            return *assistant_mask(tokenizer, document, template_kwargs=template_kwargs, where=where), None
        ids = prompt_ids(tokenizer, document)
    except NoBorderError:
        return [], [], None  # counted among those left out
    except ValueError as error:
        raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from error
    return ids, [True] * len(ids), None


def _answered_ids(
    document: Answered, tokenizer: Any, template_kwargs: Mapping[str, Any] | None, where: str
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the answer with its end."""
    prompt, answer = document.prompt, document.answer
    if _is_chat(prompt):
        reply = answer if _is_chat(answer) else [{"role": "assistant", "content": answer}]
        messages = [*prompt, *reply]
        return conversation_ids(tokenizer, messages, answer=len(prompt), template_kwargs=template_kwargs, where=where)
    ids, answer_ids = text_answer_ids(tokenizer, prompt, answer)
    return ids, answer_ids if tokenizer.eos_id is None else [*answer_ids, tokenizer.eos_id]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def read_documents(source: Any, *, field: str = "text") -> list[tuple[str, Any]]:
    """The texts, chats (lists of messages) and prompts with answers of a source, each with its place for errors.

    Args:
        source: a source of ``lm_core.data.rows.load_rows``; rows have a text in ``field``, ``messages``, or ``prompt``
            with one of ``ANSWER_COLUMNS``, both text or messages.
        field: column of the text.

    Raises:
        FileNotFoundError, ValueError: as for ``load_rows``; also if a row has none of these.
    """
    documents: list[tuple[str, Any]] = []
    for where, row in iterate_rows(source, name="data"):
        document = row
        if isinstance(row, dict):
            present = {name: value for name, value in row.items() if value is not None}
            column = "text" if isinstance(row, WholeFile) else field if field in present else "messages"
            answers = [present[name] for name in ANSWER_COLUMNS if name in present]
            if column in present:
                document = present[column]
            elif "prompt" in present and answers:
                document = Answered(present["prompt"], answers[0])
            else:
                raise ValueError(
                    f"field {field!r} is missing in {where}, which has {sorted(present)}: neither 'messages', nor "
                    f"'prompt' with one of {list(ANSWER_COLUMNS)}"
                )
        if isinstance(document, bytes):
            document = document.decode(errors="replace")
        if isinstance(document, Answered):
            kinds = [type(part).__name__ for part in (document.prompt, document.answer)]
            both_text = isinstance(document.prompt, str) and isinstance(document.answer, str)
            if not both_text and not (_is_chat(document.prompt) and isinstance(document.answer, str | list)):
                raise ValueError(
                    f"{where} must have a prompt and an answer of text or messages, got {' and '.join(kinds)}"
                )
        elif not isinstance(document, str) and not _is_chat(document):
            raise ValueError(f"{where} must hold a text or messages, got {type(document).__name__}")
        documents.append((where, document))
    return documents
