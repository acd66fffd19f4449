"""Checkpoints: stored values are restored bit for bit, and unusable ones are named before anything changes."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lm_core.checkpoints.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError, verify_manifest, write_manifest
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checkpoints.tensor_files import load_tensors, plain
from lm_core.checkpoints.weights import load_weights, read_weights, save_weights
from lm_core.rng import capture_rng, restore_rng


class Tiny(PretrainedMixin):
    """A tied model: the output layer is the embedding."""

    def __init__(self, *, vocab: int, dim: int, tie: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim, dtype=dtype)
        self.norm = nn.BatchNorm1d(dim, dtype=dtype)
        self.output = nn.Linear(dim, vocab, bias=False, dtype=dtype)
        if tie:
            self.output.weight = self.embedding.weight


def _equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) and x.dtype == y.dtype for (a, x), (b, y) in pairs)


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Bomb:
    """Object whose unpickling writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "boom"))


# ---------------------------------------------------------------- training checkpoints


def test_a_training_state_comes_back_bit_for_bit(tmp_path):
    model = Tiny(vocab=7, dim=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.output(model.norm(model.embedding(torch.arange(7)))).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "cursor": {"rows_seen": 12}, "best": np.float64(0.1), "name": "run"}
    path = save_checkpoint(tmp_path, 3, model=model, trainer_state=state)

    fresh = Tiny(vocab=7, dim=4)
    loaded = load_checkpoint(tmp_path, model=fresh)
    assert (loaded.path, loaded.step, loaded.model_state) == (path, 3, None)
    assert _equal(model, fresh)
    assert loaded.trainer_state["cursor"] == {"rows_seen": 12}
    assert loaded.trainer_state["best"] == 0.1
    again = torch.optim.AdamW(fresh.parameters(), lr=0.5)
    again.load_state_dict(loaded.trainer_state["optimizer"])
    for old, new in zip(optimizer.state_dict()["state"].values(), again.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert again.param_groups[0]["lr"] == 0.1


@pytest.mark.plain  # the run-time checker itself draws from python's generator
def test_all_random_generators_go_on_as_they_would_have(tmp_path):
    random.seed(1)
    own = torch.Generator().manual_seed(5)
    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002
    save_checkpoint(tmp_path, 0, model=nn.Linear(2, 2), rng=capture_rng({"sampler": own}))

    def draw():
        others = [random.random(), random.gauss(0, 1), np.random.randn()]  # noqa: NPY002
        return [*others, torch.rand(2).tolist(), torch.rand(2, generator=own).tolist()]

    expected = draw()
    draw()
    restore_rng(load_checkpoint(tmp_path).rng, {"sampler": own})
    assert draw() == expected


@pytest.mark.plain  # the run-time checker itself draws from python's generator
def test_saving_and_loading_draw_no_random_numbers(tmp_path):
    model = Tiny(vocab=5, dim=4)
    before = capture_rng()
    save_checkpoint(tmp_path, 1, model=model)
    load_checkpoint(tmp_path, model=model)
    Tiny.from_pretrained(tmp_path / "step-1")
    after = capture_rng()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["python"]["words"], after["python"]["words"])
    assert torch.equal(before["numpy"]["key"], after["numpy"]["key"])


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        save_checkpoint(tmp_path, step, model=nn.Linear(1, 1), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10", "step-9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    assert load_checkpoint(tmp_path).step == 9


def test_a_step_saved_again_is_a_new_folder_and_the_newest(tmp_path):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    save_checkpoint(tmp_path, 5, model=first)
    assert save_checkpoint(tmp_path, 5, model=second).name == "step-5-2"
    target = nn.Linear(1, 1)
    assert load_checkpoint(tmp_path, model=target, step=5).step == 5
    assert _equal(target, second)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used_where_one_is_whole(tmp_path):
    models = [nn.Linear(3, 3) for _ in range(3)]
    for step, model in enumerate(models):
        save_checkpoint(tmp_path, step, model=model)
    _flip_byte(tmp_path / "step-2" / "model.safetensors")
    target = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"step-2: .*content of model\.safetensors differs"):
        loaded = load_checkpoint(tmp_path, model=target)
    assert loaded.step == 1
    assert _equal(target, models[1])
    for step in (0, 1):
        (tmp_path / f"step-{step}" / "trainer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint .* damaged: step-2: .*step-1: .*step-0: .*rs is miss"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "trainer.safetensors", "rng-0.safetensors", "model.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
def test_every_kind_of_damage_to_every_file_is_noticed(tmp_path, name, harm):
    save_checkpoint(tmp_path, 1, model=nn.Linear(3, 3))
    save_checkpoint(tmp_path, 2, model=nn.Linear(3, 3))
    path = tmp_path / "step-2" / name
    if harm == "flip":
        _flip_byte(path)
    elif harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -3 if harm == "truncate" else 0])
    with pytest.warns(UserWarning, match="step-2"):
        assert load_checkpoint(tmp_path).step == 1
    with pytest.raises(CheckpointError, match="step-2"):
        load_checkpoint(tmp_path, step=2)


