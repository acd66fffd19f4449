import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

import lm_core
from lm_core.cli.main import INTERRUPTED, command_line, report_run, run_command
from lm_core.cli.parser import Command, Group, command_parser
from lm_core.training.run_directory import Result, write_summary
from lm_core.training.session import TrainingResult


def parser_of(command):
    return command_parser("lm", "Works.", {"work": command, "rest": rest}, package="lm_core")


def rest() -> int:
    """Rests."""
    return 0


def run(function, argv):
    return run_command(parser_of(function), ["work", *argv])


def test_a_command_gets_its_arguments_and_its_status_is_returned(capsys):
    def work(name: str, times: int = 1) -> int:
        """Works."""
        print(name * times)
        return 7

    assert run(work, ["ab", "--times", "2"]) == 7
    assert capsys.readouterr().out == "abab\n"


def raising(error):
    def work() -> int:
        """Works."""
        raise error

    return work


def summarising(directory, results):
    def work() -> int:
        """Works."""
        write_summary(directory, results, steps=1)
        return 0

    return work


def test_an_error_of_ours_or_of_the_system_is_one_line_and_status_1(capsys, tmp_path):
    assert run(summarising(tmp_path, []), []) == 1
    assert capsys.readouterr().err == "lm work: error: results must hold at least one number, got none\n"
    assert run(raising(FileNotFoundError("no such corpus")), []) == 1
    assert capsys.readouterr().err == "lm work: error: no such corpus\n"


def test_a_defect_keeps_its_traceback(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="raised by neither"):
        run(raising(ValueError("raised by neither the package nor the core")), [])
    monkeypatch.delattr("lm_core.training.run_directory.write_file")
    with pytest.raises(NameError, match="write_file"):
        run(summarising(tmp_path, [Result("a", 1.0)]), [])


def test_ctrl_c_ends_with_130_and_prints_how_to_resume(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lm", "work", "a b"])
    assert run(raising(KeyboardInterrupt), []) == INTERRUPTED == 130
    assert capsys.readouterr().err.endswith("lm work 'a b'\n")
    assert command_line("lm") == "lm work 'a b'"


def test_a_run_of_torchrun_is_resumed_by_torchrun(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["/somewhere/palm_rlhf/__main__.py", "train", "--data", "a b"])
    assert command_line("palm-rlhf") == "torchrun --nnodes 2 --nproc_per_node 2 -m palm_rlhf train --data 'a b'"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["/bin/palm-rlhf", "train"])
    assert command_line("palm-rlhf") == "torchrun --nproc_per_node 2 /bin/palm-rlhf train"


def test_a_signal_is_the_exit_status(capsys):
    fields = {"first_step": 0, "step": 3, "seconds": 1.0, "checkpoints": None, "curves": None}
    for number in (2, 10, 15):
        assert (
            report_run("lm", TrainingResult(outcome="interrupted", signal=number, **fields), "runs/a") == 128 + number
        )


@pytest.mark.parametrize(("outcome", "status"), [("finished", 0), ("interrupted", 130), ("out of time", 0)])
def test_a_run_that_did_not_finish_prints_how_to_resume(capsys, outcome, status):
    result = TrainingResult(outcome=outcome, first_step=0, step=3, seconds=1.0, checkpoints=None, curves=None)
    assert report_run("lm", result, "runs/a", max_steps=10) == status
    printed = capsys.readouterr().out
    assert (outcome == "finished") == ("Stopped" not in printed)
    assert outcome == "finished" or f"Stopped ({outcome}) after 3 of 10 updates. To resume:\n  lm" in printed


@dataclass
class Settings:
    """Settings.

    Args:
        size: how large.
        name: what for.
    """

    size: int = 3
    name: str = "x"


def lists(first: str, files: list[str], *, words: list[str] | None = None, sizes: list[int] | None = None) -> int:
    """Takes lists.

    Args:
        first: comes first.
        files: any number of them.
        words: one or several.
        sizes: whole numbers.
    """
    print(first, files, words, sizes)
    return 0


def test_the_flags_of_a_class_make_the_parameter(capsys):
    def work(settings: Settings, more: dict, *, seed: int = 5) -> int:
        """Works."""
        print(settings, more, seed)
        return 0

    groups = {"settings": Group(Settings, defaults={"name": "y"}), "more": Group(Settings, as_dict=True)}
    assert run(Command(work, groups), ["--size", "7"]) == 0
    assert capsys.readouterr().out == "Settings(size=7, name='y') {'size': 7, 'name': 'y'} 5\n"


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["a", "b", "c d"], "a ['b', 'c d'] None None"),
        (["a", "b", "--words", "x", "y", "--sizes", "1", "2"], "a ['b'] ['x', 'y'] [1, 2]"),
        (["--words=[x,y]", "a", "b"], "a ['b'] ['x', 'y'] None"),
        (["a", "--words", "null", "--sizes", "[3]", "--", "--b"], "a ['--b'] None [3]"),
        (["a", "--sizes", "1", "--", "b"], "a ['b'] None [1]"),
    ],
)
def test_a_list_takes_one_or_several_words(words, printed, capsys):
    assert run(lists, words) == 0
    assert capsys.readouterr().out == printed + "\n"


