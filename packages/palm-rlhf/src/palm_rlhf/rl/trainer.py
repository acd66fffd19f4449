"""Reinforcement learning from human feedback: PPO, GRPO and other objectives on the rewards of responses.

One phase draws a batch of responses and makes ``epochs`` passes over it in minibatches. A checkpoint may be written
between any two updates, since it contains the current experience. Prompts, draws and shuffles are functions of the seed
and of counters, so a run that is killed and resumed ends bit for bit like an uninterrupted one.
"""

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lm_core.checks import check_ids, check_positive, either, typed
from lm_core.data.epochs import EpochOrder, seed_of
from lm_core.distributed import rank, world_size
from lm_core.generation.decoding import Filter, as_eos_ids
from lm_core.tokenizers import end_ids
from lm_core.training.metrics import MetricsLog
from lm_core.training.session import SavedValue, TrainingResult, TrainingSession
from palm_rlhf.data.prompts import Prompt, as_tokenizer, check_prompts, fingerprint, load_prompts
from palm_rlhf.data.rollouts import Rollout, with_texts
from palm_rlhf.reward.log import RewardLog, TrainerState, merged
from palm_rlhf.reward.rewards import as_reward, check_scores, reward_identity
from palm_rlhf.rl.advantages import zero_variance_groups
from palm_rlhf.rl.arguments import sort_arguments
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.engines import as_engine
from palm_rlhf.rl.experience import (
    Experience,
    Scored,
    all_gathered,
    concatenated,
    experience_metrics,
    gathered,
    prompt_features,
    score_experience,
    token_rewards,
)
from palm_rlhf.rl.importance import importance_weights, mismatch_metrics
from palm_rlhf.rl.kl import kl_estimate
from palm_rlhf.rl.objectives import GRPO, PPO, Objective
from palm_rlhf.rl.policy import ActorCritic, Role
from palm_rlhf.rl.policy_files import PolicyFiles
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout, new_token_limit
from palm_rlhf.rl.state import Phase
from palm_rlhf.rl.update import PolicyUpdate, update_metrics

_EPISODES = 50_000  # of the original
CURVES = ("reward", "kl", "entropy", "clip_fraction", "response_length", "explained_variance", "validation_reward")


@dataclass(frozen=True, kw_only=True)
class PolicyResult(TrainingResult):
    """Result of a run; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        phases: number of completed phases, each of one batch of rollouts.
        metrics: metrics of each phase of this call of ``train``.
        best: step and mean reward of the best validation, whose checkpoint is in the folder ``best`` of the run (none
            for step 0, the model as it was given); None without validation prompts.
    """

    phases: int
    metrics: list[dict[str, float]]
    best: dict[str, float] | None = None

    @property
    def updates(self) -> int:
        """Completed optimizer updates."""
        return self.step


