"""The model is a normal module: hooks fire, wrapped and quantised layers take effect, with and without the cache."""

import peft
import pytest
import torch
from torch import nn

from lm_core import generate

CONFIGURATIONS = {
    "memory": {},
    "window": {"xl_max_memories": 5, "clear_memories_on_eos_token_id": 3},
    "sigmoid": {"gate": "sigmoid", "multi_head_keys": True, "memorizing_layers": (1, 3)},
    "gated": {"gate_output": True, "xl_max_memories": 5},
}


def remembering(model, rows=2):
    """The model's memories after a segment, and its XL window."""
    memories = model.create_knn_memories(batch_size=rows)
    result = model(torch.randint(0, 20, (rows, 16)), knn_memories=memories)
    return memories, result[1] if isinstance(result, tuple) else None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_forward_calls_every_submodule_once(name, training, tiny_model, calls_of):
    model, ids = tiny_model(ff_dropout=0.1, attn_dropout=0.1, **CONFIGURATIONS[name]), torch.randint(0, 20, (2, 8))
    memories, window = remembering(model)

    def run():
        labels = ids if training else None
        result = model.train(training)(ids, memories, window, labels)
        if training:
            (result[0] if isinstance(result, tuple) else result).backward()

    assert set(calls_of(model, run).values()) == {1}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(
    ("lengths", "use_cache", "reads"),
    # Segments have 8 tokens. With a cache the prompt is read in segments, and each further token alone; without, the
    # text so far is read in segments for each token: 5 times in 3 and 3 times in 4.
    [((3, 3), True, 1 + 7), ((20, 20), True, 3 + 7), ((20, 5), True, 3 + 7), ((20, 5), False, 5 * 3 + 3 * 4)],
)
def test_generation_calls_every_submodule_once_for_each_piece(name, lengths, use_cache, reads, tiny_model, calls_of):
    model = tiny_model(**CONFIGURATIONS[name])
    prompts = [torch.randint(4, 20, (length,)) for length in lengths]
    calls = calls_of(model, lambda: generate(model, prompts, max_new_tokens=8, use_cache=use_cache))
    assert calls.pop("to_logits") == 8
    assert set(calls.values()) == {reads}


def test_what_a_hook_returns_is_what_the_loss_and_generation_see(tiny_model):
    model, ids = tiny_model(), torch.randint(0, 20, (1, 8))
    model.to_logits.register_forward_hook(lambda module, inputs, output: -output)
    logits = -nn.functional.linear(model.read(ids)[0], model.to_logits.weight, model.to_logits.bias)
    expected = nn.functional.cross_entropy(logits[0], ids[0])
    torch.testing.assert_close(model(ids, labels=ids), expected)
    answer = generate(model, ids, max_new_tokens=1, temperature=0.0)
    assert int(answer.tokens[0, 0]) == int(logits[0, -1].argmax())


def adapted(model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_peft_adapters_on_all_linear_layers_take_effect_and_train(name, tiny_model):
    model, ids = tiny_model(**CONFIGURATIONS[name]), torch.randint(4, 20, (2, 8))
    memories, window = remembering(model)
    reading = {"knn_memories": memories, "xl_memories": window, "add_knn_memory": False}

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    plain = first(model(ids, **reading)).detach()
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    wrapped = adapted(model)
    assert (first(wrapped(ids, **reading)) - plain).abs().max() > 0.1
    with wrapped.disable_adapter():
        torch.testing.assert_close(first(wrapped(ids, **reading)), plain)

    first(wrapped.train()(ids, labels=ids, **reading)).backward()
    trained = {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * linears
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained.values())
    assert all(weight.grad is None for name, weight in wrapped.named_parameters() if name not in trained)


def test_adapted_models_generate_are_saved_and_merged(tiny_model, tmp_path, read_in_segments):
    ids = torch.randint(0, 20, (1, 19))
    model = adapted(tiny_model(xl_max_memories=5))
    generated = generate(model, ids, max_new_tokens=8, temperature=0.0)
    text = torch.cat((ids, generated.tokens), dim=1)
    logits, _ = read_in_segments(model, text, model.create_knn_memories(batch_size=1))
    assert torch.equal(logits[0, 18:-1].argmax(dim=-1), generated.tokens[0])

    wanted = model(ids)[0].detach()
    model.save_pretrained(tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(tiny_model(xl_max_memories=5), tmp_path / "adapter").double()
    torch.testing.assert_close(opened(ids)[0], wanted)
    merged = opened.merge_and_unload()
    torch.testing.assert_close(merged(ids)[0], wanted)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(type(merged).from_pretrained(tmp_path / "merged").eval()(ids)[0], wanted)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_quantises_every_linear_layer_and_still_decodes(tiny_model, read_in_segments):
    model, ids = tiny_model(xl_max_memories=5).float(), torch.randint(0, 20, (1, 19))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    difference = (quantised(ids)[0] - model(ids)[0]).abs().max()
    assert 0 < difference < 0.3 * model(ids)[0].std()
    assert torch.isfinite(quantised(ids, labels=ids)[0])
    generated = generate(quantised, ids, max_new_tokens=8, temperature=0.0)
    assert generated.tokens.shape == (1, 8)
