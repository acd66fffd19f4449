"""Static steps of the small decoder: traced once without a break, with the tokens of eager steps."""

import pytest
import torch
from torch._dynamo.utils import counters

from lm_core.generation import static_step
from lm_core.generation.generate import generate

pytestmark = pytest.mark.plain


def test_compiled_steps_of_the_small_decoder_give_the_eager_tokens(make_model, monkeypatch):
    monkeypatch.setattr(static_step, "_BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    model = make_model().eval()
    for rows in ([torch.tensor([1, 2, 3]), torch.tensor([4])], [torch.tensor([1, 2]), torch.tensor([3, 4, 5, 6])]):
        eager, compiled = (generate(model, rows, max_new_tokens=64, temperature=0.0, compile=c) for c in (False, True))
        assert torch.equal(eager.tokens, compiled.tokens)
    assert counters["stats"]["unique_graphs"] == 1
