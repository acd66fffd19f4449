"""The paper's key-value arithmetic beside the anchor alone and a random augment; more steps, better.

python kv_arithmetic.py [--seed 0] [--steps 300]
"""

import argparse
import dataclasses

from calm_pytorch.quickstart import QuickstartSettings, run_quickstart

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
settings = QuickstartSettings(seed=options.seed, steps=options.steps)
for name, changed in (("trained augment", False), ("random augment", True)):
    result = run_quickstart(
        dataclasses.replace(settings, random_augment=changed), f"runs/kv-{name.replace(' ', '-')}-{options.seed}"
    )
    print(
        f"{name}: composed {result.composed:.1%}, anchor alone {result.anchor_alone:.1%}, "
        f"numbers {result.numbers_before:.1%} -> {result.numbers_after:.1%}, {result.seconds:.0f} s"
    )
