import functools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lm_core.losses.losses import (
    hidden_log_probs,
    hidden_log_probs_and_entropy,
    linear_cross_entropy,
    token_log_probs,
)

exact = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def batch(shape=(2, 5), dim=4, vocabulary=11, ignored=0.3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((*shape, dim), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn((vocabulary, dim), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)
    return hidden, weight, labels


def plain(hidden, weight, labels, **options):
    losses = F.cross_entropy((hidden @ weight.T).reshape(-1, weight.shape[0]), labels.reshape(-1), **options)
    return losses.reshape(labels.shape) if options.get("reduction") == "none" else losses


def value_and_gradients(loss, *inputs):
    """The loss, and the gradients of an unevenly weighted sum of it, to which every token contributes visibly."""
    uneven = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss, *torch.autograd.grad((loss * uneven).sum(), inputs, retain_graph=True)


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 6),
    vocabulary=st.integers(1, 12),
    chunk_size=st.one_of(st.none(), st.integers(1, 20)),
    ignored=st.sampled_from([0.0, 0.5]),
    ignore_index=st.sampled_from([-100, 0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_the_loss_equals_the_plain_loss_in_value_and_gradients(
    rows, length, vocabulary, chunk_size, ignored, ignore_index, reduction, seed
):
    hidden, weight, labels = batch((rows, length), vocabulary=vocabulary, ignored=ignored, seed=seed)
    labels = labels.masked_fill(labels == -100, ignore_index)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    if reduction == "mean" and (labels == ignore_index).all():
        return  # the plain loss is NaN there
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, **options)
    reference = plain(hidden, weight, labels, **options)
    exact(value_and_gradients(ours, hidden, weight), value_and_gradients(reference, hidden, weight))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float32_agrees_to_its_rounding_at_a_real_size(reduction):
    hidden, weight, labels = batch((4, 64), dim=64, vocabulary=3000, dtype=torch.float32)
    reference = value_and_gradients(
        plain(hidden.double(), weight.double(), labels, reduction=reduction), hidden, weight
    )
    ours = value_and_gradients(linear_cross_entropy(hidden, weight, labels, reduction=reduction), hidden, weight)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.dtype == torch.float32
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-6, atol=2e-6 * scale)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [2, 0])
def test_a_batch_without_labels_or_tokens_gives_zero_with_zero_gradients(reduction, rows):
    hidden, weight, labels = batch((rows, 5), ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    assert torch.equal(loss, torch.zeros(labels.shape if reduction == "none" else (), dtype=torch.float64))
    loss.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_frozen_input_leaves_the_others_gradient_as_it_was(reduction, trained):
    hidden, weight, labels = batch()
    of_hidden, of_weight = torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight))
    inputs = {"hidden": hidden.detach(), "weight": weight.detach()}
    inputs[trained].requires_grad_()
    loss = linear_cross_entropy(**inputs, labels=labels, reduction=reduction)
    loss = loss if reduction == "mean" else loss.sum() / (labels != -100).sum()
    exact(torch.autograd.grad(loss, inputs[trained])[0], of_hidden if trained == "hidden" else of_weight)


def test_nothing_is_differentiated_where_nothing_asks():
    hidden, weight, labels = batch()
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, labels)
    assert not without.requires_grad
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), labels).requires_grad
    exact(without, plain(hidden, weight, labels).detach())


def test_a_retained_graph_gives_the_same_gradient_twice_and_inputs_are_left_alone():
    inputs = batch()
    hidden, weight, labels = inputs
    before = [t.detach().clone() for t in inputs]
    loss = 3 * linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    loss.backward()
    assert torch.equal(first[0], hidden.grad)
    assert torch.equal(first[1], weight.grad)
    linear_cross_entropy(hidden, weight, labels, reduction="none").sum().backward()
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses():
    _, weight, labels = batch(ignored=0.0)
    ids = (labels + 1) % weight.shape[0]
    ours = linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, labels)
    reference = plain(F.embedding(ids, weight).tanh(), weight, labels)
    exact(torch.autograd.grad(ours, weight), torch.autograd.grad(reference, weight))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_checkpointing_changes_nothing(reentrant, reduction):
    hidden, weight, labels = batch()

    def loss(hidden, weight):
        return linear_cross_entropy(hidden.tanh(), weight, labels, reduction=reduction).sum()

    kept = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    exact((hidden.grad, weight.grad), kept)


