"""Corpora: documents of real text, split into training and validation.

The default, ``stdlib_corpus``, is the source of the running Python's standard library: real text, on every machine,
without a download. ``load_corpus`` accepts everything that ``lm_core.data.documents`` reads.

The standard library differs between Python versions, so a corpus has a fingerprint of its content: compare losses only
if the fingerprints agree.
"""

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_core.checks import typed
from lm_core.data.documents import Document, Documents, Encoder, load_documents, read_texts, tokenise

__all__ = [
    "Corpus",
    "Document",
    "Documents",
    "Encoder",
    "held_out_documents",
    "load_corpus",
    "load_documents",
    "read_texts",
    "split_documents",
    "stdlib_corpus",
    "tokenise",
]

# Tests and vendored code are not library source; encodings/ and pydoc_data/ are generated tables.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
_NOT_LIBRARY |= {"pydoc_data", "lib-dynload"}
_MACHINE_SPECIFIC = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Corpus:
    """Two disjoint sets of documents.

    Attributes:
        train: training documents.
        validation: held-out documents.
        fingerprint: SHA-256 over the content and the split.
    """

    train: Documents
    validation: Documents
    fingerprint: str


def _fraction_of(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _check_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")


def split_documents(
    documents: Documents, validation_fraction: float = 0.05, *, names: Sequence[str] | None = None
) -> Corpus:
    """Splits documents by the hash of their names, so that adding documents moves none to the other side.

    A single document (a book, enwik8) is split by position: its last ``validation_fraction`` is for validation.

    Args:
        documents: at least one document.
        validation_fraction: share of the documents (of the tokens, for a single document) kept for validation.
        names: key to hash for each document; its index by default.

    Raises:
        ValueError: the fraction is outside (0, 1), or one side would be empty.
    """
    _check_fraction(validation_fraction)
    if len(documents) == 1:
        train, validation = _split_by_position(documents, validation_fraction)
    else:
        keys = [str(index) for index in range(len(documents))] if names is None else names
        fractions = np.array([_fraction_of(key) for key in keys], dtype=np.float64)
        held_out = fractions < validation_fraction
        if len(documents):  # with a few documents, chance may put all on one side
            held_out[fractions.argmin()] = True
            held_out[fractions.argmax()] = False
        train = documents.select(np.flatnonzero(~held_out))
        validation = documents.select(np.flatnonzero(held_out))
    if train.num_tokens == 0 or validation.num_tokens == 0:
        raise ValueError(
            f"validation_fraction {validation_fraction} leaves {train.num_tokens} tokens for training and "
            f"{validation.num_tokens} for validation; both sides need some"
        )
    return _corpus_of(train, validation)


def _corpus_of(train: Documents, validation: Documents) -> Corpus:
    fingerprint = hashlib.sha256(f"{train.fingerprint}{validation.fingerprint}".encode()).hexdigest()
    return Corpus(train=train, validation=validation, fingerprint=fingerprint)


def _split_by_position(documents: Documents, validation_fraction: float) -> tuple[Documents, Documents]:
    start, length, size = int(documents.starts[0]), int(documents.lengths[0]), int(documents.byte_lengths[0])
    held_out = round(length * validation_fraction)
    held_out_bytes = round(size * held_out / length)  # exact for bytes, in proportion for other tokens

    def part(first: int, tokens: int, text_bytes: int) -> Documents:
        columns = {"starts": first, "lengths": tokens, "byte_lengths": text_bytes}
        return Documents(ids=documents.ids, **{name: np.array([n], dtype=np.int64) for name, n in columns.items()})

    cut = length - held_out
    return part(start, cut, size - held_out_bytes), part(start + cut, held_out, held_out_bytes)


@typed
def stdlib_corpus(
    *,
    tokenizer: Any = None,
    validation_fraction: float = 0.05,
    max_documents: int | None = None,
    root: str | Path | None = None,
) -> Corpus:
    """The source of the running Python's standard library: one document a file, sorted and split by path.

    Without tests, installed packages, generated tables (``encodings``, ``pydoc_data``) and files that differ from
    machine to machine. About 11 MB with Python 3.11.

    Args:
        tokenizer: anything with ``encode``; bytes by default.
        validation_fraction: share of the files kept for validation, chosen by their paths alone.
        max_documents: maximum number of files, chosen by the hash of their paths, for quick trials.
        root: another folder of Python sources to read instead.

    Raises:
        FileNotFoundError: the sources are not on this machine (some embedded Pythons ship without them).
        ValueError: ``validation_fraction`` is outside (0, 1), or ``max_documents`` is below 2.
    """
    _check_fraction(validation_fraction)
    if max_documents is not None and max_documents < 2:
        raise ValueError(f"max_documents must be at least 2, one for each side of the split, got {max_documents}")
    folder = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    names = _library_files(folder)
    if max_documents is not None:
        names = sorted(sorted(names, key=lambda name: _fraction_of(f"subset: {name}"))[:max_documents])
    contents = [(name, (folder / name).read_bytes()) for name in names]
    contents = [(name, content) for name, content in contents if content]
    if len(contents) < 2:
        raise FileNotFoundError(f"the standard library's .py sources were not found under {folder}")
    documents = tokenise((content for _, content in contents), tokenizer=tokenizer)
    return split_documents(documents, validation_fraction, names=[name for name, _ in contents])


def _library_files(root: Path) -> list[str]:
    """Sorted POSIX paths, relative to ``root``, of the sources that count as library."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith(_MACHINE_SPECIFIC):
                paths.append((Path(folder) / name).relative_to(root).as_posix())
    return sorted(paths)


def load_corpus(
    source: Any,
    *,
    tokenizer: Encoder | None = None,
    field: str = "text",
    validation_source: Any = None,
    validation_fraction: float = 0.05,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """A corpus from ``"stdlib"``, a file, a folder, a dataset or an iterable, split for training and validation.

    Args:
        source: ``"stdlib"``, or a source of ``read_texts``.
        validation_source: source of the held-out documents; None holds out a share of ``source``.
        validation_fraction: share kept for validation (of the documents; of the tokens if there is only one).
        tokenizer, field, cache_dir: arguments of ``load_documents``.

    Raises:
        FileNotFoundError, ValueError, TypeError: as for ``load_documents`` and ``split_documents``.
    """
    _check_fraction(validation_fraction)
    if isinstance(source, str) and source == "stdlib":
        corpus = stdlib_corpus(tokenizer=tokenizer, validation_fraction=validation_fraction)
        documents = corpus.train
    else:
        documents = load_documents(source, tokenizer=tokenizer, field=field, cache_dir=cache_dir)
        corpus = None
    if validation_source is not None:
        return _corpus_of(documents, held_out_documents(validation_source, tokenizer=tokenizer, field=field))
    return corpus or split_documents(documents, validation_fraction)


def held_out_documents(source: Any, *, tokenizer: Encoder | None = None, field: str = "text") -> Documents:
    """Documents for evaluation: the held-out part of "stdlib", and all of any other source.

    Raises:
        FileNotFoundError, ValueError, TypeError: as for ``load_documents``.
    """
    if isinstance(source, str) and source == "stdlib":
        return stdlib_corpus(tokenizer=tokenizer).validation
    return load_documents(source, tokenizer=tokenizer, field=field)
