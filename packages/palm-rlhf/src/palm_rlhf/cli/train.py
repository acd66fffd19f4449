"""The commands themselves: typed functions, from whose signatures and docstrings flags and their help are made.

Each returns the exit status.
"""

from pathlib import Path
from typing import Any, Literal

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import print_resume_hint, say
from lm_core.cli.text_generation import TextGeneration, print_continuations
from lm_core.data.corpora import held_out_documents
from lm_core.distributed import rank, world_size
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device
from lm_core.training.run_directory import Result, write_summary
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.config import TrainingSettings
from palm_rlhf.pretrain.evaluation import evaluate


def train(
    *,
    text: TextCorpus,
    model: dict[str, Any],
    settings: TrainingSettings,
    checkpoint_dir: str = "runs/palm-quickstart",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
    sample_prompt: str = "def add(a, b):\n",
    sample_tokens: int = 160,
) -> int:
    """Pretrains a PaLM on text.

    Args:
        text: what to learn from.
        model: arguments of ``PaLM``.
        settings: optimizer, schedule and what is written when.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl and curves.png.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: of accelerate, such as [tensorboard].
        sample_prompt: what the trained model is asked to continue at the end.
        sample_tokens: how far; 0 for not at all.

    Returns:
        The exit status.
    """
    from palm_rlhf.pretrain.trainer import PretrainTrainer

    encoder, data = text.load()
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
    millions = sum(parameter.numel() for parameter in palm.parameters()) / 1e6
    say(f"model       PaLM, {millions:.2f} million parameters, {encoder.vocab_size} tokens")
    say(f"corpus      {text.corpus}: {data.train.size} to learn from, {data.validation.size} held out")
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
        return print_resume_hint("palm-rlhf", result.outcome, result.step, settings.max_steps)
    if rank() == 0:
        held_out = Result("held-out bits/byte", result.last_bits_per_byte, before=result.first_bits_per_byte)
        write_summary(checkpoint_dir, [held_out], steps=result.step, seconds=result.seconds)
    if sample_prompt and sample_tokens and rank() == 0:
        say(f"\nIt continues {sample_prompt!r}:\n")
        generation = TextGeneration(max_new_tokens=sample_tokens, device=settings.device)
        print_continuations(PaLM, checkpoint_dir, sample_prompt, generation)
    return 0


def generate(checkpoint: str, prompt: str, *, settings: TextGeneration) -> int:
    """Continues a prompt and prints it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: the text to continue; "-" reads it from standard input, "@FILE" from a file.
        settings: of the generation.

    Returns:
        The exit status.
    """
    print_continuations(PaLM, checkpoint, prompt, settings)
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
    held_out = evaluate(
        PaLM.from_pretrained(folder).to(pick_device(device)),
        held_out_documents(corpus, tokenizer=encoder, field=field),
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
    from palm_rlhf.interop.weight_files import convert_checkpoint

    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    folder = convert_checkpoint(
        old, directory, norm_gain=norm_gain, prefix=prefix, overwrite=overwrite, tokenizer=encoder
    )
    print(f"wrote {folder}")
    return 0
