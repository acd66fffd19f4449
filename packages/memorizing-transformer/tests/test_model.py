"""The model against dense attention, its boundaries, windows and gates."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memorizing_transformer import MemorizingTransformer, XLMemories, retrofit
from memorizing_transformer.memory.exact_search import CPU_CHUNK
from memorizing_transformer.model.attention import RelativePositionBias
from memorizing_transformer.model.segment import Past, view_of


def test_two_segments_with_an_xl_window_are_one_pass_under_a_band(tiny_model, read_in_segments):
    model = tiny_model(xl_max_memories=8, memorizing_layers=())
    ids = torch.randint(0, 20, (2, 16))
    in_segments, _ = read_in_segments(model, ids, None)
    torch.testing.assert_close(in_segments, model(ids)[0], atol=1e-12, rtol=0)


def test_segments_longer_than_the_window_see_a_band(tiny_model, read_in_segments):
    model = tiny_model(xl_max_memories=5, memorizing_layers=(), depth=1)
    ids = torch.randint(0, 20, (1, 16))
    logits, _ = read_in_segments(model, ids, None)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 20  # left the window of the second segment
    other, _ = read_in_segments(model, changed, None)
    assert torch.equal(logits[:, 8:], other[:, 8:])
    changed[:, 3] = (changed[:, 3] + 1) % 20  # the oldest that stays
    other, _ = read_in_segments(model, changed, None)
    assert bool((logits[:, 8:] != other[:, 8:]).any(dim=-1).all())


def test_distance_zero_is_the_query_itself_with_keys_before_it():
    bias = RelativePositionBias(heads=2, scale=1.0)
    x, past = torch.zeros(1, 3, dtype=torch.long), Past([torch.zeros(1, 1, 4, 2, 8)])
    distances = view_of(x, past, mask=None, documents=None).distances[0]
    assert distances.diagonal(4).tolist() == [0, 0, 0]
    assert bias.bucket(distances)[0].tolist() == [4, 3, 2, 1, 0, 0, 0]


def test_buckets_are_those_of_t5():
    bias = RelativePositionBias(heads=1, scale=1.0)
    # distance < 16 one bucket each; then 16 + floor(log(d / 16) / log(8) * 16), at most 31
    expected = [d if d < 16 else min(31, 16 + int(math.log(d / 16) / math.log(8) * 16)) for d in range(300)]
    assert bias.bucket(torch.arange(300)).tolist() == expected


def test_heads_of_plain_layers_begin_by_looking_back_each_at_another_distance():
    model = MemorizingTransformer(num_tokens=20, dim=16, depth=2, dim_head=64, heads=4)
    distances = torch.arange(100).view(1, 100)
    assert model.layers.position_bias(distances).argmax(dim=-1).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_memory_changes_nothing_before_something_left_the_window(tiny_model, gate):
    model = tiny_model(xl_max_memories=8, gate=gate)
    ids = torch.randint(0, 20, (2, 8))
    memories = model.create_knn_memories(batch_size=2)
    first, window = model(ids, knn_memories=memories)
    assert memories.sizes == [[0, 0]]
    second, _ = model(ids, knn_memories=memories, xl_memories=window)
    assert memories.sizes == [[8, 8]]

    plain, window = model(ids)
    assert torch.equal(first, plain)
    assert torch.equal(second, model(ids, xl_memories=window)[0])


def test_a_segment_does_not_find_itself(tiny_model):
    model, ids = tiny_model(), torch.randint(0, 20, (2, 8))
    memories = model.create_knn_memories(batch_size=2)
    assert torch.equal(model(ids, knn_memories=memories), model(ids))
    assert memories.sizes == [[8, 8]]


@pytest.mark.parametrize("boundary", ["sos", "eos"])
@pytest.mark.parametrize("window", [0, 5])
def test_tokens_after_a_boundary_see_nothing_of_before_it(tiny_model, read_in_segments, boundary, window):
    model = tiny_model(**{f"clear_memories_on_{boundary}_token_id": 19}, xl_max_memories=window)
    torch.manual_seed(1)
    old, new = torch.randint(0, 19, (1, 13)), torch.randint(0, 19, (1, 14))
    mark = torch.tensor([[19]])
    memories = model.create_knn_memories(batch_size=1)
    logits, _ = read_in_segments(model, torch.cat((old, mark, new), dim=1), memories)
    start = 13 if boundary == "sos" else 14
    alone = torch.cat((mark, new), dim=1) if boundary == "sos" else new
    # the same segment ends: a first segment as long as what is left of the boundary's segment
    first = 16 - start
    memories_alone = model.create_knn_memories(batch_size=1)
    out = model(alone[:, :first], knn_memories=memories_alone)
    out, xl = out if window else (out, None)
    rest, _ = read_in_segments(model, alone[:, first:], memories_alone, xl=xl)

    torch.testing.assert_close(logits[:, start:], torch.cat((out, rest), dim=1), atol=1e-12, rtol=0)
    assert memories.sizes == memories_alone.sizes


def test_only_flagged_rows_are_emptied(tiny_model):
    model = tiny_model(clear_memories_on_eos_token_id=19, xl_max_memories=4)
    ids = torch.randint(0, 19, (2, 16))
    memories = model.create_knn_memories(batch_size=2)
    _, window = model(ids[:, :8], knn_memories=memories)
    flagged = ids[:, 8:].clone()
    flagged[0, 2] = 19
    _, new = model(flagged, knn_memories=memories, xl_memories=window)

    assert memories.sizes == [[1, 12]]
    assert new.mask.tolist() == [[True] * 4, [True] * 4]
    plain = tiny_model(xl_max_memories=4)
    both = plain.create_knn_memories(batch_size=2)
    _, window = plain(ids[:, :8], knn_memories=both)
    plain(ids[:, 8:], knn_memories=both, xl_memories=window)
    assert torch.equal(memories[0].state_dict()["kv"][1], both[0].state_dict()["kv"][1])


def test_padding_is_neither_seen_nor_stored(tiny_model, read_in_segments):
    model = tiny_model(xl_max_memories=5)
    ids = torch.randint(0, 20, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, [1, 2, 9, 17]] = False
    memories, window, logits = model.create_knn_memories(batch_size=2), None, []
    for segment, part in zip(ids.split(10, 1), mask.split(10, 1), strict=True):
        out, window = model(segment, knn_memories=memories, xl_memories=window, mask=part)
        logits.append(out)
    alone, window, expected = model.create_knn_memories(batch_size=1), None, []
    for segment, part in zip(ids[:1].split(10, 1), mask[:1].split(10, 1), strict=True):
        out, window = model(segment[part].unsqueeze(0), knn_memories=alone, xl_memories=window)
        expected.append(out)

    torch.testing.assert_close(torch.cat(logits, 1)[0][mask[0]], torch.cat(expected, 1)[0], atol=1e-12, rtol=0)
    assert memories[0].sizes[0] == alone[0].sizes[0] == 11
    assert not bool(torch.isnan(torch.cat(logits, 1)).any())


def test_a_pad_id_is_padding_in_ids_and_labels(tiny_model):
    model = tiny_model(pad_id=0)
    ids, labels = torch.randint(1, 20, (1, 6)), torch.randint(1, 20, (1, 6))
    loss = model(ids, labels=labels)
    padded = model(torch.nn.functional.pad(ids, (0, 3)), labels=torch.nn.functional.pad(labels, (0, 3)))
    torch.testing.assert_close(loss, padded, atol=1e-12, rtol=0)


def test_token_zero_counts_in_the_loss_by_default(tiny_model):
    model, ids = tiny_model(), torch.randint(0, 20, (1, 6))
    labels = torch.zeros(1, 6, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), labels)
    torch.testing.assert_close(model(ids, labels=labels), expected, atol=1e-12, rtol=0)


def test_a_shifted_window_reads_what_the_layer_above_kept(tiny_model):
    plain, shifted = tiny_model(xl_max_memories=4), tiny_model(xl_max_memories=4, shift_xl_memories_down=1)
    ids = torch.randint(0, 20, (2, 16))
    first, window = plain(ids[:, :8])
    first_shifted, window_shifted = shifted(ids[:, :8])
    assert torch.equal(first, first_shifted)
    by_hand = XLMemories([window[1], window[2], window[2]])
    # a model without shift that is handed the windows of the layers above
    expected = plain(ids[:, 8:], xl_memories=by_hand)[0]
    out = shifted(ids[:, 8:], xl_memories=window_shifted)[0]
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(out, plain(ids[:, 8:], xl_memories=window)[0], atol=1e-3)


def test_keys_that_a_plain_layer_kept_are_normalised_where_a_memorizing_one_reads_them(tiny_model):
    # layer 1 has the memory, and alone reads what layer 2 kept
    model = tiny_model(xl_max_memories=4, shift_xl_memories_down=1, memorizing_layers=1)
    ids = torch.randint(0, 20, (2, 16))
    window = model(ids[:, :8])[1]
    expected = model(ids[:, 8:], xl_memories=window)[0]
    for factors, changes in (((10.0, 1.0), False), ((1.0, 10.0), True)):  # of keys and of values
        scaled = window[1] * torch.tensor(factors, dtype=window[1].dtype)[:, None]
        out = model(ids[:, 8:], xl_memories=XLMemories([window[0], scaled, window[2]]))[0]
        assert torch.allclose(out, expected, atol=1e-10) != changes


def test_a_shifted_memory_is_searched_in_place_of_the_layers_own(tiny_model):
    plain = tiny_model(memorizing_layers=(1, 2))
    shifted = tiny_model(memorizing_layers=(1, 2), shift_knn_memories_down=1)
    ids = torch.randint(0, 20, (1, 16))
    mine, theirs = (model.create_knn_memories(batch_size=1) for model in (plain, shifted))
    plain(ids[:, :8], knn_memories=mine)
    shifted(ids[:, :8], knn_memories=theirs)
    assert torch.equal(mine[0].state_dict()["kv"][0], theirs[0].state_dict()["kv"][0])
    swapped = type(mine)([mine[1], mine[1]])
    expected = plain(ids[:, 8:], knn_memories=swapped, add_knn_memory=False)
    out = shifted(ids[:, 8:], knn_memories=theirs, add_knn_memory=False)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(out, plain(ids[:, 8:], knn_memories=mine), atol=1e-3)


@pytest.mark.parametrize("layers", [1, [1, 3], (2,)])
def test_memorizing_layers_may_be_a_number_a_list_or_a_tuple(tiny_model, layers):
    model = tiny_model(memorizing_layers=layers, knn_attn_heads=2)
    count = 1 if isinstance(layers, int) else len(layers)
    memories = model.create_knn_memories(batch_size=1)
    assert len(memories) == count == len(model.memory_attentions())
    assert model(torch.randint(0, 20, (1, 5)), knn_memories=memories).shape == (1, 5, 20)


def test_a_scoped_sub_batch_works_through_the_model(tiny_model):
    model, ids = tiny_model(), torch.randint(0, 20, (4, 16))
    together, apart = model.create_knn_memories(batch_size=4), model.create_knn_memories(batch_size=4)
    for segment in ids.split(8, 1):
        whole = model(segment, knn_memories=together)
        parts = []
        for rows in ([0, 1], [2, 3]):
            with apart.at_batch_indices(rows):
                parts.append(model(segment[rows], knn_memories=apart))
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)
    assert apart.sizes == together.sizes


def test_queries_learn_through_retrieved_keys(tiny_model):
    model = tiny_model()
    memories = model.create_knn_memories(batch_size=1)
    ids = torch.randint(0, 20, (1, 16))
    model(ids[:, :8], knn_memories=memories)
    model(ids[:, 8:], knn_memories=memories, labels=ids[:, 8:]).backward()
    layer = model.memory_attentions()[0]
    assert float(layer.log_scale.grad.abs().sum()) > 0
    assert float(layer.projections.to_q.weight.grad.abs().sum()) > 0


def test_temperatures_begin_at_twenty_and_are_learned_by_head():
    model = MemorizingTransformer(num_tokens=20, dim=16, depth=2, dim_head=8, heads=2, knn_attn_heads=3)
    scale = model.memory_attentions()[0].log_scale
    torch.testing.assert_close(scale.exp().flatten(), torch.full((3,), 20.0))


def test_the_originals_call_form_works(tiny_model):
    """Positions and keyword names of its README."""
    model = tiny_model(xl_max_memories=4)
    ids, labels = torch.randint(0, 20, (2, 8)), torch.randint(0, 20, (2, 8))
    with model.knn_memories_context(batch_size=2) as knn_memories:
        logits, xl_memories = model(ids, knn_memories)
        loss, xl_memories = model(ids, knn_memories, xl_memories, labels, add_knn_memory=False)
        assert logits.shape == (2, 8, 20)
        assert loss.ndim == 0
        assert len(xl_memories) == 3
        assert knn_memories.sizes == [[4, 4]]


def test_a_refused_call_changes_no_memory(tiny_model):
    model = tiny_model()
    memories = model.create_knn_memories(batch_size=2)
    with pytest.raises(ValueError, match="20"):
        model(torch.full((2, 8), 20), knn_memories=memories)
    with pytest.raises(ValueError, match="rows in scope"):
        model(torch.zeros(3, 8, dtype=torch.long), knn_memories=memories)
    assert memories.sizes == [[0, 0]]


def test_hidden_and_output_weight_give_the_logits(tiny_model):
    model, ids = tiny_model(), torch.randint(0, 20, (2, 8))
    torch.testing.assert_close(model.hidden(ids) @ model.output_weight.T, model(ids), atol=1e-12, rtol=0)


def test_a_retrofitted_model_computes_the_same_until_it_is_trained(tiny_model):
    model, ids = tiny_model(memorizing_layers=()), torch.randint(0, 20, (2, 16))
    twin = retrofit(model, memorizing_layers=2)
    memories = twin.create_knn_memories(batch_size=2)
    for segment in ids.split(8, 1):
        assert torch.equal(twin(segment, knn_memories=memories), model(segment))
    gate = twin.memory_attentions()[0].output_gate
    twin(ids[:, :8], knn_memories=memories, labels=ids[:, 8:]).backward()
    assert float(gate.grad.abs()) > 0


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_in_half_precision_have_a_memory_too(tiny_model, storage, dtype):
    model = tiny_model(knn_storage=storage).to(dtype)
    memories = model.create_knn_memories(batch_size=1)
    for segment in torch.randint(0, 20, (1, 24)).split(8, 1):
        logits = model(segment, knn_memories=memories)
    assert logits.dtype == dtype
    assert bool(torch.isfinite(logits).all())


# ---------------------------------------------------------------- what a step does with the memory's storage


class HandedOver(TorchFunctionMode):
    """Sizes of tensors that are handed to the host, which on a CPU copies nothing that could be seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in {"cpu", "numpy", "__array__", "tolist", "item", "to"} and isinstance(args[0], torch.Tensor):
            self.seen.append((name, args[0].numel()))
        return func(*args, **(kwargs or {}))


class Copied(TorchDispatchMode):
    """Sizes of tensors that are copied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in {"aten::_to_copy", "aten::clone", "aten::copy_"}:
            self.seen.append((func.name(), args[0].numel()))
        return func(*args, **(kwargs or {}))


def test_a_training_step_neither_copies_a_memory_nor_hands_it_to_the_host(tiny_model):
    model = tiny_model(max_knn_memories=CPU_CHUNK + 500)
    memories = model.create_knn_memories(batch_size=2)
    generator = torch.Generator().manual_seed(0)
    for memory in memories:
        memory.add(torch.randn(2, memory.max_memories, 2, 8, generator=generator))  # full: it need not grow any more
    row = 2 * 8 * memories[0].max_memories
    ids = torch.randint(0, 20, (2, 4), generator=generator)
    with HandedOver() as handed, Copied() as copied:
        model(ids, memories, labels=ids).backward()

    assert handed.seen, "no call was watched"
    assert copied.seen, "no call was watched"
    assert [call for call in handed.seen + copied.seen if call[1] >= row] == []
