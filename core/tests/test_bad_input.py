"""Bad input is rejected: the error names the argument, its value and the expectation, and nothing changes.

Runs without the run-time shape checker, which would raise its own error first.
"""

import copy
import math
import re

import pytest
import torch

from lm_core.checks import either
from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate
from lm_core.nn.attention import Attention, attend
from lm_core.nn.feedforward import SwiGLU
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.norms import LayerNorm, RMSNorm
from lm_core.nn.rotary import RotaryEmbedding

pytestmark = pytest.mark.plain

NAN, INF = math.nan, math.inf
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
q, kv, true = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 2, 4), torch.ones(2, 5, dtype=torch.bool)


def cache(**changes):
    return KVCache(**{"layers": 2, "batch_size": 2, "max_length": 4, **changes})


PARTS = [
    (lambda: LayerNorm(0), ValueError, "dim must be at least 1, got 0"),
    (lambda: LayerNorm(4.5), TypeError, "dim=4.5"),
    (lambda: RMSNorm(-3), ValueError, "dim must be at least 1, got -3"),
    (lambda: RMSNorm(4, eps="small"), TypeError, "eps='small'"),
    (lambda: RotaryEmbedding(33), ValueError, "dim_head must be even for rotary embeddings, got 33"),
    (lambda: RotaryEmbedding(0), ValueError, "dim must be at least 1, got 0"),
    (lambda: RotaryEmbedding(4, theta=0), ValueError, "theta must be positive, got 0"),
    (lambda: RotaryEmbedding(4, theta=NAN), ValueError, "theta must be positive, got nan"),
    (lambda: RotaryEmbedding(4, scale_base=-1), ValueError, "scale_base must be positive, got -1"),
    (lambda: RotaryEmbedding(4, scale_base=INF), ValueError, "scale_base must be positive, got inf"),
    (lambda: SwiGLU()(torch.zeros(2, 5)), ValueError, "even last dimension, got shape (2, 5)"),
    (lambda: Attention(dropout=1.0), ValueError, "dropout must be in [0, 1), got 1.0"),
    (lambda: Attention(dropout=-0.1), ValueError, "dropout must be in [0, 1), got -0.1"),
    (lambda: Attention(dropout=NAN), ValueError, "dropout must be in [0, 1), got nan"),
    (lambda: Attention(causal="yes"), TypeError, "causal='yes'"),
    (lambda: attend(q[:, [0, 1, 1]], kv, kv), ValueError, "query heads must be a multiple of key heads, got 3 and 2"),
    (lambda: attend(q, kv, kv, causal=True), ValueError, "at least as many keys as queries, got 2 and 3"),
    (
        lambda: attend(q, kv, kv, mask=q),
        TypeError,
        "mask must be boolean (True where a query attends), got torch.float32",
    ),
    (
        lambda: attend(q, kv, kv, mask=true[:, :5]),
        ValueError,
        "mask must broadcast to (b, h, i, j) = (2, 2, 3, 2), got shape (2, 5)",
    ),
    (lambda: Attention()(q, kv, kv, mask=true[:, 0]), ValueError, "(2, 2, 3, 2), got shape (2,)"),
    (lambda: cache(layers=0), ValueError, "layers must be at least 1, got 0"),
    (lambda: cache(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    (lambda: cache(max_length=-2), ValueError, "max_length must be at least 1, got -2"),
    (lambda: cache(max_length=2.5), TypeError, "max_length=2.5"),
]


@pytest.mark.parametrize(("call", "error", "message"), PARTS)
def test_parts_refuse_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def same(one, other):
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.truncate(-1), "length must be in [0, 3], got -1"),
        (lambda c: c.truncate(4), "length must be in [0, 3], got 4"),
        (lambda c: c.update(0, torch.ones(3, 1, 1, 4), torch.ones(3, 1, 1, 4)), "cache holds 2 rows, got a batch of 3"),
    ],
)
def test_a_cache_refuses_and_stays_as_it_was(call, message):
    used = cache(max_length=3)  # no room is left uninitialised
    for layer in range(2):
        used.update(layer, torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    used.advance(3)
    before = copy.deepcopy(vars(used))
    with pytest.raises(ValueError, match=re.escape(message)):
        call(used)
    assert same(list(vars(used).values()), list(before.values()))


def test_an_unused_cache_refuses_another_batch_size():
    unused = cache()
    with pytest.raises(ValueError, match="cache holds 2 rows, got a batch of 5"):
        unused.update(0, torch.ones(5, 1, 1, 4), torch.ones(5, 1, 1, 4))
    assert (unused.nbytes, unused.length, unused.batch_size) == (0, 0, 2)


def lengths(*values):
    return {"prompt_lengths": torch.tensor(values, dtype=None if values else torch.long)}


PROMPTS = [
    (None, {}, TypeError, "prompt must be a tensor of token ids or a list of them, got NoneType"),
    ("hello", {}, TypeError, "prompt must be a tensor of token ids or a list of them, got str"),
    (IDS.float(), {}, TypeError, "prompt must hold integer token ids, row 0 is torch.float32"),
    (IDS > 2, {}, TypeError, "prompt must hold integer token ids, row 0 is torch.bool"),
    (IDS[0], {}, ValueError, "prompt must have shape (b, n), got (3,)"),
    (IDS[None], {}, ValueError, "prompt must have shape (b, n), got (1, 2, 3)"),
    (IDS[:0], {}, ValueError, "prompt must hold at least one row, got none"),
    (IDS[:0], lengths(), ValueError, "prompt must hold at least one row, got none"),
    ([], {}, ValueError, "prompt must hold at least one row, got none"),
    (IDS[:, :0], {}, ValueError, "prompt must hold at least one token a row, row 0 is empty"),
    ([IDS[0], IDS[0][:0]], {}, ValueError, "row 1 is empty"),
    ([[1, 2]], {}, TypeError, "prompt must hold integer token ids, row 0 is <class 'list'>"),
    ([IDS], {}, ValueError, "each prompt of a list must be 1-D, row 0 has shape (2, 3)"),
    (-IDS, {}, ValueError, "prompt must hold token ids in [0, 9), got -6"),
    (IDS + 3, {}, ValueError, "prompt must hold token ids in [0, 9), got 9"),
    (IDS, {"mask": IDS > 0, **lengths(1, 2)}, ValueError, "give mask or prompt_lengths, not both"),
    (list(IDS), {"mask": IDS > 0}, ValueError, "mask and prompt_lengths are for a tensor of prompts"),
    (IDS, {"mask": IDS}, TypeError, "mask must be boolean (True at real tokens), got dtype torch.int64"),
    (IDS, {"mask": IDS[:, :2] > 0}, ValueError, "mask must have the prompt's shape (2, 3), got (2, 2)"),
    (IDS, {"mask": IDS < 4}, ValueError, "row 1 is empty"),
    (IDS, lengths(1), ValueError, "prompt_lengths must have shape (2,), got (1,)"),
    (IDS, lengths(0, 2), ValueError, "prompt_lengths must be in [1, 3], got [0, 2]"),
    (IDS, lengths(1, 4), ValueError, "prompt_lengths must be in [1, 3], got [1, 4]"),
    (IDS, lengths(1.5, 2.0), TypeError, "prompt_lengths must be integers, got dtype torch.float32"),
    (IDS, {"prompt_lengths": [1, 2]}, TypeError, "prompt_lengths=[1, 2]"),
]
SETTINGS = [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens=2.5"),
    ({"min_new_tokens": 5}, ValueError, "min_new_tokens must be in [0, max_new_tokens = 4], got 5"),
    ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be in [0"),
    ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be positive, got 0.0"),
    ({"repetition_penalty": NAN}, ValueError, "repetition_penalty must be positive, got nan"),
    ({"eos_id": -1}, ValueError, "eos_id must not be negative, got -1"),
    ({"eos_id": [2, -1]}, ValueError, "eos_id must not be negative, got [2, -1]"),
    ({"eos_id": 9}, ValueError, "eos_id must be below the vocabulary's size 9, got (9,)"),
    ({"eos_id": "end"}, TypeError, "eos_id='end'"),
    ({"max_new_tokens": 10}, ValueError, "prompt (3 tokens) and max_new_tokens (10) exceed the model's limit of 12"),
]
OF_ONE = [
    (generate, {"temperature": -1.0}, ValueError, "temperature must be a finite number of at least 0, got -1.0"),
    (generate, {"temperature": NAN}, ValueError, "temperature must be a finite number of at least 0, got nan"),
    (generate, {"temperature": INF}, ValueError, "temperature must be a finite number of at least 0, got inf"),
    (beam_search, {"beams": 0}, ValueError, "beams must be at least 1, got 0"),
    (beam_search, {"beams": 1.5}, TypeError, "beams=1.5"),
    (beam_search, {"length_penalty": NAN}, ValueError, "length_penalty must be finite, got nan"),
]


@pytest.mark.parametrize(
    ("function", "prompt", "arguments", "error", "message"),
    [(function, *row) for function in (generate, beam_search) for row in PROMPTS + [(IDS, *row) for row in SETTINGS]]
    + [(function, IDS, *row) for function, *row in OF_ONE],
)
def test_generation_refuses_bad_input_and_touches_nothing(function, prompt, arguments, error, message, models):
    model = models.hidden(9, 0).train()
    model.max_length = 12
    rng, beams = torch.get_rng_state(), {"beams": 2} if function is beam_search else {}
    with pytest.raises(error, match=re.escape(message)):
        function(model, prompt, **{"max_new_tokens": 4, **beams, **arguments})
    assert model.calls == []
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_argument_of_two_names_is_given_under_one():
    assert either(None, new=None, old=None) is None
    assert either(1, new=1, old=5) == either(1, new=5, old=1) == 5
    with pytest.raises(ValueError, match=r"new and old are one argument, got \{'new': 3, 'old': 4\}"):
        either(1, new=3, old=4)
