"""The command ``train``: pretrains a PaLM on text."""

from typing import Any, Literal

from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import report, report_run
from lm_core.cli.text_generation import TextGeneration, print_continuations
from lm_core.distributed import rank, world_size
from lm_core.rng import seed_everything
from lm_core.training.run_directory import Result
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.config import TrainingSettings


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
        text: training text.
        model: arguments of ``PaLM``.
        settings: optimizer, schedule, logging and checkpoints.
        checkpoint_dir: folder of the run, for checkpoints, metrics.jsonl and curves.png.
        resume: auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.
        trackers: names of trackers that accelerate knows, such as tensorboard.
        sample_prompt: prompt that the trained model continues at the end.
        sample_tokens: length of the continuation printed at the end, in tokens; 0 for none.
    """
    from palm_rlhf.pretrain.trainer import PretrainTrainer

    # text, model and trainer
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
    # train, with a report before and after
    millions = sum(parameter.numel() for parameter in palm.parameters()) / 1e6
    report("model", f"PaLM, {millions:.2f} million parameters, {encoder.vocab_size} tokens")
    report("corpus", f"{text.data}: {data.train.size} for training, {data.validation.size} held out")
    report("run", f"{checkpoint_dir}, {settings.max_steps} updates, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
    first, last = result.first_bits_per_byte, result.last_bits_per_byte
    status = report_run(
        "palm-rlhf",
        result,
        checkpoint_dir,
        max_steps=settings.max_steps,
        lines=[
            ("held out", f"{first:.3f} bits/byte before training"),
            ("", f"{last:.3f} bits/byte at the last validation, {result.step} updates done"),
        ],
        results=[Result("held-out bits/byte", last, before=first)],
    )
    # a sample of the trained model
    if result.outcome == "finished" and sample_prompt and sample_tokens and rank() == 0:
        print(f"\nContinuation of {sample_prompt!r}:\n")
        generation = TextGeneration(max_new_tokens=sample_tokens, device=settings.device)
        print_continuations(checkpoint_dir, sample_prompt, generation, loader=PaLM.from_pretrained)
    return status
