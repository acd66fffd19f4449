"""The command, on a tiny corpus."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from memorizing_transformer import MemorizingTransformer
from memorizing_transformer.cli import build_parser, main
from memorizing_transformer.cli.presets import PRESETS
from memorizing_transformer.training.config import TrainingSettings

ARGUMENTS = inspect.signature(MemorizingTransformer).parameters

TINY = ["--dim", "16", "--depth", "2", "--heads", "2", "--dim_head", "8", "--max_knn_memories", "64"]
TINY += ["--xl_max_memories", "8", "--segment_length", "16", "--batch_size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "texts").mkdir()
    for number in range(12):
        text = f"document {number}: " + "the same words again and again " * 12
        (folder / "texts" / f"{number:02}.txt").write_text(text)
    settings = ["--max_steps", "8", "--validate_every", "8", "--checkpoint_every", "8", "--sample_tokens", "6"]
    command = f"train --data {folder}/texts --validation_fraction 0.3 --checkpoint_dir {folder}/run".split()
    assert main([*command, *TINY, *settings]) == 0
    return folder


def test_training_leaves_curves_a_page_and_a_checkpoint(run):
    assert (run / "run" / "checkpoints" / "step-8" / "model.safetensors").is_file()
    assert (run / "run" / "curves.png").is_file()
    first, second = json.loads((run / "run" / "summary.json").read_text(encoding="utf-8"))["results"]
    assert first["after"] < first["before"]
    assert second["name"] == "held-out bits/byte, without -> with memory"
    assert "<h1>Retrieved memories" in (run / "run" / "retrieved.html").read_text(encoding="utf-8")


def test_a_checkpoint_generates_evaluates_and_is_inspected(run, capsys, tmp_path):
    assert main(["generate", str(run / "run"), "the same", "--max_new_tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("the same")
    assert main(["eval", str(run / "run"), "--data", str(run / "texts" / "00.txt"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "bits/byte without memory" in out
    assert "from      0" in out
    page = str(tmp_path / "page.html")
    arguments = ["--prompt", f"@{run / 'texts' / '01.txt'}", "--page", page, "--max_new_tokens", "4", "--device", "cpu"]
    assert main(["inspect", str(run / "run"), *arguments]) == 0
    assert "max_knn_memories" in capsys.readouterr().out


def test_a_run_is_retrofitted_from_another(run, capsys):
    def train(folder, *more):
        command = ["train", "--data", str(run / "texts"), "--checkpoint_dir", str(run / folder), *more]
        settings = ["--max_steps", "2", "--validate_every", "2", "--checkpoint_every", "2", "--sample_tokens", "0"]
        assert main([*command, *TINY, *settings]) == 0
        return capsys.readouterr().out

    assert "held out" in train("more", "--model", str(run / "run"))
    assert "opened" not in train("without", "--gate", "sigmoid", "--use_memory", "false")
    assert "opened to a half" in train("retrofitted", "--model", str(run / "without"))
    assert "opened" not in train("longer", "--model", str(run / "retrofitted"))


def chosen(*flags):
    return build_parser().parse(["train", *flags])["train"].as_dict()


@pytest.mark.plain
def test_own_data_gets_a_real_size_and_flags_win_over_presets():
    assert {**PRESETS["quickstart"], "preset": "quickstart"}.items() <= chosen().items()
    small = chosen("--data", "books/")
    assert (small["preset"], small["dim"], small["learning_rate"]) == ("small", 768, 6e-4)
    assert small["max_steps"] == TrainingSettings().max_steps
    paper = chosen("--data", "books/", "--preset", "paper", "--heads", "4", "--depth", "8")
    assert (paper["gate"], paper["dim_head"], paper["heads"], paper["depth"]) == ("sigmoid", 128, 4, 8)


def test_the_memory_is_three_quarters_up_also_at_a_depth_equal_to_the_default(run, capsys):
    def layers(*flags):
        command = ["train", "--data", str(run / "texts"), "--device", "cpu", "--batch_size", "2", "--max_steps", "1"]
        sizes = ["--dim", "16", "--heads", "2", "--dim_head", "8", "--segment_length", "16", "--sample_tokens", "0"]
        folder = run / "-".join(("depth", *flags)).replace("--", "")
        assert main([*command, *sizes, "--checkpoint_dir", str(folder), *flags]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if "memory in layer(s)" in line)

    assert "layer(s) [9]" in layers("--preset", "base", "--depth", "12")
    assert "layer(s) [3]" in layers("--preset", "base", "--depth", "4")
    assert "layer(s) [4]" in layers("--preset", "base", "--depth", "4", "--memorizing_layers", "4")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model(name):
    arguments = {key: value for key, value in chosen("--preset", name).items() if key in ARGUMENTS}
    with torch.device("meta"):
        model = MemorizingTransformer(num_tokens=259, **arguments)
    millions = sum(parameter.numel() for parameter in model.layers.parameters()) / 1e6
    sizes = {"quickstart": (0.5, 0.7), "small": (60, 90), "base": (200, 320), "large": (900, 1300), "paper": (130, 160)}
    assert sizes[name][0] < millions < sizes[name][1]


def test_a_model_brings_its_sizes_and_tokenizer_and_flags_win_over_them(run):
    model = chosen("--model", str(run / "run"), "--max_knn_memories", "99")
    assert (model["preset"], model["dim"], model["max_knn_memories"], model["learning_rate"]) == (None, 16, 99, 1e-4)
    assert Path(model["tokenizer"]).name == "step-8"


def test_a_memory_is_added_to_a_model_without_one_and_other_sizes_are_refused(run, capsys):
    def train(folder, *more):
        command = ["train", "--data", str(run / "texts"), "--checkpoint_dir", str(run / folder), "--device", "cpu"]
        return main([*command, "--batch_size", "2", "--max_steps", "1", "--sample_tokens", "0", *more])

    assert train("plain", *TINY, "--memorizing_layers", "[]") == 0
    capsys.readouterr()
    assert train("added", "--model", str(run / "plain"), "--memorizing_layers", "2") == 0
    assert "memory in layer(s) [2]" in capsys.readouterr().out
    assert train("wider", "--model", str(run / "plain"), "--dim", "24") == 1
    assert "cannot take other values of dim" in capsys.readouterr().err
    assert train("preset", "--model", str(run / "plain"), "--preset", "base") == 1
    assert "preset base is for a new model" in capsys.readouterr().err


@pytest.mark.plain
def test_errors_say_what_to_do(run, capsys, tmp_path):
    assert main(["generate", str(tmp_path), "x"]) == 1
    assert "model must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--max_knn_memory", "3"])
    assert "--max_knn_memories" in capsys.readouterr().err
