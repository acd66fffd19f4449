"""Self-play on a GPU: in float32 with the losses of the CPU, and in bfloat16."""

import pytest
import torch

from lm_core.training.metrics import read_metrics

pytestmark = pytest.mark.cuda


def test_a_run_on_a_gpu_has_the_losses_of_the_cpu(train, tmp_path):
    for device in ("cpu", "cuda"):
        train(device, device=device, precision="fp32", lambda_=1.0, temperature=0.0)
    here, there = (
        [row["loss"] for row in read_metrics(tmp_path / device / "metrics.jsonl") if "loss" in row]
        for device in ("cpu", "cuda")
    )
    assert there == pytest.approx(here, rel=1e-3)


def test_a_run_in_bfloat16_on_a_gpu_trains_and_stays_finite(train):
    trainer, result = train(device="cuda", precision="bf16", iterations=2)
    assert result.outcome == "finished"
    weights = list(trainer.model.policy_model.parameters())
    assert all(weight.is_cuda and bool(weight.isfinite().all()) for weight in weights)
    assert all(weight.dtype == torch.float32 for weight in weights)
