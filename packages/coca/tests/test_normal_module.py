"""CoCa is a normal module: each submodule is called, so hooks fire and replacements have an effect."""

from collections import Counter

import pytest
import torch
from torch import nn

STEPS = 5
# Text or images alone: the other half of the model has nothing to do.
LATENTS_ONLY = ("text_cls_norm", "text_to_latents", "image_to_latents")


def count_calls(model, run):
    """Calls of every submodule during ``run()``."""
    calls, handles = Counter(), []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            calls[name] = 0
            handles.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@pytest.fixture
def pairs(make_batch):
    return make_batch()[0], torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["shared", "cascade"])
@pytest.mark.parametrize("training", [True, False])
def test_every_submodule_is_called_once_for_both_losses(make_coca, pairs, pooling, training):
    model, (text, images) = make_coca(vit=True, pooling=pooling).train(training), pairs

    calls = count_calls(model, lambda: model.loss(text, images))

    # Each half of the decoder has its own range of positions: the lower one also that of CLS.
    assert calls.pop("rotary") == 2
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("lengths", [[2, 2, 2, 2], [3, 1, 2, 2]])
def test_every_submodule_of_the_decoder_is_called_for_every_token(make_coca, pairs, beams, use_cache, lengths):
    model, images = make_coca(vit=True).eval(), pairs[1]
    prefix = [torch.arange(3, 3 + length) for length in lengths]
    settings = {"prefix": prefix, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "beams": beams}

    calls = count_calls(model, lambda: model.generate(images, use_cache=use_cache, **settings))

    for name, count in calls.items():
        if name.startswith(("img_encoder", "pooling")):
            expected = 1
        elif name in LATENTS_ONLY:
            expected = 0
        elif name.endswith(("cross_attention.to_kv", "cross_attention.context_norm")) and use_cache:
            expected = 1  # the image is the same for every token
        else:
            expected = STEPS
        assert count == expected, name


class Scaled(nn.Module):
    """A user's replacement for a submodule."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **settings):
        return -3 * self.module(*inputs, **settings)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_takes_the_place_of_a_submodule_has_an_effect_with_and_without_a_cache(make_coca, pairs, beams):
    names = [
        name
        for name, module in make_coca(vit=True).named_modules()
        if name and not list(module.children()) and name not in (*LATENTS_ONLY, "rotary")
    ]
    names.remove("token_emb")  # its weight is the output layer's
    text, images = pairs
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "beams": beams, "prefix": text[:, :2]}
    plain = make_coca(vit=True).eval()
    before = plain(text, images)
    assert len(names) > 20
    for name in names:
        model = make_coca(vit=True).eval()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Scaled(model.get_submodule(name)))

        assert not torch.allclose(model(text, images), before, atol=1e-4), name
        cached, uncached = (model.generate(images, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, uncached), name


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_all_linear_layers_change_captions_train_merge_and_save(make_coca, pairs, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    (text, images), base = pairs, make_coca(vit=True).eval()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "prefix": text[:, :2]}
    before = base.generate(images, **settings)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model = adapted.base_model.model
    assert not torch.equal(model.generate(images, **settings), before)
    assert torch.equal(model.generate(images, **settings), model.generate(images, use_cache=False, **settings))

    adapted(text, images, return_loss=True).backward()

    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    linears = [module for module in make_coca(vit=True).modules() if isinstance(module, nn.Linear)]
    assert len(adapters) == 2 * len(linears)
    for name, parameter in adapters.items():
        assert bool(parameter.grad.abs().sum() > 0), name
    adapted.eval()
    expected = adapted(text, images)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(adapted.merge_and_unload()(text, images), expected, atol=1e-4, rtol=1e-4)
    again = peft.PeftModel.from_pretrained(make_coca(vit=True), tmp_path).eval()
    torch.testing.assert_close(again(text, images), expected, atol=1e-5, rtol=1e-5)
