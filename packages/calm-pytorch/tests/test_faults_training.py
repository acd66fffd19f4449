"""A run killed at random moments resumes and ends with the weights of an uninterrupted one.

``LM_FAULT_KILLS`` sets the number of kills (3 by default).
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
from x_transformers import Decoder, TransformerWrapper
from calm_pytorch import CALM, AugmentParams, FineTuner
from lm_core.checkpoints.checkpoint import latest_checkpoint

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what every run would import

def model(seed):
    torch.manual_seed(seed)
    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, attn_dropout=0.1)
    return TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers)

data = [{"seq": torch.arange(i, i + 6) % 20, "prompt": torch.arange(i, i + 4) % 20} for i in range(10)]

def train(path):
    calm = CALM(model(0), AugmentParams(model(1), connections=[(1, 1), (2, 2)]))
    FineTuner(calm, num_train_steps=25, learning_rate=1e-2, weight_decay=0.1, batch_size=2, dataset=data,
              warmup_steps=2, checkpoint_every=1, checkpoint_path=path)()

def start(path):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(path)
            code = 0
        finally:
            os._exit(code)
    return pid

def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def result(path):
    newest = latest_checkpoint(path / "checkpoints")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)  # the one value that is not the run's but the machine's
    return newest.name, (newest / "model.safetensors").read_bytes(), rows

begun = time.monotonic()
assert finish(start(folder / "whole")) == 0
duration, whole = time.monotonic() - begun, result(folder / "whole")
chance, done, rounds, equal = random.Random(0), 0, 0, []
while done < kills:
    path, status = folder / f"killed-{rounds}", None
    rounds += 1
    while status != 0:
        pid = start(path)
        if done < kills:
            time.sleep(chance.uniform(0.05, 0.9) * duration)
            os.kill(pid, signal.SIGKILL)
        status = finish(pid)
        assert status in (0, -signal.SIGKILL), status
        done += status != 0
    equal.append(result(path) == whole)
print(json.dumps({"kills": done, "runs": rounds, "equal": equal}))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(tmp_path):
    kills = int(os.environ.get("LM_FAULT_KILLS", "3"))
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120 + 20 * kills,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] == kills
    assert outcome["equal"] == [True] * outcome["runs"]
