import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from lm_core.cli.main import INTERRUPTED, command_line, run_command, say_how_to_go_on, taken_out
from lm_core.cli.parser import CommandParser
from lm_core.training.run_directory import Result, write_summary


def run(function, argv):
    parser = CommandParser(prog="lm")
    parser.add_command("work", "Works.").add_function(function)
    return run_command(parser, ["work", *argv], {"work": function}, package="lm_core")


def test_a_command_gets_its_arguments_and_its_status_is_returned(capsys):
    def work(name: str, times: int = 1) -> int:
        """Works."""
        print(name * times)
        return 7

    assert run(work, ["ab", "--times", "2"]) == 7
    assert capsys.readouterr().out == "abab\n"


def test_an_error_of_ours_is_one_line_and_status_1(capsys, tmp_path):
    def work() -> int:
        """Works."""
        write_summary(tmp_path, [], steps=1)
        return 0

    assert run(work, []) == 1
    assert capsys.readouterr().err == "lm work: error: results must hold at least one number, got none\n"


def test_an_error_of_the_system_is_one_line_and_status_1(capsys):
    def work() -> int:
        """Works."""
        raise FileNotFoundError("no such corpus")

    assert run(work, []) == 1
    assert capsys.readouterr().err == "lm work: error: no such corpus\n"


def test_a_defect_keeps_its_traceback():
    def work() -> int:
        """Works."""
        raise ValueError("raised by neither the package nor the core")

    with pytest.raises(ValueError, match="raised by neither"):
        run(work, [])


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lm", "work", "a b"])

    def work() -> int:
        """Works."""
        raise KeyboardInterrupt

    assert run(work, []) == INTERRUPTED == 130
    assert capsys.readouterr().err.endswith("lm work 'a b'\n")
    assert command_line("lm") == "lm work 'a b'"


@pytest.mark.parametrize(("outcome", "status"), [("finished", 0), ("interrupted", 130), ("out of time", 0)])
def test_a_run_that_did_not_finish_says_how_it_goes_on(capsys, outcome, status):
    assert say_how_to_go_on("lm", outcome, 3, 10) == status
    printed = capsys.readouterr().out
    assert (outcome == "finished") == (printed == "")
    assert outcome == "finished" or f"Stopped ({outcome}) after 3 of 10 updates. To go on:\n  lm" in printed


def test_settings_are_taken_out_of_the_arguments():
    @dataclass
    class Settings:
        size: int
        name: str = "x"

    arguments = {"size": 3, "other": 4}
    assert taken_out(arguments, Settings) == Settings(3)
    assert arguments == {"other": 4}


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


FIRST_WORKS_ON = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from lm_core.cli.main import run_command
from lm_core.cli.parser import CommandParser

own, folder = int(sys.argv[1]), Path(sys.argv[2])

def work() -> int:
    "Works, on rank 0 longer."
    dist.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=own, world_size=2, timeout=timedelta(seconds=60)
    )
    if own == 0:
        time.sleep(1)
        (folder / "drawn").touch()
    return 0

parser = CommandParser(prog="lm")
parser.add_command("work", "Works.").add_function(work)
status = run_command(parser, ["work"], {"work": work}, package="lm_core")
sys.exit(status if (folder / "drawn").exists() and not dist.is_initialized() else 3)
"""


@pytest.mark.distributed
def test_no_process_ends_while_another_still_works(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(FIRST_WORKS_ON)
    processes = [subprocess.Popen([sys.executable, str(script), str(own), str(tmp_path)]) for own in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
