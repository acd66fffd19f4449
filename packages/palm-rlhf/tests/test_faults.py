"""Kills, Ctrl-C, damaged checkpoints, a full disk, a dying rank: a run resumes to the weights it would have had.

``LM_FAULT_KILLS`` sets the number of random kills (5 by default). Runs that are killed at random are forked from one
interpreter that has everything imported, so that kills land in training and not in imports.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from lm_core.checkpoints.checkpoint import latest_checkpoint, list_checkpoints
from palm_rlhf.cli import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tested with fork, which this system lacks")

FLAGS = [
    *("--dim=16", "--depth=2", "--dim_head=8", "--heads=2", "--attn_dropout=0.1", "--learning_rate=1e-2"),
    *("--sequence_length=24", "--batch_size=2", "--validate_every=5", "--validation_tokens=100"),
    *("--sample_tokens=0", "--device=cpu"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sixty short documents."""
    generator = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    with file.open("w") as stream:
        for _ in range(60):
            length = int(torch.randint(3, 90, (), generator=generator))
            letters = torch.randint(97, 105, (length,), generator=generator).tolist()
            stream.write(json.dumps({"text": "".join(map(chr, letters))}) + "\n")
    return file


@pytest.fixture
def train(text):
    """``train(folder, *flags)`` runs the command in this process and returns its exit status."""

    def run(folder, *flags):
        return main(["train", "--data", str(text), "--checkpoint_dir", str(folder), *FLAGS, *flags])

    return run


def final_weights(folder, step):
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.name.split("-")[1] == str(step)
    return (newest / "model.safetensors").read_bytes()


def updates_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


# ------------------------------------------------------------------------------------------------------------ kills

# Follows the workload that is killed: ``train(path)``, and where updates are logged, the updates that a kill may cost.
KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path

import accelerate, jsonargparse, matplotlib.figure, matplotlib.backends.backend_agg, safetensors.torch, torch
from lm_core.checkpoints.checkpoint import latest_checkpoint
from lm_core.generation.generate import generate

torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what every run would import
folder, kills = Path(sys.argv[1]), int(sys.argv[2])

def start(path):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as sink:
                os.dup2(sink.fileno(), 1)
                code = train(path)
        finally:
            os._exit(code)
    return pid

def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def steps(path):
    newest = latest_checkpoint(path / "checkpoints") if (path / "checkpoints").exists() else None
    return 0 if newest is None else int(newest.name.split("-")[1])

def result(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.endswith(("_second", "_seconds"))} for row in rows]
    samples = path / "samples.jsonl"
    weights = (latest_checkpoint(path / "checkpoints") / "model.safetensors").read_bytes()
    return steps(path), weights, kept, samples.read_text() if samples.exists() else None

begun = time.monotonic()
assert finish(start(folder / "whole")) == 0
duration = time.monotonic() - begun
whole = result(folder / "whole")
chance, done, torn, rounds, equal, lost = random.Random(0), 0, 0, 0, [], []
while done < kills:
    path, status = folder / f"killed-{rounds}", None
    rounds += 1
    while status != 0:
        pid = start(path)
        if done < kills:
            time.sleep(chance.uniform(0.02, 0.9) * duration)
            os.kill(pid, signal.SIGKILL)
        status = finish(pid)
        assert status in (0, -signal.SIGKILL), status
        done += status != 0
        torn += status != 0 and any((path / "checkpoints").glob(".tmp-*"))
        log = Path(f"{path}.updates")
        if status != 0 and log.exists():
            lost.append(int(log.read_text().splitlines()[-1]) - steps(path))
    equal.append(result(path) == whole)
print(json.dumps({"kills": done, "torn": torn, "runs": rounds, "equal": equal, "lost": lost}))
"""

PRETRAINING = """
from palm_rlhf.pretrain import trainer
from palm_rlhf.cli import main

def train(path):
    return main(["train", "--checkpoint_dir", str(path), *sys.argv[3:]])
"""

POLICY = """
import sys, torch
from palm_rlhf import PaLM, RLHFTrainer

def reward(ids, prompt_lengths, lengths):
    position = torch.arange(ids.shape[1])
    response = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return ((ids == 5) & response).sum(1) / response.sum(1)

def train(path):
    torch.manual_seed(0)
    palm = PaLM(dim=16, num_tokens=13, depth=2, dim_head=8, heads=2)
    generator = torch.Generator().manual_seed(0)
    trainer = RLHFTrainer(
        palm=palm, reward=reward, prompt_token_ids=[torch.randint(13, (n,), generator=generator) for n in (4, 9, 2, 5)],
        actor_lr=1e-2, actor_dropout=0.1, kl_target=1.0, minibatch_size=4, epochs=2, device="cpu", checkpoint_dir=path,
        checkpoint_every=int(sys.argv[3]),
    )
    real = trainer._next_update
    def counted():
        real()
        with open(f"{path}.updates", "a") as file:
            file.write(f"{trainer.updates}\\n")
    trainer._next_update = counted
    trainer.train(num_episodes=48, update_timesteps=16, max_new_tokens=5, eos_token=3)
    return 0
