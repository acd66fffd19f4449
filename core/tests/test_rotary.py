import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_core.nn.attention import Attention, attend
from lm_core.nn.rotary import RotaryEmbedding, apply_rotary, rotate_half

CPU = torch.device("cpu")


def turned(rotary, x, positions):
    """Keys or queries ``(..., n, d)`` at ``positions (n,)``, rotated by the implementation."""
    return apply_rotary(x, *rotary(positions, x.dtype))


def causal_xpos(rotary, q, k, v, positions, *, block=1024, mask=None, i=None):
    """Causal xPos attention by the implementation; queries are the last ``i`` positions."""
    i = q.shape[-2] if i is None else i
    blocks = rotary.xpos_blocks(positions[..., -i:], positions, dtype=q.dtype, block=block)
    return Attention(causal=True)(q, k, v, mask=mask, xpos=blocks)


def test_rotate_half_maps_x1_x2_to_minus_x2_x1():
    assert rotate_half(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[-3.0, -4.0, 1.0, 2.0]]


@given(seed=st.integers(0, 10_000), half=st.integers(1, 8), base=st.sampled_from([10000.0, 500.0]))
def test_rotation_equals_multiplication_by_complex_numbers(seed, half, base, rotate):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 5000, (6,), generator=generator)
    x = torch.randn(2, 6, 2 * half, generator=generator, dtype=torch.float64)
    result = turned(RotaryEmbedding(2 * half, theta=base), x, positions)
    torch.testing.assert_close(result, rotate(x, positions, base), rtol=1e-10, atol=1e-10)


def test_float32_rotation_is_right_to_the_precision_of_its_angles(rotate):
    positions = torch.tensor([0, 1, 63, 64, 1000])
    x = torch.randn(5, 16)
    torch.testing.assert_close(
        turned(RotaryEmbedding(16), x, positions), rotate(x, positions).float(), rtol=0, atol=3e-4
    )


@given(seed=st.integers(0, 10_000), shift=st.integers(0, 4000))
def test_only_differences_of_positions_matter(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    rotary = RotaryEmbedding(8, use_xpos=True)
    q, k, v = torch.randn(3, 1, 2, 7, 8, generator=generator, dtype=torch.float64)
    positions = torch.arange(7)
    here, there = (
        causal_xpos(rotary, turned(rotary, q, at), turned(rotary, k, at), v, at)
        for at in (positions, positions + shift)
    )
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 9), block=st.integers(1, 10), scale_base=st.sampled_from([512.0, 3.0])
)
def test_xpos_attention_equals_the_papers_formula_for_every_block_size(seed, n, block, scale_base, xpos_score):
    generator = torch.Generator().manual_seed(seed)
    rotary = RotaryEmbedding(6, use_xpos=True, scale_base=scale_base)
    q, k, v = torch.randn(3, 1, 1, n, 6, generator=generator, dtype=torch.float64)
    positions = torch.arange(n) * 7
    result = causal_xpos(rotary, turned(rotary, q, positions), turned(rotary, k, positions), v, positions, block=block)
    for i in range(n):
        p = positions.tolist()
        scores = [xpos_score(q[0, 0, i], k[0, 0, j], p[i], p[j], scale_base) * 6**-0.5 for j in range(i + 1)]
        expected = torch.tensor(scores, dtype=torch.float64).softmax(0) @ v[0, 0, : i + 1]
        torch.testing.assert_close(result[0, 0, i], expected, rtol=1e-10, atol=1e-10)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 12),
    block=st.integers(1, 5),
    kind=st.sampled_from([None, "keys", "pairs", "heads"]),
)
def test_blocks_of_queries_equal_one_block(seed, n, block, kind):
    generator = torch.Generator().manual_seed(seed)
    rotary = RotaryEmbedding(8, use_xpos=True, scale_base=4.0)
    i = int(torch.randint(1, n + 1, (1,), generator=generator))
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator, dtype=torch.float64) for length in (i, n, n))
    shapes = {"keys": (2, n), "pairs": (2, i, n), "heads": (2, 4, i, n)}
    mask = None if kind is None else torch.rand(shapes[kind], generator=generator) < 0.7
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if kind == "keys" else torch.arange(n)
    whole, split = (causal_xpos(rotary, q, k, v, positions, block=size, mask=mask, i=i) for size in (n, block))
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_right_at_position_32768(dtype, xpos_score):
    rotary = RotaryEmbedding(64, use_xpos=True)
    positions = torch.tensor([0, 1, 2, 20_000, 31_743, 31_744, 32_000, 32_766, 32_767, 32_768])
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(len(positions), 64, generator=generator) for _ in range(2))
    p = positions.tolist()
    q16, k16 = (turned(rotary, t.to(dtype), positions)[None, None] for t in (q, k))
    assert causal_xpos(rotary, q16[..., -5:, :], k16, k16, positions, i=5).isfinite().all()
    for block in rotary.xpos_blocks(positions[-5:], positions, dtype=dtype, block=1024):
        rotated_q, rotated_k = (turned(rotary, t.to(dtype), positions) for t in (q, k))
        scaled_q = rotated_q[-5:][block.start : block.stop] * block.query_scale.to(dtype)
        scaled_k = rotated_k[: block.key_stop] * block.key_scale.to(dtype)
        assert scaled_q.isfinite().all()
        assert scaled_k.isfinite().all()
        scores = scaled_q.float() @ scaled_k.float().T
        for i in range(block.stop - block.start):
            for j in range(5 + block.start + i + 1):
                exact = xpos_score(q[5 + block.start + i], k[j], p[5 + block.start + i], p[j])
                assert abs(float(scores[i, j]) - exact) < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float16, 2), (torch.bfloat16, 8), (torch.float32, 8)])
