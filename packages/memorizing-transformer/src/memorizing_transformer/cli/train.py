"""The command ``train``: a typed function, whose signature and docstring define flags and their help."""

from pathlib import Path
from typing import Any, Literal

import torch

from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import CheckpointError, json_value
from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import report, report_run
from lm_core.data.documents import Documents
from lm_core.distributed import rank, world_size
from lm_core.rng import seed_everything
from lm_core.tokenizers import continuation_text, end_ids
from lm_core.training.run_directory import Result
from memorizing_transformer.cli.models import augmented_arguments, open_model, stored_arguments, stored_class
from memorizing_transformer.cli.retrieval_report import gain_by_position, retrieved_while_generating, write_page
from memorizing_transformer.model.augmented import MemoryAugmentedLM
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.retrofit import open_gates, retrofit


def train(
    *,
    text: TextCorpus,
    architecture: dict[str, Any],
    settings: TrainingSettings,
    preset: Literal["quickstart", "small", "base", "large", "paper"] | None = None,
    model: str | None = None,
    lora_r: int | None = None,
    checkpoint_dir: str = "runs/memorizing-transformer",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
    sample_tokens: int = 120,
) -> int:
    """Trains a Memorizing Transformer on documents in order.

    Args:
        text: training text.
        architecture: arguments of ``MemorizingTransformer``.
        settings: training settings.
        preset: sizes of the model and the learning rate that fits them, with the memory in the layer three quarters up;
            a flag next to it wins. By default quickstart without data and model, and small with own data.
        model: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained, or a name on the hub,
            with the initial weights, sizes and tokenizer. Sigmoid gates that were never trained start at a half; a
            model without memorizing layers gets those of memorizing_layers. A transformers model gets a memory in
            memorizing_layers, with an xl_max_memories window, whose gates are trained while the model is frozen.
        lora_r: rank of LoRA adapters that are trained as well, in a transformers model; null for none.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl, curves.png and retrieved.html.
        sample_tokens: new tokens after a held-out document, generated at the end as a sample; 0 for none.
    """
    from memorizing_transformer.training.trainer import MemoryTrainer

    if lora_r is not None and model is None:
        raise ValueError(f"lora_r is for a transformers model, but model is None, got lora_r {lora_r}")
    if model is not None and preset is not None:
        raise ValueError(f"preset {preset} is for a new model, but model is {model}, which has its own sizes")
    encoder, data = text.load()
    seed_everything(settings.seed)
    if model is None:
        if architecture["memorizing_layers"] is None:
            # three quarters up, as the paper's ninth of twelve
            architecture = {**architecture, "memorizing_layers": max(1, 3 * architecture["depth"] // 4)}
        ends: dict[str, Any] = {"clear_memories_on_eos_token_id": encoder.eos_id}
        memorizing: MemorizingTransformer | MemoryAugmentedLM = MemorizingTransformer(
            num_tokens=encoder.vocab_size, **ends, **architecture
        )
    else:
        memorizing = _initial_model(model, architecture, encoder.eos_id, lora_r)
        if isinstance(memorizing, MemorizingTransformer) and settings.use_memory and open_gates(memorizing):
            report("gates", "opened to a half: the model was trained without its memory")
    trainer = MemoryTrainer(
        model=memorizing,
        corpus=data,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        settings=settings,
        resume=resume,
        trackers=trackers or (),
    )
    # summary of the run
    millions = sum(parameter.numel() for parameter in memorizing.parameters()) / 1e6
    source = f"preset {preset}" if model is None else model
    report(
        "model", f"{source}, {millions:.2f} million parameters, memory in layer(s) {[*memorizing.memorizing_layers]}"
    )
    window = memorizing.window if isinstance(memorizing, MemoryAugmentedLM) else memorizing.xl_max_memories
    report("memory", f"{memorizing.max_knn_memories:,} tokens a row; window of {window}")
    if isinstance(memorizing, MemoryAugmentedLM):
        adapters = " and LoRA adapters" if hasattr(memorizing.model, "peft_config") else ""
        trained = sum(parameter.numel() for parameter in memorizing.trainable_parameters())
        report("trained", f"{trained:,} numbers: gates and temperatures{adapters}")
    report("data", f"{text.data}: {data.train.size} for training, {data.validation.size} held out")
    report("", f"fingerprint {data.fingerprint[:16]}")
    report(
        "run",
        f"{checkpoint_dir}, {settings.max_steps} updates at a learning rate of {settings.learning_rate:g}, "
        f"{trainer.device}, {world_size()} process(es)",
    )
    result = trainer.train()
    # results
    lines = [("held out", f"{result.first_bits_per_byte:.3f} bits/byte before training")]
    results = []
    if result.last is not None:
        last = result.last.bits_per_byte
        lines.append(("", f"{last:.3f} bits/byte at the last validation, {result.step} updates done"))
        results.append(Result("held-out bits/byte", last, before=result.first_bits_per_byte))
        if result.without_memory is not None:
            without = result.without_memory.bits_per_byte
            lines.append(("", f"{without:.3f} bits/byte of the same weights without memory"))
            lines += [("", line) for line in gain_by_position(result.last, result.without_memory)]
            results.append(Result("held-out bits/byte, without -> with memory", last, before=without))
    status = report_run(
        "memorizing-transformer", result, checkpoint_dir, max_steps=settings.max_steps, lines=lines, results=results
    )
    if result.outcome == "finished" and sample_tokens and rank() == 0 and memorizing.memorizing_layers:
        _show_retrieval(memorizing.eval(), data.validation, encoder, sample_tokens, Path(checkpoint_dir))
    return status


def _initial_model(
    source: str, architecture: dict[str, Any], eos_id: int | None, lora_r: int | None
) -> MemorizingTransformer | MemoryAugmentedLM:
    """The stored model; arguments that differ from its own replace them, and may add memorizing layers."""
    folder = checkpoint_folder(source)
    kind = stored_class(folder)
    if kind is None:
        arguments = augmented_arguments(architecture)
        return MemoryAugmentedLM(
            load_causal_lm(folder), clear_memories_on_eos_token_id=eos_id, lora_r=lora_r, **arguments
        )
    if lora_r is not None:
        raise ValueError(f"lora_r is for a transformers model, but model {source} is a {kind}, got lora_r {lora_r}")
    stored = stored_arguments(folder)
    changed = {name: value for name, value in architecture.items() if json_value(value) != stored.get(name)}
    if kind == MemoryAugmentedLM.__name__:
        changed = {name: value for name, value in changed.items() if name in stored}
    if not stored or not changed:
        return open_model(folder)
    if changed.get("memorizing_layers") and stored.get("memorizing_layers") == []:
        return retrofit(MemorizingTransformer.from_pretrained(folder), **changed)
    try:
        return open_model(folder, **changed)
    except CheckpointError as error:
        raise ValueError(f"model {source} cannot take other values of {', '.join(changed)}: {error}") from error


def _show_retrieval(
    model: MemorizingTransformer | MemoryAugmentedLM, documents: Documents, encoder: Any, new_tokens: int, folder: Path
) -> None:
    """Continues a held-out document of about 6,000 tokens, and writes a page of the retrieved tokens."""
    lengths = [abs(int(length) - 6000) for length in documents.lengths]
    document = torch.from_numpy(documents[lengths.index(min(lengths))].astype("int64"))[:6000]
    prompt = document[: -min(200, len(document) // 2)].to(model.device)
    generated = retrieved_while_generating(
        model, prompt, max_new_tokens=new_tokens, temperature=0.7, eos_id=end_ids(encoder, model)
    )
    page = write_page(folder / "retrieved.html", prompt, generated, encoder)
    report("retrieved", f"{page} shows what the memory returned while this was generated:\n")
    tokens = [new.token for new in generated]
    print(encoder.decode(prompt[-120:]) + "|" + continuation_text(encoder, prompt.tolist(), tokens))
