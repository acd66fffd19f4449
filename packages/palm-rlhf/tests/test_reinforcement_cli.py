"""The commands ``reward``, ``ppo``, ``grpo`` and ``sample``, from one to the next."""

import json
import os
import sys

import pytest
import torch

from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import PaLM
from palm_rlhf.cli import main
from palm_rlhf.data.corrupted_pairs import corrupted_pairs, document_prompts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    PaLM(num_tokens=259, dim=16, depth=1, dim_head=8, heads=2).save_pretrained("base", tokenizer=ByteTokenizer())
    rows = [{"prompt": "ab", "chosen": "cc", "rejected": "dd"}, {"prompt": "b", "chosen": "cd", "rejected": "dc"}] * 10
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("ab", "b", "abc", "c")))
    return tmp_path


def test_reward_then_ppo_and_grpo_then_sample(folder, capsys):
    given = ["--data", "pairs.jsonl", "--max_steps", "4", "--checkpoint_dir", "reward", "--device", "cpu"]
    assert main(["reward", "--model", "base", *given]) == 0
    assert "accuracy" in capsys.readouterr().out
    learn = ["--data", "prompts.jsonl", "--max_steps", "2", "--update_timesteps", "8", "--max_new_tokens", "4"]
    for command in ("ppo", "grpo"):
        more = ["--group_size", "4"] if command == "grpo" else []
        place = ["--reward", "reward", "--checkpoint_dir", command, "--device", "cpu"]
        assert main([command, *learn, *place, *more]) == 0
        assert "reward" in capsys.readouterr().out
        assert (folder / command / "metrics.jsonl").is_file()
        summary = json.loads((folder / command / "summary.json").read_text())
        assert [one["name"] for one in summary["results"]] == [
            "reward of held-out prompts",
            "KL from the reference, nats a response",
        ]
        assert main([command, *learn, *place, *more]) == 0
        assert "already complete; pass a new --checkpoint_dir to start over" in capsys.readouterr().out
    assert json.loads((folder / "reward" / "summary.json").read_text())["steps"] == 4
    assert main(["sample", "ppo", "ab", "--num_samples", "2", "--reward", "reward", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.count("--- reward") == 2


def test_a_reward_is_found_in_the_folder_that_an_installed_command_runs_in(folder, capsys, monkeypatch):
    (folder / "digits.py").write_text(
        "def score(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    # the path of a script is its own folder, not the current one
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", os.getcwd())])
    learn = ["--data", "prompts.jsonl", "--max_steps", "1", "--update_timesteps", "8", "--max_new_tokens", "4"]
    more = ["--group_size", "4", "--model", "base", "--checkpoint_dir", "grpo", "--device", "cpu"]
    assert main(["grpo", "--reward", "digits:score", *learn, *more]) == 0
    assert "reward" in capsys.readouterr().out


def test_what_is_missing_is_said_in_one_line(folder, capsys):
    assert main(["ppo", "--reward", "nowhere", "--checkpoint_dir", "x"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["ppo", "--reward", "base", "--checkpoint_dir", "x"]) == 1
    assert "reward must be the folder of a RewardModel" in capsys.readouterr().err


def test_corrupted_pairs_are_shuffled_within_runs_or_get_stuck():
    documents = [list(range(200)), list(range(50, 150)), [1, 2]]
    shuffled, stuck = (
        corrupted_pairs(documents, count=20, prompt_tokens=10, response_tokens=24, run=8, loops=loops)
        for loops in (0.0, 1.0)
    )
    for pair in [*shuffled, *stuck]:
        assert pair.prompt.shape == (10,)
        whole = torch.cat((pair.prompt, pair.chosen))
        assert torch.equal(whole, torch.arange(int(whole[0]), int(whole[0]) + 34))
        assert not torch.equal(pair.chosen, pair.rejected)
    for pair in shuffled:
        for chosen, rejected in zip(pair.chosen.split(8), pair.rejected.split(8), strict=True):
            assert torch.equal(chosen, rejected.sort().values)
    for pair in stuck:
        start = int((pair.chosen != pair.rejected).nonzero()[0])
        period = int(pair.chosen[start] - pair.rejected[start])
        assert 1 <= period <= 8
        assert torch.equal(pair.rejected[start:], pair.rejected[start - period : -period])
    assert all(5 <= prompt.shape[0] <= 10 for prompt in document_prompts(documents, count=20, prompt_tokens=10))


def test_rows_of_one_token_cannot_be_corrupted_and_are_refused():
    with pytest.raises(ValueError, match="text that a corruption changes, got 0 such pieces of 4"):
        corrupted_pairs([[7] * 200], count=4)
