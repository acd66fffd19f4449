"""Generation through the adapters compared with a loop without a cache and with transformers' own generation."""

from functools import partial

import pytest
import torch
from torch import nn

from lm_core.adapters import as_causal_lm
from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate
from lm_core.nn.masking import left_pad

VOCABULARY = 48
NEW = 9
LENGTHS = (6, 3, 1, 5)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch\\.jit.*")

KINDS = ["gpt2", "llama", "mistral", "cohere", "mamba", "absolute", "rotary", "alibi", "plain"]


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


@pytest.fixture
def adapted(build):
    """A function from a kind to the adapter of a tiny model of it."""
    torch.manual_seed(0)
    return lambda kind: as_causal_lm(Recency() if kind == "plain" else build(kind))


def prompts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


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
def test_greedy_generation_equals_a_loop_over_each_row_alone(adapted, kind):
    adapter = adapted(kind)
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
@pytest.mark.parametrize("search", [generate, partial(beam_search, beams=3, eos_id=5)])
def test_sampling_and_beam_search_find_the_same_tokens_with_and_without_a_cache(adapted, kind, search):
    adapter, results = adapted(kind), []
    for use_cache in (True, False):
        options = {"generator": torch.Generator().manual_seed(1)} if search is generate else {}
        results.append(search(adapter, prompts(), max_new_tokens=NEW, use_cache=use_cache, **options))
    assert torch.equal(results[0].tokens, results[1].tokens)
    torch.testing.assert_close(results[0].log_probs, results[1].log_probs, atol=1e-5, rtol=0)


def by_transformers(model, ids, mask, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask.long(), **options)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "cohere"])
@pytest.mark.parametrize("with_eos", [False, True])
def test_greedy_generation_equals_transformers(build, kind, with_eos):
    model = build(kind)
    ids, mask = left_pad(prompts(), 0)
    own = generate(model, ids, mask=mask, max_new_tokens=NEW, temperature=0.0)
    eos_id = common_token(own.tokens.tolist()) if with_eos else None
    own = generate(model, ids, mask=mask, max_new_tokens=NEW, temperature=0.0, eos_id=eos_id)
    theirs = by_transformers(model, ids, mask, eos_token_id=eos_id)
    assert own.finished.any() == with_eos
    assert torch.equal(own.tokens, theirs[:, ids.shape[1] :])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_equals_transformers(build, kind, length_penalty, beams):
    model = build(kind)
    ids, mask = left_pad(prompts(), 0)
    for eos_id in (None, 3, 11):
        own = beam_search(
            model, ids, mask=mask, beams=beams, max_new_tokens=NEW, length_penalty=length_penalty, eos_id=eos_id
        )
        # "never" stops when no running beam can win any more, as ours does; the others are heuristics.
        options = {"num_beams": beams, "length_penalty": length_penalty, "early_stopping": "never"}
        theirs = by_transformers(
            model, ids, mask, eos_token_id=eos_id, return_dict_in_generate=True, output_scores=True, **options
        )
        new = theirs.sequences[:, ids.shape[1] :]
        for row in range(len(ids)):
            length = int(own.lengths[row])
            assert own.tokens[row, :length].tolist() == new[row, :length].tolist()
            # After the end transformers writes the EOS again.
            assert set(new[row, length:].tolist()) <= {0, eos_id}
        scores = own.log_probs.sum(dim=-1) / own.lengths**length_penalty
        torch.testing.assert_close(scores, theirs.sequences_scores, atol=1e-5, rtol=1e-5)
