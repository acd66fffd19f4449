"""Kills, full disks and failing ranks: a fault while a checkpoint is written always leaves an intact one.

``LM_FAULT_KILLS`` sets the number of random kills (5 by default). One interpreter forks the runs that are killed, so
that torch is imported once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tested with fork, which this system lacks")

PRELUDE = """
import json, os, random, resource, signal, sys, time, warnings
from pathlib import Path
import torch
from torch import nn
from lm_core.checkpoints import checkpoint, pretrained, atomic_io as durable
from lm_core.checkpoints.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint

folder = Path(sys.argv[1])

def child(work):
    '''Runs work in a fork; its exit code, or minus the signal that ended it.'''
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def filled(step, size=1000):
    model = nn.Linear(size, 1)
    nn.init.constant_(model.weight, step)
    return model
"""

EVERY_POINT = """
def step(state):
    state["calls"] += 1
    if state["calls"] == state["die_before"]:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(function, state):
    def call(*args, **kwargs):
        step(state)
        result = function(*args, **kwargs)
        step(state)
        return result
    return call

def write(point):
    state = {"calls": 0, "die_before": point}
    for module, names in (
        (durable, ("fsync_path", "fsync_tree")),
        (checkpoint, ("save_tensors", "write_manifest", "remove_directory")),
        (pretrained, ("save_weights",)),
        (durable.shutil, ("rmtree",)),
        (durable.Path, ("rename",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name), state))
    save_checkpoint(folder / str(point), 2, model=filled(2), trainer_state={"step": 2}, keep=1)

found = []
for point in range(1, 200):
    run = folder / str(point)
    save_checkpoint(run, 1, model=filled(1), trainer_state={"step": 1}, keep=1)
    status = wait(child(lambda: write(point)))
    model = filled(0)
    loaded = load_checkpoint(run, model=model)
    durable.remove_leftovers(run)
    assert model.weight.eq(loaded.step).all() and loaded.trainer_state == {"step": loaded.step}
    found.append([status, loaded.step, len(list_checkpoints(run)), len(list(run.iterdir()))])
    if status == 0:
        break
print(json.dumps(found))
"""

TRAINING = """
from lm_core.data.documents import tokenise
from lm_core.data.packing import PackedBatches
from lm_core.rng import restore_rng
from lm_core.training.optimization import LearningRateSchedule, optimizer_groups
from lm_core.training.metrics import MetricsLog
from lm_core.training.run_directory import RunDirectory
from lm_core.rng import seed_everything

UPDATES, EVERY = int(sys.argv[3]), 3
DOCUMENTS = tokenise([bytes(range(start, start + 60)) for start in range(0, 190, 7)])

def train(path):
    with RunDirectory(path) as run:
        seed_everything(0)
        model = nn.Sequential(nn.Embedding(259, 64), nn.Dropout(0.1), nn.Linear(64, 259))
        optimizer = torch.optim.AdamW(optimizer_groups(model), lr=1e-2)
        schedule = LearningRateSchedule(optimizer, warmup_steps=5, total_steps=UPDATES)
        batches = PackedBatches(documents=DOCUMENTS, sequence_length=16, batch_size=4, eos_id=257, pad_id=258)
        parts = {"optimizer": optimizer, "schedule": schedule, "batches": batches}
        step = 0
        if run.resumes:
            loaded = load_checkpoint(run.checkpoints, model=model)
            for name, part in parts.items():
                part.load_state_dict(loaded.trainer_state[name])
            restore_rng(loaded.rng)
            step = loaded.step
        with MetricsLog(run.metrics_path, resume_step=step if run.resumes else -1) as metrics:
            while step < UPDATES:
                batch = next(batches)
                logits = model(batch.ids)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                metrics.log(step, loss=loss, learning_rate=schedule.learning_rate)
                if step % EVERY == 0 or step == UPDATES:
                    state = {name: part.state_dict() for name, part in parts.items()}
                    save_checkpoint(run.checkpoints, step, model=model, trainer_state=state, keep=2)

def result(path):
    loaded = load_checkpoint(path / "checkpoints")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return loaded.step, loaded.model_state, loaded.trainer_state["optimizer"]["state"], rows

kills, torn = int(sys.argv[2]), 0
import safetensors.torch
torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # imports what every run would import, so that kills hit the loop
begun = time.monotonic()
assert wait(child(lambda: train(folder / "whole"))) == 0
duration = time.monotonic() - begun
warnings.simplefilter("error")
chance, done, rounds = random.Random(0), 0, 0
while done < kills:
    path = folder / f"killed-{rounds}"
    rounds += 1
    finished = False
    while done < kills and not finished:
        pid = child(lambda: train(path))
        time.sleep(chance.uniform(0, duration / 3))
        os.kill(pid, signal.SIGKILL)
        finished = wait(pid) == 0
        done += not finished
        torn += any(entry.name.startswith(".tmp") for entry in path.glob("checkpoints/.tmp*"))
    if not finished:
        assert wait(child(lambda: train(path))) == 0
    step, weights, moments, rows = result(path)
    expected_step, expected_weights, expected_moments, expected_rows = result(folder / "whole")
    assert step == expected_step == UPDATES
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    for number, entry in expected_moments.items():
        assert all(torch.equal(moments[number][name], entry[name]) for name in entry)
    assert rows == expected_rows, (rows, expected_rows)
    assert not list(path.glob("checkpoints/.tmp*"))
