"""Two gloo processes, started by torchrun, train to the weights of one process with the same global batch.

Each process holds all weights, or all models are sharded (FSDP), the frozen ones too.
"""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

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
from lm_core.training.fsdp import is_sharded, whole
from calm_pytorch import CALM, AugmentParams, FineTuner

folder, processes, fsdp = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "fsdp"

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

def run(name, steps, fsdp=fsdp, shared=False):
    params = AugmentParams(model(1), connections=[(1, 1), (2, 2)], shared_sequence=shared)
    calm = CALM(model(0), params).double()
    rows = [{name: value for name, value in row.items() if name != "prompt"} for row in data] if shared else data
    trainer = FineTuner(
        calm, num_train_steps=steps, learning_rate=1e-2, weight_decay=0.1, batch_size=4 // processes, dataset=rows,
        grad_accum_steps=2, warmup_steps=2, checkpoint_every=3, checkpoint_path=folder / name, valid_dataset=rows[:5],
        fsdp=fsdp, device="cpu",
    )
    trainer()
    for part in (calm.anchor_llm, calm.augment_llms, calm.cross_attns):
        assert is_sharded(part) == fsdp
    learned = {name: whole(value) for name, value in calm.cross_attns.state_dict().items()}
    return trainer.session.last_validation, learned

validation, learned = run("whole", 6)
assert (dist.get_world_size() if dist.is_initialized() else 1) == processes
run("parts", 3)
_, resumed = run("parts", 6)
assert all(torch.equal(value, learned[name]) for name, value in resumed.items())
_, along = run("along", 2, shared=True)
if not dist.is_initialized() or dist.get_rank() == 0:
    save_tensors(folder / "outcome.safetensors", {"learned": learned, "along": along, "validation": validation})
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


sharded = pytest.param(
    "fsdp",
    marks=pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="FSDP on a CPU needs torch 2.7 or newer"),
)


@pytest.mark.parametrize("how", ["ddp", sharded])
def test_two_processes_train_to_the_weights_of_one_and_resume_bit_for_bit(tmp_path, how):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    outcomes = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        command = [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(script),
            str(folder),
            str(processes),
            how if processes > 1 else "ddp",
        ]
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
    for part in ("learned", "along"):
        assert max(float((one[part][name] - value).abs().max()) for name, value in two[part].items()) < 1e-10
    assert one["validation"] == pytest.approx(two["validation"], rel=1e-6)
