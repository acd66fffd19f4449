"""kNN-LM: its definition, its files, and what becomes of them in accidents."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lm_core import generate
from lm_core.data.documents import tokenise
from lm_core.losses.losses import token_log_probs
from lm_core.tokenizers import ByteTokenizer
from memorizing_transformer import KNNLM, Datastore, MemorizingTransformer, build_datastore
from memorizing_transformer.cli import main
from memorizing_transformer.memory import disk_storage
from memorizing_transformer.model.knn_lm import evaluate_datastore, score_documents

KILLS = int(os.environ.get("LM_FAULT_KILLS", "6"))
GENERATOR = np.random.default_rng(0)
DOCUMENTS = tokenise([GENERATOR.integers(0, 20, length).tolist() for length in (31, 1, 2, 17, 40, 9)])
READING = {"segment_length": 8, "batch_size": 3}


def build(model, folder, documents=DOCUMENTS, **settings):
    return build_datastore(model, documents, folder, **{"storage": "float32", **READING, **settings})


def naive_entries(model, documents, window=0, length=8):
    """States and next tokens, one piece after another, in plain loops."""
    keys, tokens = [], []
    for document in documents:
        ids = torch.tensor(document.astype("int64"))
        for start in range(0, len(ids), length):
            begin = max(0, start - window)
            states = model.hidden(ids[begin : start + length][None])[0, start - begin :]
            for position, state in enumerate(states, start=start):
                if position + 1 < len(ids):
                    keys.append(state)
                    tokens.append(int(ids[position + 1]))
    return torch.stack(keys).detach(), tokens


def naive_probabilities(model, ids, keys, tokens, *, k, temperature, lambda_):
    states = model.hidden(ids)[0].detach()
    p_lm = model(ids)[0].detach().softmax(-1)
    out = torch.zeros_like(p_lm)
    for position, state in enumerate(states):
        distances = [float(((key - state) ** 2).sum()) for key in keys]
        nearest = sorted(range(len(keys)), key=distances.__getitem__)[:k]
        weights = [math.exp(-(distances[entry] - distances[nearest[0]]) / temperature) for entry in nearest]
        for entry, weight in zip(nearest, weights, strict=True):
            out[position, tokens[entry]] += lambda_ * weight / sum(weights)
        out[position] += (1 - lambda_) * p_lm[position]
    return out


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("k", "temperature", "lambda_"), [(1, 1.0, 0.5), (5, 30.0, 0.25), (500, 5.0, 0.9)])
def test_it_equals_a_naive_reference(tiny_model, tmp_path, window, k, temperature, lambda_):
    model = tiny_model(memorizing_layers=(), segment_length=64)
    keys, tokens = naive_entries(model, DOCUMENTS, window)
    store = build(model, tmp_path / "store", window=window)
    assert len(store) == len(tokens) == 94
    ids = torch.randint(0, 20, (1, 12))
    settings = {"k": k, "temperature": temperature, "lambda_": lambda_}
    expected = naive_probabilities(model, ids, keys.float().double(), tokens, **settings)
    mixed = KNNLM(model, store, **settings)
    torch.testing.assert_close(mixed(ids)[0].exp(), expected, atol=1e-6, rtol=0)
    assert torch.equal(mixed(ids)[0].exp().sum(-1).round(decimals=6), torch.ones(12, dtype=torch.float64))
    store.close()


def test_a_weight_of_zero_is_the_model_and_generation_equals_scores(tiny_model, tmp_path):
    model = tiny_model(memorizing_layers=(), segment_length=64)
    with_store = KNNLM(model, build(model, tmp_path / "store"), k=4, temperature=20.0, lambda_=0.4)
    without = KNNLM(model, tmp_path / "store", lambda_=0.0)
    ids = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(without(ids), model(ids).log_softmax(-1), atol=1e-12, rtol=0)
    for use_cache in (True, False):
        result = generate(with_store, ids, max_new_tokens=7, temperature=0.0, use_cache=use_cache)
        scores = token_log_probs(with_store, torch.cat((ids, result.tokens), dim=1))
        torch.testing.assert_close(scores[:, 8:].float(), result.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("storage", "error"), [("bfloat16", 0.01), ("int8", 0.01)])
def test_narrow_formats_find_nearly_the_same(tiny_model, tmp_path, storage, error):
    model = tiny_model(memorizing_layers=(), segment_length=64)
    exact = build(model, tmp_path / "exact")
    narrow = build(model, tmp_path / "narrow", storage=storage)
    queries = torch.stack([model.hidden(torch.randint(0, 20, (1, 6)))[0, -1] for _ in range(10)]).float()
    a, b = exact.search(queries, 1).distances, narrow.search(queries, 1).distances
    torch.testing.assert_close(a, b, atol=0, rtol=10 * error)
    assert narrow.nbytes < 0.6 * exact.nbytes


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
@pytest.mark.parametrize("index", ["Flat", "IVF2,Flat", "HNSW8"])
def test_an_index_of_faiss_finds_the_nearest(tiny_model, tmp_path, index):
    pytest.importorskip("faiss")
    model = tiny_model(memorizing_layers=(), segment_length=64)
    exact = build(model, tmp_path / "store")
    indexed = Datastore(tmp_path / "store", index=index, nprobe=2)
    queries = torch.randn(20, exact.dim)
    # equal states have equal distances, in any order
    a, b = exact.search(queries, 3).distances, indexed.search(queries, 3).distances
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_entry_knows_its_place(tiny_model, tmp_path):
    model = tiny_model(memorizing_layers=(), segment_length=64)
    store = build(model, tmp_path / "store")
    places = [(number, at) for number, document in enumerate(DOCUMENTS) for at in range(len(document) - 1)]
    assert [store.place(entry) for entry in range(len(store))] == places
    key = model.hidden(torch.tensor(DOCUMENTS[3][:5].astype("int64"))[None])[0, 4:].detach()
    found = store.search(key, 1)
    assert store.place(int(found.entries)) == (3, 4)
    assert int(found.tokens) == int(DOCUMENTS[3][5])


def test_evaluation_equals_the_model_s_own_scores_and_chooses_on_other_documents(tiny_model, tmp_path):
    model = tiny_model(memorizing_layers=(), segment_length=64)
    store = build(model, tmp_path / "store")
    mixed = KNNLM(model, store, k=4, temperature=20.0, lambda_=0.3)
    reading = {"segment_length": 64, "k": 4}
    result = evaluate_datastore(model, store, DOCUMENTS, lambda_=0.3, temperature=20.0, **reading)
    rows = [torch.tensor(document.astype("int64"))[None] for document in DOCUMENTS if len(document) > 1]
    for value, one in ((result.without, model), (result.with_datastore, mixed)):
        nats = -sum(token_log_probs(one, ids).sum().item() for ids in rows)
        assert value == pytest.approx(nats / 94 / math.log(2), abs=1e-6)  # a token counts as a byte here
    chosen = evaluate_datastore(model, store, DOCUMENTS, **reading)
    scores = score_documents(model, store, DOCUMENTS[1::2], **reading)
    assert (chosen.lambda_, chosen.temperature) == scores.tuned()
    assert chosen.tokens == sum(len(document) - 1 for document in DOCUMENTS[::2])


# ------------------------------------------------------------------------------------------------------------ accidents

BUILDER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_knn_lm as t
print("ready", flush=True)
model = t.builder_model()
t.build(model, sys.argv[2], t.MANY, storage=sys.argv[3])
print("done", flush=True)
"""
MANY = tokenise([GENERATOR.integers(0, 20, length).tolist() for length in range(30, 130)])


