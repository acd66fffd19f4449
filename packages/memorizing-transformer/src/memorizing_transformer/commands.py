"""The commands themselves: typed functions, from whose signatures and docstrings flags and their help are made.

Each returns the exit status.
"""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lm_core.checkpoint import checkpoint_folder
from lm_core.corpora import load_corpus
from lm_core.decoding import Filter
from lm_core.distributed import rank, world_size
from lm_core.documents import Documents, load_documents
from lm_core.generation import generate as continue_prompts
from lm_core.sampling import min_p as keep_likely
from lm_core.sampling import top_k as keep_best
from lm_core.sampling import top_p as keep_nucleus
from lm_core.tokenizers import load_tokenizer
from lm_core.training import pick_device, seed_everything
from memorizing_transformer.evaluation import Evaluation, evaluate
from memorizing_transformer.retrieved import retrieved_while_generating, write_page
from memorizing_transformer.training_settings import TrainingSettings
from memorizing_transformer.transformer import MemorizingTransformer

INTERRUPTED = 130


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
            are kept, and max_knn_memories is taken from here.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: of accelerate, such as [tensorboard].
        sample_tokens: how far the trained model continues a held-out document at the end; 0 for not at all.

    Returns:
        The exit status.
    """
    from memorizing_transformer.trainer import MemoryTrainer

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
    trainer = MemoryTrainer(
        model=memorizing,
        corpus=data,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        settings=settings,
        resume=resume,
        trackers=trackers or (),
    )
    say = print if rank() == 0 else (lambda *_, **__: None)
    millions = sum(parameter.numel() for parameter in memorizing.parameters()) / 1e6
    say(f"model       {millions:.2f} million parameters, memory in layer(s) {list(memorizing.memorizing_layers)}")
    say(f"memory      {memorizing.max_knn_memories:,} tokens a row; XL window of {memorizing.xl_max_memories}")
    say(f"corpus      {corpus}: {_size(data.train)} to learn from, {_size(data.validation)} held out")
    say(f"            fingerprint {data.fingerprint[:16]}")
    say(f"run         {checkpoint_dir}, {settings.max_steps} updates, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
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
        say(f"\nStopped ({result.outcome}) after {result.step} of {settings.max_steps} updates. To go on:")
        say(f"  {command_line()}")
        return INTERRUPTED if result.outcome == "interrupted" else 0
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


def generate(
    checkpoint: str,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "auto",
    progress: bool = False,
) -> int:
    """Continues a prompt, which goes into the memory as far as it is long, and prints it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: the text to continue; "-" reads it from standard input, "@FILE" from a file.
        max_new_tokens: at most; the end-of-document token ends earlier.
        temperature: 0 takes the most likely token each time.
        top_k: keeps the k most likely tokens.
        top_p: keeps the most likely tokens up to this probability together.
        min_p: keeps tokens at least this fraction as likely as the most likely one.
        repetition_penalty: above 1, tokens already there become less likely.
        num_samples: how many continuations.
        seed: of the draws.
        tokenizer: instead of the one in the checkpoint.
        device: auto takes CUDA, then MPS, then the CPU.
        progress: shows a progress bar.

    Returns:
        The exit status.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    model, encoder, ids, text = _opened(checkpoint, prompt, tokenizer, device)
    filters: list[Filter] = []
    if top_k is not None:
        filters.append(partial(keep_best, k=top_k))
    if top_p is not None:
        filters.append(partial(keep_nucleus, p=top_p))
    if min_p is not None:
        filters.append(partial(keep_likely, min_p=min_p))
    result = continue_prompts(
        model,
        [ids] * num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        filters=filters,
        eos_id=encoder.eos_id,
        repetition_penalty=repetition_penalty,
        generator=torch.Generator(model.device).manual_seed(seed),
        progress=progress,
    )
    for number, (tokens, length) in enumerate(zip(result.tokens.cpu(), result.lengths.tolist(), strict=True)):
        if num_samples > 1:
            print(f"--- {number + 1} of {num_samples}")
        print(text + encoder.decode(tokens[:length]))
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
    if corpus == "stdlib":
        documents = load_corpus(corpus, tokenizer=encoder).validation
    else:
        documents = load_documents(corpus, tokenizer=encoder, field=field)
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
    model, encoder, ids, _ = _opened(checkpoint, prompt, tokenizer, device)
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


def command_line() -> str:
    """The command as it was given."""
    return shlex.join(["memorizing-transformer", *sys.argv[1:]])


def _opened(checkpoint: str, prompt: str, tokenizer: str | None, device: str) -> tuple[Any, Any, Any, str]:
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    text = sys.stdin.read() if prompt == "-" else prompt
    if prompt.startswith("@"):
        text = Path(prompt[1:]).read_text(encoding="utf-8")
    ids = torch.tensor(encoder.encode(text), dtype=torch.long)
    if len(ids) == 0:
        raise ValueError(f"prompt must hold at least one token, got {text!r}")
    place = pick_device(device)
    return MemorizingTransformer.from_pretrained(folder).to(place).eval(), encoder, ids.to(place), text


def _positions(on: Evaluation, off: Evaluation) -> str:
    lines = ["            position in document: bits a token without memory - with memory = gain"]
    for (first, number, with_memory), (_, _, without) in zip(on.by_position, off.by_position, strict=True):
        a, b = without / 0.6931471805599453, with_memory / 0.6931471805599453
        lines.append(f"            from {first:6,}: {a:.4f} - {b:.4f} = {a - b:+.4f}   ({number:,} tokens)")
    return "\n".join(lines)


def _size(documents: Documents) -> str:
    return f"{documents.num_bytes / 1e6:.1f} MB in {len(documents):,} documents"
