"""save_pretrained and from_pretrained: all kinds of constructor arguments round-trip, foreign folders are named."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lm_core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.module_specs import decode_argument, encode_argument
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checkpoints.weights import load_state_file, read_weights, register_layouts
from lm_core.checks import typed
from lm_core.tokenizers import ByteTokenizer, load_tokenizer


class Net(PretrainedMixin):
    """Model with arguments of every kind that is written as JSON."""

    @typed
    def __init__(
        self,
        *,
        dim: int,
        scale: float = 1.0,
        names: tuple[str, ...] = ("a",),
        sizes: list[int] | None = None,
        table: dict[str, int] | None = None,
        dtype: torch.dtype = torch.float32,
        folder: Path = Path("x"),
        activation: Callable[..., object] = torch.relu,
    ) -> None:
        super().__init__()
        self.seen = (dim, scale, names, sizes, table, dtype, folder, activation)
        self.layer = nn.Linear(dim, dim, dtype=dtype)


class Wide(Net):
    """Model whose arguments differ from those of its parent's constructor."""

    def __init__(self, *, half: int) -> None:
        super().__init__(dim=2 * half)
        self.half = half


class Around(PretrainedMixin):
    """Model with a module as constructor argument."""

    def __init__(self, *, encoder: nn.Module, dim: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(dim, 1)


class Growing(PretrainedMixin):
    """Model whose methods add parts after construction."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__()
        self.dim = dim
        self.parts = nn.ModuleDict()
        self.note = ""

    def add(self, name: str) -> None:
        self.parts[name] = nn.Linear(self.dim, self.dim)

    def config_state(self):
        return {"parts": list(self.parts)} if self.parts else {}

    def apply_config_state(self, state):
        for name in state.get("parts", []):
            self.add(name)

    def write_assets(self, directory):
        (directory / "preprocess.json").write_text(json.dumps({"note": self.note}))

    def read_assets(self, directory):
        self.note = json.loads((directory / "preprocess.json").read_text())["note"]


def _same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_arguments_of_every_kind_come_back_and_can_be_overridden(tmp_path):
    options = {"names": ("x", "y"), "sizes": [1, 2], "table": {"k": 4, "$odd": 5}}
    model = Net(dim=3, scale=float("inf"), dtype=torch.float64, **options)
    model.save_pretrained(tmp_path)
    random_state = torch.get_rng_state()
    loaded = Net.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded.seen == model.seen
    assert _same(model, loaded)
    assert loaded.config == model.config
    assert Net.from_pretrained(tmp_path, scale=3.0).seen[1] == 3.0


def test_the_configuration_says_who_wrote_it(tmp_path):
    Net(dim=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 2
    assert config["class"] == "Net"
    assert config["package"] == Net.__module__.split(".")[0]
    assert config["arguments"]["dim"] == 2
    assert config["arguments"]["scale"] == 1.0  # defaults are kept, whatever they become later
    assert "activation" not in config["arguments"]  # a default that JSON cannot hold stays a default


def test_a_subclass_records_its_own_arguments_only(tmp_path):
    Wide(half=2).save_pretrained(tmp_path)
    assert Wide.from_pretrained(tmp_path).half == 2
    assert Wide(half=2).config["arguments"] == {"half": 2}


def test_calls_are_recorded_as_made_by_position_or_keyword():
    assert Growing(5).config == Growing(dim=5).config
    sizes = [1]
    model = Net(dim=2, sizes=sizes)
    sizes.append(2)
    assert model.config["arguments"]["sizes"] == [1]


# ---------------------------------------------------------------- modules as arguments


def test_a_module_of_the_family_is_rebuilt_from_its_specification(tmp_path):
    model = Around(encoder=Net(dim=2, names=("n",)))
    model.save_pretrained(tmp_path)
    loaded = Around.from_pretrained(tmp_path)
    assert loaded.encoder.seen == model.encoder.seen
    assert _same(model, loaded)


@pytest.fixture
def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=7)
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_transformers_model_is_rebuilt_from_its_configuration(gpt2, tmp_path):
    model = Around(encoder=gpt2)
    model.save_pretrained(tmp_path)
    loaded = Around.from_pretrained(tmp_path)
    assert _same(model, loaded)
    ids = torch.arange(5)[None]
    assert torch.equal(model.encoder(ids).logits, loaded.encoder.eval()(ids).logits)


def test_a_stored_transformers_configuration_cannot_name_code_to_download(gpt2):
    encoded = encode_argument(gpt2)
    encoded["$module"]["config"] |= {"auto_map": {"AutoModel": "evil--code"}, "attn_implementation": "evil/kernel"}
    encoded["$module"]["config"]["_attn_implementation"] = "evil/kernel"
    rebuilt = decode_argument(encoded)
    assert not hasattr(rebuilt.config, "auto_map")
    assert "evil" not in str(rebuilt.config._attn_implementation)


@pytest.mark.parametrize("inner", [nn.Linear, lambda *sizes: Around(encoder=nn.Linear(*sizes))])
def test_any_other_module_and_one_around_it_is_passed_again_and_takes_the_stored_weights(inner, tmp_path):
    model = Around(encoder=inner(2, 2))
    model.save_pretrained(tmp_path)
    name = type(model.encoder).__name__
    with pytest.raises(ValueError, match=rf"Around cannot be rebuilt alone, pass again.*encoder \(a {name}\)"):
        Around.from_pretrained(tmp_path)
    assert _same(model, Around.from_pretrained(tmp_path, encoder=inner(2, 2)))
    with pytest.raises(CheckpointError, match=r"shapes that differ: encoder.*weight \(stored \(2, 2\), model \(3, 2\)"):
        Around.from_pretrained(tmp_path, encoder=inner(2, 3))


def test_a_timm_model_is_rebuilt_by_its_architecture(monkeypatch, tmp_path):
    class Fake(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.num_classes = num_classes
            self.pretrained_cfg = {"architecture": "tiny_vit"}
            self.head = nn.Linear(2, num_classes)

    Fake.__module__ = "timm.models.fake"
    asked = []

    def create_model(name, *, pretrained, num_classes):
        asked.append((name, pretrained))
        return Fake(num_classes)

    timm = types.ModuleType("timm")
    timm.create_model = create_model
    timm.is_model = lambda name: name == "tiny_vit"
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = Around(encoder=Fake(5))
    model.save_pretrained(tmp_path)
    assert _same(model, Around.from_pretrained(tmp_path))
    assert set(asked) == {("tiny_vit", False)}


VALUES = [None, True, 3, -2.5, "x", [1, [2]], (1, ("a",)), {"a": 1}, {"$a": 1}, {1: 2}, torch.int8, []]


@pytest.mark.parametrize("value", VALUES)
def test_encoded_arguments_survive_json(value):
    decoded = decode_argument(json.loads(json.dumps(encode_argument(value))))
    assert decoded == value
    assert type(decoded) is type(value)


# ---------------------------------------------------------------- what is added later


def test_parts_added_later_and_assets_come_back_also_from_a_training_checkpoint(tmp_path):
    model = Growing()
    model.add("one")
    model.add("two")
    model.note = "resize 224"
    model.save_pretrained(tmp_path / "saved")
    loaded = Growing.from_pretrained(tmp_path / "saved")
    assert _same(model, loaded)
    assert loaded.note == "resize 224"
    save_checkpoint(tmp_path / "run", 1, model=model)
    loaded = Growing.from_pretrained(tmp_path / "run" / "step-1")
    assert _same(model, loaded)
    assert loaded.note == "resize 224"


def test_the_tokenizer_travels_with_the_model_and_with_a_training_checkpoint(tmp_path):
    Net(dim=2).save_pretrained(tmp_path / "saved", tokenizer=ByteTokenizer())
    assert load_tokenizer(tmp_path / "saved") == ByteTokenizer()
    save_checkpoint(tmp_path / "run", 1, model=Net(dim=2), tokenizer=ByteTokenizer())
    assert load_tokenizer(tmp_path / "run" / "step-1") == ByteTokenizer()
    (tmp_path / "saved" / "tokenizer" / "byte_tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer/byte_tokenizer.json has 2 bytes"):
        Net.from_pretrained(tmp_path / "saved")


# ---------------------------------------------------------------- folders


def test_a_folder_with_content_is_refused_unless_overwritten_and_keeps_what_is_not_ours(tmp_path):
    first, second = Growing(), Net(dim=2)
    first.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty unless overwrite=True"):
        second.save_pretrained(tmp_path)
    assert _same(Growing.from_pretrained(tmp_path), first)
    second.save_pretrained(tmp_path, overwrite=True)
    assert _same(Net.from_pretrained(tmp_path), second)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "config.json", "manifest.json", "model.safetensors"]


def test_a_failed_save_leaves_neither_a_new_folder_nor_a_changed_old_one(tmp_path, monkeypatch):
    old = Net(dim=2)
    old.save_pretrained(tmp_path / "old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lm_core.checkpoints.pretrained.save_weights", full)
    with pytest.raises(OSError, match="No space left"):
        Net(dim=3).save_pretrained(tmp_path / "new")
    with pytest.raises(OSError, match="No space left"):
        Net(dim=3).save_pretrained(tmp_path / "old", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert _same(Net.from_pretrained(tmp_path / "old"), old)


def test_a_checkpoint_of_another_class_is_refused_naming_both(tmp_path):
    Net(dim=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of a Net \(.*\), it cannot be loaded as Growing"):
        Growing.from_pretrained(tmp_path)
    save_checkpoint(tmp_path / "run", 1, model=Net(dim=2))
    target = Growing()
    with pytest.raises(CheckpointError, match=r"is of a Net .* as Growing"):
        load_checkpoint(tmp_path / "run", model=target)


# ---------------------------------------------------------------- the hub


def test_a_hub_name_is_downloaded_at_its_revision_and_verified(tmp_path, monkeypatch):
    import huggingface_hub

    model = Net(dim=2)
    model.save_pretrained(tmp_path / "remote")
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        return str(tmp_path / "remote")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert _same(Net.from_pretrained("someone/net", revision="v1"), model)
    assert asked == [("someone/net", "v1")]


def test_push_to_hub_uploads_the_saved_folder(monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            calls.append(("create", name, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir()), revision))
            return "https://example.invalid/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = Net(dim=2).push_to_hub("someone/net", tokenizer=ByteTokenizer(), private=True)
    assert address == "https://example.invalid/commit"
    files = ["config.json", "manifest.json", "model.safetensors", "tokenizer"]
    assert calls == [("create", "someone/net", True, True), ("upload", "someone/net", files, None)]


def test_without_the_hub_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: Net(dim=2).push_to_hub("a/b"), lambda: Net.from_pretrained("nobody/nothing")):
        with pytest.raises(ImportError, match=r"pip install huggingface_hub"):
            call()


# ---------------------------------------------------------------- bad input


def _saved(path: Path) -> Path:
    Net(dim=2).save_pretrained(path / "model")
    return path / "model"


def _edited(**changes: object) -> PretrainedMixin:
    return Net.from_config({**Net(dim=2).config, **changes})


def _holds(package: str, name: str) -> dict[str, object]:
    return {"config": {"format_version": 1, "package": package, "class": name, "arguments": {}}}


def _module(kind: str, **specification: object) -> nn.Module:
    return decode_argument({"$module": {"kind": kind, "config": {}, **specification}})


def _file(path: Path) -> Path:
    (path / "file").write_text("x")
    return path / "file"


def _without_manifest(path: Path) -> Path:
    (_saved(path) / "manifest.json").unlink()
    return path / "model"


def _empty_manifest(path: Path) -> Path:
    (path / "manifest.json").write_text(json.dumps({"format_version": 1, "files": {}}))
    return path


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: Net.from_pretrained(p / "none"), FileNotFoundError, "source must be the folder of a checkpoint"),
        (lambda p: Net.from_pretrained(p), CheckpointError, r"manifest\.json cannot be read"),
        (lambda p: Net.from_pretrained(_without_manifest(p)), CheckpointError, r"manifest\.json cannot be read"),
        (lambda p: Net.from_pretrained(_empty_manifest(p)), CheckpointError, r"does not name config\.json"),
        (lambda p: Net.from_pretrained(_saved(p), revision="v1"), ValueError, "revision is for models on the hub"),
        (lambda p: Net.from_pretrained(_saved(p), size=3), TypeError, "Net has no argument size; it has dim, scale"),
        (lambda p: Net.from_pretrained(_saved(p), dim="3"), TypeError, "dim"),
        (lambda p: Net.from_pretrained(_saved(p), dim=4), CheckpointError, r"layer\.weight \(stored \(2, 2\), model"),
        (lambda p: _edited(format_version=3), CheckpointError, "reads up to 2; upgrade it"),
        (lambda p: _edited(format_version="1"), CheckpointError, "no format version of lm-core"),
        (lambda p: _edited(arguments=[1]), CheckpointError, "has no constructor arguments"),
        (lambda p: _edited(state={"a": 1}), CheckpointError, r"no use for the stored state \['a'\]"),
        (lambda p: Net(dim=2).save_pretrained(_file(p)), FileExistsError, "got the file"),
        (lambda p: Net(dim=2).save_pretrained(p / "m", tokenizer="bytes"), TypeError, "tokenizer must have save_pre"),
        (lambda p: Net(dim=2).save_pretrained(3), TypeError, "directory"),
        (lambda p: Net(dim=2).push_to_hub("noslash"), ValueError, "organisation/name, got 'noslash'"),
        (lambda p: Net(dim="2"), TypeError, "dim"),
        (lambda p: Net(), TypeError, "dim"),
        (lambda p: decode_argument({"$eval": "1"}), CheckpointError, r"unknown tag '\$eval'"),
        (lambda p: decode_argument({"$dtype": "save"}), CheckpointError, "dtype 'save'"),
        (lambda p: decode_argument({"$module": 3}), CheckpointError, "unknown kind None"),
        (lambda p: _module("magic"), CheckpointError, "unknown kind 'magic'"),
        (
            lambda p: _module("transformers", **{"class": "Auto"}),
            CheckpointError,
            "'Auto', which is not built",
        ),
        (lambda p: _module("family", **_holds("os", "PathLike")), CheckpointError, "needs PathLike of os"),
    ],
)
def test_bad_input_is_named(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


def _install(folder, package, refers_to, monkeypatch):
    """A package with a model, and the entry point that its distribution declares."""
    (folder / f"{package}.py").write_text(
        "from lm_core import PretrainedMixin\nclass Model(PretrainedMixin):\n    'A model.'\n"
    )
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lm_core.models]\n{package} = {refers_to}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_a_model_of_an_installed_package_that_declares_itself_is_rebuilt(tmp_path, monkeypatch):
    _install(tmp_path, "declared_models", "declared_models", monkeypatch)
    assert "declared_models" not in sys.modules
    assert type(_module("family", **_holds("declared_models", "Model"))).__name__ == "Model"


def test_an_entry_point_imports_no_other_package_than_the_one_it_is_named_for(tmp_path, monkeypatch):
    _install(tmp_path, "stranger", "antigravity", monkeypatch)
    with pytest.raises(CheckpointError, match="needs Model of stranger; import it, or pass the module again"):
        _module("family", **_holds("stranger", "Model"))
    assert "antigravity" not in sys.modules


@pytest.mark.archives
def test_a_state_dict_file_passes_through_the_layout_registered_for_its_model(tmp_path):
    class Layer(nn.Linear):
        pass

    register_layouts(Layer, lambda model, state: {name.removeprefix("old."): value for name, value in state.items()})
    source, target = Layer(2, 3), Layer(2, 3).to(torch.bfloat16)
    torch.save({f"old.{name}": value for name, value in source.state_dict().items()}, tmp_path / "old.pt")
    load_state_file(target, tmp_path / "old.pt")
    assert torch.equal(target.weight, source.weight.to(torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"unexpected keys: old\.weight"):
        load_state_file(nn.Linear(2, 3), tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"is a folder; open it with Layer\.from_pretrained"):
        load_state_file(target, tmp_path)


@pytest.mark.parametrize("failing", range(6))
def test_an_overwrite_that_fails_leaves_the_old_model_or_the_new(tmp_path, monkeypatch, failing):
    old, new = Net(dim=3), Net(dim=4)
    old.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    replace, calls = Path.replace, []

    def failing_replace(path, target):
        calls.append(path)
        if len(calls) == failing + 1:
            raise OSError("no space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing_replace)
    with pytest.raises(OSError, match="no space left"):
        new.save_pretrained(tmp_path, overwrite=True)
    monkeypatch.undo()
    opened = Net.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), old.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.json", "manifest.json", "model.safetensors", "notes.txt"),
    ]
    new.save_pretrained(tmp_path, overwrite=True)
    assert [p.shape for p in Net.from_pretrained(tmp_path).parameters()] == [p.shape for p in new.parameters()]


def test_the_state_of_a_data_parallel_wrapper_is_stored_under_the_names_of_the_model(tmp_path):
    model = Net(dim=3)
    path = save_checkpoint(tmp_path, 1, model={f"module.{name}": value for name, value in model.state_dict().items()})
    assert read_weights(path / "model.safetensors").keys() == model.state_dict().keys()
