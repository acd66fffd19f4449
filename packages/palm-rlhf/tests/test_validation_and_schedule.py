"""Learning-rate schedule, validation during a run and its best checkpoint, and the command `rl`."""

import math

import pytest
import torch

from lm_core.checkpoints.checkpoint import latest_checkpoint
from lm_core.training.metrics import read_metrics
from palm_rlhf import PaLM
from palm_rlhf.cli import main
from palm_rlhf.rl.config import RLConfig

HELD_OUT = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]


def test_learning_rates_rise_and_fall_over_the_run(make_palm, trainer):
    learner = trainer(
        make_palm(), actor_lr=1e-2, critic_lr=2e-2, warmup=0.25, final_learning_rate=0.1, epochs=1, minibatch_size=8
    )
    seen = []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: (seen.append([g["lr"] for g in learner.optimizer.param_groups]), step())
    row = learner.train(max_steps=8, update_timesteps=32, max_new_tokens=2).metrics[-1]
    wanted = [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    for rates, scale in zip(seen, wanted, strict=True):
        assert sorted(set(rates)) == pytest.approx([1e-2 * scale, 2e-2 * scale])
    assert row["learning_rate"] == pytest.approx(1e-2 * sum(wanted[4:]) / 4)


def test_a_run_validates_on_held_out_prompts_and_keeps_its_best_checkpoint(make_palm, trainer, tmp_path):
    calls = []

    def reward(ids, prompt_lengths):
        calls.append(ids.shape[0])
        if ids.shape[0] == len(HELD_OUT):  # the held-out prompts: best at the second validation
            return torch.full((2,), [0.1, 0.9, 0.5, 0.2][sum(n == 2 for n in calls) - 1])
        return (ids == 5).float().mean(dim=1)

    options = {"validation_prompts": HELD_OUT, "validate_every": 2, "epochs": 1, "minibatch_size": 8}
    learner = trainer(make_palm(), reward=reward, checkpoint_dir=tmp_path, **options)
    result = learner.train(max_steps=6, update_timesteps=16, max_new_tokens=2)
    assert result.best == {"step": 2.0, "reward": pytest.approx(0.9)}
    rows = [row["validation_reward"] for row in read_metrics(tmp_path / "metrics.jsonl") if "validation_reward" in row]
    assert rows == pytest.approx([0.1, 0.9, 0.5, 0.2])
    best = latest_checkpoint(tmp_path / "best" / "checkpoints")
    assert best.name == "step-2"
    assert "actor" in PaLM.from_pretrained(best).finetune_modules


def test_validation_changes_nothing_in_training(make_palm, trainer):
    weights = []
    for options in ({}, {"validation_prompts": HELD_OUT, "validate_every": 1}):
        learner = trainer(make_palm(), epochs=1, minibatch_size=8, actor_lr=1e-2, **options)
        learner.train(max_steps=4, update_timesteps=16, max_new_tokens=2)
        weights.append([p.detach().clone() for p in learner.actor_parameters])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_validated_run_resumes_with_its_best(make_palm, trainer, tmp_path):
    def run(*steps):
        for count in steps:
            learner = trainer(
                make_palm(), validation_prompts=HELD_OUT, validate_every=2, epochs=1, minibatch_size=8, actor_lr=1e-2,
                checkpoint_dir=tmp_path / str(steps),
            )  # fmt: skip
            result = learner.train(max_steps=count, update_timesteps=16, max_new_tokens=2)
        return result.best, [p.detach().clone() for p in learner.actor_parameters]

    (whole, first), (halves, second) = run(6), run(2, 6)
    assert whole == halves
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda make: RLConfig(warmup=1.0), r"warmup must be in \[0, 1\)"),
        (lambda make: RLConfig(warmup=-0.1), r"warmup must be in \[0, 1\)"),
        (lambda make: RLConfig(final_learning_rate=1.5), r"final_learning_rate must be in \[0, 1\], got 1.5"),
        (lambda make: RLConfig(validate_every=0), "validate_every must be at least 1"),
        (lambda make: make(validate_every=2), "validate_every needs validation_prompts"),
        (lambda make: make(validation_prompts=[]), "prompts must hold at least one prompt"),
    ],
)
def test_schedule_and_validation_refuse_by_name(make_palm, trainer, call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda **options: trainer(make_palm(), **options))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: a model, prompts and a module with a reward."""
    monkeypatch.chdir(tmp_path)
    from lm_core.tokenizers import ByteTokenizer

    torch.manual_seed(0)
    PaLM(num_tokens=259, dim=16, depth=1, dim_head=8, heads=2).save_pretrained("model", tokenizer=ByteTokenizer())
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{n}+1=", "answer": "{n + 1}"}}\n' for n in range(8)))
    (tmp_path / "letters_of.py").write_text(
        "def letters(completions, **_):\n    return [float(sum(c.isalpha() for c in text)) for text in completions]\n"
    )
    return tmp_path


RUN = [
    "--model", "model", "--data", "prompts.jsonl", "--max_steps", "2", "--update_timesteps", "8", "--minibatch_size",
    "8", "--max_new_tokens", "3", "--device", "cpu", "--group_size", "4",
]  # fmt: skip


@pytest.mark.parametrize("objective", ["gspo", "tpo"])
def test_the_command_rl_trains_by_the_objective_of_its_flag_on_several_rewards(folder, capsys, objective):
    rewards = ["letters_of:letters", "palm_rlhf.reward.functions:SoftOverlong(max_length=4, buffer=2)"]
    arguments = [
        *RUN,
        "--objective",
        objective,
        "--reward",
        rewards[0],
        "--further_rewards",
        rewards[1],
        "--reward_weights",
        "1.0",
        "0.5",
    ]
    assert main(["rl", *arguments, "--validate_every", "1", "--validation_fraction", "0.25"]) == 0
    rows = read_metrics(folder / "runs" / f"palm-{objective}" / "metrics.jsonl")
    assert any("rewards/letters/mean" in row and "rewards/SoftOverlong/mean" in row for row in rows)
    assert any("validation_reward" in row for row in rows)
    assert "held-out reward" in capsys.readouterr().out


def test_the_objective_may_be_named_in_a_configuration_file(folder, capsys):
    (folder / "run.yaml").write_text("objective: cispo\neps_clip_high: 0.5\n")
    assert main(["rl", "--config", "run.yaml", *RUN, "--reward", "letters_of:letters"]) == 0
    assert (folder / "runs" / "palm-cispo" / "metrics.jsonl").is_file()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "gsp"], "objective must be one of ppo, grpo"),
        (["--reward_weights", "1.0", "2.0"], "reward_weights must be one number for each of 1 rewards"),
    ],
)
def test_the_command_rl_refuses_by_name(folder, capsys, arguments, message):
    assert main(["rl", *RUN, "--reward", "letters_of:letters", *arguments]) != 0
    assert message in capsys.readouterr().err
