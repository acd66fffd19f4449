"""Generation through the adapters against a loop without a cache, and against transformers' own generation."""

import pytest
import torch
from torch import nn

from lm_core.adapters import as_causal_lm
from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate

VOCABULARY = 24
NEW = 9
LENGTHS = (6, 3, 1, 5)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch\\.jit.*")

HUGGING_FACE = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 1.0},
    "mamba": {"state_size": 4},
}
X_TRANSFORMERS = {"absolute": {}, "rotary": {"rotary_pos_emb": True}, "alibi": {"alibi_pos_bias": True}}
KINDS = [*HUGGING_FACE, *X_TRANSFORMERS, "plain"]


class Recency(nn.Module):
    """A causal model of means that forget, without any notion of a mask."""

    def __init__(self, dim=16):
        super().__init__()
        self.tokens, self.out = nn.Embedding(VOCABULARY, dim), nn.Linear(dim, VOCABULARY)

    def forward(self, ids):
        state, states = 0.0, []
        for x in self.tokens(ids).unbind(dim=1):
            state = 0.7 * state + x
            states.append(state)
        return self.out(torch.stack(states, dim=1))


@pytest.fixture(scope="module")
def build():
    """A function from a kind to a tiny model of it, with weights that make its choices clear-cut."""

    def model(kind, seed=0):
        torch.manual_seed(seed)
        if kind in HUGGING_FACE:
            transformers = pytest.importorskip("transformers")
            transformers.logging.set_verbosity_error()
            sizes = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
            if kind != "gpt2":
                sizes |= {"hidden_size": 32, "num_hidden_layers": 2}
            if kind not in ("gpt2", "mamba"):
                sizes |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
            config = transformers.AutoConfig.for_model(kind, **{**sizes, **HUGGING_FACE[kind]})
            result = transformers.AutoModelForCausalLM.from_config(config)
        elif kind == "plain":
            result = Recency()
        else:
            x_transformers = pytest.importorskip("x_transformers")
            layers = x_transformers.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **X_TRANSFORMERS[kind])
            result = x_transformers.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers)
        with torch.no_grad():
            for parameter in result.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        return result.eval()

    return model


def prompts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def greedy_alone(adapter, row, eos_id):
    tokens = []
    while len(tokens) < NEW:
        logits = adapter(torch.cat((row, torch.tensor(tokens, dtype=torch.long))).unsqueeze(0))
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == eos_id:
            break
    return tokens


def common_token(rows):
    """A token that most rows generate, and not as their last one: an EOS that ends rows at different steps."""
    counts = torch.bincount(torch.tensor([token for row in rows for token in set(row[:-1])]), minlength=VOCABULARY)
    return int(counts.argmax())


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_a_loop_over_each_row_alone(build, kind):
    adapter = as_causal_lm(build(kind))
    rows = prompts()
    eos_id = common_token([greedy_alone(adapter, row, None) for row in rows])
    expected = [greedy_alone(adapter, row, eos_id) for row in rows]
    for use_cache in (True, False):
        result = generate(adapter, rows, max_new_tokens=NEW, temperature=0.0, eos_id=eos_id, use_cache=use_cache)
        for row, tokens in enumerate(expected):
            assert result.tokens[row, : len(tokens)].tolist() == tokens
            assert int(result.lengths[row]) == len(tokens)
            assert bool(result.finished[row]) == (tokens[-1] == eos_id)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "rotary"])
def test_a_hook_on_any_module_fires_once_for_each_token_and_takes_effect(build, kind, use_cache):
    model = build(kind)
    adapter = as_causal_lm(model)
    counts = {}

    def count(module, inputs, output):
        counts[module] = counts.get(module, 0) + 1

    heads = [module for module in model.modules() if type(module) is nn.Linear]
    handles = [module.register_forward_hook(count) for module in heads]
    generate(adapter, prompts()[0][None], max_new_tokens=20, use_cache=use_cache)
    assert counts == dict.fromkeys(heads, 20)
    for handle in handles:
        handle.remove()
    head = heads[-1]
    assert head.out_features == VOCABULARY
    head.register_forward_hook(lambda module, inputs, output: output.roll(1, -1))
    tokens = generate(adapter, prompts()[0][None], max_new_tokens=1, temperature=0.0, use_cache=use_cache).tokens
    hidden = as_causal_lm(build(kind)).hidden(prompts()[0][None])[:, -1]
    assert torch.equal(tokens[:, 0], ((hidden @ head.weight.T).argmax(-1) + 1) % VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_draws_the_same_tokens_with_and_without_a_cache(build, kind):
    adapter = as_causal_lm(build(kind))
    results = [
        generate(
            adapter, prompts(), max_new_tokens=NEW, use_cache=use_cache, generator=torch.Generator().manual_seed(1)
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(results[0].tokens, results[1].tokens)
    torch.testing.assert_close(results[0].log_probs, results[1].log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_finds_the_same_with_and_without_a_cache(build, kind):
    adapter = as_causal_lm(build(kind))
    results = [
        beam_search(adapter, prompts(), beams=3, max_new_tokens=NEW, eos_id=5, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(results[0].tokens, results[1].tokens)
    torch.testing.assert_close(results[0].log_probs, results[1].log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "cohere"])
@pytest.mark.parametrize("with_eos", [False, True])
def test_greedy_generation_equals_transformers(build, kind, with_eos):
    model = build(kind)
    ids, mask = left_padded(prompts())
    own = generate(model, ids, mask=mask, max_new_tokens=NEW, temperature=0.0)
    eos_id = common_token(own.tokens.tolist()) if with_eos else None
    own = generate(model, ids, mask=mask, max_new_tokens=NEW, temperature=0.0, eos_id=eos_id)
    theirs = model.generate(
        ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=eos_id,
        pad_token_id=0,
    )
    assert own.finished.any() == with_eos
    assert torch.equal(own.tokens, theirs[:, ids.shape[1] :])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_equals_transformers(build, kind, length_penalty, beams):
    model = build(kind)
    ids, mask = left_padded(prompts())
    for eos_id in (None, 3, 11):
        own = beam_search(
            model, ids, mask=mask, beams=beams, max_new_tokens=NEW, length_penalty=length_penalty, eos_id=eos_id
        )
        # "never" stops when no running beam can win any more, as ours does; the others are heuristics.
        theirs = model.generate(
            ids,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=eos_id,
            pad_token_id=0,
            num_beams=beams,
            length_penalty=length_penalty,
            early_stopping="never",
            return_dict_in_generate=True,
            output_scores=True,
        )
        new = theirs.sequences[:, ids.shape[1] :]
        for row in range(len(ids)):
            length = int(own.lengths[row])
            assert own.tokens[row, :length].tolist() == new[row, :length].tolist()
            # Behind the end transformers writes the EOS again.
            assert set(new[row, length:].tolist()) <= {0, eos_id}
        scores = own.log_probs.sum(dim=-1) / own.lengths**length_penalty
        torch.testing.assert_close(scores, theirs.sequences_scores, atol=1e-5, rtol=1e-5)
