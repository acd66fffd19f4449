"""Checkpoints of earlier versions: their weights open, and their runs resume.

``fixtures/run-0.1.0`` was written with version 0.1.0 by ``SPINTrainer(SmallDecoder(num_tokens=12, dim=8, depth=2,
heads=2, dim_head=4), ...)``, killed in its second update; ``logits.json`` has that decoder's logits in float64.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from spin_trainer import SFTDataset
from spin_trainer.data.sft_data import Example
from spin_trainer.quickstart.small_decoder import SmallDecoder

RUN = Path(__file__).with_name("fixtures") / "run-0.1.0"


def test_a_decoder_of_0_1_0_gives_its_logits():
    expected = json.loads((RUN / "logits.json").read_text())
    model = SmallDecoder.from_pretrained(RUN / "checkpoints" / "step-1").double()

    logits = model(torch.tensor(expected["ids"]))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.archives
def test_a_run_of_0_1_0_resumes_in_its_training_phase(train, tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    rows = [Example((a, b, 10), (min(a, b), max(a, b), 11)) for a, b in ((1, 2), (4, 3), (5, 5), (9, 0))]
    settings = {"max_seq_len": 8, "batch_size": 2, "iterations": 2, "mix_previous": False, "valid_sft_dataset": None}
    decoder = SmallDecoder(num_tokens=12, dim=8, depth=2, heads=2, dim_head=4)
    trainer, result = train(model=decoder, train_sft_dataset=SFTDataset(rows), **settings)

    assert (result.outcome, result.first_step, result.step) == ("finished", 1, 4)
    before = SmallDecoder.from_pretrained(RUN / "checkpoints" / "step-1").state_dict()
    after = trainer.model.policy_model.state_dict()
    assert all(0 < (value - before[name]).abs().max() < 0.1 for name, value in after.items())
