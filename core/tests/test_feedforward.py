import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lm_core.nn.feedforward import SwiGLU, split_swiglu, swiglu


def test_swiglu_multiplies_the_first_half_by_silu_of_the_second():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    values, gates = (half.flatten().tolist() for half in x.chunk(2, dim=-1))
    expected = [value * gate / (1 + math.exp(-gate)) for value, gate in zip(values, gates, strict=True)]
    assert SwiGLU()(x).flatten().tolist() == pytest.approx(expected, rel=1e-13)


def test_swiglu_keeps_its_input_and_has_no_parameters():
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    before = x.clone()
    result = SwiGLU()(x)
    assert result.dtype == torch.bfloat16
    assert result.shape == (2, 3)
    assert torch.equal(x, before)
    assert list(SwiGLU().parameters()) == []


def test_swiglu_gradient_is_that_of_the_formula():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(), x)
    upstream = torch.randn(3, 5, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad(swiglu(x), x, upstream)
    half, gate = x.chunk(2, dim=-1)
    (reference,) = torch.autograd.grad(torch.nn.functional.silu(gate) * half, x, upstream)
    assert torch.allclose(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_split_projection_has_the_gradient_of_split_and_swiglu(rows, monkeypatch):
    monkeypatch.setattr("lm_core.nn.feedforward._TILE", 40)  # several tiles, the last one short
    projected = torch.randn(rows, 2, 5 + 3 + 8, dtype=torch.float64, requires_grad=True)
    upstream = [torch.randn(rows, 2, size, dtype=torch.float64) for size in (5, 3, 4)]
    parts = split_swiglu(projected, (5, 3))
    (ours,) = torch.autograd.grad(parts, projected, upstream)
    first, second, x, gate = projected.split((5, 3, 4, 4), dim=-1)
    wanted = (first, second, torch.nn.functional.silu(gate) * x)
    (reference,) = torch.autograd.grad(wanted, projected, upstream)
    for part, value in zip(parts, wanted, strict=True):
        torch.testing.assert_close(part, value, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-13)


def test_an_unused_part_of_a_split_projection_gets_no_gradient():
    projected = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    _, gated = split_swiglu(projected, (2,))
    gated.sum().backward()
    assert torch.equal(projected.grad[:, :2], torch.zeros(3, 2, dtype=torch.float64))
    assert (projected.grad[:, 2:] != 0).all()


@pytest.mark.plain
@pytest.mark.parametrize(("width", "sizes"), [(7, (2,)), (4, (5,)), (3, ())])
def test_what_is_left_for_swiglu_must_be_even(width, sizes):
    with pytest.raises(ValueError, match="even last dimension"):
        split_swiglu(torch.randn(2, width), sizes)


def test_a_split_projection_is_recomputed_by_activation_checkpointing():
    projected = torch.randn(3, 2, 16, requires_grad=True)
    found = [
        torch.autograd.grad(sum(part.sum() for part in parts), projected)[0]
        for parts in (split_swiglu(projected, (5, 3)), checkpoint(split_swiglu, projected, (5, 3), use_reentrant=False))
    ]
    assert torch.equal(*found)
