"""What `coca train` learns from the handwritten digits: zero-shot classification and captions, over several seeds.

Each seed is the quickstart as a newcomer runs it, in a process of its own; the split is the same for all.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from measure import arguments, report

parsed = arguments(
    __doc__ or "",
    seeds={"type": int, "nargs": "+", "default": [0, 1, 2], "help": "one run each"},
    runs={"type": Path, "help": "folder to keep the runs in, with their grid.png and curves.png"},
)
rows = []
for threads in parsed.threads:
    for seed in parsed.seeds:
        with tempfile.TemporaryDirectory() if parsed.runs is None else nullcontext(parsed.runs) as folder:
            run = Path(folder) / f"threads-{threads}-seed-{seed}"
            command = [sys.executable, "-m", "coca", "train", "--seed", str(seed), "--checkpoint_dir", str(run)]
            started = time.perf_counter()
            environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run([*command, "--device", "cpu"], check=True, capture_output=True, env=environ)
            seconds = time.perf_counter() - started
            summary = json.loads((run / "summary.json").read_text("utf-8"))
            after = {result["name"].split(",")[0]: result["after"] for result in summary["results"]}
        rows.append(
            {
                "threads": threads,
                "seed": seed,
                "updates": summary["steps"],
                "seconds, start to end": round(seconds, 1),
                "zero-shot": after["zero-shot accuracy"],
                "caption names the digit": after["captions that name the class"],
            }
        )
report("CoCa on handwritten digits, 359 held out", rows, parsed.json)