def test_going_back_before_a_damaged_checkpoint_never_loses_the_new_one(tmp_path):
    save_checkpoint(tmp_path, 1, model=nn.Linear(1, 1), keep=2)
    (save_checkpoint(tmp_path, 2, model=nn.Linear(1, 1), keep=2) / "manifest.json").write_text("{")
    written = save_checkpoint(tmp_path, 2, model=nn.Linear(1, 1), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [written.name] == ["step-2-2"]
    assert load_checkpoint(tmp_path).step == 2


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, 4, model=nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .* which has \[4\]"):
        load_checkpoint(tmp_path, step=7)


def test_state_that_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"trainer_state\['a'\]\[1\]\['when'\] must be a tensor.*got PosixPath"):
        save_checkpoint(tmp_path, 1, model=nn.Linear(1, 1), trainer_state={"a": [0, {"when": Path("x")}]})
    assert list(tmp_path.iterdir()) == []


def test_a_slice_of_a_large_tensor_is_stored_without_the_rest(tmp_path):
    save_checkpoint(tmp_path, 1, model=nn.Linear(1, 1), trainer_state={"row": torch.zeros(1000, 1000)[0]})
    assert (tmp_path / "step-1" / "trainer.safetensors").stat().st_size < 10_000


def test_another_world_size_is_refused_by_name(tmp_path):
    path = save_checkpoint(tmp_path, 1, model=nn.Linear(1, 1))
    (path / "manifest.json").unlink()
    write_manifest(path, step=1, world_size=2, sequence=1)
    with pytest.raises(CheckpointError, match=r"written by 2 processes .*got 1"):
        load_checkpoint(tmp_path)


# ---------------------------------------------------------------- weights


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = Tiny(vocab=50, dim=8)
    model.save_pretrained(tmp_path)
    assert "output.weight" not in read_weights(tmp_path / "model.safetensors")
    loaded = Tiny.from_pretrained(tmp_path)
    assert loaded.output.weight is loaded.embedding.weight
    assert _equal(model, loaded)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (True, "missing keys: output.weight"),
        (False, "tied in the model but different in the file: output.weight and em"),
    ],
)
def test_a_file_tied_otherwise_than_the_model_is_refused(tmp_path, stored, message):
    Tiny(vocab=5, dim=4, tie=stored).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Tiny.from_pretrained(tmp_path, tie=not stored)


def test_overlapping_and_strided_tensors_come_back_equal(tmp_path):
    base = torch.arange(12.0)
    state = {"a": base[:8], "b": base[4:], "c": base.view(3, 4).t(), "d": base, "e": base, "empty": torch.zeros(0, 3)}
    save_weights(tmp_path / "w.safetensors", state)
    stored = read_weights(tmp_path / "w.safetensors")
    assert set(stored) == {"a", "b", "c", "d", "empty"}
    assert all(torch.equal(stored[name], state[name]) for name in stored)


