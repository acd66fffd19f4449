"""The layouts of a weight in a decoding step: as stored, by columns, in oneDNN's blocks; and which one is chosen.

The weights of a shape are more than the processor's cache holds and take turns, as those of a model's layers do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import arguments, in_turns, median, report

from lm_core.generation.weight_layout import WeightLayout

parsed = arguments(
    __doc__ or "",
    rows={"type": int, "nargs": "+", "default": [1, 2, 4, 8, 16, 64], "help": "rows of a product"},
    megabytes={"type": int, "default": 256, "help": "weights of a shape"},
)
# Of PaLM's and CoCa's blocks, a small Llama's, and vocabularies.
SHAPES = [(2688, 256), (256, 1536), (8192, 256), (1536, 576), (576, 1536), (49152, 576)]


@torch.no_grad()
def row(shape: tuple[int, int], rows: int, threads: int) -> dict[str, Any]:
    count = max(1, parsed.megabytes * 2**20 // (4 * shape[0] * shape[1]))
    weights = [torch.randn(shape) for _ in range(count)]
    columns = [weight.t().contiguous().t() for weight in weights]
    blocks = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
    x = torch.randn(rows, shape[1])
    layout = WeightLayout(None, steps=1000)

    def each(product: Callable[[torch.Tensor], torch.Tensor], many: list[torch.Tensor]) -> None:
        for weight in many:
            product(weight)

    seconds = in_turns(
        {
            "stored": partial(each, partial(F.linear, x), weights),
            "columns": partial(each, partial(F.linear, x), columns),
            "blocks": partial(
                each, lambda weight: torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], ""), blocks
            ),
            "chosen": partial(each, partial(layout.product, x), weights),
        },
        parsed.rounds,
    )
    gigabytes = count * 4 * shape[0] * shape[1] / 1e9
    speeds = {name: gigabytes / median(values) for name, values in seconds.items()}
    best = max(speed for name, speed in speeds.items() if name != "chosen")
    return {
        "shape": f"{shape[0]} x {shape[1]}",
        "rows": rows,
        "threads": threads,
        **{f"{name}, GB/s": round(speed, 1) for name, speed in speeds.items()},
        "chosen of best": round(speeds["chosen"] / best, 2),
    }


rows = []
for threads in parsed.threads:
    torch.set_num_threads(threads)
    rows += [row(shape, count, threads) for shape in SHAPES for count in parsed.rows]
report("Weights of decoding, by layout", rows, parsed.json)
