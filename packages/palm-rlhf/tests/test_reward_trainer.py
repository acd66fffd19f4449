"""Reward models learn pairs, numbers and bins, and resume exactly after a kill."""

import json

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf.data.preferences import load_preferences
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.trainer import RewardModelTrainer


def pairs(count=120, seed=0):
    """The better response has even tokens only."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, factor, offset):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return (torch.randint(6, (size,), generator=generator) * factor + offset).tolist()

    return [
        {"prompt": draw(1, 4, 1, 0), "chosen": draw(2, 6, 2, 0), "rejected": draw(2, 6, 2, 1)} for _ in range(count)
    ]


def trainer(palm, data, bins=0, **changes):
    torch.manual_seed(1)
    reward = RewardModel(palm, num_binned_output=bins, dropout=0.05)
    settings = {"max_steps": 60, "batch_size": 16, "learning_rate": 1e-2, "device": "cpu"}
    return RewardModelTrainer(reward_model=reward, pairs=data, **{**settings, **changes})


def test_held_out_pairs_are_ranked_correctly_after_training(make_palm):
    result = trainer(make_palm(), pairs()).train()
    assert result.last_accuracy >= 0.95


def test_rewards_of_pairs_get_a_fixed_scale_and_keep_their_order(make_palm):
    plain, scaled = (trainer(make_palm(), pairs(), max_steps=20, normalize=normalize) for normalize in (False, True))
    assert plain.train().last_accuracy == scaled.train().last_accuracy
    chosen, rejected = scaled._predictions(scaled.held_out)
    assert chosen.mean().item() == pytest.approx(0, abs=1e-5)
    assert torch.cat((chosen, rejected)).std().item() == pytest.approx(1, abs=1e-5)
    before = torch.cat(plain._predictions(plain.held_out))
    after = torch.cat((chosen, rejected))
    difference = (before - before.mean()) / before.std() - (after - after.mean()) / after.std()
    assert difference.abs().max() < 1e-4


def test_numbers_and_bins_are_learned(make_palm):
    sides = ((1, "chosen"), (0, "rejected"))
    rows = [
        {"prompt": pair["prompt"], "response": pair[name], "label": label} for pair in pairs() for label, name in sides
    ]
    assert trainer(make_palm(), rows, bins=2).train().last_accuracy >= 0.9
    assert trainer(make_palm(), rows).train().last_accuracy >= 0.5


def test_resume_equals_an_uninterrupted_run(make_palm, tmp_path):
    options = {"checkpoint_every": 4, "max_steps": 12}
    whole = trainer(make_palm(), pairs(), checkpoint_dir=tmp_path / "whole", **options)
    whole.train()

    class Killed:
        def log(self, values, step):
            if step == 11:
                raise KeyboardInterrupt

    broken = trainer(make_palm(), pairs(), checkpoint_dir=tmp_path / "broken", trackers=[Killed()], **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(make_palm(), pairs(), checkpoint_dir=tmp_path / "broken", **options)
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    text = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert text[0] == text[1]
    again = RewardModel.from_pretrained(tmp_path / "broken" / "checkpoints" / "step-12").eval()
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again(ids), resumed.model.eval()(ids))


def test_files_of_text_pairs_end_responses_with_eos(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5}) + "\n")
    (pair,) = load_preferences(path, tokenizer=ByteTokenizer())
    assert (pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()) == ([97], [98, 257], [99, 257])
    assert pair.margin == 0.5
