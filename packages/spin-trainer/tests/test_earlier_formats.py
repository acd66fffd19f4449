"""Checkpoints of earlier versions: their weights open, and their runs are refused by name.

``fixtures/run-0.1.0`` was written with version 0.1.0 by ``SPINTrainer(SmallDecoder(num_tokens=12, dim=8, depth=2,
heads=2, dim_head=4), ...)``, killed in its second update; ``logits.json`` has that decoder's logits in float64.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lm_core.checkpoints.manifest import CheckpointError
from spin_trainer.quickstart.small_decoder import SmallDecoder

RUN = Path(__file__).with_name("fixtures") / "run-0.1.0"


def test_a_decoder_of_0_1_0_gives_its_logits():
    expected = json.loads((RUN / "logits.json").read_text())
    model = SmallDecoder.from_pretrained(RUN / "checkpoints" / "step-1").double()

    logits = model(torch.tensor(expected["ids"]))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"], dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_run_of_0_1_0_is_refused_and_its_weights_start_a_new_one(train, tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    decoder = SmallDecoder.from_pretrained(RUN / "checkpoints" / "step-1")
    with pytest.raises(CheckpointError, match="was written by an earlier version; only its weights can be used"):
        train("run", model=decoder)

    assert train("new", model=decoder)[1].outcome == "finished"