"""


def outcome_of_kills(workload, folder, *arguments):
    """Kills a workload at random moments until ``LM_FAULT_KILLS`` kills are done; each run ends as the whole one."""
    kills = int(os.environ.get("LM_FAULT_KILLS", "5"))
    done = subprocess.run(
        [sys.executable, "-c", workload + KILLS, str(folder), str(kills), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120 + 30 * kills,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] == kills
    assert outcome["equal"] == [True] * outcome["runs"]
    return outcome


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_the_uninterrupted_one(text, tmp_path):
    flags = ["--data", str(text), *FLAGS, "--max_steps=24", "--checkpoint_every=1"]
    outcome = outcome_of_kills(PRETRAINING, tmp_path, *flags)
    if outcome["kills"] >= 20:
        assert outcome["torn"] > 0  # some kills came while a checkpoint was being written


@pytest.mark.slow
def test_a_policy_killed_at_random_moments_loses_at_most_the_work_since_its_checkpoint(tmp_path):
    every = 3
    lost = outcome_of_kills(POLICY, tmp_path, str(every))["lost"]
    # an update that was made while its checkpoint was being written is lost with it
    assert all(0 <= count <= every for count in lost), lost


# ----------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=["ctrl-c", "terminate", "warning"]
)
def test_an_interrupt_saves_a_checkpoint_and_prints_how_to_resume(train, text, tmp_path, number):
    folder, flags = tmp_path / "stopped", ["--max_steps=100", "--checkpoint_every=1000"]
    arguments = ["train", "--data", str(text), "--checkpoint_dir", str(folder), *FLAGS, *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "palm_rlhf", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline, metrics = time.monotonic() + 120, folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") <= 5:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate(timeout=10)
        time.sleep(0.01)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)

    assert process.returncode == 128 + number, errors
    assert f"{number.name}: stopping after this update and saving a checkpoint" in errors
    (saved,) = list_checkpoints(folder / "checkpoints")
    assert f"Stopped (interrupted) after {saved.name.split('-')[1]} of 100 updates" in printed
    assert shlex.join(["palm-rlhf", *arguments]) in printed

    assert train(folder, *flags) == 0
    assert train(tmp_path / "whole", *flags) == 0
    assert final_weights(folder, 100) == final_weights(tmp_path / "whole", 100)
    assert updates_of(folder) == updates_of(tmp_path / "whole")


# --------------------------------------------------------------------------------------- damaged files, full disk


@pytest.mark.filterwarnings("default:skipped a damaged checkpoint")
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_resumed(train, tmp_path, capsys):
    flags = ["--max_steps=20", "--checkpoint_every=5", "--keep_checkpoints=3"]
    assert train(tmp_path / "whole", *flags) == 0
    assert train(tmp_path / "damaged", *flags) == 0
    newest = tmp_path / "damaged" / "checkpoints" / "step-20"
    file = newest / "trainer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    assert train(tmp_path / "damaged", *flags) == 0
    warned = r"warning: skipped a damaged checkpoint, using step-15 instead. step-20: .*trainer.safetensors"
    assert re.search(warned, capsys.readouterr().err)
    assert final_weights(tmp_path / "damaged", 20) == final_weights(tmp_path / "whole", 20)
    assert updates_of(tmp_path / "damaged") == updates_of(tmp_path / "whole")


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # the next checkpoint's weights do not fit
from palm_rlhf.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_ends_the_run_with_its_checkpoints_whole(train, text, tmp_path):
    size = ["--dim=32", "--checkpoint_every=3", "--keep_checkpoints=1"]
    assert train(tmp_path, *size, "--max_steps=3") == 0
    before = final_weights(tmp_path, 3)
    assert len(before) > 30_000
    flags = ["--data", str(text), "--checkpoint_dir", str(tmp_path), *FLAGS, *size, "--max_steps=9"]
    command = [sys.executable, "-c", FULL_DISK, "train", *flags]
    full = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert full.returncode == 1, full.stderr
    assert "step-6 could not be written" in full.stderr
    assert "earlier checkpoints are untouched" in full.stderr
    assert final_weights(tmp_path, 3) == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert train(tmp_path, *size, "--max_steps=9") == 0


# ------------------------------------------------------------------------------------------------------- dying rank

DYING_RANK = """
import os, signal, sys
from pathlib import Path

import torch
import torch.distributed as dist
from lm_core.data.corpora import load_corpus
from palm_rlhf import PaLM
from palm_rlhf.pretrain.trainer import PretrainTrainer
from palm_rlhf.pretrain.config import TrainingSettings

folder, name = Path(sys.argv[1]), sys.argv[2]
settings = TrainingSettings(
    max_steps=8, sequence_length=24, batch_size=2, checkpoint_every=2, validation_tokens=100, device="cpu"
)

def train(place, die):
    torch.manual_seed(0)
    palm = PaLM(dim=16, depth=2, dim_head=8, heads=2, num_tokens=259, attn_dropout=0.1)
    trainer = PretrainTrainer(
        model=palm, corpus=load_corpus(sys.argv[3]), checkpoint_dir=folder / place, settings=settings
    )
    assert dist.get_world_size() == 2
    calls = []
    def kill(module, inputs):
        calls.append(module.training)
        if sum(calls) == 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if die:
        trainer.objective.register_forward_pre_hook(kill)
    return trainer.train(), palm

if name == "die":
    train("killed", True)
else:
    result, resumed = train("killed", False)
    assert (result.first_step, result.step) == (4, 8), result
    _, whole = train("whole", False)
    pairs = zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    # in one piece, or the two ranks' words may mix
    sys.stdout.write(f"EQUAL {dist.get_rank()}\\n")
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_dies_is_reported_and_the_run_resumes(text, tmp_path, run_worker):
    died, resumed = (run_worker(DYING_RANK, tmp_path, name, text) for name in ("die", "resume"))

    assert died.returncode != 0
    assert "Signal 9 (SIGKILL)" in died.stderr
    assert "(local_rank: 1)" in died.stderr
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert "EQUAL 0" in resumed.stdout
    assert "EQUAL 1" in resumed.stdout
