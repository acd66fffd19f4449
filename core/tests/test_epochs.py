"""The order of examples: every epoch a permutation, every rank a share, any position computed directly."""

from collections import Counter
from itertools import chain

import pytest

from lm_core.data.epochs import EpochOrder, UpdateOrder, check_same_order, permutation


def test_every_epoch_is_another_permutation_of_all_examples():
    order = EpochOrder(50, seed=3)
    epochs = [order.take(50 * number, 50) for number in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[2] == EpochOrder(50, seed=3).take(100, 50)
    assert epochs[0] != EpochOrder(50, seed=4).take(0, 50)
    assert epochs[0] != EpochOrder(50, seed=3, key=("rows",)).take(0, 50)
    assert EpochOrder(3, seed=0, shuffle=False).take(2, 4) == [2, 0, 1, 2]


def test_a_permutation_depends_on_each_part_of_its_key():
    keys = [(0, 1), (1, 0), (0, 1, "rows"), (0, "1")]
    assert len({tuple(permutation(30, *key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("last", ["wrap", "short", "drop"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_every_micro_batch_of_one_process(last, world_size):
    settings = {"batch_size": 12, "micro_batches": 2, "last": last, "seed": 1}
    alone = UpdateOrder(31, **settings)
    ranks = [UpdateOrder(31, **settings, rank=rank, world_size=world_size) for rank in range(world_size)]
    for update in (4, 0, 7):
        shares = [order.micro_batches(update) for order in ranks]
        assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone.micro_batches(update)
        assert list(chain(*alone.micro_batches(update))) == alone.indices(update)


@pytest.mark.parametrize(("last", "updates", "examples"), [("short", 3, 31), ("drop", 2, 24)])
def test_an_epoch_holds_each_example_once_at_most(last, updates, examples):
    order = UpdateOrder(31, batch_size=12, last=last, seed=1)
    assert order.updates_per_epoch == updates
    counts = Counter(chain(*(order.indices(update) for update in range(updates))))
    assert len(counts) == examples
    assert set(counts.values()) == {1}


def test_batches_that_wrap_leave_out_no_example_and_repeat_none_within_an_epoch():
    order = UpdateOrder(31, batch_size=12, seed=1)
    taken = list(chain(*(order.indices(update) for update in range(31))))
    assert all(sorted(taken[31 * epoch : 31 * epoch + 31]) == list(range(31)) for epoch in range(12))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 5, "micro_batches": 2}, "multiple of micro_batches 2, got 5"),
        ({"count": 3, "last": "drop"}, "at least the 4 examples of an update, got 3"),
    ],
)
def test_bad_sizes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        UpdateOrder(**{"count": 9, "batch_size": 4, "seed": 0, **settings})


@pytest.mark.plain
def test_a_saved_order_of_another_seed_is_refused():
    saved = UpdateOrder(9, batch_size=4, seed=0).fingerprint()
    check_same_order(saved, UpdateOrder(9, batch_size=4, seed=0).fingerprint())
    with pytest.raises(ValueError, match="seed is 1, but was 0 when the state was saved"):
        check_same_order(saved, UpdateOrder(9, batch_size=4, seed=1).fingerprint())
