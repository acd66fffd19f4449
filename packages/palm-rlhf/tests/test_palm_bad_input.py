"""Bad input to PaLM is refused before any work: the error names argument and value, and no state changes.

Runs without the run-time shape checker, which would raise its own error first.
"""

import copy
import math
import re

import pytest
import torch

from lm_core.nn.kv_cache import KVCache
from palm_rlhf import PaLM

pytestmark = pytest.mark.plain

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
REAL = torch.ones(2, 3, dtype=torch.bool)
WHOLE = torch.ones(2, 6, dtype=torch.bool)  # a mask over cached and new tokens


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"num_tokens": -1}, ValueError, "num_tokens must be at least 1, got -1"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"kv_heads": 0}, ValueError, "kv_heads must be at least 1, got 0"),
        ({"ff_mult": 0}, ValueError, "ff_mult must be at least 1, got 0"),
        ({"dim_head": 33}, ValueError, "dim_head must be even for rotary embeddings, got 33"),
        ({"heads": 4, "kv_heads": 3}, ValueError, "kv_heads must divide heads = 4, got 3"),
        ({"heads": 2, "kv_heads": 4}, ValueError, "kv_heads must divide heads = 2, got 4"),
        ({"qk_scale": 0}, ValueError, "qk_scale must be positive, got 0"),
        ({"qk_scale": math.nan}, ValueError, "qk_scale must be positive, got nan"),
        ({"attn_dropout": 1.5}, ValueError, "attn_dropout must be in [0, 1), got 1.5"),
        ({"ff_dropout": -0.5}, ValueError, "ff_dropout must be in [0, 1), got -0.5"),
        ({"rotary_xpos_scale_base": -2}, ValueError, "scale_base must be positive, got -2"),
        ({"lora_r": 0}, ValueError, "lora_r must be at least 1, got 0"),
        ({"finetune_scopes": ("a", "a")}, ValueError, "finetune scope 'a' exists already"),
        ({"finetune_scopes": "actor"}, TypeError, "finetune_scopes must be a list of names"),
        ({"dim": 16.5}, TypeError, "dim=16.5"),
        ({"depth": "two"}, TypeError, "depth='two'"),
        ({"dim_heads": 8}, TypeError, "dim_heads"),
    ],
)
def test_the_constructor_refuses_bad_settings(changes, error, message, small_settings):
    with pytest.raises(error, match=re.escape(message)):
        PaLM(**{**small_settings, **changes})


def test_the_constructor_takes_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        PaLM(16, 13, 2)


def state_of(palm):
    return [module.training for module in palm.modules()], {k: v.clone() for k, v in palm.state_dict().items()}


