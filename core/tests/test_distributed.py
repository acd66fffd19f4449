"""Gathering over gloo processes compared with one process. This file is also the program of those processes."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lm_core.distributed import (
    all_gather,
    all_reduce_sum,
    barrier,
    broadcast_object,
    end_process_group,
    is_distributed,
    loss_normalizer,
    rank,
    world_size,
)
from lm_core.losses.losses import linear_cross_entropy

# samples of each rank
BATCHES = {2: [(3, 3), (4, 2), (6, 0)], 4: [(2, 2, 2, 2), (1, 4, 0, 3)]}
LABELS = torch.tensor([[1, 2, -100, -100], [3, -100, 0, 1], [2, 2, 2, 2], [-100, -100, -100, 4]])


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.text = nn.Linear(6, 4)
        self.log_temperature = nn.Parameter(torch.tensor(0.3))
        self.double()

    def forward(self, images, texts):
        latents = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return *latents, self.log_temperature.exp()


def samples(count):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (5, 6))


def contrastive_loss(images, texts, temperature):
    similarity = temperature * images @ texts.T
    target = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(6, 3, dtype=torch.float64)

    def forward(self, ids, labels, normalizer=None):
        hidden = self.embedding(ids).cumsum(1).tanh()
        return linear_cross_entropy(hidden, self.embedding.weight, labels, normalizer=normalizer)


def gradients(module):
    return {name.removeprefix("module."): parameter.grad for name, parameter in module.named_parameters()}


def train_towers(own, world, batch):
    model = DistributedDataParallel(TwoTowers())
    start = sum(batch[:own])
    images, texts = (features[start : start + batch[own]] for features in samples(sum(batch)))
    image_latents, text_latents, temperature = model(images, texts)
    (image_latents, sizes), (text_latents, _) = all_gather(image_latents), all_gather(text_latents)
    loss = contrastive_loss(image_latents, text_latents, temperature)
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model), "sizes": sizes}


def train_language_model(own, world):
    model = DistributedDataParallel(TiedModel())
    rows = slice(own * 4 // world, (own + 1) * 4 // world)
    labels = LABELS[rows]
    # DDP averages, so each rank divides by its share of the global count
    total, normalizer = loss_normalizer(int((labels != -100).sum()), torch.device("cpu"))
    assert total == int((LABELS != -100).sum()) == world * float(normalizer)
    loss = model(labels.clamp(min=0), labels, normalizer)
    loss.backward()
    return {"loss": all_reduce_sum(loss) / world, "gradients": gradients(model)}


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def run_rank(own, world, folder):
    store = (folder / f"store-{world}").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=own, world_size=world, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    results = {"towers": {batch: train_towers(own, world, batch) for batch in BATCHES[world]}}
    results["language model"] = train_language_model(own, world)

    ids = torch.arange(10 * own, 10 * own + own).reshape(own, 1)
    results["ids"] = all_gather(ids)
    columns = torch.full((2, own + 1), float(own)).T  # not contiguous
    results["columns"] = all_gather(columns)[0]
    results["bfloat16"] = all_gather(torch.full((1, 2, 3), own, dtype=torch.bfloat16))[0]
    results["nothing"] = all_gather(torch.empty(0, 3))

    results["refused shape"] = refusal(lambda: all_gather(torch.zeros(2, 3 + own)))
    results["refused dtype"] = refusal(lambda: all_gather(torch.zeros(2).double() if own else torch.zeros(2)))
    results["refused scalar"] = refusal(lambda: all_gather(torch.zeros(()) if own else torch.zeros(2)))
    results["refused gradient"] = refusal(lambda: all_gather(torch.zeros(2, requires_grad=own == 1)))

    members = [world - 1, 0]  # a group keeps the order of global ranks
    group = dist.new_group(members)
    if own in members:
        results["group"] = all_gather(torch.tensor([own]), group)
        results["group object"] = broadcast_object(own, source=1, group=group)
        part = torch.tensor([1.0 + own], requires_grad=True)
        (all_gather(part, group)[0] * torch.tensor([2.0, 3.0])).sum().backward()
        results["group gradient"] = part.grad
    else:
        results["outside the group"] = refusal(lambda: all_gather(torch.tensor([own]), group))

    counted = torch.tensor([own, 1])
    results["sum"], results["counted"] = all_reduce_sum(counted), counted
    results["object"] = broadcast_object({"from": own}, source=1)
    results["identity"] = (is_distributed(), rank(), world_size())
    barrier()
    torch.save(results, folder / f"rank-{own}-of-{world}.pt")
    end_process_group()


THREADS = """
import os, sys
import lm_core.distributed
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def threads():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]

dist.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
model = DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
assert "pt_gloo_runloop" in threads()
for _ in range(200):
    dist.all_reduce(torch.ones(3), async_op=True)  # gloo's thread frees these, for which it needs the GIL
