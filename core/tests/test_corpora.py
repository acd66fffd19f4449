"""Corpora: every reader returns the documents that were written, splits are disjoint and fixed, caches are whole."""

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lm_core.data.corpora import load_corpus, split_documents, stdlib_corpus
from lm_core.data.documents import Documents, load_documents, read_texts, tokenise

TEXTS = ["first document", "zwei: naïve 日本", "third\nwith lines\n"]


class Words:
    """Another library's tokenizer: words numbered by length, ids wider than sixteen bits."""

    vocab_size = 100_000

    def encode(self, text):
        return [90_000 + len(word) for word in text.split()]


@pytest.fixture
def write(tmp_path):
    def write_as(form: str) -> Path:
        lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in TEXTS)
        if form == "folder":
            for number, text in enumerate(TEXTS):
                folder = tmp_path / f"part{number}"
                folder.mkdir()
                (folder / "a.txt").write_bytes(text.encode())
            (tmp_path / "picture.png").write_bytes(b"\x89PNG")
            return tmp_path
        path = tmp_path / f"corpus.{form}"
        path.write_bytes(gzip.compress(lines.encode()) if form.endswith("gz") else lines.encode())
        return path

    return write_as


def _texts(documents: Documents) -> list[str]:
    return [bytes(document.astype(np.uint8)).decode() for document in documents]


@pytest.mark.filterwarnings("ignore:.*1 file.s. passed over. picture.png")
@pytest.mark.parametrize("form", ["folder", "jsonl", "jsonl.gz"])
def test_every_reader_gives_the_documents_that_were_written(write, form):
    documents = load_documents(write(form), field="body")
    assert _texts(documents) == TEXTS
    assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(("content", "prefix"), [(b"<page>\r\n" * 9, ""), (bytes(range(256)) * 4, "bytes:")])
def test_a_file_without_suffix_is_one_document_gzipped_or_not(content, prefix, tmp_path):
    (tmp_path / "enwik8").write_bytes(content)
    (tmp_path / "enwik8.gz").write_bytes(gzip.compress(content))
    for name in ("enwik8", "enwik8.gz"):
        documents = load_documents(f"{prefix}{tmp_path / name}")
        assert len(documents) == 1
        assert bytes(documents[0].astype(np.uint8)) == content


def test_a_hugging_face_dataset_is_read_by_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"body": TEXTS, "tokens": [[1, 2], [3], [4, 5, 6]]})
    assert _texts(load_documents(split, field="body")) == TEXTS
    assert [list(row) for row in load_documents(split, field="tokens")] == [[1, 2], [3], [4, 5, 6]]
    cached = load_documents(split, field="body", cache_dir=tmp_path)
    assert _texts(cached) == TEXTS
    with pytest.raises(ValueError, match=r"one split of the dataset, got a dict of \['train'\]"):
        load_documents(datasets.DatasetDict({"train": split}), field="body")


def test_any_tokenizer_with_encode_will_do_and_wide_ids_are_kept():
    documents = tokenise(TEXTS, tokenizer=Words())
    assert documents.ids.dtype == np.uint32
    assert [list(row) for row in documents] == [Words().encode(text) for text in TEXTS]
    assert documents.num_bytes == sum(len(text.encode()) for text in TEXTS)


def test_a_cached_corpus_is_mapped_into_memory_and_equals_the_one_read_directly(write, tmp_path):
    path = write("jsonl")
    direct = load_documents(path, field="body")
    first = load_documents(path, field="body", cache_dir=tmp_path / "cache")
    again = load_documents(path, field="body", cache_dir=tmp_path / "cache")
    assert isinstance(again.ids, np.memmap)
    assert direct.fingerprint == first.fingerprint == again.fingerprint
    assert again.num_bytes == direct.num_bytes
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.name.startswith(".tmp")]


