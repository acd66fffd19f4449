"""Losses and gradients over gloo processes against one process. This file is also the program those processes run."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from coca import CoCa
from lm_core.distributed import end_process_group

SPLITS = {2: [(4, 4), (5, 3)], 4: [(2, 2, 2, 2), (1, 4, 1, 2)]}
LOSSES = ("softmax", "sigmoid")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


class Towers(torch.nn.Module):
    """Module for DDP to wrap; returns the parts of the loss as tensors."""

    def __init__(self, loss, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.model = CoCa(
            dim=16, num_tokens=23, unimodal_depth=1, multimodal_depth=1, dim_latents=10, image_dim=12,
            num_img_queries=3, dim_head=8, heads=2, ff_mult=2, eos_id=2, loss=loss, caption_loss_weight=0.7,
        )  # fmt: skip
        torch.nn.init.normal_(self.model.token_emb.weight)
        self.to(dtype)

    def forward(self, text, tokens):
        loss = self.model.loss(text, image_tokens=tokens)
        return loss.total, loss.caption, loss.contrastive


def batch(dtype):
    """Eight pairs whose texts have different lengths, so that ranks have different numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, 23, (8, 9), generator=generator)
    for row, length in enumerate([9, 2, 4, 9, 3, 2, 7, 5]):
        text[row, length:] = 0
    return text, torch.randn(8, 5, 12, generator=generator, dtype=dtype)


def results(module, text, tokens):
    parts = module(text, tokens)
    parts[0].backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}
    return {"parts": [part.detach() for part in parts], "gradients": gradients}


def run_rank(own, world, folder):
    early = Towers("softmax", torch.float64)  # made before there is a group, which only the call must see
    dist.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=own, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.set_num_threads(1)
    found = {}
    for loss in LOSSES:
        for name, dtype in DTYPES.items():
            text, tokens = batch(dtype)
            for split in SPLITS[world]:
                rows = slice(sum(split[:own]), sum(split[: own + 1]))
                module = DistributedDataParallel(Towers(loss, dtype))
                found[loss, name, split] = results(module, text[rows], tokens[rows])
    text, tokens = batch(torch.float64)
    rows = slice(8 * own // world, 8 * (own + 1) // world)
    found["early"] = results(DistributedDataParallel(early), text[rows], tokens[rows])
    # A group of this process alone, and no gathering, are the local loss.
    alone = [dist.new_group([number]) for number in range(world)][own]
    model, (text, tokens) = Towers("softmax", torch.float64).model, batch(torch.float64)
    rows = slice(2 * own, 2 * own + 2)
    found["group"] = model.loss(text[rows], image_tokens=tokens[rows], process_group=alone).total.detach()
    found["local"] = model.loss(text[rows], image_tokens=tokens[rows], gather=False).total.detach()
    torch.save(found, folder / f"{own}.pt")
    end_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"gloo{request.param}")
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(request.param), str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank)], env=environ, stderr=subprocess.PIPE, text=True)
        for rank in range(request.param)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * request.param, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_every_gradient_equal_one_process_with_the_whole_batch(ranks, loss, dtype):
    expected = results(Towers(loss, DTYPES[dtype]), *batch(DTYPES[dtype]))
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}

    for split in SPLITS[len(ranks)]:
        for found in (rank[loss, dtype, split] for rank in ranks):
            torch.testing.assert_close(found["parts"], expected["parts"], **close)
            assert found["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                torch.testing.assert_close(
                    found["gradients"][name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.distributed
def test_a_model_made_before_the_group_has_the_loss_of_all_processes(ranks):
    expected = results(Towers("softmax", torch.float64), *batch(torch.float64))

    for found in ranks:
        torch.testing.assert_close(found["early"], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.distributed
def test_a_group_of_one_and_no_gathering_are_the_local_loss(ranks):
    model, (text, tokens) = Towers("softmax", torch.float64).model, batch(torch.float64)

    for own, found in enumerate(ranks):
        rows = slice(2 * own, 2 * own + 2)
        expected = model.loss(text[rows], image_tokens=tokens[rows]).total
        torch.testing.assert_close(found["group"], expected)
        torch.testing.assert_close(found["local"], expected)


def test_the_mean_of_local_means_is_another_loss():
    """The original's loss: on this batch it differs, so the tests above would fail with it."""
    model, (text, tokens) = Towers("softmax", torch.float64).model, batch(torch.float64)
    halves = [model.loss(text[rows], image_tokens=tokens[rows]).caption for rows in (slice(0, 5), slice(5, 8))]

    assert abs(sum(halves) / 2 - model.loss(text, image_tokens=tokens).caption) > 1e-3


if __name__ == "__main__":
    run_rank(int(sys.argv[3]), int(sys.argv[1]), Path(sys.argv[2]))
