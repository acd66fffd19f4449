"""Bad input: each case names its argument, and what was refused changed nothing."""

import pytest
import torch

from lm_core.data.documents import tokenise
from memorizing_transformer import (
    KNNAttention,
    KNNMemory,
    KNNMemoryList,
    MemorizingTransformer,
    XLMemories,
    open_gates,
    retrofit,
)
from memorizing_transformer.memory.directory import MemoryDirectory
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.documents import DocumentSegments, DocumentStreams
from memorizing_transformer.training.evaluation import evaluate

pytestmark = pytest.mark.plain

SIZES = {"num_tokens": 20, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2}


def model(**settings):
    return MemorizingTransformer(**{**SIZES, **settings})


def windowed(**settings):
    return model(xl_max_memories=4, **settings)


def ids(b=2, n=4):
    return torch.zeros(b, n, dtype=torch.long)


def memories(rows, **settings):
    return model().create_knn_memories(batch_size=rows, **settings)


def cache(rows):
    return model().init_cache(rows, 9)


def window(*shape):
    return XLMemories([torch.zeros(shape)] * 2)


def memory(**settings):
    return KNNMemory(**{"dim": 4, "max_memories": 8, "num_indices": 2, **settings})


def loaded(**settings):
    return memory().load_state_dict(memory(**settings).state_dict())


def documents():
    return tokenise(["one", "two"])


def reading(kind, segment_length, batch_size):
    return kind(documents=documents(), segment_length=segment_length, batch_size=batch_size, eos_id=0)


def scores(**settings):
    return evaluate(model(), documents(), eos_id=19, segment_length=4, batch_size=1, **settings)


