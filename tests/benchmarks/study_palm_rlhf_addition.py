"""GRPO on two-digit addition over several seeds: exact match on held-out sums after a supervised start and after GRPO.

    nox -s studies -- palm_rlhf_addition

The task and the sizes are those of packages/palm-rlhf/examples/grpo_addition.py, run longer: 3,000 written-out sums
for the start, GRPO on sums without their answers. 1,000 of the 8,100 sums are held out and appear in neither.
"""

import sys
import time
from pathlib import Path

import torch
from measure import arguments, report

sys.path.append(str(Path(__file__).resolve().parents[2] / "packages" / "palm-rlhf" / "examples"))

from grpo_addition import run


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        supervised_rows={"type": int, "default": 3000},
        supervised_updates={"type": int, "default": 800},
        phases={"type": int, "default": 100},
    )
    torch.set_num_threads(options.threads[0])
    rows = []
    for seed in options.seeds:
        started = time.monotonic()
        outcome = run(
            seed=seed,
            supervised_rows=options.supervised_rows,
            supervised_updates=options.supervised_updates,
            phases=options.phases,
        )
        rows.append(
            {
                "seed": seed,
                "held-out exact match, supervised start": f"{outcome.before:.3f}",
                "held-out exact match, after GRPO": f"{outcome.after:.3f}",
                "mean reward, first phase": f"{outcome.rewards[0]:.3f}",
                "mean reward, last phase": f"{outcome.rewards[-1]:.3f}",
                "phases": len(outcome.rewards),
                "s": time.monotonic() - started,
            }
        )
    report("GRPO on two-digit addition, 1,000 sums held out", rows, options.json)


if __name__ == "__main__":
    main()
