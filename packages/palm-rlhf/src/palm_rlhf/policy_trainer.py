"""The loop that PPO and GRPO share: draw rollouts, score them, learn from them, and be able to go on after a kill.

One phase draws a batch of responses and makes ``epochs`` passes over it in minibatches. A checkpoint may fall between
any two updates, in the middle of an epoch too: it holds the experience at hand. Prompts, draws and shuffles are
functions of the seed and of counters, so a run that was killed and resumed ends bit for bit like one that was not.

Processes share each minibatch, weigh their tokens by the GLOBAL minibatch and add up their gradients once, after the
last backward: two processes make the update that one would make. (``DistributedDataParallel`` is not used: a base that
carries the scopes of several models has parameters that a given loss does not touch.)

Long because the loop and all that it resumes from are read together.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm_core.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_weights, save_checkpoint
from lm_core.distributed import rank, world_size
from lm_core.generation import eval_mode
from lm_core.launching import start_accelerator
from lm_core.training import (
    InterruptHandler,
    MetricsLog,
    NonFiniteGuard,
    RunDirectory,
    clip_global_norm,
    optimizer_groups,
    pick_device,
    plot_curves,
    progress_bar,
    read_metrics,
    restore_rng,
    seed_everything,
)
from palm_rlhf.actor_critic import ActorCritic
from palm_rlhf.experience import Experience, experience_metrics, gathered, joined, judge, rows_of, with_advantages
from palm_rlhf.gradient_sums import sum_gradients
from palm_rlhf.kl import KLCoefficient, kl_estimate
from palm_rlhf.objectives import clipped_surrogate, clipped_value_loss, reinforce_surrogate, token_weights
from palm_rlhf.policy_settings import PolicySettings
from palm_rlhf.prompts import Prompt, PromptOrder, check_prompts, load_prompts
from palm_rlhf.rewards import as_reward, check_scores
from palm_rlhf.rollouts import Rollout, SamplingSettings, draw_rollout

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
        tokenizer: see ``lm_core.tokenizers.Tokenizer``; a Hugging Face tokenizer is wrapped.
        settings: everything that is a number or a name.
        checkpoint_dir: folder of the run; None writes nothing.
        resume: as of ``lm_core.training.RunDirectory``.
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
        self.tokenizer = tokenizer
        self.prompts: list[Prompt] = [] if prompts is None else load_prompts(prompts, tokenizer=tokenizer)
        if prompts is not None:
            check_prompts(self.prompts, vocab_size)
        self.reward = None if reward is None else as_reward(reward)
        self.device = pick_device(settings.device)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.resume, self.trackers = resume, list(trackers)
        self.kl = KLCoefficient(settings.kl_div_loss_weight, target=settings.kl_target, horizon=settings.kl_horizon)
        self.guard = NonFiniteGuard()
        self.accelerator = start_accelerator(self.device, tracker_names=[], folder=self.checkpoint_dir or Path("."))
        self.actor_critic = actor_critic = make_policy().to(self.device)
        if self.prompts:
            check_prompts(self.prompts, actor_critic.vocab_size)
        if isinstance(reward_model := getattr(self.reward, "model", None), nn.Module):
            reward_model.to(self.device)
        self.order = PromptOrder(max(1, len(self.prompts)), seed=settings.seed)
        self.actor_parameters = actor_critic.actor_parameters()
        self.critic_parameters = actor_critic.critic_parameters()
        self.optimizer = torch.optim.AdamW(self._groups(), betas=settings.betas)
        self.phase = self.updates = self.epoch = self.cursor = 0
        self._experience: Experience | None = None
        self._facts: dict[str, float] = {}  # metrics of the experience at hand
        self._sums: dict[str, float] = {}  # of the updates made on it so far
        self._restored = False

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
    def best_of(self, prompt: Any, *, num_samples: int, sampling: SamplingSettings) -> tuple[Tensor, float]:
        """The response with the highest reward among ``num_samples``: its ids without the prompt, and that reward."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        one = load_prompts([prompt], tokenizer=self.tokenizer)
        rollout = self.rollout(one * num_samples, sampling=sampling, seed=int(torch.randint(2**31, ())))
        scores = self.score(rollout) if num_samples > 1 or self.reward is not None else torch.zeros(1)
        best = int(scores.argmax())
        return rollout.ids[best, int(rollout.prompt_lengths[best]) : int(rollout.lengths[best])], float(scores[best])

    def _draw(self, sampling: SamplingSettings, count: int, batch_size: int) -> tuple[Experience, list[dict[str, Any]]]:
        """One phase's experience, of all processes; some samples of this process."""
        settings = self.settings
        first = self.phase * (count // settings.group_size)
        taken = self.order.take(first, count // settings.group_size)
        prompts = [self.prompts[index] for index in taken for _ in range(settings.group_size)]
        # each chunk has a generator of its own, so draws do not depend on how chunks are spread over processes
        batch_size = min(batch_size, -(-count // world_size()))
        starts = list(range(0, count, batch_size))
        mine = range(rank() * len(starts) // world_size(), (rank() + 1) * len(starts) // world_size())
        if len(mine) == 0:
            raise ValueError(f"update_timesteps must give each of {world_size()} processes a response, got {count}")
        parts: list[Experience] = []
        samples: list[dict[str, Any]] = []
        for chunk in mine:
            chosen = prompts[starts[chunk] : starts[chunk] + batch_size]
            seed = ((settings.seed * 1_000_003 + self.phase) * 1_000_003 + chunk) % 2**63
            rollout = draw_rollout(
                self.actor_critic,
                chosen,
                sampling,
                tokenizer=self.tokenizer,
                generator=torch.Generator(self.device).manual_seed(seed),
            )
            scores = self.score(rollout)
            parts.append(judge(self.actor_critic, rollout, scores, batch_size=batch_size))
            samples += _samples(rollout, scores, settings.samples_logged - len(samples))
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
        from lm_core._checks import check_ids

        if self.actor_critic.vocab_size is not None:
            check_ids(rollout.ids, self.actor_critic.vocab_size, "rollout")
        if len(rollout) % self.settings.group_size:
            raise ValueError(f"rollout must hold whole groups of {self.settings.group_size}, got {len(rollout)} rows")
        own = judge(self.actor_critic, rollout, scores, batch_size=self.settings.minibatch_size)
        self._begin(gathered(own, pad_id=0), rollout.temperature)
        while not self._phase_is_done():
            self._next_update()
        return self._end()

    def _begin(self, experience: Experience, temperature: float) -> None:
        settings = self.settings
        in_reward = self.kl.value if settings.kl_in == "reward" else 0.0
        self._experience = with_advantages(
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
        self._experience["temperature"] = torch.tensor(temperature, dtype=torch.float64)
        self._facts = experience_metrics(self._experience)
        self._facts["reward_with_kl"] = self._facts["reward"] - self.kl.value * self._facts["kl"]
        self._sums = {}
        self.epoch = self.cursor = 0

    def _phase_is_done(self) -> bool:
        return self.epoch >= self.settings.epochs

    def _next_update(self) -> None:
        """One optimizer update on the next minibatch."""
        assert self._experience is not None
        count = self._experience["scores"].shape[0]
        generator = torch.Generator().manual_seed(
            ((self.settings.seed * 1_000_003 + self.phase) * 1_000_003 + self.epoch) % 2**63
        )
        order = torch.randperm(count, generator=generator)
        rows = order[self.cursor : self.cursor + self.settings.minibatch_size]
        self._update(rows.to(self.device))
        self.updates += 1
        self.cursor += self.settings.minibatch_size
        if self.cursor >= count:
            self.epoch, self.cursor = self.epoch + 1, 0

    def _update(self, rows: Tensor) -> None:
        """Sums the gradients of all parts of a minibatch over micro-batches and processes, and steps."""
        assert self._experience is not None
        settings, policy = self.settings, self.actor_critic
        weights = token_weights(
            self._experience["response_mask"][rows], settings.aggregation, max_new_tokens=settings.constant_length
        )
        share = torch.arange(rows.shape[0], device=rows.device)[rank() :: world_size()]
        size = settings.micro_batch_size or max(1, share.shape[0])
        training = policy.roles.learns_in_training_mode
        was_training = policy.training
        sums: dict[str, Tensor] = {}
        with contextlib.nullcontext() if training else eval_mode(policy):
            if training:
                policy.train()
            try:
                for part in share.split(size) if share.shape[0] else ():
                    loss, measured = self._loss(rows_of(self._experience, rows[part]), weights[part])
                    loss.backward()
                    for name, value in measured.items():
                        if name.endswith("_max"):
                            sums[name] = torch.maximum(sums.get(name, value), value)
                        else:
                            sums[name] = sums.get(name, torch.zeros_like(value)) + value
            finally:
                if training:
                    policy.train(was_training)
        parameters = [*self.actor_parameters, *self.critic_parameters]
        sum_gradients(parameters)
        norms = [
            clip_global_norm(group, settings.max_norm)
            for group in (self.actor_parameters, self.critic_parameters)
            if group
        ]
        total = _over_processes(sums, self.device)
        if self.guard.allows(
            self.updates + 1, torch.tensor(total["loss"]), torch.stack([n.float() for n in norms]).sum()
        ):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total["grad_norm"], total["updates"] = float(norms[0]), 1.0
        if "ratio_deviation_at_start" not in self._sums:
            self._sums["ratio_deviation_at_start"] = total["deviation_max"]
        for name, number in total.items():
            known = self._sums.get(name)
            combine = max if name.endswith("_max") else _plus
            self._sums[name] = number if known is None else combine(known, number)

    def _loss(self, part: Experience, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This part's share of the loss of the whole minibatch, and sums for the metrics."""
        assert self._experience is not None
        settings, mask = self.settings, part["response_mask"]
        judgement = self.actor_critic(
            part["ids"],
            part["mask"],
            mask,
            temperature=float(self._experience["temperature"]),
            kept=part.get("kept"),
        )
        scores = judgement.scores
        weights = weights[:, : mask.shape[1]].to(scores.log_probs)
        if settings.advantage_estimator == "reinforce":
            surrogate = reinforce_surrogate(scores.log_probs, part["log_probs"], part["advantages"])
        else:
            surrogate = clipped_surrogate(
                scores.log_probs,
                part["log_probs"],
                part["advantages"],
                eps_clip=settings.eps_clip,
                eps_clip_high=settings.eps_clip_high,
            )
        divergence = kl_estimate(scores.unfiltered, part["reference"], settings.kl_estimator)
        policy_loss = (surrogate.loss * weights).sum()
        entropy = (scores.entropy * weights).sum()
        loss = policy_loss - settings.beta_s * entropy
        if settings.kl_in == "loss" and self.kl.value:
            loss = loss + self.kl.value * (divergence * weights).sum()
        measured = {"policy_loss": policy_loss}
        if settings.advantage_estimator == "gae":
            value_loss, clipped = self._value_loss(judgement, part)
            value_loss = (value_loss * weights).sum()
            loss = loss + settings.value_loss_weight * value_loss
            measured |= {"value_loss": value_loss, "value_clipped_tokens": (clipped & mask).sum()}
        ratio = surrogate.ratio.where(mask, 1)
        measured |= {
            "loss": loss,
            "tokens": mask.sum(),
            "clipped_tokens": (surrogate.clipped & mask).sum(),
            "ratio_tokens": surrogate.ratio.where(mask, 0).sum(),
            "ratio_max": ratio.max(),
            "deviation_max": (ratio - 1).abs().max(),
            "entropy_tokens": scores.entropy.where(mask, 0).sum(),
            "kl_tokens": divergence.where(mask, 0).sum(),
            "step_kl_tokens": kl_estimate(part["log_probs"], scores.log_probs, "k3").where(mask, 0).sum(),
        }
        return loss, {name: value.detach().double() for name, value in measured.items()}

    def _value_loss(self, judgement: Any, part: Experience) -> tuple[Tensor, Tensor]:
        if self.actor_critic.bins is not None:
            loss = self.actor_critic.bins.loss(judgement.value_logits, part["returns"])
            return loss, torch.zeros_like(part["response_mask"])
        return clipped_value_loss(
            judgement.values, part["values"], part["returns"].to(judgement.values), value_clip=self.settings.value_clip
        )

    def _end(self) -> dict[str, float]:
        """Closes the phase; its metrics."""
        assert self._experience is not None
        sums, facts = self._sums, self._facts
        tokens, updates = max(sums["tokens"], 1.0), max(sums["updates"], 1.0)
        metrics = {
            **facts,
            "loss": sums["loss"] / updates,
            "policy_loss": sums["policy_loss"] / updates,
            "entropy": sums["entropy_tokens"] / tokens,
            "clip_fraction": sums["clipped_tokens"] / tokens,
            "ratio_mean": sums["ratio_tokens"] / tokens,
            "ratio_max": sums["ratio_max"],
            "ratio_deviation_at_start": sums["ratio_deviation_at_start"],
            "step_kl": sums["step_kl_tokens"] / tokens,
            "grad_norm": sums["grad_norm"] / updates,
            "kl_coefficient": self.kl.value,
            "skipped": float(self.guard.skipped),
        }
        if "value_loss" in sums:
            metrics["value_loss"] = sums["value_loss"] / updates
            metrics["value_clip_fraction"] = sums["value_clipped_tokens"] / tokens
        self.kl.update(facts["kl"], self._experience["scores"].shape[0])
        self._experience = None
        self.phase += 1
        return metrics

    # ------------------------------------------------------------------------------------------------------- the loop

    def _train(self, sampling: SamplingSettings, *, phases: int, count: int, batch_size: int) -> PolicyResult:
        if not self.prompts:
            raise ValueError("prompts must be given to the trainer for train, got none")
        if self.reward is None:
            raise ValueError("reward must be given to the trainer for train, got None")
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
                progress_bar(phases, initial=self.phase, description=type(self).__name__, is_main=rank() == 0)
            )
            log, sample_log = (self._log(run, stack, name, bar) for name in ("metrics.jsonl", "samples.jsonl"))
            interrupt = stack.enter_context(InterruptHandler())
            last_saved = self.updates
            while self.phase < phases and outcome == "finished":
                started = time.monotonic()
                if self._experience is None:
                    whole, samples = self._draw(sampling, count, batch_size)
                    self._begin(whole, sampling.temperature)
                    self._facts["rollout_seconds"] = time.monotonic() - started
                    if sample_log is not None:
                        sample_log.log(self.phase + 1, samples=json.dumps(samples))
                while not self._phase_is_done() and outcome == "finished":
                    self._next_update()
                    if interrupt.should_stop():
                        outcome = "interrupted"
                    due = self.updates - last_saved >= self.settings.checkpoint_every
                    if run is not None and (due or outcome == "interrupted"):
                        last_saved = self.updates
                        self._save(run)
                if self._phase_is_done():
                    seconds = time.monotonic() - started
                    new_tokens = self._facts["response_length"] * count
                    rows.append({**self._end(), "tokens_per_second": round(new_tokens / max(seconds, 1e-9), 1)})
                    if log is not None:
                        log.log(self.phase, rows[-1])
                    bar.update()
            if run is not None and outcome == "finished" and rows:
                self._save(run)
            curves = _curves(run) if run is not None and rank() == 0 else None
        return PolicyResult(
            outcome=outcome,
            phases=self.phase,
            updates=self.updates,
            metrics=rows,
            checkpoints=None if run is None else run.checkpoints,
            curves=curves,
        )

    def _groups(self) -> list[dict[str, Any]]:
        settings, policy = self.settings, self.actor_critic
        groups = []
        for parameters, rate, decay in (
            (self.actor_parameters, settings.actor_lr, settings.actor_wd),
            (self.critic_parameters, settings.critic_lr, settings.critic_wd),
        ):
            if parameters:
                made = optimizer_groups(policy, weight_decay=decay, parameters=parameters)
                groups += [{**group, "lr": rate} for group in made]
        return groups

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
        return stack.enter_context(
            MetricsLog(
                run.path / name,
                resume_step=self.phase or -1,
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
            self._resume(load_checkpoint(run.checkpoints))
        self._restored = True

    def _weights(self) -> nn.Module:
        """What the checkpoint's model file holds: the actor's network, which opens with ``from_pretrained``."""
        network: nn.Module = self.actor_critic.palm
        return network

    def _other_state(self) -> dict[str, Tensor]:
        """Weights that are not in the actor's network: value head, a critic or a reference of their own."""
        own = {id(tensor) for tensor in self._weights().state_dict(keep_vars=True).values()}
        state = self.actor_critic.state_dict(keep_vars=True)
        return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in own}

    def _save(self, run: RunDirectory) -> None:
        saves = getattr(self.tokenizer, "save_pretrained", None)
        save_checkpoint(
            run.checkpoints,
            self.updates,
            model=self._weights(),
            trainer_state={
                "trainer": type(self).__name__,
                "settings": self.settings.as_json(),
                "counters": [self.phase, self.updates, self.epoch, self.cursor],
                "optimizer": self.optimizer.state_dict(),
                "other": {name: tensor.cpu() for name, tensor in self._other_state().items()},
                "experience": self._experience or {},
                "facts": self._facts,
                "sums": self._sums,
                "kl": self.kl.state_dict(),
                "guard": self.guard.state_dict(),
            },
            tokenizer=self.tokenizer if callable(saves) else None,
            keep=self.settings.keep_checkpoints,
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        state, where = checkpoint.trainer_state, checkpoint.path
        if state.get("trainer") != type(self).__name__:
            raise CheckpointError(f"{where} was not written by {type(self).__name__}, got {state.get('trainer')!r}")
        stored, own = state["settings"], self.settings.as_json()
        for name in ("seed", "group_size", "minibatch_size", "advantage_estimator"):
            if stored[name] != own[name]:
                raise ValueError(f"{name} must be {stored[name]} as in the run being resumed, got {own[name]}")
        if set(state["other"]) != set(self._other_state()):
            raise CheckpointError(
                f"{where} is of another critic: {sorted(set(state['other']) ^ set(self._other_state()))}"
            )
        load_weights(self._weights(), checkpoint.model_state or {}, where=str(where))
        self.actor_critic.load_state_dict(state["other"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        for group, fresh in zip(self.optimizer.param_groups, self._groups(), strict=True):
            group.update({name: fresh[name] for name in ("lr", "weight_decay")})
        self.phase, self.updates, self.epoch, self.cursor = state["counters"]
        self._experience = {name: value.to(self.device) for name, value in state["experience"].items()} or None
        if self._experience is not None:
            self._experience["temperature"] = self._experience["temperature"].cpu()
        self._facts, self._sums = dict(state["facts"]), dict(state["sums"])
        self.kl.load_state_dict(state["kl"])
        self.guard.load_state_dict(state["guard"])
        restore_rng(checkpoint.rng)


def _over_processes(sums: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Sums, and maxima where a name says so, of all processes; a process without rows has none."""
    if world_size() == 1:
        return {name: float(value) for name, value in sums.items()}
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, {name: float(value) for name, value in sums.items()})
    whole: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            known = whole.get(name)
            combine = max if name.endswith("_max") else _plus
            whole[name] = value if known is None else combine(known, value)
    return whole


def _plus(a: float, b: float) -> float:
    return a + b


def _samples(rollout: Rollout, scores: Tensor, number: int) -> list[dict[str, Any]]:
    chosen: Iterable[int] = range(min(max(number, 0), len(rollout)))
    texts, prompts = rollout.texts, rollout.prompt_texts
    return [
        {
            "prompt": None if prompts is None else prompts[row],
            "response": texts[row]
            if texts is not None
            else rollout.ids[row, int(rollout.prompt_lengths[row]) : int(rollout.lengths[row])].tolist(),
            "reward": round(float(scores[row]), 4),
        }
        for row in chosen
    ]


def _curves(run: RunDirectory) -> Path | None:
    rows = read_metrics(run.metrics_path)
    names = [name for name in CURVES if sum(isinstance(row.get(name), float) for row in rows) > 1]
    if not names:
        return None
    try:
        return plot_curves(run.metrics_path, run.curves_path, names=names)
    except ImportError:
        return None
