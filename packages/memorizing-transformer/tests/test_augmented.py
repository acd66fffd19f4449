"""A memory for transformers models: equal to the model while its gates are closed, and to its definition when open."""

import copy
import math
import os

import pytest
import torch
from torch.nn.functional import normalize

from lm_core import beam_search, generate
from lm_core.losses.losses import token_log_probs
from memorizing_transformer import MemoryAugmentedLM

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 128}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "Llama": {**SIZES, **GROUPED},
    "Mistral": {**SIZES, **GROUPED, "sliding_window": 6},
    "Qwen2": {**SIZES, "num_key_value_heads": 2},
    "Qwen3": {**SIZES, **GROUPED},
    "Gemma2": {**SIZES, **GROUPED, "sliding_window": 6},
    "Gemma3": {**SIZES, **GROUPED, "sliding_window": 6},
    "GPT2": {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "GPTNeoX": SIZES,
}


def pretrained(name, seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(
        config(**ARCHITECTURES[name], **ids)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.double().eval()


def augmented(name, *, is_open=True, **settings):
    defaults = {"layers": (2, 3), "segment_length": 8, "window": 6, "num_retrieved": 4, "max_memories": 40}
    model = MemoryAugmentedLM(pretrained(name), **{**defaults, **settings}).double().eval()
    if is_open:
        for reader in model.readers:
            torch.nn.init.normal_(reader.gate, mean=0.5)
    return model


def logits_of(model, ids, window):
    """The model's own logits of the last tokens after a window."""
    with torch.no_grad():
        return model(input_ids=torch.cat((window, ids), dim=1)).logits[:, window.shape[1] :]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_closed_gates_it_is_the_model_and_the_model_stays_as_it_was(name):
    model = augmented(name, is_open=False, gate="tanh")
    base, ids = model.model, torch.randint(3, 50, (2, 40))
    before = copy.deepcopy(base.state_dict())
    state, memories = None, model.create_knn_memories(batch_size=2)
    for at in range(0, 40, 8):
        logits, state = model(ids[:, at : at + 8], knn_memories=memories, xl_memories=state)
        assert torch.equal(logits, logits_of(base, ids[:, at : at + 8], ids[:, max(0, at - 6) : at]))
    assert memories.sizes == [[34, 34], [34, 34]]
    for reader in model.readers:
        reader.gate.data.fill_(1.0)
    logits, _ = model(ids[:, :8], knn_memories=memories, add_knn_memory=False)
    assert not torch.equal(logits, logits_of(base, ids[:, :8], ids[:, :0]))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in base.modules())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"readers.{i}.{part}" for i in range(2) for part in ("gate", "log_scale")
    }


@pytest.mark.plain
@pytest.mark.parametrize("name", ARCHITECTURES if os.environ.get("LM_LONG") else ["Llama", "GPT2"])
@pytest.mark.parametrize("settings", [{}, {"window": 0}, {"clear_memories_on_eos_token_id": 3}])
def test_a_text_is_scored_as_it_was_generated(name, settings):
    model = augmented(name, **settings)
    for length in (3, 19):
        prompt = torch.randint(4, 12, (2, length))
        result = generate(model, prompt, max_new_tokens=14, generator=torch.Generator().manual_seed(length))
        scores = token_log_probs(model, torch.cat((prompt, result.tokens), dim=1))
        torch.testing.assert_close(scores[:, length - 1 :].float(), result.log_probs, atol=1e-5, rtol=0)
    uncached = generate(model, prompt, max_new_tokens=6, temperature=0.0, use_cache=False)
    cached = generate(model, prompt, max_new_tokens=6, temperature=0.0)
    assert torch.equal(uncached.tokens, cached.tokens)


