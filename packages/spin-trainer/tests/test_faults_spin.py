"""SIGKILL in the generation phase and in the training phase: the resumed run ends with the uninterrupted weights.

``LM_FAULT_KILLS`` sets the number of random kills in EACH phase (3 by default). Runs are forked from one interpreter
that has everything imported, so that kills land in the work and not in imports. A run is killed a random time after it
has written a random row of answers, or a random checkpoint; the files that it leaves show which phase that was.
"""

import json
import os

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tested with fork, which this system lacks")

KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path

import accelerate, safetensors.torch, torch
import conftest
import lm_core.training.session
from spin_trainer import SPINTrainer

lm_core.training.session.draw_curves = lambda *_: None
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])

def train(path):
    SPINTrainer(
        conftest.decoder(dropout=0.1), train_sft_dataset=conftest.sorting_rows(24),
        valid_sft_dataset=conftest.sorting_rows(6), max_seq_len=24, eos_id=11, iterations=2, epochs=1, batch_size=3,
        gradient_accumulation=1, generation_batch_size=2, learning_rate=1e-2, end_learning_rate=1e-3,
        checkpoint_every=1, dropout=0.1, device="cpu", checkpoint_folder=path,
    )()

def start(path):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1); os.dup2(sink, 2)
            train(path)
            code = 0
        finally:
            os._exit(code)
    return pid

def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def result(path):
    weights = (path / "iterations" / "iteration-2" / "model.safetensors").read_bytes()
    stored = {}
    for store in sorted((path / "generations").iterdir()):
        numbers = [json.loads(line) for line in (store / "rows-0.jsonl").read_text().splitlines()]
        assert len({row["row"] for row in numbers}) == len(numbers), "a row came twice"
        stored[store.name] = sorted(json.dumps(row) for row in numbers)
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return weights, stored, [{name: row[name] for name in row if name != "pairs_per_second"} for row in metrics]

def lines(path):
    return sum(file.read_bytes().count(b"\\n") for file in path.glob("generations/*/rows-*.jsonl"))

def steps(path):
    return max((int(p.name.split("-")[1]) for p in path.glob("checkpoints/step-*")), default=0)

assert finish(start(folder / "whole")) == 0
whole = result(folder / "whole")
total_lines, chance = lines(folder / "whole"), random.Random(0)
first_lines = sum(len(rows) for name, rows in whole[1].items() if name.split("-")[2] == "0")

def phase_of(path):
    complete = sum(place.is_dir() for place in path.glob("iterations/iteration-*"))
    return "generation" if lines(path) < (first_lines, total_lines, 0)[complete] else "training"

done = {"generation": 0, "training": 0}
equal, rounds = [], 0
while min(done.values()) < kills:
    path = folder / f"killed-{rounds}"
    rounds += 1
    assert rounds < 60 * kills
    status = None
    while status != 0:
        pid = start(path)
        phase = min(done, key=done.get)
        wait_lines = lines(path) if path.exists() else 0
        goal = wait_lines + chance.randrange(1, 30)
        goal_step = (steps(path) if path.exists() else 0) + chance.randrange(1, 4)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            reached = lines(path) >= goal if phase == "generation" else steps(path) >= goal_step
            if done[phase] < kills and path.exists() and reached:
                time.sleep(chance.uniform(0, 0.02))
                os.kill(pid, signal.SIGKILL)
                status = finish(pid)
                done[phase_of(path)] += status != 0
                break
            time.sleep(0.0005)
        else:
            status = 0  # its exit status was taken by waitpid; result() checks what it wrote
    equal.append(result(path) == whole)
    shutil.rmtree(path)
print(json.dumps({"kills": done, "runs": rounds, "equal": equal, "rows": total_lines}))
"""


@pytest.mark.slow
def test_a_run_killed_in_either_phase_ends_with_the_weights_of_the_uninterrupted_one(tmp_path, run_python):
    kills = int(os.environ.get("LM_FAULT_KILLS", "3"))
    printed = run_python("-c", KILLS, tmp_path, kills, timeout=240 + 60 * kills)
    outcome = json.loads(printed.splitlines()[-1])

    assert min(outcome["kills"].values()) >= kills
    assert outcome["equal"] == [True] * outcome["runs"]
