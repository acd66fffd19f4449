"""The command, on a tiny corpus."""

import json

import pytest

from memorizing_transformer.cli import main

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


@pytest.mark.plain
def test_errors_say_what_to_do(run, capsys, tmp_path):
    assert main(["generate", str(tmp_path), "x"]) == 1
    assert "model must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--max_knn_memory", "3"])
    assert "--max_knn_memories" in capsys.readouterr().err