@pytest.mark.plain
@pytest.mark.parametrize("name", ["Gemma2"])
@pytest.mark.parametrize("settings", [{}, {"window": 0, "clear_memories_on_eos_token_id": 3}])
def test_rows_of_different_lengths_go_as_each_alone(name, settings):
    model = augmented(name, **settings)
    prompts = [torch.randint(3, 12, (length,)) for length in (3, 12, 19, 8)]
    together = generate(model, prompts, max_new_tokens=20, temperature=0.0)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], max_new_tokens=20, temperature=0.0)
        torch.testing.assert_close(together.log_probs[row], alone.log_probs[0], atol=1e-5, rtol=0)
    ids = torch.stack([torch.cat((torch.zeros(19 - len(row), dtype=torch.long), row)) for row in prompts])
    mask = torch.stack([torch.arange(19) >= 19 - len(row) for row in prompts])
    scores = token_log_probs(model, ids, mask=mask)
    for row, prompt in enumerate(prompts):
        own = token_log_probs(model, prompt[None])[0]
        torch.testing.assert_close(scores[row, 19 - len(prompt) :], own, atol=1e-9, rtol=0)
    beams = beam_search(model, prompts[1][None], beams=1, max_new_tokens=9)
    assert torch.equal(beams.tokens[0], together.tokens[1, :9])


def naive(model, ids, layer):
    """Outputs of the attention of ``layer`` for the third segment, from the definition, in loops."""
    attention = model.model.model.layers[layer - 1].self_attn
    seen = {}
    hook = attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    at_output = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(local=args[0]))
    hidden, local = [], []
    for start in (0, 8, 16):
        model.model(input_ids=ids[:, max(0, start - 6) : start + 8])
        before = start - max(0, start - 6)
        hidden.append(seen["hidden_states"][:, before:])
        local.append(seen["local"][:, before:])
    hook.remove()
    at_output.remove()
    reader = model.readers[model.memorizing_layers.index(layer)]
    stored = torch.cat(hidden[:2], dim=1)[:, :10]  # 16 tokens, the newest 6 are in the window
    k = attention.k_proj(stored).view(1, 10, 2, 8)
    v = attention.v_proj(stored).view(1, 10, 2, 8)
    q = attention.q_proj(hidden[2]).view(1, 8, 4, 8)
    out = local[2].clone().view(1, 8, 4, 8)
    for token in range(8):
        for head in range(4):
            keys, values = normalize(k[0, :, head // 2], dim=-1), v[0, :, head // 2]
            scores = keys @ normalize(q[0, token, head], dim=-1)
            best = scores.argsort(descending=True)[:4]
            weights = torch.softmax(scores[best] * math.exp(float(reader.log_scale[head])), dim=0)
            g = torch.sigmoid(reader.gate[head]).item()
            out[0, token, head] = (1 - g) * out[0, token, head] + g * (weights @ values[best])
    return attention.o_proj(out.flatten(2))


def test_a_layer_computes_its_definition():
    # one layer, the second: what reaches it does not depend on the memory
    model = augmented("Llama", layers=2, storage="float32")
    ids = torch.randint(3, 50, (1, 24))
    with torch.no_grad():
        expected = naive(model, ids, 2)
        got = {}
        attention = model.model.model.layers[1].self_attn
        attention.register_forward_hook(lambda module, args, output: got.update(out=output[0]))
        model(ids)
    torch.testing.assert_close(got["out"][:, 6:], expected, atol=1e-6, rtol=0)


def test_documents_rows_and_padding_are_apart():
    model = augmented("Llama", clear_memories_on_eos_token_id=3)
    first, second = torch.randint(4, 50, (1, 21)), torch.randint(4, 50, (1, 15))
    first[0, -1] = 3
    together = model(torch.cat((first, second), dim=1))
    torch.testing.assert_close(together[:, :21], model(first), atol=1e-9, rtol=0)
    # segments begin elsewhere in the second document, so only its first one is comparable
    torch.testing.assert_close(together[:, 21:24], model(second)[:, :3], atol=1e-9, rtol=0)
    changed = torch.cat((first, second), dim=1)
    changed[0, 5] += 1
    torch.testing.assert_close(model(changed)[:, 21:], together[:, 21:], atol=1e-12, rtol=0)
    assert not torch.equal(model(changed)[:, 16:20], together[:, 16:20])


def test_segments_read_by_the_trainer_are_those_of_hidden():
    model, ids = augmented("Qwen3", clear_memories_on_eos_token_id=3), torch.randint(3, 20, (3, 40))
    memories, window, logits = model.create_knn_memories(batch_size=3), None, []
    for segment in ids.split(8, 1):
        out, window = model(segment, knn_memories=memories, xl_memories=window)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), atol=1e-9, rtol=0)


