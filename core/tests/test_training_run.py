"""A run in ``TrainingSession``: resumed bit for bit, stopped with a checkpoint, rejected before anything changes."""

import copy
import json
import signal

import pytest
import torch
from torch import nn

from lm_core.checkpoints.checkpoint import list_checkpoints, load_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.training.config import CommonSettings
from lm_core.training.metrics import read_metrics
from lm_core.training.run_directory import RunDirectory
from lm_core.training.session import SavedValue, TrainingResult, TrainingSession, adamw, draw_curves

POSIX = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a signal of POSIX systems")
TINY = CommonSettings(
    max_steps=6, learning_rate=0.1, validate_every=3, checkpoint_every=2, keep_checkpoints=None, device="cpu"
)


class Trainer:
    """The smallest trainer: a linear layer under dropout on a counter's batches."""

    def __init__(self, folder, settings=TINY, *, trackers=(), seen=0, **registered):
        self.session = TrainingSession(
            "Trainer", config=settings, checkpoint_dir=folder, trackers=trackers, packages=("torch",)
        )
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval(), nn.Linear(2, 1))
        self.seen = seen
        self.settings = settings
        options = {
            "model": self.model,
            "optimizer": lambda: adamw(self.model, settings),
            "state": {"seen": SavedValue(lambda: self.seen, self.see)},
            "validate": lambda: {"validation_loss": float(self.model[0].weight.detach().sum())},
        }
        self.session.register(**{**options, **registered})

    def see(self, value):
        self.seen = value

    def train(self):
        with self.session.run() as session:
            for _ in session.steps():
                for part in session.micro_batches([0, 1]):
                    self.seen += 1
                    rows = torch.full((4, 2), float(self.seen + part))
                    session.backward(session.module(rows).square().mean() / 2)
                session.log(session.optimizer_step(), seen=self.seen)
        return session.result(TrainingResult)


class At:
    """A tracker that calls a function when an update's metrics arrive."""

    def __init__(self, step, action):
        self.step = step
        self.action = action

    def log(self, values, step):
        if step == self.step and "loss" in values:
            self.action()


def interrupt(number=signal.SIGINT):
    signal.raise_signal(number)


def die():
    raise SystemExit("killed")


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("action", [interrupt, die])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_was_stopped_or_died_ends_as_the_uninterrupted_one_bit_for_bit(tmp_path, step, action):
    whole = Trainer(tmp_path / "whole")
    result = whole.train()
    assert (result.outcome, result.first_step, result.step) == ("finished", 0, 6)
    stopped = Trainer(tmp_path / "parts", trackers=[At(step, action)])
    if action is die:
        with pytest.raises(SystemExit):
            stopped.train()
    else:
        assert (stopped.train().outcome, stopped.session.step) == ("interrupted", step)
    resumed = Trainer(tmp_path / "parts")
    result = resumed.train()
    saved = step if action is interrupt else (step - 1) // 2 * 2
    assert (result.outcome, result.first_step, result.step) == ("finished", saved, 6)
    assert equal(whole.model, resumed.model)
    assert whole.seen == resumed.seen == 12
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert resumed.session.first_validation == whole.session.first_validation
    moments = [one.session.optimizer.state_dict()["state"][0]["exp_avg"] for one in (whole, resumed)]
    assert torch.equal(*moments)


SIGNALS = ["SIGINT", "SIGTERM", pytest.param("SIGHUP", marks=POSIX), pytest.param("SIGUSR1", marks=POSIX)]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_with_a_checkpoint_and_its_number(tmp_path, name):
    number = getattr(signal, name)
    result = Trainer(tmp_path, trackers=[At(1, lambda: interrupt(number))]).train()
    assert (result.outcome, result.step, result.signal) == ("interrupted", 1, number)
    assert [path.name for path in list_checkpoints(result.checkpoints)] == ["step-1"]


class Drawing(Trainer):
    """Draws from all generators before each update; a signal comes in the draw of update ``at``."""

    at = None

    def draw(self):
        noise = torch.rand(())
        if self.session.step == self.at:
            signal.raise_signal(signal.SIGTERM)
        return noise

    def train(self):
        with self.session.run() as session:
            for _ in session.steps():
                noise = session.interruptible(self.draw)
                if noise is None:
                    break
                session.backward(session.module(torch.full((4, 2), float(noise))).square().mean())
                session.log(session.optimizer_step())
        return session.result(TrainingResult)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_draw_is_abandoned_at_once_and_drawn_again_by_the_resumed_run(tmp_path, at):
    whole, parts, resumed = Drawing(None), Drawing(tmp_path), Drawing(tmp_path)
    whole.train()
    parts.at = at
    result = parts.train()
    assert (result.outcome, result.step, result.signal) == ("interrupted", at, signal.SIGTERM)
    assert [path.name for path in list_checkpoints(result.checkpoints)][-1] == f"step-{at}"
    assert resumed.train().outcome == "finished"
    assert equal(whole.model, resumed.model)


def test_an_interrupted_run_leaves_a_due_validation_to_the_resumed_one(tmp_path):
    validations = []

    def validate():
        validations.append(1)
        return {"validation_loss": 1.0}

    assert Trainer(tmp_path, trackers=[At(3, interrupt)], validate=validate).train().step == 3
    assert len(validations) == 1  # before training
    Trainer(tmp_path, validate=validate).train()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" not in row] == [0, 3, 6]


def test_parameters_without_a_gradient_are_named_once(capsys):
    trainer = Trainer(None)
    trainer.model.add_module("extra", nn.Identity())
    trainer.model.extra.weight = nn.Parameter(torch.ones(1))
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("unused") == 1
    assert "unused      1 of 5 trained tensors have no gradient in the first update: extra.weight\n" in printed