def builder_model():
    torch.manual_seed(0)
    sizes = {"num_tokens": 20, "dim": 16, "depth": 1, "dim_head": 8, "heads": 2}
    return MemorizingTransformer(**sizes, memorizing_layers=())


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is for POSIX")
def test_a_killed_build_is_continued_and_ends_as_one_that_was_not_killed(tmp_path):
    whole = build(builder_model(), tmp_path / "whole", MANY, storage="int8")
    folder = tmp_path / "killed"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", BUILDER, here, str(folder), "int8"]
    delays = np.random.default_rng(1).uniform(0.0, 0.6, KILLS)
    for delay in delays:
        builder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environ)
        assert builder.stdout.readline() == b"ready\n"
        time.sleep(delay)
        builder.send_signal(signal.SIGKILL)
        builder.wait()
        builder.stdout.close()
    killed = build(builder_model(), folder, MANY, storage="int8")
    assert len(killed) == len(whole) == sum(range(29, 129))
    for name in ("data.bin", "scales.bin", "checksums.bin"):
        assert (folder / "keys" / name).read_bytes() == (tmp_path / "whole" / "keys" / name).read_bytes()
    assert not list(folder.glob(".tmp-*"))


def test_what_is_not_complete_is_refused_and_built_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "data.bin")

    model = builder_model()
    allocate, calls = disk_storage._allocate_blocks, []

    def sometimes(*arguments):
        calls.append(arguments)
        return full() if len(calls) > 3 else allocate(*arguments)

    monkeypatch.setattr(disk_storage, "_allocate_blocks", sometimes)
    with pytest.raises(OSError, match="No space left"):
        build(model, tmp_path / "store", MANY, storage="int8")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"of 7,850 entries: build it on"):
        Datastore(tmp_path / "store")
    assert len(build(model, tmp_path / "store", MANY, storage="int8")) == 7850


FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[1])
import test_knn_lm as t
try:
    t.build(t.builder_model(), sys.argv[2] + "/store", t.MANY)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk in a namespace")
def test_a_full_disk_is_an_error(tmp_path):
    mount = f'mount -t tmpfs -o size=400k none {tmp_path} && exec "$@"'
    run = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if subprocess.run([*run, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine mounts no file system in a namespace")
    command = [*run, sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == errno.ENOSPC


HOLDER = """
import sys, time
from memorizing_transformer.memory.datastore import DatastoreWriter
sys.path.insert(0, sys.argv[1])
import test_knn_lm as t
with DatastoreWriter(sys.argv[2], t.MANY, {"dim": 17, "storage": "int8"}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_builder_in_the_folder_is_refused(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent), str(tmp_path / "store")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match="another process is building a datastore in"):
            build(builder_model(), tmp_path / "store", MANY, storage="int8")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_damaged_files_are_found(tmp_path):
    build(builder_model(), tmp_path / "store").close()
    keys, corpus = tmp_path / "store" / "keys" / "data.bin", tmp_path / "store" / "corpus.safetensors"
    flip(keys, 100)
    with pytest.raises(ValueError, match="damaged: 1 of 94 tokens"):
        Datastore(tmp_path / "store").search(torch.zeros(1, 17), 1)
    flip(keys, 100)
    flip(corpus, corpus.stat().st_size - 3)
    with pytest.raises(ValueError, match=r"corpus\.safetensors"):
        Datastore(tmp_path / "store")


def other_model(**changes):
    torch.manual_seed(1)
    sizes = {"num_tokens": 20, "dim": 16, "depth": 1, "dim_head": 8, "heads": 2}
    return MemorizingTransformer(**{**sizes, **changes}, memorizing_layers=())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knn") / "store"
    build(builder_model(), folder).close()
    return folder


BAD = {
    "no folder": (lambda f, t: Datastore(t / "none"), FileNotFoundError, "folder of build_datastore"),
    "another folder": (lambda f, t: Datastore(t), FileNotFoundError, "datastore must be"),
    "nprobe": (lambda f, t: Datastore(f, nprobe=0), ValueError, "nprobe must be at least 1, got 0"),
    "index": (lambda f, t: Datastore(f, index="Tree"), ValueError, "factory string"),
    "clusters": (lambda f, t: Datastore(f, index="IVF64,Flat"), ValueError, "needs 2,496 entries"),
    "k": (lambda f, t: KNNLM(builder_model(), f, k=0), ValueError, "k must be at least 1, got 0"),
    "temperature": (lambda f, t: KNNLM(builder_model(), f, temperature=0.0), ValueError, "temperature"),
    "weight": (lambda f, t: KNNLM(builder_model(), f, lambda_=1.0), ValueError, r"lambda_ must be in \[0, 1\), got 1"),
    "another model": (lambda f, t: KNNLM(other_model(), f), ValueError, "made with another model"),
    "no states": (lambda f, t: KNNLM(torch.nn.Embedding(20, 20), f), ValueError, "Embedding has not"),
    "query": (lambda f, t: Datastore(f).search(torch.zeros(1, 4), 1), ValueError, r"shape \(q, 17\), got \(1, 4\)"),
    "neighbours": (lambda f, t: Datastore(f).search(torch.zeros(1, 17), 0), ValueError, "k must be"),
    "segment": (lambda f, t: build(builder_model(), t / "n", segment_length=0), ValueError, "segment_length"),
    "window": (
        lambda f, t: build(builder_model(), t / "n", window=-1),
        ValueError,
        "window must be at least 0, got -1",
    ),
    "batch": (lambda f, t: build(builder_model(), t / "n", batch_size=0), ValueError, "batch_size"),
    "storage": (lambda f, t: build(builder_model(), t / "n", storage="int4"), TypeError, "storage"),
    "short documents": (lambda f, t: build(builder_model(), t / "n", tokenise([[1], [2]])), ValueError, "two tokens"),
    "ids": (lambda f, t: build(builder_model(), t / "n", tokenise([[1, 20]])), ValueError, r"\[0, 20\), got 20"),
    "other content": (
        lambda f, t: ((t / "x").write_text("x"), build(builder_model(), t)),
        ValueError,
        r"has \['x'\]",
    ),
    "other documents": (lambda f, t: build(builder_model(), f, MANY), ValueError, "has another datastore: corpus is"),
    "other settings": (lambda f, t: build(builder_model(), f, window=2), ValueError, "window is 2, but was 0"),
    "other weights": (lambda f, t: build(other_model(), f), ValueError, "has another datastore: model is"),
    "other tokenizer": (
        lambda f, t: build(builder_model(), f, tokenizer=ByteTokenizer()),
        ValueError,
        "another datastore: tokenizer is",
    ),
    "one document": (
        lambda f, t: evaluate_datastore(builder_model(), Datastore(f), DOCUMENTS[:1]),
        ValueError,
        "at least 2 to choose",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(store, tmp_path, case):
    call, error, message = BAD[case]
    if case in ("index", "clusters"):
        pytest.importorskip("faiss")
    with pytest.raises(error, match=message):
        call(store, tmp_path)
    assert len(Datastore(store)) == 94


def test_the_commands_build_and_evaluate(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"num_tokens": 259, "dim": 16, "depth": 1, "dim_head": 8, "heads": 2}
    MemorizingTransformer(**sizes, memorizing_layers=()).save_pretrained(tmp_path / "model", tokenizer=ByteTokenizer())
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number}: " + "the same words again " * 9)
    model, folder, texts = str(tmp_path / "model"), str(tmp_path / "store"), str(tmp_path / "texts")
    shape = ["--segment_length", "64", "--device", "cpu"]
    assert main(["datastore", model, folder, "--data", texts, *shape]) == 0
    # 4 texts of 201 bytes, whose first bytes have no context
    assert "800 entries of 17 features" in capsys.readouterr().out.replace(",", "")
    assert main(["eval", model, "--data", texts, "--datastore", folder, *shape, "--knn_neighbours", "8"]) == 0
    out = capsys.readouterr().out
    assert "bits/byte without the datastore" in out
    assert "(chosen on other documents)" in out
    page = tmp_path / "page.html"
    inspect = ["inspect", model, "--datastore", folder, "--prompt", "document 1", "--page", str(page)]
    assert main([*inspect, "--max_new_tokens", "4", "--device", "cpu"]) == 0
    content = page.read_text(encoding="utf-8")
    links = {match.split("'")[0] for match in content.split("href='#")[1:]}
    assert links
    assert all(f" id={link}>" in content for link in links)
    assert "prefers-color-scheme: dark" in content
    assert main(["inspect", model, "--datastore", folder]) == 1
    assert "prompt must be a text" in capsys.readouterr().err
    assert main(["eval", model, "--data", texts, "--datastore", model]) == 1
    assert "folder of build_datastore" in capsys.readouterr().err
