"""The commands themselves: typed functions, from whose signatures and docstrings flags and their help are made.

Each returns the exit status.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.main import print_resume_hint, say
from lm_core.cli.text_generation import TextGeneration, open_prompt, print_continuations
from lm_core.data.corpora import held_out_documents, load_corpus
from lm_core.data.documents import Documents
from lm_core.distributed import rank, world_size
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device
from lm_core.training.run_directory import Result, write_summary
from memorizing_transformer.cli.retrieval_report import retrieved_while_generating, write_page
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.evaluation import Evaluation, evaluate
from memorizing_transformer.training.retrofit import open_gates


def train(
    *,
    model: dict[str, Any],
    settings: TrainingSettings,
    corpus: str = "stdlib",
    field: str = "text",
    tokenizer: str = "bytes",
    validation_fraction: float = 0.05,
    cache_dir: str | None = None,
    checkpoint_dir: str = "runs/memorizing-quickstart",
    start_from: str | None = None,
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
    sample_tokens: int = 120,
) -> int:
    """Trains a Memorizing Transformer on documents in order.

    Args:
        model: arguments of ``MemorizingTransformer``.
        settings: of the training.
        corpus: "stdlib" (Python's own library), a .txt, .jsonl or .jsonl.gz file, any other file as bytes, or a folder.
        field: of a .jsonl line, the text.
        tokenizer: "bytes", a folder with a Hugging Face tokenizer, or organisation/name on the hub.
        validation_fraction: how much of the corpus is held out.
        cache_dir: where to keep the tokenised corpus, memory-mapped; without it, in memory.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl, curves.png and retrieved.html.
        start_from: folder of a run or a model whose weights to begin with, for retrofitting a memory; its own sizes
            are kept, and max_knn_memories is taken from here. Sigmoid gates that were never trained begin at a half.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: of accelerate, such as [tensorboard].
        sample_tokens: how far the trained model continues a held-out document at the end; 0 for not at all.

    Returns:
        The exit status.
    """
    from memorizing_transformer.training.trainer import MemoryTrainer

    encoder = load_tokenizer(tokenizer)
    data = load_corpus(
        corpus, tokenizer=encoder, field=field, validation_fraction=validation_fraction, cache_dir=cache_dir
    )
    seed_everything(settings.seed)
    if start_from is None:
        ends: dict[str, Any] = {"clear_memories_on_eos_token_id": encoder.eos_id}
        memorizing = MemorizingTransformer(num_tokens=encoder.vocab_size, **ends, **model)
    else:
        memorizing = MemorizingTransformer.from_pretrained(
            checkpoint_folder(start_from), max_knn_memories=model["max_knn_memories"]
        )
        if settings.use_memory and open_gates(memorizing):
            say("gates       of a model that was trained without its memory: opened to a half")
    trainer = MemoryTrainer(
        model=memorizing,
        corpus=data,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        settings=settings,
        resume=resume,
        trackers=trackers or (),
    )
    millions = sum(parameter.numel() for parameter in memorizing.parameters()) / 1e6
    say(f"model       {millions:.2f} million parameters, memory in layer(s) {list(memorizing.memorizing_layers)}")
    say(f"memory      {memorizing.max_knn_memories:,} tokens a row; XL window of {memorizing.xl_max_memories}")
    say(f"corpus      {corpus}: {data.train.size} to learn from, {data.validation.size} held out")
    say(f"            fingerprint {data.fingerprint[:16]}")
    say(f"run         {checkpoint_dir}, {settings.max_steps} updates, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
    if result.first_step == settings.max_steps:
        say("            finished before; another --checkpoint_dir trains anew")
    say(f"held out    {result.first_bits_per_byte:.3f} bits/byte before training")
    if result.last is not None:
        say(f"            {result.last.bits_per_byte:.3f} bits/byte at the last validation, {result.step} updates done")
        if result.without_memory is not None:
            say(f"            {result.without_memory.bits_per_byte:.3f} bits/byte of the same weights without memory")
            say(_positions(result.last, result.without_memory))
    say(f"checkpoint  {result.checkpoints / f'step-{result.step}'}")
    say(f"metrics     {Path(checkpoint_dir) / 'metrics.jsonl'}")
    say(f"curves      {result.curves or 'not drawn: pip install matplotlib, then run the same command again'}")
    if result.outcome != "finished":
        return print_resume_hint("memorizing-transformer", result.outcome, result.step, settings.max_steps)
    if rank() == 0 and result.last is not None:  # None: finished before, and summed up then
        last, without = result.last.bits_per_byte, result.without_memory
        results = [Result("held-out bits/byte", last, before=result.first_bits_per_byte)]
        if without is not None:
            results.append(Result("held-out bits/byte, without -> with memory", last, before=without.bits_per_byte))
        write_summary(checkpoint_dir, results, steps=result.step, seconds=result.seconds)
    if sample_tokens and rank() == 0 and memorizing.memorizing_layers:
        _show_retrieval(memorizing.eval(), data.validation, encoder, sample_tokens, Path(checkpoint_dir))
    return 0


def _show_retrieval(
    model: MemorizingTransformer, documents: Documents, encoder: Any, new_tokens: int, folder: Path
) -> None:
    lengths = [abs(int(length) - 6000) for length in documents.lengths]
    document = torch.from_numpy(documents[lengths.index(min(lengths))].astype("int64"))[:6000]
    prompt = document[: -min(200, len(document) // 2)].to(model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    generated = retrieved_while_generating(
        model, prompt, max_new_tokens=new_tokens, temperature=0.7, eos_id=encoder.eos_id, generator=generator
    )
    page = write_page(folder / "retrieved.html", prompt.cpu(), generated, encoder)
    print(f"retrieved   {page} shows what the memory gave while this was generated:\n")
    print(encoder.decode(prompt[-120:]) + "|" + encoder.decode([one.token for one in generated]))


def generate(checkpoint: str, prompt: str, *, settings: TextGeneration) -> int:
    """Continues a prompt, which goes into the memory as far as it is long, and prints it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: the text to continue; "-" reads it from standard input, "@FILE" from a file.
        settings: of the generation.

    Returns:
        The exit status.
    """
    print_continuations(MemorizingTransformer, checkpoint, prompt, settings)
    return 0


def evaluate_checkpoint(
    checkpoint: str,
    *,
    corpus: str = "stdlib",
    field: str = "text",
    tokenizer: str | None = None,
    segment_length: int | None = None,
    batch_size: int = 4,
    max_documents: int | None = None,
    max_knn_memories: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
) -> int:
    """Prints how well a checkpoint predicts documents, with memory and without, by position.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        corpus: "stdlib" for the held-out part of Python's library, or a file or folder, read whole.
        field: of a .jsonl line, the text.
        tokenizer: instead of the one in the checkpoint.
        segment_length: tokens a segment; the model's by default.
        batch_size: documents at a time.
        max_documents: only so many; null for all.
        max_knn_memories: another size of the memory.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    documents = held_out_documents(corpus, tokenizer=encoder, field=field)
    sizes: dict[str, Any] = {} if max_knn_memories is None else {"max_knn_memories": max_knn_memories}
    model = MemorizingTransformer.from_pretrained(folder, **sizes).to(pick_device(device))
    if encoder.eos_id is None:
        raise ValueError(f"tokenizer must have an EOS, which ends documents, got {encoder!r}")
    settings: dict[str, Any] = {
        "eos_id": encoder.eos_id,
        "segment_length": segment_length or model.segment_length,
        "batch_size": batch_size,
        "max_documents": max_documents,
        "precision": precision,
        "progress": True,
    }
    on = evaluate(model, documents, **settings)
    print(f"{on.bits_per_byte:.4f} bits/byte, {on.loss:.4f} nats/token over {on.tokens:,} tokens")
    if model.memorizing_layers:
        off = evaluate(model, documents, use_memory=False, **settings)
        print(f"{off.bits_per_byte:.4f} bits/byte without memory")
        print(_positions(on, off))
    return 0


def inspect_checkpoint(
    checkpoint: str,
    *,
    prompt: str | None = None,
    page: str = "retrieved.html",
    max_new_tokens: int = 100,
    layer: int = 0,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "auto",
) -> int:
    """Prints what a checkpoint is; with a prompt, writes a page of what the memory gave while continuing it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: a text longer than a segment; "-" reads it from standard input, "@FILE" from a file.
        page: the page to write.
        max_new_tokens: how far to continue.
        layer: which of the memorizing layers, counted from 0.
        seed: of the draws.
        tokenizer: instead of the one in the checkpoint.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    folder = checkpoint_folder(checkpoint)
    model = MemorizingTransformer.from_pretrained(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    print(json.dumps(model.config["arguments"], indent=2))
    for number, attention in zip(model.memorizing_layers, model.memory_attentions(), strict=True):
        scales = ", ".join(f"{scale:.1f}" for scale in attention.log_scale.exp().flatten().tolist())
        print(f"layer {number}: temperature of each head {scales}")
    if prompt is None:
        return 0
    opened = open_prompt(MemorizingTransformer, checkpoint, prompt, tokenizer=tokenizer, device=device)
    model, encoder, ids = opened.model, opened.tokenizer, opened.ids
    generator = torch.Generator(model.device).manual_seed(seed)
    generated = retrieved_while_generating(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        layer=layer,
        temperature=0.7,
        eos_id=encoder.eos_id,
        generator=generator,
    )
    print(f"wrote {write_page(page, ids.cpu(), generated, encoder)}")
    return 0


def convert(
    old: str, directory: str, *, dim_head: int = 64, tokenizer: str | None = None, overwrite: bool = False
) -> int:
    """Turns a weight file of memorizing-transformers-pytorch into a folder that ``from_pretrained`` opens.

    Args:
        old: file with the state dict.
        directory: where to write.
        dim_head: features of a head, as the original was made with.
        tokenizer: to store with the model: "bytes", a folder, or organisation/name on the hub.
        overwrite: whether a folder with content may be written to.

    Returns:
        The exit status.
    """
    from memorizing_transformer.interop import convert_checkpoint

    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    print(f"wrote {convert_checkpoint(old, directory, dim_head=dim_head, overwrite=overwrite, tokenizer=encoder)}")
    return 0


def _positions(on: Evaluation, off: Evaluation) -> str:
    lines = ["            position in document: bits a token without memory - with memory = gain"]
    for (first, number, with_memory), (_, _, without) in zip(on.by_position, off.by_position, strict=True):
        a, b = without / 0.6931471805599453, with_memory / 0.6931471805599453
        lines.append(f"            from {first:6,}: {a:.4f} - {b:.4f} = {a - b:+.4f}   ({number:,} tokens)")
    return "\n".join(lines)
