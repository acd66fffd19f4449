"""What the benchmark scripts share: variants timed in turns, the machine's own limits, one table and one JSON file.

Machines drift, so variants take turns round by round and a ratio is the median of the rounds' ratios.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def arguments(description: str, *, default_rounds: int = 5, **options: dict[str, Any]) -> argparse.Namespace:
    """Flags every script has (``--threads``, ``--rounds``, ``--json``) and some of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="thread counts to measure at")
    parser.add_argument("--rounds", type=int, default=default_rounds, help="times that every variant is run")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser.parse_args()


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, a GPU's work included where one is in use."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else (lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def in_turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round that does not count."""
    for function in variants.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            seconds[name].append(timed(function))
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def matmul_flops(m: int = 2048, k: int = 512, n: int = 4736) -> float:
    """Floating-point operations a second of the best of several products."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    return 2 * m * k * n / min(timed(lambda: torch.mm(a, b)) for _ in range(5))


def read_bandwidth(weights: list[Tensor]) -> float:
    """Bytes a second at which products with one row read ``weights`` (out, in): the limit of decoding."""
    inputs = [torch.randn(1, weight.shape[1]) for weight in weights]

    def read() -> None:
        for weight, x in zip(weights, inputs, strict=True):
            torch.nn.functional.linear(x, weight)

    with torch.no_grad():
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        return size / min(timed(read) for _ in range(20))


def machine() -> dict[str, Any]:
    """Where a number was measured."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints the rows as a Markdown table and writes them, with the machine, as JSON."""
    print(f"\n## {title}\n")
    print(table(rows))
    if path is not None:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found[title] = {"machine": machine(), "rows": rows}
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; a column that no row fills is left out."""
    columns = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if any(row.get(name) is not None for row in rows)
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
