"""Fixtures: small models, their inputs, and training runs in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAD, BOS, EOS = 0, 1, 2


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where there is none; with REQUIRE_CUDA=1 it runs, and fails."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and os.environ.get("REQUIRE_CUDA") != "1" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(scope="session")
def make_coca():
    """A small CoCa over precomputed image tokens of 12 features, or with a ViT over 8 x 8 grey images."""

    # Imported here: the run-time shape checker must be in place before the package is imported.
    from coca import CoCa, VisionTransformer

    def make(vit=False, seed=0, **changes):
        torch.manual_seed(seed)
        settings = {"dim": 16, "num_tokens": 23, "unimodal_depth": 2, "multimodal_depth": 2, "dim_latents": 10}
        settings |= {"image_dim": None if vit else 12, "num_img_queries": 4, "dim_head": 8, "heads": 2, "ff_mult": 2}
        settings |= {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS}
        if vit:
            settings["img_encoder"] = VisionTransformer(
                image_size=8, patch_size=4, channels=1, dim=12, depth=1, dim_head=4, heads=2, ff_mult=2
            )
        model = CoCa(**{**settings, **changes})
        # Larger embeddings than at the start of training, so that a small scale hides no difference.
        torch.nn.init.normal_(model.token_emb.weight, std=1.0)
        return model

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Texts without padding, and image tokens."""

    def make(b=4, n=7, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(3, 23, (b, n), generator=generator)
        return text, torch.randn(b, 5, 12, generator=generator, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def launcher():
    """Arguments of Python that start a program in two processes, by torchrun at a free port."""

    def arguments():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]

    return arguments


@pytest.fixture(scope="session")
def start_run():
    """Starts test_trainer.py as a program that trains into a folder; its errors go into a pipe."""

    def start(folder, *launcher, **environ):
        return subprocess.Popen(
            [sys.executable, *launcher, str(Path(__file__).with_name("test_trainer.py")), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start
