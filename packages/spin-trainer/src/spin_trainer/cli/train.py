"""The commands that train: ``train`` (self-play, or the quickstart), ``dpo``, ``sft`` and ``self-reward``."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm_core.adapters.loading import DType, load_causal_lm, lora, torch_dtype
from lm_core.checkpoints.atomic_io import write_file
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checks import typed
from lm_core.cli.main import print_main, report, report_run
from lm_core.distributed import world_size
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device, start_accelerator
from lm_core.training.run_directory import Result
from spin_trainer.data.opponent_answers import Engine
from spin_trainer.quickstart.quickstart import quickstart, table_lines
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.dpo import DPOSettings, DPOTrainer
from spin_trainer.training.pair_trainer import SPINResult
from spin_trainer.training.policy_trainer import FineTuningResult, PolicyTrainer
from spin_trainer.training.self_reward import SelfRewardingSettings, SelfRewardingTrainer
from spin_trainer.training.sft import SFTSettings, SFTTrainer
from spin_trainer.training.trainer import SPINTrainer


@typed
@dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """Model, data and folder of a run.

    Args:
        model: model to fine-tune: a folder, or organisation/name on the hub.
        data: training rows: a file, folder, glob or data set on the hub.
        template_kwargs: further arguments of the chat template in JSON, such as '{"enable_thinking": false}'.
        dtype: dtype of the loaded weights; auto keeps the stored one. Trained weights are float32 in any case.
        lora_r: rank of LoRA adapters; null trains all weights.
        lora_alpha: scale of the adapters times their rank; null is twice the rank.
        lora_dropout: dropout probability before the adapters.
        lora_targets: names of the linear layers that get an adapter; null is all but the output layer.
        overlong: handling of prompts that leave no room for an answer: error, or drop the row.
        checkpoint_dir: folder of the run, for checkpoints, exported policies, metrics.jsonl and curves.png.
    """

    model: str | None = None
    data: str | None = None
    validation_data: str | None = None
    tokenizer: str | None = None
    template_kwargs: dict[str, Any] | None = None
    dtype: DType = "auto"
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    overlong: Literal["error", "drop"] = "error"
    checkpoint_dir: str
    resume: bool | Literal["auto"] = "auto"
    trackers: list[str] | None = None

    @property
    def folder(self) -> str:
        """``checkpoint_dir`` with an expanded ~, which no shell expands in a YAML file."""
        return str(Path(self.checkpoint_dir).expanduser())

    def required(self, device: str) -> tuple[str, str]:
        """Model and data of a run that needs both; connects the processes.

        Raises:
            ValueError: one of them is missing.
        """
        if self.model is None:
            raise ValueError(f"model must be given together with data, got data {self.data!r} and no model")
        if self.data is None:
            raise ValueError(f"data must be given together with a model, got model {self.model!r} and no data")
        start_accelerator(pick_device(device), folder=self.folder)  # sets rank and world size
        return self.model, self.data

    def policy(self, model: str, seed: int) -> Any:
        """The model, with new LoRA adapters if these were chosen."""
        seed_everything(seed)
        policy = load_causal_lm(model, dtype=torch_dtype(self.dtype))
        if self.lora_r is None:
            return policy
        return lora(policy, r=self.lora_r, alpha=self.lora_alpha, dropout=self.lora_dropout, targets=self.lora_targets)

    def trainer_arguments(self, model: str) -> dict[str, Any]:
        """Arguments that the trainers have in common."""
        return {
            "tokenizer": load_tokenizer(self.tokenizer or checkpoint_folder(model)),
            "template_kwargs": self.template_kwargs,
            "overlong": self.overlong,
            "checkpoint_dir": self.folder,
            "resume": self.resume,
            "trackers": self.trackers or (),
        }


def train(
    *,
    run: PolicyRun,
    settings: SelfPlaySettings,
    answers: str | None = None,
    engine: Engine = "lm_core",
    engine_arguments: dict[str, Any] | None = None,
) -> int:
    """Fine-tunes a model by self-play.

    Args:
        run: model, data and folder.
        settings: settings of self-play.
        answers: answers of the model at the start that another engine made, one row for each of the data; see
            ``spin-trainer prompts``.
        engine: engine that generates answers: lm_core, or vllm, for models of transformers on one process.
        engine_arguments: further arguments of vllm.LLM in JSON, such as '{"gpu_memory_utilization": 0.4}'.
    """
    if run.model is None and run.data is None and run.validation_data is None:
        return _quickstart(run, settings)
    model, data = run.required(settings.device)
    arguments = run.trainer_arguments(model)
    trainer = SPINTrainer(
        run.policy(model, settings.seed),
        train_sft_dataset=data,
        valid_sft_dataset=run.validation_data,
        answers=answers,
        engine=engine,
        engine_arguments=engine_arguments,
        config=settings,
        **arguments,
    )
    _report_start(trainer, trainer.train_dataset, run, f"{settings.iterations} iteration(s), ")
    return _report_iterations(trainer.train(), run.folder, trainer.planned_updates)


def _quickstart(run: PolicyRun, settings: SelfPlaySettings) -> int:
    needs_model = {
        "tokenizer": run.tokenizer,
        "template_kwargs": run.template_kwargs,
        "dtype": None if run.dtype == "auto" else run.dtype,
        "lora_r": run.lora_r,
        "lora_alpha": run.lora_alpha,
        "lora_dropout": run.lora_dropout or None,
        "lora_targets": run.lora_targets,
    }
    if chosen := [name for name, value in needs_model.items() if value is not None]:
        raise ValueError(f"model is required with {' and '.join(chosen)}, got none: the quickstart has its own")
    start_accelerator(pick_device(settings.device), folder=run.folder)
    report("downloads", "nothing; about two minutes on two CPU cores")
    result, table = quickstart(settings, Path(run.folder), resume=run.resume, trackers=run.trackers or ())
    if table:
        lines = "\n".join(table_lines(table)) + "\n"
        print_main(f"\n{lines}")
        write_file(Path(run.folder) / "table.md", lines)
        print_main("On a toy this small more supervised training wins; self-play learns from the same data.")
    return _report_iterations(result, run.folder)


def dpo(*, run: PolicyRun, settings: DPOSettings, reference_model: str | None = None) -> int:
    """Trains a model on pairs of a chosen and a rejected answer.

    Args:
        run: model, data and folder.
        settings: settings of preference optimisation.
        reference_model: reference: a folder, or organisation/name on the hub; null is the model at the start.
    """
    model, data = run.required(settings.device)
    arguments = run.trainer_arguments(model)
    trainer = DPOTrainer(
        run.policy(model, settings.seed),
        train_dataset=data,
        valid_dataset=run.validation_data,
        reference_model=reference_model,
        config=settings,
        **arguments,
    )
    _report_start(trainer, trainer.train_dataset, run)
    shown = {"margin": "held-out margin", "accuracy": "held-out accuracy", "loss": "held-out loss"}
    return _report_fine_tuning(trainer.train(), run, trainer.planned_updates, shown)


def sft(*, run: PolicyRun, settings: SFTSettings) -> int:
    """Fine-tunes a model on prompts with answers, by the likelihood of the answers.

    Args:
        run: model, data and folder.
        settings: settings of supervised fine-tuning.
    """
    model, data = run.required(settings.device)
    arguments = run.trainer_arguments(model)
    trainer = SFTTrainer(
        run.policy(model, settings.seed),
        train_dataset=data,
        valid_dataset=run.validation_data,
        config=settings,
        **arguments,
    )
    _report_start(trainer, trainer.train_dataset, run)
    shown = {"loss": "held-out loss, nats/token", "nll": "held-out NLL/answer, nats"}
    return _report_fine_tuning(trainer.train(), run, trainer.planned_updates, shown)


def self_reward(
    *,
    run: PolicyRun,
    settings: SelfRewardingSettings,
    reward: str | None = None,
    further_rewards: list[str] | None = None,
    answers: str | None = None,
    engine: Engine = "lm_core",
    engine_arguments: dict[str, Any] | None = None,
) -> int:
    """Fine-tunes a model on the best and the worst of its answers to each prompt, by its own ratings or by a reward.

    Args:
        run: model, data and folder.
        settings: settings of self-rewarding.
        reward: function module:function that scores answers, instead of the model's ratings.
        further_rewards: rewards that are added to it.
        answers: candidates of the model at the start that another engine made, one row with a list for each of the
            data; see ``spin-trainer prompts``.
        engine: engine that generates answers: lm_core, or vllm, for models of transformers on one process.
        engine_arguments: further arguments of vllm.LLM in JSON, such as '{"gpu_memory_utilization": 0.4}'.
    """
    if further_rewards and reward is None:
        raise ValueError(f"further_rewards go with reward, got {further_rewards} and no reward")
    functions = [_imported(name) for name in [*([] if reward is None else [reward]), *(further_rewards or [])]]
    model, data = run.required(settings.device)
    arguments = run.trainer_arguments(model)
    trainer = SelfRewardingTrainer(
        run.policy(model, settings.seed),
        train_dataset=data,
        valid_dataset=run.validation_data,
        reward=functions or None,
        answers=answers,
        engine=engine,
        engine_arguments=engine_arguments,
        config=settings,
        **arguments,
    )
    _report_start(trainer, trainer.train_dataset, run, f"{settings.iterations} iteration(s), ")
    result = trainer.train()
    lines: list[tuple[str, object]] = [
        ("held out", f"score {metrics['score']:.3f} ({f'iteration {index - 1}' if index else 'before'})")
        for index, metrics in enumerate(result.history)
    ]
    lines.append(("policies", f"{result.iterations_folder} ({result.outcome} after {result.iterations} iterations)"))
    scores = [metrics["score"] for metrics in result.history]
    results = [Result("held-out score", scores[-1], before=scores[0], better="higher")] if scores else []
    return report_run("spin-trainer", result, run.folder, lines=lines, results=results)


def _imported(name: str) -> Any:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"reward must be module:function, got {name!r}: {error}") from error


def _report_start(trainer: PolicyTrainer, rows: Any, run: PolicyRun, length: str = "") -> None:
    """Prints a summary in front of a run."""
    weights = trainer.session.precisions
    stored = (
        f"{weights.total / 1e6:.2f} million parameters stored in {str(weights.stored_dtype).removeprefix('torch.')}"
    )
    report("model", f"{run.model}, {stored}, of which {weights.trained / 1e6:.2f} train in float32")
    report("data", f"{run.data}: {len(rows)} rows, {rows.dropped} left out")
    updates = "" if trainer.session.max_steps is None else f"{trainer.session.max_steps} updates, "
    report("run", f"{run.folder}, {length}{updates}{trainer.device}, {world_size()} process(es)")


def _report_fine_tuning(
    result: FineTuningResult,
    run: PolicyRun,
    updates: int | None,
    shown: Mapping[str, str],
) -> int:
    """Prints held-out metrics before and after, and the folder of the policy."""
    before, after = result.first_validation, result.last_validation
    results = [
        Result(label, after[f"validation_{name}"], before=before[f"validation_{name}"])
        for name, label in shown.items()
        if f"validation_{name}" in after
    ]
    lines: list[tuple[str, object]] = [
        ("held out", f"{each.name.removeprefix('held-out ')} {each.before:.4f} -> {each.after:.4f}") for each in results
    ]
    lines.append(("policy", result.policy_folder or f"not exported, {result.outcome}"))
    return report_run("spin-trainer", result, run.folder, max_steps=updates, lines=lines, results=results)


def _report_iterations(result: SPINResult, folder: str, max_steps: int | None = None) -> int:
    """Prints the held-out metrics of each iteration, and the folder of the policies."""
    lines: list[tuple[str, object]] = [
        (
            "held out",
            f"{metrics['nll']:8.3f} nats/answer, win rate {metrics['win_rate']:.3f} "
            f"({f'iteration {index - 1}' if index else 'before'})",
        )
        for index, metrics in enumerate(result.history)
    ]
    if result.best_iteration is not None:
        lines.append(("best", f"after {result.best_iteration} iterations, by held-out likelihood"))
    lines.append(("policies", f"{result.iterations_folder} ({result.outcome} after {result.iterations} iterations)"))
    nll = [metrics["nll"] for metrics in result.history]
    results = [Result("held-out NLL/answer, nats", nll[-1], before=nll[0])] if nll else []
    return report_run("spin-trainer", result, folder, max_steps=max_steps, lines=lines, results=results)