@pytest.mark.parametrize("scale_base", [512.0, 16.0, 0.3])
@pytest.mark.parametrize("start", [0, 1, 31_744])
def test_scales_of_the_default_blocks_stay_small(dtype, powers, scale_base, start):
    rotary = RotaryEmbedding(4, use_xpos=True, scale_base=scale_base)
    count = int(2 * powers * scale_base) + 1
    queries, keys = torch.arange(start, start + count), torch.arange(start + count)
    largest = (0.4 / 1.4) ** -powers * 1.001  # 12 in float16, 22,500 otherwise
    for block in rotary.xpos_blocks(queries, keys, dtype=dtype):
        for scale in (block.query_scale, block.key_scale):
            assert scale is None or (scale.isfinite().all() and scale.max() <= largest)


def test_tables_are_not_cast_with_the_model_and_neighbouring_positions_differ():
    model = torch.nn.Sequential(RotaryEmbedding(64))
    before = model[0].at_range(0, 3000, device=CPU, dtype=torch.bfloat16)
    after = model.bfloat16()[0].at_range(0, 3000, device=CPU, dtype=torch.bfloat16)
    for table, same in zip(before, after, strict=True):
        assert table.dtype == same.dtype == torch.float32
        assert torch.equal(table, same)
    assert model.state_dict() == {}
    rotated = apply_rotary(torch.ones(3000, 64, dtype=torch.bfloat16), *after)
    assert rotated.dtype == torch.bfloat16
    assert (rotated[1:] != rotated[:-1]).any(dim=-1).all()


def test_a_table_made_under_inference_mode_can_be_trained_with_and_copied():
    rotary = RotaryEmbedding(8)
    with torch.inference_mode():
        rotary.at_range(0, 5, device=CPU, dtype=torch.float32)
    table = rotary.at_range(0, 5, device=CPU, dtype=torch.float32)
    x = torch.randn(5, 8, requires_grad=True)
    apply_rotary(x, *table).square().sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(copy.deepcopy(rotary).at_range(0, 5, device=CPU, dtype=torch.float32)[0], table[0])


def test_a_table_is_kept_for_each_dtype_and_base_and_grows():
    rotary = RotaryEmbedding(8)
    for dtype, stop in ((torch.float32, 5), (torch.float64, 5), (torch.bfloat16, 70), (torch.float32, 200)):
        expected = rotary(torch.arange(3, stop), dtype)
        for table, right in zip(rotary.at_range(3, stop, device=CPU, dtype=dtype), expected, strict=True):
            assert table.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(table, right, rtol=0, atol=0)
    before = rotary.at_range(0, 9, device=CPU, dtype=torch.float32)[0]
    rotary.theta = 500.0
    table = rotary.at_range(0, 9, device=CPU, dtype=torch.float32)[0]
    torch.testing.assert_close(table, RotaryEmbedding(8, theta=500.0)(torch.arange(9))[0])
    assert before[1, 1] != pytest.approx(float(table[1, 1]))


def test_xpos_lowers_the_weight_of_distant_keys():
    rotary = RotaryEmbedding(8, use_xpos=True, scale_base=4.0)
    q = k = torch.ones(1, 1, 30, 8, dtype=torch.float64)
    v = torch.eye(30, dtype=torch.float64)[None, None]
    plain = attend(q, k, v, causal=True)[0, 0, -1]
    decayed = causal_xpos(rotary, q, k, v, torch.arange(30))[0, 0, -1]
    assert plain.tolist() == pytest.approx([1 / 30] * 30)
    assert (decayed.diff() > 0).all()
