"""vLLM as an engine: log-probs of the tokens it drew, weights of trained models, and errors by name.

Tests of the engine itself run where vLLM is installed (`nox -s engines`); the weights it is sent are tested anywhere.
"""

import sys

import pytest
import torch

from lm_core.engines.vllm import VLLMEngine, merged_weights

pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
PROMPTS = [torch.tensor([1, 2, 3, 4, 50]), torch.tensor([7, 8, 9]), torch.tensor([7, 8, 9])]


def tiny(tied=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def adapted(**settings):
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return peft.get_peft_model(tiny(), peft.LoraConfig(**settings)).eval()


# -------------------------------------------------------------------------------------------- the weights it is sent


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}, {"target_modules": ["q_proj"], "use_rslora": True}],
    ids=["lora", "dora", "norm trained whole", "rslora"],
)
def test_merged_weights_are_those_of_pefts_merge_and_the_model_keeps_its_own(settings):
    model = adapted(**settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # a copy of each, since a merged layer is freed once it is sent
    weights = {name: tensor.clone() for name, tensor in merged_weights(model)}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    expected = model.merge_and_unload().state_dict()
    assert set(weights) == set(expected) - {"lm_head.weight"}  # tied
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_weights_without_adapters_are_those_of_the_base_and_other_adapters_are_chosen_by_name():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False))
    base, other = dict(merged_weights(model, adapters=())), dict(merged_weights(model, adapters=["other"]))
    expected = tiny().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.items())
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name in base if not torch.equal(base[name], other[name])}
    assert changed == {"q_proj"}
    with pytest.raises(ValueError, match=r"adapters must be among \['default', 'other'\], got mine"):
        merged_weights(model, adapters=["mine"])


def test_adapters_that_cannot_be_merged_are_refused_by_name():
    with pytest.raises(ValueError, match=r"adapters of the tied embedding model\.embed_tokens"):
        dict(merged_weights(adapted(target_modules=["embed_tokens", "q_proj"])))
    prompt = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="changes the input of the model"):
        merged_weights(prompt)
    with pytest.raises(TypeError, match="needs a transformers model, got Linear"):
        merged_weights(torch.nn.Linear(2, 2))


@pytest.mark.plain
def test_without_vllm_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"engine 'vllm' needs vLLM: pip install 'some-package\[vllm\]'"):
        VLLMEngine(tiny(), requirement="some-package[vllm]")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        VLLMEngine(tiny())


# -------------------------------------------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("vllm", reason="vLLM is not installed: nox -s engines")
    state = torch.get_rng_state()
    made = VLLMEngine(tiny(), max_model_len=64, gpu_memory_utilization=0.1)
    assert torch.equal(state, torch.get_rng_state())
    yield made
    made.close()


def naive_log_probs(model, prompt, tokens, *, temperature=1.0, penalty=1.0, kept=None):
    """Log-probs of tokens by the whole sequence's logits, one step after the other."""
    with torch.no_grad():
        logits = model(torch.cat((prompt, tokens))[None]).logits[0].double()
    result = []
    for step, token in enumerate(tokens):
        row = logits[len(prompt) - 1 + step].clone()
        for seen in {*prompt.tolist(), *tokens[:step].tolist()}:
            row[seen] = row[seen] / penalty if row[seen] > 0 else row[seen] * penalty
        row = row / temperature
        if kept is not None:
            row[[id_ for id_ in range(len(row)) if id_ not in kept[step]]] = -torch.inf
        result.append(row.log_softmax(-1)[token])
    return torch.stack(result)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.5},
        {"temperature": 0.0},
    ],
    ids=["plain", "filters", "repetition penalty", "greedy"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["lora", "base", "all weights"])
