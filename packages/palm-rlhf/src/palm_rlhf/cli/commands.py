"""The commands themselves: typed functions, from whose signatures and docstrings flags and their help are made.

Each returns the exit status.
"""

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
from palm_rlhf.evaluation import evaluate
from palm_rlhf.palm import PaLM
from palm_rlhf.training_settings import TrainingSettings

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
    checkpoint_dir: str = "runs/palm-quickstart",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
    sample_prompt: str = "def add(a, b):\n",
    sample_tokens: int = 160,
) -> int:
    """Pretrains a PaLM on text.

    Args:
        model: arguments of ``PaLM``.
        settings: of the training.
        corpus: "stdlib" (Python's own library), a .txt, .jsonl or .jsonl.gz file, any other file as bytes, or a folder.
        field: of a .jsonl line, the text.
        tokenizer: "bytes", a folder with a Hugging Face tokenizer, or organisation/name on the hub.
        validation_fraction: how much of the corpus is held out.
        cache_dir: where to keep the tokenised corpus, memory-mapped; without it, in memory.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl and curves.png.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: of accelerate, such as [tensorboard].
        sample_prompt: what the trained model is asked to continue at the end.
        sample_tokens: how far; 0 for not at all.

    Returns:
        The exit status.
    """
    from palm_rlhf.trainer import PretrainTrainer

    encoder = load_tokenizer(tokenizer)
    data = load_corpus(
        corpus, tokenizer=encoder, field=field, validation_fraction=validation_fraction, cache_dir=cache_dir
    )
    seed_everything(settings.seed)
    palm = PaLM(num_tokens=encoder.vocab_size, **model)
    trainer = PretrainTrainer(
        model=palm,
        corpus=data,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        settings=settings,
        resume=resume,
        trackers=trackers or (),
    )
    say = print if rank() == 0 else (lambda *_, **__: None)
    millions = sum(parameter.numel() for parameter in palm.parameters()) / 1e6
    say(f"model       PaLM, {millions:.2f} million parameters, {encoder.vocab_size} tokens")
    say(f"corpus      {corpus}: {_size(data.train)} to learn from, {_size(data.validation)} held out")
    say(f"run         {checkpoint_dir}, {settings.max_steps} updates, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
    if result.first_step == settings.max_steps:
        say("            finished before; another --checkpoint_dir trains anew")
    say(f"held out    {result.first_bits_per_byte:.3f} bits/byte before training")
    say(f"            {result.last_bits_per_byte:.3f} bits/byte at the last validation, {result.step} updates done")
    say(f"checkpoint  {result.checkpoints / f'step-{result.step}'}")
    say(f"metrics     {Path(checkpoint_dir) / 'metrics.jsonl'}")
    say(f"curves      {result.curves or 'not drawn: pip install matplotlib, then run the same command again'}")
    if result.outcome != "finished":
        say(f"\nStopped ({result.outcome}) after {result.step} of {settings.max_steps} updates. To go on:")
        say(f"  {command_line()}")
        return INTERRUPTED if result.outcome == "interrupted" else 0
    if sample_prompt and sample_tokens and rank() == 0:
        say(f"\nIt continues {sample_prompt!r}:\n")
        generate(checkpoint_dir, sample_prompt, max_new_tokens=sample_tokens, device=settings.device)
    return 0


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
    """Continues a prompt and prints it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: the text to continue; "-" reads it from standard input.
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
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = torch.tensor(encoder.encode(text), dtype=torch.long)
    if len(ids) == 0:
        raise ValueError(f"prompt must hold at least one token, got {text!r}")
    place = pick_device(device)
    palm = PaLM.from_pretrained(folder).to(place)
    filters: list[Filter] = []
    if top_k is not None:
        filters.append(partial(keep_best, k=top_k))
    if top_p is not None:
        filters.append(partial(keep_nucleus, p=top_p))
    if min_p is not None:
        filters.append(partial(keep_likely, min_p=min_p))
    result = continue_prompts(
        palm,
        [ids.to(place)] * num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        filters=filters,
        eos_id=encoder.eos_id,
        repetition_penalty=repetition_penalty,
        generator=torch.Generator(place).manual_seed(seed),
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
    sequence_length: int = 256,
    batch_size: int = 8,
    max_tokens: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
) -> int:
    """Prints how well a checkpoint predicts text, in bits per byte.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        corpus: "stdlib" for the held-out part of Python's library, or a file or folder, scored whole.
        field: of a .jsonl line, the text.
        tokenizer: instead of the one in the checkpoint.
        sequence_length: tokens a row; each is predicted from those before it in its row.
        batch_size: rows at a time.
        max_tokens: about so many, spread evenly over the documents; null for all.
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
    held_out = evaluate(
        PaLM.from_pretrained(folder).to(pick_device(device)),
        documents,
        encoder,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        precision=precision,
        progress=True,
    )
    print(f"{held_out.bits_per_byte:.4f} bits/byte, {held_out.loss:.4f} nats/token over {held_out.tokens:,} tokens")
    return 0


def convert(
    old: str,
    directory: str,
    *,
    norm_gain: Literal["auto", "plain", "offset"] = "auto",
    prefix: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> int:
    """Turns a weight file of PaLM-rlhf-pytorch into a folder that ``PaLM.from_pretrained`` opens.

    Args:
        old: file with the state dict of a PaLM, RewardModel or ActorCritic.
        directory: where to write.
        norm_gain: how norms are stored: plain up to release 0.2.3, offset in later ones, auto tells by the values.
        prefix: which PaLM, where the file has several: what comes before token_emb.weight, as "actor_palm".
        tokenizer: to store with the model: "bytes", a folder, or organisation/name on the hub.
        overwrite: whether a folder with content may be written to.

    Returns:
        The exit status.
    """
    from palm_rlhf.interop import convert_checkpoint

    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    folder = convert_checkpoint(
        old, directory, norm_gain=norm_gain, prefix=prefix, overwrite=overwrite, tokenizer=encoder
    )
    print(f"wrote {folder}")
    return 0


def command_line() -> str:
    """What this process was started with, to be typed again."""
    return shlex.join(["palm-rlhf", *sys.argv[1:]])


def _size(documents: Documents) -> str:
    return f"{documents.num_bytes / 1e6:.1f} MB in {len(documents):,} documents"
