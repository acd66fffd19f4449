"""What `coca train` learns from the handwritten digits: zero-shot classification and captions, over several seeds.

Each seed is the quickstart as a newcomer runs it, in a process of its own; the split is the same for all.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import arguments, report

parsed = arguments(__doc__ or "", seeds={"type": int, "nargs": "+", "default": [0, 1, 2], "help": "one run each"})
rows = []
for threads in parsed.threads:
    for seed in parsed.seeds:
        with tempfile.TemporaryDirectory() as folder:
            code = f"import sys, torch; torch.set_num_threads({threads}); from coca.cli import main; sys.exit(main())"
            run = str(Path(folder) / "run")
            command = [sys.executable, "-c", code, "train", "--seed", str(seed), "--checkpoint_dir", run]
            started = time.perf_counter()
            subprocess.run([*command, "--device", "cpu"], check=True, capture_output=True)
            seconds = time.perf_counter() - started
            log = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text("utf-8").splitlines()]
            last = [row for row in log if "zero_shot_accuracy" in row][-1]
        rows.append(
            {
                "threads": threads,
                "seed": seed,
                "updates": last["step"],
                "seconds, all": seconds,
                "zero-shot": last["zero_shot_accuracy"],
                "caption names the digit": last["caption_accuracy"],
            }
        )
report("CoCa on handwritten digits, 359 held out", rows, parsed.json)
