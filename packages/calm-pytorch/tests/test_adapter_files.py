"""The learned part alone goes to a folder and comes back strictly."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calm_pytorch import AugmentParams
from lm_core.checkpoints.manifest import CheckpointError, write_manifest


@pytest.fixture
def saved(model_of, compose, tmp_path):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True)
    calm.save_adapter(tmp_path / "adapter")
    return calm, tmp_path / "adapter"


def learned(calm):
    return {name: value.clone() for name, value in calm.cross_attns.state_dict().items()}


def test_an_adapter_brings_the_logits_back(saved, model_of, compose, ids):
    calm, folder = saved
    fresh = compose(model_of("llama"), model_of("gpt2", seed=1))
    inputs = {"prompt": ids(2, 4), "return_loss": False}
    assert not torch.equal(fresh(ids(2, 5), **inputs), calm(ids(2, 5), **inputs))
    fresh.load_adapter(folder)
    assert torch.equal(fresh(ids(2, 5), **inputs), calm(ids(2, 5), **inputs))


def test_an_adapter_holds_the_learned_part_alone_and_names_its_wiring(saved):
    calm, folder = saved
    with safe_open(folder / "adapter.safetensors", framework="pt") as stream:
        assert set(stream.keys()) == set(calm.cross_attns.state_dict())
        wiring = json.loads(stream.metadata()["calm_pytorch"])
    assert wiring["connections"] == [[[2, 2], [4, 4]]]


@pytest.mark.parametrize(
    ("changes", "heads", "message"),
    [
        ({"connections": [(1, 1), (4, 4)]}, 2, r"connections is \[\[\[1, 1\], \[4, 4\]\]\], but was \[\[\[2, 2\]"),
        ({"shared_sequence": True}, 2, r"shared_sequence is \[True\], but was \[False\]"),
        ({"hidden_position": "input"}, 2, "augment_hidden_position"),
        ({}, 1, "attn_kwargs"),
    ],
)
def test_an_adapter_of_another_wiring_is_refused_by_name(saved, model_of, compose, changes, heads, message):
    _, folder = saved
    params = AugmentParams(model_of("gpt2", seed=1), **{"connections": [(2, 2), (4, 4)], **changes})
    other = compose(model_of("llama"), params, attn_kwargs={"heads": heads})
    before = learned(other)
    with pytest.raises(CheckpointError, match=message):
        other.load_adapter(folder)
    assert all(torch.equal(value, before[name]) for name, value in learned(other).items())


def test_a_damaged_adapter_is_refused(saved):
    calm, folder = saved
    file = folder / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter.safetensors is damaged"):
        calm.load_adapter(folder)


def test_an_adapter_is_replaced_only_when_asked(saved):
    calm, folder = saved
    with pytest.raises(FileExistsError, match="overwrite=True"):
        calm.save_adapter(folder)
    calm.save_adapter(folder, overwrite=True)
    calm.load_adapter(folder)
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty"):
        calm.save_adapter(folder.parent / "other", overwrite=True)


def test_an_adapter_of_the_first_format_loads_and_is_replaced_by_the_second(saved, model_of, compose):
    calm, folder = saved
    state = {name: value.contiguous() for name, value in learned(calm).items()}
    stored = json.dumps({"format_version": 1, **calm.wiring})
    save_file(state, folder / "adapter.safetensors", metadata={"format": "pt", "calm_pytorch": stored})
    write_manifest(folder)
    fresh = compose(model_of("llama"), model_of("gpt2", seed=1))
    fresh.load_adapter(folder)
    assert all(torch.equal(value, state[name]) for name, value in learned(fresh).items())
    fresh.save_adapter(folder, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["adapter.safetensors"]
    fresh.load_adapter(folder)
