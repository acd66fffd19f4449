"""The commands themselves: typed functions, from whose signatures and docstrings flags and their help are made.

Each returns the exit status.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lm_core.adapters import as_causal_lm
from lm_core.checkpoints.atomic_io import write_file
from lm_core.cli.main import INTERRUPTED, command_line
from lm_core.distributed import rank, world_size
from lm_core.generation.sampling import top_p as keep_nucleus
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device, start_accelerator
from lm_core.training.run_directory import Result, write_summary
from spin_trainer.data.iteration_data import IterationData
from spin_trainer.data.opponent_answers import Sampling
from spin_trainer.data.sft_data import as_sft_dataset
from spin_trainer.interop import load_model, with_lora
from spin_trainer.quickstart import sorting_task
from spin_trainer.quickstart.quickstart import quickstart, quickstart_data, table_lines
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.evaluation import evaluate, win_rate_over
from spin_trainer.training.trainer import SPINResult, SPINTrainer
from spin_trainer.training.weights import fingerprint_of_weights


def train(
    *,
    settings: SelfPlaySettings,
    model: str | None = None,
    data: str | None = None,
    validation_data: str | None = None,
    tokenizer: str | None = None,
    top_p: float | None = 0.9,
    lora_r: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    lora_targets: list[str] | None = None,
    overlong: Literal["error", "drop"] = "error",
    checkpoint_dir: str = "runs/spin-quickstart",
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Fine-tunes a model by self-play.

    Args:
        settings: of self-play.
        model: a folder or organisation/name on the hub; null runs the quickstart.
        data: a .jsonl or .jsonl.gz file with prompt and response, or messages, in each line.
        validation_data: the same, held out.
        tokenizer: instead of the model's own: a folder, organisation/name, or "bytes".
        top_p: of the opponent's sampling; null for no filter.
        lora_r: rank of LoRA adapters; null trains all weights.
        lora_alpha: their scale times the rank; null is twice the rank.
        lora_dropout: in front of them.
        lora_targets: names of the layers that get one; null is all linear ones.
        overlong: what to do with prompts that leave no room for an answer.
        checkpoint_dir: folder of the run, for answers, checkpoints, exported policies, metrics.jsonl and curves.png.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    if model is None and (data is not None or validation_data is not None):
        raise ValueError(f"model must be given together with data, got data {data!r} and no model")
    if model is not None and data is None:
        raise ValueError(f"data must be given together with a model, got model {model!r} and no data")
    start_accelerator(pick_device(settings.device), folder=checkpoint_dir)  # from here on processes know their rank
    say: Any = print if rank() == 0 else (lambda *_: None)
    if model is None:
        return _quickstart(settings, Path(checkpoint_dir), resume, say)
    seed_everything(settings.seed)
    encoder = load_tokenizer(tokenizer or model)
    policy = load_model(model)
    if lora_r is not None:
        policy = with_lora(policy, r=lora_r, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets)
    trainer = SPINTrainer(
        policy,
        train_sft_dataset=data,
        valid_sft_dataset=validation_data,
        tokenizer=encoder,
        filter_fn=None if top_p is None else keep_nucleus,
        filter_kwargs={} if top_p is None else {"thres": top_p},
        overlong=overlong,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        config=settings,
    )
    trained = sum(parameter.numel() for parameter in trainer.model.trainable_parameters())
    total = sum(parameter.numel() for parameter in policy.parameters())
    say(f"model       {model}, {total / 1e6:.2f} million parameters, of which {trained / 1e6:.2f} train")
    say(f"data        {data}: {len(trainer.train_dataset)} rows, {trainer.train_dataset.dropped} left out as too long")
    say(f"run         {checkpoint_dir}, {settings.iterations} iterations, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
    for number, measures in enumerate(result.history):
        name = "before" if number == 0 else f"iteration {number - 1}"
        say(f"held out    {measures['nll']:8.3f} nats/answer, win rate {measures['win_rate']:.3f} ({name})")
    return _ended(result, settings, checkpoint_dir, say)


def _quickstart(settings: SelfPlaySettings, folder: Path, resume: Any, say: Any) -> int:
    say("downloads   nothing; about two minutes on two CPU cores")
    result, table = quickstart(settings, folder, resume=resume, say=say)
    if table:
        lines = table_lines(table)
        say("\n" + "\n".join(lines) + "\n")
        write_file(folder / "table.md", "\n".join(lines) + "\n")
        say("On a toy this small more supervised training wins; what is shown is that self-play learns from the data.")
    return _ended(result, settings, str(folder), say)


def _ended(result: SPINResult, settings: SelfPlaySettings, folder: str, say: Any) -> int:
    before = result.outcome in ("finished", "stopped early") and result.first_step == result.step
    if before:
        say("            finished before; another --checkpoint_dir trains anew")
    say(f"metrics     {result.iterations_folder.parent / 'metrics.jsonl'}")
    say(f"curves      {result.curves or 'not drawn: they need two updates, and matplotlib (pip install matplotlib)'}")
    if result.outcome == "interrupted":
        say(f"\nStopped in iteration {result.iterations} of {settings.iterations}. To go on:")
        say(f"  {command_line('spin-trainer')}")
        return INTERRUPTED
    say(f"policies    {result.iterations_folder} ({result.outcome} after {result.iterations} iterations)")
    if result.history and rank() == 0 and not (before and (Path(folder) / "summary.json").is_file()):
        measured = [Result("held-out NLL/answer, nats", result.history[-1]["nll"], before=result.history[0]["nll"])]
        write_summary(folder, measured, steps=result.step, seconds=None if before else result.seconds)
    if result.best_iteration is not None:
        say(f"best        after {result.best_iteration} iterations, by held-out likelihood")
    return 0


def generate(
    checkpoint: str,
    data: str,
    output: str,
    *,
    tokenizer: str | None = None,
    max_seq_len: int = 512,
    temperature: float = 0.7,
    top_p: float | None = 0.9,
    batch_size: int = 16,
    overlong: Literal["error", "drop"] = "error",
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Writes a model's answers to every prompt of a dataset, beside the human ones.

    Started again with the same arguments, it goes on where it was.

    Args:
        checkpoint: an exported policy's folder, another model's, or organisation/name on the hub.
        data: a .jsonl or .jsonl.gz file with prompt and response, or messages, in each line.
        output: a .jsonl file; rows that are done are kept in a folder beside it.
        tokenizer: instead of the model's own.
        max_seq_len: longest prompt with answer, in tokens.
        temperature: 0 is greedy.
        top_p: null for no filter.
        batch_size: prompts at a time.
        overlong: what to do with prompts that leave no room for an answer.
        seed: of the draws.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    if not output.endswith(".jsonl"):
        raise ValueError(f"output must be a .jsonl file, got {output!r}")
    encoder = load_tokenizer(tokenizer or checkpoint)
    dataset = as_sft_dataset(data, max_seq_len=max_seq_len, tokenizer=encoder, overlong=overlong, name="data")
    policy = as_causal_lm(load_model(checkpoint, "checkpoint").to(pick_device(device)))
    sampling = Sampling(
        max_seq_len=max_seq_len,
        temperature=temperature,
        filter_fn=None if top_p is None else keep_nucleus,
        filter_kwargs={} if top_p is None else {"thres": top_p},
        eos_id=encoder.eos_id,
        batch_size=batch_size,
        seed=seed,
    )
    rows = IterationData(
        dataset=dataset,
        root=Path(output).with_suffix(".rows"),
        sampling=sampling,
        split="generate",
        iteration=0,
        weights=fingerprint_of_weights(policy),
    )
    rows.complete(policy, scores=False)
    lines = [
        {
            "prompt": encoder.decode(example.prompt),
            "real": encoder.decode(example.response),
            "generated": encoder.decode(answer.tokens),
            "finished": answer.finished,
        }
        for example, answer in zip(dataset, rows.answers, strict=True)
    ]
    write_file(Path(output), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    summary = ", ".join(f"{name} {value:.3f}" for name, value in rows.summary().items())
    print(f"wrote {output}: {len(lines)} rows, {summary}")
    return 0


def evaluate_model(
    checkpoint: str,
    data: str | None = None,
    *,
    opponent_checkpoint: str | None = None,
    tokenizer: str | None = None,
    max_seq_len: int = 512,
    temperature: float = 0.7,
    top_p: float | None = 0.9,
    batch_size: int = 16,
    exact_match: bool = True,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Prints how well a model answers a dataset: likelihood, exact match, win rate over an opponent.

    Args:
        checkpoint: an exported policy's folder, another model's, or organisation/name on the hub.
        data: a .jsonl or .jsonl.gz file; null is the rows that the quickstart's table is about.
        opponent_checkpoint: another model; its answers, and its likelihoods, are what the win rate is over.
        tokenizer: instead of the model's own.
        max_seq_len: longest prompt with answer, in tokens.
        temperature: of the opponent's answers.
        top_p: of the opponent's answers; null for no filter.
        batch_size: rows at a time.
        exact_match: whether prompts are answered greedily and compared with the human answers.
        seed: of the draws.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    eos_id: int | None = sorting_task.EOS
    if data is None:
        dataset, max_seq_len = quickstart_data()[2], sorting_task.MAX_SEQ_LEN
    else:
        encoder = load_tokenizer(tokenizer or checkpoint)
        dataset = as_sft_dataset(data, max_seq_len=max_seq_len, tokenizer=encoder, name="data")
        eos_id = encoder.eos_id
    place = pick_device(device)
    policy = as_causal_lm(load_model(checkpoint, "checkpoint").to(place))
    scored = partial(evaluate, max_seq_len=max_seq_len, eos_id=eos_id, batch_size=batch_size, exact_match=exact_match)
    found = scored(policy, dataset)
    print(
        f"{found.nll_per_sequence:.4f} nats/answer, {found.nll_per_token:.4f} nats/token over {found.tokens:,} tokens"
    )
    if found.exact_match is not None:
        print(f"{found.exact_match:.4f} exact match over {found.sequences:,} greedy answers")
    if opponent_checkpoint is not None:
        sampling = Sampling(
            max_seq_len=max_seq_len,
            temperature=temperature,
            filter_fn=None if top_p is None else keep_nucleus,
            filter_kwargs={} if top_p is None else {"thres": top_p},
            eos_id=eos_id,
            batch_size=batch_size,
        )
        other = as_causal_lm(load_model(opponent_checkpoint, "opponent_checkpoint").to(place))
        print(f"{win_rate_over(policy, other, dataset, sampling, seed=seed):.4f} win rate over {opponent_checkpoint}")
    return 0
