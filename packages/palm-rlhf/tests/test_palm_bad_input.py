"""Bad input to PaLM is refused at the door: the error names the argument and its value, and nothing moves.

Runs without the run-time shape checker, which would raise its own error first.
"""

import copy
import math
import re

import pytest
import torch

from palm_rlhf import PaLM

pytestmark = pytest.mark.plain

NAN = math.nan
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
REAL = torch.ones(2, 3, dtype=torch.bool)

CONSTRUCTOR = {
    "no features": ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
    "no vocabulary": ({"num_tokens": -1}, ValueError, "num_tokens must be at least 1, got -1"),
    "no blocks": ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
    "no heads": ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
    "no key heads": ({"kv_heads": 0}, ValueError, "kv_heads must be at least 1, got 0"),
    "no feed-forward": ({"ff_mult": 0}, ValueError, "ff_mult must be at least 1, got 0"),
    "odd heads": ({"dim_head": 33}, ValueError, "dim_head must be even for rotary embeddings, got 33"),
    "heads that do not divide": ({"heads": 4, "kv_heads": 3}, ValueError, "kv_heads must divide heads = 4, got 3"),
    "more key heads than heads": ({"heads": 2, "kv_heads": 4}, ValueError, "kv_heads must divide heads = 2, got 4"),
    "no scale": ({"qk_scale": 0}, ValueError, "qk_scale must be positive, got 0"),
    "a scale that is no number": ({"qk_scale": NAN}, ValueError, "qk_scale must be positive, got nan"),
    "dropout above one": ({"attn_dropout": 1.5}, ValueError, "attn_dropout must be in [0, 1), got 1.5"),
    "negative dropout": ({"ff_dropout": -0.5}, ValueError, "ff_dropout must be in [0, 1), got -0.5"),
    "negative xPos base": (
        {"rotary_xpos_scale_base": -2},
        ValueError,
        "scale_base must be positive, got -2",
    ),
    "no LoRA rank": ({"lora_r": 0}, ValueError, "lora_r must be at least 1, got 0"),
    "a scope twice": ({"finetune_scopes": ("a", "a")}, ValueError, "finetune scope 'a' exists already"),
    "a scope without a name": ({"finetune_scopes": ("",)}, ValueError, "scope must be a non-empty name"),
    "a text of scopes": ({"finetune_scopes": "actor"}, TypeError, "finetune_scopes must be a list of names"),
    "fractional features": ({"dim": 16.5}, TypeError, "dim=16.5"),
    "text as depth": ({"depth": "two"}, TypeError, "depth='two'"),
}


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_the_constructor_refuses_bad_settings(case, small_settings):
    changes, error, message = CONSTRUCTOR[case]
    with pytest.raises(error, match=re.escape(message)):
        PaLM(**{**small_settings, **changes})


def test_the_constructor_takes_keywords_only_and_knows_its_arguments(small_settings):
    with pytest.raises(TypeError, match="positional"):
        PaLM(16, 13, 2)
    with pytest.raises(TypeError, match="dim_heads"):
        PaLM(**small_settings, dim_heads=8)


FORWARD = {
    "floats": ((IDS.float(),), {}, TypeError, "x must hold integer token ids, got dtype torch.float32"),
    "booleans": ((IDS > 2,), {}, TypeError, "x must hold integer token ids, got dtype torch.bool"),
    "one dimension": ((IDS[0],), {}, ValueError, "x must have shape (b, n) with at least one row and token, got (3,)"),
    "no tokens": ((IDS[:, :0],), {}, ValueError, "got (2, 0)"),
    "no rows": ((IDS[:0],), {}, ValueError, "got (0, 3)"),
    "an id beyond the vocabulary": ((IDS + 7,), {}, ValueError, "x must hold token ids in [0, 13), got 13"),
    "a negative id": ((-IDS,), {}, ValueError, "x must hold token ids in [0, 13), got -6"),
    "a negative id in the loss": ((-IDS, True), {}, ValueError, "x must hold token ids in [0, 13), got -6"),
    "a last label beyond the vocabulary": (
        (torch.tensor([[1, 2, 99]]), True),
        {},
        ValueError,
        "x must hold token ids in [0, 13), got 99",
    ),
    "an ignored id as last token": (
        (torch.tensor([[1, 2, -100]]), True),
        {},
        ValueError,
        "x must hold token ids in [0, 13), got -100",
    ),
    "mask of numbers": (
        (IDS,),
        {"mask": torch.ones(2, 3)},
        TypeError,
        "mask must be boolean (True at real tokens), got dtype torch.float32",
    ),
    "mask of another length": (
        (IDS,),
        {"mask": REAL[:, :2]},
        ValueError,
        "mask must have shape (b, cached + new) = (2, 3), got (2, 2)",
    ),
    "mask of another batch": ((IDS,), {"mask": REAL[:1]}, ValueError, "= (2, 3), got (1, 3)"),
    "mask of another length in the loss": ((IDS, True), {"mask": REAL[:, :2]}, ValueError, "= (2, 3), got (2, 2)"),
    "documents of another shape": (
        (IDS,),
        {"document_ids": IDS[:, :2]},
        ValueError,
        "document_ids must have the shape of x (2, 3), got (2, 2)",
    ),
    "fractional documents": (
        (IDS,),
        {"document_ids": IDS.float()},
        TypeError,
        "document_ids must be integers, got dtype torch.float32",
    ),
    "an unknown scope": (
        (IDS,),
        {"finetune_scope": "actr"},
        ValueError,
        "finetune scope 'actr' not found; there are ['actor']",
    ),
    "extra embedding of other features": (
        (IDS,),
        {"extra_embed": torch.zeros(15)},
        ValueError,
        "extra_embed must broadcast to (b, n, d) = (2, 3, 16), got shape (15,)",
    ),
    "extra embedding of more rows": (
        (IDS,),
        {"extra_embed": torch.zeros(4, 1, 16)},
        ValueError,
        "got shape (4, 1, 16)",
    ),
    "extra embedding of ids": (
        (IDS,),
        {"extra_embed": torch.zeros(16, dtype=torch.long)},
        TypeError,
        "extra_embed must be floating point, got dtype torch.int64",
    ),
    "loss of one token": (
        (IDS[:, :1], True),
        {},
        ValueError,
        "return_loss needs at least two tokens a row, got shape (2, 1)",
    ),
}


