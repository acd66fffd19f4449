"""What the memory is worth on held-out standard-library files, read in order: same parameters, same steps.

    nox -s bench -- memorizing_transformer_gain --seeds 0 1 2 --steps 2000

For each seed the same model is trained on the embedded corpus without any memory, with an XL window, and with a window
and a kNN memory of each size; a further one goes on from the XL run with a memory switched on for a few steps
(retrofit). Printed: bits/byte of held-out files, and the gain of the SAME weights with memory on over off, by position
in the file. Several hours on two CPU cores with the defaults; the flags make it smaller.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from measure import arguments, report

from lm_core.checkpoint import latest_checkpoint
from lm_core.corpora import stdlib_corpus
from lm_core.training import seed_everything
from memorizing_transformer import MemorizingTransformer
from memorizing_transformer.evaluation import Evaluation, evaluate
from memorizing_transformer.trainer import MemoryTrainer
from memorizing_transformer.training_settings import TrainingSettings

EOS = 257


def made(options, *, window: int, memories: int) -> MemorizingTransformer:
    return MemorizingTransformer(
        num_tokens=259,
        dim=options.dim,
        depth=options.depth,
        dim_head=32,
        heads=options.dim // 32,
        memorizing_layers=options.layer,
        max_knn_memories=memories,
        xl_max_memories=window,
        clear_memories_on_eos_token_id=EOS,
        segment_length=options.segment,
    )


def train(options, corpus, folder: Path, settings: TrainingSettings, model: MemorizingTransformer) -> Path:
    trainer = MemoryTrainer(model=model, corpus=corpus, checkpoint_dir=folder, settings=settings)
    trainer.train()
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    return newest


def judged(options, corpus, model: MemorizingTransformer, use_memory: bool) -> Evaluation:
    return evaluate(
        model,
        corpus.validation,
        eos_id=EOS,
        segment_length=options.segment,
        batch_size=8,
        max_documents=options.documents,
        use_memory=use_memory,
    )


def bits(evaluation: Evaluation) -> dict[int, float]:
    return {first: loss / 0.6931471805599453 for first, _, loss in evaluation.by_position}


def main() -> None:
    options = arguments(
        __doc__.split("\n")[0],
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        steps={"type": int, "default": 2000},
        retrofit_steps={"type": int, "default": 300},
        sizes={"type": int, "nargs": "+", "default": [8192, 32768]},
        dim={"type": int, "default": 128},
        depth={"type": int, "default": 4},
        layer={"type": int, "default": 3},
        segment={"type": int, "default": 128},
        batch={"type": int, "default": 8},
        documents={"type": int, "default": None},
        variants={"nargs": "+", "default": ["none", "xl", "knn", "retrofit"]},
    )
    torch.set_num_threads(options.threads[0])
    corpus = stdlib_corpus()
    print(f"corpus fingerprint {corpus.fingerprint}")
    rows, gains = [], []
    with tempfile.TemporaryDirectory() as name:
        for seed in options.seeds:
            base = TrainingSettings(
                max_steps=options.steps,
                segment_length=options.segment,
                batch_size=options.batch,
                seed=seed,
                validate_every=10**9,
                checkpoint_every=10**9,
                validation_documents=1,
            )
            plans = [("no memory", 0, options.sizes[0], False)] if "none" in options.variants else []
            plans += [("XL", options.segment, options.sizes[0], False)] if "xl" in options.variants else []
            if "knn" in options.variants:
                plans += [(f"XL + kNN {size}", options.segment, size, True) for size in options.sizes]
            found: dict[str, float] = {}
            for label, window, size, use_memory in plans:
                seed_everything(seed)
                model = made(options, window=window, memories=size)
                folder = Path(name) / f"{seed} {label}"
                newest = train(options, corpus, folder, replace(base, use_memory=use_memory), model)
                on = judged(options, corpus, model, use_memory)
                found[label] = on.bits_per_byte
                if use_memory:
                    off = judged(options, corpus, model, False)
                    gains.append(gain_row(seed, label, on, off))
                if label == "XL" and "retrofit" in options.variants:
                    found["retrofitted XL"] = retrofitted(options, corpus, Path(name), base, newest, seed, gains)
            rows.append({"seed": seed, **found})
            report("Bits per byte of held-out files", rows, options.json)
            report("Same weights, memory off minus on, bits by position in the file", gains, options.json)


def gain_row(seed: int, label: str, on: Evaluation, off: Evaluation) -> dict[str, object]:
    row: dict[str, object] = {"seed": seed, "model": label, "all": off.bits_per_byte - on.bits_per_byte}
    for first, value in bits(on).items():
        row[f"from {first}"] = bits(off)[first] - value
    return row


def retrofitted(options, corpus, folder: Path, base: TrainingSettings, newest: Path, seed: int, gains: list) -> float:
    """The XL run's weights trained on with a memory."""
    model = MemorizingTransformer.from_pretrained(newest, max_knn_memories=options.sizes[-1])
    settings = replace(base, max_steps=options.retrofit_steps, learning_rate=base.learning_rate / 3)
    train(options, corpus, folder / f"{seed} retrofit", settings, model)
    on, off = (judged(options, corpus, model, use_memory) for use_memory in (True, False))
    gains.append(gain_row(seed, "retrofitted XL", on, off))
    return on.bits_per_byte


if __name__ == "__main__":
    main()
