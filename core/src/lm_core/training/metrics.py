"""Metrics of a run: rows in ``metrics.jsonl``, a progress bar, trackers, and the curves drawn from the rows.

A row is written and flushed at once, so a killed process loses none. A run that resumes at step N first drops the rows
after N, which may have been written past the last checkpoint: no row is lost and none appears twice.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor
from tqdm.auto import tqdm

from lm_core.checkpoints.atomic_io import fsync_path, write_file
from lm_core.checks import typed
from lm_core.data.jsonl import read_json_lines


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without a last line truncated by a kill.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is not a JSON object.
    """
    return [row for _, row in read_json_lines(path, torn_end=True)]


def read_series(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each numeric metric in a ``metrics.jsonl``; errors as for ``read_metrics``."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def _number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) or hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN; null leaves a gap in the curve
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"metric {name!r} must be a number or a string, got {type(value).__name__}")


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Log of metrics to a file, trackers and a progress bar.

    Args:
        path: path of ``metrics.jsonl``; None writes no file, so that only trackers and the bar get the rows.
        resume_step: last step whose rows are kept; -1 drops all.
        is_main: False makes everything a no-op, for processes other than the main one.
        trackers: objects with ``log(values, step=step)``, such as an ``accelerate.Accelerator`` or its trackers.
        progress: bar of ``progress_bar`` that shows the newest values.
        shown: names of the values on the bar.

    Raises:
        TypeError: a tracker has no ``log``.
        ValueError: the existing file is damaged.
    """

    @typed
    def __init__(
        self,
        path: str | Path | None,
        *,
        resume_step: int = -1,
        is_main: bool = True,
        trackers: Sequence[Any] = (),
        progress: Any = None,
        shown: Sequence[str] = ("loss",),
    ) -> None:
        for tracker in trackers:
            if not callable(getattr(tracker, "log", None)):
                raise TypeError(f"trackers must have log(values, step=...), got {type(tracker).__name__}")
        self.path = None if path is None else Path(path).expanduser()
        self.is_main = is_main
        self.trackers = list(trackers)
        self.progress = progress
        self.shown = list(shown)
        self._is_open = True
        self._stream: TextIO | None = None
        self._warned: set[str] = set()
        if is_main and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                rows = read_metrics(self.path) if resume_step >= 0 else []
                kept = [json.dumps(row) + "\n" for row in rows if row.get("step", -1) <= resume_step]
                write_file(self.path, "".join(kept))
            self._stream = self.path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Writes one row.

        Args:
            step: number of updates done.
            values: numbers, strings, or scalar tensors; one that is not finite becomes null.
            more: further values.

        Raises:
            TypeError: a value has another type, or is named "step".
        """
        if not self.is_main or not self._is_open:
            return
        row = {name: _number(name, value) for name, value in {**(values or {}), **more}.items()}
        if "step" in row:
            raise TypeError("the name 'step' is taken by the number of updates")
        if self._stream is not None and self.path is not None:
            try:
                if not self.path.exists():  # deleted by someone
                    self._stream.close()
                    self._stream = self.path.open("a", encoding="utf-8")
                self._stream.write(json.dumps({"step": step, **row}) + "\n")
                self._stream.flush()
            except OSError as error:
                self._warn(f"{self.path} cannot be written ({error}); the run continues without its rows")
        for tracker in self.trackers:
            try:
                tracker.log(row, step=step)
            except Exception as error:  # an error of a tracker or its server must not end a run
                self._warn(
                    f"tracker {type(tracker).__name__} raised {type(error).__name__}: {error}; the run continues"
                )
        if self.progress is not None:
            visible = {name: row[name] for name in self.shown if name in row}
            if visible:
                self.progress.set_postfix(visible, refresh=False)

    def sync(self) -> None:
        """Flushes the rows to disk; called before a checkpoint, so that it never survives without its rows."""
        if self._stream is not None and self.path is not None and self.path.exists():
            fsync_path(self.path)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    def close(self) -> None:
        """Closes the file; later rows are ignored."""
        self._is_open = False
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(total: int | None, *, initial: int = 0, description: str = "", is_main: bool = True) -> Any:
    """A tqdm bar over updates, disabled in processes other than the main one."""
    return tqdm(total=total, initial=initial, desc=description, disable=not is_main, dynamic_ncols=True, unit="step")


@typed
def plot_curves(
    metrics_path: str | Path, output: str | Path | None = None, *, names: Sequence[str] | None = None
) -> Path:
    """Plots the numeric metrics of a ``metrics.jsonl`` over the steps, one panel for each group of names.

    ``train_loss`` and ``validation_loss`` share a panel: words such as "train", "val" or "eval" are ignored when names
    are compared.

    Args:
        metrics_path: path of ``metrics.jsonl``.
        output: path of the ``.png``; by default ``curves.png`` next to the rows.
        names: metrics to plot; by default all that are numbers in at least two rows.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: there are no metrics.
        ValueError: there is nothing to draw, or a name is in no row.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install matplotlib") from error
    # choose what to plot
    series = read_series(metrics_path)
    unknown = sorted(set(names or ()) - set(series))
    if unknown:
        raise ValueError(f"names must be in {metrics_path}, which has {sorted(series)}, got {unknown}")
    chosen = list(names) if names is not None else [name for name in series if len(series[name][0]) > 1]
    if not chosen:
        raise ValueError(f"{metrics_path} has no numbers in two rows or more, there is no curve to draw")
    # one panel for each group of names
    panels: dict[str, list[str]] = {}
    for name in chosen:
        panels.setdefault(_panel_of(name), []).append(name)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # leaves the global backend alone and needs no display
    for position, (title, members) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        for name in members:
            steps, values = series[name]
            axes.plot(steps, values, label=name, marker="." if len(steps) < 30 else "")
        axes.set_title(title)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        if len(members) > 1:
            axes.legend()
    target = Path(metrics_path).with_name("curves.png") if output is None else Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, format="png")
    return target


def _panel_of(name: str) -> str:
    sides = {"train", "training", "val", "valid", "validation", "eval", "test"}
    return "_".join(word for word in name.replace("/", "_").split("_") if word not in sides) or name