def check_refused(palm, call, error, message):
    modes, weights, rng = *state_of(palm), torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        call(palm)
    after_modes, after = state_of(palm)
    assert after_modes == modes
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p(IDS.float()), TypeError, "x must hold integer token ids, got dtype torch.float32"),
        (lambda p: p(IDS > 2), TypeError, "x must hold integer token ids, got dtype torch.bool"),
        (lambda p: p(IDS[0]), ValueError, "x must have shape (b, n) with at least one row and token, got (3,)"),
        (lambda p: p(IDS[:, :0]), ValueError, "got (2, 0)"),
        (lambda p: p(IDS[:0]), ValueError, "got (0, 3)"),
        (lambda p: p(IDS + 7), ValueError, "x must hold token ids in [0, 13), got 13"),
        (lambda p: p(-IDS), ValueError, "x must hold token ids in [0, 13), got -6"),
        (lambda p: p(-IDS, True), ValueError, "x must hold token ids in [0, 13), got -6"),
        # the last token is a label only
        (lambda p: p(torch.tensor([[1, 2, 99]]), True), ValueError, "x must hold token ids in [0, 13), got 99"),
        (lambda p: p(torch.tensor([[1, 2, -100]]), True), ValueError, "token ids in [0, 13), got -100"),
        (
            lambda p: p(IDS, mask=REAL.float()),
            TypeError,
            "mask must be boolean (True at real tokens), got dtype torch.float32",
        ),
        (lambda p: p(IDS, mask=REAL[:, :2]), ValueError, "mask must have shape (b, cached + new) = (2, 3), got (2, 2)"),
        (lambda p: p(IDS, mask=REAL[:1]), ValueError, "= (2, 3), got (1, 3)"),
        (lambda p: p(IDS, True, mask=REAL[:, :2]), ValueError, "= (2, 3), got (2, 2)"),
        (
            lambda p: p(IDS, document_ids=IDS[:, :2]),
            ValueError,
            "document_ids must have the shape of x (2, 3), got (2, 2)",
        ),
        (
            lambda p: p(IDS, document_ids=IDS.float()),
            TypeError,
            "document_ids must be integers, got dtype torch.float32",
        ),
        (lambda p: p(IDS, finetune_scope="actr"), ValueError, "scope 'actr' not found; there are ['actor']"),
        (
            lambda p: p(IDS, extra_embed=torch.zeros(15)),
            ValueError,
            "extra_embed must broadcast to (b, n, d) = (2, 3, 16), got shape (15,)",
        ),
        (lambda p: p(IDS, extra_embed=torch.zeros(4, 1, 16)), ValueError, "got shape (4, 1, 16)"),
        (
            lambda p: p(IDS, extra_embed=IDS[0, 0].expand(16)),
            TypeError,
            "extra_embed must be floating point, got dtype torch.int64",
        ),
        (
            lambda p: p(IDS[:, :1], True),
            ValueError,
            "return_loss needs at least two tokens a row, got shape (2, 1)",
        ),
        (lambda p: p.init_cache(0, 5), ValueError, "batch_size must be at least 1, got 0"),
        (lambda p: p.init_cache(2, 0), ValueError, "max_length must be at least 1, got 0"),
        # generation: what it does not pass on to the core
        (lambda p: p.generate(prompt=IDS), ValueError, "give seq_len or max_new_tokens, got None and None"),
        (lambda p: p.generate(9, IDS, max_new_tokens=3), ValueError, "seq_len or max_new_tokens, got 9 and 3"),
        (lambda p: p.generate(prompt=IDS, max_new_tokens=1.5), TypeError, "max_new_tokens=1.5"),
        (lambda p: p.generate(3, IDS), ValueError, "seq_len must exceed the prompt's length 3, got 3"),
        (lambda p: p.generate(1, IDS), ValueError, "seq_len must exceed the prompt's length 3, got 1"),
        (lambda p: p.generate(5, IDS[:, :0]), ValueError, "at least one token a row, row 0 is empty"),
        (lambda p: p.generate(5, []), ValueError, "prompt must hold at least one row, got none"),
        (lambda p: p.generate(5, torch.tensor(3)), ValueError, "prompt must have shape (b, n), got ()"),
        (lambda p: p.generate(5, IDS.float()), TypeError, "prompt must hold integer token ids"),
        (lambda p: p.generate(5, IDS + 7), ValueError, "prompt must hold token ids in [0, 13), got 13"),
        (
            lambda p: p.generate(5, IDS, mask=REAL[:, :2]),
            ValueError,
            "mask must have the prompt's shape (2, 3), got (2, 2)",
        ),
        (
            lambda p: p.generate(5, IDS, prompt_lengths=IDS[:, 2]),
            ValueError,
            "prompt_lengths must be in [1, 3], got [3, 6]",
        ),
        (lambda p: p.generate(5, IDS, temperature=-0.5), ValueError, "a finite number of at least 0, got -0.5"),
        (lambda p: p.generate(5, IDS, eos_token=13), ValueError, "eos_id must be below the vocabulary's size 13"),
        (lambda p: p.generate(5, IDS, min_new_tokens=3), ValueError, "in [0, max_new_tokens = 2], got 3"),
        (lambda p: p.generate(5, IDS, finetune_scope="actr"), ValueError, "finetune scope 'actr' not found"),
        (lambda p: p.generate(5, IDS, temprature=0.5), TypeError, "temprature"),
        (
            lambda p: p.generate(5, IDS, extra_embed=torch.zeros(2, 3, 16)),
            ValueError,
            "extra_embed must broadcast to (b, n, d) = (2, 1, 16), got shape (2, 3, 16)",
        ),
    ],
)
def test_forward_cache_and_generation_refuse_bad_input(call, error, message, make_palm):
    check_refused(make_palm(finetune_scopes=("actor",)).train(), call, error, message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(IDS, return_loss=True), "return_loss needs a causal model, got causal=False"),
        (lambda p: p.init_cache(2, 5), "a cache needs a causal model, got causal=False"),
        (
            lambda p: p(IDS, cache=KVCache(layers=2, batch_size=2, max_length=5)),
            "a cache needs a causal model, got causal=False",
        ),
        (lambda p: p.generate(5, IDS), "generation needs a causal model, got causal=False"),
        (lambda p: p.generate(5, IDS, use_cache=False), "generation needs a causal model, got causal=False"),
        (lambda p: p(IDS + 7), "x must hold token ids in [0, 13), got 13"),
    ],
)
def test_an_encoder_has_no_loss_no_cache_and_no_generation(call, message, make_palm):
    check_refused(make_palm(causal=False), call, ValueError, message)


def same(one, other):
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("ids", "named", "message"),
    [
        (IDS[:1], {}, "cache holds 2 rows, got a batch of 1"),
        (IDS, {"mask": REAL}, "mask must have shape (b, cached + new) = (2, 6), got (2, 3)"),
        (IDS, {}, "mask is None but the cache was filled under one"),
        (IDS, {"document_ids": IDS, "mask": WHOLE}, "document_ids are for whole sequences: cache must be None"),
        (IDS, {"mask": WHOLE, "finetune_scope": "critic"}, "finetune_scope 'actor', got finetune_scope 'critic'"),
        (IDS, {"mask": WHOLE, "disable_lora": True}, "with finetune_scope 'actor', got disable_lora=True"),
        (IDS + 7, {"mask": WHOLE}, "x must hold token ids in [0, 13), got 13"),
        (IDS, {"return_loss": True}, "return_loss scores whole sequences: cache must be None"),
    ],
)
def test_a_refused_forward_leaves_the_cache_as_it_was(ids, named, message, make_palm):
    palm = make_palm(finetune_scopes=("actor", "critic"))
    cache = palm.init_cache(2, 3)  # no room is left uninitialised
    with torch.no_grad():
        palm(IDS, mask=REAL, cache=cache, finetune_scope="actor")
    before = copy.deepcopy(vars(cache))
    check_refused(palm, lambda palm: palm(ids, cache=cache, **named), ValueError, message)
    assert same(list(vars(cache).values()), list(before.values()))
