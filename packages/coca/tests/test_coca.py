"""The model: poolings, embeddings, gradients, dtypes, compilation, checkpoints; conversion from the original."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coca import CoCa, ImagePreprocessing, VisionTransformer
from coca.interop import from_coca_pytorch

GOLDEN = Path(__file__).parent / "golden"
POOLINGS = ["shared", "parallel", "cascade"]


def naive_pool(pooler, tokens):
    """Attention of the learned queries, by definition: heads h, queries i, keys m."""
    attention = pooler.attention
    context = F.layer_norm(tokens, tokens.shape[-1:], attention.context_norm.gamma, None)
    x = F.layer_norm(pooler.queries, pooler.queries.shape[-1:], attention.norm.gamma, None)
    keys, values = (context @ attention.to_kv.weight.T).chunk(2, -1)
    queries = (x @ attention.proj_in.weight.T).view(len(x), attention.heads, -1)
    scores = torch.einsum("ihd,bmd->bhim", queries, keys) * queries.shape[-1] ** -0.5
    out = torch.einsum("bhim,bmd->bihd", scores.softmax(-1), values).flatten(2) @ attention.proj_out.weight.T
    return F.layer_norm(out, out.shape[-1:], pooler.norm.gamma, None)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_attention_of_learned_queries(make_coca, make_batch, pooling):
    model, (_, tokens) = make_coca(pooling=pooling).double(), make_batch(dtype=torch.float64)
    pooled = naive_pool(model.pooling.caption, tokens)
    if pooling == "shared":
        expected = pooled[:, 0], pooled[:, 1:]
    else:
        source = pooled if pooling == "cascade" else tokens
        expected = naive_pool(model.pooling.contrastive, source)[:, 0], pooled

    embedding, found = model.embed_image(image_tokens=tokens)

    torch.testing.assert_close(embedding, expected[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(found, expected[1], atol=1e-10, rtol=0)
    assert found.shape == (4, 4, 16)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_is_trained_by_the_loss(make_coca, make_batch, pooling):
    model, (text, _) = make_coca(vit=True, pooling=pooling), make_batch()
    model(text, torch.randn(4, 1, 8, 8), return_loss=True).backward()

    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []


def test_forward_keeps_the_originals_call_forms(make_coca, make_batch):
    model, (text, _) = make_coca(vit=True, caption_loss_weight=0.5, contrastive_loss_weight=2.0), make_batch()
    images = torch.randn(4, 1, 8, 8)
    tokens = model.img_encoder(images)

    logits = model(text, images)
    total, parts = model(text, images, None, None, True), model.loss(text, images)
    embeddings = model(text=text, image_tokens=tokens, return_embeddings=True)

    assert logits.shape == (4, 7, 23)
    torch.testing.assert_close(total, parts.total)
    torch.testing.assert_close(total, 0.5 * parts.caption + 2 * parts.contrastive)
    torch.testing.assert_close(logits, model(text, image_tokens=tokens))
    torch.testing.assert_close(embeddings[0], model.embed_text(text)[0])
    torch.testing.assert_close(embeddings[1], model.embed_image(images)[0])


def test_latents_have_unit_length_and_embeddings_have_not(make_coca, make_batch):
    """The original offered un-projected vectors as CLIP-like embeddings."""
    model, (text, tokens) = make_coca(), make_batch()

    for latents in (model.encode_text(text), model.encode_image(image_tokens=tokens)):
        torch.testing.assert_close(latents.norm(dim=-1), torch.ones(4))
        assert latents.shape == (4, 10)
    raw = model(text, image_tokens=tokens, return_embeddings=True)
    assert raw[0].shape == (4, 16)
    assert (raw[0].norm(dim=-1) - 1).abs().min() > 0.1


def test_text_is_embedded_without_an_image_and_no_image_is_refused_with_a_reason(make_coca, make_batch):
    model, (text, _) = make_coca(), make_batch()

    embedding, image = model(text, return_embeddings=True)

    assert image is None
    torch.testing.assert_close(embedding, model.embed_text(text)[0])
    with pytest.raises(ValueError, match="give images or image_tokens, got neither"):
        model.embed_image(None, None)


@pytest.mark.parametrize("stored", [math.log(100) + 1, 100.0])
def test_the_logit_scale_never_exceeds_its_bound(make_coca, make_batch, stored):
    model, (text, tokens) = make_coca(), make_batch()
    with torch.no_grad():
        model.log_logit_scale.fill_(stored)
    loss = model.loss(text, image_tokens=tokens)
    loss.total.backward()

    assert model.logit_scale.item() == pytest.approx(100, rel=1e-5)
    assert bool(loss.total.isfinite())
    assert float(model.log_logit_scale.grad) != 0  # it can come back
    model.clamp_logit_scale_()
    assert model.log_logit_scale.item() == pytest.approx(math.log(100))


def test_the_logit_scale_starts_at_its_default_or_argument(make_coca):
    assert make_coca().logit_scale.item() == pytest.approx(1 / 0.07)
    assert make_coca(loss="sigmoid").logit_scale.item() == pytest.approx(10)
    assert make_coca(init_logit_scale=5.0, max_logit_scale=20.0).logit_scale.item() == pytest.approx(5)


def test_training_works_after_inference_mode(make_coca, make_batch):
    """A mask that was cached under inference_mode broke the original's next training step."""
    model, (text, tokens) = make_coca(), make_batch()
    with torch.inference_mode():
        model(text, image_tokens=tokens)

    model.loss(text, image_tokens=tokens).total.backward()

    assert bool(model.token_emb.weight.grad.isfinite().all())