CASES = {
    "zero dim": (lambda: model(dim=0), ValueError, "dim must"),
    "zero depth": (lambda: model(depth=0), ValueError, "depth must"),
    "zero heads": (lambda: model(heads=0), ValueError, "heads must"),
    "zero tokens": (lambda: model(num_tokens=0), ValueError, "num_tokens must"),
    "zero knn heads": (lambda: model(knn_attn_heads=0), ValueError, "knn_attn_heads must"),
    "dim as text": (lambda: model(dim="16"), TypeError, "dim"),
    "dropout of one": (lambda: model(attn_dropout=1.0), ValueError, "attn_dropout must"),
    "negative dropout": (lambda: model(ff_dropout=-0.1), ValueError, "ff_dropout must"),
    "layer out of range": (lambda: model(memorizing_layers=3), ValueError, "memorizing_layers must be in 1 to 2"),
    "layer zero": (lambda: model(memorizing_layers=[0]), ValueError, "memorizing_layers must"),
    "layer twice": (lambda: model(memorizing_layers=[1, 1]), ValueError, "memorizing_layers must be different"),
    "xl layer out of range": (lambda: windowed(xl_memory_layers=9), ValueError, "xl_memory_layers must"),
    "negative window": (lambda: model(xl_max_memories=-1), ValueError, "xl_max_memories must"),
    "half a shift": (lambda: model(shift_knn_memories_down=0.5), ValueError, "shift_knn_memories_down must"),
    "negative shift": (lambda: model(shift_xl_memories_down=-1), ValueError, "shift_xl_memories_down must"),
    "sos out of range": (lambda: model(clear_memories_on_sos_token_id=20), ValueError, "sos_token_id must"),
    "pad out of range": (lambda: model(pad_id=-1), ValueError, "pad_id must"),
    "unknown gate": (lambda: model(gate="tanh"), TypeError, "gate"),
    "unknown backend": (lambda: model(knn_backend="annoy"), TypeError, "knn_backend"),
    "unknown storage": (lambda: model(knn_storage="int4"), TypeError, "knn_storage"),
    "no memories": (lambda: model(max_knn_memories=0), ValueError, "max_knn_memories must"),
    "no neighbours": (lambda: model(num_retrieved_memories=0), ValueError, "num_retrieved_memories must"),
    "empty segment": (lambda: model(segment_length=0), ValueError, "segment_length must"),
    "id out of range": (lambda: model()(ids() + 20), ValueError, r"x must hold token ids in \[0, 20\)"),
    "negative id": (lambda: model()(ids() - 1), ValueError, "x must hold token ids"),
    "float ids": (lambda: model()(torch.zeros(2, 4)), TypeError, "x must hold integer"),
    "ids of one dimension": (lambda: model()(torch.zeros(4, dtype=torch.long)), ValueError, "x must have shape"),
    "no tokens": (lambda: model()(ids(2, 0)), ValueError, "x must have shape"),
    "mask of floats": (lambda: model()(ids(), mask=torch.ones(2, 4)), TypeError, "mask must be boolean"),
    "mask of another shape": (lambda: model()(ids(), mask=ids(2, 5) == 0), ValueError, "mask must have shape"),
    "labels of another shape": (lambda: model()(ids(), labels=ids(2, 5)), ValueError, "labels must have the shape"),
    "label out of range": (lambda: model()(ids(), labels=ids() + 20), ValueError, "labels must hold token ids"),
    "float labels": (lambda: model()(ids(), labels=torch.zeros(2, 4)), TypeError, "labels must hold integer"),
    "memories of another batch": (lambda: model()(ids(), memories(3)), ValueError, "3 rows in scope"),
    "too few memories": (lambda: model()(ids(), knn_memories=KNNMemoryList()), ValueError, "must have 1 memories"),
    "memories of another dim": (lambda: model()(ids(), KNNMemoryList([memory()])), ValueError, "must have dim 8"),
    "too few windows": (lambda: windowed(depth=3)(ids(), None, window(2, 4, 2, 8)), ValueError, "must have one entry"),
    "windows of another shape": (lambda: windowed()(ids(), None, window(2, 4, 2, 7)), ValueError, r"\[0\] must have"),
    "cache of another batch": (lambda: model()(ids(), cache=cache(3)), ValueError, "cache holds 3 rows"),
    "cache and windows": (lambda: windowed()(ids(), None, [], cache=cache(2)), ValueError, "xl_memories must be None"),
    "cache of no rows": (lambda: cache(0), ValueError, "batch_size must"),
    "name without a folder": (lambda: memories(1, name="mine"), ValueError, "knn_memories_directory"),
    "memories of no rows": (lambda: memories(0), ValueError, "batch_size must"),
    "rows given twice": (lambda: memories(2, num_indices=7), TypeError, "num_indices"),
    "a folder for all layers": (lambda: memories(2, memmap_filename=None), TypeError, "memmap_filename"),
    "gates opened whole": (lambda: open_gates(model(gate="sigmoid"), part=1.0), ValueError, r"part must .* got 1\.0"),
    "retrofit of a memorizing model": (lambda: retrofit(model()), ValueError, "no memorizing layers"),
    "retrofit without a layer": (
        lambda: retrofit(model(memorizing_layers=()), depth=1),
        ValueError,
        "keep the model's",
    ),
    "temperature of zero": (lambda: KNNAttention(dim=8, attn_scale_init=0.0), ValueError, "attn_scale_init must"),
    "memory of no features": (lambda: memory(dim=0), ValueError, "dim must"),
    "memory of no rows": (lambda: memory(num_indices=0), ValueError, "num_indices must"),
    "unknown index": (lambda: memory(backend="faiss", index="Nonsense"), ValueError, "index must be a factory string"),
    "index to train": (lambda: memory(backend="faiss", index="HNSW16,SQ8"), ValueError, "index must .* 'HNSW16,SQ8'"),
    "added shape": (lambda: memory().add(torch.zeros(2, 3, 4)), ValueError, "memories must have shape"),
    "added batch": (lambda: memory().add(torch.zeros(3, 3, 2, 4)), ValueError, "memories must have shape"),
    "added integers": (lambda: memory().add(ids().view(2, 1, 2, 2)), TypeError, "memories must be floating"),
    "added NaN": (lambda: memory().add(torch.full((2, 1, 2, 4), torch.nan)), ValueError, "memories must be finite"),
    "added mask": (lambda: memory().add(torch.zeros(2, 3, 2, 4), mask=ids(2, 2) == 0), ValueError, "mask must have sh"),
    "query shape": (lambda: memory().search(torch.zeros(2, 3, 5), 1), ValueError, "queries must have shape"),
    "no neighbour": (lambda: memory().search(torch.zeros(2, 3, 4), 0), ValueError, "topk must"),
    "scope twice": (lambda: memory().set_scoped_indices([0, 0]), ValueError, "different from each other"),
    "scope out of range": (lambda: memory().set_scoped_indices([2]), ValueError, r"must be in \[0, 2\)"),
    "clear out of range": (lambda: memory().clear([-1]), ValueError, r"must be in \[0, 2\)"),
    "state of another shape": (lambda: loaded(max_memories=9), ValueError, "capacity = 9, not 8"),
    "state of another format": (lambda: loaded(storage="int8"), ValueError, "storage"),
    "memory index": (lambda: KNNMemoryList([memory()]).clear_memory(memory_indices=[1]), ValueError, "memory_indices"),
    "too few documents": (lambda: reading(DocumentStreams, 4, 3), ValueError, "a document for each of 3 rows"),
    "segment of nothing": (lambda: reading(DocumentSegments, 0, 1), ValueError, "segment_length must"),
    "ranges in disorder": (lambda: scores(ranges=(0, 8, 4)), ValueError, "ranges must ascend from 0"),
    "another end of documents": (lambda: scores(), ValueError, "clear_memories_on_eos_token_id = 19"),
    "no steps": (lambda: TrainingSettings(max_steps=0), ValueError, "max_steps must"),
    "endless learning rate": (lambda: TrainingSettings(learning_rate=float("inf")), ValueError, "learning_rate must"),
}


@pytest.mark.parametrize(("call", "kind", "message"), CASES.values(), ids=CASES)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("name", ["", "a/b", "..", "scratch-x"])
def test_a_folder_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name must be a plain folder name"):
        MemoryDirectory(tmp_path, name)


def test_a_folder_with_another_memory_is_refused_and_kept(tmp_path):
    first = memory(memmap_filename=tmp_path / "memory")
    first.add(torch.ones(2, 3, 2, 4))
    first.close()
    with pytest.raises(ValueError, match="capacity = 8, not 9"):
        memory(memmap_filename=tmp_path / "memory", max_memories=9)
    again = memory(memmap_filename=tmp_path / "memory")
    assert again.sizes == [3, 3]
    again.close()


def test_a_memory_that_refused_is_as_it_was():
    one = memory()
    one.add(torch.ones(2, 3, 2, 4))
    for wrong in (torch.full((2, 1, 2, 4), torch.inf), torch.zeros(1, 1, 2, 4)):
        with pytest.raises(ValueError, match="memories must"):
            one.add(wrong)
    with pytest.raises(ValueError, match="capacity"):
        one.load_state_dict(memory(max_memories=9).state_dict())
    assert one.sizes == [3, 3]


def test_a_file_that_is_no_memory_is_refused(tmp_path):
    (tmp_path / "memory.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged"):
        memory().load(tmp_path / "memory.pt")
    with pytest.raises(FileNotFoundError):
        memory().load(tmp_path / "none.pt")
