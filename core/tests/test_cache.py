import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.nn.kv_cache import KVCache

LAYERS, HEADS, FEATURES = 2, 3, 4


class ListCache:
    """Reference: the entries of every row in Python lists, copied at every step."""

    def __init__(self, rows):
        self.rows = [[] for _ in range(rows)]

    def append(self, new):
        for row, entries in zip(self.rows, new.unbind(0), strict=True):
            row.extend(entries.unbind(0))

    def tensor(self):
        return torch.stack([torch.stack(row) for row in self.rows])


def entries(generator, rows, count):
    """New entries of every layer, ``(rows, count, 2, layers, heads, features)``."""
    return torch.randn(rows, count, 2, LAYERS, HEADS, FEATURES, generator=generator)


def keys_and_values(new, layer=0):
    return [new[:, :, part, layer].transpose(1, 2) for part in (0, 1)]


def write(cache, new):
    """One forward: every layer writes, then the cache advances. Returns the results of the writes."""
    got = [torch.stack(cache.update(layer, *keys_and_values(new, layer))) for layer in range(LAYERS)]
    cache.advance(new.shape[1])
    return torch.stack(got).permute(2, 4, 1, 0, 3, 5)  # (rows, length, keys or values, layers, heads, features)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 4)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 100), min_size=1, max_size=5)),
        st.tuples(st.just("truncate"), st.integers(0, 100)),
        st.tuples(st.just("clone"), st.just(None)),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), room=st.integers(1, 6), steps=operations)
def test_any_sequence_of_operations_equals_a_cache_of_lists(seed, rows, room, steps):
    generator = torch.Generator().manual_seed(seed)
    cache, reference = KVCache(layers=LAYERS, batch_size=rows, max_length=room), ListCache(rows)
    for name, argument in steps:
        if name == "write":
            new = entries(generator, len(reference.rows), argument)
            reference.append(new)
            assert torch.equal(write(cache, new), reference.tensor())
        elif name == "reorder":
            index = [number % len(reference.rows) for number in argument]
            cache.reorder(torch.tensor(index))
            reference.rows = [list(reference.rows[number]) for number in index]
        elif name == "truncate":
            length = argument % (cache.length + 1)
            cache.truncate(length)
            reference.rows = [row[:length] for row in reference.rows]
        else:
            left_behind, cache = cache, cache.clone()
            if left_behind.length > 0:  # the copy must not see this
                left_behind.truncate(0)
                write(left_behind, entries(generator, left_behind.batch_size, 1))
        assert cache.length == len(reference.rows[0])
        assert cache.batch_size == len(reference.rows)


