import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_core.nn.masking import (
    left_pad,
    masked_mean,
    maybe_and_mask,
    positions_from_mask,
    prompt_mask_from_lengths,
    right_pad,
)


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 4), length=st.integers(1, 6), features=st.integers(0, 3))
def test_masked_mean_equals_a_loop_over_the_kept_entries(seed, batch, length, features):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn((batch, length, features) if features else (batch, length), generator=generator).double()
    mask = torch.rand((batch, length), generator=generator) < 0.5
    result = masked_mean(t, mask)
    for row in range(batch):
        kept = [t[row, column] for column in range(length) if mask[row, column]]
        expected = sum(kept) / len(kept) if kept else torch.zeros_like(t[row, 0])
        torch.testing.assert_close(result[row], expected, rtol=1e-14, atol=1e-14)
    kept = t[mask]
    expected = kept.mean() if kept.numel() else torch.zeros((), dtype=t.dtype)
    torch.testing.assert_close(masked_mean(t, mask, dim=None), expected, rtol=1e-14, atol=1e-14)


def test_masked_mean_without_a_mask_is_the_mean_and_of_no_entries_zero():
    t = torch.randn(3, 4, 5)
    torch.testing.assert_close(masked_mean(t), t.mean(dim=1))
    torch.testing.assert_close(masked_mean(t, dim=(0, 2), keepdim=True), t.mean(dim=(0, 2), keepdim=True))
    assert masked_mean(torch.empty(2, 0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_masked_out_entries_reach_neither_value_nor_gradient(poison):
    t = torch.tensor([[1.0, poison, 3.0], [poison, poison, poison]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    result = masked_mean(t, mask)
    assert result.tolist() == [2.0, 0.0]
    result.sum().backward()
    assert t.grad.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_masked_mean_keeps_the_input_and_its_dtype():
    t = torch.full((2, 100), 60_000.0, dtype=torch.float16)  # the sum is beyond float16
    mask = torch.ones(2, 100, dtype=torch.bool)
    before = t.clone()
    result = masked_mean(t, mask, keepdim=True)
    assert result.dtype == torch.float16
    assert result.tolist() == [[60_000.0], [60_000.0]]
    assert torch.equal(t, before)
    assert mask.all()


def test_a_mask_of_size_one_broadcasts():
    t = torch.arange(6.0).reshape(2, 3)
    assert masked_mean(t, torch.tensor([[True, False, True]])).tolist() == [1.0, 4.0]
    assert masked_mean(t, torch.tensor([[True], [False]])).tolist() == [1.0, 0.0]


def test_prompt_mask_is_true_before_each_length():
    mask = prompt_mask_from_lengths(torch.tensor([0, 2, 3]), 3)
    assert mask.tolist() == [[False, False, False], [True, True, False], [True, True, True]]


def test_the_conjunction_skips_none_and_broadcasts():
    rows, columns = torch.tensor([[True], [False]]), torch.tensor([[True, False]])
    assert maybe_and_mask() is None
    assert maybe_and_mask(None, None) is None
    assert maybe_and_mask(None, rows) is rows
    assert maybe_and_mask(rows, None, columns).tolist() == [[True, False], [False, False]]
    assert rows.tolist() == [[True], [False]]


def test_positions_count_the_real_tokens():
    mask = torch.tensor([[False, False, True, True], [True, True, False, False], [True, False, True, False]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


@given(
    sequences=st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
)
def test_padding_keeps_each_sequence_under_its_mask_as_int64(sequences, dtype):
    tensors = [torch.tensor(sequence, dtype=dtype) for sequence in sequences]
    longest = max(map(len, sequences))
    for pad, side in ((left_pad, -1), (right_pad, 0)):
        ids, mask = pad(tensors, 77)
        assert ids.dtype == torch.int64
        assert ids.shape == mask.shape == (len(sequences), longest)
        assert [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] == sequences
        assert (ids[~mask] == 77).all()
        for row, sequence in zip(mask, sequences, strict=True):
            assert not sequence or row[side]


T = torch.zeros(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)

REFUSED = [
    (lambda: masked_mean(T.long()), TypeError, "t must be floating point, got dtype torch.int64"),
    (lambda: masked_mean(T, T), TypeError, "mask must be boolean, got dtype torch.float32"),
    (lambda: masked_mean(T, MASK[:, :2]), ValueError, r"broadcast to t of shape \(2, 3\), got shape \(2, 2\)"),
    (lambda: masked_mean(T, MASK[None]), ValueError, r"mask must broadcast to t .*got shape \(1, 2, 3\)"),
    (lambda: prompt_mask_from_lengths(torch.tensor([4]), 3), ValueError, r"lengths must be in \[0, 3\], got 4"),
    (lambda: prompt_mask_from_lengths(torch.tensor([-1]), 3), ValueError, r"lengths must be in \[0, 3\], got -1"),
    (lambda: prompt_mask_from_lengths(torch.tensor([1.0]), 3), TypeError, "lengths must be integers, got dtype"),
    (lambda: prompt_mask_from_lengths(torch.tensor([1]), -1), ValueError, "total_length must be at least 0, got -1"),
    (lambda: maybe_and_mask(MASK, T), TypeError, "masks must be boolean, got dtype torch.float32"),
    (lambda: positions_from_mask(T), TypeError, "mask must be boolean, got dtype torch.float32"),
    (lambda: left_pad([], 0), ValueError, "sequences must hold at least one sequence, got none"),
    (lambda: left_pad([torch.zeros(1, 2).long()], 0), ValueError, r"sequences\[0\] must be one-dimensional, got shape"),
    (lambda: right_pad([torch.zeros(2)], 0), TypeError, r"sequences\[0\] must hold integer token ids, got dtype"),
    (lambda: right_pad([torch.zeros(2).long(), [1]], 0), TypeError, r"sequences\[1\] must be a tensor, got list"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
