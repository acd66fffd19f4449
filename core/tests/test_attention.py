import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.nn.attention import Attention, attend


def draw(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def every_pair(b, h, i, j):
    return torch.ones(b, h, i, j, dtype=torch.bool)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 100_000),
    b=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    i=st.integers(1, 5),
    past=st.integers(0, 4),
    causal=st.booleans(),
    kind=st.sampled_from([None, "keys", "pairs", "heads", "one head"]),
    scale=st.sampled_from([None, 8.0]),
)
def test_attention_equals_the_explicit_softmax(
    seed, b, kv_heads, groups, i, past, causal, kind, scale, naive_attention
):
    generator = torch.Generator().manual_seed(seed)
    h, j = kv_heads * groups, i + past
    q, k, v = draw(generator, b, h, i, 4), draw(generator, b, kv_heads, j, 4), draw(generator, b, kv_heads, j, 3)
    shapes = {"keys": (b, j), "pairs": (b, i, j), "heads": (b, h, i, j), "one head": (b, 1, i, j)}
    mask, visible = None, every_pair(b, h, i, j)
    if kind is not None:
        mask = torch.rand(shapes[kind], generator=generator) < 0.6
        full = {"keys": mask.reshape(b, 1, 1, -1), "pairs": mask.reshape(b, 1, -1, j)}.get(kind, mask)
        visible = visible & full
    if causal:
        later = [[key > past + query for key in range(j)] for query in range(i)]
        visible = visible & ~torch.tensor(later)
    before = None if mask is None else mask.clone()
    result = attend(q, k, v, mask=mask, causal=causal, scale=scale)
    torch.testing.assert_close(result, naive_attention(q, k, v, visible, scale), rtol=1e-12, atol=1e-12)
    assert torch.equal(Attention(causal=causal, scale=scale)(q, k, v, mask=mask), result)
    assert mask is None or torch.equal(mask, before)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("i", [1, 3])
@pytest.mark.parametrize("contiguous", [True, False])
def test_key_heads_are_shared_by_neighbouring_query_heads_in_every_layout(kv_heads, i, contiguous, naive_attention):
    # real models hand over slices of one projection and of a cache; 64 features reach the fused kernel
    generator = torch.Generator().manual_seed(0)
    qk = draw(generator, 2, 7, 4 + kv_heads, 64, dtype=torch.float32).transpose(1, 2)
    q, k = qk[:, :4, -i:], qk[:, 4:]
    v = draw(generator, 2, 9, kv_heads, 64, dtype=torch.float32).transpose(1, 2)[:, :, 1:8]
    if contiguous:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    result = attend(q, k, v, causal=True)
    visible = every_pair(2, 4, i, 7).tril(7 - i)
    torch.testing.assert_close(result, naive_attention(q, k, v, visible).float(), rtol=1e-5, atol=1e-5)


def test_causal_attention_is_aligned_to_the_last_key():
    v = torch.eye(5, dtype=torch.float64)[None, None]
    q, k = torch.zeros(1, 1, 2, 3, dtype=torch.float64), torch.zeros(1, 1, 5, 3, dtype=torch.float64)
    weights = attend(q, k, v, causal=True)[0, 0]
    torch.testing.assert_close(weights[0], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0], dtype=torch.float64))
    torch.testing.assert_close(weights[1], torch.full((5,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("i", [1, 4])
def test_a_fully_masked_row_gives_zeros_and_finite_gradients(kv_heads, causal, i):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (draw(generator, 3, heads, n, 8) for heads, n in ((4, i), (kv_heads, 4), (kv_heads, 4)))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = torch.tensor([[True] * 4, [False] * 4, [False, False, True, True]])
    out = attend(q, k, v, mask=mask, causal=causal)
    assert out[1].eq(0).all()
    if causal and i == 4:
        assert out[2, :, :2].eq(0).all()
    out.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[1].eq(0).all()
        assert leaf.grad[0].ne(0).any()


def test_gradients_with_masks_are_right():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (draw(generator, 2, heads, n, 2).requires_grad_() for heads, n in ((2, 2), (1, 3), (1, 3)))
    mask = torch.tensor([[True, True, True], [False, True, False]])
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask=mask, causal=True), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_its_dtype(dtype, naive_attention):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (draw(generator, 1, 2, 3, 8).to(dtype) for _ in range(3))
    mask = torch.tensor([[False, True, True]])
    result = attend(q, k, v, mask=mask, causal=True)
    assert result.dtype == dtype
    assert result[:, :, 0].eq(0).all()
    visible = every_pair(1, 2, 3, 3).tril() & mask
    torch.testing.assert_close(result.double(), naive_attention(q, k, v, visible), rtol=0.02, atol=0.02)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    attention = Attention(dropout=0.5)
    q = k = torch.zeros(1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 4)
    torch.manual_seed(0)
    noisy = attention(q, k, v)
    assert noisy.mean().item() == pytest.approx(1.0, abs=0.02)
    assert noisy.std().item() > 0.01
    assert torch.allclose(attention.eval()(q, k, v), v)