def test_gradients_reach_gates_and_adapters_only():
    peft = pytest.importorskip("peft")
    model = augmented("Llama", lora_r=2)
    assert isinstance(model.model, peft.PeftModel)
    token_log_probs(model, torch.randint(3, 50, (2, 30))).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name or "readers" in name}
    assert all(bool((reader.gate.grad != 0).any()) for reader in model.readers)


@pytest.mark.parametrize("lora_r", [None, 2])
def test_it_is_saved_and_loaded_alone(tmp_path, lora_r):
    model, ids = augmented("Qwen2", lora_r=lora_r), torch.randint(3, 50, (1, 30))
    again = MemoryAugmentedLM.from_pretrained(model.save_pretrained(tmp_path / "model")).eval()
    torch.testing.assert_close(again(ids), model(ids), atol=1e-12, rtol=0)


def without_projections():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config)


BAD = {
    "no projections": (lambda: MemoryAugmentedLM(without_projections()), ValueError, "MambaForCausalLM has none"),
    "no transformers model": (lambda: MemoryAugmentedLM(torch.nn.Linear(2, 2)), TypeError, "got Linear"),
    "no module": (lambda: MemoryAugmentedLM("model"), TypeError, "model"),
    "layer 4": (lambda: augmented("Llama", layers=4), ValueError, r"layers must be in 1 to 3, got \[4\]"),
    "layer 0": (lambda: augmented("Llama", layers=(0, 1)), ValueError, r"got \[0\]"),
    "layer twice": (lambda: augmented("Llama", layers=(2, 2)), ValueError, "different"),
    "no layers": (lambda: augmented("Llama", layers=()), ValueError, "at least one layer"),
    "gate": (lambda: augmented("Llama", gate="softmax"), TypeError, "gate"),
    "capacity": (lambda: augmented("Llama", max_memories=0), ValueError, "max_memories must be at least 1, got 0"),
    "neighbours": (lambda: augmented("Llama", num_retrieved=0), ValueError, "num_retrieved"),
    "segment": (lambda: augmented("Llama", segment_length=0), ValueError, "segment_length"),
    "window": (lambda: augmented("Llama", window=-1), ValueError, "window must be at least 0, got -1"),
    "positions": (lambda: augmented("GPT2", window=125), ValueError, "at most the model's 128 positions"),
    "eos": (lambda: augmented("Llama", clear_memories_on_eos_token_id=50), ValueError, r"\[0, 50\), got 50"),
    "rank": (lambda: augmented("Llama", lora_r=0), ValueError, "lora_r must be at least 1, got 0"),
    "storage": (lambda: augmented("Llama", storage="int4"), TypeError, "storage"),
    "ids": (lambda: augmented("Llama")(torch.full((1, 4), 50)), ValueError, r"\[0, 50\), got 50"),
    "floats": (lambda: augmented("Llama")(torch.ones(1, 4)), TypeError, "integer"),
    "shape": (lambda: augmented("Llama")(torch.ones(4, dtype=torch.long)), ValueError, "shape"),
    "mask": (
        lambda: augmented("Llama")(torch.ones(1, 4, dtype=torch.long), mask=torch.ones(1, 4, dtype=torch.long)),
        TypeError,
        "mask must be boolean",
    ),
    "memories of another model": (
        lambda: augmented("Llama")(
            torch.ones(1, 4, dtype=torch.long), augmented("GPTNeoX").create_knn_memories(batch_size=1)
        ),
        ValueError,
        "2 key heads, got 8 and 4",
    ),
    "memories of other rows": (
        lambda: augmented("Llama")(
            torch.ones(1, 4, dtype=torch.long), augmented("Llama").create_knn_memories(batch_size=2)
        ),
        ValueError,
        "rows in scope",
    ),
    "a name without a folder": (
        lambda: augmented("Llama").create_knn_memories(batch_size=1, name="x"),
        ValueError,
        "memories_directory",
    ),
}


@pytest.mark.plain
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
