"""Static steps of PaLM: traced once without a break, with the tokens of eager steps."""

import pytest
import torch
from torch._dynamo.utils import counters

from lm_core.generation import static_step
from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate

pytestmark = pytest.mark.plain


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Traces without generating code; a function that counts the graphs since the test began."""
    monkeypatch.setattr(static_step, "_BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 13, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("settings", [{}, {"use_xpos": False}, {"kv_heads": 2, "qk_rmsnorm": True}, {"scope": 2}])
@pytest.mark.parametrize("lengths", [(5, 3, 1)])
def test_compiled_steps_give_the_eager_tokens(make_palm, traced, settings, lengths):
    settings = dict(settings)
    scope = {}
    rank = settings.pop("scope", None)
    palm = make_palm(**settings).eval()
    if rank is not None:
        palm.add_finetune_params("actor", lora_r=rank)
        with torch.no_grad():
            for parameter in palm.finetune_parameters("actor"):
                parameter.normal_()
        scope = {"finetune_scope": "actor"}
    extra = torch.randn(palm.dim, generator=torch.Generator().manual_seed(1))
    for model_kwargs in (scope, {**scope, "extra_embed": extra}):
        limits = {"max_new_tokens": 20, "temperature": 0.0, **model_kwargs}
        eager = generate(palm, prompts(*lengths), **limits)
        assert torch.equal(generate(palm, prompts(*lengths), **limits, compile=True).tokens, eager.tokens)
    searched = beam_search(palm, prompts(*lengths), beams=3, max_new_tokens=20, eos_id=3, **scope)
    compiled = beam_search(palm, prompts(*lengths), beams=3, max_new_tokens=20, eos_id=3, compile=True, **scope)
    assert torch.equal(searched.tokens, compiled.tokens)
    assert traced() == 3
    assert not counters["graph_break"]


def test_64_tokens_after_prompts_of_two_lengths_share_a_graph(make_palm, traced):
    palm = make_palm().eval()
    for length in (3, 40):
        palm.generate(prompt=prompts(length), max_new_tokens=64, compile=True)
    assert traced() == 1
