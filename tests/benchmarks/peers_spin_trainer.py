"""One whole self-play iteration next to self-rewarding-lm-pytorch's SPINTrainer, at equal work.

Both do one update of a 4 x 256 decoder on four prompts of 16 to 40 tokens: generate up to the given number of tokens,
score by policy and reference, one optimizer step; ours writes answers, scores, policy and checkpoint as well. The
original needs a model whose forward takes ids alone, and generates without a cache, so its cost grows with the square
of the length. It is looked for in $BENCH_PEERS/spin-trainer.

A step of log-probabilities with its gradient is compared with DPO's formula as TRL has it, from full logits: its memory
is what the first step takes at its peak above model and batch, gradients included, in a process of its own.

    nox -s bench_peers -- spin_trainer
"""

import contextlib
import io
import sys
import tempfile
import types
import warnings
from typing import Any

import torch
from bench_spin_trainer import DPO, LENGTH, SPIN_STORED, measured, pairs, small
from measure import arguments, compared, in_turns, peer_folder, report, thread_counts, tokens_per_second

from spin_trainer import SPIN, SPINTrainer
from spin_trainer.data.opponent_answers import Sampling, answer_prompts
from spin_trainer.data.sft_data import Example, SFTDataset

VOCABULARY = 256
PEER = "self-rewarding-lm-pytorch"


def original_modules() -> tuple[Any, Any]:
    """The original's modules ``spin`` and ``sampling_utils``."""
    folder = peer_folder("spin-trainer")
    # an annotation library that its modules import and nothing here needs; it does not install next to current torch
    stand_in = types.ModuleType("torchtyping")
    stand_in.TensorType = type("TensorType", (), {"__class_getitem__": classmethod(lambda cls, _: Any)})  # type: ignore[attr-defined]
    sys.modules.setdefault("torchtyping", stand_in)
    # the folder's other modules, of another method, need more
    package = types.ModuleType("self_rewarding_lm_pytorch")
    package.__path__ = [str(folder / "self_rewarding_lm_pytorch")]
    sys.modules["self_rewarding_lm_pytorch"] = package
    from self_rewarding_lm_pytorch import sampling_utils, spin

    return spin, sampling_utils


def iteration_row(spin: Any, length: int, rounds: int) -> dict[str, object]:
    _, real, lengths = pairs(VOCABULARY, length)
    rows = [
        Example(tuple(row[:own].tolist()), tuple(row[own:].tolist()))
        for row, own in zip(real, lengths.tolist(), strict=True)
    ]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            SPINTrainer(
                small(),
                train_sft_dataset=SFTDataset(rows),
                max_seq_len=length,
                batch_size=4,
                gradient_accumulation=1,
                epochs=1,
                device="cpu",
                checkpoint_folder=folder,
            )()

    def original() -> None:
        spin.SPINTrainer(
            small(),
            train_sft_dataset=torch.utils.data.TensorDataset(real, lengths),
            max_seq_len=length,
            batch_size=4,
            grad_accum_steps=1,
            epochs=1,
            accelerate_kwargs={"cpu": True},
        )()

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        seconds = in_turns({"ours": ours, "theirs": original}, rounds)
    return compared(f"one whole iteration, {length} tokens", PEER, seconds, axis="tokens", size=length)


def sampling_row(sampling_utils: Any, length: int, rounds: int) -> dict[str, object]:
    _, real, lengths = pairs(VOCABULARY, length)
    prompts = [row[:own] for row, own in zip(real, lengths.tolist(), strict=True)]
    model = small()
    seconds = in_turns(
        {
            "ours": lambda: answer_prompts(
                model, [prompt.tolist() for prompt in prompts], Sampling(max_seq_len=length), 0
            ),
            "theirs": lambda: sampling_utils.sample(
                model, prompts=prompts, seq_len=length, temperature=0.7, filter_kwargs={"thres": 0.9}
            ),
        },
        rounds,
    )
    tokens = sum(length - int(own) for own in lengths)
    return compared(f"answers, {length} tokens", PEER, seconds, tokens_per_second(tokens))


def loss_row(spin: Any, length: int, rounds: int) -> dict[str, object]:
    batch = pairs(VOCABULARY, length)
    losses = {"ours": SPIN(small()), "theirs": spin.SPIN(small())}
    losses["theirs"].update_reference_model_with_policy()
    seconds = in_turns({name: lambda loss=loss: loss(*batch).backward() for name, loss in losses.items()}, rounds)
    return compared(f"loss and gradient, {length} tokens", PEER, seconds)


def step_row(vocabulary: int) -> dict[str, object]:
    ours, formula = (measured(kind, vocabulary, LENGTH) for kind in (SPIN_STORED, DPO))
    return {
        "what": f"log-probability step, vocabulary {vocabulary:,}",
        "threads": torch.get_num_threads(),
        DPO: f"{formula[1]:.2f} s, {formula[0]:.0f} MB",
        "ours": f"{ours[1]:.2f} s, {ours[0]:.0f} MB",
        "times as fast": formula[1] / ours[1],
        "share of the memory": ours[0] / formula[0],
        "axis": "vocabulary",
        "size": vocabulary,
        "unit": "MB",
        "cost": ours[0],
        "peer cost": formula[0],
    }


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    warnings.simplefilter("ignore")
    spin, sampling_utils = original_modules()
    rounds = min(options.rounds, 3)
    rows, steps = [], []
    for _ in thread_counts(options):
        rows += [iteration_row(spin, length, rounds) for length in (84, 168)]
        rows += [sampling_row(sampling_utils, 168, 1), loss_row(spin, 168, rounds)]
        steps += [step_row(vocabulary) for vocabulary in (8_000, 32_000)]
    report("Next to the original, 4 x 256 model, 4 prompts of 16 to 40 tokens", rows, options.json)
    report("Next to DPO's formula, 4 x 256 model, 8 rows of 168 tokens", steps, options.json)


if __name__ == "__main__":
    main()
