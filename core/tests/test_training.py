"""Training parts: parameter groups, schedule, guard, metrics, run folder, devices and Ctrl-C."""

import importlib.metadata
import itertools
import json
import math
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR

from lm_core.checkpoints.checkpoint import save_checkpoint
from lm_core.nn.norms import RMSNorm
from lm_core.rng import capture_rng, restore_rng, seed_everything
from lm_core.training.accelerator import InterruptHandler, autocast, pick_device, pick_precision
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar, read_metrics
from lm_core.training.optimization import (
    LearningRateSchedule,
    NonFiniteGuard,
    clip_global_norm,
    finish_update,
    learning_rate_scale,
    optimizer_groups,
)
from lm_core.training.run_directory import RunDirectory


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.norm = RMSNorm(4)
        self.gain = nn.Parameter(torch.ones(4))
        self.gate_of_a_head = nn.Parameter(torch.zeros(2, 1, 1))
        self.low_rank = nn.Parameter(torch.zeros(2, 1))
        self.output = nn.Linear(4, 5, bias=False)
        self.output.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def _names(model: nn.Module, group: dict) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)


# ---------------------------------------------------------------- optimizer groups


def test_only_matrices_decay_and_tied_weights_come_once():
    model = Model()
    decayed, others = optimizer_groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert _names(model, decayed) == ["low_rank", "first.weight"]
    assert _names(model, others) == [
        "gain",
        "gate_of_a_head",
        "embedding.weight",
        "first.bias",
        *[n for n, _ in model.named_parameters() if n.startswith("norm")],
    ]


def test_each_kind_can_be_made_to_decay_and_groups_can_be_of_some_parameters():
    model = Model()
    decayed, others = optimizer_groups(model, no_decay=("bias",))
    assert _names(model, others) == ["first.bias"]
    assert "embedding.weight" in _names(model, decayed)
    (everything,) = optimizer_groups(model, no_decay=())
    assert len(everything["params"]) == sum(parameter.requires_grad for parameter in model.parameters())
    (some,) = optimizer_groups(model, parameters=model.first.parameters(), no_decay=())
    assert _names(model, some) == ["first.weight", "first.bias"]


# ---------------------------------------------------------------- schedule


@given(
    kind=st.sampled_from(["cosine", "linear"]),
    warmup=st.integers(0, 20),
    length=st.integers(1, 50),
    final=st.floats(0, 1),
)
def test_the_schedule_rises_falls_and_stays(kind, warmup, length, final):
    total = warmup + length
    scales = [
        learning_rate_scale(step, kind=kind, warmup_steps=warmup, total_steps=total, final_scale=final)
        for step in range(total + 5)
    ]
    assert scales[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert scales[warmup] == 1.0
    falling = scales[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(falling))
    assert scales[total:] == pytest.approx([final] * 5)


def test_the_cosine_is_half_way_down_in_the_middle_and_the_line_is_a_line():
    shape = {"warmup_steps": 10, "total_steps": 110, "final_scale": 0.2}
    assert learning_rate_scale(60, kind="cosine", **shape) == pytest.approx(0.6)
    assert learning_rate_scale(35, kind="cosine", **shape) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_scale(35, kind="linear", **shape) == pytest.approx(0.8)
    assert learning_rate_scale(10**6, kind="constant", warmup_steps=10) == 1.0


def test_the_schedule_moves_once_a_step_and_resumes_where_it_was():
    optimizer = _optimizer()
    schedule = LearningRateSchedule(optimizer, kind="linear", warmup_steps=2, total_steps=12, final_scale=0.0)
    rates = []
    for _ in range(6):
        rates.append(schedule.learning_rate)
        schedule.step()
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.45, 0.4, 0.35])
    other = _optimizer()
    resumed = LearningRateSchedule(other, kind="linear", warmup_steps=2, total_steps=12, final_scale=0.0)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.learning_rate == schedule.learning_rate == other.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("scheduler", "arguments"), [(ExponentialLR, {"gamma": 0.5}), (CosineAnnealingLR, {"T_max": 10})]
)
def test_a_torch_scheduler_is_scaled_by_the_warmup_and_resumes_where_it_was(scheduler, arguments):
    settings = {"warmup_steps": 3, "scheduler": scheduler, "scheduler_kwargs": arguments}
    alone = _optimizer()
    torch_schedule = scheduler(alone, **arguments)
    expected = []
    for step in range(8):
        expected.append(alone.param_groups[0]["lr"] * min(1.0, (step + 1) / 3))
        alone.step()
        torch_schedule.step()
    optimizer = _optimizer()
    schedule = LearningRateSchedule(optimizer, kind="constant", **settings)
    rates = []
    for step in range(8):
        if step in (2, 5):  # in the warmup and after it
            optimizer, before = _optimizer(), (optimizer.state_dict(), schedule.state_dict())
            schedule = LearningRateSchedule(optimizer, kind="constant", **settings)
            optimizer.load_state_dict(before[0])
            schedule.load_state_dict(before[1])
        rates.append(schedule.learning_rate)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_groups_keep_the_ratio_of_their_rates_and_tensor_rates_stay_tensors():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (torch.tensor(1.0), torch.tensor(0.1))]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(1.0))
    tensor = optimizer.param_groups[1]["lr"]
    LearningRateSchedule(optimizer, warmup_steps=4, total_steps=9)
    assert optimizer.param_groups[1]["lr"] is tensor
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])


