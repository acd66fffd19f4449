"""Files from strangers: nothing in them is executed, leads elsewhere, or takes memory without limit."""

import copy
import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lm_core import PretrainedMixin
from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints import tensor_files
from lm_core.checkpoints.checkpoint import (
    CheckpointError,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)
from lm_core.checkpoints.manifest import read_json, write_json
from lm_core.checkpoints.module_specs import decode_argument, encode_argument
from lm_core.checkpoints.tensor_files import save_tensors
from lm_core.checks import typed

FORMAT_1 = Path(__file__).parent / "fixtures" / "format-1"
STATE = {
    "optimizer": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).reshape(2, 3)}},
    "numbers": [1, -2.5, float("inf"), None, True, "text"],
    "pair": (torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)),
    "dtype": torch.float16,
    "bool": torch.tensor([True, False]),
}


class Small(PretrainedMixin):
    """Model with a folder that belongs to the machine, not to the checkpoint."""

    local_arguments = frozenset({"folder"})

    @typed
    def __init__(self, *, dim: int, depth: int = 1, folder: str | Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))


class Wrapped(PretrainedMixin):
    """Model that contains another module."""

    def __init__(self, *, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b and type(a) is type(b)


def test_nested_state_comes_back_without_pickles(tmp_path):
    shared = torch.arange(4.0)
    state = {**STATE, "twice": [shared, shared]}
    save_tensors(tmp_path / "state", state)
    assert equal(load_tensors(tmp_path / "state"), state)
    assert b"pickle" not in (tmp_path / "state").read_bytes()


def test_every_flipped_bit_of_a_state_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "state"
    save_tensors(path, STATE)
    content = path.read_bytes()
    silent = 0
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 4]) + content[index + 1 :])
        try:
            assert equal(load_tensors(path), STATE)
            silent += 1
        except CheckpointError:
            continue
    assert silent == 0


def test_a_state_of_format_1_is_still_read():
    if tensor_files.torch_version() < tensor_files.SAFE_TORCH:
        pytest.skip("this torch cannot read files of torch.save safely")
    loaded = load_checkpoint(FORMAT_1)
    assert loaded.step == 3
    assert loaded.model_state.keys() == Small(dim=2).state_dict().keys()
    assert loaded.trainer_state["cursor"] == 7
    assert torch.equal(loaded.trainer_state["moments"], torch.arange(3.0))


