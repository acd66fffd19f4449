"""What the memory is worth on held-out standard-library files, read in order: same parameters, same steps, same data.

    nox -s studies -- memorizing_transformer_gain --folder runs/gain --jobs 2 --precision bf16

For each seed one model is trained four times on the embedded corpus: without any memory, with a Transformer-XL
window, and with that window and a kNN memory of 8k and of 32k tokens. The XL model is then trained on for a few steps,
once with a memory (retrofit) and once without (what the further steps alone are worth).

All are judged on the held-out files past 32k bytes; those with a kNN memory twice, with the memory on and off, by
position in the file. Tokens are byte-pair tokens learned from the training files, 2.7 bytes each (``--vocabulary 0``:
bytes). Written to the folder: one JSON file a run, as soon as it is done, ``results.json`` with all of them, and
``curves.png``. What is there already is not made again, so the study can be stopped and continued; ``--minutes``
begins no further run after so long. ``--jobs`` trains so many at a time, each in a process of its own.

About 100 minutes on two cores that multiply in bfloat16 with the defaults; ``--device cuda --jobs 18`` trains all at
once on one GPU.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from measure import arguments, machine, report

from lm_core.checkpoints.atomic_io import new_directory
from lm_core.checkpoints.checkpoint import latest_checkpoint
from lm_core.data.corpora import Corpus, stdlib_corpus
from lm_core.data.documents import Documents, tokenise
from lm_core.rng import seed_everything
from lm_core.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from lm_core.training.metrics import read_metrics
from memorizing_transformer import MemorizingTransformer, open_gates
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.evaluation import Evaluation, evaluate
from memorizing_transformer.training.trainer import MemoryTrainer

LONG = 32768
# Part of the files that is held out.
HELD_OUT = 0.15
NONE, XL, RETROFIT, CONTROL = "no memory", "XL", "XL, then memory", "XL, then the same steps without"

# To learn from, to judge by, and what both are encoded with.
Data = tuple[Corpus, Documents, Tokenizer]


def knn(size: int) -> str:
    return f"XL + kNN {size}"


def settings_of(options: Namespace, seed: int, **changes: Any) -> TrainingSettings:
    return TrainingSettings(
        **{
            "max_steps": options.steps,
            "segment_length": options.segment,
            "batch_size": options.batch,
            "learning_rate": options.learning_rate,
            "seed": seed,
            "validate_every": 10**9,
            "checkpoint_every": options.checkpoint_every,
            "keep_checkpoints": 1,
            "validation_documents": 1,
            "device": options.device,
            "precision": options.precision,
            **changes,
        }
    )


def tokenizer_of(options: Namespace) -> Tokenizer:
    """Bytes, or byte-pair tokens learned from the training files once and kept in the folder."""
    if options.vocabulary == 0:
        return ByteTokenizer()
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    target = options.folder / "tokenizer"
    with FileLock(f"{target}.lock"):  # runs side by side share it
        if not target.is_dir():
            texts = stdlib_corpus(validation_fraction=HELD_OUT).train
            fast = Fast(models.BPE())
            fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            fast.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=options.vocabulary,
                special_tokens=["<eos>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            fast.train_from_iterator(
                (bytes_of(document).decode("utf-8", errors="replace") for document in texts), trainer
            )
            with new_directory(target) as temporary:
                PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>").save_pretrained(temporary)
    return load_tokenizer(target)


def bytes_of(document: Any) -> bytes:
    return bytes(document.astype("uint8"))


def new_model(
    options: Namespace, seed: int, tokenizer: Tokenizer, *, window: int, memories: int
) -> MemorizingTransformer:
    seed_everything(seed)
    return MemorizingTransformer(
        num_tokens=tokenizer.vocab_size,
        dim=options.dim,
        depth=options.depth,
        dim_head=options.dim_head,
        heads=options.heads,
        knn_attn_heads=options.knn_heads,
        memorizing_layers=options.layer,
        max_knn_memories=memories,
        gate=options.gate,
        xl_max_memories=window,
        clear_memories_on_eos_token_id=tokenizer.eos_id,
        segment_length=options.segment,
    )


def trained(
    folder: Path, model: MemorizingTransformer, corpus: Corpus, tokenizer: Tokenizer, settings: TrainingSettings
) -> float:
    """Trains ``model`` in place, leaves it in ``folder/model``; the seconds that took."""
    started = time.monotonic()
    trainer = MemoryTrainer(model=model, corpus=corpus, checkpoint_dir=folder, tokenizer=tokenizer, settings=settings)
    result = trainer.train()
    if result.outcome != "finished":
        raise SystemExit(f"stopped at update {result.step} of {folder}; the same command goes on from there")
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    model.save_pretrained(folder / "model", overwrite=True)
    shutil.rmtree(folder / "checkpoints")  # with their memories they take a hundred megabytes each
    return time.monotonic() - started


def judged(options: Namespace, documents: Documents, model: MemorizingTransformer, use_memory: bool) -> Evaluation:
    return evaluate(
        model,
        documents,
        eos_id=model.eos_id,
        segment_length=options.segment,
        batch_size=len(documents),
        use_memory=use_memory,
        # whatever a segment a file begins in, nothing has left the window before position segment + 1
        ranges=(0, options.segment + 1, 512, 2048, 8192, 16384, LONG),
    )


def bits(evaluation: Evaluation, documents: Documents) -> dict[int, float]:
    """Bits a byte by first position of the range, every token taken for as many bytes as all have in the mean."""
    scale = documents.num_tokens / documents.num_bytes / math.log(2)
    return {first: loss * scale for first, _, loss in evaluation.by_position}


def found(options: Namespace, documents: Documents, model: MemorizingTransformer, memory: bool) -> dict[str, Any]:
    """What a model is judged to be, with memory and without."""
    on = judged(options, documents, model, memory)
    result: dict[str, Any] = {"bits_per_byte": on.bits_per_byte, "by_position": bits(on, documents)}
    if memory:
        off = judged(options, documents, model, use_memory=False)
        result["memory_off"] = off.bits_per_byte
        without = bits(off, documents)
        result["gain_by_position"] = {first: without[first] - value for first, value in bits(on, documents).items()}
    return result


def run(options: Namespace, label: str, seed: int, folder: Path, data: Data) -> dict[str, Any]:
    """Trains and judges one variant."""
    corpus, documents, tokenizer = data
    uses_memory = label not in (NONE, XL, CONTROL)
    settings = settings_of(options, seed, use_memory=uses_memory)
    if label in (RETROFIT, CONTROL):
        base = folder.parent / folder_name(XL) / "model"
        model = MemorizingTransformer.from_pretrained(base, max_knn_memories=options.sizes[-1])
        if uses_memory:
            open_gates(model, options.retrofit_gate)
        # other documents than the base began with
        rate = options.learning_rate * options.retrofit_rate
        settings = replace(settings, max_steps=options.retrofit_steps, learning_rate=rate, seed=seed + 1000)
    else:
        size = next((size for size in options.sizes if label == knn(size)), options.sizes[0])
        model = new_model(options, seed, tokenizer, window=0 if label == NONE else options.segment, memories=size)
    seconds = trained(folder, model, corpus, tokenizer, settings)
    return {
        "seed": seed,
        "variant": label,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": settings.max_steps,
        "training_seconds": round(seconds),
        "machine": machine(),
        **found(options, documents, model, uses_memory),
    }


def folder_name(label: str) -> str:
    return label.replace(",", "").replace(" ", "-").replace("+", "and").lower()


def summary(results: list[dict[str, Any]], sizes: list[int], path: Path | None) -> None:
    """Three tables: bits/byte by variant and seed, the retrofit, and gains by position."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for one in results:
        by_seed.setdefault(one["seed"], {})[one["variant"]] = one
    rows, retrofits, gains = [], [], []
    for seed, variants in sorted(by_seed.items()):
        rows.append({"seed": seed, **{label: one["bits_per_byte"] for label, one in variants.items()}})
        best = knn(sizes[-1])
        if all(label in variants for label in (XL, best, RETROFIT, CONTROL)):
            value = {label: variants[label]["bits_per_byte"] for label in (XL, best, RETROFIT, CONTROL)}
            whole = value[XL] - value[best]
            retrofits.append(
                {
                    "seed": seed,
                    "gain of a memory from the start": whole,
                    "steps, part of the base's": variants[RETROFIT]["steps"] / variants[XL]["steps"],
                    # against equally many steps without a memory, which lower the loss too
                    "recovered": (value[CONTROL] - value[RETROFIT]) / whole,
                    "recovered, and what the steps alone give": (value[XL] - value[RETROFIT]) / whole,
                    "same weights on and off, against those of a memory from the start": (
                        (variants[RETROFIT]["memory_off"] - value[RETROFIT])
                        / (variants[best]["memory_off"] - value[best])
                    ),
                }
            )
        for label, one in variants.items():
            if "gain_by_position" in one:
                by_position = {f"from {first}": gain for first, gain in one["gain_by_position"].items()}
                gains.append({"seed": seed, "variant": label, "all": one["memory_off"] - one["bits_per_byte"]})
                gains[-1] |= by_position
    if len(rows) > 1:
        labels = [label for label in rows[0] if label != "seed" and all(label in row for row in rows)]
        rows.append({"seed": "mean", **{label: statistics.mean(row[label] for row in rows) for label in labels}})
    report("Bits per byte of held-out files past 32k bytes", rows, path)
    report("Retrofit", retrofits, path)
    report("Same weights, memory off minus on, bits per byte by position in the file", gains, path)