def test_the_cache_is_keyed_by_file_tokenizer_and_field(write, tmp_path):
    path, cache = write("jsonl"), tmp_path / "cache"
    load_documents(path, field="body", cache_dir=cache)
    words = load_documents(path, field="body", cache_dir=cache, tokenizer=Words())
    assert list(words[0]) == Words().encode(TEXTS[0])
    stat = path.stat()
    path.write_text(json.dumps({"body": "changed"}) + "\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert _texts(load_documents(path, field="body", cache_dir=cache)) == ["changed"]


def test_an_interrupted_cache_is_built_again_and_a_truncated_one_named(write, tmp_path, monkeypatch):
    path, cache = write("jsonl"), tmp_path / "cache"
    with monkeypatch.context() as full:
        full.setattr("lm_core.data.documents._encode", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            load_documents(path, field="body", cache_dir=cache)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]
    assert _texts(load_documents(path, field="body", cache_dir=cache)) == TEXTS
    ids = next(cache.glob("*/ids.bin"))
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cache .* is damaged"):
        load_documents(path, field="body", cache_dir=cache)


def test_two_writers_of_one_cache_do_not_disturb_each_other(write, tmp_path):
    load = partial(load_documents, write("jsonl"), field="body", cache_dir=tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(load) for _ in range(4)]
    assert len({job.result().fingerprint for job in jobs}) == 1


def test_a_document_stays_on_its_side_when_others_are_added():
    names = [f"module{number}.py" for number in range(300)]
    small = split_documents(tokenise(names[:200]), 0.2, names=names[:200])
    large = split_documents(tokenise(names), 0.2, names=names)
    assert set(_texts(small.train)) <= set(_texts(large.train))
    assert set(_texts(small.validation)) <= set(_texts(large.validation))
    assert sorted(_texts(large.train) + _texts(large.validation)) == sorted(names)
    assert 40 <= len(large.validation) <= 80


def test_a_single_document_is_split_by_position_and_two_give_one_to_each_side():
    corpus = split_documents(tokenise([bytes(range(200))]), 0.1)
    assert list(corpus.train[0]) == list(range(180))
    assert list(corpus.validation[0]) == list(range(180, 200))
    assert (corpus.train.num_bytes, corpus.validation.num_bytes) == (180, 20)
    corpus = split_documents(tokenise(["a", "b"]), 0.001)
    assert (len(corpus.train), len(corpus.validation)) == (1, 1)


def test_the_fingerprint_sees_content_and_borders_but_not_storage():
    base = tokenise(["ab", "c"])
    assert base.fingerprint == tokenise([[97, 98], [99]], tokenizer=Words()).fingerprint
    assert base.fingerprint != tokenise(["a", "bc"]).fingerprint
    assert base.fingerprint != tokenise(["ab", "d"]).fingerprint
    assert base[:1].fingerprint == tokenise(["ab"]).fingerprint


def test_the_standard_library_is_real_source_without_its_tests_and_the_same_at_every_call():
    corpus = stdlib_corpus()
    texts = _texts(corpus.train) + _texts(corpus.validation)
    argparse = Path(os.__file__).with_name("argparse.py").read_text(encoding="utf-8")
    assert argparse in texts
    assert corpus.train.num_bytes > 5_000_000
    assert not any("import unittest" in text and "class TestArgparse" in text for text in texts)
    assert len(set(_texts(corpus.train)) & set(_texts(corpus.validation))) == 0
    assert 0.02 < len(corpus.validation) / len(texts) < 0.09
    assert stdlib_corpus(max_documents=20).fingerprint == stdlib_corpus(max_documents=20).fingerprint


def test_folders_of_tests_and_of_packages_are_left_out(tmp_path):
    for name in ("a.py", "b/c.py", "test/d.py", "b/tests/e.py", "site-packages/f.py", "encodings/g.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    corpus = stdlib_corpus(root=tmp_path, validation_fraction=0.5)
    assert sorted(_texts(corpus.train) + _texts(corpus.validation)) == ["a.py", "b/c.py"]


def _file(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    return path / name


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda path: load_corpus(path / "none.txt"), FileNotFoundError, "does not exist.*none.txt"),
        (lambda path: load_corpus(path), ValueError, "holds no file ending in .txt"),
        (lambda path: load_corpus(_file(path, "a.txt", b"")), ValueError, "a.txt is empty"),
        (lambda path: load_documents(_file(path, "a.txt", b""), cache_dir=path), ValueError, "a.txt is empty"),
        (lambda path: load_corpus(_file(path, "a.jsonl", b'{"a": 1}\n')), ValueError, r"'text' is missing.*\['a'\]"),
        (lambda path: load_corpus(_file(path, "a.jsonl", b"\n{oops\n")), ValueError, "line 2, is not JSON"),
        (lambda path: load_corpus(_file(path, "a.jsonl", b'{"text": 3}\n')), ValueError, "line 1,.*got int"),
        (lambda path: load_corpus(_file(path, "a.gz", b"no gzip")), ValueError, "no whole gzip file"),
        (lambda path: load_corpus(_file(path, "a.gz", gzip.compress(b"x" * 99)[:-9])), ValueError, "no whole gzip"),
        (lambda path: load_corpus(3), TypeError, "got int"),
        (lambda path: load_corpus([]), ValueError, "is empty"),
        (lambda path: load_corpus(["a"]), ValueError, "leaves 1 tokens for training and 0"),
        (lambda path: load_corpus(["a", "b"], validation_fraction=0.0), ValueError, "between 0 and 1, got 0.0"),
        (lambda path: load_corpus(["a", "b"], cache_dir=path), ValueError, "cache_dir needs a path"),
        (lambda path: tokenise([[5, -1]]), ValueError, r"in \[0, 259\), got -1 to 5"),
        (lambda path: tokenise([[259]]), ValueError, r"in \[0, 259\), got 259 to 259"),
        (lambda path: stdlib_corpus(validation_fraction=1.0), ValueError, "between 0 and 1, got 1.0"),
        (lambda path: stdlib_corpus(max_documents=1), ValueError, "at least 2.*got 1"),
        (lambda path: stdlib_corpus(max_documents="3"), TypeError, "max_documents"),
        (lambda path: stdlib_corpus(root=path), FileNotFoundError, "sources were not found"),
        (lambda path: list(read_texts(["a", 2.5])), ValueError, r"data\[1\].*got float"),
    ],
)
def test_bad_input_is_named(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_a_lone_surrogate_is_named_with_file_and_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "a \\ud800"}\n')

    class Letters:
        def encode(self, text):
            return [ord(letter) % 7 for letter in text]

    message = r"rows\.jsonl, line 2: a document holds the lone surrogate '\\ud800'"
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        with pytest.raises(ValueError, match=message):
            load_documents(file, tokenizer=Letters(), **options)
    assert load_documents(file).num_tokens == 4 + 5  # bytes hold it
