"""Weights of the original implementation load, and give its logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from calm_pytorch import CALM, AugmentParams
from calm_pytorch.interop import ORIGINAL_ATTENTION, load_original, original_connections
from lm_core.checkpoints.manifest import CheckpointError

GOLDEN = Path(__file__).with_name("fixtures") / "original-0.2.2.safetensors"


@pytest.fixture(scope="module")
def golden():
    """Tensors and connections that ``fixtures/make_original_golden.py`` wrote."""
    with safe_open(GOLDEN, framework="pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}, json.loads(stream.metadata()["connections"])  # noqa: SIM118


def part(tensors, name):
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


@pytest.fixture
def composed(golden):
    from x_transformers import Decoder, TransformerWrapper

    tensors, connections = golden

    def model(dim, depth, name):
        layers = Decoder(dim=dim, depth=depth, heads=2, attn_dim_head=8)
        wrapper = TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers).eval()
        wrapper.load_state_dict(part(tensors, name))
        return wrapper

    pairs = [tuple(pair) for pair in connections[0]]
    params = AugmentParams(model(12, 8, "augment"), connections=pairs)
    return CALM(model(16, 4, "anchor"), params, attn_kwargs=ORIGINAL_ATTENTION).eval()


def test_logits_with_the_original_weights_are_the_original_logits(golden, composed):
    tensors, _ = golden
    load_original(composed, part(tensors, "learned"))
    logits = composed(tensors["seq"], prompt=tensors["prompt"], return_loss=False)
    assert torch.allclose(logits, tensors["logits"], atol=1e-5)


@pytest.mark.archives
@pytest.mark.parametrize("packed", [False, True], ids=["state dict", "trainer's package"])
def test_weights_are_read_from_files(golden, composed, tmp_path, packed):
    learned = part(golden[0], "learned")
    torch.save({"model": learned, "step": 3} if packed else learned, tmp_path / "calm.pt")
    load_original(composed, tmp_path / "calm.pt")
    assert all(torch.equal(composed.cross_attns.state_dict()[name], value) for name, value in learned.items())


def test_the_original_wiring_is_known(golden):
    assert [[list(pair) for pair in original_connections(8, 4)]] == golden[1]
    assert original_connections(12, 12) == ((1, 1), (5, 5), (9, 9))
    assert original_connections(4, 12) == ((1, 1),)


def test_weights_of_another_wiring_are_refused_by_key(golden, composed):
    learned = part(golden[0], "learned")
    before = {name: value.clone() for name, value in composed.cross_attns.state_dict().items()}
    learned["0.2.attn.to_q.weight"] = learned.pop("0.1.attn.to_q.weight")
    with pytest.raises(CheckpointError, match=r"missing keys: 0.1.attn.to_q.weight; unexpected keys: 0.2"):
        load_original(composed, learned)
    assert all(torch.equal(value, before[name]) for name, value in composed.cross_attns.state_dict().items())
