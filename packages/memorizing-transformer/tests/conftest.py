"""Independent references: dense attention over memory and segment, written from the paper's formulas."""

import os
from collections import Counter

import pytest
import torch
from torch import nn


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where there is none; with REQUIRE_CUDA=1 it runs, and fails."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and os.environ.get("REQUIRE_CUDA") != "1" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(scope="session")
def tiny_model():
    """A small model in float64 whose weights are large enough that everything matters."""
    from memorizing_transformer import MemorizingTransformer

    def make(seed=0, **settings):
        torch.manual_seed(seed)
        defaults = {
            "num_tokens": 20,
            "dim": 32,
            "depth": 3,
            "dim_head": 8,
            "heads": 4,
            "num_retrieved_memories": 4,
            "segment_length": 8,
            "max_knn_memories": 24,
        }
        model = MemorizingTransformer(**{**defaults, **settings}).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def read_in_segments():
    """Logits of a teacher-forced pass, segment by segment, and the XL memories after it."""

    def read(model, ids, memories, length=8, xl=None):
        logits = []
        for segment in ids.split(length, dim=1):
            out = model(segment, knn_memories=memories, xl_memories=xl)
            if isinstance(out, tuple):
                out, xl = out
            logits.append(out)
        return torch.cat(logits, dim=1), xl

    return read


@pytest.fixture(scope="session")
def calls_of():
    """``calls_of(model, run)``: how often ``run()`` calls each submodule that has a forward, by name."""

    def count(model, run):
        modules = {
            name: module
            for name, module in model.named_modules()
            if name and type(module).forward is not nn.Module.forward
        }
        calls = Counter(dict.fromkeys(modules, 0))
        handles = [
            module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in modules.items()
        ]
        run()
        for handle in handles:
            handle.remove()
        return calls

    return count
