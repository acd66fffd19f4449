"""Two gloo processes train, validate and save as one process with the same global batch does.

Processes are started by torchrun; every worker asserts the number of processes it is one of.
"""

import os
import socket
import subprocess
import sys

import pytest
import torch

from lm_core.checkpoint import load_tensors

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]

WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import spin_trainer.trainer
from spin_trainer import SFTDataset, SPINTrainer
from spin_trainer.sft_data import Example
from spin_trainer.small_decoder import SmallDecoder

spin_trainer.trainer.draw_curves = lambda *_: None
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)

def rows(count):
    found = []
    for _ in range(count):
        size = int(torch.randint(2, 5, (), generator=generator))
        digits = torch.randint(0, 10, (size,), generator=generator)
        found.append(Example((*digits.tolist(), 10), (*digits.sort().values.tolist(), 11)))
    return SFTDataset(found)

train, valid = rows(11), rows(5)

def run(name, **changes):
    torch.manual_seed(0)
    model = SmallDecoder(num_tokens=12, dim=16, heads=2, dim_head=8).double()
    with torch.no_grad():
        model.embedding.weight.mul_(25)
    trainer = SPINTrainer(
        model, train_sft_dataset=train, valid_sft_dataset=valid, max_seq_len=10, eos_id=11, iterations=2, epochs=1,
        batch_size=4 // processes, grad_accum_steps=1, generation_batch_size=3, start_learning_rate=1e-2, lambda_=1.0,
        end_learning_rate=1e-3, valid_every=2, checkpoint_every=1, device="cpu",
        checkpoint_folder=folder / name, **changes
    )
    assert (dist.get_world_size() if dist.is_initialized() else 1) == processes
    return model, trainer()

model, result = run("plain")
assert (result.outcome, result.steps) == ("finished", 9), result
outcome = {"weights": dict(model.state_dict()), "nll": [entry["nll"] for entry in result.history]}
if processes == 2:
    resumed, _ = run("plain")  # finished: loads the last checkpoint
    outcome["resumed"] = dict(resumed.state_dict())
if not dist.is_initialized() or dist.get_rank() == 0:
    torch.save(outcome, folder / "outcome.pt")
if dist.is_initialized():
    dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "worker.py"
    script.write_text(WORKER)
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"processes-{processes}")
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        command = [sys.executable, *(launcher if processes > 1 else []), str(script)]
        done = subprocess.run(
            [*command, str(folders[processes]), str(processes)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {processes: (folder, load_tensors(folder / "outcome.pt")) for processes, folder in folders.items()}


def greatest_difference(state, reference):
    assert state.keys() == reference.keys()
    return max(float((state[name] - weight).abs().max()) for name, weight in reference.items())


def test_two_processes_train_to_the_weights_of_one(outcomes):
    assert greatest_difference(outcomes[2][1]["weights"], outcomes[1][1]["weights"]) < 1e-10


def test_two_processes_give_the_answers_of_one_each_row_once(outcomes):
    import json

    answers = {}
    for processes, (folder, _) in outcomes.items():
        files = sorted((folder / "plain" / "generations").glob("answers-train-0-*/rows-*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert sorted(row["row"] for row in rows) == list(range(11))
        assert len(files) == processes
        answers[processes] = {row["row"]: row for row in rows}
    assert answers[1] == answers[2]


def test_two_processes_validate_as_one(outcomes):
    assert outcomes[2][1]["nll"] == pytest.approx(outcomes[1][1]["nll"], abs=1e-10)


def test_what_two_processes_saved_is_what_they_trained(outcomes):
    from spin_trainer.small_decoder import SmallDecoder

    folder, outcome = outcomes[2]
    opened = SmallDecoder.from_pretrained(folder / "plain" / "iterations" / "iteration-2")
    assert greatest_difference(opened.state_dict(), outcome["weights"]) == 0
    assert greatest_difference(outcome["resumed"], outcome["weights"]) == 0