@pytest.mark.archives
@pytest.mark.plain
def test_a_torch_that_cannot_read_archives_safely_refuses_them(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt")
    assert equal(load_tensors(tmp_path / "old.pt"), {"a": torch.ones(1)})
    monkeypatch.setattr(tensor_files, "torch_version", lambda: (2, 9))
    with pytest.raises(CheckpointError, match=r"cannot read safely \(CVE-2026-24747\); upgrade torch to 2\.10"):
        load_tensors(tmp_path / "old.pt")


@pytest.mark.archives
@pytest.mark.plain
def test_archives_of_code_and_bare_pickles_are_refused_before_torch_reads_them(tmp_path, monkeypatch):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), str(tmp_path / "code.pt"))
    torch.save({"a": 1}, tmp_path / "bare.pt", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(CheckpointError, match=r"code\.pt is no plain archive of torch\.save; nothing was run"):
        load_tensors(tmp_path / "code.pt")
    with pytest.raises(
        CheckpointError, match=r"bare\.pt is a pickle, as torch.save wrote before version 1.6, .*; nothing was run"
    ):
        load_tensors(tmp_path / "bare.pt")


@pytest.mark.parametrize("field", ["step", "world_size", "sequence", "files"])
def test_a_manifest_whose_entries_were_changed_is_refused(tmp_path, field):
    path = save_checkpoint(tmp_path, 4, model=nn.Linear(1, 1)) / "manifest.json"
    manifest = read_json(path)
    manifest[field] = manifest[field] + 1 if field != "files" else dict(list(manifest[field].items())[1:])
    write_json(path, manifest)
    with pytest.raises(CheckpointError, match="entries differ from what was written"):
        load_checkpoint(path.parent)


def rewritten(folder: Path, **changes: object) -> Path:
    """A saved ``Small(dim=2)`` whose config.json was changed and whose manifest agrees, as strangers write it."""
    from lm_core.checkpoints.manifest import write_manifest

    Small(dim=2).save_pretrained(folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    return folder


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": "2"}, "config.json has arguments that Small refuses: .*dim"),
        ({"dim": {"$dict": 5}}, "config.json has a wrong value for dim"),
        ({"dim": {"$float": "x"}}, "config.json has a wrong value for dim"),
        ({"dim": 2, "size": 3}, "config.json has arguments that Small lacks: size"),
        ({"dim": 2, "depth": 10**9}, "depth must be at most 1000, got 1000000000"),
        ({"dim": {"$module": {"config": {"num_layers": [2, 10**9]}}}}, "num_layers must be at most 1000"),
        ({"dim": 10**9}, "beyond any memory|weights and holds"),
        ({"dim": 2**50}, r"arguments\['dim'\] must be at most"),
        ({"dim": 2**20}, "describes a Small of 1,099,512,676,352 weights and holds 6"),
        ({"dim": nested(40)}, "is nested too deeply"),
        ({"dim": {"$path": "/etc"}}, "names the path '/etc'; paths are not read from it"),
    ],
)
def test_a_hostile_configuration_is_refused_by_file_and_field_before_anything_is_built(tmp_path, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        Small.from_pretrained(rewritten(tmp_path / "m", arguments=arguments))


@pytest.mark.plain
def test_a_configuration_nested_beyond_the_interpreter_is_refused_by_file(tmp_path):
    folder = rewritten(tmp_path / "m")
    (folder / "config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(folder / "config.json")


def test_a_folder_of_this_machine_is_neither_stored_nor_read(tmp_path):
    Small(dim=2, folder="/var/here").save_pretrained(tmp_path / "a")
    assert "/var/here" not in (tmp_path / "a" / "config.json").read_text()
    assert Small.from_pretrained(tmp_path / "a").folder is None
    assert Small.from_pretrained(tmp_path / "a", folder="x").folder == "x"
    config = Small(dim=2).config
    assert Small.from_config({**config, "arguments": {**config["arguments"], "folder": "/etc"}}).folder is None


@pytest.mark.plain
@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ({"kind": "timm", "architecture": "hf-hub:evil/model"}, "may only name one of timm's architectures"),
        ({"kind": "timm", "architecture": "local-dir:/tmp/x"}, "may only name one of timm's architectures"),
        ({"kind": "timm", "architecture": "vit", "num_classes": "x"}, "has num_classes 'x'"),
        ({"kind": "transformers", "class": "TimmWrapperModel", "config": {}}, "'TimmWrapperModel', which is not built"),
        ({"kind": "transformers", "class": "PreTrainedModel", "config": {}}, "which is not built from a file"),
        ({"kind": "transformers", "class": "ViTModel", "config": {"hidden_size": 2**50}}, "must be at most"),
        ({"kind": "family"}, "a module without a configuration"),
    ],
)
def test_a_module_is_rebuilt_from_an_allow_list_only(specification, message):
    with pytest.raises(CheckpointError, match=message):
        decode_argument({"$module": specification})


def test_of_a_stored_transformers_configuration_only_harmless_fields_are_used():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=4, patch_size=2
    )
    model = transformers.ViTModel(config).eval()
    encoded = encode_argument(model)
    encoded["$module"]["config"] |= {
        "model_args": {"checkpoint_path": "weights.pkl"},
        "auto_map": {"AutoModel": "evil--code"},
        "attn_implementation": "evil/kernel",
        "_name_or_path": "/etc",
        "backbone": "evil",
        "hidden_act": "gelu",
    }
    rebuilt = decode_argument(copy.deepcopy(encoded))
    rebuilt.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, 4, 4)
    assert torch.equal(rebuilt.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert "evil" not in str(rebuilt.config.to_dict())
    assert "weights.pkl" not in str(rebuilt.config.to_dict())


@pytest.mark.plain
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "evil.pkl"}}, "checkpoint_path 'evil.pkl'"),
        ({"vision_config": {"architecture": "hf-hub:evil/model"}}, "'hf-hub:evil/model' names another source"),
        (
            {"model_type": "timm_wrapper", "architecture": "HF-HUB:evil/model"},
            "'HF-HUB:evil/model' names another source",
        ),
        ({"model_type": "detr", "backbone": "someone/something"}, "backbone 'someone/something' names another source"),
        ({"model_type": "llama", "vocab_size": 10**8, "hidden_size": 64}, "vocab_size 100000000 times 64 is more than"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1000"),
    ],
)
def test_a_foreign_folder_that_leads_elsewhere_is_refused_before_transformers_reads_it(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        load_causal_lm(tmp_path)


@pytest.mark.plain
def test_an_adapter_whose_base_leads_elsewhere_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_args": {"checkpoint_path": "evil.pkl"}}))
    settings = peft.LoraConfig(base_model_name_or_path=str(tmp_path / "base"), task_type="CAUSAL_LM")
    settings.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"checkpoint_path 'evil\.pkl' names another source"):
        load_causal_lm(tmp_path / "adapter")


