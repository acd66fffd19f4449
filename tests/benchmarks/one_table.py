"""All rows of a `bench_peers` run as one table: benchmarks.json, benchmarks.md and benchmarks.png.

    python tests/benchmarks/one_table.py FOLDER

``FOLDER`` holds what ``measure.report`` wrote, one file a script. A row says ``what`` was measured at how many
``threads``, ``ours`` and one column named for the peer (texts with units), how many ``times as fast`` ours is (for
memory, ``times as small``) and, where there is a physical limit, the ``share of limit``. Rows of a series also have
``axis``, ``size``, ``cost``, ``unit`` and, if the peer was timed too, ``peer cost``: how the cost grows.
"""

import argparse
import importlib.metadata
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from measure import cell, table

PACKAGES = ("palm-rlhf", "coca", "memorizing-transformer", "calm-pytorch", "spin-trainer")
FACTORS = ("times as fast", "times as small")
KNOWN = {"what", "threads", "ours", *FACTORS, "share of limit", "axis", "size", "cost", "peer cost", "unit"}
COLUMNS = ("package", "what", "threads", "peer", "of the peer", "ours", *FACTORS, "share of limit", "notes")


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every row of every script, flat, and the machines they were measured on.

    Raises:
        SystemExit: there are none, or a row is not as it should be.
    """
    rows, machines = [], []
    for file in sorted(folder.glob("peers_*.json")):
        for title, part in json.loads(file.read_text("utf-8")).items():
            if part["machine"] not in machines:
                machines.append(part["machine"])
            rows += [flat(row, package_of(file.stem), title) for row in part["rows"]]
    if not rows:
        raise SystemExit(f"{folder} holds no rows of peers_*.py")
    return rows, machines


def package_of(script: str) -> str:
    """The package whose script this is; else, for those that concern several, the script's own name."""
    name = script.removeprefix("peers_").replace("_", "-")
    return next((package for package in PACKAGES if name.startswith(package)), name.replace("-", " "))


def flat(row: dict[str, Any], package: str, title: str) -> dict[str, Any]:
    """A row with its peer's name and text in columns of one name each; what else it tells goes into ``notes``."""
    others = {name: value for name, value in row.items() if name not in KNOWN and value is not None}
    peers = [name for name, value in others.items() if isinstance(value, str)]
    given = {name for name in row if row[name] is not None}
    missing = {"what", "threads", "ours"} - given
    if not given.intersection(FACTORS):
        missing.add(FACTORS[0])
    if missing or not peers:
        raise SystemExit(f"{package}, {title!r}: a row must have {sorted(missing)} and a peer, got {row}")
    shared = {name: row[name] for name in KNOWN if row.get(name) is not None}
    peer = others.pop(peers[0])
    notes = ", ".join(f"{name} {cell(value)}" for name, value in others.items())
    return {"package": package, "title": title, "peer": peers[0], "of the peer": peer, **shared, "notes": notes or None}


