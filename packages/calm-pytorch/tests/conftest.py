"""Tiny models of every kind that can be composed, and what the tests compare them by."""

import os
import signal

import pytest
import torch
from torch import nn

VOCABULARY = 40


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where there is none; with REQUIRE_CUDA=1 it runs, and fails."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and os.environ.get("REQUIRE_CUDA") != "1" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


class StopAt:
    """A tracker that presses Ctrl-C when an update's metrics arrive."""

    def __init__(self, step):
        self.step = step

    def log(self, values, step):
        if step == self.step and "loss" in values:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="session")
def stop_at():
    """`stop_at(step)` is a tracker that interrupts a run after this update."""
    return StopAt


class PlainBlock(nn.Module):
    """A causal layer that returns a tuple: a running mean of the past through a small network."""

    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Linear(2 * dim, dim)

    def forward(self, x):
        counts = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        past = x.cumsum(dim=1) / counts
        return x + torch.tanh(self.mix(torch.cat((x, past), dim=-1))), counts


class PlainLM(nn.Module):
    """A causal language model of no library, with batch statistics and dropout."""

    def __init__(self, dim=24, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.norm = nn.BatchNorm1d(dim)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(PlainBlock(dim) for _ in range(depth))
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, ids):
        x = self.norm(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x, _ = layer(self.dropout(x))
        return self.head(x)


def x_transformers_lm(dim=32, depth=4, **options):
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCABULARY,
        max_seq_len=64,
        attn_layers=Decoder(dim=dim, depth=depth, heads=2, attn_dim_head=16, **options),
    )


def hugging_face(kind, layers=4):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    wide = {**sizes, "intermediate_size": 48, "max_position_embeddings": 64}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    name, options = {
        "gpt2": ("gpt2", {**sizes, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}),
        "llama": ("llama", {**wide, **ends, "num_key_value_heads": 1}),
        "neox": ("gpt_neox", {**wide, **ends}),
        "bloom": ("bloom", {**sizes, **ends}),
        "bert": ("bert", {**wide, "hidden_dropout_prob": 0.1}),
        "vit": ("vit", {**wide, "image_size": 8, "patch_size": 4}),
    }[kind]
    config = AutoConfig.for_model(name, **options)
    if kind in ("bert", "vit"):
        return AutoModel.from_config(config, add_pooling_layer=False)
    return AutoModelForCausalLM.from_config(config)


def build_model(kind, seed=0, **sizes):
    torch.manual_seed(seed)
    if kind == "plain":
        model = PlainLM(**sizes)
    elif kind == "x-transformers":
        model = x_transformers_lm(**sizes)
    else:
        model = hugging_face(kind, **sizes)
    # initial weights of some libraries are so small that a model hardly reads its input
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def model_of():
    """``model_of(kind, seed=0, **sizes)``: "plain", "x-transformers", or a Hugging Face architecture; 40 tokens."""
    return build_model


@pytest.fixture(scope="session")
def compose():
    """``compose(anchor, *augments, **options)``: a CALM of models of any kind; augments are models or params."""
    from calm_pytorch import CALM, AugmentParams

    def composed(anchor, *augments, trained=False, shared=False, **options):
        params = [
            augment
            if isinstance(augment, AugmentParams)
            else AugmentParams(
                augment,
                transformer_blocks="layers" if isinstance(augment, PlainLM) else None,
                shared_sequence=shared,
                connect_every_num_layers=2,
            )
            for augment in augments
        ]
        if isinstance(anchor, PlainLM):
            options.setdefault("anchor_transformer_blocks", "layers")
        torch.manual_seed(1)
        calm = CALM(anchor, params, **options)
        if trained:
            with torch.no_grad():
                for parameter in calm.trainable_parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return calm.eval()

    return composed


@pytest.fixture
def ids():
    """``ids(b, n)``: token ids."""

    def make(b, n, seed=0):
        return torch.randint(0, VOCABULARY, (b, n), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def snapshot():
    """Every parameter and buffer of a model, copied."""

    def copy(model):
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named}

    return copy