def state_of(palm):
    return [module.training for module in palm.modules()], {k: v.clone() for k, v in palm.state_dict().items()}


def check_refused(palm, call, error, message):
    modes, weights, rng = *state_of(palm), torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        call()
    after_modes, after = state_of(palm)
    assert after_modes == modes
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("case", FORWARD)
def test_the_forward_refuses_bad_input(case, make_palm):
    arguments, named, error, message = FORWARD[case]
    palm = make_palm(finetune_scopes=("actor",)).train()
    check_refused(palm, lambda: palm(*arguments, **named), error, message)


def test_an_encoder_has_no_loss_no_cache_and_no_generation(make_palm):
    palm, causal = make_palm(causal=False), make_palm()
    for call, message in (
        (lambda: palm(IDS, return_loss=True), "return_loss needs a causal model, got causal=False"),
        (lambda: palm.init_cache(2, 5), "a cache needs a causal model, got causal=False"),
        (lambda: palm(IDS, cache=causal.init_cache(2, 5)), "a cache needs a causal model, got causal=False"),
        (lambda: palm.generate(5, IDS), "generation needs a causal model, got causal=False"),
        (lambda: palm.generate(5, IDS, use_cache=False), "generation needs a causal model, got causal=False"),
        (lambda: palm(IDS + 7), "x must hold token ids in [0, 13), got 13"),
    ):
        check_refused(palm, call, ValueError, message)


CACHED = {
    "another batch": (IDS[:1], {}, ValueError, "cache holds 2 rows, got a batch of 1"),
    "a mask of the new tokens only": (
        IDS,
        {"mask": REAL},
        ValueError,
        "mask must have shape (b, cached + new) = (2, 6), got (2, 3)",
    ),
    "no mask after one": (IDS, {}, ValueError, "mask is None but the cache was filled under one"),
    "packed documents": (
        IDS,
        {"document_ids": IDS, "mask": torch.ones(2, 6, dtype=torch.bool)},
        ValueError,
        "document_ids are for whole sequences: cache must be None",
    ),
    "another scope": (
        IDS,
        {"mask": torch.ones(2, 6, dtype=torch.bool), "finetune_scope": "critic"},
        ValueError,
        "cache was filled with finetune_scope 'actor', got finetune_scope 'critic'",
    ),
    "no scope after one": (
        IDS,
        {"mask": torch.ones(2, 6, dtype=torch.bool), "disable_lora": True},
        ValueError,
        "cache was filled with finetune_scope 'actor', got disable_lora=True",
    ),
    "an id beyond the vocabulary": (
        IDS + 7,
        {"mask": torch.ones(2, 6, dtype=torch.bool)},
        ValueError,
        "x must hold token ids in [0, 13), got 13",
    ),
    "a loss": (IDS, {"return_loss": True}, ValueError, "return_loss scores whole sequences: cache must be None"),
}


def same(one, other):
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("case", CACHED)
def test_a_refused_forward_leaves_the_cache_as_it_was(case, make_palm):
    ids, named, error, message = CACHED[case]
    palm = make_palm(finetune_scopes=("actor", "critic"))
    cache = palm.init_cache(2, 3)  # no room is left uninitialised
    with torch.no_grad():
        palm(IDS, mask=REAL, cache=cache, finetune_scope="actor")
    before = copy.deepcopy(vars(cache))
    check_refused(palm, lambda: palm(ids, cache=cache, **named), error, message)
    assert same(list(vars(cache).values()), list(before.values()))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 5), "batch_size must be at least 1, got 0"), ((2, 0), "max_length must be at least 1, got 0")],
)
def test_a_cache_needs_rows_and_room(sizes, message, make_palm):
    with pytest.raises(ValueError, match=message):
        make_palm().init_cache(*sizes)


