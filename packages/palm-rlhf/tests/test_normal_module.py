"""PaLM is a normal module: hooks fire, wrapped and quantised layers take effect, with and without the cache."""

from functools import partial

import peft
import pytest
import torch
from torch import nn

from lm_core import generate
from lm_core.nn.parallel_block import ParallelBlock

SCOPE = {"finetune_scopes": ("actor",)}


@pytest.mark.parametrize("changes", [{}, {"qk_rmsnorm": True}, {"kv_heads": 2}, {"causal": False}, SCOPE])
def test_a_forward_calls_every_submodule_once(changes, make_palm, calls_of):
    palm, ids = make_palm(**changes), torch.tensor([[1, 2, 3], [4, 5, 6]])
    forward = partial(palm, ids, finetune_scope="actor" if changes == SCOPE else None)
    assert set(calls_of(palm, forward).values()) == {1}
    if palm.causal:
        palm.train()
        assert set(calls_of(palm, lambda: forward(return_loss=True).backward()).values()) == {1}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scope", [None, "actor"])
def test_generation_calls_every_submodule_once_for_each_token(scope, use_cache, padded, make_palm, calls_of):
    palm = make_palm(**SCOPE)
    prompt = [torch.tensor([1, 2, 3]), torch.tensor([4] if padded else [4, 5, 6])]
    calls = calls_of(palm, lambda: generate(palm, prompt, max_new_tokens=8, use_cache=use_cache, finetune_scope=scope))
    adapters = {name: count for name, count in calls.items() if name.startswith("finetune_modules.")}
    assert set(adapters.values()) == {8 if scope else 0}
    assert {count for name, count in calls.items() if name not in adapters} == {8}


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_a_hook_returns_is_what_the_next_layers_see(use_cache, make_palm):
    palm, prompt = make_palm(), torch.tensor([[1, 2, 3]])
    for block in palm.blocks():
        block.proj_out.register_forward_hook(lambda module, inputs, output: output * 0)
    token, answer = prompt[:, -1], palm.generate(prompt=prompt, max_new_tokens=4, temperature=0.0, use_cache=use_cache)
    for answered in answer[0]:
        token = (palm.norm(palm.token_emb(token)) @ palm.output_weight.T).argmax(-1)
        assert token == answered


def adapted(palm):
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    return peft.get_peft_model(palm, config)


def test_peft_adapters_on_all_linear_layers_take_effect_with_and_without_the_cache(make_palm):
    palm, prompt = make_palm().double(), torch.tensor([[1, 2, 3]])
    before = palm(prompt).detach()
    model = adapted(palm)
    assert (model(prompt) - before).abs().max() > 0.1
    cached = generate(model, prompt, max_new_tokens=8, temperature=0.0)
    uncached = generate(model, prompt, max_new_tokens=8, temperature=0.0, use_cache=False)
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.log_probs, uncached.log_probs, rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(prompt), before)


def test_peft_adapters_on_all_linear_layers_train_and_only_they(make_palm):
    model = adapted(make_palm()).train()
    model(torch.tensor([[1, 2, 3, 4]]), return_loss=True).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = sum(isinstance(module, ParallelBlock) for module in model.modules())
    assert len(trained) == layers * 2 * 2  # A and B of both projections
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained.values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_peft_adapters_on_all_linear_layers_are_saved_loaded_and_merged(make_palm, tmp_path):
    ids = torch.tensor([[1, 2, 3, 4]])
    model = adapted(make_palm())
    wanted = model(ids).detach()
    model.save_pretrained(tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(make_palm(), tmp_path / "adapter")
    torch.testing.assert_close(opened(ids), wanted)
    merged = opened.merge_and_unload()
    torch.testing.assert_close(merged(ids), wanted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(type(merged).from_pretrained(tmp_path / "merged").eval()(ids), merged(ids))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_quantises_every_linear_layer_and_still_decodes(make_palm):
    palm, prompt = make_palm(), torch.tensor([[1, 2, 3]])
    quantised = torch.ao.quantization.quantize_dynamic(palm, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    difference = (quantised(prompt) - palm(prompt)).abs().max()
    assert 0 < difference < 0.2 * palm(prompt).std()
    cached = generate(quantised, prompt, max_new_tokens=20, temperature=0.0)
    ids = torch.cat((prompt, cached.tokens), dim=1)
    assert torch.equal(quantised(ids)[0, 2:-1].argmax(-1), cached.tokens[0])
