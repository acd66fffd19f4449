"""PPO killed at random moments: at most the work since the last checkpoint is lost, and the end is the same.

``LM_FAULT_KILLS`` sets the number of kills (5 by default). Runs are forked from one interpreter that has everything
imported, so that kills land in rollouts, updates and checkpoints, and not in imports.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tested with fork, which this system lacks")

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path

import accelerate, matplotlib.figure, matplotlib.backends.backend_agg, safetensors.torch, torch
from lm_core.checkpoints.checkpoint import latest_checkpoint
from lm_core.generation.generate import generate
from palm_rlhf import PaLM, RLHFTrainer

folder, kills, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what every run would import

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
        checkpoint_every=every,
    )
    real = trainer._next_update
    def counted():
        real()
        with open(f"{path}.updates", "a") as file:
            file.write(f"{trainer.updates}\\n")
    trainer._next_update = counted
    trainer.train(num_episodes=64, update_timesteps=16, max_new_tokens=5, eos_token=3)

def start(path):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as sink:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
                train(path)
            code = 0
        finally:
            os._exit(code)
    return pid

def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def steps(path):
    newest = latest_checkpoint(path / "checkpoints") if (path / "checkpoints").exists() else None
    return 0 if newest is None else int(newest.name.split("-")[1])

def result(path):
    newest = latest_checkpoint(path / "checkpoints")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("tokens_per_second", "rollout_seconds")} for row in rows]
    samples = (path / "samples.jsonl").read_text()
    return newest.name, (newest / "model.safetensors").read_bytes(), kept, samples

begun = time.monotonic()
assert finish(start(folder / "whole")) == 0
duration = time.monotonic() - begun
whole = result(folder / "whole")
chance, done, rounds, equal, lost = random.Random(0), 0, 0, [], []
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
        log = Path(f"{path}.updates")
        if status != 0 and log.exists():
            lost.append(int(log.read_text().splitlines()[-1]) - steps(path))
    equal.append(result(path) == whole)
print(json.dumps({"kills": done, "runs": rounds, "equal": equal, "lost": lost}))
"""


@pytest.mark.slow
def test_a_policy_killed_at_random_moments_loses_at_most_the_work_since_its_checkpoint(tmp_path):
    kills, every = int(os.environ.get("LM_FAULT_KILLS", "5")), 3
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), str(kills), str(every)],
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
    # an update that was made while its checkpoint was being written is lost with it
    assert all(0 <= count <= every for count in outcome["lost"]), outcome["lost"]