# ---------------------------------------------------------------- clipping and the guard


@pytest.mark.parametrize("max_norm", [0.5, 100.0, None])
def test_gradients_are_clipped_to_the_norm_of_all_together(max_norm):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([1.0, 2.0, 2.0])
    parameters[1].grad = torch.full((2, 2), 2.0)
    norm = clip_global_norm(iter(parameters), max_norm)
    assert float(norm) == 5.0
    left = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in parameters[:2]))
    assert left == pytest.approx(5.0 if max_norm is None else min(5.0, max_norm), rel=1e-5)
    assert parameters[2].grad is None


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run():
    guard = NonFiniteGuard(max_consecutive=3)
    assert guard.allows(0, torch.tensor(1.0), torch.tensor(2.0))
    assert not guard.allows(1, torch.tensor(float("nan")))
    assert not guard.allows(2, 1.0, float("inf"))
    assert guard.allows(3, 1.0)
    assert (guard.skipped, guard.consecutive) == (2, 0)
    resumed = NonFiniteGuard(max_consecutive=3)
    resumed.load_state_dict(guard.state_dict())
    for step in (4, 5):
        assert not resumed.allows(step, float("inf"))
    with pytest.raises(RuntimeError, match=r"3 updates in a row, the last at step 6 \(loss nan, gradient norm 2\.0\)"):
        resumed.allows(6, float("nan"), 2.0)
    assert resumed.skipped == 5


@pytest.mark.parametrize(
    ("loss", "gradient", "max_norm", "moved"),
    [(1.0, -8.0, 2.0, 0.5), (math.nan, 1.0, None, 0.0), (1.0, math.inf, None, 0.0)],
)
def test_an_update_is_one_clipped_step_or_none_where_it_is_not_finite_and_leaves_no_gradients(
    loss, gradient, max_norm, moved
):
    optimizer = _optimizer()
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.tensor([gradient])
    schedule = LearningRateSchedule(optimizer, kind="linear", warmup_steps=2, total_steps=12)
    parts = {"optimizer": optimizer, "schedule": schedule, "guard": NonFiniteGuard()}
    row = finish_update(1, loss, iter([parameter]), max_grad_norm=max_norm, **parts)
    assert row == {"learning_rate": 0.25, "grad_norm": abs(gradient), "skipped": int(moved == 0)}
    assert parameter.item() == pytest.approx(moved, rel=1e-6)
    assert parameter.grad is None
    assert (schedule.learning_rate, schedule.steps_done) == ((0.5, 1) if moved else (0.25, 0))