def test_a_refused_state_names_every_problem_or_the_first_eight_and_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {**before, "1.weight": torch.zeros(5, 3), "extra": torch.zeros(1), "1.bias": torch.zeros(4).double()}
    del state["0.bias"]
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state)
    for part in (
        "missing keys: 0.bias",
        "unexpected keys: extra",
        "1.weight (stored (5, 3), model (4, 3))",
        "1.bias (stored torch.float64, model torch.float32)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"unexpected keys: k0, .*k7 and 12 more"):
        load_weights(nn.Identity(), {f"k{number}": torch.zeros(1) for number in range(20)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loaded_model_has_the_stored_dtype(tmp_path, dtype):
    model = Tiny(vocab=5, dim=4).to(dtype)
    model.save_pretrained(tmp_path)
    assert _equal(Tiny.from_pretrained(tmp_path), model)


# ---------------------------------------------------------------- nothing is executed


@pytest.mark.parametrize("name", ["trainer.safetensors", "rng-0.safetensors", "model.safetensors", "config.json"])
@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_a_pickle_bomb_is_refused_and_not_executed(tmp_path, name, protocol):
    path = save_checkpoint(tmp_path / "run", 1, model=Tiny(vocab=3, dim=2))
    bomb = Bomb(tmp_path / "executed")
    if protocol == "torch":
        torch.save({"state": bomb}, path / name)
    else:
        (path / name).write_bytes(pickle.dumps(bomb))
    (path / "manifest.json").unlink()
    write_manifest(path, step=1, world_size=1, sequence=1)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(tmp_path / "run", model=Tiny(vocab=3, dim=2))
    with pytest.raises(CheckpointError, match=name):
        load_tensors(path / name)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "executed").exists()  # the bomb is real


def test_a_config_cannot_have_foreign_modules_imported(tmp_path):
    model = Tiny(vocab=3, dim=2)
    config = model.config
    config["arguments"]["vocab"] = {
        "$module": {"kind": "family", "config": {"package": "antigravity", "class": "open", "arguments": {}}}
    }
    with pytest.raises(CheckpointError, match="needs open of antigravity; import it"):
        Tiny.from_config(config)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    Tiny(vocab=3, dim=2).save_pretrained(tmp_path / "m")
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", "/etc/passwd", "a\\..\\b"):
        manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
        manifest |= {"format_version": 1, "files": {name: {"sha256": "0", "size": 1}}}
        manifest.pop("checksum", None)  # which format 1 lacks
        (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="not inside the folder"):
            verify_manifest(tmp_path / "m")


# ---------------------------------------------------------------- bad input


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must not be negative, got -1"),
        ({"step": 1.5}, TypeError, "step"),
        ({"keep": 0}, ValueError, "keep must be at least 1 or None, got 0"),
        ({"model": "model"}, TypeError, "model"),
        ({"tokenizer": object()}, TypeError, "tokenizer must have save_pretrained"),
        ({"trainer_state": {"f": print}}, TypeError, r"trainer_state\['f'\] .*got builtin_function"),
        ({"trainer_state": {"a": {1.5: 2}}}, TypeError, "strings or integers as keys, got 1.5"),
        ({"rng": {"x": object()}}, TypeError, r"rng\['x'\]"),
        ({"model": {"a": 3}}, TypeError, "'a' must be a tensor|Tensor"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, arguments, error, message):
    call = {"step": 1, "model": nn.Linear(1, 1), **arguments}
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "run", call.pop("step"), **call)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.plain
def test_a_path_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tensors(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.pt"):
        load_tensors(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_weights(tmp_path / "text.safetensors")


@pytest.mark.plain
def test_a_random_state_that_does_not_fit_is_refused_before_any_is_set():
    state = capture_rng()
    before = random.getstate()
    for wrong, message in (
        ({}, "must come from capture_rng"),
        ({**state, "generators": {"a": torch.zeros(1)}}, r"has the generators \['a'\], but \[\]"),
        ({**state, "cuda": [torch.zeros(1)] * 99}, "taken with 99 CUDA devices"),
        ({**state, "numpy": {**state["numpy"], "kind": "PCG64"}}, "'PCG64'"),
    ):
        with pytest.raises(ValueError, match=message):
            restore_rng(wrong)
    assert random.getstate() == before


def test_plain_state_keeps_values_and_containers():
    value = {"a": (1, [2.5, None]), "b": np.int64(3), "c": torch.float16, 4: "x"}
    assert plain(value) == {"a": (1, [2.5, None]), "b": 3, "c": torch.float16, 4: "x"}
    assert type(plain(value)["b"]) is int