def test_accumulated_micro_batches_with_a_shared_normalizer_equal_one_batch():
    hidden, weight, labels = batch((4, 6))
    whole = torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight))
    total = (labels != -100).sum()
    for normalizer in (total, total.item(), float(total)):
        parts = [
            linear_cross_entropy(hidden[rows], weight, labels[rows], normalizer=normalizer)
            for rows in (slice(0, 1), slice(1, 4))
        ]
        exact(sum(parts), plain(hidden, weight, labels))
        exact(torch.autograd.grad(sum(parts), (hidden, weight)), whole)


def test_ignored_positions_may_hold_anything():
    hidden, weight, labels = batch()
    poisoned = hidden.detach().masked_fill((labels == -100)[..., None], math.nan).requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, labels)
    exact(loss, plain(hidden, weight, labels))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (poisoned, weight)))


def test_logits_far_beyond_the_range_of_exp_stay_finite():
    hidden, weight, labels = batch(dtype=torch.float32)
    loss = linear_cross_entropy(1000 * hidden, weight, labels)
    torch.testing.assert_close(loss, plain(1000 * hidden, weight, labels))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_statistics_and_weight_gradient_in_float32(autocast, reduction):
    # 512 tokens of one label: added up in bfloat16, their gradients would stop growing at 256 of them
    hidden = torch.ones(512, 4, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 4, dtype=hidden.dtype, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=1, reduction=reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.mean().item(), math.log(2), rtol=1e-6, atol=0)
    loss.sum().backward()
    total = -0.5 if reduction == "mean" else -256.0
    assert weight.grad.dtype == weight.dtype
    assert weight.grad.tolist() == [[total] * 4, [-total] * 4]
    assert hidden.grad.dtype == hidden.dtype


def test_float16_gradients_survive_a_loss_scaler():
    # the mean's gradient, 1 / (4096 * 32) a token, is below float16's smallest number; scaled it is not
    hidden, weight, labels = batch((4096,), dim=2, vocabulary=32, ignored=0, dtype=torch.float16)
    scaled = 65536.0 * linear_cross_entropy(hidden, weight, labels)
    reference = 65536.0 * plain(hidden.double(), weight.double(), labels)
    mine, theirs = torch.autograd.grad(scaled, hidden)[0], torch.autograd.grad(reference, hidden)[0]
    # the gradient of 32 logits is rounded to float16 once, and their sum once more
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