def test_positions_stay_distinct_in_bfloat16(make_coca):
    """A rotary table cast to bfloat16 kept 407 of 600 positions apart."""
    model = make_coca().bfloat16()
    cos, sin = model.rotary(torch.arange(600), torch.bfloat16)

    assert len(torch.cat((cos, sin), dim=-1).unique(dim=0)) == 600
    for found, exact in zip((cos, sin), make_coca().rotary(torch.arange(600), torch.float64), strict=True):
        assert (found - exact).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_autocast_to_half_precision_is_near_float32(make_coca, make_batch, loss, dtype):
    model, (text, _) = make_coca(vit=True, loss=loss), make_batch()
    images = torch.randn(4, 1, 8, 8)
    exact = model.loss(text, images)
    with torch.autocast("cpu", dtype=dtype):
        rough = model.loss(text, images)
        captions = model.generate(images, max_new_tokens=10, min_new_tokens=10)
    rough.total.backward()

    assert captions.shape == (4, 10)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert rough.total.dtype == torch.float32
    torch.testing.assert_close(rough.caption, exact.caption, atol=0.1, rtol=0)
    torch.testing.assert_close(rough.contrastive, exact.contrastive, atol=0.3, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(make_coca, make_batch):
    text, _ = make_batch()
    images = torch.randn(4, 1, 8, 8)
    gradients = []
    for enabled in (False, True):
        model = make_coca(vit=True, gradient_checkpointing=enabled)
        model.img_encoder.encoder.gradient_checkpointing = enabled
        model.loss(text, images).total.backward()
        gradients.append([p.grad for p in model.parameters()])

    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=0)


@pytest.mark.plain
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_training_forward_compiles_without_graph_breaks(make_coca, make_batch, loss):
    model, (text, _) = make_coca(vit=True, loss=loss), make_batch()
    images = torch.randn(4, 1, 8, 8)
    expected = model(text, images, return_loss=True)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(text, images, return_loss=True)
    found.backward()

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert bool(model.token_emb.weight.grad.isfinite().all())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_saved_model_opens_again(make_coca, make_batch, tmp_path, pooling):
    model, (text, _) = make_coca(vit=True, pooling=pooling).eval(), make_batch()
    model.preprocessing = ImagePreprocessing(image_size=8, channels=1, mean=(0.1,), std=(0.2,))
    images = torch.randn(4, 1, 8, 8)

    model.save_pretrained(tmp_path / "model")
    again = CoCa.from_pretrained(tmp_path / "model").eval()

    assert torch.equal(again(text, images), model(text, images))
    assert again.preprocessing == model.preprocessing
    assert isinstance(again.img_encoder.encoder, VisionTransformer)


def test_a_checkpoint_of_the_first_version_gives_its_results():
    model = CoCa.from_pretrained(GOLDEN / "coca-2.0.0").eval()
    expected = json.loads((GOLDEN / "coca-2.0.0.json").read_text("utf-8"))
    text = (torch.arange(3 * 5).view(3, 5) * 7) % 8 + 3
    images = torch.sin(torch.arange(3 * 16) * 0.37).view(3, 1, 4, 4)

    loss = model.loss(text, images)

    torch.testing.assert_close(model(text, images), torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)
    assert [loss.caption.item(), loss.contrastive.item()] == pytest.approx(expected["losses"], abs=1e-5)
    assert model.generate(images, max_new_tokens=6).tolist() == expected["captions"]
    assert model.preprocessing == ImagePreprocessing(image_size=4, channels=1)


# ------------------------------------------------------------------------------------------------- the original


def original_state(golden):
    """The weights of golden/make_original.py, by the same formula."""
    state = {}
    for number, name in enumerate(golden["order"]):
        if name not in golden["shapes"] or "inv_freq" in name:
            continue
        shape = golden["shapes"][name]
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + number).view(shape)
        state[name] = (1 + 0.3 * wave if "gamma" in name else wave / math.sqrt(shape[-1])).float()
    # The tied output layer was written last.
    state["token_emb.weight"] = state["to_logits.1.weight"]
    return state


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "original.json").read_text("utf-8"))


def test_the_originals_weights_give_the_originals_results(golden):
    model = from_coca_pytorch(original_state(golden))
    text = (torch.arange(3 * 7).view(3, 7) * 5) % 23 + 1
    tokens = torch.sin(torch.arange(3 * 5 * 20) * 0.37).view(3, 5, 20)
    padded = text.clone()
    padded[1, 5:] = 0
    embeddings = model(text, image_tokens=tokens, return_embeddings=True)

    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(model(text, image_tokens=tokens)[:, ::3, ::5], torch.tensor(golden["logits"]), **close)
    assert model.loss(text, image_tokens=tokens).caption.item() == pytest.approx(golden["caption_loss"], abs=1e-5)
    found = model.loss(padded, image_tokens=tokens).caption.item()
    assert found == pytest.approx(golden["caption_loss_padded"], abs=1e-5)
    torch.testing.assert_close(embeddings[1][:, ::4], torch.tensor(golden["image_embeds"]), **close)
    torch.testing.assert_close(embeddings[0][:, ::4], torch.tensor(golden["text_embeds"]), **close)
    temperature = original_state(golden)["temperature"].item()
    assert model.logit_scale.item() == pytest.approx(min(100.0, math.exp(temperature)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_originals_encoder_is_converted_with_it(golden, dtype):
    weight = torch.randn(20, 3, 4, 4)
    state = {name: value.to(dtype) for name, value in original_state(golden).items()} | {"img_encoder.weight": weight}

    model = from_coca_pytorch(state, img_encoder=nn.Conv2d(3, 20, 4, 4, bias=False))

    assert torch.equal(model.img_encoder.encoder.weight, weight.to(dtype))
    assert model.encode_image(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype
    with pytest.raises(ValueError, match="pass img_encoder="):
        from_coca_pytorch(state)
