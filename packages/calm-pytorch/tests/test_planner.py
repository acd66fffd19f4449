"""Planned connections: valid, even, and always with the last layers."""

from math import ceil

import pytest

from calm_pytorch import plan_connections


@pytest.mark.parametrize("every", [1, 3, 4, 7])
def test_for_all_depths_connections_are_valid_even_and_reach_the_last_layers(every):
    for augment_depth in range(1, 49):
        for anchor_depth in range(1, 49):
            pairs = plan_connections(augment_depth, anchor_depth, every)
            assert pairs[-1] == (augment_depth, anchor_depth)
            assert len(pairs) == min(ceil(max(augment_depth, anchor_depth) / every), augment_depth, anchor_depth)
            for depth, layers in zip((augment_depth, anchor_depth), zip(*pairs, strict=True), strict=True):
                gaps = [after - before for before, after in zip((0, *layers), layers, strict=False)]
                assert min(gaps) >= 1
                assert max(gaps) - min(gaps) <= 1
                assert max(layers) <= depth


def test_a_number_of_connections_is_spread_evenly_up_to_the_last_layers():
    assert plan_connections(8, 4, num_connections=2) == ((4, 2), (8, 4))
    assert plan_connections(12, 5, num_connections=5) == ((3, 1), (5, 2), (8, 3), (10, 4), (12, 5))


def test_depths_that_the_original_connected_badly():
    assert plan_connections(12, 12) == ((4, 4), (8, 8), (12, 12))
    assert plan_connections(4, 12) == ((2, 4), (3, 8), (4, 12))
    assert plan_connections(5, 5) == ((3, 3), (5, 5))
