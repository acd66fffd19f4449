"""Static steps of CoCa's captions: traced once without a break, with the tokens of eager steps."""

import pytest
import torch
from torch._dynamo.utils import counters

from lm_core.generation import static_step

pytestmark = pytest.mark.plain


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Traces without generating code; a function that counts the graphs since the test began."""
    monkeypatch.setattr(static_step, "_BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("beams", [1, 3])
def test_compiled_captions_are_the_eager_ones(make_coca, make_batch, traced, beams):
    model = make_coca().eval()
    tokens = make_batch()[1]
    prefixes = (
        [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([1]), torch.tensor([5, 6])],
        [torch.tensor([7, 1])] * 4,
    )
    for prefix in prefixes:
        settings = {"image_tokens": tokens, "prefix": prefix, "beams": beams, "max_new_tokens": 20, "eos_id": 9}
        assert torch.equal(model.generate(**settings), model.generate(**settings, compile=True))
    assert traced() == 2  # with padding and without
    assert not counters["graph_break"]
