"""A composition is a normal module: hooks on any submodule fire, and replaced or wrapped ones take effect."""

from collections import Counter

import pytest
import torch
from torch import nn

from calm_pytorch import AugmentParams

NEW_TOKENS = 6
SETTINGS = {"temperature": 0.0, "filter_fn": None}


@pytest.fixture
def calls_of():
    """``calls_of(root, run)``: how often each submodule that has a forward is called in ``run()``, by name."""

    def counted(root, run):
        counts, handles = Counter(), []
        for name, module in root.named_modules():
            if name and type(module).forward is not nn.Module.forward:
                counts[name] = 0
                handles.append(module.register_forward_hook(lambda *_, name=name: counts.update([name])))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return dict(counts)

    return counted


@pytest.mark.parametrize("shared", [False, True], ids=["prompt", "shared"])
@pytest.mark.parametrize("kind", ["x-transformers", "llama", "gpt2"])
def test_a_hook_on_every_submodule_fires_as_often_as_the_architecture_says(
    model_of, compose, ids, calls_of, kind, shared
):
    anchor, augment = model_of(kind), model_of(kind, seed=1)
    alone = calls_of(anchor, lambda: anchor(ids(1, 4)))
    params = AugmentParams(augment, connections=[(2, 2), (4, 4)], shared_sequence=shared)
    calm = compose(anchor, params, trained=True)
    prompt = None if shared else ids(1, 5)

    def counts(run):
        """Calls of the anchor's submodules, of the cross-attentions', and of the augment's."""
        found = calls_of(calm, run)
        parts = ("anchor_llm.", "cross_attns.", "augment_llms.0.")
        return [{n.removeprefix(part): c for n, c in found.items() if n.startswith(part)} for part in parts]

    def of_blocks(forwards, contexts):
        once = {"context_proj", "attn.to_k", "attn.to_v"}
        names = ["", ".pre_rmsnorm", ".attn", ".attn.to_q", ".attn.to_v_head_gate", ".attn.to_out"]
        calls = dict.fromkeys(names, forwards) | {f".{name}": contexts for name in once}
        return {f"0.{number}{name}": count for number in range(2) for name, count in calls.items()}

    _, _, read = counts(lambda: calm(ids(1, 4), prompt=prompt, return_loss=False))
    # an augment is left after the last layer that is read
    above = {name for name, count in read.items() if count != alone[name]}
    assert not any(read[name] for name in above)
    assert not any(f".{layer}." in name for name in above for layer in range(4)) or kind == "x-transformers"

    def train():
        calm.train()(ids(1, 5), prompt=prompt).backward()

    for run in (train, lambda: calm(ids(1, 4), prompt=prompt, return_loss=False)):
        assert counts(run) == [alone, of_blocks(1, 1), read]
        calm.eval()
    for cached in (True, False):
        found = counts(lambda: calm.generate(ids(1, 5), 5 + NEW_TOKENS, use_cache=cached, **SETTINGS))  # noqa: B023
        contexts = 1 if cached and not shared else NEW_TOKENS
        # with a cache of its own it runs to its end, so that all its layers know the token
        of_augment = alone if shared and cached else read
        expected = {name: contexts * count for name, count in of_augment.items()}
        assert found[0] == {name: NEW_TOKENS * count for name, count in alone.items()}
        assert found[1:] == [of_blocks(NEW_TOKENS, contexts), expected]


def lora(model, *names):
    """The model with LoRA adapters that are not zero on the layers of these names, put there in place."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(names), init_lora_weights=False), model)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "down_proj")), ("neox", ("query_key_value",)), ("x-transformers", ("to_q", "to_v"))],
)
def test_peft_adapters_of_a_composed_anchor_take_effect(model_of, compose, ids, kind, names, when):
    pytest.importorskip("peft")
    anchor = model_of(kind)
    inputs = {"prompt": ids(2, 4), "return_loss": False}
    plain = compose(model_of(kind), model_of("gpt2", seed=1), trained=True)(ids(2, 6), **inputs)
    calm = compose(lora(anchor, *names) if when == "before" else anchor, model_of("gpt2", seed=1), trained=True)
    if when == "after":
        lora(anchor, *names)
    logits = calm(ids(2, 6), **inputs)
    assert (logits - plain).abs().max() > 1e-2
    assert logits.equal(compose(anchor, model_of("gpt2", seed=1), trained=True)(ids(2, 6), **inputs))
    outs = [calm.generate(ids(1, 5), 5 + NEW_TOKENS, use_cache=use, **SETTINGS) for use in (True, False)]
    assert torch.equal(*outs)
    adapters = [p for name, p in calm.anchor_llm.named_parameters() if "lora_" in name]
    for parameter in adapters:
        parameter.requires_grad = True
    calm(ids(2, 6), prompt=ids(2, 4)).backward()
    last = [p for name, p in calm.anchor_llm.named_parameters() if "lora_" in name and (".3." in name or ".6." in name)]
    assert last
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in last)


def test_peft_adapters_of_cross_attentions_take_effect_and_learn(model_of, compose, ids):
    pytest.importorskip("peft")
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True)
    inputs = {"prompt": ids(2, 4), "return_loss": False}
    plain = calm(ids(2, 6), **inputs)
    lora(calm.cross_attns, "to_q", "to_k", "to_v", "to_out", "context_proj")
    assert (calm(ids(2, 6), **inputs) - plain).abs().max() > 1e-3
    outs = [calm.generate(ids(1, 5), 5 + NEW_TOKENS, use_cache=use, **SETTINGS) for use in (True, False)]
    assert torch.equal(*outs)
    calm(ids(2, 6), prompt=ids(2, 4)).backward()
    adapters = [p for name, p in calm.cross_attns.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 2 * 5
    assert all(float(p.grad.abs().max()) > 0 for p in adapters)


@pytest.mark.filterwarnings("ignore:.*(quantization|quantize).*")
def test_the_learned_part_is_quantised_dynamically(model_of, compose, ids):
    calm = compose(model_of("x-transformers"), model_of("x-transformers", seed=1), trained=True)
    inputs = {"prompt": ids(2, 4), "return_loss": False}
    expected = calm(ids(2, 6), **inputs)
    torch.ao.quantization.quantize_dynamic(calm.cross_attns, {nn.Linear}, dtype=torch.qint8, inplace=True)
    logits = calm(ids(2, 6), **inputs)
    assert not torch.equal(logits, expected)
    assert (logits - expected).abs().max() < 0.2 * expected.std()
