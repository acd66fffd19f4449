"""Small models and data whose right answers are known."""

import os

import pytest
import torch

from spin_trainer.sft_data import Example, SFTDataset
from spin_trainer.small_decoder import SmallDecoder

EOS = 11


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where there is none; with REQUIRE_CUDA=1 it runs, and fails."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and os.environ.get("REQUIRE_CUDA") != "1" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(scope="session")
def make_model():
    """``make_model(seed)``: a decoder of 12 tokens whose logits are of order one."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        model = SmallDecoder(**{"num_tokens": 12, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, **changes})
        with torch.no_grad():
            model.embedding.weight.mul_(25)
        return model

    return make


@pytest.fixture(scope="session")
def make_rows():
    """``make_rows(count, seed)``: sorting tasks of two to four digits, so rows have different lengths."""

    def make(count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for _ in range(count):
            digits = torch.randint(0, 10, (int(torch.randint(2, 5, (), generator=generator)),), generator=generator)
            rows.append(Example((*digits.tolist(), 10), (*digits.sort().values.tolist(), EOS)))
        return SFTDataset(rows)

    return make


@pytest.fixture
def train(make_model, make_rows, tmp_path, monkeypatch):
    """``train(folder, **changes)`` runs a small training; returns its trainer and result."""
    from spin_trainer import SPINTrainer

    def run(folder="run", *, model=None, seed=0, rows=12, curves=False, **changes):
        if not curves:  # drawing takes longer than the training
            monkeypatch.setattr("spin_trainer.trainer.draw_curves", lambda *_: None)
        settings = {
            "train_sft_dataset": make_rows(rows),
            "valid_sft_dataset": make_rows(5, seed=1),
            "max_seq_len": 10,
            "eos_id": EOS,
            "batch_size": 3,
            "grad_accum_steps": 1,
            "epochs": 1,
            "start_learning_rate": 1e-2,
            "end_learning_rate": 1e-3,
            "device": "cpu",
            "checkpoint_folder": tmp_path / folder,
            **changes,
        }
        trainer = SPINTrainer(make_model(seed) if model is None else model, **settings)
        return trainer, trainer()

    return run
