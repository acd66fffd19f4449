"""Checkpoints of earlier versions: a decoder of 0.1.0 gives its logits, and its run resumes.

``fixtures/run-0.1.0`` was written by ``train`` below with version 0.1.0, killed in its second update.
"""

import json
import shutil
from pathlib import Path

import torch

from spin_trainer import SFTDataset, SPINTrainer
from spin_trainer.data.sft_data import Example
from spin_trainer.quickstart.small_decoder import SmallDecoder

RUN = Path(__file__).with_name("fixtures") / "run-0.1.0"


def train(folder):
    rows = [Example((a, b, 10), (min(a, b), max(a, b), 11)) for a, b in ((1, 2), (4, 3), (5, 5), (9, 0))]
    trainer = SPINTrainer(
        SmallDecoder(num_tokens=12, dim=8, depth=2, heads=2, dim_head=4),
        train_sft_dataset=SFTDataset(rows),
        max_seq_len=8,
        eos_id=11,
        iterations=2,
        epochs=1,
        batch_size=2,
        gradient_accumulation=1,
        learning_rate=1e-2,
        end_learning_rate=1e-3,
        mix_previous=False,
        checkpoint_every=1,
        keep_checkpoints=None,
        device="cpu",
        checkpoint_dir=folder,
    )
    return trainer.model.policy_model, trainer()


def test_a_decoder_of_0_1_0_gives_its_logits():
    expected = json.loads((RUN / "logits.json").read_text())
    model = SmallDecoder.from_pretrained(RUN / "checkpoints" / "step-1").double()

    logits = model(torch.tensor(expected["ids"]))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"], dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_run_of_0_1_0_resumes_in_its_training_phase(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    policy, result = train(tmp_path / "run")

    assert (result.outcome, result.first_step, result.steps) == ("finished", 1, 4)
    before = SmallDecoder.from_pretrained(RUN / "checkpoints" / "step-1").state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