@pytest.mark.archives
@pytest.mark.plain
def test_weights_in_a_bare_pickle_are_refused_before_transformers_reads_them(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is a pickle, as torch.save wrote before version 1.6"
    ):
        load_causal_lm(tmp_path)


# ---------------------------------------------------------------- folders as people have them


def test_a_model_is_saved_where_a_person_means(tmp_path, monkeypatch):
    here, home, linked = tmp_path / "here", tmp_path / "home", tmp_path / "linked"
    for folder in (here, home, linked):
        folder.mkdir()
    (tmp_path / "link").symlink_to(linked)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    for path in (".", tmp_path / "link", "~/models/a"):
        Small(dim=2).save_pretrained(path)
        assert isinstance(Small.from_pretrained(path), Small)
    save_checkpoint("~/run", 1, model=Small(dim=2))
    assert load_checkpoint("~/run").path == latest_checkpoint("~/run") == home / "run" / "step-1"
    assert here.stat().st_ino == inode  # the current folder stays the same one
    assert (tmp_path / "link").is_symlink()
    assert (linked / "config.json").is_file()
    assert sorted(path.name for path in home.iterdir()) == ["models", "run"]
    assert sorted(path.name for path in here.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


def test_a_failed_save_into_an_empty_folder_leaves_it_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lm_core.checkpoints.pretrained.write_manifest", lambda _: (_ for _ in ()).throw(OSError("full"))
    )
    inode = tmp_path.stat().st_ino
    with pytest.raises(OSError, match="full"):
        Small(dim=2).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.stat().st_ino == inode


def test_files_have_the_permissions_that_the_umask_allows(tmp_path):
    (tmp_path / "any").touch()
    expected = stat.S_IMODE((tmp_path / "any").stat().st_mode)

    def add(folder):
        save_file({"a": torch.ones(1)}, folder / "adapter.safetensors")

    path = save_checkpoint(tmp_path / "run", 1, model=Small(dim=2), assets=add)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {expected}


def test_a_run_a_checkpoint_and_a_saved_folder_lead_to_the_model(tmp_path):
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 1, model=Small(dim=2))
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints", path):
        assert checkpoint_folder(source) == path
    with pytest.raises(FileNotFoundError, match="none"):
        checkpoint_folder(tmp_path / "none")


# ---------------------------------------------------------------- wrapped models


@pytest.mark.plain
def test_a_wrapped_model_is_saved_and_loaded_as_the_model_itself(tmp_path):
    model = Small(dim=2, depth=2)
    compiled = torch.compile(model, backend="eager")
    partly = Small(dim=2, depth=2)
    partly.load_state_dict(model.state_dict())
    partly.layers[1] = torch.compile(partly.layers[1], backend="eager")
    for name, wrapped in {"compiled": compiled, "parallel": nn.DataParallel(model), "partly": partly}.items():
        path = save_checkpoint(tmp_path / name, 1, model=wrapped)
        loaded = Small.from_pretrained(path)
        assert equal(dict(loaded.state_dict()), dict(model.state_dict()))
    again = Small(dim=2, depth=2)
    again.layers[1] = torch.compile(again.layers[1], backend="eager")
    load_checkpoint(tmp_path / "partly", model=again)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    load_checkpoint(tmp_path / "compiled", model=torch.compile(Small(dim=2, depth=2), backend="eager"))


def test_further_files_of_a_checkpoint_are_covered_by_its_manifest(tmp_path):
    path = save_checkpoint(
        tmp_path, 1, model=nn.Linear(1, 1), assets=lambda folder: (folder / "adapter_config.json").write_text("{}")
    )
    assert "adapter_config.json" in read_json(path / "manifest.json")["files"]


def test_numbers_that_json_lacks_are_written_as_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "rows": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [None, 1.5],
    }
