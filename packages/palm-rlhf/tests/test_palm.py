"""PaLM's forward against an independent float64 implementation (``conftest``)."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf import PaLM

many = settings(deadline=None, derandomize=True, max_examples=40)


def ids_of(drawn, rows, n):
    return torch.randint(drawn.settings["num_tokens"], (rows, n), generator=drawn.generator)


@many
@given(seed=st.integers(0, 100_000), n=st.integers(1, 9))
def test_logits_equal_the_naive_implementation(seed, n, random_model, naive_logits):
    drawn = random_model(seed)
    ids = ids_of(drawn, 2, n)
    for logits, row in zip(drawn.palm.double()(ids), ids, strict=True):
        exact = naive_logits(drawn.palm, row, settings=drawn.settings)
        torch.testing.assert_close(logits, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("qk_rmsnorm", [False, True])
def test_float32_logits_are_right_to_float32_rounding(qk_rmsnorm, make_palm, naive_logits, small_settings):
    palm, ids = make_palm(qk_rmsnorm=qk_rmsnorm), torch.randint(13, (70,))
    exact = naive_logits(palm, ids, settings={**small_settings, "qk_rmsnorm": qk_rmsnorm})
    torch.testing.assert_close(palm(ids[None])[0].double(), exact, rtol=1e-5, atol=1e-5)


def padded_to(rows, side, generator, vocabulary):
    """Rows of different lengths with random ids as padding, and their mask."""
    longest = max(len(row) for row in rows) + 1
    ids = torch.randint(vocabulary, (len(rows), longest), generator=generator)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0 if side == "right" else longest - len(row)
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = True
    return ids, mask


@many
@given(seed=st.integers(0, 100_000), side=st.sampled_from(["left", "right"]), qk_rmsnorm=st.booleans())
def test_padding_changes_no_logits_of_real_tokens(seed, side, qk_rmsnorm, random_model):
    drawn = random_model(seed)
    rows = [ids_of(drawn, 1, n)[0] for n in (5, 1, 3)]
    ids, mask = padded_to(rows, side, drawn.generator, drawn.settings["num_tokens"])
    before = mask.clone()
    logits = drawn.palm(ids, mask=mask)
    assert logits.isfinite().all()
    assert torch.equal(mask, before)
    for number, row in enumerate(rows):
        torch.testing.assert_close(logits[number][mask[number]], drawn.palm(row[None])[0], rtol=1e-5, atol=1e-5)


@many
@given(seed=st.integers(0, 100_000))
def test_packed_documents_equal_each_document_alone(seed, random_model):
    drawn = random_model(seed)
    documents = [[ids_of(drawn, 1, n)[0] for n in lengths] for lengths in ((4, 1, 3), (2, 6))]
    ids = torch.stack([torch.cat(row) for row in documents])
    numbers = [torch.cat([torch.full((len(d),), 7 - k) for k, d in enumerate(row)]) for row in documents]
    logits = drawn.palm(ids, document_ids=torch.stack(numbers))
    for row, parts in zip(logits, documents, strict=True):
        for piece, document in zip(row.split([len(d) for d in parts]), parts, strict=True):
            torch.testing.assert_close(piece, drawn.palm(document[None])[0], rtol=1e-5, atol=1e-5)


@many
@given(seed=st.integers(0, 100_000))
def test_an_encoder_masks_negative_ids_and_sees_both_sides(seed, random_model, make_palm, naive_logits):
    drawn = random_model(seed)
    config = {**drawn.settings, "causal": False}
    palm, ids = make_palm(seed, **config), ids_of(drawn, 2, 6)
    ids[0, 4:] = -1
    logits = palm(ids)
    for row, length in ((0, 4), (1, 6)):
        everywhere = torch.ones(length, length, dtype=torch.bool)
        exact = naive_logits(palm, ids[row, :length], settings=config, visible=everywhere)
        torch.testing.assert_close(logits[row, :length].double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(palm(ids.clamp(min=0), mask=ids >= 0)[0, :4], logits[0, :4])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_cross_entropy_of_the_next_real_token(side, make_palm, naive_logits, small_settings):
    palm, generator = make_palm(), torch.Generator().manual_seed(0)
    rows = [torch.randint(13, (n,), generator=generator) for n in (6, 2, 4)]
    ids, mask = padded_to(rows, side, generator, 13)
    losses = [
        F.cross_entropy(naive_logits(palm, row, settings=small_settings)[:-1], row[1:], reduction="sum") for row in rows
    ]
    expected = sum(losses) / sum(len(row) - 1 for row in rows)
    assert palm(ids, mask=mask, return_loss=True).item() == pytest.approx(expected.item(), rel=1e-6)
    assert palm(ids, mask=mask, return_loss=True, loss_normalizer=100.0).item() == pytest.approx(
        sum(losses).item() / 100, rel=1e-6
    )
    plain = F.cross_entropy(palm(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(palm(ids, return_loss=True), plain)


def test_gradients_of_the_loss_are_those_of_the_plain_loss(make_palm):
    palm, ids = make_palm().double(), torch.randint(13, (2, 7))
    palm(ids, return_loss=True).backward()
    ours = {name: parameter.grad.clone() for name, parameter in palm.named_parameters()}
    palm.zero_grad()
    F.cross_entropy(palm(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in palm.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)
        assert parameter.grad.ne(0).any()


def test_the_loss_of_packed_documents_is_the_mean_over_their_tokens(make_palm):
    palm = make_palm()
    documents = [torch.randint(13, (n,)) for n in (5, 1, 4)]
    numbers = torch.cat([torch.full((len(d),), k) for k, d in enumerate(documents)])
    packed = palm(torch.cat(documents)[None], document_ids=numbers[None], return_loss=True)
    alone = [palm(d[None], return_loss=True, loss_normalizer=1.0) for d in documents if len(d) > 1]
    torch.testing.assert_close(packed, sum(alone) / 7)  # 4 + 3 predictions; none from one document into the next


def test_a_real_zero_counts_in_the_loss_unless_it_is_the_ignored_label(make_palm):
    ids = torch.tensor([[3, 0, 0, 5]])
    palm = make_palm()
    losses = -palm(ids).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).flatten()
    torch.testing.assert_close(palm(ids, return_loss=True), losses.mean())
    ignoring = make_palm(cross_entropy_ignore_index=0)
    torch.testing.assert_close(ignoring(ids, return_loss=True), losses[2])


def test_features_are_returned_alone_or_with_the_logits(make_palm):
    palm, ids = make_palm(), torch.randint(13, (2, 5))
    features, (logits, alongside) = palm(ids, return_only_embedding=True), palm(ids, return_logits_with_embedding=True)
    assert features.shape == (2, 5, 16)
    assert torch.equal(features, alongside)
    assert torch.equal(features, palm.hidden(ids))
    assert torch.equal(logits, palm(ids))
    torch.testing.assert_close(logits, features @ palm.output_weight.T)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16), (2, 1, 16), (5, 16), (2, 5, 16)])
def test_an_extra_embedding_is_added_to_the_tokens(shape, make_palm, naive_logits, small_settings):
    palm, ids, extra = make_palm(), torch.randint(13, (2, 5)), torch.randn(shape)
    logits = palm(ids, extra_embed=extra)
    for row in range(2):
        exact = naive_logits(palm, ids[row], settings=small_settings, extra=extra.double().expand(2, 5, 16)[row])
        torch.testing.assert_close(logits[row].double(), exact, rtol=1e-5, atol=1e-5)
    loss = palm(ids, extra_embed=extra, return_loss=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("changes", [{}, {"attn_dropout": 0.2, "ff_dropout": 0.3}, {"qk_rmsnorm": True}])
def test_gradient_checkpointing_changes_no_gradient(changes, make_palm):
    gradients = []
    for gradient_checkpointing in (False, True):
        palm = make_palm(gradient_checkpointing=gradient_checkpointing, **changes).train()
        torch.manual_seed(1)
        palm(torch.arange(12).reshape(2, 6), return_loss=True).backward()
        gradients.append([parameter.grad for parameter in palm.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_set_dropout_reaches_attention_and_feed_forward_and_returns_the_model(make_palm, monkeypatch):
    seen, attention, dropout = [], F.scaled_dot_product_attention, F.dropout

    def spied_attention(q, k, v, mask, p, *rest, **named):
        seen.append(("attention", p))
        return attention(q, k, v, mask, p, *rest, **named)

    def spied_dropout(x, p):
        seen.append(("feed-forward", p))
        return dropout(x, p)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied_attention)
    monkeypatch.setattr(F, "dropout", spied_dropout)
    ids, palm = torch.arange(12).reshape(2, 6), make_palm()
    assert palm.set_dropout(0.4) is palm
    still = palm(ids)
    assert not torch.allclose(palm.train()(ids), still)
    torch.testing.assert_close(palm.set_dropout(0.0)(ids), still)
    assert seen == [("attention", 0.0)] * 2 + [("attention", 0.4), ("feed-forward", 0.4)] * 2 + [("attention", 0.0)] * 2


@pytest.mark.parametrize("qk_rmsnorm", [False, True])
def test_bfloat16_autocast_is_finite_and_near_float32(qk_rmsnorm, make_palm):
    palm, ids = make_palm(qk_rmsnorm=qk_rmsnorm).train(), torch.randint(13, (2, 40))
    exact = palm(ids, return_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = palm.hidden(ids)
        loss = palm(ids, return_loss=True)
    assert features.dtype == torch.float32  # the residual stream stays wide
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in palm.parameters())


def test_a_bfloat16_model_is_near_its_float32_self(make_palm):
    palm, ids = make_palm(qk_rmsnorm=True), torch.randint(13, (1, 300))
    exact = palm(ids)
    error = (palm.bfloat16()(ids).float() - exact).abs()
    assert error.max() < 0.06 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_may_be_of_any_integer_dtype(dtype, make_palm):
    palm, ids = make_palm(), torch.tensor([[1, 2, 3, 12]])
    assert torch.equal(palm(ids.to(dtype)), palm(ids))
    mask = torch.tensor([[True, True, True, False]])
    assert torch.equal(palm(ids.to(dtype), mask=mask, return_loss=True), palm(ids, mask=mask, return_loss=True))


ORDERS = """
import json
from palm_rlhf import PaLM
palm = PaLM(dim=8, num_tokens=5, depth=3, heads=2, dim_head=4, qk_rmsnorm=True, finetune_scopes=("actor", "critic"))
names = {id(parameter): name for name, parameter in palm.named_parameters()}
orders = [[names[id(p)] for p in group] for group in (palm.palm_parameters(), palm.finetune_parameters("actor"))]
"""


def test_parameters_come_in_the_same_order_in_every_process():
    here = {}
    exec(ORDERS, here)
    command = [sys.executable, "-c", ORDERS + "print(json.dumps(orders))"]
    environment = {**os.environ, "PYTHONHASHSEED": "0" if os.environ.get("PYTHONHASHSEED") != "0" else "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == here["orders"]
    base, actor = here["orders"]
    assert base[0] == "token_emb.weight"
    assert len(set(base)) == len(base) == 2 + 3 * 5
    assert len(set(actor)) == len(actor) > 0
    assert all("actor" in name for name in actor)


def test_initial_weights_follow_the_table(small_settings):
    torch.manual_seed(0)
    palm = PaLM(**{**small_settings, "dim": 64, "num_tokens": 500})
    assert palm.token_emb.weight.std().item() == pytest.approx(0.02, rel=0.05)
    attention, feed_forward = palm.layers[0].proj_out.weight.split((32, 128), dim=1)
    for weight in (palm.layers[0].proj_in.weight, attention, feed_forward):
        bound = weight.shape[1] ** -0.5
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert weight.abs().mean().item() == pytest.approx(bound / 2, rel=0.05)
    assert palm.output_weight is palm.token_emb.weight
    assert sum(p.numel() for p in palm.parameters()) == 64 * 500 + 64 + 2 * (64 + 64 * (64 + 256) + 64 * 160)
