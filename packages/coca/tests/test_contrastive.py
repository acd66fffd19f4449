"""Contrastive losses against the formulas of open_clip's ``ClipLoss`` and ``SigLipLoss``, in float64; retrieval."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coca import retrieval_metrics, sigmoid_contrastive_loss, softmax_contrastive_loss


def clip_loss(images, texts, scale):
    """ClipLoss on one process: both cross-entropies of the scaled similarities, halved."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(images))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip_loss(images, texts, scale, bias):
    """SigLipLoss: -1 off the diagonal and 1 on it, times the logits, through the log of the sigmoid."""
    logits = scale * images @ texts.T + bias
    signs = 2 * torch.eye(len(images), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def features(b, d, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    latents = [F.normalize(torch.randn(b, d, generator=generator, dtype=dtype), dim=-1) for _ in range(2)]
    values = [torch.tensor(value, dtype=dtype) for value in (12.5, -3.0)]
    return [t.requires_grad_() for t in (*latents, *values)]


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([None, 1, 2, 4]), st.integers(0, 2**30))
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_and_gradients_equal_open_clips_formulas(kind, b, d, chunk_size, seed):
    images, texts, scale, bias = features(b, d, seed)
    if kind == "softmax":
        inputs = [images, texts, scale]
        found = softmax_contrastive_loss(*inputs, chunk_size=chunk_size)
        expected = clip_loss(*inputs)
    else:
        inputs = [images, texts, scale, bias]
        found = sigmoid_contrastive_loss(*inputs, chunk_size=chunk_size)
        expected = siglip_loss(*inputs)

    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for own, reference in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(own, reference, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("loss", [softmax_contrastive_loss, sigmoid_contrastive_loss])
def test_scores_are_computed_in_float32_under_autocast(loss):
    """In bfloat16 a score of 100 is off by up to a quarter, which is more than most losses."""
    images, texts, scale, bias = features(6, 16, 0, torch.float32)
    inputs = [images, texts, scale] if loss is softmax_contrastive_loss else [images, texts, scale, bias]
    exact = loss(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*inputs)

    torch.testing.assert_close(found, exact)


def naive_recall(images, texts, owner, k):
    """By sorting, one query at a time."""
    similarity = texts @ images.T
    found_images = sum(owner[t] in similarity[t].argsort(descending=True)[:k].tolist() for t in range(len(texts)))
    described = sorted(set(owner))
    found_texts = 0
    for image in described:
        own = [t for t in range(len(texts)) if owner[t] == image]
        best = max(similarity[t, image] for t in own)
        others = [t for t in range(len(texts)) if owner[t] != image and similarity[t, image] >= best]
        found_texts += len(others) < k
    return found_texts / len(described), found_images / len(texts)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.sampled_from([1, 2, 64]), st.integers(0, 2**30))
def test_recall_equals_a_search_one_query_at_a_time(owner, chunk_size, seed):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(6, 3, generator=generator, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(len(owner), 3, generator=generator, dtype=torch.float64), dim=-1)

    found = retrieval_metrics(images, texts, torch.tensor(owner), ks=(1, 3), chunk_size=chunk_size)

    for k in (1, 3):
        to_text, to_image = naive_recall(images, texts, owner, k)
        assert found[f"image_to_text_r@{k}"] == pytest.approx(to_text)
        assert found[f"text_to_image_r@{k}"] == pytest.approx(to_image)


def test_perfect_latents_recall_everything_and_equal_ones_nothing():
    eye, same = torch.eye(12), F.normalize(torch.ones(12, 4), dim=-1)

    assert set(retrieval_metrics(eye, eye).values()) == {1.0}
    assert set(retrieval_metrics(same, same).values()) == {0.0}


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=9), st.sampled_from([1, 2, None]))
def test_a_caption_of_several_images_is_right_for_each_of_them(owners, chunk_size):
    generator = torch.Generator().manual_seed(len(owners))
    images = F.normalize(torch.randn(6, 3, generator=generator, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(len(owners), 3, generator=generator, dtype=torch.float64), dim=-1)
    pairs = torch.tensor([(text, image) for text, own in enumerate(owners) for image in sorted(own)])

    found = retrieval_metrics(images, texts, matches=pairs, ks=(1, 2), chunk_size=chunk_size)

    # by sorting, one query at a time: a hit is the first of the k nearest that is true, with no false one before it
    similarity = texts @ images.T
    described = sorted(set().union(*owners))
    for k in (1, 2):
        text_hits = image_hits = 0
        for text, own in enumerate(owners):
            false = [image for image in range(6) if image not in own]
            best = max(similarity[text, image] for image in own)
            text_hits += sum(bool(similarity[text, image] >= best) for image in false) < k
        for image in described:
            true = [text for text, own in enumerate(owners) if image in own]
            best = max(similarity[text, image] for text in true)
            false = [text for text in range(len(owners)) if text not in true]
            image_hits += sum(bool(similarity[text, image] >= best) for text in false) < k
        assert found[f"text_to_image_r@{k}"] == pytest.approx(text_hits / len(owners))
        assert found[f"image_to_text_r@{k}"] == pytest.approx(image_hits / len(described))
