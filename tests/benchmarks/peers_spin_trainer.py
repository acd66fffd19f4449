"""One whole self-play iteration beside self-rewarding-lm-pytorch's SPINTrainer, at equal work.

The original needs a model whose forward takes ids alone, and it generates without a cache. Both do one update on four
prompts of 16 to 40 tokens, 168 tokens with their answers: generate, score by policy and reference, one optimizer step.
"""

import os
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_spin_trainer import pairs, small
from measure import arguments, in_turns, median, ratio, report

from spin_trainer import SPINTrainer
from spin_trainer.sft_data import Example, SFTDataset


def original_trainer() -> Any:
    """The original's SPINTrainer, from $BENCH_PEERS/spin-trainer."""
    sys.path.append(str(Path(os.environ["BENCH_PEERS"]) / "spin-trainer"))
    # an annotation library that its modules import and nothing here needs; it does not install beside current torch
    stand_in = types.ModuleType("torchtyping")
    stand_in.TensorType = type("TensorType", (), {"__class_getitem__": classmethod(lambda cls, _: Any)})  # type: ignore[attr-defined]
    sys.modules.setdefault("torchtyping", stand_in)
    # the folder's other modules, of another method, need more
    package = types.ModuleType("self_rewarding_lm_pytorch")
    package.__path__ = [str(Path(os.environ["BENCH_PEERS"]) / "spin-trainer" / "self_rewarding_lm_pytorch")]
    sys.modules["self_rewarding_lm_pytorch"] = package
    from self_rewarding_lm_pytorch.spin import SPINTrainer as Original

    return Original


class Silent:
    """Where the original prints."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    warnings.simplefilter("ignore")
    original = original_trainer()
    _, real, lengths = pairs(256)
    rows = [
        Example(tuple(row[:length].tolist()), tuple(row[length:].tolist()))
        for row, length in zip(real, lengths.tolist(), strict=True)
    ]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            SPINTrainer(
                small(),
                train_sft_dataset=SFTDataset(rows),
                max_seq_len=168,
                batch_size=4,
                grad_accum_steps=1,
                epochs=1,
                device="cpu",
                checkpoint_folder=folder,
            )()

    def theirs() -> None:
        dataset = torch.utils.data.TensorDataset(real, lengths)
        trainer = original(
            small(),
            train_sft_dataset=dataset,
            max_seq_len=168,
            batch_size=4,
            grad_accum_steps=1,
            epochs=1,
            accelerate_kwargs={"cpu": True},
        )
        trainer()

    result = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        out, err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = Silent()  # type: ignore[assignment]
        try:
            seconds = in_turns({"spin-trainer": ours, "original": theirs}, min(options.rounds, 3))
        finally:
            sys.stdout, sys.stderr = out, err
        result.append(
            {
                "threads": threads,
                "spin-trainer, s": median(seconds["spin-trainer"]),
                "original, s": median(seconds["original"]),
                "spin-trainer / original": ratio(seconds["original"], seconds["spin-trainer"]),
            }
        )
    report("One iteration beside the original, 4 x 256 model, 4 prompts, 168 tokens", result, options.json)


if __name__ == "__main__":
    main()
