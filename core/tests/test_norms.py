import math

import pytest
import torch

from lm_core.nn.norms import LayerNorm, RMSNorm, l2norm


def by_loop(x, function):
    flat = x.double().reshape(-1, x.shape[-1])
    return torch.stack([torch.tensor(function(row.tolist()), dtype=torch.float64) for row in flat]).reshape(x.shape)


def layer_norm(row, eps):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return [(value - mean) / math.sqrt(variance + eps) for value in row]


def rms_norm(row, eps):
    return [value / math.sqrt(sum(other**2 for other in row) / len(row) + eps) for value in row]


@pytest.mark.parametrize(("norm", "formula", "eps"), [(LayerNorm, layer_norm, 1e-3), (RMSNorm, rms_norm, 1e-3)])
def test_a_norm_equals_its_formula(norm, formula, eps):
    module = norm(7, eps=eps).double()
    torch.nn.init.normal_(module.gamma)
    x = torch.randn(3, 4, 7, dtype=torch.float64) * 2 + 1
    expected = by_loop(x, lambda row: formula(row, eps)) * module.gamma
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_l2norm_gives_unit_length():
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = by_loop(x, lambda row: [value / math.sqrt(sum(other**2 for other in row)) for value in row])
    torch.testing.assert_close(l2norm(x), expected, rtol=1e-14, atol=1e-14)


def test_l2norm_of_zero_is_zero_with_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    l2norm(x).sum().backward()
    assert l2norm(x).tolist() == [[0.0] * 4] * 2
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_a_norm_has_a_gain_no_bias_and_the_right_gradient(norm):
    assert {name: tuple(t.shape) for name, t in norm(6).named_parameters()} == {"gamma": (6,)}
    assert norm(6).gamma.tolist() == [1.0] * 6
    assert torch.autograd.gradcheck(norm(6).double(), torch.randn(2, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: LayerNorm(256), lambda: RMSNorm(256), lambda: l2norm])
def test_half_precision_input_has_float32_statistics(dtype, make):
    # the squares of float16 numbers beyond 256 overflow, and a sum of 256 bfloat16 squares has two digits
    x = (torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3000).to(dtype)
    module = make().to(dtype) if isinstance(make(), torch.nn.Module) else make()
    result = module(x)
    exact = (module.double() if isinstance(module, torch.nn.Module) else module)(x.double())
    assert result.dtype == dtype
    error = ((result.double() - exact).abs() / exact.abs().clamp(min=1e-3)).max()
    assert error <= torch.finfo(dtype).eps