GENERATE = {
    "no length": ({}, ValueError, "give seq_len or max_new_tokens, got None and None"),
    "two lengths": ({"seq_len": 9, "max_new_tokens": 3}, ValueError, "give seq_len or max_new_tokens, got 9 and 3"),
    "a prompt as long as the limit": ({"seq_len": 3}, ValueError, "seq_len must exceed the prompt's length 3, got 3"),
    "a prompt beyond the limit": ({"seq_len": 1}, ValueError, "seq_len must exceed the prompt's length 3, got 1"),
    "an empty prompt": ({"seq_len": 5, "prompt": IDS[:, :0]}, ValueError, "at least one token a row, row 0 is empty"),
    "an empty row of a list": ({"seq_len": 5, "prompt": [IDS[0], IDS[0][:0]]}, ValueError, "row 1 is empty"),
    "no prompts": ({"seq_len": 5, "prompt": []}, ValueError, "prompt must hold at least one row, got none"),
    "a number as prompt": (
        {"seq_len": 5, "prompt": torch.tensor(3)},
        ValueError,
        "prompt must have shape (b, n), got ()",
    ),
    "a prompt of floats": ({"seq_len": 5, "prompt": IDS.float()}, TypeError, "prompt must hold integer token ids"),
    "an id beyond the vocabulary": (
        {"seq_len": 5, "prompt": IDS + 7},
        ValueError,
        "prompt must hold token ids in [0, 13), got 13",
    ),
    "a mask of another shape": (
        {"seq_len": 5, "mask": REAL[:, :2]},
        ValueError,
        "mask must have the prompt's shape (2, 3), got (2, 2)",
    ),
    "lengths beyond the prompt": (
        {"seq_len": 5, "prompt_lengths": torch.tensor([3, 4])},
        ValueError,
        "prompt_lengths must be in [1, 3], got [3, 4]",
    ),
    "a negative temperature": (
        {"seq_len": 5, "temperature": -0.5},
        ValueError,
        "temperature must be a finite number of at least 0, got -0.5",
    ),
    "a fraction of tokens": ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens=1.5"),
    "an eos beyond the vocabulary": (
        {"seq_len": 5, "eos_token": 13},
        ValueError,
        "eos_id must be below the vocabulary's size 13",
    ),
    "a longer minimum": (
        {"max_new_tokens": 2, "min_new_tokens": 3},
        ValueError,
        "min_new_tokens must be in [0, max_new_tokens = 2], got 3",
    ),
    "an unknown scope": ({"seq_len": 5, "finetune_scope": "actr"}, ValueError, "finetune scope 'actr' not found"),
    "an unknown argument": ({"seq_len": 5, "temprature": 0.5}, TypeError, "temprature"),
    "an extra embedding of the prompt's positions": (
        {"seq_len": 5, "extra_embed": torch.zeros(2, 3, 16)},
        ValueError,
        "extra_embed must broadcast to (b, n, d) = (2, 1, 16), got shape (2, 3, 16)",
    ),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generation_refuses_bad_input(case, make_palm):
    arguments, error, message = GENERATE[case]
    palm = make_palm(finetune_scopes=("actor",)).train()
    check_refused(palm, lambda: palm.generate(**{"prompt": IDS, **arguments}), error, message)


def test_scopes_and_dropout_refuse_bad_input(make_palm):
    palm = make_palm(finetune_scopes=("actor",))
    for call, message in (
        (lambda: palm.add_finetune_params("actor"), "finetune scope 'actor' exists already; there are ['actor']"),
        (lambda: palm.remove_finetune_params("critic"), "finetune scope 'critic' not found; there are ['actor']"),
        (lambda: palm.merge_finetune_params("critic"), "finetune scope 'critic' not found; there are ['actor']"),
        (lambda: palm.finetune_parameters("critic"), "finetune scope 'critic' not found; there are ['actor']"),
        (lambda: palm.add_finetune_params("a.b"), "got 'a.b'"),
        (lambda: palm.add_finetune_params("b", lora_r=0), "lora_r must be at least 1, got 0"),
        (lambda: palm.add_finetune_params("b", lora_dropout=1.0), "lora_dropout must be in [0, 1), got 1.0"),
        (lambda: palm.add_finetune_params("b", lora_targets=("q", "w")), "got ('q', 'w')"),
        (lambda: palm.set_dropout(1.0), "dropout must be in [0, 1), got 1.0"),
        (lambda: palm.set_dropout(-0.1), "dropout must be in [0, 1), got -0.1"),
    ):
        check_refused(palm, call, ValueError, message)