print(json.dumps({"kills": done, "rounds": rounds, "torn": torn}))
"""

FULL_DISK = """
outcomes = []
for kind in ("weights", "trainer"):
    run = folder / kind
    save_checkpoint(run, 1, model=filled(1), keep=1)
    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        size, state = (100_000, {}) if kind == "weights" else (1000, {"big": torch.zeros(100_000)})
        try:
            save_checkpoint(run, 2, model=filled(2, size), trainer_state=state, keep=1)
        except OSError as error:
            (folder / f"{kind}.txt").write_text(str(error))
    status = wait(child(write))
    model = filled(0)
    load_checkpoint(run, model=model)
    assert model.weight.eq(1).all()
    outcomes.append([status, (folder / f"{kind}.txt").read_text(), sorted(entry.name for entry in run.iterdir())])
print(json.dumps(outcomes))
"""

RANKS = """
import torch.distributed as dist
from lm_core.distributed import end_process_group
from lm_core.rng import restore_rng
from lm_core.training.accelerator import InterruptHandler
from lm_core.training.optimization import NonFiniteGuard
from lm_core.training.run_directory import RunDirectory

def at_rank(rank, work):
    def run():
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{work.__name__}", rank=rank, world_size=2)
        work(rank)
        dist.barrier()
        end_process_group()
    return run

def both(work):
    return [wait(pid) for pid in [child(at_rank(rank, work)) for rank in range(2)]]

def refusal(call, *errors):
    try:
        call()
    except errors as error:
        return str(error)
    raise AssertionError("nothing was raised")

def save_and_load(rank):
    torch.manual_seed(rank)
    path = save_checkpoint(folder / "run", 1, model=filled(1))
    expected = torch.rand(3)
    assert path == folder / "run" / "step-1"
    torch.rand(5)
    loaded = load_checkpoint(folder / "run", model=filled(0))
    restore_rng(loaded.rng)
    assert torch.equal(torch.rand(3), expected)

def main_rank_fails(rank):
    if rank == 0:
        def full(*args): raise OSError(28, "No space left on device")
        durable.fsync_path = full
    message = refusal(lambda: save_checkpoint(folder / "run", 2, model=filled(2)), OSError, RuntimeError)
    assert "No space left" in message, message
    assert ("rank 0 failed" in message) == (rank == 1), message

def locked(rank):
    message = refusal(lambda: RunDirectory(folder / "locked").__enter__(), RuntimeError)
    assert "another run is using" in message, message

def decide_alike(rank):
    guard, interrupt = NonFiniteGuard(), InterruptHandler()
    assert not guard.allows(1, float("nan") if rank == 1 else 1.0)
    assert guard.allows(2, 1.0)
    assert guard.state_dict() == {"skipped": 1, "consecutive": 0}
    assert not interrupt.should_stop()
    interrupt.received = 15 * (rank == 1)
    assert interrupt.should_stop()
    assert interrupt.received == 15

statuses = [both(save_and_load), both(main_rank_fails), both(decide_alike)]
with RunDirectory(folder / "locked"):
    statuses.append(both(locked))
message = refusal(lambda: load_checkpoint(folder / "run"), checkpoint.CheckpointError)
print(json.dumps([statuses, sorted(path.name for path in (folder / "run" / "step-1").iterdir()), message]))
"""


@pytest.fixture
def run(tmp_path):
    def run_script(body: str, *arguments: object):
        script = tmp_path / "script.py"
        script.write_text(PRELUDE + body)
        work = tmp_path / "work"
        work.mkdir()
        command = [sys.executable, str(script), str(work), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run_script


def test_a_kill_between_any_two_steps_of_a_write_leaves_one_whole_checkpoint(run):
    found = run(EVERY_POINT)
    killed, last = found[:-1], found[-1]
    assert len(killed) >= 30
    assert {status for status, *_ in killed} == {-9}
    assert last == [0, 2, 1, 1]
    steps = [step for _, step, _, _ in killed]
    assert steps == sorted(steps)  # the old one before the rename, the new one after it
    assert set(steps) == {1, 2}
    assert all(entries == checkpoints for _, _, checkpoints, entries in found)  # no leftover outlives a clean start


def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(run):
    kills = int(os.environ.get("LM_FAULT_KILLS", "5"))
    report = run(TRAINING, kills, 60)
    assert report["kills"] == kills
    if kills >= 50:
        assert report["torn"] > 0  # some kills came in the middle of a write


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint_alone(run):
    for status, message, entries in run(FULL_DISK):
        assert status == 0
        assert "step-2 could not be written" in message
        assert "earlier checkpoints are untouched" in message
        assert entries == ["step-1"]


@pytest.mark.distributed
def test_ranks_keep_their_own_random_states_and_decide_and_fail_together(run):
    statuses, files, refusal = run(RANKS)
    assert statuses == [[0, 0]] * 4
    assert {"rng-0.safetensors", "rng-1.safetensors"} <= set(files)
    assert "was written by 2 processes and can only be resumed by as many, got 1" in refusal


def test_a_full_disk_error_of_the_serialiser_itself_is_an_oserror(tmp_path: Path):
    from lm_core.checkpoints.tensor_files import save_tensors
    from lm_core.checkpoints.weights import save_weights

    for call in (lambda path: save_tensors(path, {"a": 1}), lambda path: save_weights(path, {})):
        with pytest.raises(OSError, match="could not write"):
            call(tmp_path / "no folder" / "file")
