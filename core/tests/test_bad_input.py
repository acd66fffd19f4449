"""Bad input is refused at the door: the error names the argument, what it was and what was expected, and nothing moves.

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
q3, kv2 = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4)
q2, kv1 = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 2, 4)


def cache(**changes):
    return KVCache(**{"layers": 2, "batch_size": 2, "max_length": 4, **changes})


PARTS = {
    "norm of no features": (lambda: LayerNorm(0), ValueError, "dim must be at least 1, got 0"),
    "norm of fractional size": (lambda: LayerNorm(4.5), TypeError, "dim=4.5"),
    "norm of negative size": (lambda: RMSNorm(-3), ValueError, "dim must be at least 1, got -3"),
    "norm with text as eps": (lambda: RMSNorm(4, eps="small"), TypeError, "eps='small'"),
    "odd rotary size": (
        lambda: RotaryEmbedding(33),
        ValueError,
        "dim_head must be even for rotary embeddings, got 33",
    ),
    "no rotary size": (lambda: RotaryEmbedding(0), ValueError, "dim must be at least 1, got 0"),
    "zero theta": (lambda: RotaryEmbedding(4, theta=0), ValueError, "theta must be positive, got 0"),
    "theta not a number": (lambda: RotaryEmbedding(4, theta=NAN), ValueError, "theta must be positive, got nan"),
    "negative scale base": (
        lambda: RotaryEmbedding(4, scale_base=-1),
        ValueError,
        "scale_base must be positive, got -1",
    ),
    "infinite scale base": (
        lambda: RotaryEmbedding(4, scale_base=INF),
        ValueError,
        "scale_base must be positive, got inf",
    ),
    "odd SwiGLU input": (lambda: SwiGLU()(torch.zeros(2, 5)), ValueError, "even last dimension, got shape (2, 5)"),
    "dropout of one": (lambda: Attention(dropout=1.0), ValueError, "dropout must be in [0, 1), got 1.0"),
    "negative dropout": (lambda: Attention(dropout=-0.1), ValueError, "dropout must be in [0, 1), got -0.1"),
    "dropout not a number": (lambda: Attention(dropout=NAN), ValueError, "dropout must be in [0, 1), got nan"),
    "causal as text": (lambda: Attention(causal="yes"), TypeError, "causal='yes'"),
    "heads that do not divide": (
        lambda: attend(q3, kv2, kv2),
        ValueError,
        "query heads must be a multiple of key heads, got 3 and 2",
    ),
    "more queries than keys": (
        lambda: attend(q2, kv1, kv1, causal=True),
        ValueError,
        "at least as many keys as queries, got 2 and 3",
    ),
    "mask of floats": (
        lambda: attend(q2, kv1, kv1, mask=torch.ones(2, 2)),
        TypeError,
        "mask must be boolean (True where a query may look), got torch.float32",
    ),
    "mask of another length": (
        lambda: attend(q2, kv1, kv1, mask=torch.ones(2, 5, dtype=torch.bool)),
        ValueError,
        "mask must broadcast to (b, h, i, j) = (2, 2, 3, 2), got shape (2, 5)",
    ),
    "mask of one dimension": (
        lambda: Attention()(q2, kv1, kv1, mask=torch.ones(2, dtype=torch.bool)),
        ValueError,
        "mask must broadcast to (b, h, i, j) = (2, 2, 3, 2), got shape (2,)",
    ),
    "cache without layers": (lambda: cache(layers=0), ValueError, "layers must be at least 1, got 0"),
    "cache without rows": (lambda: cache(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    "cache without room": (lambda: cache(max_length=-2), ValueError, "max_length must be at least 1, got -2"),
    "cache of fractional room": (lambda: cache(max_length=2.5), TypeError, "max_length=2.5"),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_refuse_bad_input(case):
    call, error, message = PARTS[case]
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


def row_mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


PROMPTS = {
    "no prompt": (None, {}, TypeError, "prompt must be a tensor of token ids or a list of them, got NoneType"),
    "text": ("hello", {}, TypeError, "prompt must be a tensor of token ids or a list of them, got str"),
    "floats": (IDS.float(), {}, TypeError, "prompt must hold integer token ids, row 0 is torch.float32"),
    "booleans": (IDS > 2, {}, TypeError, "prompt must hold integer token ids, row 0 is torch.bool"),
    "one dimension": (IDS[0], {}, ValueError, "prompt must have shape (b, n), got (3,)"),
    "three dimensions": (IDS[None], {}, ValueError, "prompt must have shape (b, n), got (1, 2, 3)"),
    "no rows": (IDS[:0], {}, ValueError, "prompt must hold at least one row, got none"),
    "no rows with lengths": (
        IDS[:0],
        {"prompt_lengths": torch.tensor([], dtype=torch.long)},
        ValueError,
        "prompt must hold at least one row, got none",
    ),
    "an empty list": ([], {}, ValueError, "prompt must hold at least one row, got none"),
    "no tokens": (IDS[:, :0], {}, ValueError, "prompt must hold at least one token a row, row 0 is empty"),
    "a list with an empty row": ([IDS[0], IDS[0][:0]], {}, ValueError, "row 1 is empty"),
    "a list of lists": ([[1, 2]], {}, TypeError, "prompt must hold integer token ids, row 0 is <class 'list'>"),
    "a list of matrices": ([IDS], {}, ValueError, "each prompt of a list must be 1-D, row 0 has shape (2, 3)"),
    "a negative id": (-IDS, {}, ValueError, "prompt must hold token ids in [0, 9), got -6"),
    "an id beyond the vocabulary": (IDS + 3, {}, ValueError, "prompt must hold token ids in [0, 9), got 9"),
    "mask and lengths": (
        IDS,
        {"mask": IDS > 0, "prompt_lengths": torch.tensor([1, 2])},
        ValueError,
        "give mask or prompt_lengths, not both",
    ),
    "a list with a mask": (list(IDS), {"mask": IDS > 0}, ValueError, "mask and prompt_lengths go with a tensor"),
    "mask of numbers": (
        IDS,
        {"mask": IDS},
        TypeError,
        "mask must be boolean (True at real tokens), got dtype torch.int64",
    ),
    "mask of another shape": (
        IDS,
        {"mask": IDS[:, :2] > 0},
        ValueError,
        "mask must have the prompt's shape (2, 3), got (2, 2)",
    ),
    "mask of an empty row": (IDS, {"mask": row_mask([1, 1, 1], [0, 0, 0])}, ValueError, "row 1 is empty"),
    "lengths of another shape": (
        IDS,
        {"prompt_lengths": torch.tensor([1])},
        ValueError,
        "prompt_lengths must have shape (2,), got (1,)",
    ),
    "a length of zero": (
        IDS,
        {"prompt_lengths": torch.tensor([0, 2])},
        ValueError,
        "prompt_lengths must be in [1, 3], got [0, 2]",
    ),
    "a length beyond the prompt": (
        IDS,
        {"prompt_lengths": torch.tensor([1, 4])},
        ValueError,
        "prompt_lengths must be in [1, 3], got [1, 4]",
    ),
    "fractional lengths": (
        IDS,
        {"prompt_lengths": torch.tensor([1.5, 2.0])},
        TypeError,
        "prompt_lengths must be integers, got dtype torch.float32",
    ),
    "lengths as a list": (IDS, {"prompt_lengths": [1, 2]}, TypeError, "prompt_lengths=[1, 2]"),
}
SETTINGS = {
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    "a fraction of tokens": ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens=2.5"),
    "a longer minimum than maximum": (
        {"min_new_tokens": 5},
        ValueError,
        "min_new_tokens must be in [0, max_new_tokens = 4], got 5",
    ),
    "a negative minimum": ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be in [0"),
    "no repetition penalty": ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be positive, got 0.0"),
    "penalty not a number": ({"repetition_penalty": NAN}, ValueError, "repetition_penalty must be positive, got nan"),
    "a negative eos": ({"eos_id": -1}, ValueError, "eos_id must not be negative, got -1"),
    "a negative eos among others": ({"eos_id": [2, -1]}, ValueError, "eos_id must not be negative, got [2, -1]"),
    "an eos beyond the vocabulary": (
        {"eos_id": 9},
        ValueError,
        "eos_id must be below the vocabulary's size 9, got (9,)",
    ),
    "eos as text": ({"eos_id": "end"}, TypeError, "eos_id='end'"),
    "too long for the model": (
        {"max_new_tokens": 10},
        ValueError,
        "prompt (3 tokens) and max_new_tokens (10) exceed the model's limit of 12",
    ),
}
SAMPLING = {
    "negative temperature": ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
    "temperature not a number": ({"temperature": NAN}, "temperature must be a finite number of at least 0, got nan"),
    "infinite temperature": ({"temperature": INF}, "temperature must be a finite number of at least 0, got inf"),
}
BEAMS = {
    "no beams": ({"beams": 0}, ValueError, "beams must be at least 1, got 0"),
    "a fraction of beams": ({"beams": 1.5}, TypeError, "beams=1.5"),
    "length penalty not a number": ({"length_penalty": NAN}, ValueError, "length_penalty must be finite, got nan"),
}


@pytest.fixture
def refuses(models):
    """Calls ``generate`` or ``beam_search`` on a model that must not be touched."""

    def check(function, prompt, arguments, error, message):
        model = models.hidden(9, 0).train()
        model.max_length = 12
        rng, arguments = torch.get_rng_state(), {"max_new_tokens": 4, **arguments}
        with pytest.raises(error, match=re.escape(message)):
            function(model, prompt, **arguments)
        assert model.calls == []
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), rng)

    return check


@pytest.mark.parametrize("case", PROMPTS)
def test_generation_refuses_bad_prompts(case, refuses):
    prompt, arguments, error, message = PROMPTS[case]
    refuses(generate, prompt, arguments, error, message)
    refuses(beam_search, prompt, {"beams": 2, **arguments}, error, message)


@pytest.mark.parametrize("case", SETTINGS)
def test_generation_refuses_bad_settings(case, refuses):
    arguments, error, message = SETTINGS[case]
    refuses(generate, IDS, arguments, error, message)
    refuses(beam_search, IDS, {"beams": 2, **arguments}, error, message)


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling_refuses_bad_temperatures(case, refuses):
    refuses(generate, IDS, SAMPLING[case][0], ValueError, SAMPLING[case][1])


@pytest.mark.parametrize("case", BEAMS)
def test_beam_search_refuses_bad_settings(case, refuses):
    arguments, error, message = BEAMS[case]
    refuses(beam_search, IDS, {"beams": 2, **arguments}, error, message)


def test_an_argument_of_two_names_is_given_under_one():
    assert either(None, new=None, old=None) is None
    assert either(1, new=1, old=5) == either(1, new=5, old=1) == 5
    with pytest.raises(ValueError, match=r"new and old are one argument, got \{'new': 3, 'old': 4\}"):
        either(1, new=3, old=4)