def draw(results: list[dict[str, Any]], folder: Path) -> Path | None:
    """``curves.png``: training, and the gain by position of every seed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    labels = list(dict.fromkeys(one["variant"] for one in results))
    for number, label in enumerate(labels):
        runs = [one for one in results if one["variant"] == label]
        if label not in (RETROFIT, CONTROL):
            series = [training_curve(folder / f"seed-{one['seed']}" / folder_name(label)) for one in runs]
            length = min(len(values) for values in series)
            mean = [statistics.mean(values[at] for values in series) for at in range(length)]
            left.plot([25 * (at + 1) for at in range(length)], mean, color=f"C{number}", label=label)
        for one in runs:
            if "gain_by_position" in one:
                positions = [int(first) for first in one["gain_by_position"]]
                right.plot(
                    range(len(positions)),
                    list(one["gain_by_position"].values()),
                    color=f"C{number}",
                    linestyle="--" if label == RETROFIT else "-",
                    marker="o",
                    alpha=0.7,
                    label=label if one is runs[0] else None,
                )
                right.set_xticks(range(len(positions)), [f"{position:,}" for position in positions])
    left.set(xlabel="update", ylabel="bits/byte in training (mean of 25 updates and of seeds)", title="Training")
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(
        xlabel="position in the file, from",
        ylabel="bits/byte, memory off minus on",
        title="Held-out files: gain of the same weights, a line a seed",
    )
    for one in (left, right):
        one.legend(frameon=False)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
    return folder / "curves.png"


def training_curve(folder: Path, width: int = 25) -> list[float]:
    values = [
        row["train_bits_per_byte"] for row in read_metrics(folder / "metrics.jsonl") if "train_bits_per_byte" in row
    ]
    return [statistics.mean(values[at : at + width]) for at in range(0, len(values) - width + 1, width)]


def job(label: str, seed: int) -> int:
    """Runs this command for one variant and seed in a process of its own; its exit status."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", label, "--seeds", str(seed)]
    return subprocess.run(command, check=False).returncode


