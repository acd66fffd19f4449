"""Shared parts of the benchmark scripts: variants timed in turns, the machine's limits, one table and one JSON file.

Machines drift, so variants take turns round by round and a ratio is the median of the rounds' ratios.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def arguments(description: str, *, default_rounds: int = 5, **options: dict[str, Any]) -> argparse.Namespace:
    """Flags of every script (``--threads``, ``--rounds``, ``--json``) and ``options`` of its own.

    ``--measure`` is for the script itself: ``in_own_process`` runs it so.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="thread counts to measure at")
    parser.add_argument("--rounds", type=int, default=default_rounds, help="times that every variant is run")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser.parse_args()


def thread_counts(options: argparse.Namespace) -> Iterator[int]:
    """Each of ``--threads``, set."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        yield threads


def peer_folder(distribution: str) -> Path:
    """The folder of a distribution's peers below $BENCH_PEERS, put on the path.

    Raises:
        SystemExit: there is none.
    """
    folder = Path(os.environ.get("BENCH_PEERS", ""), distribution)
    if not folder.is_dir():
        raise SystemExit(f"the original package is not in {folder}: run nox -s bench_peers")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder


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


def compared(
    what: str,
    peer: str,
    seconds: dict[str, list[float]],
    text: Callable[[float], str] = "{:.2f} s".format,
    *,
    limit: float | None = None,
    axis: str | None = None,
    size: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of `bench_peers`: seconds of "ours" and "theirs", shown by ``text``, and their ratio.

    ``limit`` is the least number of seconds possible; ``axis`` and ``size`` place the row in a series.
    """
    ours, theirs = median(seconds["ours"]), median(seconds["theirs"])
    row: dict[str, Any] = {"what": what, "threads": torch.get_num_threads(), peer: text(theirs), "ours": text(ours)}
    row["times as fast"] = ratio(seconds["theirs"], seconds["ours"])
    if limit is not None:
        row["share of limit"] = limit / ours
    if axis is not None:
        row |= {"axis": axis, "size": size, "cost": ours, "peer cost": theirs, "unit": "s"}
    return row | more


def tokens_per_second(tokens: int) -> Callable[[float], str]:
    """Seconds as text: the rate at which ``tokens`` were made in them."""
    return lambda seconds: f"{tokens / seconds:.1f} tokens/s"


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
        return bytes_of(weights) / min(timed(read) for _ in range(20))


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_own_process(script: str, *arguments: object, threads: int | None = None) -> Any:
    """The JSON that ``script --measure arguments`` prints last, run in a process of its own."""
    threads = torch.get_num_threads() if threads is None else threads
    command = [sys.executable, script, "--threads", str(threads), "--measure", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_growth(function: Callable[[], object]) -> float:
    """MB by which this process's peak resident memory rises above what it holds before the call."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6

    def resident(field: str) -> float:
        lines = status.read_text(encoding="ascii").splitlines()
        return next(1024 * float(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1e6

    clear.write_text("5", encoding="ascii")  # resets the peak, VmHWM
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Name of the processor."""
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
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        results[title] = {"machine": machine(), "rows": rows}
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")


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
    """A value as text."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
