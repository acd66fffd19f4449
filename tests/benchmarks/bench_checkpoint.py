"""Writing and reading a checkpoint (checksums and flushes to disk included) against a bare ``torch.save``.

python tests/benchmarks/bench_checkpoint.py --json checkpoint.json
"""

import os
import tempfile
from pathlib import Path

import torch
from measure import arguments, in_turns, median, ratio, report

from lm_core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from palm_rlhf import PaLM


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(options.threads[0])
    palm = PaLM(dim=512, depth=6, num_tokens=256)
    optimizer = torch.optim.AdamW(palm.parameters())
    palm(torch.randint(256, (1, 8)), return_loss=True).backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = Path(folder, "checkpoints"), Path(folder, "plain.pt")
        step = iter(range(10**6))

        def write() -> None:
            state = {"optimizer": optimizer.state_dict()}
            save_checkpoint(ours, next(step), model=palm, trainer_state=state, keep=1)

        def write_plain(flush: bool) -> None:
            with plain.open("wb") as file:
                torch.save({"model": palm.state_dict(), "optimizer": optimizer.state_dict()}, file)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())

        seconds = in_turns(
            {
                "write": write,
                "torch.save": lambda: write_plain(False),
                "torch.save and fsync": lambda: write_plain(True),
                "read": lambda: load_checkpoint(ours, model=palm),
                "torch.load": lambda: torch.load(plain, weights_only=True),
            },
            options.rounds,
        )
        size = plain.stat().st_size / 1e6
    rows = [
        {"operation": name, "MB": size, "MB/s": size / median(values), "times our speed": ratio(seconds[base], values)}
        for name, values in seconds.items()
        for base in ["read" if name in ("read", "torch.load") else "write"]
    ]
    report("Checkpoint of 22.5 M parameters with AdamW's state", rows, options.json)


if __name__ == "__main__":
    main()
