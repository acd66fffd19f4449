import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm_core.generation.sampling import apply_repetition_penalty, gumbel_noise, gumbel_sample, min_p, top_k, top_p

# few distinct values make ties, the wide ones make probabilities that underflow
LOGIT = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.floats(-60, 60, width=32))


@st.composite
def logit_rows(draw, minimum=1):
    rows, vocabulary = draw(st.integers(1, 3)), draw(st.integers(minimum, 24))
    values = st.lists(LOGIT, min_size=vocabulary, max_size=vocabulary)
    return torch.tensor([draw(values) for _ in range(rows)], dtype=torch.float32)


@pytest.fixture(scope="module")
def processors():
    return pytest.importorskip("transformers.generation.logits_process")


@given(logits=logit_rows(), k=st.integers(1, 30))
def test_top_k_keeps_the_set_of_transformers(processors, logits, k):
    assert torch.equal(top_k(logits, k=k), processors.TopKLogitsWarper(k)(None, logits))


@given(logits=logit_rows(), p=st.floats(0, 1))
def test_top_p_keeps_the_set_of_transformers(processors, logits, p):
    expected = processors.TopPLogitsWarper(p)(None, logits)
    assert torch.equal(top_p(logits, p), expected)
    assert torch.equal(top_p(logits, p=p), expected)


@given(logits=logit_rows(), ratio=st.floats(0, 1))
def test_min_p_keeps_the_set_of_transformers(processors, logits, ratio):
    assert torch.equal(min_p(logits, ratio), processors.MinPLogitsWarper(ratio)(None, logits))


@given(logits=logit_rows(), penalty=st.floats(0.25, 4), data=st.data())
def test_repetition_penalty_equals_that_of_transformers(processors, logits, penalty, data):
    batch, vocabulary = logits.shape
    length = data.draw(st.integers(0, 8))
    ids = torch.tensor([[data.draw(st.integers(0, vocabulary - 1)) for _ in range(length)] for _ in range(batch)])
    ids = ids.reshape(batch, length).long()
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(apply_repetition_penalty(logits, ids, penalty), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(logits=logit_rows(), p=st.floats(0, 1))
def test_half_precision_logits_keep_the_float32_nucleus(processors, dtype, logits, p):
    half = logits.to(dtype)
    kept = top_p(half, p)
    assert kept.dtype == dtype
    assert torch.equal(kept.float(), processors.TopPLogitsWarper(p)(None, half.float()))
    assert torch.equal(min_p(half, p).float(), processors.MinPLogitsWarper(p)(None, half.float()))


@given(logits=logit_rows(), p=st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_set_whose_mass_reaches_p(logits, p):
    logits = logits.double()
    for row, kept in zip(logits.softmax(-1), top_p(logits, p) > -math.inf, strict=True):
        mass = row[kept].sum()
        assert mass >= p - 1e-12
        assert mass - row[kept].min() < p + 1e-12
        assert row[kept].min() >= row.masked_fill(kept, 0).max()


def test_top_p_of_nine_tenths_keeps_nine_tenths_of_the_mass():
    # an inverted comparison keeps the top tenth instead: here one token rather than three
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]]).log()
    assert (top_p(logits, 0.9) > -math.inf).tolist() == [[True, True, True, False, False]]
    assert (top_p(logits, 0.1) > -math.inf).tolist() == [[True, False, False, False, False]]


@pytest.mark.parametrize(
    ("thres", "vocabulary", "count"),
    [((), 40, 4), ((0.9,), 10, 1), ((0.9,), 25, 3), ((0.5,), 7, 4), ((0,), 6, 6), ((1,), 6, 1), ((1.0,), 1, 1)],
)
def test_top_k_by_threshold_keeps_the_ceiling_of_the_fraction(thres, vocabulary, count):
    logits = torch.randperm(vocabulary).float()[None]
    kept = top_k(logits, *thres) > -math.inf
    assert kept.sum() == count
    assert kept[logits >= vocabulary - count].all()