def test_presets_are_what_the_printed_configuration_holds_and_the_run_gets(capsys, tmp_path):
    def work(*, model: str | None = None, steps: int = 1, seed: int = 0) -> int:
        """Works."""
        print(model, steps, seed)
        return 0

    command = Command(work, presets=lambda chosen: {"steps": 30} if chosen["model"] is None else {})
    with pytest.raises(SystemExit):
        run(command, ["--seed", "4", "--print_config"])
    printed = capsys.readouterr().out
    assert printed == "model: null\nsteps: 30\nseed: 4\n"
    (tmp_path / "run.yaml").write_text(printed)
    for words, printed in (
        (["--seed", "4"], "None 30 4\n"),
        (["--config", str(tmp_path / "run.yaml")], "None 30 4\n"),
        (["--model", "m", "--steps", "2"], "m 2 0\n"),
        (["--model", "m"], "m 1 0\n"),
    ):
        assert run(command, words) == 0
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize("how", ["flag", "file"])
@pytest.mark.parametrize(
    ("value", "message"),
    [("steps: null", "steps must be INT, got None"), ("resume: maybe", "resume must be {true,false,auto}, got maybe")],
)
def test_a_value_of_another_type_is_refused_in_one_line(capsys, tmp_path, value, message, how):
    def work(*, steps: int = 1, resume: bool | Literal["auto"] = "auto") -> int:
        """Works."""
        return 0

    (tmp_path / "run.yaml").write_text(value)
    with pytest.raises(SystemExit) as left:
        run(work, ["--config", str(tmp_path / "run.yaml")] if how == "file" else ["--" + value.replace(": ", "=")])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"lm work: error: {message}\n")


def test_help_shows_types_as_words_and_texts_as_sentences(capsys):
    def work(*, device: Literal["auto", "cpu"] = "auto", trackers: list[str] | None = None, size: float | None = 1.0):
        """Works.

        Args:
            device: auto takes what there is.
            trackers: names of trackers.
            size: null for none.
        """

    with pytest.raises(SystemExit):
        run(work, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--device {auto,cpu} auto takes what there is. (default: auto)" in printed
    assert "--trackers TEXT [TEXT ...] Names of trackers. (default: null)" in printed
    assert "--size FLOAT null for none. (default: 1.0)" in printed
    assert "Union" not in printed
    assert "type:" not in printed


def test_the_version_names_package_core_and_torch(capsys):
    with pytest.raises(SystemExit) as left:
        run_command(parser_of(rest), ["--version"])
    assert left.value.code == 0
    version = lm_core.__version__
    assert capsys.readouterr().out == f"lm {version} (lm-core {version}, torch {torch.__version__})\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_flags_and_choices(shell, capsys):
    pytest.importorskip("shtab")

    def work(*, device: Literal["auto", "cpu"] = "auto", corpus: str = "x") -> int:
        """Works."""
        return 0

    with pytest.raises(SystemExit) as left:
        run_command(parser_of(work), ["--print_completion", shell])
    assert left.value.code == 0
    script = capsys.readouterr().out
    for word in ("work", "rest", "--device", "--corpus", "auto", "cpu"):
        assert word in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["work", "--wrds", "a"], "unknown argument --wrds; the nearest known one is --words"),
        (["work", "--quantisation", "a"], "unknown argument --quantisation\n"),
        (["wrok"], "unknown command 'wrok'; the nearest known one is work"),
        (["quantise"], "unknown command 'quantise'\n"),
    ],
)
def test_only_a_near_name_is_suggested(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        run_command(parser_of(lists), words)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def ended(outcome, first_step=0, step=5):
    return TrainingResult(outcome=outcome, first_step=first_step, step=step, seconds=2.0, checkpoints=None, curves=None)


def test_the_report_of_a_run_names_its_files_and_writes_the_summary_once_finished(tmp_path, capsys):
    measured = [Result("bits", 1.0)]
    arguments = {"max_steps": 5, "lines": [("held out", "1.0 bits")], "results": measured}
    assert report_run("lm", ended("out of time", step=3), tmp_path, **arguments) == 0
    assert not (tmp_path / "summary.json").exists()
    assert "Stopped (out of time) after 3 of 5 updates" in capsys.readouterr().out
    assert report_run("lm", ended("finished"), tmp_path, **arguments) == 0
    printed = capsys.readouterr().out
    assert "held out    1.0 bits\ncheckpoint  " in printed
    assert "already complete" not in printed
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] == 2.0
    assert report_run("lm", ended("finished", first_step=5), tmp_path, **arguments) == 0
    assert "already complete; pass a new --checkpoint_dir" in capsys.readouterr().out


def test_a_summary_holds_the_key_number_first(tmp_path):
    results = [Result("held-out bits/byte", 2.0, before=8.0), Result("accuracy", 0.5, better="higher")]
    path = write_summary(tmp_path, results, steps=5, seconds=1.5)
    assert path.name == "summary.json"
    assert json.loads(path.read_text()) == {
        "results": [
            {"name": "held-out bits/byte", "after": 2.0, "before": 8.0, "better": "lower"},
            {"name": "accuracy", "after": 0.5, "before": None, "better": "higher"},
        ],
        "steps": 5,
        "seconds": 1.5,
    }


FIRST_WORKS_LONGER = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from torch.multiprocessing import start_processes
from lm_core.cli.main import run_command
from lm_core.cli.parser import command_parser

def run(own, folder):
    def work() -> int:
        "Works, on rank 0 longer."
        store = (folder / "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=own, world_size=2, timeout=timedelta(seconds=60))
        if own == 0:
            time.sleep(1)
            (folder / "drawn").touch()
        return 0

    assert run_command(command_parser("lm", "Works.", {"work": work}, package="lm_core"), ["work"]) == 0
    assert (folder / "drawn").exists() and not dist.is_initialized()

if __name__ == "__main__":
    method = "fork" if sys.platform == "linux" else "spawn"
    start_processes(run, (Path(sys.argv[1]),), nprocs=2, start_method=method)
"""


@pytest.mark.distributed
def test_no_process_ends_while_another_still_works(tmp_path):
    (tmp_path / "work.py").write_text(FIRST_WORKS_LONGER)
    command = [sys.executable, str(tmp_path / "work.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
