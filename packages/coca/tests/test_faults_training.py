"""A training run that is killed repeatedly ends, bit for bit, as one that is not. Its program is test_trainer.py.

Two kills by default; LM_FAULT_KILLS=20 for a long test.
"""

import json
import os
import random
import signal
import time

import pytest
import torch

from lm_core.checkpoints.weights import read_weights

pytestmark = [pytest.mark.plain, pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")]


def finish(process, folder):
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    timeless = [{name: value for name, value in row.items() if "second" not in name} for row in rows]
    return read_weights(folder / "checkpoints" / "step-6" / "model.safetensors"), timeless


def kill(process, folder, wait):
    """Kills a run some seconds after its next update; False if it was done sooner."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before):
        time.sleep(0.01)  # into the loop, not into imports
    time.sleep(wait)
    is_running = process.poll() is None
    if is_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return is_running


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(start_run, tmp_path):
    expected, expected_rows = finish(start_run(tmp_path / "whole"), tmp_path / "whole")
    chance, left, runs = random.Random(0), int(os.environ.get("LM_FAULT_KILLS", "2")), 0
    while left > 0:
        folder = tmp_path / f"killed-{runs}"
        while left > 0 and kill(start_run(folder, TINY_PAUSE="0.3"), folder, chance.uniform(0, 0.6)):
            left -= 1
        runs += 1
        weights, rows = finish(start_run(folder), folder)
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name
        assert rows == expected_rows
        assert all(path.name.startswith("step-") for path in (folder / "checkpoints").iterdir())
