"""The blocks of models of any library, found and compiled one by one."""

import functools

import pytest
import torch
from torch import nn

from lm_core.training.blocks import blocks_of, compiled_blocks, enable_gradient_checkpointing


class Library(nn.Module):
    """A model in the manner of transformers."""

    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.h = nn.ModuleList([nn.Linear(2, 2), Layer(), Layer()])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x):
        return self.parts[0](x).sin()


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.ReLU()]), nn.Linear(1, 1)])

    def blocks(self):
        return iter([self.layers[1]])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.head = nn.Linear(2, 2)
        self.head.weight = self.layers[1].weight


def test_blocks_are_found_in_models_of_any_library():
    library, own, tied = Library(), Own(), Tied()
    assert blocks_of(library) == [library.h[1], library.h[2]]
    assert blocks_of(own) == [own.layers[1]]
    assert blocks_of(tied) == [tied.layers[0]]  # the other block's weight is used outside of it
    both = nn.ModuleDict({"a": own, "b": library})
    assert blocks_of(both) == [own.layers[1], library.h[1], library.h[2]]
    own.blocks = None
    assert blocks_of(own) == [*own.layers[0], own.layers[1]]
    vision = nn.Module()
    vision.blocks = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert blocks_of(vision) == list(vision.blocks)
    assert blocks_of(nn.Linear(1, 1)) == []


def test_compiled_blocks_run_eagerly_in_evaluation_and_are_restored(monkeypatch):
    calls = []

    def compile_(function):
        return lambda *args: calls.append(1) or function(*args)

    monkeypatch.setattr(torch, "compile", compile_)
    layer, x = Layer(), torch.ones(1, 2)
    expected = layer(x)
    with compiled_blocks([layer]):
        assert torch.equal(layer(x), expected)
        layer.eval()
        assert torch.equal(layer(x), expected)  # with gradients, as in reinforcement learning
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
    layer.train()
    assert torch.equal(layer(x), expected)
    assert (len(calls), "forward" in vars(layer)) == (2, False)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False


class Enabled(nn.Module):
    """A model in the manner of transformers."""

    def __init__(self):
        super().__init__()
        self.layer = Checkpointed()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.layer.gradient_checkpointing = gradient_checkpointing_kwargs

    def gradient_checkpointing_disable(self):
        self.layer.gradient_checkpointing = False


def test_gradient_checkpointing_is_enabled_in_any_model_that_has_it_and_restored():
    own, library = Checkpointed(), Enabled()
    restore = enable_gradient_checkpointing(nn.ModuleList([own, nn.Linear(1, 1), library]))
    assert own.gradient_checkpointing is True
    assert library.layer.gradient_checkpointing == {"use_reentrant": False}
    enable_gradient_checkpointing(library)()  # enabled before: stays so
    assert library.layer.gradient_checkpointing == {"use_reentrant": False}
    restore()
    assert (own.gradient_checkpointing, library.layer.gradient_checkpointing) == (False, False)
    with pytest.raises(TypeError, match=r"gradient_checkpointing needs a model of these packages .*, got Linear"):
        enable_gradient_checkpointing(nn.Linear(1, 1))


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
def test_the_blocks_of_a_transformers_model_share_their_compiled_code(monkeypatch, kind):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES)).train()
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with compiled_blocks(blocks := blocks_of(model)):
        for length in (9, 12, 15):
            ids = torch.randint(64, (2, length))
            compiled = model(ids, use_cache=False).logits
            compiled.sum().backward()
    torch.testing.assert_close(model(ids, use_cache=False).logits, compiled, rtol=1e-6, atol=1e-6)
    assert len(blocks) == 4
    # of one block for a first length, then for any
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