@given(logits=logit_rows(), value=st.floats(0, 1))
def test_filters_keep_a_token_and_leave_their_input_alone(logits, value):
    before = logits.clone()
    for filtered in (top_k(logits, value), top_p(logits, value), min_p(logits, value), top_k(logits, k=1)):
        kept = filtered > -math.inf
        assert torch.equal(filtered.amax(-1), before.amax(-1))
        assert torch.equal(filtered[kept], before[kept])
        filtered.zero_()
    assert torch.equal(logits, before)


@given(logits=logit_rows(minimum=2), p=st.floats(0, 1))
def test_filters_compose_over_removed_entries(logits, p):
    logits[:, 0] = -math.inf
    for filtered in (top_k(logits, k=3), top_p(logits, p), min_p(logits, p), top_p(min_p(top_k(logits, k=3), 0.1), p)):
        assert (filtered[:, 0] == -math.inf).all()
        assert (filtered.amax(-1) > -math.inf).all()


def test_repetition_penalty_reads_only_real_tokens():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    ids = torch.tensor([[0, 1, 1], [-100, 9, 3]])
    mask = torch.tensor([[True, True, True], [False, False, True]])
    expected = torch.tensor([[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 1.0, -2.0]])
    assert torch.equal(apply_repetition_penalty(logits, ids, 2.0, mask=mask), expected)
    assert torch.equal(logits[0], torch.tensor([2.0, -2.0, 1.0, -1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_rare_token_is_drawn_at_its_probability(dtype):
    logits = torch.tensor([-6.90625, 0.0], dtype=dtype)  # exact in bfloat16; probability 0.00100 of token 0
    probability = logits.double().softmax(-1)[0].item()
    draws = 400_000
    drawn = gumbel_sample(logits.expand(draws, 2), generator=torch.Generator().manual_seed(0))
    deviation = (drawn == 0).sum().item() - draws * probability
    # 4 standard deviations of the binomial: 80 of 400
    assert abs(deviation) < 4 * math.sqrt(draws * probability * (1 - probability))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -math.inf], dtype=torch.bfloat16)
    draws = 50_000
    drawn = gumbel_sample(logits.expand(draws, 5), temperature, generator=torch.Generator().manual_seed(1))
    expected = (logits.double() / temperature).softmax(-1) * draws
    observed = drawn.bincount(minlength=5).double()
    assert observed[4] == 0
    chi_square = ((observed - expected).square() / expected)[:4].sum()
    assert chi_square < 16.27  # 0.999 quantile at 3 degrees of freedom


def test_gumbel_noise_is_finite_with_the_moments_of_the_distribution():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        noise = gumbel_noise(torch.empty(200_000, dtype=dtype), torch.Generator().manual_seed(2))
        assert noise.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert noise.isfinite().all()
        standard_error = math.pi / math.sqrt(6 * 200_000)
        assert abs(noise.mean().item() - 0.5772156649) < 4 * standard_error


def test_equal_generators_draw_equal_tokens_and_spare_the_global_state_and_the_input():
    logits = torch.randn(64, 50)
    before, state = logits.clone(), torch.get_rng_state()
    draw = lambda seed: gumbel_sample(logits, 0.7, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    first, again, other = map(draw, (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits, before)


def test_temperature_zero_is_greedy_and_draws_nothing():
    logits, generator = torch.randn(5, 9), torch.Generator().manual_seed(5)
    state = generator.get_state()
    assert torch.equal(gumbel_sample(logits, 0, generator=generator), logits.argmax(-1))
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_too(temperature):
    logits = 100 * torch.randn(20, 30)
    assert torch.equal(gumbel_sample(logits, temperature), logits.argmax(-1))


def test_sampling_runs_along_the_given_dimension():
    logits = torch.full((3, 4, 2), -math.inf)
    logits[:, 2] = 0
    assert torch.equal(gumbel_sample(logits, dim=1), torch.full((3, 2), 2))


ROW = torch.tensor([[0.0, 1.0, 2.0]])
IDS = torch.tensor([[0, 1]])
NAN = math.nan

REFUSED = [
    (lambda: top_k(ROW, 1.5), ValueError, r"thres must be a number in \[0, 1\], got 1.5"),
    (lambda: top_k(ROW, -0.1), ValueError, r"thres must be a number in \[0, 1\], got -0.1"),
    (lambda: top_k(ROW, NAN), ValueError, r"thres must be .*got nan"),
    (lambda: top_k(ROW, k=0), ValueError, "k must be an integer of at least 1, got 0"),
    (lambda: top_k(ROW, k=-3), ValueError, "k must be an integer of at least 1, got -3"),
    (lambda: top_k(ROW, k=2.5), TypeError, "k must be an integer of at least 1, got 2.5"),
    (lambda: top_k(ROW, k=True), TypeError, "k must be an integer"),
    (lambda: top_p(ROW, 1.1), ValueError, r"thres must be a number in \[0, 1\], got 1.1"),
    (lambda: top_p(ROW, p=-1), ValueError, r"p must be a number in \[0, 1\], got -1"),
    (lambda: top_p(ROW, p=NAN), ValueError, r"p must be .*got nan"),
    (lambda: top_p(ROW, "0.9"), TypeError, r"thres must be a number in \[0, 1\], got '0.9'"),
    (lambda: min_p(ROW, 2), ValueError, r"min_p must be a number in \[0, 1\], got 2"),
    (lambda: min_p(ROW, NAN), ValueError, "min_p must be .*got nan"),
    (lambda: top_k(ROW.long()), TypeError, "logits must be floating point, got dtype torch.int64"),
    (lambda: top_p(torch.empty(2, 0)), ValueError, r"logits must have at least one entry .*got shape \(2, 0\)"),
    (lambda: min_p(torch.tensor([[0.0, NAN]])), ValueError, "logits must not hold NaN"),
    (lambda: top_k(torch.tensor([[0.0, NAN]])), ValueError, "logits must not hold NaN"),
    (lambda: gumbel_sample(ROW, -1.0), ValueError, r"temperature must be a number in \[0, inf\), got -1.0"),
    (lambda: gumbel_sample(ROW, NAN), ValueError, "temperature must be .*got nan"),
    (lambda: gumbel_sample(ROW, math.inf), ValueError, "temperature must be .*got inf"),
    (lambda: gumbel_sample(ROW, None), TypeError, "temperature must be .*got None"),
    (lambda: gumbel_sample(torch.tensor([[0.0, NAN]]), 0), ValueError, "logits must not hold NaN"),
    (lambda: gumbel_sample(torch.full((2, 3), -math.inf)), ValueError, "at least one entry above -inf in every row"),
    (lambda: apply_repetition_penalty(ROW, IDS, 0), ValueError, r"penalty must be a number in \(0, inf\), got 0"),
    (lambda: apply_repetition_penalty(ROW, IDS, NAN), ValueError, "penalty must be .*got nan"),
    (lambda: apply_repetition_penalty(ROW, IDS + 2, 1.2), ValueError, r"ids must hold token ids in \[0, 3\), got 3"),
    (lambda: apply_repetition_penalty(ROW, IDS - 1, 1.2), ValueError, r"ids must hold token ids in \[0, 3\), got -1"),
    (lambda: apply_repetition_penalty(ROW, IDS[0], 1.2), ValueError, r"ids must be \(b, n\) .*got \(2,\) and \(1, 3\)"),
    (lambda: apply_repetition_penalty(ROW, IDS, 1.2, IDS), TypeError, "mask must be boolean, got dtype torch.int64"),
    (lambda: apply_repetition_penalty(ROW, IDS, 1.2, IDS[:, :1] > 0), ValueError, r"mask must have the shape of ids"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.plain
def test_filters_and_sampling_compile():
    def choose(logits, ids):
        logits = apply_repetition_penalty(logits, ids, 1.3)
        return gumbel_sample(top_p(min_p(top_k(logits / 0.8, k=5), 0.01), 0.9), 0)

    logits, ids = torch.randn(3, 16), torch.randint(16, (3, 4))
    assert torch.equal(torch.compile(choose, backend="eager", fullgraph=True)(logits, ids), choose(logits, ids))