class RLHFTrainer:
    """Trainer of a policy on the rewards of its responses, by PPO or another objective.

    >>> RLHFTrainer(palm, reward, objective=PPO(eps_clip=0.2), config=RLConfig(actor_lr=1e-4), prompts=prompts)

    The original's call form works too: every field of the objective and of ``RLConfig``, and every argument of
    ``ActorCritic``, may be given as a keyword (``RLHFTrainer(palm=palm, reward_model=model, eps_clip=0.2, ...)``).

    Args:
        policy: a PaLM, a Hugging Face causal model, or an ``ActorCritic`` (alias ``palm``, ``actor_critic``).
        reward: reward of responses (alias ``reward_model``); see ``palm_rlhf.reward.rewards``. None where rewards
            are passed to ``step``.
        objective: an objective such as ``PPO()``, ``GRPO()``, ``RLOO()``, ``REINFORCE()``, or its name.
        config: optimizer, batches, precision and checkpoints.
        prompts: texts, chats, rows, a dataset, or token ids (alias ``prompts_path``, ``prompt_token_ids``); see
            ``palm_rlhf.data.prompts.load_prompts``. None where rollouts are passed to ``step``.
        validation_prompts: held-out prompts, likewise; a response to each is drawn and scored every ``validate_every``
            updates, and the checkpoint with the highest mean reward is kept.
        tokenizer: tokenizer with ``encode`` and ``decode``, Hugging Face's, or its folder or name; needed for texts.
        template_kwargs: further arguments of the chat template of prompts, such as ``enable_thinking``.
        checkpoint_dir: folder of the run (checkpoints, metrics.jsonl, samples.jsonl, curves.png); None writes nothing.
        resume: "auto" resumes if there is a checkpoint, True demands one, False demands a fresh folder.
        trackers: names of trackers that ``accelerate`` knows, and objects with ``log(values, step=...)``.
        engine: engine that draws responses: "lm_core", "vllm" (Hugging Face policies), or an object; see
            ``palm_rlhf.rl.engines``. Its weights are updated before each draw.
        engine_arguments: further arguments of ``vllm.LLM``, such as ``max_model_len``.
        **options: fields of ``objective`` and ``config`` to override, and arguments of ``ActorCritic``.

    Raises:
        ValueError: a number is out of range; an argument and its alias are both given; or there is no policy.
        TypeError: an argument is unknown or of another type.
    """

    default_objective: ClassVar[type[Objective]] = PPO

    @typed
    def __init__(
        self,
        policy: Any = None,
        reward: Any = None,
        *,
        objective: Objective | str | None = None,
        config: RLConfig | None = None,
        prompts: Any = None,
        validation_prompts: Any = None,
        tokenizer: Any = None,
        template_kwargs: Mapping[str, Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        engine: Any = "lm_core",
        engine_arguments: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        policy, policy_options, reward, prompts, objective, config = sort_arguments(
            policy, reward, prompts, objective or self.default_objective, config or RLConfig(), options
        )
        # objective, prompts and reward
        self.objective = objective
        self.config = config
        self.epochs = config.epochs or objective.epochs
        if not objective.uses_ratio and self.epochs > 1:
            raise ValueError(f"epochs must be 1 with {type(objective).__name__}, got {self.epochs}")
        unit = objective.group_size if objective.couples_responses else 1
        for name in ("minibatch_size", "micro_batch_size"):
            if (getattr(config, name) or unit) % unit:
                raise ValueError(
                    f"{name} must be a multiple of group_size {unit} with {type(objective).__name__}, got "
                    f"{getattr(config, name)}"
                )
        self.tokenizer = tokenizer = as_tokenizer(tokenizer)
        self.prompts: list[Prompt] = []
        self.load_prompts = partial(load_prompts, tokenizer=tokenizer, template_kwargs=template_kwargs)
        if prompts is not None:
            self.prompts = self.load_prompts(prompts)
            check_prompts(self.prompts, getattr(policy, "num_tokens", None))
        self.validation_prompts = [] if validation_prompts is None else self.load_prompts(validation_prompts)
        if config.validate_every is not None and not self.validation_prompts:
            raise ValueError(f"validate_every needs validation_prompts, got validate_every={config.validate_every}")
        self.best: dict[str, float] | None = None
        self._validation: tuple[SamplingSettings, int] | None = None
        if not hasattr(tokenizer, "decode"):
            self.tokenizer = None
        self.reward = None if reward is None else as_reward(reward)
        identity_of_reward = reward_identity(self.reward)  # before a base that it shares with the policy gets adapters
        # policy, moved to the device of the session
        self.kl = objective.kl_coefficient()
        self.session = TrainingSession(
            type(self).__name__,
            config=config,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
            packages=("palm-rlhf",),
        )
        self.device = self.session.device
        self.checkpoint_dir = self.session.checkpoint_dir
        if not isinstance(policy, ActorCritic):
            # the seed covers new adapters, which are then equal in all processes
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(config.seed)
                policy = ActorCritic(policy, **policy_options, with_critic=objective.needs_values)
        elif objective.needs_values and policy.value_head is None:
            raise ValueError(f"policy must have a critic for {type(objective).__name__}, got with_critic=False")
        self.actor_critic = policy.to(self.device)
        network = self._network()
        policy.precision = config.precision
        self.engine = as_engine(engine, policy, tokenizer=tokenizer, arguments=engine_arguments)
        if self.prompts:
            check_prompts(self.prompts, policy.vocab_size)
        if isinstance(reward_model := getattr(self.reward, "model", None), nn.Module):
            reward_model.to(self.device)
        self._groups_per_phase = 0
        # order of prompts, updates, and what the session checkpoints
        self.order = EpochOrder(max(1, len(self.prompts)), seed=config.seed)
        self.update = PolicyUpdate(policy, objective, config, kl=self.kl, guard=self.session.guard, network=network)
        self.actor_parameters = self.update.actor_parameters
        self.critic_parameters = self.update.critic_parameters
        self.optimizer = self.update.optimizer
        self.phase = Phase(
            seed=config.seed,
            epochs=self.epochs,
            minibatch_size=config.minibatch_size,
            device=self.device,
            unit=unit,
        )
        name = type(objective).__name__
        files = PolicyFiles(policy)
        self.session.register(
            model=policy.actor,
            objective=policy,
            optimizer=lambda: (self.update.optimizer, None),
            gradients="sum",
            state={
                "phase": self.phase,
                "kl": self.kl,
                "extra": files,
                **({} if self.update.network is None else {"network": self.update.network}),
                **({} if self.reward is None or not self.reward.state_dict() else {"reward": self.reward}),
                **({"best": SavedValue(lambda: self.best, self._set_best)} if self.validation_prompts else {}),
            },
            # the stored experience depends on these; other settings, such as learning rates, may change on resume
            identity={
                "objective": name,
                "group_size": objective.group_size,
                "minibatch_size": config.minibatch_size,
                "prompts": fingerprint(self.prompts),
                **({"validation": fingerprint(self.validation_prompts)} if self.validation_prompts else {}),
                "reward": identity_of_reward,
                "frozen": files.frozen_hash(),
            },
            **files.session_arguments(),
            tokenizer=self.tokenizer,
            validate=self._validate if self.validation_prompts else None,
            record={**asdict(objective), "objective": name},
            curves=CURVES,
            shown=("reward", "kl"),
        )

    def _set_best(self, best: dict[str, float] | None) -> None:
        self.best = best

    def _validate(self) -> dict[str, float]:
        """Mean reward and length of one response to each validation prompt; keeps the best checkpoint.

        Responses are drawn with the settings of training and always the same seeds. Processes share the prompts.
        """
        assert self._validation is not None
        settings, batch_size = self._validation
        local = range(rank(), len(self.validation_prompts), world_size())
        rows: list[tuple[float, float, float]] = []
        self.update_engine()
        with self.session.gathered():
            for start in range(0, len(local), batch_size):
                chosen = local[start : start + batch_size]
                seeds = [seed_of(self.config.seed, "validation", index) for index in chosen]
                rollout = self._rollout([self.validation_prompts[index] for index in chosen], settings, seeds)
                scores = rollout.totals(self.score(rollout)).tolist()
                lengths = (rollout.lengths - rollout.prompt_lengths).tolist()
                rows += zip(scores, lengths, rollout.finished.float().tolist(), strict=True)
        columns = list(zip(*all_gathered(rows), strict=True))
        names = ("validation_reward", "validation_response_length", "validation_eos_rate")
        metrics = {name: sum(values) / len(values) for name, values in zip(names, columns, strict=True)}
        if self.best is None or metrics["validation_reward"] > self.best["reward"]:
            self.best = {"step": float(self.session.step), "reward": metrics["validation_reward"]}
            if self.session.folder is not None and self.session.step:  # step 0 is the model as it was given
                self.session.save(self.session.folder.path / "best" / "checkpoints", keep=1)
        return metrics

    def _network(self) -> tuple[nn.Module, float] | None:
        """The objective's network of prompt features on the device, from the seed, and its learning rate."""
        if self.objective.network(1) is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            made = self.objective.network(self.actor_critic.feature_size)
        assert made is not None
        return made[0].to(self.device), made[1]

    @property
    def updates(self) -> int:
        """Completed optimizer updates."""
        return self.phase.updates

    # --------------------------------------------------------------------------------------------- drawing responses

    @typed
    def sampling(
        self,
        *,
        max_seq_len: int | None = None,
        max_new_tokens: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        eos_token: int | Sequence[int] | None = None,
        filters: Sequence[Filter] = (),
        stop_strings: list[str] | tuple[str, ...] = (),
        **settings: Any,
    ) -> SamplingSettings:
        """Sampling settings for ``rollout``; see ``SamplingSettings``.

        By default all end tokens of model and tokenizer end a response (``lm_core.tokenizers.end_ids``).

        Raises:
            ValueError: neither length is given, or a number is out of range.
        """
        if max_seq_len is None and max_new_tokens is None:
            raise ValueError("give max_new_tokens or max_seq_len, got neither")
        if stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, got tokenizer=None")
        eos_id = either(None, eos_id=eos_id, eos_token=eos_token)
        ends = end_ids(self.tokenizer, self.actor_critic.actor) if eos_id is None else as_eos_ids(eos_id)
        size = self.actor_critic.vocab_size
        if size is not None and any(end >= size for end in ends):
            raise ValueError(f"eos_id must be in [0, {size}), got {eos_id}")
        return SamplingSettings(
            max_new_tokens=max_seq_len if max_new_tokens is None else max_new_tokens,  # type: ignore[arg-type]
            max_seq_len=max_seq_len,
            filters=tuple(filters),
            eos_id=ends[0] if len(ends) == 1 else ends or None,
            stop_strings=tuple(stop_strings),
            pad_id=self.config.pad_id,
            **settings,
        )

    def rollout(self, prompts: Any = None, *, sampling: SamplingSettings, seed: int | None = None) -> Rollout:
        """One response of the actor to each prompt.

        Args:
            prompts: see ``load_prompts``; by default those of the trainer.
            sampling: see ``sampling``.
            seed: seed of the draws; the trainer's by default. A draw is a function of the seed, the prompt and the
                number of earlier draws for it in this call.
        """
        chosen = self.prompts if prompts is None else self.load_prompts(prompts)
        check_prompts(chosen, self.actor_critic.vocab_size)
        seed = self.config.seed if seed is None else seed
        earlier: Counter[str] = Counter()
        seeds = []
        for prompt in chosen:
            key = str(prompt.ids.tolist())
            seeds.append(seed_of(seed, key, earlier[key]))
            earlier[key] += 1
        self.update_engine()
        return self._rollout(chosen, sampling, seeds)

    def update_engine(self, role: Role = "actor") -> None:
        """Sends the weights of a role to the engine, if there is one."""
        if self.engine is not None:
            network, scope = self.actor_critic.network_of(role)
            self.engine.update_weights(network, adapters=[] if scope is None else [scope])

    def _rollout(self, prompts: Sequence[Prompt], sampling: SamplingSettings, seeds: Sequence[int]) -> Rollout:
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return draw_rollout(
            self.actor_critic, prompts, sampling, tokenizer=self.tokenizer, generator=generators, engine=self.engine
        )

    def score(self, rollout: Rollout) -> Tensor:
        """Rewards ``(b,)`` of a rollout, or ``(b, n)`` of its tokens where the reward returns those.

        Raises:
            ValueError: there is no reward, or it returned another shape, NaN or infinity.
        """
        return self._score(rollout, learn=False)[0]

    def _score(self, rollout: Rollout, *, learn: bool) -> tuple[Tensor, RewardLog]:
        """Rewards of a rollout, and what the reward logged; with ``learn``, a reward that learns may do so."""
        if self.reward is None:
            raise ValueError("reward must be given to the trainer, or rewards to step, got reward=None")
        passes = (self.phase.number * self._groups_per_phase + self.phase.redrawn) / max(1, len(self.prompts))
        state = TrainerState(self.phase.updates, self.session.max_steps or 0, passes, rank() == 0)
        log = RewardLog(state, learn=learn)
        scores = self.reward(with_texts(rollout, self.tokenizer), log)
        # as in TRL, a response that every reward leaves out has the reward 0
        missing = scores.isnan()
        if bool(missing.any()):
            rows = missing.reshape(len(rollout), -1).any(dim=1)
            log.log_metric("rewards_missing", float(rows.float().mean()))
            warnings.warn(f"no reward for {int(rows.sum())} of {len(rollout)} responses, which get 0", stacklevel=2)
        return check_scores(scores.masked_fill(missing, 0), rollout), log

    @typed
    @torch.no_grad()
    def generate(
        self,
        max_seq_len: int,
        prompt: Any,
        num_samples: int = 4,
        *,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> Tensor:
        """The best of ``num_samples`` responses by reward: 1-D ids without the prompt.

        Args:
            max_seq_len: maximum length of prompt and response together.
            prompt: ids, text or chat.
            num_samples: number of responses to choose from.
            generator: source of randomness.
            **sampling: further arguments of ``sampling``, such as ``temperature`` and ``eos_id``.

        Raises:
            ValueError: a number is out of range, or there is no reward to rank by.
        """
        settings = self.sampling(max_seq_len=max_seq_len, **sampling)
        return self.best_of(prompt, num_samples=num_samples, sampling=settings, generator=generator)[0]

    @torch.no_grad()
    def best_of(
        self, prompt: Any, *, num_samples: int, sampling: SamplingSettings, generator: torch.Generator | None = None
    ) -> tuple[Tensor, float]:
        """The response with the highest reward among ``num_samples``: its ids without the prompt, and that reward."""
        check_positive(num_samples, "num_samples")
        prompts = self.load_prompts([prompt]) * num_samples
        device = None if generator is None else generator.device
        seed = int(torch.randint(2**31, (), generator=generator, device=device))
        rollout = self.rollout(prompts, sampling=sampling, seed=seed)
        scores = torch.zeros(1)
        if num_samples > 1 or self.reward is not None:
            scores = rollout.totals(self.score(rollout))
        best = int(scores.argmax())
        return rollout.ids[best, int(rollout.prompt_lengths[best]) : int(rollout.lengths[best])], float(scores[best])

    def _draw(
        self, sampling: SamplingSettings, count: int, batch_size: int
    ) -> tuple[Experience, list[dict[str, Any]], dict[str, float], dict[str, float]] | None:
        """The experience and the reward metrics of one phase over all processes; samples and seconds of this one.

        None once a signal has interrupted the run.
        """
        if count < world_size():
            raise ValueError(f"update_timesteps must give each of {world_size()} processes a response, got {count}")
        group_size = self.objective.group_size
        groups = self._groups_per_phase = count // group_size
        first = self.phase.number * groups + self.phase.redrawn
        sending: dict[str, float] = {}
        if self.engine is not None:
            with _timed(sending, "engine_update_seconds", self.device):
                self.update_engine()
        drawn = self._draw_groups(sampling, first, groups, batch_size)
        if drawn is None:
            return None
        experience, samples, seconds, logs = drawn
        redrawn = 0
        # dynamic sampling: groups of equal rewards are replaced by responses to the next prompts
        for _ in range(self.objective.dynamic_sampling):
            equal = zero_variance_groups(experience.scores, group_size=group_size)
            missing = int(equal.sum())
            if not missing:
                break
            first += groups
            groups = missing
            drawn = self._draw_groups(sampling, first, missing, batch_size)
            if drawn is None:
                return None
            more, _, more_seconds, more_logs = drawn
            seconds = {name: value + more_seconds[name] for name, value in seconds.items()}
            redrawn += missing
            logs += more_logs
            kept = (~equal).repeat_interleave(group_size).nonzero()[:, 0]
            parts = [experience.rows(kept)] if kept.numel() else []
            experience = concatenated([*parts, more], pad_id=sampling.pad_id)
        self.phase.redrawn += redrawn
        return experience, samples, {**sending, **seconds}, merged(all_gathered(logs)).values()

    def _draw_groups(
        self, sampling: SamplingSettings, first: int, count: int, batch_size: int
    ) -> tuple[Experience, list[dict[str, Any]], dict[str, float], list[RewardLog]] | None:
        """Responses to ``count`` prompts from position ``first`` of the order on, as ``_draw`` returns them."""
        group_size = self.objective.group_size
        # a draw is a function of seed, prompt and number of the draw, so not of the number of processes
        draws = [
            (index, seed_of(self.config.seed, "responses", index, epoch * group_size + response))
            for epoch, index in (self.order.at(first + position) for position in range(count))
            for response in range(group_size)
        ]
        local = draws[len(draws) * rank() // world_size() : len(draws) * (rank() + 1) // world_size()]
        parts: list[Experience] = []
        samples: list[dict[str, Any]] = []
        logs: list[RewardLog] = []
        seconds = {"rollout_seconds": 0.0, "reward_seconds": 0.0}

        def draw() -> list[Rollout]:
            drawn = []
            for start in range(0, len(local), batch_size):
                indices, seeds = zip(*local[start : start + batch_size], strict=True)
                with _timed(seconds, "rollout_seconds", self.device):
                    drawn.append(self._rollout([self.prompts[index] for index in indices], sampling, seeds))
            return drawn

        rollouts = self.session.interruptible(draw)
        if rollouts is None:
            return None
        for rollout in rollouts:
            with _timed(seconds, "reward_seconds", self.device):
                scores, log = self._score(rollout, learn=True)
            logs.append(log)
            parts.append(Experience.from_rollout(rollout, scores))
            samples += rollout.samples(scores, self.config.samples_logged - len(samples), log.sample_columns())
        if world_size() > 1:
            parts = [part.to(self.device) for part in all_gathered([part.to("cpu") for part in parts])]
        return concatenated(parts, pad_id=sampling.pad_id), samples, seconds, logs

    # -------------------------------------------------------------------------------------------------------- learning

    def whole_phases(self, max_steps: int, update_timesteps: int) -> int:
        """``max_steps`` rounded up to the updates of whole phases of ``update_timesteps`` responses."""
        check_positive(max_steps, "max_steps")
        updates = self.phase.updates_of(update_timesteps)
        return -(-max_steps // updates) * updates

    def step(self, rollout: Rollout, rewards: Any = None) -> dict[str, float]:
        """Trains on a rollout of this process: ``epochs`` passes in minibatches.

        Args:
            rollout: result of ``rollout``, or of ``rollout_of`` for responses of another program.
            rewards: rewards ``(b,)`` of the responses or ``(b, n)`` of their tokens; by default those of the trainer's
                reward.

        Returns:
            The metrics of this phase.

        Raises:
            ValueError: wrong shape, NaN, ids out of range, or a number of rows that is not whole groups.
        """
        log = RewardLog()
        if rewards is None:
            scores, log = self._score(rollout, learn=True)
        else:
            scores = check_scores(rewards, rollout)
        if self.actor_critic.vocab_size is not None:
            check_ids(rollout.ids, self.actor_critic.vocab_size, "rollout")
        if len(rollout) % self.objective.group_size:
            raise ValueError(f"rollout must hold whole groups of {self.objective.group_size}, got {len(rollout)} rows")
        self._begin(gathered(Experience.from_rollout(rollout.to(self.device), scores), pad_id=0))
        self.phase.metrics |= merged(all_gathered([log])).values()
        while not self.phase.is_done:
            self._next_update()
        return self._end()

    def _begin(self, experience: Experience) -> None:
        """Starts a phase: log-probs, values and advantages of new responses, as far as the objective needs them."""
        objective = self.objective
        penalized = bool(self.kl.value) and objective.kl_in == "reward"
        wanted: set[Scored] = set()
        if penalized or (objective.uses_ratio and not self.phase.learns_once(len(experience))):
            wanted.add("log_probs")
        if experience.engine_log_probs is not None:
            wanted.add("log_probs")
        if objective.needs_values:
            wanted.add("values")
        if self.kl.value or objective.needs_reference:
            wanted.add("reference")
        # in the micro-batches of the first pass, so that the ratio is exactly 1 before the first update
        if wanted:
            minibatches = self.phase.first_minibatches(len(experience))
            batches = [part for rows in minibatches for part in self.update.micro_batches(rows)]
            experience = score_experience(self.actor_critic, experience, batches, wanted=wanted)
        kl = None
        if penalized:
            assert experience.unfiltered is not None
            assert experience.reference is not None
            kl = kl_estimate(experience.unfiltered, experience.reference, objective.kl_estimator)
        rewards = token_rewards(
            experience, kl, kl_weight=self.kl.value, missing_eos_penalty=objective.missing_eos_penalty
        )
        experience = replace(experience, token_rewards=rewards)
        advantages, returns = objective.advantages(experience)
        experience = replace(experience, advantages=advantages, returns=returns)
        metrics = experience_metrics(experience)
        if objective.compares_responses:
            equal = zero_variance_groups(experience.scores, group_size=objective.group_size)
            metrics["zero_variance_groups"] = float(equal.float().mean())
        if experience.engine_log_probs is not None:
            assert experience.log_probs is not None
            engine = experience.engine_log_probs.to(experience.log_probs)
            metrics |= mismatch_metrics(experience.log_probs, engine, experience.response_mask)
            weights = importance_weights(
                experience.log_probs,
                engine,
                experience.response_mask,
                correction=self.config.importance_correction,
                cap=self.config.importance_cap,
            )
            metrics["importance_mean"] = float(weights[experience.response_mask].mean())
            experience = replace(experience, importance=weights)
        if self.update.network is not None:
            size = self.config.micro_batch_size or self.config.minibatch_size
            features = prompt_features(self.actor_critic, experience, batch_size=size)
            experience = replace(experience, prompt_features=features)
        self.phase.begin(experience, metrics)

    def _next_update(self) -> None:
        """One optimizer update on the next minibatch."""
        phase = self.phase
        assert phase.experience is not None
        sums = self.update(phase.experience, phase.rows(), number=phase.updates + 1)
        if not phase.sums and "deviation_max" in sums and phase.experience.log_probs is not None:
            phase.metrics["ratio_deviation_at_start"] = sums["deviation_max"]
        phase.advance(sums)
        self.session.step = phase.updates

    def _end(self) -> dict[str, float]:
        """Ends the phase and returns its metrics."""
        phase = self.phase
        assert phase.experience is not None
        metrics = {**phase.metrics, **update_metrics(phase.sums), "skipped": float(self.update.guard.skipped)}
        if "kl" in metrics:
            metrics["reward_with_kl"] = metrics["reward"] - self.kl.value * metrics["kl"]
            metrics["kl_coefficient"] = self.kl.value
            self.kl.update(metrics["kl"], len(phase.experience))
        phase.end()
        return metrics

    # ------------------------------------------------------------------------------------------------------- the loop

    @typed
    def train(
        self,
        num_episodes: int = _EPISODES,
        max_timesteps: int = 1,
        update_timesteps: int = 64,
        max_batch_size: int = 64,
        max_seq_len: int | None = None,
        eos_token: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        *,
        max_steps: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        **sampling: Any,
    ) -> PolicyResult:
        """Trains the policy; an episode is one response of any length.

        Args:
            num_episodes: responses of the whole run.
            max_timesteps: factor on ``num_episodes``.
            update_timesteps: responses per phase, drawn before its updates.
            max_batch_size: responses per batch of the draw.
            max_seq_len: maximum length of prompt and response together.
            eos_token: alias of ``eos_id``.
            temperature: divisor of the logits.
            max_steps: optimizer updates of the whole run, rounded up to whole phases, instead of ``num_episodes``.
            eos_id: id or ids that end a response; by default those of model and tokenizer.
            **sampling: further fields of ``SamplingSettings``: ``max_new_tokens``, ``top_k``, ``top_p``, ``min_p``,
                ``filters``, ``repetition_penalty``, ``min_new_tokens``, ``stop_strings``.

        Raises:
            ValueError: a number is out of range, or a prompt leaves no token for a response.
            RuntimeError: another run is using the folder, or losses were not finite in too many updates in a row.
        """
        check_positive(num_episodes, "num_episodes")
        check_positive(max_timesteps, "max_timesteps")
        check_positive(update_timesteps, "update_timesteps")
        check_positive(max_batch_size, "max_batch_size")
        # check everything before the first draw
        if max_steps is not None and num_episodes != _EPISODES:
            raise ValueError(f"give num_episodes or max_steps, not both, got {num_episodes} and {max_steps}")
        if max_steps is None:
            count = min(update_timesteps, num_episodes * max_timesteps)
            phases = num_episodes * max_timesteps // count
        else:
            count = update_timesteps
            phases = self.whole_phases(max_steps, count) // self.phase.updates_of(count)
        sampling |= {"eos_id": either(None, eos_id=eos_id, eos_token=eos_token), "temperature": temperature}
        settings = self.sampling(max_seq_len=max_seq_len, **sampling)
        if not self.prompts:
            raise ValueError("prompts must be given to the trainer for train, got none")
        new_token_limit(self.actor_critic, [*self.prompts, *self.validation_prompts], settings)
        if self.reward is None:
            raise ValueError("reward must be given to the trainer for train, got None")
        if self.objective.missing_eos_penalty and settings.eos_id is None and not settings.stop_strings:
            raise ValueError("missing_eos_penalty needs an end: give eos_id, stop_strings or a tokenizer with an EOS")
        if count % self.objective.group_size:
            size = self.objective.group_size
            raise ValueError(f"update_timesteps must be a multiple of group_size {size}, got {count}")
        # draw a phase when the previous one has ended; one update per step of the session
        rows: list[dict[str, float]] = []
        phase = self.phase
        self.session.max_steps = phases * phase.updates_of(count)
        self.update.total_steps = self.session.max_steps
        self._validation = (settings, max_batch_size)
        with (
            self.session.run() as session,
            MetricsLog(
                None if session.folder is None else session.folder.path / "samples.jsonl",
                resume_step=session.step - 1,  # samples are written before the first update of their phase
                is_main=rank() == 0,
            ) as sample_log,
        ):
            seconds: dict[str, float] = {}
            for _ in session.steps(session.step + phase.remaining(phases, count)):
                if phase.experience is None:
                    drawn = self._draw(settings, count, max_batch_size)
                    if drawn is None:
                        break
                    experience, samples, seconds, rewards = drawn
                    with _timed(seconds, "score_seconds", self.device):
                        self._begin(experience)
                    phase.metrics |= rewards
                    for sample in samples:
                        row = {name: _readable(value) for name, value in sample.items()}
                        sample_log.log(phase.updates, row)
                with _timed(seconds, "update_seconds", self.device):
                    self._next_update()
                if phase.is_done:
                    if drawing := seconds.get("rollout_seconds"):  # not after resuming within the phase
                        tokens = phase.metrics["response_length"] * count
                        seconds["tokens_per_second"] = round(tokens / drawing, 1)
                    rows.append({**self._end(), **seconds})
                    session.log(rows[-1])
        return session.result(PolicyResult, phases=phase.number, metrics=rows, best=self.best)


def _readable(value: Any) -> Any:
    """A value of a sample as a number or a text: token ids separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Adds the duration of the block to ``seconds[name]``."""
    started = time.monotonic()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


class GRPOTrainer(RLHFTrainer):
    """``RLHFTrainer`` with the objective ``GRPO`` and no critic.

    Arguments are those of ``RLHFTrainer``; the fields of ``GRPO`` may be given as keywords (``group_size=8``).
    """

    default_objective: ClassVar[type[Objective]] = GRPO