# ---------------------------------------------------------------- metrics


def test_a_row_is_on_the_disk_before_the_next_line_of_the_program(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.log(1, {"loss": torch.tensor(2.5), "note": "a"}, tokens=7, bad=float("nan"))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": 2.5, "note": "a", "tokens": 7, "bad": None}
    log.sync()
    log.close()
    log.log(2, loss=1.0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', "{", '{"step": 6}'])
def test_resuming_drops_later_rows_and_a_torn_line_and_keeps_the_rest(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(6):
            log.log(step, loss=step / 2)
    path.write_text(path.read_text() + tail)
    with MetricsLog(path, resume_step=3) as log:
        log.log(4, loss=9.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(0, 0), (1, 0.5), (2, 1), (3, 1.5), (4, 9.0)]
    with MetricsLog(path) as log:
        log.log(0, loss=1.0)
    assert [row["step"] for row in read_metrics(path)] == [0]


def test_trackers_and_the_bar_get_the_values(tmp_path, capsys):
    calls = []

    class Tracker:
        def log(self, values, step):
            calls.append((step, values))

    bar = progress_bar(10, description="train")
    with MetricsLog(tmp_path / "m.jsonl", trackers=[Tracker()], progress=bar, shown=["loss"]) as log:
        log.log(3, loss=0.25, rate=1.0)
    bar.refresh()
    bar.close()
    assert calls == [(3, {"loss": 0.25, "rate": 1.0})]
    assert "loss=0.25" in capsys.readouterr().err


def test_other_processes_than_the_main_one_write_nothing(tmp_path, capsys):
    with MetricsLog(tmp_path / "m.jsonl", is_main=False, progress=progress_bar(10, is_main=False)) as log:
        log.log(1, loss=1.0)
        log.sync()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_curves_are_a_picture_with_something_in_it(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    backend = matplotlib.get_backend()
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(20):
            log.log(
                step, train_loss=3 / (1 + step), rate=0.1, note="text", **({"val_loss": 1.0} if step % 5 == 0 else {})
            )
    path = plot_curves(tmp_path / "metrics.jsonl")
    assert path == tmp_path / "curves.png"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 200
    assert pixels[..., :3].std() > 0.05
    assert plot_curves(tmp_path / "metrics.jsonl", tmp_path / "sub" / "one.png", names=["rate"]).exists()
    assert matplotlib.get_backend() == backend


def test_without_matplotlib_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot_curves(tmp_path / "metrics.jsonl")


# ---------------------------------------------------------------- run folder


def _checkpoint(path: Path) -> None:
    save_checkpoint(path / "checkpoints", 1, model=nn.Linear(1, 1))


def test_the_record_of_a_run_keeps_its_start_and_every_resume(tmp_path):
    with RunDirectory(tmp_path / "run", seed=7, settings={"lr": 0.1, "path": Path("x")}, packages=["einops"]) as run:
        assert not run.resumes
        assert run.path == tmp_path / "run"
    _checkpoint(tmp_path / "run")
    with RunDirectory(tmp_path / "run", seed=8) as run:
        assert run.resumes
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["argv"] == sys.argv
    assert (record["seed"], record["settings"]) == (7, {"lr": 0.1, "path": "x"})
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["einops"] == importlib.metadata.version("einops")
    assert record["device"].startswith("cpu")
    assert [entry["seed"] for entry in record["resumed"]] == [8]


HOLDS = """
import sys
from lm_core.training.run_directory import RunDirectory
with RunDirectory(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_a_second_run_in_one_folder_is_refused_until_the_first_ends(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another run is using"):
            RunDirectory(tmp_path).__enter__()
        other.communicate("\n", timeout=120)
    with RunDirectory(tmp_path), pytest.raises(RuntimeError, match="another run is using"):
        RunDirectory(tmp_path).__enter__()


def test_starting_removes_what_a_killed_run_left_half_written(tmp_path):
    for name in (".tmp-run.json-1-ab", "checkpoints/.tmp-step-3-1-ab/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with RunDirectory(tmp_path) as run:
        assert list(run.checkpoints.iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "run.json"]


def test_resume_can_be_demanded_or_forbidden(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume=True needs a checkpoint"):
        RunDirectory(tmp_path / "a", resume=True).__enter__()
    with RunDirectory(tmp_path / "a", resume=False):
        pass
    with pytest.raises(FileExistsError, match="has a run already"):
        RunDirectory(tmp_path / "a", resume=False).__enter__()
    _checkpoint(tmp_path / "a")
    with RunDirectory(tmp_path / "a", resume=True) as run:
        assert run.resumes


# ---------------------------------------------------------------- devices and precision


def test_the_cpu_is_always_there_and_auto_finds_something():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )


def test_the_process_of_a_launcher_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:2")
    assert pick_device("cuda:3") == torch.device("cuda:3")
    with pytest.raises(ValueError, match="cuda:4 was requested, but there are 4"):
        pick_device("cuda:4")


def test_autocast_computes_in_the_chosen_precision():
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    with autocast("bf16", "cpu"):
        assert layer(x).dtype == torch.bfloat16
    with autocast("auto", "cpu"):
        assert layer(x).dtype == torch.float32
    assert pick_precision("auto", "cpu") == torch.float32


@pytest.mark.cuda
def test_on_a_gpu_auto_is_bfloat16_where_the_hardware_has_it():
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    device = pick_device("cuda")
    assert pick_precision("auto", device) == expected
    with autocast("auto", device):
        assert nn.Linear(2, 2, device=device)(torch.zeros(1, 2, device=device)).dtype == expected
    guard = NonFiniteGuard()
    assert not guard.allows(0, torch.tensor(float("nan"), device=device), 1.0)


@pytest.mark.cuda
def test_a_gpu_s_random_states_come_back():
    torch.rand(1, device="cuda")
    state = capture_rng()
    expected = torch.rand(3, device="cuda")
    restore_rng(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


# ---------------------------------------------------------------- Ctrl-C


def test_the_first_interrupt_asks_and_the_second_raises(capfd):
    before = signal.getsignal(signal.SIGINT)
    with InterruptHandler(grace=0.0) as interrupt:
        assert not interrupt.should_stop()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("saving a checkpoint") == 1


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


@pytest.mark.parametrize(("number", "grace"), [*((number, {"grace": 0.0}) for number in SIGNALS), (signal.SIGINT, {})])
def test_terminations_and_a_ctrl_c_that_the_launcher_repeats_at_once_are_one_request(number, grace):
    with InterruptHandler(**grace) as interrupt:
        for _ in range(2):
            signal.raise_signal(number)
            assert interrupt.received == number


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_hangup_that_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptHandler() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_abandons_work_that_can_be_redone_even_past_its_exception_handlers():
    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the work continued")
        except Exception:
            return "handled"

    with InterruptHandler() as interrupt:
        assert interrupt.abandonable(lambda: 3) == 3
        assert interrupt.abandonable(work) is None
        assert interrupt.received == signal.SIGTERM
        assert interrupt.abandonable(lambda: 3) is None  # requested before


def test_outside_the_main_thread_nothing_is_handled():
    def work():
        with InterruptHandler() as interrupt:
            return signal.getsignal(signal.SIGINT), interrupt.should_stop()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == (signal.getsignal(signal.SIGINT), False)


def test_equal_seeds_draw_equally():
    def draw():
        seed_everything(11)
        return random.random(), float(np.random.rand()), torch.rand(2).tolist()  # noqa: NPY002

    assert draw() == draw()


# ---------------------------------------------------------------- bad input


def _log_one(path: Path, *args: object, **kwargs: object) -> None:
    with MetricsLog(path / "m.jsonl") as log:
        log.log(*args, **kwargs)


def _lines(path: Path, text: str) -> Path:
    (path / "m.jsonl").write_text(text)
    return path / "m.jsonl"


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: optimizer_groups(Model(), weight_decay=-0.1), ValueError, r"not be negative, got -0\.1"),
        (
            lambda p: optimizer_groups(Model(), no_decay=("gain",)),
            ValueError,
            r"no_decay must contain only .* \['gain'\]",
        ),
        (lambda p: optimizer_groups(Model().requires_grad_(False)), ValueError, "got a Model with none"),
        (lambda p: learning_rate_scale(-1), ValueError, "must not be negative, got -1 and 0"),
        (lambda p: learning_rate_scale(0, final_scale=2.0, total_steps=3), ValueError, r"in \[0, 1\], got 2\.0"),
        (lambda p: learning_rate_scale(0), ValueError, "total_steps must be greater than warmup_steps = 0, got None"),
        (lambda p: learning_rate_scale(0, kind="step"), TypeError, "kind"),
        (
            lambda p: LearningRateSchedule(_optimizer(), scheduler=ConstantLR, scheduler_kwargs={}, total_steps=9),
            ValueError,
            "kind must be \"constant\" with a scheduler, got 'cosine'",
        ),
        (lambda p: LearningRateSchedule(_optimizer(), warmup_steps=9, total_steps=9), ValueError, "= 9, got 9"),
        (
            lambda p: LearningRateSchedule(_optimizer(), kind="constant").load_state_dict({"last_epoch": 1}),
            ValueError,
            r"the keys \['steps_done'\], got \['last_epoch'\]",
        ),
        (lambda p: clip_global_norm([], 0.0), ValueError, r"positive or None, got 0\.0"),
        (lambda p: clip_global_norm([], math.nan), ValueError, "positive or None, got nan"),
        (lambda p: NonFiniteGuard(max_consecutive=0), ValueError, "at least 1, got 0"),
        (lambda p: MetricsLog(p / "m.jsonl", trackers=[3]), TypeError, r"log\(values, step=...\), got int"),
        (lambda p: _log_one(p, 1, step=2), TypeError, "step"),
        (lambda p: _log_one(p, 1, {"step": 2}), TypeError, "'step' is taken"),
        (lambda p: _log_one(p, 1, loss=[1]), TypeError, "'loss' must be a number or a string, got list"),
        (lambda p: MetricsLog(_lines(p, "oops\n{}\n"), resume_step=1), ValueError, "line 1, is not JSON"),
        (lambda p: read_metrics(p / "none"), FileNotFoundError, "none"),
        (lambda p: plot_curves(p / "none"), FileNotFoundError, "none"),
        (lambda p: plot_curves(_lines(p, '{"step": 1, "a": 1}\n')), ValueError, "no numbers in two rows"),
        (lambda p: plot_curves(_lines(p, '{"step": 1, "a": 1}\n'), names=["b"]), ValueError, r"\['a'\], got \['b'\]"),
        (lambda p: seed_everything(-1), ValueError, r"\[0, 2\*\*32\), got -1"),
        (lambda p: seed_everything(2**32), ValueError, "got 4294967296"),
        (lambda p: seed_everything(1.5), TypeError, "seed"),
        (lambda p: pick_device("gpu"), ValueError, "cuda:N or mps, got 'gpu'"),
        (lambda p: pick_device("cpu:1"), ValueError, "got 'cpu:1'"),
        (lambda p: pick_device("cuda:x"), ValueError, "got 'cuda:x'"),
        (lambda p: pick_precision("fp16", "cpu"), ValueError, "fp16 is not supported on the CPU"),
        (lambda p: pick_precision("fp8", "cpu"), TypeError, "precision"),
        (lambda p: RunDirectory(_lines(p, "x")).__enter__(), FileExistsError, "must be a folder, got the file"),
        (lambda p: RunDirectory(p, resume="maybe"), TypeError, "resume"),
    ],
)
def test_bad_input_is_named(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


@pytest.mark.plain
@pytest.mark.parametrize(("name", "module"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_a_device_this_machine_lacks_is_named(name, module, monkeypatch):
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{name}' was requested, but torch .* finds no {name.upper()} device"):
        pick_device(name)
