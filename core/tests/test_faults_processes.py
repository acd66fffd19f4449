"""Training processes end with their work: none aborts ("terminate called without an active exception"), none hangs.

``LM_FAULT_RUNS`` sets the number of runs of two processes (4 by default); a quarter as many have four. Ranks are forked
from one interpreter that has everything imported, train two updates and end as any script does, while busy loops
compete for every processor: threads of a process group that outlive their interpreter show themselves so.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.torch_version import TorchVersion

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked, which this system lacks"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]

RUNS = """
import collections, json, os, signal, socket, sys, time

from dataclasses import replace

import accelerate, tqdm, torch, torch.distributed as dist
import torch.distributed.fsdp, torch.distributed.checkpoint.state_dict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from lm_core.training.config import CommonSettings
from lm_core.training.session import TrainingSession, adamw

runs, endings = int(sys.argv[1]), sys.argv[2].split(",")
tqdm.tqdm.monitor_interval = 0  # no thread before the fork
settings = CommonSettings(max_steps=2, validate_every=9, checkpoint_every=9, device="cpu")

def train(ending):
    config = replace(settings, fsdp=ending == "sharded")
    session = TrainingSession("Trainer", config=config, checkpoint_dir=None)
    assert dist.get_world_size() == world
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)])
    session.register(model=model, optimizer=lambda: adamw(model, settings), blocks=lambda: model)
    with session.run():
        for _ in session.steps():
            for rows in session.micro_batches([torch.randn(4, 32), torch.randn(4, 32)]):
                session.backward(session.module(rows).square().mean())
            session.log(session.optimizer_step())
    if ending == "destroyed":
        dist.destroy_process_group()
    if ending == "kept":
        kept.append(DistributedDataParallel(model))  # the script's own wrapper, alive to the end
        kept[0](torch.randn(4, 32)).sum().backward()
    return session

kept = []
# imports what a first update would import; accelerate itself remembers the processes it was started with
layer = nn.Linear(2, 2)
adam, _ = adamw(layer, settings)
layer(torch.ones(1, 2)).sum().backward()
nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
adam.step()
busy = []
for _ in range(os.cpu_count() or 1):
    pid = os.fork()
    if pid == 0:
        while os.getppid() != 1:
            sum(range(100_000))
        os._exit(0)
    busy.append(pid)

exits, hangs, child = collections.Counter(), 0, False
for number, world in enumerate([2] * runs + [4] * (runs // 4)):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = set()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            child = True
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            break
        ranks.add(pid)
    if child:
        break
    deadline = time.monotonic() + 300
    while ranks:
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() > deadline:
                hangs += 1
                os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0)
            if ended:
                exits[os.waitstatus_to_exitcode(status)] += 1
                ranks.remove(pid)
        time.sleep(0.01)
if child:
    trained = train(endings[number % len(endings)])  # falls off the end of the script, everything still referenced
else:
    for pid in busy:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(json.dumps({"exits": exits, "hangs": hangs}))
"""


@pytest.mark.slow
def test_processes_end_with_their_work_on_a_busy_machine():
    runs = int(os.environ.get("LM_FAULT_RUNS", "4"))
    endings = ["plain", "destroyed", "kept"]
    if TorchVersion(torch.__version__) >= "2.7":
        endings.append("sharded")
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(runs), ",".join(endings)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300 + 120 * runs,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome == {"exits": {"0": 2 * runs + 4 * (runs // 4)}, "hangs": 0}, done.stderr[-4000:]
