"""Training through its public entry point: one update however it is spread, resumed bit for bit."""

import json
import time

import pytest
import torch

from calm_pytorch import AugmentParams, FineTuner
from lm_core.checkpoints.manifest import CheckpointError


class Examples(torch.utils.data.Dataset):
    """Sequences with prompts, of which different numbers of tokens count."""

    def __init__(self, count=12, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.seq = torch.randint(0, 40, (count, 6), generator=generator)
        self.prompt = torch.randint(0, 40, (count, 4), generator=generator)
        self.prompt[::3, 2:] = -1
        self.mask = torch.rand(count, 6, generator=generator) > 0.4

    def __len__(self):
        return len(self.seq)

    def __getitem__(self, index):
        return self.seq[index], self.mask[index], self.prompt[index]


@pytest.fixture
def tune(model_of, compose, tmp_path):
    """``tune(name, **changes)`` makes a trainer of a fresh composition in the folder ``name``."""

    def make(name, dtype=torch.float64, anchor="plain", connections=((2, 1), (4, 3)), **changes):
        calm = compose(
            model_of(anchor).to(dtype),
            AugmentParams(model_of("gpt2", seed=1).to(dtype), connections=connections),
            attn_kwargs={"heads": 2, "dim_head": 8},
        ).to(dtype)
        for module in calm.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = changes.get("dropout", 0.0)
        settings = {
            "num_train_steps": 6,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "batch_size": 2,
            "dataset": Examples(),
            "checkpoint_path": tmp_path / name,
            "checkpoint_every": 2,
            "warmup_steps": 3,
            "valid_dataset": Examples(5, seed=1),
            **{key: value for key, value in changes.items() if key != "dropout"},
        }
        return FineTuner(calm, **settings)

    return make


def learned(trainer):
    return {name: value.clone() for name, value in trainer.calm.cross_attns.state_dict().items()}


def rows_of(trainer):
    """The metrics, without the one that is the machine's."""
    rows = [json.loads(line) for line in (trainer.checkpoint_path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def greatest_difference(one, other):
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def test_micro_batches_make_the_update_of_one_batch(tune):
    # batch statistics would depend on the micro-batch
    whole = tune("whole", batch_size=4, anchor="llama")
    split = tune("split", batch_size=1, grad_accum_steps=4, anchor="llama")
    whole()
    split()
    assert greatest_difference(learned(whole), learned(split)) < 1e-12
    for one, other in zip(rows_of(whole), rows_of(split), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_the_loss_falls_and_held_out_loss_is_logged(tune):
    trainer = tune("run", num_train_steps=30)
    trainer()
    losses = [row["loss"] for row in rows_of(trainer) if "loss" in row]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    held_out = [row["validation_loss"] for row in rows_of(trainer) if "validation_loss" in row]
    assert len(held_out) == 2
    inputs = trainer.valid_dataset
    expected = trainer.calm(inputs.seq, prompt=inputs.prompt, mask=inputs.mask)
    assert held_out[-1] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert (trainer.checkpoint_path / "curves.png").is_file()


def test_each_update_logs_how_many_tokens_of_the_loss_it_takes_a_second(tune):
    trainer = tune("run")
    started = time.monotonic()
    trainer()
    seconds = time.monotonic() - started
    lines = (trainer.checkpoint_path / "metrics.jsonl").read_text().splitlines()
    speeds = [row["tokens_per_second"] for row in map(json.loads, lines) if "loss" in row]
    labels = trainer.objective.count(trainer.batches.of(trainer.dataset, trainer.order.micro_batches(0)[0]))
    assert len(speeds) == trainer.step
    assert min(speeds) >= labels / seconds


def test_the_learning_rate_warms_up_once_an_update_and_the_global_norm_is_clipped(tune):
    trainer = tune("run", grad_accum_steps=2, max_grad_norm=1e-3)
    norms = []

    def clipped(optimizer, args, kwargs):
        norms.append(float(torch.stack([p.grad.norm() for p in trainer.calm.trainable_parameters()]).norm()))

    trainer.optimizer.register_step_pre_hook(clipped)
    trainer()
    rates = [row["learning_rate"] for row in rows_of(trainer) if "learning_rate" in row]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, 1e-2])
    assert norms == pytest.approx([1e-3] * 6, rel=1e-4)


def test_a_scheduler_class_steps_once_an_update_under_the_warmup(tune):
    kind = torch.optim.lr_scheduler.ExponentialLR
    trainer = tune("run", scheduler=kind, scheduler_kwargs={"gamma": 0.5}, grad_accum_steps=2)
    trainer()
    rates = [row["learning_rate"] for row in rows_of(trainer) if "learning_rate" in row]
    factors = [1 / 3, 2 / 3, 1, 1, 1, 1]
    assert rates == pytest.approx([1e-2 * factor * 0.5**step for step, factor in enumerate(factors)])


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduler"])
def test_a_run_stopped_and_resumed_ends_as_the_uninterrupted_bit_for_bit(tune, stop_at, scheduled):
    extra = {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR, "scheduler_kwargs": {"T_max": 6}}
    settings = {"dtype": torch.float32, "dropout": 0.2, **(extra if scheduled else {})}
    whole = tune("whole", **settings)
    whole()
    stopped = tune("parts", trackers=[stop_at(3)], **settings).train()
    assert (stopped.step, stopped.outcome) == (3, "interrupted")
    resumed = tune("parts", **settings)
    resumed()
    assert resumed.step == 6
    assert greatest_difference(learned(whole), learned(resumed)) == 0
    assert rows_of(whole) == rows_of(resumed)


def test_saved_and_loaded_by_name_it_goes_on_exactly(tune):
    whole = tune("whole", anchor="llama")
    whole()
    first = tune("first", num_train_steps=3, anchor="llama")
    first()
    first.save("mine")
    second = tune("second", anchor="llama", checkpoint_every=100)
    second.checkpoint_path = first.checkpoint_path
    second.load("mine")
    assert second.step == 3
    second()
    assert greatest_difference(learned(whole), learned(second)) == 0
    with pytest.raises(FileExistsError, match="overwrite=True"):
        first.save("mine", overwrite=False)


def test_cached_states_train_to_the_same_weights_and_are_computed_once(tune):
    plain = tune("plain", num_train_steps=12)
    plain()
    cached = tune("cached", num_train_steps=12, cache_augment_states=True, valid_dataset=None)
    prompts = []
    cached.calm.augment_llms[0].register_forward_pre_hook(lambda module, args: prompts.append(len(args[0])))
    cached()
    assert sum(prompts) == 12  # two epochs of twelve examples
    assert len(cached.cache) == 12
    assert greatest_difference(learned(plain), learned(cached)) < 1e-9


def test_frozen_models_are_not_written_and_modes_come_back(tune):
    trainer = tune("run", gradient_checkpointing=True)
    modes = [module.training for module in trainer.calm.modules()]
    trainer()
    assert [module.training for module in trainer.calm.modules()] == modes
    assert not trainer.calm.gradient_checkpointing
    from safetensors.torch import load_file

    (newest,) = (trainer.checkpoint_path / "checkpoints").glob("step-6")
    assert set(load_file(newest / "model.safetensors")) == set(trainer.calm.cross_attns.state_dict())


def test_a_run_of_other_data_or_wiring_is_refused_by_name(tune):
    tune("run")()
    with pytest.raises(CheckpointError, match="another run: examples is 14, but was 12"):
        tune("run", dataset=Examples(14))()
    other = tune("run", connections=[(1, 1), (4, 3)])
    with pytest.raises(CheckpointError, match="another architecture: connections is"):
        other()


def test_dict_examples_and_forward_arguments_reach_the_model(tune):
    class Dicts(Examples):
        def __getitem__(self, index):
            return {"seq": self.seq[index], "prompt": self.prompt[index]}

    trainer = tune("run", dataset=Dicts(), num_train_steps=1, valid_dataset=None)
    seen = []
    trainer.calm.anchor_llm.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    trainer(forward_kwargs={"anchor_llm_in_train_mode": False})
    assert seen == [False]


def test_the_originals_names_and_the_common_ones_are_the_same_arguments(tune, tmp_path):
    original = tune("original", grad_accum_steps=2)
    common = tune(
        "common",
        num_train_steps=None,
        max_steps=6,
        checkpoint_path=None,
        checkpoint_dir=tmp_path / "common",
        warmup_steps=None,
        warmup=0.5,
        gradient_accumulation=2,
    )
    original()
    common()
    for name, value in learned(original).items():
        torch.testing.assert_close(value, learned(common)[name], rtol=0.0, atol=0.0)
    assert (tmp_path / "common" / "run.json").is_file()
