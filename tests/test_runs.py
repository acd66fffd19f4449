"""Every `train` leaves the same things in its folder, names its metrics alike, and ends in the same words."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# As small as each `train` can be.
TINY = {
    "palm-rlhf": "--max_steps 3 --dim 16 --depth 1 --dim_head 8 --heads 2 --sequence_length 32 --validation_tokens 500 "
    "--sample_tokens 0 --data {texts}",
    "coca": "--max_steps 3 --batch_size 8 --dim 16 --dim_head 8 --heads 2 --vit_dim 16 --vit_depth 1",
    "memorizing-transformer": "--max_steps 3 --dim 16 --depth 2 --heads 2 --dim_head 8 --max_knn_memories 64 "
    "--xl_max_memories 8 --segment_length 16 --batch_size 2 --sample_tokens 0 --validation_documents 2 "
    "--data {texts}",
    "calm-pytorch": "--augment_steps 2 --anchor_steps 2 --max_steps 4 --batch_size 8",
    "spin-trainer": "--model {model} --tokenizer bytes --data {pairs} --validation_data {pairs} --max_seq_len 24 "
    "--iterations 1 --epochs 1 --batch_size 4 --gradient_accumulation 1",
}
PACKAGES = list(TINY)
COMMON = {"step", "loss", "learning_rate", "grad_norm"}
FORBIDDEN = re.compile(r"^(?:lr|valid_.*|val_.*|eval_.*|held_out_.*|grad_?norms?_.*|gradient_norm)$")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Texts, pairs of prompt and response, and a Hugging Face model for those commands that need one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text("some text about numbers. " * 20 + str(number))
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(4) for b in range(2)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(folder / "model")
    return {"texts": str(texts), "pairs": str(folder / "pairs.jsonl"), "model": str(folder / "model")}


@pytest.fixture(scope="module")
def train(workspace: ModuleType, inputs: dict[str, str]) -> Callable[..., int]:
    """`train(package, folder)` runs a tiny training into the folder; returns its exit status."""

    def run(package: str, folder: Path, *more: str) -> int:
        main = importlib.import_module(f"{workspace.DISTRIBUTIONS[package].import_name}.cli").main
        options = TINY[package].format(**inputs).split()
        return int(main(["train", *options, "--checkpoint_dir", str(folder), "--device", "cpu", *more]))

    return run


@pytest.fixture(scope="module", params=PACKAGES)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, train: Callable[..., int]
) -> tuple[str, Path]:
    """A package and the folder of a run that has finished."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert train(request.param, folder) == 0
    return request.param, folder


def test_a_run_leaves_the_same_things(finished: tuple[str, Path], summaries: ModuleType) -> None:
    _, folder = finished
    assert list((folder / "checkpoints").glob("step-*/manifest.json"))
    assert {"metrics.jsonl", "curves.png", "run.json", "summary.json"} <= {path.name for path in folder.iterdir()}
    assert {"argv", "seed", "versions", "device"} <= set(json.loads((folder / "run.json").read_text()))
    assert summaries.read_summary(folder / "summary.json")["steps"] > 0


def test_metrics_have_the_same_names(finished: tuple[str, Path]) -> None:
    _, folder = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert all("step" in row for row in rows)
    assert names >= COMMON
    assert any(name.startswith("validation_") for name in names)
    assert any(name.endswith("_per_second") for name in names)
    assert [name for name in sorted(names) if FORBIDDEN.match(name)] == []


def test_a_finished_run_says_so_and_does_nothing_again(
    finished: tuple[str, Path], train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    package, folder = finished
    before = (folder / "metrics.jsonl").read_text()
    assert train(package, folder) == 0
    assert "already complete; pass a new --checkpoint_dir to start over" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_that_is_a_file_is_refused_in_the_same_words(
    package: str, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert train(package, file) == 1
    said = capsys.readouterr().err
    assert f"{package} train: error: the run directory must be a folder, got the file {file}" in said


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--devise", "cpu"], "unknown argument --devise; the nearest known one is --device"),
        (["--learning_rate", "fast"], "learning_rate"),
        (
            ["--config", "{file}"],
            "unknown key 'learning_rat' in the configuration; the nearest known one is learning_rate",
        ),
    ],
)
def test_a_wrong_flag_or_key_is_answered_with_the_nearest(
    package: str,
    wrong: list[str],
    message: str,
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rat: 0.1\n")
    with pytest.raises(SystemExit) as stopped:
        train(package, tmp_path / "run", *(word.format(file=file) for word in wrong))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert re.search(rf"^{package}(?: train)?: error: ", said, re.MULTILINE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_bad_number_is_refused_by_name_before_any_work(
    package: str, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(package, tmp_path / "run", "--batch_size", "0") == 1
    assert re.search(rf"{package} train: error: .*batch_size must be .*got 0", capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_the_configuration_is_printed_and_read_back(
    package: str, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml: Any = pytest.importorskip("yaml")
    with pytest.raises(SystemExit) as stopped:
        train(package, tmp_path / "run", "--seed", "7", "--print_config")
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed"] == 7
    assert printed["checkpoint_dir"] == str(tmp_path / "run")
