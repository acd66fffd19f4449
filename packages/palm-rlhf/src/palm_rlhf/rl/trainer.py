"""The loop that PPO and GRPO share: draw rollouts, score them, learn from them, and be able to go on after a kill.

One phase draws a batch of responses and makes ``epochs`` passes over it in minibatches. A checkpoint may fall between
any two updates, in the middle of an epoch too: it holds the experience at hand. Prompts, draws and shuffles are
functions of the seed and of counters, so a run that was killed and resumed ends bit for bit like one that was not.

The parts: ``rollouts`` draws, ``experience`` judges and finds advantages, ``policy_update`` learns, ``phase`` says
where the run stands, ``policy_checkpoint`` saves it.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_core.checkpoints.checkpoint import load_checkpoint
from lm_core.checks import check_ids
from lm_core.data.epochs import EpochOrder
from lm_core.distributed import rank, world_size
from lm_core.rng import restore_rng, seed_everything
from lm_core.training.accelerator import InterruptHandler, pick_device, pick_precision, start_accelerator
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar, read_metrics
from lm_core.training.run_directory import RunDirectory
from palm_rlhf.data.prompts import Prompt, as_tokenizer, check_prompts, load_prompts
from palm_rlhf.reward.rewards import as_reward, check_scores
from palm_rlhf.rl.config import PolicySettings
from palm_rlhf.rl.experience import (
    Experience,
    experience_metrics,
    experience_of,
    gathered,
    joined,
    judged_by_all,
    with_advantages,
)
from palm_rlhf.rl.kl import KLCoefficient
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.policy_checkpoint import restore_policy, save_policy
from palm_rlhf.rl.rollouts import Rollout, SamplingSettings, draw_rollout
from palm_rlhf.rl.state import Phase, seeds
from palm_rlhf.rl.update import PolicyUpdate, update_metrics

CURVES = ("reward", "kl", "entropy", "clip_fraction", "response_length", "explained_variance")


@dataclass(frozen=True)
class PolicyResult:
    """How a run ended.

    Attributes:
        outcome: "finished" or "interrupted" (Ctrl-C or SIGTERM).
        phases: phases done, each of one batch of rollouts.
        updates: optimizer updates done.
        metrics: of each phase of this call.
        checkpoints: folder of the checkpoints; None without ``checkpoint_dir``.
        curves: picture of the metrics; None without matplotlib or ``checkpoint_dir``.
    """

    outcome: Literal["finished", "interrupted"]
    phases: int
    updates: int
    metrics: list[dict[str, float]]
    checkpoints: Path | None
    curves: Path | None


class PolicyTrainer:
    """Trains an ``ActorCritic``; see ``RLHFTrainer`` and ``GRPOTrainer`` for what users call.

    Args:
        make_policy: makes what is trained, once everything else has been found right: adapters are added then.
        vocab_size: bound of the prompts' ids, where it is known beforehand.
        prompts: see ``load_prompts``; None where ``step`` is called with rollouts made elsewhere.
        reward: see ``as_reward``; None where rewards are given to ``step``.
        tokenizer: see ``palm_rlhf.data.prompts.as_tokenizer``.
        settings: everything that is a number or a name.
        checkpoint_dir: folder of the run; None writes nothing.
        resume: as of ``lm_core.training.run_directory.RunDirectory``.
        trackers: objects with ``log(values, step=...)``.
    """

    def __init__(
        self,
        *,
        make_policy: Callable[[], ActorCritic],
        vocab_size: int | None,
        prompts: Any,
        reward: Any,
        tokenizer: Any,
        settings: PolicySettings,
        checkpoint_dir: str | Path | None,
        resume: bool | Literal["auto"],
        trackers: Sequence[Any],
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer = as_tokenizer(tokenizer)
        self.prompts: list[Prompt] = [] if prompts is None else load_prompts(prompts, tokenizer=tokenizer)
        if not hasattr(tokenizer, "decode"):
            self.tokenizer = None
        if prompts is not None:
            check_prompts(self.prompts, vocab_size)
        self.reward = None if reward is None else as_reward(reward)
        self.device = pick_device(settings.device)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.resume, self.trackers = resume, list(trackers)
        self.kl = KLCoefficient(settings.kl_div_loss_weight, target=settings.kl_target, horizon=settings.kl_horizon)
        self.accelerator = start_accelerator(self.device, tracker_names=[], folder=self.checkpoint_dir or Path("."))
        pick_precision(settings.precision, self.device)  # refuses what the device cannot do
        self.actor_critic = actor_critic = make_policy().to(self.device)
        actor_critic.precision = settings.precision
        if self.prompts:
            check_prompts(self.prompts, actor_critic.vocab_size)
        if isinstance(reward_model := getattr(self.reward, "model", None), nn.Module):
            reward_model.to(self.device)
        self.order = EpochOrder(max(1, len(self.prompts)), seed=settings.seed)
        self.update = PolicyUpdate(actor_critic, settings, self.kl)
        self.phase = Phase(seed=settings.seed, epochs=settings.epochs, minibatch_size=settings.minibatch_size)
        self._restored = False

    @property
    def updates(self) -> int:
        """Optimizer updates done."""
        return self.phase.updates

    @property
    def actor_parameters(self) -> list[nn.Parameter]:
        """What is trained of the actor."""
        return self.update.actor_parameters

    @property
    def critic_parameters(self) -> list[nn.Parameter]:
        """What is trained of the critic."""
        return self.update.critic_parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of both."""
        return self.update.optimizer

    # --------------------------------------------------------------------------------------------- drawing responses

    def rollout(self, prompts: Any = None, *, sampling: SamplingSettings, seed: int | None = None) -> Rollout:
        """One response of the actor to each prompt.

        Args:
            prompts: see ``load_prompts``; by default those of the trainer.
            sampling: how to draw.
            seed: of the draws; by default the trainer's.
        """
        chosen = self.prompts if prompts is None else load_prompts(prompts, tokenizer=self.tokenizer)
        check_prompts(chosen, self.actor_critic.vocab_size)
        generator = torch.Generator(self.device).manual_seed(self.settings.seed if seed is None else seed)
        return draw_rollout(self.actor_critic, chosen, sampling, tokenizer=self.tokenizer, generator=generator)

    def score(self, rollout: Rollout) -> Tensor:
        """Rewards ``(b,)`` of a rollout.

        Raises:
            ValueError: there is no reward, or it gave another shape, NaN or infinity.
        """
        if self.reward is None:
            raise ValueError("reward must be given to the trainer, or rewards to step, got reward=None")
        return check_scores(self.reward(rollout), len(rollout))

    @torch.no_grad()
    def best_of(
        self, prompt: Any, *, num_samples: int, sampling: SamplingSettings, generator: torch.Generator | None = None
    ) -> tuple[Tensor, float]:
        """The response with the highest reward among ``num_samples``: its ids without the prompt, and that reward."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        one = load_prompts([prompt], tokenizer=self.tokenizer)
        device = None if generator is None else generator.device
        seed = int(torch.randint(2**31, (), generator=generator, device=device))
        rollout = self.rollout(one * num_samples, sampling=sampling, seed=seed)
        scores = self.score(rollout) if num_samples > 1 or self.reward is not None else torch.zeros(1)
        best = int(scores.argmax())
        return rollout.ids[best, int(rollout.prompt_lengths[best]) : int(rollout.lengths[best])], float(scores[best])

    def _draw(self, sampling: SamplingSettings, count: int, batch_size: int) -> tuple[Experience, list[dict[str, Any]]]:
        """What one phase draws, of all processes; some samples of this process."""
        settings = self.settings
        first = self.phase.number * (count // settings.group_size)
        taken = self.order.take(first, count // settings.group_size)
        prompts = [self.prompts[index] for index in taken for _ in range(settings.group_size)]
        # each chunk has a generator of its own, so draws do not depend on how chunks are spread over processes
        batch_size = min(batch_size, -(-count // world_size()))
        starts = list(range(0, count, batch_size))
        mine = range(rank() * len(starts) // world_size(), (rank() + 1) * len(starts) // world_size())
        if len(mine) == 0:
            raise ValueError(f"update_timesteps must give each of {world_size()} processes a response, got {count}")
        draws = list(itertools.islice(seeds(settings.seed, self.phase.number), len(starts)))
        parts: list[Experience] = []
        samples: list[dict[str, Any]] = []
        for chunk in mine:
            chosen = prompts[starts[chunk] : starts[chunk] + batch_size]
            rollout = draw_rollout(
                self.actor_critic,
                chosen,
                sampling,
                tokenizer=self.tokenizer,
                generator=torch.Generator(self.device).manual_seed(draws[chunk]),
            )
            scores = self.score(rollout)
            parts.append(experience_of(rollout, scores))
            samples += rollout.samples(scores, settings.samples_logged - len(samples))
        whole = gathered(joined(parts, pad_id=sampling.pad_id), pad_id=sampling.pad_id)
        return whole, samples

    # -------------------------------------------------------------------------------------------------------- learning

    def step(self, rollout: Rollout, rewards: Any = None) -> dict[str, float]:
        """Learns from a rollout of this process: ``epochs`` passes in minibatches.

        Args:
            rollout: from ``rollout``, or ``rollout_of`` for responses made elsewhere: log-probabilities are computed
                anew in either case.
            rewards: ``(b,)`` numbers; by default the trainer's reward.

        Returns:
            The metrics of this phase.

        Raises:
            ValueError: wrong shape, NaN, ids out of range, or a number of rows that is not whole groups.
        """
        scores = self.score(rollout) if rewards is None else check_scores(rewards, len(rollout))
        if self.actor_critic.vocab_size is not None:
            check_ids(rollout.ids, self.actor_critic.vocab_size, "rollout")
        if len(rollout) % self.settings.group_size:
            raise ValueError(f"rollout must hold whole groups of {self.settings.group_size}, got {len(rollout)} rows")
        own = experience_of(rollout.to(self.device), scores)
        self._begin(gathered(own, pad_id=0), rollout.temperature)
        while not self.phase.is_done:
            self._next_update()
        return self._end()

    def _begin(self, drawn: Experience, temperature: float) -> None:
        """Judges what was drawn, by all processes, in the very batches that the first pass will learn from."""
        settings = self.settings
        minibatches = self.phase.first_minibatches(drawn["ids"].shape[0])
        batches = [part for rows in minibatches for part in self.update.micro_batches(rows)]
        experience = judged_by_all(self.actor_critic, drawn, batches, temperature=temperature)
        in_reward = self.kl.value if settings.kl_in == "reward" else 0.0
        whole = with_advantages(
            experience,
            estimator=settings.advantage_estimator,
            group_size=settings.group_size,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            kl_weight=in_reward,
            kl_estimator=settings.kl_estimator,
            whiten_rewards=settings.whiten_rewards,
            whiten_advantages=settings.whiten_advantages,
            missing_eos_penalty=settings.missing_eos_penalty,
            group_scale=settings.group_scale,
        )
        facts = experience_metrics(whole)
        facts["reward_with_kl"] = facts["reward"] - self.kl.value * facts["kl"]
        whole["temperature"] = torch.tensor(temperature, dtype=torch.float64)
        self.phase.begin(whole, facts)

    def _next_update(self) -> None:
        """One optimizer update on the next minibatch."""
        phase = self.phase
        assert phase.experience is not None
        sums = self.update(phase.experience, phase.rows(), number=phase.updates + 1)
        if not phase.sums:
            phase.facts["ratio_deviation_at_start"] = sums["deviation_max"]
        phase.advance(sums)

    def _end(self) -> dict[str, float]:
        """Closes the phase; its metrics."""
        phase = self.phase
        assert phase.experience is not None
        metrics = {
            **phase.facts,
            **update_metrics(phase.sums),
            "kl_coefficient": self.kl.value,
            "skipped": float(self.update.guard.skipped),
        }
        self.kl.update(phase.facts["kl"], phase.experience["scores"].shape[0])
        phase.end()
        return metrics

    # ------------------------------------------------------------------------------------------------------- the loop

    def _train(self, sampling: SamplingSettings, *, phases: int, count: int, batch_size: int) -> PolicyResult:
        if not self.prompts:
            raise ValueError("prompts must be given to the trainer for train, got none")
        if self.reward is None:
            raise ValueError("reward must be given to the trainer for train, got None")
        if self.settings.missing_eos_penalty and sampling.eos_id is None and not sampling.stop_strings:
            raise ValueError("missing_eos_penalty needs an end: give eos_id, stop_strings or a tokenizer with an EOS")
        if count % self.settings.group_size:
            raise ValueError(
                f"update_timesteps must be a multiple of group_size {self.settings.group_size}, got {count}"
            )
        outcome: Literal["finished", "interrupted"] = "finished"
        rows: list[dict[str, float]] = []
        with contextlib.ExitStack() as stack:
            run = None if self.checkpoint_dir is None else stack.enter_context(self._run_directory())
            if not self._restored:
                self._start(run)
            bar = stack.enter_context(
                progress_bar(phases, initial=self.phase.number, description=type(self).__name__, is_main=rank() == 0)
            )
            log, sample_log = (self._log(run, stack, name, bar) for name in ("metrics.jsonl", "samples.jsonl"))
            interrupt = stack.enter_context(InterruptHandler())
            last_saved = self.updates
            while self.phase.number < phases and outcome == "finished":
                started = time.monotonic()
                if self.phase.experience is None:
                    whole, samples = self._draw(sampling, count, batch_size)
                    self._begin(whole, sampling.temperature)
                    self.phase.facts["rollout_seconds"] = time.monotonic() - started
                    if sample_log is not None:
                        sample_log.log(self.updates, samples=json.dumps(samples))
                while not self.phase.is_done and outcome == "finished":
                    self._next_update()
                    if interrupt.should_stop():
                        outcome = "interrupted"
                    due = self.updates - last_saved >= self.settings.checkpoint_every
                    if run is not None and (due or outcome == "interrupted"):
                        last_saved = self.updates
                        self._save(run)
                if self.phase.is_done:
                    seconds = time.monotonic() - started
                    new_tokens = self.phase.facts["response_length"] * count
                    rows.append({**self._end(), "tokens_per_second": round(new_tokens / max(seconds, 1e-9), 1)})
                    if log is not None:
                        log.log(self.updates, rows[-1])
                    bar.update()
            if run is not None and outcome == "finished" and rows:
                self._save(run)
            curves = _curves(run) if run is not None and rank() == 0 else None
        return PolicyResult(
            outcome=outcome,
            phases=self.phase.number,
            updates=self.updates,
            metrics=rows,
            checkpoints=None if run is None else run.checkpoints,
            curves=curves,
        )

    def _run_directory(self) -> RunDirectory:
        assert self.checkpoint_dir is not None
        return RunDirectory(
            self.checkpoint_dir,
            resume="auto" if self._restored else self.resume,
            seed=self.settings.seed,
            device=self.device,
            settings=self.settings.as_json(),
            packages=("palm-rlhf",),
        )

    def _log(self, run: RunDirectory | None, stack: contextlib.ExitStack, name: str, bar: Any) -> MetricsLog | None:
        if run is None:
            return None
        main = name == "metrics.jsonl"
        # metrics are logged behind the last update of their phase, samples before its first one; rows that an earlier
        # call wrote behind its last checkpoint are written again
        logged = self.updates - (not main or self.phase.experience is not None)
        return stack.enter_context(
            MetricsLog(
                run.path / name,
                resume_step=logged if self.updates else -1,
                is_main=rank() == 0,
                trackers=self.trackers if main else [],
                progress=bar if main else None,
                shown=("reward", "kl"),
            )
        )

    def _start(self, run: RunDirectory | None) -> None:
        if run is None or not run.resumes:
            seed_everything((self.settings.seed + rank()) % 2**32)
        else:
            checkpoint = load_checkpoint(run.checkpoints)
            state = restore_policy(self.actor_critic, checkpoint, trainer=type(self).__name__, settings=self.settings)
            self.phase.load_state_dict(state["phase"], self.device)
            self.update.load_state_dict(state["update"])
            self.kl.load_state_dict(state["kl"])
            restore_rng(checkpoint.rng)
        self._restored = True

    def _save(self, run: RunDirectory) -> None:
        save_policy(
            run.checkpoints,
            self.updates,
            self.actor_critic,
            trainer=type(self).__name__,
            settings=self.settings,
            state={
                "phase": self.phase.state_dict(),
                "update": self.update.state_dict(),
                "kl": self.kl.state_dict(),
            },
            tokenizer=self.tokenizer,
        )


def _curves(run: RunDirectory) -> Path | None:
    rows = read_metrics(run.metrics_path)
    names = [name for name in CURVES if sum(isinstance(row.get(name), float) for row in rows) > 1]
    if not names:
        return None
    try:
        return plot_curves(run.metrics_path, run.curves_path, names=names)
    except ImportError:
        return None