def test_the_same_session_continues_where_it_stopped_and_without_a_folder(tmp_path):
    whole = Trainer(None)
    result = whole.train()
    assert (result.checkpoints, result.curves, result.step) == (None, None, 6)
    parts = Trainer(None, trackers=[At(2, interrupt)])
    assert parts.train().outcome == "interrupted"
    assert parts.train().first_step == 2
    assert equal(whole.model, parts.model)
    assert parts.train().seconds is None  # nothing was left to do


def test_rows_validations_and_checkpoints_come_on_schedule_even_if_the_last_update_is_interrupted(tmp_path):
    assert Trainer(tmp_path, trackers=[At(6, interrupt)]).train().outcome == "finished"
    assert [(row["step"], "loss" in row) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        *((0, False), (1, True), (2, True), (3, True), (3, False), (4, True), (5, True), (6, True), (6, False)),
    ]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-2", "step-4", "step-6"]


def test_a_time_limit_stops_with_a_validation_and_a_checkpoint(tmp_path):
    settings = CommonSettings(max_steps=6, max_seconds=1e-9, device="cpu")
    result = Trainer(tmp_path, settings).train()
    assert (result.outcome, result.step) == ("out of time", 1)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1].keys() == {"step", "validation_loss"}
    assert [path.name for path in list_checkpoints(result.checkpoints)] == ["step-1"]


def test_every_modules_mode_is_restored_and_training_runs_in_training_mode(tmp_path):
    trainer = Trainer(tmp_path)
    during = []
    trainer.model.register_forward_hook(lambda *_: during.append(trainer.model[1].training))
    trainer.train()
    assert [module.training for module in trainer.model] == [True, False, True]
    assert during == [True] * 12


def test_a_tracker_by_name_is_started_with_the_settings_and_finished():
    seen = []

    class Accelerator:
        device = torch.device("cpu")
        trackers = ()

        def init_trackers(self, project, config):
            seen.append((project, config["max_steps"], "max_seconds" in config))

        def log(self, values, step):
            seen.append(step)

    options = {"checkpoint_dir": None, "packages": ("torch",), "accelerator": Accelerator()}
    session = TrainingSession("Trainer", config=TINY, trackers=["tensorboard"], **options)
    trainer = Trainer(None)
    session.register(model=trainer.model, optimizer=lambda: adamw(trainer.model, TINY))
    trainer.session = session
    trainer.train()
    assert seen == [("torch", 6, False), 1, 2, 3, 4, 5, 6]


def test_a_resumed_optimizer_keeps_the_settings_of_this_run(tmp_path):
    Trainer(tmp_path, trackers=[At(3, interrupt)]).train()
    changed = CommonSettings(max_steps=8, learning_rate=0.01, weight_decay=0.3, beta2=0.99, device="cpu")
    trainer = Trainer(tmp_path, changed)
    trainer.train()
    fresh = adamw(trainer.model, changed)[0].param_groups
    for group, expected in zip(trainer.session.optimizer.param_groups, fresh, strict=True):
        assert (group["weight_decay"], group["betas"]) == (expected["weight_decay"], expected["betas"])
    assert trainer.session.schedule.peaks == [0.01, 0.01]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {"dim": 5}}, "is of another architecture: dim is 5, but was 4"),
        ({"identity": {"data": "b"}}, "is of another run: data is b, but was a; train into another folder"),
        ({"settings": CommonSettings(seed=1, device="cpu")}, "is of another run: seed is 1, but was 0"),
        ({"state": {}}, r"has the states \['seen'\], but this run \[\]"),
        ({"model": nn.Linear(2, 2)}, "keys"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name_and_changes_nothing(tmp_path, changes, message):
    known = {"architecture": {"dim": 4}, "identity": {"data": "a"}}
    Trainer(tmp_path, **known).train()
    trainer = Trainer(tmp_path, **{**known, **changes})
    before = copy.deepcopy(trainer.session.model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.session.model.state_dict().items())
    assert trainer.session.step == 0
    trainer.session.trainer = "Other"
    with pytest.raises(CheckpointError, match="was not written by Other, got 'Trainer'"):
        trainer.train()


def test_a_loop_that_makes_no_update_is_an_error_and_not_endless():
    session = Trainer(None).session
    with session.run(), pytest.raises(RuntimeError, match="must call optimizer_step"):
        for _ in session.steps():
            pass


def test_a_checkpoint_can_be_saved_and_loaded_outside_of_a_run(tmp_path):
    first = Trainer(None)
    first.train()
    first.session.save(tmp_path)
    second = Trainer(None)
    second.session.load(tmp_path)
    assert (second.session.step, second.seen) == (6, 12)
    assert equal(first.model, second.model)
    assert load_checkpoint(tmp_path).trainer_state["trainer"] == "Trainer"


def test_curves_are_drawn_of_what_the_run_has_twice(tmp_path):
    with RunDirectory(tmp_path) as run:
        rows = [{"step": 1, "loss": 1.0, "once": 2.0}, {"step": 2, "loss": 0.5, "never": None}]
        run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert draw_curves(run, ("once", "never")) is None
        assert not run.curves_path.exists()
        assert draw_curves(run, ("loss", "once", "unknown")) == run.curves_path
        assert run.curves_path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("validate_every", -1),
        ("keep_checkpoints", 0),
        ("max_seconds", 0.0),
        ("learning_rate", float("inf")),
        ("max_grad_norm", float("nan")),
        ("beta2", 1.0),
        ("final_learning_rate", 1.5),
        ("weight_decay", -0.1),
        ("warmup", 1.0),
        ("seed", 2**32),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        CommonSettings(**{name: value})
