import json
import time

import pytest
import torch
from torch import nn

from lm_core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.training.config import CommonSettings
from lm_core.training.run_directory import RunDirectory
from lm_core.training.session import Stopping, adamw, check_goes_on, draw_curves, open_metrics, own_settings


class Interrupt:
    def __init__(self, *answers):
        self.answers = list(answers)

    def should_stop(self):
        return self.answers.pop(0)


def test_a_loop_goes_on_until_someone_interrupts_it():
    stopping = Stopping(Interrupt(False, True), None)
    assert [stopping.outcome(last=False), stopping.outcome(last=False)] == ["finished", "interrupted"]


def test_a_loop_stops_when_its_seconds_are_over():
    stopping = Stopping(Interrupt(False, False), 1e-9)
    time.sleep(0.01)
    assert stopping.outcome(last=False) == "out of time"
    assert stopping.outcome(last=True) == "finished"


def test_the_last_update_finishes_a_run_even_if_someone_interrupts_it():
    assert Stopping(Interrupt(True), None).outcome(last=True) == "finished"


def test_a_log_restores_every_modules_mode_and_leaves_out_settings_that_are_none(tmp_path):
    model, seen = nn.Sequential(nn.Linear(2, 2).eval(), nn.Linear(2, 2)), []

    class Accelerator:
        trackers = ()

        def init_trackers(self, project, config):
            seen.append((project, config))

        def log(self, values, step):
            seen.append((values, step))

    with (
        RunDirectory(tmp_path) as run,
        open_metrics(
            run,
            objective=model,
            accelerator=Accelerator(),
            trackers=("tensorboard",),
            project="p",
            settings={"a": 1, "b": None},
            step=0,
            max_steps=3,
        ) as log,
    ):
        assert model[0].training
        log.log(1, loss=2.0)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert seen == [("p", {"a": 1}), ({"loss": 2.0}, 1)]
    assert [json.loads(line) for line in run.metrics_path.read_text().splitlines()] == [{"step": 1, "loss": 2.0}]


def test_a_loaded_optimizer_keeps_the_settings_of_this_run():
    model = nn.Linear(2, 2)
    old, _ = adamw(model, CommonSettings(learning_rate=1.0, weight_decay=0.5))
    model(torch.ones(1, 2)).sum().backward()
    old.step()
    new, _ = adamw(model, CommonSettings(learning_rate=0.1, weight_decay=0.2))
    wanted = [{k: v for k, v in group.items() if k != "params"} for group in new.param_groups]
    with own_settings(new):
        new.load_state_dict(old.state_dict())
    assert [{k: v for k, v in group.items() if k != "params"} for group in new.param_groups] == wanted
    assert torch.equal(new.state[model.weight]["exp_avg"], old.state[model.weight]["exp_avg"])


@pytest.mark.parametrize(
    ("trainer", "arguments", "message"),
    [
        ("Other", {"dim": 4, "dropout": 0.1}, "was not written by Other, got 'Mine'"),
        ("Mine", {"dim": 5, "dropout": 0.1}, "another architecture: dim is 5, but was 4"),
    ],
)
def test_a_run_of_another_trainer_or_model_does_not_go_on(tmp_path, trainer, arguments, message):
    save_checkpoint(
        tmp_path,
        1,
        model=nn.Linear(1, 1),
        config={"arguments": {"dim": 4, "dropout": 0.0}},
        trainer_state={"trainer": "Mine"},
    )
    checkpoint = load_checkpoint(tmp_path)
    check_goes_on(checkpoint, trainer="Mine", arguments={"dim": 4, "dropout": 0.1}, names=("dim",))
    with pytest.raises(CheckpointError, match=message):
        check_goes_on(checkpoint, trainer=trainer, arguments=arguments, names=("dim",))


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
