"""Texts: end, targets, and independence of padding."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coca.model.text_layout import IGNORED, layout_of

PAD, EOS = 0, 2


def padded(text, left, right, value=PAD):
    return F.pad(text, (left, right), value=value)


@pytest.mark.parametrize("extra", [0, 2, 40])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_embedding_does_not_depend_on_padding(make_coca, make_batch, extra, side):
    model, (text, _) = make_coca(), make_batch()
    sides = (extra, 0) if side == "left" else (0, extra)
    wide, real = padded(text, *sides), padded(torch.ones_like(text), *sides).bool()
    mask = real if side == "left" else None

    assert (model.encode_text(wide, mask=mask) - model.encode_text(text)).abs().max() <= 1e-5
    (embedding, states), (expected, alone) = model.embed_text(wide, mask=mask), model.embed_text(text)
    assert (embedding - expected).abs().max() <= 1e-5
    assert (states[real] - alone.flatten(0, 1)).abs().max() <= 1e-5


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 2**30))
def test_rows_of_a_padded_batch_equal_each_row_alone(make_coca, lengths, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 23, (length,), generator=generator) for length in lengths]
    n = max(lengths) + spread
    text, mask = torch.full((len(rows), n), PAD), torch.zeros(len(rows), n, dtype=torch.bool)
    for number, row in enumerate(rows):  # real tokens anywhere, in order
        places = torch.randperm(n, generator=generator)[: len(row)].sort().values
        text[number, places], mask[number, places] = row, True
    model = make_coca()
    tokens = torch.randn(1, 5, 12, generator=generator)

    embeddings = model.encode_text(text, mask=mask)
    logits = model(text, image_tokens=tokens.expand(len(rows), -1, -1), mask=mask)

    for number, row in enumerate(rows):
        assert (embeddings[number] - model.encode_text(row[None])[0]).abs().max() <= 1e-5
        alone = model(row[None], image_tokens=tokens)[0]
        assert (logits[number][mask[number]] - alone).abs().max() <= 1e-4


def test_loss_does_not_depend_on_padding_or_its_side(make_coca, make_batch):
    model, (text, tokens) = make_coca(), make_batch()
    plain = model.loss(text, image_tokens=tokens)
    ones = torch.ones_like(text)

    for left, right in [(0, 5), (5, 0), (3, 4)]:
        wide, mask = padded(text, left, right, value=7), padded(ones, left, right).bool()
        other = model.loss(wide, image_tokens=tokens, mask=mask)
        torch.testing.assert_close(other.caption, plain.caption, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.contrastive, plain.contrastive, atol=1e-5, rtol=0)
    trailing = model.loss(padded(text, 0, 5), image_tokens=tokens)
    torch.testing.assert_close(trailing.total, plain.total, atol=1e-5, rtol=0)


@pytest.mark.plain
def test_left_padding_without_a_mask_is_refused(make_coca, make_batch):
    model, (text, tokens) = make_coca(), make_batch()

    with pytest.raises(ValueError, match=r"must not begin with padding .* unless mask= .*rows \[0, 1, 2, 3\]"):
        model(padded(text, 2, 0), image_tokens=tokens)


def test_a_pad_id_inside_a_text_is_a_token(make_coca, make_batch):
    model, (text, _) = make_coca(), make_batch(b=1)
    inside, other = text.clone(), text.clone()
    inside[0, 3], other[0, 3] = PAD, 5

    layout = layout_of(inside, None, pad_id=PAD, eos_id=EOS, num_tokens=23)

    assert layout.lengths.tolist() == [7]
    assert (model.encode_text(inside) - model.encode_text(other)).abs().max() > 1e-3


def test_training_and_use_embed_the_same_tokens(make_coca, make_batch):
    """The original embedded a text without its last token in training, and with it in use."""
    model, (text, tokens) = make_coca(), make_batch()
    seen = []
    hook = model.text_cls_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.loss(text, image_tokens=tokens)
    model.encode_text(text)
    hook.remove()

    torch.testing.assert_close(seen[0], seen[1], atol=1e-6, rtol=0)


def test_the_caption_loss_is_the_mean_cross_entropy_of_the_next_token(make_coca, make_batch):
    model, (text, tokens) = make_coca().double(), make_batch(dtype=torch.float64)
    text = text.clone()
    text[1, 4:], text[3, 2:] = PAD, PAD
    logits = model(text, image_tokens=tokens)
    terms = [
        -logits[row, place].log_softmax(-1)[text[row, place + 1]]
        for row, length in enumerate([7, 4, 7, 2])
        for place in range(length - 1)
    ]

    found = model.loss(text, image_tokens=tokens).caption

    torch.testing.assert_close(found, torch.stack(terms).mean(), atol=1e-10, rtol=0)


def test_given_labels_are_shifted_as_inferred_ones(make_coca, make_batch):
    model, (text, tokens) = make_coca(), make_batch()
    text = padded(text, 0, 2)

    found = model.loss(text, image_tokens=tokens, labels=text)

    torch.testing.assert_close(found.total, model.loss(text, image_tokens=tokens).total)


def test_labels_of_minus_100_are_not_predicted(make_coca, make_batch):
    model, (text, tokens) = make_coca().double(), make_batch(dtype=torch.float64)
    labels = text.clone()
    labels[:, :3], labels[2] = IGNORED, IGNORED
    logits = model(text, image_tokens=tokens)
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    found = model.loss(text, image_tokens=tokens, labels=labels).caption

    torch.testing.assert_close(found, reference, atol=1e-10, rtol=0)


def test_without_any_label_the_caption_loss_is_zero_with_finite_gradients(make_coca, make_batch):
    model, (text, tokens) = make_coca(), make_batch()
    loss = model.loss(text, image_tokens=tokens, labels=torch.full_like(text, IGNORED))
    loss.total.backward()

    assert loss.caption == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_stopping_is_learned_where_eos_is_the_padding(make_coca):
    """Ignoring every pad_id would ignore every end; the first of the trailing ones counts."""
    model = make_coca(pad_id=2, eos_id=2)
    text = torch.tensor([[1, 5, 6, 2, 2, 2], [1, 7, 2, 2, 2, 2]])

    layout = layout_of(text, None, pad_id=2, eos_id=2, num_tokens=23)

    assert layout.lengths.tolist() == [4, 3]
    assert layout.targets().tolist() == [[5, 6, 2, -100, -100], [7, 2, -100, -100, -100]]
    torch.testing.assert_close(model.encode_text(text[:1]), model.encode_text(text[:1, :4]), atol=1e-5, rtol=0)


@pytest.mark.plain
def test_a_row_of_padding_is_refused_by_name(make_coca, make_batch):
    model, (text, tokens) = make_coca(), make_batch()
    text[2] = PAD

    with pytest.raises(ValueError, match=r"only padding in rows \[2\]"):
        model.loss(text, image_tokens=tokens)
