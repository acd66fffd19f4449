"""The command, from two local folders to text; its quickstart, cut short; examples from configs, without a download."""

import json

import pytest
import torch

from calm_pytorch.cli import main
from lm_core.checkpoints.checkpoint import list_checkpoints

OVER_MODELS = ("--anchor", "/nowhere", "--data", "x", "--augments", "a")


@pytest.fixture(scope="module")
def folders(model_of, tmp_path_factory):
    """An anchor and an augment with a tokenizer of words, and texts."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("models")
    words = [f"w{number}" for number in range(39)]
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{word: i for i, word in enumerate(words, start=1)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    for name, kind in (("anchor", "llama"), ("augment", "gpt2")):
        model_of(kind).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    with (root / "texts.jsonl").open("w") as stream:
        for _ in range(8):
            chosen = torch.randint(0, 39, (30,), generator=generator).tolist()
            stream.write(json.dumps({"text": " ".join(words[number] for number in chosen)}) + "\n")
    return root


@pytest.mark.parametrize("mode", ["shared", "prompt"])
def test_two_local_folders_are_composed_trained_and_asked(folders, tmp_path, capsys, mode):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"anchor: {folders / 'anchor'}\naugments: [{folders / 'augment'}]\n"
        f"data: {folders / 'texts.jsonl'}\nmode: {mode}\n"
        f"sequence_length: 8\nmax_steps: 3\nbatch_size: 2\ncheckpoint_dir: {tmp_path / 'run'}\ndevice: cpu\n"
    )
    assert main(["train", "--config", str(config)]) == 0
    assert "layer   4 (32) -> anchor layer   4" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-3"]
    both = ["--augments", str(folders / "augment"), "--adapter", str(tmp_path / "run" / "adapter"), "--mode", mode]
    texts = []
    # everything named, nothing but the anchor, nothing but the run
    for chosen in ([str(folders / "anchor"), *both], [str(folders / "anchor"), *both[2:4]], [str(tmp_path / "run")]):
        arguments = [chosen[0], "w1 w2 w3", *chosen[1:], "--max_new_tokens", "4", "--temperature", "0"]
        assert main(["generate", *arguments, "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["describe", *chosen, "--device", "cpu"]) == 0
        assert "added:" in capsys.readouterr().out
    assert len(texts[0].split()) > 3
    assert texts[1:] == texts[:1] * 2


def test_the_summary_of_a_run_that_went_on_begins_before_its_first_update(folders, tmp_path, capsys):
    texts = str(folders / "texts.jsonl")
    run = ["train", "--anchor", str(folders / "anchor"), "--augments", str(folders / "augment"), "--device", "cpu"]
    run += [
        "--data",
        texts,
        "--validation_data",
        texts,
        "--sequence_length",
        "8",
        "--batch_size",
        "2",
        "--learning_rate",
        "0.1",
    ]
    run += ["--checkpoint_dir", str(tmp_path / "run")]
    summaries = []
    for steps in ("2", "4", "4"):
        assert main([*run, "--max_steps", steps]) == 0
        summaries.append(json.loads((tmp_path / "run" / "summary.json").read_text()))
    assert "already complete" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert [one["steps"] for one in summaries] == [2, 4, 4]
    assert [one["results"][0]["before"] for one in summaries] == [held_out[0]] * 3
    assert [one["results"][0]["after"] for one in summaries] == [held_out[2], held_out[4], held_out[4]]
    assert summaries[1]["seconds"] > 0
    assert summaries[2]["seconds"] is None


def test_the_quickstart_writes_what_it_says(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    short = ["--augment_steps", "2", "--anchor_steps", "2", "--max_steps", "20", "--batch_size", "4"]
    assert main(["train", *short, "--checkpoint_dir", str(tmp_path / "run")]) == 0
    assert "right on expressions over keys it never trained on" in capsys.readouterr().out
    files = ("metrics.jsonl", "curves.png", "run.json", "summary.json", "checkpoints/step-20/manifest.json")
    for name in ("adapter/adapter.safetensors", "attention.png", *files):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20
    assert main(["train", *short, "--seed", "1", "--checkpoint_dir", str(tmp_path / "run")]) == 1
    assert "seed is 1, but was 0" in capsys.readouterr().err


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--anchr", "x"], "--anchor"),
        (["train", *OVER_MODELS], "anchor must be a folder"),
        (["train", "--max_steps", "0"], "max_steps must be at least 1"),
        (["train", "--max_steps", "null"], "error: max_steps must be INT, got None\n"),
        (["train", "--learning_rate", "null"], "error: learning_rate must be FLOAT, got None\n"),
        (["describ"], "describe"),
    ],
)
def test_wrong_arguments_are_answered_in_one_line(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err
