"""The paper's key-value arithmetic and its baselines: the anchor alone, a random augment, LoRA of equal parameters.

python kv_arithmetic.py [--seed 0] [--max_steps 600] [--augment_steps 600] [--anchor_steps 500]
"""

import argparse
import dataclasses

from calm_pytorch.quickstart.quickstart import QuickstartSettings, run_quickstart

defaults = QuickstartSettings()
parser = argparse.ArgumentParser()
for name in ("seed", "max_steps", "augment_steps", "anchor_steps"):
    parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
settings = QuickstartSettings(**vars(parser.parse_args()))
for learner in ("composition", "random-augment", "low-rank"):
    result = run_quickstart(
        dataclasses.replace(settings, learner=learner), f"runs/kv-arithmetic/{learner}-{settings.seed}"
    )
    print(
        f"{learner}: held-out keys {result.held_out:.1%}, trained keys {result.trained_keys:.1%}, "
        f"anchor alone {result.anchor_alone:.1%}, numbers {result.numbers_before:.1%} -> {result.numbers_after:.1%}, "
        f"{result.learned:,} parameters learned, {result.seconds or 0:.0f} s"
    )
