import math

import torch

from lm_core.feedforward import SwiGLU, swiglu


def test_swiglu_multiplies_the_first_half_by_silu_of_the_second():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    result = SwiGLU()(x)
    for row in range(2):
        for position in range(3):
            for feature in range(4):
                value, gate = float(x[row, position, feature]), float(x[row, position, feature + 4])
                expected = value * gate / (1 + math.exp(-gate))
                assert math.isclose(float(result[row, position, feature]), expected, rel_tol=1e-13)


def test_swiglu_keeps_its_input_and_has_no_parameters():
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    before = x.clone()
    result = SwiGLU()(x)
    assert result.dtype == torch.bfloat16
    assert result.shape == (2, 3)
    assert torch.equal(x, before)
    assert list(SwiGLU().parameters()) == []


def test_the_gradient_of_swiglu_is_right():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(), (x,))


def test_swiglu_gradient_is_that_of_the_formula():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x)
    upstream = torch.randn(3, 5, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad(swiglu(x), x, upstream)
    half, gate = x.chunk(2, dim=-1)
    (reference,) = torch.autograd.grad(torch.nn.functional.silu(gate) * half, x, upstream)
    assert torch.allclose(ours, reference, rtol=1e-12, atol=1e-12)
