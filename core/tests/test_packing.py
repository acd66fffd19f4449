"""Packing: no token lost or doubled, the same rows for every number of ranks, resumable at any step."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.data.documents import tokenise
from lm_core.data.packing import PackedBatches, ValidationBatches, bits_per_byte

EOS, PAD, BOS = 257, 258, 256
GOOD = {"sequence_length": 8, "batch_size": 1, "eos_id": EOS, "pad_id": PAD}


def _documents(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return tokenise([torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths])


def _naive_rows(documents, length, bos_id):
    """Reference, token by token: inputs, labels and document of each row."""
    stream = []
    for number, document in enumerate(documents):
        begin = [] if bos_id is None else [bos_id]
        stream += [(token, number) for token in begin + [int(token) for token in document] + [EOS]]
    rows = []
    for first in range(0, len(stream) - 1, length):
        ids, labels, owners = [], [], []
        for at in range(first, first + length):
            token, owner = stream[at] if at < len(stream) else (PAD, None)
            following, next_owner = stream[at + 1] if at + 1 < len(stream) else (PAD, None)
            ids.append(token)
            labels.append(following if owner is not None and owner == next_owner else -100)
            owners.append(owner)
        names = {owner: place for place, owner in enumerate(dict.fromkeys(o for o in owners if o is not None))}
        rows.append((ids, labels, [names.get(owner, -1) for owner in owners]))
    return rows


def _rows(batches):
    return [
        (ids.tolist(), labels.tolist(), owners.tolist())
        for batch in batches
        for ids, labels, owners in zip(batch.ids, batch.labels, batch.document_ids, strict=True)
    ]


@given(count=st.integers(1, 9), seed=st.integers(0, 99), length=st.integers(1, 50), bos=st.sampled_from([None, BOS]))
def test_rows_equal_their_definition_token_by_token(count, seed, length, bos):
    documents = _documents(count, seed)
    if documents.num_tokens < 2:
        return
    expected = _naive_rows(documents, length, bos)
    validation = ValidationBatches(
        documents=documents, sequence_length=length, batch_size=3, eos_id=EOS, pad_id=PAD, bos_id=bos
    )
    found = _rows(validation)
    assert found[: len(expected)] == expected
    assert all(labels == [-100] * length for _, labels, _ in found[len(expected) :])
    assert len(found) < len(expected) + 3


def test_an_epoch_has_every_token_of_every_document_as_a_label_once():
    documents = _documents(9)
    batches = PackedBatches(documents=documents, sequence_length=11, batch_size=1, eos_id=EOS, pad_id=PAD, seed=3)
    labels = [batch.labels for batch in itertools.islice(batches, batches.rows_per_epoch)]
    found = sorted(int(value) for row in labels for value in row.flatten() if value != -100)
    expected = sorted(int(token) for document in documents for token in [*document[1:], EOS])
    assert found == expected


def test_without_shuffling_training_rows_are_the_validation_rows():
    documents = _documents()
    training = PackedBatches(documents=documents, **GOOD, shuffle=False)
    expected = _rows(ValidationBatches(documents=documents, **GOOD))
    assert _rows(itertools.islice(training, training.rows_per_epoch)) == expected


def test_epochs_and_seeds_differ_and_repeat():
    def rows(seed, epoch):
        batches = PackedBatches(documents=_documents(), **GOOD, seed=seed)
        count = batches.rows_per_epoch
        return _rows(itertools.islice(batches, epoch * count, (epoch + 1) * count))

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(1, 0)
    assert rows(0, 0) != rows(0, 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_together_what_one_process_sees_in_the_same_step(world_size):
    shared = {"documents": _documents(), **GOOD, "seed": 5}
    alone = PackedBatches(**shared | {"batch_size": 2 * world_size})
    shares = [{"batch_size": 2, "rank": rank, "world_size": world_size} for rank in range(world_size)]
    ranks = [PackedBatches(**shared | share) for share in shares]
    for _ in range(20):
        assert _rows([next(alone)]) == _rows([next(rank) for rank in ranks])
    assert {rank.rows_seen for rank in ranks} == {alone.rows_seen}


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_validate_all_rows_once_with_equally_many_batches(world_size):
    shared = {"documents": _documents(), **GOOD}
    expected = _rows(ValidationBatches(**shared))
    shares = [{"batch_size": 3, "rank": rank, "world_size": world_size} for rank in range(world_size)]
    ranks = [ValidationBatches(**shared | share) for share in shares]
    assert len({len(rank) for rank in ranks}) == 1
    steps = zip(*[list(rank) for rank in ranks], strict=True)
    found = _rows([batch for step in steps for batch in step])
    assert found[: len(expected)] == expected
    assert all(set(labels) == {-100} for _, labels, _ in found[len(expected) :])
    assert all(batch.ids.shape == (3, 8) for rank in ranks for batch in rank)


@settings(max_examples=30)
@given(stop=st.integers(0, 60), batch_size=st.integers(1, 7))
def test_a_resumed_cursor_gives_the_rows_of_the_uninterrupted_run(stop, batch_size):
    whole, resumed = (PackedBatches(documents=_documents(), **GOOD | {"batch_size": batch_size}) for _ in "ab")
    for _ in range(stop):
        next(whole)
    resumed.load_state_dict(whole.state_dict())
    assert all(type(value) is int for value in whole.state_dict().values())
    assert _rows([next(resumed) for _ in range(3)]) == _rows([next(whole) for _ in range(3)])
    assert resumed.epoch == whole.epoch


def test_limited_validation_takes_rows_from_all_over_and_repeats_exactly():
    documents = _documents(40)
    all_rows = _rows(ValidationBatches(documents=documents, **GOOD))
    limited = ValidationBatches(documents=documents, **GOOD, max_tokens=10 * 8)
    places = [all_rows.index(row) for row in _rows(limited)]
    assert len(places) == 10
    assert places == sorted(places)
    assert places[-1] > 0.8 * len(all_rows)
    assert _rows(limited) == _rows(limited)


def test_labels_are_counted_without_the_ignored_ones():
    (batch,) = ValidationBatches(documents=tokenise(["abc", "de"]), sequence_length=9, batch_size=2, eos_id=EOS)
    assert batch.num_labels == 3 + 2
    assert batch.to("cpu").ids.tolist() == batch.ids.tolist()


def test_bits_per_byte_of_a_uniform_byte_model_is_eight_and_counts_bytes_not_wider_tokens():
    class Pairs:
        vocab_size = 10

        def encode(self, text):
            return [1] * (len(text) // 2)

    assert bits_per_byte(10 * math.log(256), 10, tokenise(["some text", "more"])) == pytest.approx(8.0)
    assert bits_per_byte(4 * math.log(2), 4, tokenise(["abcdefgh"], tokenizer=Pairs())) == pytest.approx(0.5)


@pytest.mark.plain
@pytest.mark.parametrize("kind", [PackedBatches, ValidationBatches])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sequence_length": 0}, ValueError, "sequence_length must be at least 1, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        ({"rank": 2, "world_size": 2}, ValueError, r"rank must be in \[0, 2\), got 2"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"documents": tokenise(["a"])}, ValueError, "at least two tokens, got 1"),
        ({"documents": "text"}, TypeError, "documents"),
        ({"sequence_length": 8.5}, TypeError, "sequence_length"),
    ],
)
def test_bad_input_is_named(kind, change, error, message):
    with pytest.raises(error, match=message):
        kind(**{"documents": _documents(), **GOOD, **change})


@pytest.mark.plain
def test_a_cursor_of_other_data_seed_or_length_is_refused_and_changes_nothing():
    batches = PackedBatches(documents=_documents(), **GOOD)
    others = {
        "the documents differ": PackedBatches(documents=_documents(seed=1), **GOOD),
        "seed is 0, but was 4": PackedBatches(documents=_documents(), **GOOD, seed=4),
        "sequence_length is 8, but was 9": PackedBatches(documents=_documents(), **{**GOOD, "sequence_length": 9}),
    }
    for message, other in others.items():
        state = {**other.state_dict(), "rows_seen": 12}
        if "documents" in message:
            state["rows_per_epoch"] = batches.rows_per_epoch
        with pytest.raises(ValueError, match=message):
            batches.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state must have the keys .* got \['rows'\]"):
        batches.load_state_dict({"rows": 3})
    assert batches.rows_seen == 0


@pytest.mark.plain
def test_no_labels_and_bad_limits_are_named():
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        bits_per_byte(1.0, 0, _documents())
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        ValidationBatches(documents=_documents(), **GOOD, max_tokens=0)
