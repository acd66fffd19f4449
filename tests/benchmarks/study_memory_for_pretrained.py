"""A memory and a datastore for a pretrained model: bits/byte on held-out standard-library files, by position.

    nox -s studies -- memory_for_pretrained --model SmolLM2-FOLDER --folder runs/pretrained

For each seed, gates and temperatures of a memory in one layer are trained on the training files for ``--minutes``, with
the model frozen and a window of half of ``--context`` before segments of as many tokens. The first ``--longest`` tokens
of the longest held-out files are scored with the memory on and off (the gain before the first eviction is 0 by
construction), and by the same model with its whole context. A datastore of ``--entries`` states of the training files
gives the gain of kNN-LM; weight and temperature are chosen on other files than reported. Written to the folder:
``results.json`` and ``gain.png``. Without ``--model``, a tiny random model shows that the script runs.
"""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from measure import arguments, machine, report

from lm_core.adapters import as_causal_lm
from lm_core.adapters.loading import load_causal_lm
from lm_core.data.corpora import Corpus, load_corpus
from lm_core.data.documents import Documents
from lm_core.losses.losses import token_log_probs
from lm_core.tokenizers import ByteTokenizer, load_tokenizer
from memorizing_transformer import MemoryAugmentedLM, build_datastore
from memorizing_transformer.model.knn_lm import evaluate_datastore
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.evaluation import Evaluation, evaluate
from memorizing_transformer.training.trainer import MemoryTrainer


def pretrained(options: Namespace) -> Any:
    """The model, or a tiny one with random weights."""
    if options.model is not None:
        return load_causal_lm(options.model)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=ByteTokenizer().vocab_size, **sizes))


def trained(options: Namespace, corpus: Corpus, tokenizer: Any, seed: int) -> MemoryAugmentedLM:
    """The model with a memory, after ``--minutes`` of training."""
    half = options.context // 2
    model = MemoryAugmentedLM(
        pretrained(options),
        layers=options.layer,
        segment_length=half,
        window=half,
        max_memories=options.memories,
        clear_memories_on_eos_token_id=tokenizer.eos_id,
    )
    settings = TrainingSettings(
        segment_length=half,
        batch_size=options.batch,
        max_steps=options.steps,
        max_seconds=60 * options.minutes,
        learning_rate=options.learning_rate,
        validate_every=10**9,
        validation_documents=1,  # none is needed, and the first one cannot be left out
        seed=seed,
        device=options.device,
    )
    folder = options.folder / f"seed-{seed}"
    MemoryTrainer(model=model, corpus=corpus, tokenizer=tokenizer, checkpoint_dir=folder, settings=settings).train()
    return model


def scored(options: Namespace, model: MemoryAugmentedLM, documents: Documents, *, use_memory: bool) -> Evaluation:
    """Bits per byte and by position."""
    return evaluate(
        model,
        documents,
        eos_id=model.eos_id or 0,
        segment_length=model.segment_length,
        batch_size=1,
        use_memory=use_memory,
        # the memory of a document is empty as long as the window holds all of it
        ranges=(0, *(model.window * 2**power for power in range(9))),
    )


def beginnings(documents: Documents, longest: int) -> Documents:
    """The first ``longest`` tokens of each document, with their share of its bytes."""
    lengths = documents.lengths.clip(max=longest)
    sizes = documents.byte_lengths * lengths // documents.lengths
    return Documents(ids=documents.ids, starts=documents.starts, lengths=lengths, byte_lengths=sizes)


def with_whole_context(model: Any, documents: Documents) -> float:
    """Bits per byte of the model on documents, each whole in its context."""
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for document in documents:
            ids = torch.from_numpy(document.astype("int64"))[None]
            nats -= float(token_log_probs(as_causal_lm(model), ids.to(model.device)).double().sum())
            tokens += ids.shape[1] - 1
    return nats / math.log(2) / tokens * documents.num_tokens / documents.num_bytes


def draw(options: Namespace, runs: list[dict[str, Any]]) -> Path | None:
    """``gain.png``: bits per token by position, one colour a variant, with window and first eviction marked."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, variant in enumerate(("without memory", "with memory")):
        for run in runs:
            positions, values = zip(*run[variant], strict=True)
            label = variant if run is runs[0] else None
            axes.plot(
                [max(options.context / 4, p) for p in positions],
                values,
                marker="o",
                color=f"C{number}",
                alpha=0.7,
                label=label,
            )
    axes.axvspan(
        options.context / 2, options.context, color="grey", alpha=0.12, label=f"window and segment ({options.context})"
    )
    axes.axvline(options.context / 2, color="black", linestyle=":", label="first eviction, at the earliest")
    axes.set(xscale="log", xlabel="position in the file, from (tokens)", ylabel="bits per token, a line a seed")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.folder / "gain.png", dpi=110)
    plt.close(figure)
    return Path(options.folder / "gain.png")


def main() -> None:
    options = arguments(
        (__doc__ or "").split("\n")[0],
        model={"help": "folder of a transformers model with its tokenizer"},
        folder={"type": Path, "default": Path("runs/memory-for-pretrained")},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        minutes={"type": float, "default": 15.0},
        steps={"type": int, "default": 200},
        layer={"type": int},
        context={"type": int, "default": 512},
        memories={"type": int, "default": 32_768},
        batch={"type": int, "default": 4},
        learning_rate={"type": float, "default": 0.03},
        documents={"type": int, "default": 8, "help": "held-out files to score"},
        longest={"type": int, "default": 8192, "help": "tokens of a held-out file to score"},
        entries={"type": int, "default": 200_000},
        device={"default": "auto"},
    )
    tokenizer = ByteTokenizer() if options.model is None else load_tokenizer(options.model)
    corpus = load_corpus("stdlib", tokenizer=tokenizer)
    options.folder.mkdir(parents=True, exist_ok=True)
    longest_first = corpus.validation.lengths.argsort()[::-1]
    held_out = beginnings(corpus.validation.select(longest_first[: options.documents]), options.longest)
    runs, rows = [], []
    for seed in options.seeds:
        model = trained(options, corpus, tokenizer, seed)
        off, on = (scored(options, model, held_out, use_memory=use) for use in (False, True))
        by_position = {
            name: [(first, nats / math.log(2)) for first, _, nats in one.by_position]
            for name, one in (("without memory", off), ("with memory", on))
        }
        runs.append({"seed": seed, **by_position})
        rows.append({"seed": seed, "without memory": off.bits_per_byte, "with memory": on.bits_per_byte})
    report("Memory for a pretrained model, bits/byte", rows, options.json)
    # the model alone, with its whole context, and with a datastore
    base = model.model.eval()
    some = corpus.train[: max(1, int((corpus.train.lengths.cumsum() <= options.entries).sum()))]
    reading = {"segment_length": options.context // 2, "window": options.context // 2}
    store = build_datastore(base, some, options.folder / "datastore", tokenizer=tokenizer, progress=True, **reading)
    knn = evaluate_datastore(base, store, held_out, progress=True, **reading)
    whole = with_whole_context(base, held_out)
    row = {"entries": len(store), "without": knn.without, "with": knn.with_datastore, "lambda": knn.lambda_}
    report("kNN-LM, bits/byte", [{**row, "temperature": knn.temperature, "whole context": whole}], options.json)
    results = {"machine": machine(), "memory": runs, "bits_per_byte": rows, "knn": row, "whole_context": whole}
    (options.folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"wrote {draw(options, runs)}")


if __name__ == "__main__":
    main()