def test_keys_and_values_in_one_tensor_are_kept_like_each_alone():
    apart, joint = (KVCache(layers=LAYERS, batch_size=2, max_length=3) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for count in (2, 1, 4):
        new = entries(generator, 2, count)
        for layer in range(LAYERS):
            parts = keys_and_values(new, layer)
            joined = joint.append(layer, torch.cat(parts, dim=1))
            assert torch.equal(joined, torch.cat(apart.update(layer, *parts), dim=1))
        apart.advance(count)
        joint.advance(count)
        for cache in (apart, joint):
            cache.reorder(torch.tensor([1, 0]))
    assert joint.nbytes == apart.nbytes


def test_memory_is_taken_once_where_there_is_room():
    cache = KVCache(layers=LAYERS, batch_size=2, max_length=20)
    generator = torch.Generator().manual_seed(0)
    assert cache.nbytes == 0
    places = set()
    for _ in range(20):
        keys, values = cache.update(0, *keys_and_values(entries(generator, 2, 1)))
        cache.advance(1)
        places.add((keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()))
    assert len(places) == 1
    assert cache.nbytes == 2 * LAYERS * 2 * HEADS * 20 * FEATURES * 4


def test_memory_doubles_when_the_room_is_used_up():
    cache = KVCache(layers=LAYERS, batch_size=1, max_length=3)
    generator = torch.Generator().manual_seed(0)
    capacities = []
    for _ in range(13):
        write(cache, entries(generator, 1, 1))
        capacities.append(cache.nbytes // (2 * LAYERS * HEADS * FEATURES * 4))
    assert capacities == [3] * 3 + [6] * 3 + [12] * 6 + [24]


def test_what_was_written_but_not_advanced_does_not_count():
    generator = torch.Generator().manual_seed(0)
    first, lost, second = (entries(generator, 2, count) for count in (2, 5, 1))
    cache = KVCache(layers=LAYERS, batch_size=2, max_length=3)
    write(cache, first)
    cache.update(0, *keys_and_values(lost))  # grows, then the forward fails
    assert cache.length == 2
    assert torch.equal(write(cache, second), torch.cat((first, second), dim=1))


def test_a_cache_takes_dtype_and_shape_from_the_first_keys():
    cache = KVCache(layers=1, batch_size=2, max_length=4)
    keys, values = cache.update(
        0, torch.ones(2, 1, 3, 4, dtype=torch.bfloat16), torch.ones(2, 5, 3, 6, dtype=torch.float16)
    )
    assert (keys.dtype, keys.shape) == (torch.bfloat16, (2, 1, 3, 4))
    assert (values.dtype, values.shape) == (torch.float16, (2, 5, 3, 6))


def test_a_copy_keeps_the_class_and_the_state_of_a_subclass():
    class Remembering(KVCache):
        topic = None

    cache = Remembering(layers=LAYERS, batch_size=1, max_length=2)
    cache.topic, cache.masked = "ships", True
    copy = cache.clone()
    assert type(copy) is Remembering
    assert (copy.topic, copy.masked) == ("ships", True)


def test_an_emptied_cache_forgets_that_it_was_masked():
    cache = KVCache(layers=LAYERS, batch_size=1, max_length=2)
    write(cache, entries(torch.Generator(), 1, 2))
    cache.masked = True
    cache.truncate(1)
    assert cache.masked
    cache.truncate(0)
    assert not cache.masked


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_can_be_reordered_before_anything_was_written(rows):
    cache = KVCache(layers=LAYERS, batch_size=2, max_length=2)
    cache.reorder(torch.zeros(rows, dtype=torch.long))
    new = entries(torch.Generator().manual_seed(0), rows, 3)
    assert torch.equal(write(cache, new), new)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    prompt=st.integers(1, 4),
    steps=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4) | st.none(), max_size=6),
)
def test_a_static_cache_holds_what_a_growing_one_does_and_zeros_after_it(seed, rows, prompt, steps):
    generator, capacity = torch.Generator().manual_seed(seed), 12
    growing = KVCache(layers=LAYERS, batch_size=rows, max_length=2)
    static = KVCache(layers=LAYERS, batch_size=rows, max_length=capacity, static=True)
    new = entries(generator, rows, prompt)
    assert torch.equal(write(static, new), write(growing, new))
    static.begin_steps()
    for step in steps:
        if step is not None:
            index = torch.tensor(step) % growing.batch_size
            growing.reorder(index)
            static.reorder(index)
            continue
        new = entries(generator, growing.batch_size, 1)
        expected, got = write(growing, new), write(static, new)
        assert torch.equal(got[:, : expected.shape[1]], expected)
        assert not got[:, expected.shape[1] :].any()
        assert (static.length, static.past) == (growing.length, capacity - 1)


def test_static_steps_and_reordering_of_as_many_rows_leave_the_memory_in_place():
    cache = KVCache(layers=LAYERS, batch_size=2, max_length=8, static=True)
    generator = torch.Generator().manual_seed(0)
    write(cache, entries(generator, 2, 3))
    cache.begin_steps()
    position = cache.position
    places = {cache.update(layer, *keys_and_values(entries(generator, 2, 1)))[0].data_ptr() for layer in range(LAYERS)}
    cache.advance(1)
    cache.reorder(torch.tensor([1, 1]))
    assert {
        cache.update(layer, *keys_and_values(entries(generator, 2, 1)))[0].data_ptr() for layer in range(LAYERS)
    } == places
    assert len(places) == LAYERS
    assert cache.position is position


def test_values_of_a_failed_prompt_do_not_stay_in_a_static_cache():
    cache = KVCache(layers=1, batch_size=1, max_length=6, static=True)
    nan = torch.full((1, 1, 5, 2), torch.nan)
    cache.update(0, nan, nan)  # then the forward fails
    cache.update(0, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    cache.advance(2)
    cache.begin_steps()
    keys, _ = cache.update(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert keys.sum() == 6


def test_a_static_cache_refuses_what_would_change_its_shapes():
    cache = KVCache(layers=1, batch_size=1, max_length=4, static=True)
    token = torch.ones(1, 1, 1, 2)
    with pytest.raises(ValueError, match="must read its prompt"):
        cache.begin_steps()
    with pytest.raises(ValueError, match="4 positions is full, got 5"):
        cache.update(0, token.expand(1, 1, 5, 2), token.expand(1, 1, 5, 2))
    cache.update(0, token, token)
    cache.advance(1)
    cache.begin_steps()
    with pytest.raises(ValueError, match="one token a row, got 2"):
        cache.update(0, token.expand(1, 1, 2, 2), token.expand(1, 1, 2, 2))
    with pytest.raises(ValueError, match="without static=True"):
        KVCache(layers=1, batch_size=1, max_length=4).begin_steps()
