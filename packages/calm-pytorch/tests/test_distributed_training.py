"""Two gloo processes, started by torchrun, train to the weights of one process with the same global batch."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from lm_core.checkpoints.tensor_files import load_tensors

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]

WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from x_transformers import Decoder, TransformerWrapper

from lm_core.checkpoints.tensor_files import save_tensors
from calm_pytorch import CALM, AugmentParams, FineTuner

folder, processes = Path(sys.argv[1]), int(sys.argv[2])

def model(seed):
    torch.manual_seed(seed)
    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8)
    return TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers).double()

generator = torch.Generator().manual_seed(0)
data = [
    {
        "seq": torch.randint(0, 20, (6,), generator=generator),
        "prompt": torch.randint(0, 20, (4,), generator=generator),
        "mask": torch.rand(6, generator=generator) > 0.5,
    }
    for _ in range(16)
]

def run(name, steps):
    calm = CALM(model(0), AugmentParams(model(1), connections=[(1, 1), (2, 2)])).double()
    trainer = FineTuner(
        calm, num_train_steps=steps, learning_rate=1e-2, weight_decay=0.1, batch_size=4 // processes, dataset=data,
        grad_accum_steps=2, warmup_steps=2, checkpoint_every=3, checkpoint_path=folder / name, valid_dataset=data[:5],
    )
    trainer()
    return trainer

whole = run("whole", 6)
assert (dist.get_world_size() if dist.is_initialized() else 1) == processes
run("parts", 3)
parts = run("parts", 6)
learned = whole.calm.cross_attns.state_dict()
assert all(torch.equal(value, learned[name]) for name, value in parts.calm.cross_attns.state_dict().items())
if not dist.is_initialized() or dist.get_rank() == 0:
    save_tensors(folder / "outcome.safetensors", {"learned": learned, "validation": whole.session.last_validation})
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_train_to_the_weights_of_one_and_resume_bit_for_bit(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    outcomes = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), str(processes)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        outcomes.append(load_tensors(folder / "outcome.safetensors"))
    one, two = outcomes
    assert max(float((one["learned"][name] - value).abs().max()) for name, value in two["learned"].items()) < 1e-10
    assert one["validation"] == pytest.approx(two["validation"], rel=1e-6)