def test_log_probs_of_the_engine_are_those_of_the_model_it_was_sent(engine, settings, kind):
    model = tiny() if kind == "all weights" else adapted()
    if kind == "all weights":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    engine.update_weights(model, adapters=() if kind == "base" else None)
    model = tiny() if kind == "base" else model
    result = engine.generate(PROMPTS, max_new_tokens=8, generator=torch.Generator().manual_seed(3), **settings)
    assert result.tokens.shape == (3, 8)
    assert (result.kept is not None) == ("top_k" in settings)
    for row, prompt in enumerate(PROMPTS):
        expected = naive_log_probs(
            model, prompt, result.tokens[row],
            temperature=settings.get("temperature") or 1.0, penalty=settings.get("repetition_penalty", 1.0),
            kept=None if result.kept is None else result.kept[row],
        )  # fmt: skip
        torch.testing.assert_close(result.log_probs[row].double(), expected, atol=1e-4, rtol=1e-4)
    again = engine.generate(PROMPTS, max_new_tokens=8, generator=torch.Generator().manual_seed(3), **settings)
    assert torch.equal(result.tokens, again.tokens)


def test_end_tokens_end_a_row_but_not_before_the_minimum(engine):
    engine.update_weights(tiny())
    greedy = engine.generate(PROMPTS, max_new_tokens=6, temperature=0.0).tokens
    ends = [int(greedy[0, 2]), int(greedy[1, 3])]
    result = engine.generate(PROMPTS, max_new_tokens=6, temperature=0.0, eos_id=ends, pad_id=255)
    for row in range(3):
        hits = [step for step, token in enumerate(greedy[row].tolist()) if token in ends]
        length = hits[0] + 1 if hits else 6
        assert int(result.lengths[row]) == length
        assert bool(result.finished[row]) == bool(hits)
        assert result.tokens[row, :length].tolist() == greedy[row, :length].tolist()
        assert (result.tokens[row, length:] == 255).all()
        assert (result.log_probs[row, length:] == 0).all()
    late = engine.generate(PROMPTS, max_new_tokens=6, temperature=0.0, eos_id=ends, min_new_tokens=5)
    assert int(late.lengths.min()) >= 5


def test_draws_are_of_the_models_distribution(engine):
    engine.update_weights(tiny())
    count = 600
    generator = torch.Generator().manual_seed(0)
    result = engine.generate([PROMPTS[1]] * count, max_new_tokens=1, temperature=2.0, generator=generator)
    with torch.no_grad():
        expected = (tiny()(PROMPTS[1][None]).logits[0, -1] / 2.0).softmax(-1)
    frequencies = torch.bincount(result.tokens[:, 0], minlength=256) / count
    likely = expected > 0.02
    assert likely.sum() > 3
    deviation = (frequencies - expected)[likely] / (expected * (1 - expected) / count)[likely].sqrt()
    assert float(deviation.abs().max()) < 4.5


def test_a_nucleus_alone_is_drawn_from_where_the_kept_tokens_are_not_wanted(engine):
    engine.update_weights(tiny())
    generator = torch.Generator().manual_seed(1)
    result = engine.generate([PROMPTS[0]] * 40, max_new_tokens=1, top_p=0.5, generator=generator, return_kept=False)
    with torch.no_grad():
        likely, order = tiny()(PROMPTS[0][None]).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = order[: int((likely.cumsum(0) < 0.5).sum()) + 1]
    assert result.kept is None
    assert set(result.tokens[:, 0].tolist()) <= set(nucleus.tolist())


@pytest.mark.plain
def test_bad_arguments_and_a_second_engine_are_refused_by_name(engine):
    for settings, message in (
        ({"top_p": 0.9}, "top_p and min_p need top_k"),
        ({"top_k": 5000}, "top_k must be at most 1024"),
        ({"stop_strings": ["x"]}, "stop_strings need an engine with a tokenizer"),
        ({"max_new_tokens": 62}, r"prompt \(5 tokens\) and max_new_tokens \(62\) exceed the engine's max_model_len"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"min_new_tokens": 9}, "min_new_tokens must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            engine.generate(PROMPTS, **{"max_new_tokens": 4, **settings})
    with pytest.raises(RuntimeError, match="another vLLM engine is open"):
        VLLMEngine(tiny())