lm_core.distributed.end_process_group()
assert not any("gloo" in name for name in threads()), threads()
del model  # the last to hold the group would join that thread while it holds the GIL, and hang
"""


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_no_thread_of_gloo_outlives_the_process_group(tmp_path):
    # one that does may abort the process while the interpreter ends
    done = subprocess.run(
        [sys.executable, "-c", THREADS, (tmp_path / "store").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with the results of every rank of 2 and of 4 processes."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=[pytest.param(world, marks=pytest.mark.distributed) for world in BATCHES])
def ranks(request, results):
    """The results of every rank of a run."""
    world = request.param
    return [torch.load(results / f"rank-{own}-of-{world}.pt", weights_only=True) for own in range(world)]


def assert_same(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_a_contrastive_loss_over_ranks_has_the_gradients_of_one_process(ranks):
    for batch in BATCHES[len(ranks)]:
        model = TwoTowers()
        loss = contrastive_loss(*model(*samples(sum(batch))))
        loss.backward()
        for result in ranks:
            assert result["towers"][batch]["sizes"].tolist() == list(batch)
            assert_same(result["towers"][batch]["loss"], loss.detach())
            assert_same(result["towers"][batch]["gradients"], gradients(model))


def test_a_loss_divided_by_the_global_count_has_the_gradient_of_one_process(ranks):
    model = TiedModel()
    loss = model(LABELS.clamp(min=0), LABELS)
    loss.backward()
    for result in ranks:
        assert_same(result["language model"], {"loss": loss.detach(), "gradients": gradients(model)})


def test_parts_come_in_the_order_of_ranks_whatever_their_size_and_dtype(ranks):
    world = len(ranks)
    for result in ranks:
        ids, sizes = result["ids"]
        assert ids.flatten().tolist() == [10 * own + row for own in range(world) for row in range(own)]
        assert ids.dtype == torch.int64
        assert sizes.tolist() == list(range(world))
        assert result["columns"].tolist() == [[float(own)] * 2 for own in range(world) for _ in range(own + 1)]
        assert result["bfloat16"].dtype == torch.bfloat16
        assert result["bfloat16"][:, 1, 2].tolist() == list(range(world))
        nothing, sizes = result["nothing"]
        assert nothing.shape == (0, 3)
        assert sizes.tolist() == [0] * world


def test_a_mismatch_is_refused_on_every_rank_by_name(ranks):
    world = len(ranks)
    for own, result in enumerate(ranks):
        assert f"torch.float32 and (2, {3 + own}) on rank {own}, and others on rank" in result["refused shape"]
        others = "0" if own else ", ".join(str(other) for other in range(1, world))
        assert result["refused dtype"].endswith(f"on rank {own}, and others on rank {others}")
        assert f"got {[2] + [-1] * (world - 1)} rows" in result["refused scalar"]
        assert f"got {own == 1} on rank {own} and {own != 1} on rank" in result["refused gradient"]


def test_a_group_gathers_among_its_members_only(ranks):
    world = len(ranks)
    for own, result in enumerate(ranks):
        if own in (0, world - 1):
            parts, sizes = result["group"]
            assert parts.tolist() == [0, world - 1]
            assert sizes.tolist() == [1, 1]
            assert result["group object"] == world - 1
            # each rank weighs the first part by 2 and the second by 3, and there are two ranks
            assert result["group gradient"].tolist() == [4.0 if own == 0 else 6.0]
        else:
            assert f"without global rank {own}" in result["outside the group"]


def test_sums_and_objects_reach_every_rank(ranks):
    world = len(ranks)
    for own, result in enumerate(ranks):
        assert result["sum"].tolist() == [world * (world - 1) // 2, world]
        assert result["counted"].tolist() == [own, 1]
        assert result["object"] == {"from": 1}
        assert result["identity"] == (True, own, world)


def test_a_single_process_gathers_its_own_tensor():
    x = torch.randn(3, 2, requires_grad=True)
    gathered, sizes = all_gather(x)
    assert gathered is x
    assert sizes.tolist() == [3]
    assert (is_distributed(), rank(), world_size()) == (False, 0, 1)
    counts = torch.tensor([1, 2])
    total = all_reduce_sum(counts)
    assert torch.equal(total, counts)
    assert total is not counts
    assert broadcast_object("value") == "value"
    barrier()


@pytest.mark.plain
def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"x must have a first dimension to gather along, got a scalar"):
        all_gather(torch.zeros(()))
    with pytest.raises(ValueError, match=r"source must be a rank in \[0, 1\), got 1"):
        broadcast_object(None, source=1)


if __name__ == "__main__":
    for size in BATCHES:  # forked ranks need not import torch again
        method = "fork" if sys.platform == "linux" else "spawn"
        start_processes(run_rank, (size, Path(sys.argv[1])), nprocs=size, start_method=method)