def test_half_precision_follows_the_plain_loss():
    for dtype in (torch.bfloat16, torch.float16):
        hidden, weight, labels = batch((6, 8), dim=16, vocabulary=50, dtype=dtype)
        loss = linear_cross_entropy(hidden, weight, labels)
        reference = plain(hidden.double(), weight.double(), labels)
        rounding = torch.finfo(dtype).eps
        # each logit is rounded once: at most eps/2 of the largest, about 16, and the loss no more than twice that
        assert abs(loss.item() - reference.item()) < 16 * rounding
        for mine, theirs in zip(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(reference, (hidden, weight)), strict=True
        ):
            assert (mine.double() - theirs.double()).norm() < 4 * rounding * theirs.double().norm()


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 6),
    temperature=st.sampled_from([0.5, 1, 1.7]),
    chunk_size=st.one_of(st.none(), st.integers(1, 20)),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_log_probs_and_entropy_equal_those_of_the_full_logits(rows, length, temperature, chunk_size, masked, seed):
    hidden, weight, ids = batch((rows, length), ignored=0, seed=seed)
    mask = torch.rand((rows, length), generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    options = {"mask": mask, "temperature": temperature, "chunk_size": chunk_size}
    log_probs, entropies = hidden_log_probs_and_entropy(hidden, weight, ids, **options)

    log_softmax = (hidden[:, :-1] @ weight.T / temperature).log_softmax(-1)
    counted = torch.ones(rows, length - 1, dtype=torch.bool) if mask is None else mask[:, :-1] & mask[:, 1:]
    expected_log_probs = counted * log_softmax.gather(-1, ids[:, 1:, None])[..., 0]
    expected_entropies = counted * -(log_softmax.exp() * log_softmax).sum(-1)
    exact(hidden_log_probs(hidden, weight, ids, **options), log_probs)
    for mine, theirs in ((log_probs, expected_log_probs), (entropies, expected_entropies)):
        exact(value_and_gradients(mine, hidden, weight), value_and_gradients(theirs, hidden, weight))
    combined = torch.autograd.grad((log_probs + 0.3 * entropies).sum(), (hidden, weight))
    reference = (expected_log_probs + 0.3 * expected_entropies).sum()
    exact(combined, torch.autograd.grad(reference, (hidden, weight)))


@pytest.mark.parametrize(("chunk_size", "products"), [(None, 3), (10, 3), (9, 8), (4, 12)])
def test_logits_that_fit_one_tile_are_made_once(chunk_size, products):
    hidden, weight, ids = batch((2, 6), ignored=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        hidden_log_probs(hidden, weight, ids, chunk_size=chunk_size).sum().backward()
    counted = sum(event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm_"))
    assert counted == products


def test_the_entropy_of_certainty_is_zero_and_of_ignorance_the_logarithm():
    hidden = torch.tensor([[[200.0], [0.0], [0.0]]])
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    _, entropies = hidden_log_probs_and_entropy(hidden, weight, torch.zeros(1, 3, dtype=torch.int64))
    assert entropies.tolist() == [[0.0, pytest.approx(math.log(3), rel=1e-6)]]


class Model(nn.Module):
    """Embedding and output layer, with or without the hidden states that scoring can use."""

    def __init__(self, expose_hidden):
        super().__init__()
        self.embedding = nn.Embedding(13, 6, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(13, 6, dtype=torch.float64))
        if expose_hidden:
            self.hidden, self.output_weight = self.compute_hidden, self.weight
        self.seen = []

    def compute_hidden(self, ids, **options):
        self.seen.append(options)
        return self.embedding(ids).cumsum(1).tanh()

    def forward(self, ids, **options):
        assert not hasattr(self, "hidden"), "full logits were asked for"
        return self.compute_hidden(ids, **options) @ self.weight.T


@pytest.fixture(params=[True, False], ids=["hidden", "logits"])
def model(request):
    torch.manual_seed(0)
    return Model(request.param)


def test_token_log_probs_score_the_next_token(model):
    ids = torch.randint(13, (3, 7), generator=torch.Generator().manual_seed(1))
    logits = model.compute_hidden(ids) @ model.weight.T
    log_probs = token_log_probs(model, ids)
    assert log_probs.shape == (3, 6)
    # logits at position i score token i + 1: scored against token i the sum is another one
    shifted = F.cross_entropy(logits[:, :-1].reshape(-1, 13), ids[:, 1:].reshape(-1), reduction="sum")
    unshifted = F.cross_entropy(logits[:, 1:].reshape(-1, 13), ids[:, 1:].reshape(-1), reduction="sum")
    exact(log_probs.sum(), -shifted)
    assert abs(shifted - unshifted) > 0.1
    parameters = list(model.parameters())
    exact(torch.autograd.grad(log_probs.sum(), parameters), torch.autograd.grad(-shifted, parameters))


def test_token_log_probs_use_mask_temperature_and_arguments_of_the_model(model):
    ids = torch.randint(13, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    log_probs = token_log_probs(model, ids, mask=mask, temperature=2, segment=7)
    assert [sorted(options) for options in model.seen] == [["mask", "segment"]]
    logits = model.compute_hidden(ids)[:, :-1] @ model.weight.T / 2.0
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = torch.tensor([[False, False, True, True], [True, True, True, False]])
    exact(log_probs, expected.masked_fill(~counted, 0))


def test_padding_may_hold_ids_outside_the_vocabulary():
    hidden, weight, ids = batch((2, 4), ignored=0)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    with_padding = hidden_log_probs(hidden, weight, ids.masked_fill(~mask, -1), mask=mask)
    exact(with_padding[0], hidden_log_probs(hidden, weight, ids)[0])
    assert with_padding[1, 1:].tolist() == [0, 0]


PEAK_MEMORY = """
import resource, torch
from lm_core.losses.losses import hidden_log_probs, linear_cross_entropy

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def step(tokens):
    hidden = torch.zeros(1, tokens, 32, requires_grad=True)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, ids).backward()
    hidden_log_probs(hidden, weight, ids).sum().backward()

weight = torch.zeros(16384, 32, requires_grad=True)
step(8)
before = peak()
step(8192)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss differs, or there is none")
def test_peak_memory_is_far_below_that_of_the_logits():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK_MEMORY]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    logits = 4 * 8192 * 16384
    assert int(output) < logits / 8


@pytest.mark.cuda
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gpu_gives_the_loss_of_the_cpu_within_an_eighth_of_the_logits(reduction):
    hidden, weight, labels = batch((8192,), dim=32, vocabulary=65536, dtype=torch.float32)
    expected = value_and_gradients(linear_cross_entropy(hidden, weight, labels, reduction=reduction), hidden, weight)
    hidden, weight, labels = hidden.detach().cuda(), weight.detach().cuda(), labels.cuda()
    hidden.requires_grad_()
    weight.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_size=256)
    uneven = torch.linspace(0.5, 2.0, loss.numel(), device="cuda").reshape(loss.shape)
    ours = loss, *torch.autograd.grad((loss * uneven).sum(), (hidden, weight))
    assert torch.cuda.max_memory_allocated() - before < 4 * 8192 * 65536 / 8
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.fixture(params=["tiles", "kernels"])
def implementation(request, monkeypatch):
    """Computes losses on a GPU in our own tiles, or in Liger-Kernel's."""
    if request.param == "kernels":
        pytest.importorskip("liger_kernel")
    else:
        monkeypatch.setattr("lm_core.losses.losses._liger_loss", lambda: None)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.1])
def test_on_a_gpu_the_loss_and_its_gradients_are_those_of_the_plain_loss(implementation, dtype, ignored):
    hidden, weight, labels = batch((3, 700), dim=128, vocabulary=5003, dtype=torch.float32, ignored=ignored)
    hidden, weight, labels = hidden.detach().cuda(), 0.1 * weight.detach().cuda(), labels.cuda()
    low = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in low]
    count = max(int((labels != -100).sum()), 1)
    reference = plain(*exact_inputs, labels, reduction="sum") / count
    ours = linear_cross_entropy(*low, labels)
    assert ours.dtype == torch.float32
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}[dtype]  # float32 may use TF32
    pairs = zip(value_and_gradients(ours, *low), value_and_gradients(reference, *exact_inputs), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=tolerance * max(theirs.abs().max().item(), 1e-9))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fused_kernels_get_the_labels_that_count_in_the_dtype_of_products(monkeypatch, reduction, autocast):
    hidden, weight, labels = batch(dtype=torch.float32)
    expected = value_and_gradients(linear_cross_entropy(hidden, weight, labels, reduction=reduction), hidden, weight)
    dtypes = []

    def kernel(weight, hidden, labels):  # arguments in the order of Liger-Kernel's loss
        dtypes.append((weight.dtype, hidden.dtype))
        return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=-100, reduction="sum")

    monkeypatch.setattr("lm_core.losses.losses._has_fused_kernel", lambda *_: True)
    monkeypatch.setattr("lm_core.losses.losses._liger_loss", lambda: kernel)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    fused = value_and_gradients(loss, hidden, weight)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert dtypes == [(dtype, dtype)]
    for mine, theirs in zip(fused, expected, strict=True):
        tolerance = (0.03 if autocast else 1e-6) * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.plain
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_caller_takes_the_losses_whole(backend):
    hidden, weight, labels = batch()
    ids = labels.clamp(min=0)

    def loss(hidden, weight):
        scores = hidden_log_probs_and_entropy(hidden.tanh(), weight, ids, temperature=0.7)
        return linear_cross_entropy(hidden.tanh(), weight, labels) - scores[0].mean() + scores[1].mean()

    expected = loss(hidden, weight)
    compiled = torch.compile(loss, backend=backend, fullgraph=True)(hidden, weight)
    exact(compiled, expected)
    exact(torch.autograd.grad(compiled, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)))


HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3, 4), torch.zeros(7, 4), torch.zeros(2, 3, dtype=torch.int64)
LOGITS_ONLY = functools.partial(torch.nn.functional.one_hot, num_classes=7)


def loss(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, **options):
    return linear_cross_entropy(hidden, weight, labels, **options)


def scores(hidden=HIDDEN, weight=WEIGHT, ids=LABELS, **options):
    return hidden_log_probs(hidden, weight, ids, **options)


REFUSED = [
    (lambda: loss(labels=LABELS + 7), ValueError, r"labels must hold token ids in \[0, 7\), got 7"),
    (lambda: loss(labels=LABELS - 1), ValueError, r"labels must hold token ids in \[0, 7\), got -1"),
    (lambda: loss(labels=LABELS - 100, ignore_index=0), ValueError, r"labels must hold token ids .*got -100"),
    (lambda: loss(labels=LABELS.float()), TypeError, "labels must hold integer token ids, got dtype torch.float32"),
    (lambda: loss(labels=LABELS[:1]), ValueError, r"labels must have hidden's shape \(2, 3\), got \(1, 3\)"),
    (lambda: loss(HIDDEN[..., :3]), ValueError, r"hidden must end in weight's 4 features, got shape \(2, 3, 3\)"),
    (lambda: loss(hidden=HIDDEN.long()), TypeError, "hidden must be floating point, got dtype torch.int64"),
    (lambda: loss(weight=WEIGHT[0]), ValueError, r"weight must be \(v, d\) .*got shape \(4,\)"),
    (lambda: loss(weight=WEIGHT[:0]), ValueError, r"weight must be \(v, d\) with v at least 1, got shape \(0, 4\)"),
    (lambda: loss(weight=WEIGHT.double()), TypeError, "hidden and weight must have one dtype, got torch.float32 and"),
    (lambda: loss(reduction="avg"), ValueError, r"reduction must be \"mean\", \"sum\" or \"none\", got 'avg'"),
    (lambda: loss(chunk_size=0), ValueError, "chunk_size must be an integer of at least 1 or None, got 0"),
    (lambda: loss(chunk_size=2.0), TypeError, "chunk_size must be an integer of at least 1 or None, got 2.0"),
    (lambda: loss(normalizer=-1), ValueError, "normalizer must be a finite number above 0, got -1"),
    (lambda: loss(normalizer=0), ValueError, "normalizer must be a finite number above 0, got 0"),
    (lambda: loss(normalizer=math.nan), ValueError, "normalizer must be a finite number above 0, got nan"),
    (lambda: loss(normalizer=torch.ones(2)), ValueError, r"normalizer must be one number, got shape \(2,\)"),
    (
        lambda: loss(normalizer=3, reduction="sum"),
        ValueError,
        "normalizer goes with reduction .mean. only, got .*'sum'",
    ),
    (lambda: scores(temperature=0), ValueError, "temperature must be a finite number above 0, got 0"),
    (lambda: scores(temperature=math.nan), ValueError, "temperature must be a finite number above 0, got nan"),
    (lambda: scores(temperature="1"), TypeError, "temperature must be a number above 0, got '1'"),
    (lambda: scores(ids=LABELS + 7), ValueError, r"ids must hold token ids in \[0, 7\), got 7"),
    (lambda: scores(ids=LABELS[0]), ValueError, r"ids must be \(b, n\), got shape \(3,\)"),
    (lambda: scores(ids=LABELS[:, :2]), ValueError, r"hidden must be \(b, n, d\) for ids \(2, 2\), got shape"),
    (lambda: scores(mask=LABELS), TypeError, "mask must be boolean, got dtype torch.int64"),
    (lambda: scores(mask=LABELS[:1] > 0), ValueError, r"mask must have the shape of ids \(2, 3\), got \(1, 3\)"),
    (lambda: token_log_probs(LOGITS_ONLY, LABELS, temperature=-1), ValueError, "temperature must be .*got -1"),
    (lambda: token_log_probs(lambda ids: None, LABELS), TypeError, "model must return logits .*as_causal_lm"),
    (lambda: token_log_probs(lambda ids: HIDDEN[:1], LABELS), ValueError, r"must return logits .*got \(1, 3, 4\)"),
    (lambda: token_log_probs(lambda ids: HIDDEN, LABELS + 4), ValueError, r"ids must hold .* in \[0, 4\), got 4"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.plain
def test_wrong_ids_are_refused_before_the_model_works():
    model = Model(True)
    with pytest.raises(ValueError, match=r"ids must hold token ids in \[0, 13\), got 13"):
        token_log_probs(model, torch.full((1, 3), 13))
    assert model.seen == []


def test_hidden_log_probs_pick_the_next_token_as_einx_indexes_it():
    einx = pytest.importorskip("einx")
    hidden, weight = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    ids = torch.randint(11, (2, 7))
    log_probs = einx.dot("b n d, v d -> b n v", hidden, weight).log_softmax(dim=-1)
    expected = einx.get_at("b n [v], b n -> b n", log_probs[:, :-1], ids[:, 1:])
    torch.testing.assert_close(hidden_log_probs(hidden, weight, ids), expected, rtol=1e-12, atol=1e-12)
