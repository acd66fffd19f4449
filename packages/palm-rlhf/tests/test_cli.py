"""The command: defaults < YAML < flags, errors that name the nearest known argument, and a run of each command."""

import io
import json
import math
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import PaLM
from palm_rlhf.cli import build_parser, main
from palm_rlhf.pretrain.config import TrainingSettings
from palm_rlhf.pretrain.evaluation import evaluate

TINY = [
    *("--dim=16", "--depth=1", "--dim_head=8", "--heads=2", "--sequence_length=24", "--batch_size=2"),
    *("--max_steps=4", "--validate_every=2", "--validation_tokens=100", "--device=cpu", "--sample_tokens=5"),
]


def parsed(*words):
    return build_parser().parse(["train", *words]).train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Twenty documents in a JSONL file."""
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {n} " * (n % 5 + 1)}) + "\n" for n in range(20)))
    return file


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("run") / "palm"
    assert main(["train", "--data", str(text), "--checkpoint_dir", str(folder), *TINY]) == 0
    return folder


# ---------------------------------------------------------------------------------------------------------- parsing


def test_flags_win_over_the_file_which_wins_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dim: 64\nmax_steps: 7\nlearning_rate: 1e-4\n")

    chosen = parsed("--config", str(file), "--max_steps=9")

    assert (chosen.dim, chosen.max_steps, chosen.learning_rate) == (64, 9, 1e-4)
    assert chosen.sequence_length == TrainingSettings().sequence_length


def test_without_arguments_training_is_the_quickstart():
    chosen = parsed()

    assert (chosen.data, chosen.tokenizer, chosen.checkpoint_dir) == ("stdlib", "bytes", "runs/palm-quickstart")
    expected = {**vars(TrainingSettings()), "max_steps": 440, "learning_rate": 4e-3}
    assert {one.name: chosen[one.name] for one in fields(TrainingSettings)} == expected
    assert (chosen.preset, chosen.dim, chosen.depth, chosen.use_xpos) == ("quickstart", 192, 4, True)


def test_own_data_gets_a_real_model_and_a_flag_next_to_a_preset_wins():
    small, large, base = (
        parsed("--data=x.txt", *flags) for flags in ([], ["--preset=large", "--depth=3"], ["--preset", "base"])
    )
    assert (small.preset, small.dim, small.depth, small.heads, small.learning_rate) == ("small", 768, 12, 12, 6e-4)
    assert (large.dim, large.depth, large.dim_head, large.learning_rate) == (2048, 3, 128, 2e-4)
    assert (base.dim, base.heads, base.learning_rate) == (1024, 16, 3e-4)
    for chosen in (small, large, base):
        assert (chosen.max_steps, chosen.checkpoint_dir) == (TrainingSettings().max_steps, "runs/palm")


def test_training_from_a_model_takes_its_sizes_weights_and_tokenizer(run, text, tmp_path, capsys):
    flags = ["--data", str(text), "--model", str(run), "--sequence_length=24", "--validation_tokens=100"]
    assert parsed("--model", str(run)).dim == 16
    words = ["train", *flags, "--max_steps=1", "--learning_rate=1e-9", "--device=cpu", "--sample_tokens=0"]
    assert main([*words, "--checkpoint_dir", str(tmp_path / "more")]) == 0
    before, after = (PaLM.from_pretrained(checkpoint_folder(place)) for place in (run, tmp_path / "more"))
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-7, rtol=0)
    assert main([*words, "--dim=32", "--checkpoint_dir", str(tmp_path / "other")]) == 1
    assert "has its own sizes, got dim 32 (it has 16)" in capsys.readouterr().err


def test_a_printed_configuration_reads_back_as_the_same(tmp_path, capsys):
    flags = ["--dim=96", "--max_grad_norm=null", "--sample_prompt=def f(x):\n    ", "--trackers=[tensorboard]"]
    with pytest.raises(SystemExit) as left:
        build_parser().parse(["train", *flags, "--print_config"])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)

    assert left.value.code == 0
    again, first = parsed("--config", str(file)), parsed(*flags)
    assert {**vars(again), "config": None} == {**vars(first), "config": None}


def test_switches_need_no_value_and_words_may_be_joined_by_dashes():
    assert parsed("--compile").compile is True
    assert parsed("--fsdp", "false").fsdp is False
    assert parsed("--compile", "--fsdp", "--seed=3").fsdp is True
    assert parsed("--max-steps", "5", "--gradient-accumulation=2").gradient_accumulation == 2


@pytest.mark.plain
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--learning_rat=1"], "unknown argument --learning_rat; the nearest known one is --learning_rate"),
        (["train", "--batchsize", "4"], "unknown argument --batchsize; the nearest known one is --batch_size"),
        (["train", "--heds=4", "--deph=3"], "--heds; the nearest known one is --heads; unknown argument --deph"),
        (["train", "--deepspeed"], "unknown argument --deepspeed"),
        (["trian"], "unknown command 'trian'; the nearest known one is train"),
        (["train", "stray"], "unexpected argument stray"),
        (["train", "--dim=wide"], "dim"),
        (["train", "--dim=2.5"], "dim"),
        (["train", "--precision=fp8"], "precision"),
        (["train", "--compile=perhaps"], "compile"),
        (["train", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["generate"], "required"),
        (["generate", "folder", "prompt", "--temprature=1"], "the nearest known one is --temperature"),
        (["convert", "old.pt"], "directory"),
        (["eval", "folder", "--dta=x"], "the nearest known one is --data"),
        ([], "train,generate,eval,convert"),
        (
            ["train", "--config", "learning-rate: 0.1\n"],
            "unknown key 'learning-rate' in the configuration; the nearest",
        ),
        (
            ["train", "--config", "warmup_steps: 3\n"],
            "'warmup_steps' in the configuration; the nearest known one is warm",
        ),
        (["train", "--config", "dim: wide\n"], "dim"),
        (["train", "--config", "- 3\n"], "config"),
    ],
)
def test_what_cannot_be_parsed_is_answered_by_name_with_status_2(words, message, tmp_path, capsys):
    if words[-1:] and words[-1].endswith("\n"):  # the content of a configuration
        file = tmp_path / "run.yaml"
        file.write_text(words[-1])
        words = [*words[:-1], str(file)]
    with pytest.raises(SystemExit) as left:
        main(words)

    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate", "eval", "convert"])
def test_help_explains_every_argument(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    printed = capsys.readouterr().out

    assert left.value.code == 0
    parser = build_parser().commands[command]
    documented = [action for action in parser._actions if action.dest not in ("help", "print_config")]
    assert documented
    for action in documented:
        assert action.dest in printed
        assert action.help, action.dest


# --------------------------------------------------------------------------------------------------------- commands


def test_train_prints_what_it_made_and_continues_the_prompt(text, tmp_path, capsys):
    folder = tmp_path / "run"
    status = main(["train", "--data", str(text), "--checkpoint_dir", str(folder), *TINY])
    printed = capsys.readouterr().out

    assert status == 0
    assert "bits/byte before training" in printed
    assert "bits/byte at the last validation, 4 updates done" in printed
    assert f"{folder / 'checkpoints' / 'step-4'}" in printed
    assert "Continuation of 'def add(a, b):\\n'" in printed
    assert "\ndef add(a, b):\n" in printed
    assert {path.name for path in folder.iterdir()} >= {"checkpoints", "metrics.jsonl", "curves.png", "run.json"}


def test_train_again_says_that_the_run_was_finished(run, text, capsys):
    assert main(["train", "--data", str(text), "--checkpoint_dir", str(run), *TINY]) == 0
    assert "already complete; pass a new --checkpoint_dir to start over" in capsys.readouterr().out


def test_train_without_matplotlib_says_how_to_get_the_curves(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)

    assert main(["train", "--data", str(text), "--checkpoint_dir", str(tmp_path), *TINY]) == 0
    assert "not drawn: pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step-4"])
def test_generate_opens_a_run_its_checkpoints_or_one_of_them(run, where, capsys):
    flags = ["--max_new_tokens=8", "--temperature=0", "--device=cpu"]
    assert main(["generate", str(run / where), "document", *flags]) == 0
    printed = capsys.readouterr().out

    palm = PaLM.from_pretrained(run / "checkpoints" / "step-4")
    prompt = torch.tensor([list(b"document")])
    tokens = palm.generate(max_new_tokens=8, prompt=prompt, temperature=0.0, filter_logits_fn=None, eos_token=257)
    assert printed == "document" + ByteTokenizer().decode(tokens[0]) + "\n"


def test_generate_draws_samples_that_repeat_with_their_seed(run, capsys):
    def draw(*flags):
        words = ["generate", str(run), "document", "--max_new_tokens=20", "--num_samples=2", "--device=cpu", *flags]
        assert main(words) == 0
        return capsys.readouterr().out

    first = draw("--seed=1")
    assert first == draw("--seed=1")
    assert first != draw("--seed=2")
    assert "--- 2 of 2" in first
    assert draw("--top_k=1") == draw("--top_k=1", "--seed=5")


def test_generate_reads_a_prompt_from_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert main(["generate", str(run), "-", "--max_new_tokens=3", "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("two\nlines")


def test_eval_prints_the_bits_per_byte_of_a_corpus(run, tmp_path, capsys):
    file = tmp_path / "held_out.txt"
    file.write_text("document of another kind\n" * 4)
    assert main(["eval", str(run), "--data", str(file), "--sequence_length=200", "--device=cpu"]) == 0
    printed = capsys.readouterr().out

    palm = PaLM.from_pretrained(run / "checkpoints" / "step-4")
    ids = torch.tensor([[*file.read_bytes(), 257]])
    nats = -palm(ids).detach().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).double().sum()
    expected = float(nats) / math.log(2) / (ids.shape[1] - 1)
    assert float(printed.split(" ")[0]) == pytest.approx(expected, abs=1e-4)


def test_eval_scores_the_held_out_part_of_the_library_by_default(run, capsys):
    from lm_core.data.corpora import stdlib_corpus

    assert main(["eval", str(run), "--max_tokens=300", "--device=cpu"]) == 0
    palm = PaLM.from_pretrained(run / "checkpoints" / "step-4")
    expected = evaluate(palm, stdlib_corpus().validation, ByteTokenizer(), max_tokens=300)
    assert capsys.readouterr().out.startswith(f"{expected.bits_per_byte:.4f} bits/byte")


@pytest.mark.archives
@torch.no_grad()
def test_convert_writes_a_folder_that_generate_opens(golden, tmp_path, capsys):
    state, values = golden["causal"]
    # rows for the byte tokenizer's ids, which the original's model of 20 tokens lacks
    wide = {name: F.pad(weight, (0, 0, 0, 239)) for name, weight in state.items() if weight.shape == (20, 12)}
    torch.save(state | wide, tmp_path / "old.pt")

    assert main(["convert", str(tmp_path / "old.pt"), str(tmp_path / "new"), "--tokenizer=bytes"]) == 0
    assert f"wrote {tmp_path / 'new'}" in capsys.readouterr().out
    logits = PaLM.from_pretrained(tmp_path / "new").eval()(values["ids"])[..., :20]
    torch.testing.assert_close(logits, values["logits"], atol=1e-4, rtol=0)
    assert main(["generate", str(tmp_path / "new"), "document", "--max_new_tokens=3", "--device=cpu"]) == 0


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.archives
@pytest.mark.plain
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--max_steps=0"], "max_steps must be at least 1, got 0"),
        (["train", "--data=nowhere.txt"], "data path does not exist: nowhere.txt"),
        (["train", "--data=EMPTY"], "is empty: it holds no document with any text"),
        (["train", "--data=FOLDER"], "holds no file ending in"),
        (["train", "--data=TEXT", "--field=body"], "field 'body' is missing"),
        (["train", "--data=TEXT", "--tokenizer=nowhere"], "source must be"),
        (["train", "--data=TEXT", "--validation_fraction=1.5"], "validation_fraction must be between 0 and 1"),
        (["train", "--data=TEXT", "--dim_head=7"], "dim_head must be"),
        (["train", "--data=TEXT", "--attn_dropout=1.0"], "attn_dropout must be in [0, 1), got 1.0"),
        (["train", "--data=TEXT", "--device=abacus"], "device must be auto, cpu, cuda"),
        (["train", "--data=TEXT", "--fsdp"], "fsdp=True needs several processes"),
        (["train", "--data=TEXT", "--resume=true"], "resume=True needs a checkpoint"),
        (["train", "--data=TEXT", "--checkpoint_dir=FILE"], "must be a folder, got the file"),
        (["train", "--data=TEXT", "--checkpoint_dir=RUN", "--dim=32"], "another architecture: dim is 32, but was 16"),
        (["train", "--data=TEXT", "--checkpoint_dir=RUN", "--resume=false"], "has a run already"),
        (
            ["generate", "nowhere", "x"],
            "model must be a folder with a model, the folder of a run, or organisation/name, got nowhere",
        ),
        (["generate", "RUN", ""], "prompt must hold at least one token, got ''"),
        (["generate", "RUN", "x", "--max_new_tokens=0"], "max_new_tokens must be"),
        (["generate", "RUN", "x", "--num_samples=0"], "num_samples must be at least 1, got 0"),
        (["eval", "RUN", "--data=nowhere"], "data path does not exist: nowhere"),
        (["eval", "RUN", "--max_tokens=0"], "max_tokens must be at least 1, got 0"),
        (["eval", "FOLDER"], "model must be a folder with a model"),
        (["convert", "nowhere.pt", "new"], "there is no file nowhere.pt"),
        (["convert", "FILE", "new"], "is damaged or is no file of tensors"),
    ],
)
def test_bad_input_is_answered_by_name_with_status_1(words, message, run, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "file").write_text("no tensors")
    places = {"EMPTY": tmp_path / "empty.txt", "FOLDER": tmp_path / "folder", "FILE": tmp_path / "file"}
    for name, place in {**places, "TEXT": text, "RUN": run}.items():
        words = [word.replace(name, str(place)) for word in words]
    common = {"train": TINY, "convert": []}.get(words[0], ["--device=cpu"])
    given = [*words[:1], *common, *words[1:]]

    assert main(given) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "palm-quickstart" / "checkpoints").exists()