def versions() -> dict[str, str]:
    """Of the peers in $BENCH_PEERS and of the libraries beside us."""
    found = {}
    for folder in sorted(Path(os.environ.get("BENCH_PEERS", "")).glob("*/")):
        for distribution in importlib.metadata.distributions(path=[str(folder)]):
            found[distribution.metadata["Name"]] = distribution.version
    for name in ("transformers", "x-transformers", "faiss-cpu", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def markdown(rows: list[dict[str, Any]], machines: list[dict[str, Any]]) -> str:
    where = "; ".join(f"{one['processor']}, Python {one['python']}, torch {one['torch']}" for one in machines)
    text = [f"Measured on {where}.", "Beside " + ", ".join(f"{name} {at}" for name, at in versions().items()) + ".", ""]
    text.append(table([{name: row.get(name) for name in COLUMNS} for row in rows]))
    for (package, axis, unit), series in grown(rows).items():
        text += ["", f"How cost grows: {package}, {axis} ({unit})", ""]
        text.append(table([{"what": what, axis: s, "ours": c, "peer": p} for what, s, c, p in series]))
    return "\n".join(text) + "\n"


def grown(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[tuple[str, float, float, float | None]]]:
    """The series: (package, axis, unit) -> (what, size, our cost, the peer's), by size."""
    series = defaultdict(list)
    for row in rows:
        if "axis" in row and "cost" in row:
            entry = (row["what"], row["size"], row["cost"], row.get("peer cost"))
            series[row["package"], row["axis"], row.get("unit", "s")].append(entry)
    kept = {key: sorted(entries, key=lambda entry: entry[1]) for key, entries in series.items()}
    return {key: entries for key, entries in kept.items() if len({entry[1] for entry in entries}) > 1}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            if not super().__call__(x, pos):
                return ""  # a tick without a number, where there is no room
            return f"{x:,.0f}" if x >= 10 else f"{x:.4g}"

    series = grown(rows)
    columns = max(1, min(4, len(series)))
    below = math.ceil(len(series) / columns)
    height = 0.24 * len(rows) + 1.2
    figure = pyplot.figure(figsize=(13, height + 2.9 * below), layout="constrained")
    above, *rest = figure.subfigures(
        2 if below else 1, 1, height_ratios=[height, 2.9 * below] if below else None, squeeze=False
    )[:, 0]
    axes = above.subplots()
    packages = list(dict.fromkeys(row["package"] for row in rows))
    colours = {name: f"C{number % 10}" for number, name in enumerate(packages)}
    places = range(len(rows), 0, -1)
    factors = [next(row[name] for name in FACTORS if name in row) for row in rows]
    axes.barh(places, [factor - 1 for factor in factors], left=1, color=[colours[row["package"]] for row in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, min(factors) / 1.5), max(factors) * 12)  # room for the text
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.set_yticks(
        list(places), [f"{row['package']}: {row['what']} ({row['threads']} thr.)" for row in rows], fontsize=7
    )
    for place, row, factor in zip(places, rows, factors, strict=True):
        share = f", {row['share of limit']:.0%} of the limit" if "share of limit" in row else ""
        memory = ", memory" if "times as small" in row else ""
        axes.text(max(1.0, factor), place, f" {factor:.3g} x {row['peer']}{share}{memory}", va="center", fontsize=7)
    axes.set_xlabel("times as fast as the peer, or as small in memory (log scale); right of the line ours is better")
    if rest:
        panels = rest[0].subplots(below, columns, squeeze=False).flat
        for (package, axis, unit), panel in zip(series, panels, strict=False):
            lines = defaultdict(list)
            for _, size, cost, peer in series[package, axis, unit]:
                lines["ours"].append((size, cost))
                if peer is not None:
                    lines["peer"].append((size, peer))
            for name, points in lines.items():
                style = {"color": colours[package]} if name == "ours" else {"color": "grey", "linestyle": "--"}
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
            panel.set(xscale="log", yscale="log", title=package, xlabel=axis, ylabel=unit)
            sizes = sorted({size for points in lines.values() for size, _ in points})
            panel.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
            panel.set_xticks([], minor=True)
            panel.yaxis.set_major_formatter(PlainNumbers(minor_thresholds=(1.5, 0.5)))
            panel.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(1.5, 0.5)))
            panel.title.set_fontsize(8)
            panel.tick_params(labelsize=7, which="both")
            panel.legend(fontsize=7)
        for panel in list(rest[0].axes)[len(series) :]:
            panel.set_axis_off()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the rows are, and where the table goes")
    folder = parser.parse_args().folder
    rows, machines = read_rows(folder)
    written = {"machines": machines, "versions": versions(), "rows": rows}
    (folder / "benchmarks.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    text = markdown(rows, machines)
    (folder / "benchmarks.md").write_text(text, encoding="utf-8")
    draw(rows, folder / "benchmarks.png")
    print(text)
    print(f"benchmarks.json, benchmarks.md and benchmarks.png are in {folder}")


if __name__ == "__main__":
    main()
