"""The picture of a self-play run."""

from pathlib import Path

from lm_core.training.metrics import plot_curves, read_metrics

SHOWN = ("loss", "nll", "margin", "win_rate", "real_log_prob", "generated_log_prob", "generated_length", "grad_norm")


def draw_curves(metrics: Path, output: Path) -> Path | None:
    """Draws what a self-play run is judged by; None without matplotlib, or with too few rows."""
    rows = read_metrics(metrics)
    names = [name for shown in SHOWN for name in (shown, f"validation_{shown}") if sum(name in row for row in rows) > 1]
    if sum("loss" in row for row in rows) < 2:
        return None  # one point is no curve
    try:
        return plot_curves(metrics, output, names=names) if names else None
    except ImportError:
        return None