def side_by_side(jobs: int, labels: list[str], seeds: list[int]) -> None:
    """One process a run, ``jobs`` of them at a time; what starts from another's weights waits for it."""
    later = [label for label in labels if label in (RETROFIT, CONTROL)]
    with ThreadPoolExecutor(jobs) as pool:
        first = [(label, seed) for label in labels if label not in later for seed in seeds]
        started = {of: pool.submit(job, *of) for of in first}
        failed = [of for of, future in started.items() if of[0] == XL and future.result() != 0]
        started |= {(label, seed): pool.submit(job, label, seed) for label in later for seed in seeds}
        failed += [of for of, future in started.items() if of not in failed and future.result() != 0]
    if failed:
        print(f"failed: {failed}", file=sys.stderr)


def main() -> None:
    options = arguments(
        (__doc__ or "").split("\n")[0],
        folder={"type": Path, "default": Path("runs/memorizing-gain")},
        minutes={"type": float, "default": 1e9},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        variants={"nargs": "+", "default": ["none", "xl", "knn", "retrofit"]},
        sizes={"type": int, "nargs": "+", "default": [8192, 32768]},
        steps={"type": int, "default": 2720},
        retrofit_steps={"type": int, "default": 408},
        retrofit_rate={"type": float, "default": 0.3, "help": "peak learning rate over that of the base"},
        retrofit_gate={"type": float, "default": 0.5, "help": "how far gates are opened; they begin at 0.12"},
        learning_rate={"type": float, "default": 2e-3},
        dim={"type": int, "default": 256},
        depth={"type": int, "default": 3},
        layer={"type": int, "default": 2},
        heads={"type": int, "default": 4},
        knn_heads={"type": int, "default": 4},
        dim_head={"type": int, "default": 64},
        gate={"choices": ["sigmoid", "softmax"], "default": "sigmoid"},
        segment={"type": int, "default": 64},
        batch={"type": int, "default": 16},
        documents={"type": int, "default": 12, "help": "held-out files past 32k bytes to judge by"},
        judged_bytes={"type": int, "default": 131072, "help": "of each, from its beginning"},
        vocabulary={"type": int, "default": 1024, "help": "byte-pair tokens; 0: bytes"},
        device={"default": "cpu"},
        precision={"choices": ["auto", "fp32", "bf16"], "default": "auto"},
        checkpoint_every={"type": int, "default": 500},
        jobs={"type": int, "default": 1, "help": "runs at a time"},
        one={"default": "", "help": "of the variants, this one alone, and no tables"},
    )
    torch.set_num_threads(options.threads[0])
    started = time.monotonic()
    labels = [XL] if "xl" in options.variants else []
    labels += [knn(size) for size in reversed(options.sizes)] if "knn" in options.variants else []
    labels += [RETROFIT, CONTROL] if "retrofit" in options.variants else []
    labels += [NONE] if "none" in options.variants else []
    if options.jobs > 1 and not options.one:
        side_by_side(options.jobs, labels, options.seeds)
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        tokenizer = tokenizer_of(options)
        corpus = stdlib_corpus(validation_fraction=HELD_OUT, tokenizer=tokenizer)
        in_bytes = stdlib_corpus(validation_fraction=HELD_OUT)
        long = [document for document in in_bytes.validation if len(document) > LONG][: options.documents]
        documents = tokenise([bytes_of(one[: options.judged_bytes]) for one in long], tokenizer=tokenizer)
        print(
            f"corpus fingerprint {in_bytes.fingerprint[:16]}: {corpus.train.num_bytes:,} bytes in "
            f"{corpus.train.num_tokens:,} tokens to learn from, judged on {len(documents)} files of "
            f"{documents.num_bytes:,} bytes in {documents.num_tokens:,} tokens"
        )
        for seed in options.seeds:
            for label in [options.one] if options.one else labels:
                folder = options.folder / f"seed-{seed}" / folder_name(label)
                target = folder / "result.json"
                if target.is_file() or time.monotonic() - started > 60 * options.minutes:
                    continue
                result = run(options, label, seed, folder, (corpus, documents, tokenizer))
                target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                print(f"seed {seed}, {label}: {result['bits_per_byte']:.4f} bits/byte", flush=True)
        if options.one:
            return
    results = []
    for seed in options.seeds:
        for label in (NONE, XL, *map(knn, options.sizes), RETROFIT, CONTROL):
            file = options.folder / f"seed-{seed}" / folder_name(label) / "result.json"
            if file.is_file():
                results.append(json.loads(file.read_text(encoding="utf-8")))
    (options.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    summary(results, options.sizes, options.json)
    print(f"\ncurves {draw(results, options.folder)}")


if __name__ == "__main__":
    main()
