"""Reinforcement learning from human feedback with PPO (arXiv 1707.06347; for language models arXiv 1909.08593).

The objective per response token: the clipped ratio to the policy that drew it, a clipped value loss, an entropy bonus,
and the divergence from the reference, paid for in the reward or in the loss. See ``policy_trainer`` for the loop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lm_core.checks import check_positive, either, typed
from lm_core.generation.decoding import Filter
from palm_rlhf.rl.config import PolicySettings
from palm_rlhf.rl.experience import AdvantageEstimator
from palm_rlhf.rl.kl import KLEstimator
from palm_rlhf.rl.losses import Aggregation
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import SamplingSettings
from palm_rlhf.rl.trainer import PolicyResult, PolicyTrainer


class RLHFTrainer(PolicyTrainer):
    """PPO on the rewards of responses.

    Args:
        prompts: texts, chats, rows or a dataset; see ``palm_rlhf.data.prompts.load_prompts``.
        prompts_path: a ``.jsonl`` file of rows, or a file with a text a line, instead.
        prompt_token_ids: ids ``(b, n)`` or a list of different lengths, instead.
        tokenizer: with ``encode`` and ``decode``, or Hugging Face's; needed for texts.
        palm: the policy (alias ``policy``): a PaLM, or a Hugging Face causal model; see ``palm_rlhf.rl.roles.Roles``.
        reward_model: what scores responses (alias ``reward``); see ``palm_rlhf.reward.rewards``.
        critic: another network for the critic.
        actor_critic: a ready ``ActorCritic``, instead of ``palm`` and all arguments about actor and critic.
        actor_lr: learning rate of the actor.
        critic_lr: of the critic.
        actor_wd: weight decay of the actor's matrices.
        critic_wd: of the critic's.
        actor_lora: trains an adapter of the actor instead of the network.
        critic_lora: the same of the critic.
        actor_lora_r: rank.
        critic_lora_r: rank.
        critic_pooled_values: one value a response, from its prompt.
        actor_dropout: on the actor's adapter.
        critic_dropout: on the critic's.
        betas: of AdamW.
        pad_id: behind the end of a row (alias ``pad_value``).
        eps_clip: how far the ratio may move before its gradient is cut.
        eps_clip_high: upwards, if that differs.
        value_clip: how far a value may; None for the plain squared error.
        value_loss_weight: of the value loss.
        value_range: makes values a histogram over this range (HL-Gauss) with ``value_bins`` bins.
        value_bins: see there.
        beta_s: weight of the entropy bonus.
        kl_div_loss_weight: of the divergence from the reference.
        kl_in: "reward" subtracts it from token rewards, "loss" adds it to the loss.
        kl_estimator: see ``palm_rlhf.rl.kl``.
        kl_target: nats a response; makes the weight adaptive, over ``kl_horizon`` responses.
        kl_horizon: see there.
        gamma: discount a token.
        gae_lambda: of GAE.
        advantage_estimator: "gae" (PPO), or without a critic "rloo", "group", "reinforce".
        group_size: responses to each prompt, for "rloo" and "group".
        aggregation: see ``palm_rlhf.rl.losses.token_weights``.
        whiten_rewards: divides token rewards by their deviation.
        whiten_advantages: gives advantages mean 0 and deviation 1 over the valid tokens of the global batch.
        missing_eos_penalty: taken off the reward of a response that did not end.
        minibatch_size: responses an update, of all processes together.
        micro_batch_size: responses a backward, on each process; by default its whole share.
        epochs: passes over each batch of responses.
        max_grad_norm: gradients with a greater global norm are scaled down, the actor's and the critic's each by their
            own; None only measures it (alias ``max_norm``).
        checkpoint_dir: folder of the run: checkpoints, metrics.jsonl, samples.jsonl, curves.png.
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: how many stay.
        resume: "auto" goes on if there is a checkpoint, True demands one, False demands a fresh folder.
        seed: of draws, order and shuffles.
        device: auto takes CUDA, then MPS, then the CPU.
        precision: of matrix products; "auto" is bf16 on a GPU that has it and fp32 elsewhere.
        trackers: objects with ``log(values, step=...)``.
        pad_value: see ``pad_id``.
        max_norm: see ``max_grad_norm``.

    Raises:
        ValueError: a number is out of range, there are no, or two sources of prompts, policy or reward, or a value
            and its alias are both given.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        prompts: Any = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: Any = None,
        tokenizer: Any = None,
        palm: Any = None,
        policy: Any = None,
        reward_model: Any = None,
        reward: Any = None,
        critic: Any = None,
        actor_critic: ActorCritic | None = None,
        actor_lr: float = 1e-4,
        critic_lr: float = 1e-4,
        actor_wd: float = 0.0,
        critic_wd: float = 0.0,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int | None = None,
        critic_lora_r: int | None = None,
        critic_pooled_values: bool = False,
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        pad_id: int = 0,
        eps_clip: float = 0.2,
        eps_clip_high: float | None = None,
        value_clip: float | None = 0.4,
        value_loss_weight: float = 0.5,
        value_range: tuple[float, float] | None = None,
        value_bins: int = 51,
        beta_s: float = 0.0,
        kl_div_loss_weight: float = 0.1,
        kl_in: Literal["reward", "loss"] = "reward",
        kl_estimator: KLEstimator = "k1",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        advantage_estimator: AdvantageEstimator = "gae",
        group_size: int | None = None,
        aggregation: Aggregation = "token",
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        missing_eos_penalty: float = 0.0,
        minibatch_size: int = 16,
        micro_batch_size: int | None = None,
        epochs: int = 4,
        max_grad_norm: float | None = 1.0,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 50,
        keep_checkpoints: int | None = 2,
        resume: bool | Literal["auto"] = "auto",
        seed: int = 0,
        device: str = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        trackers: Sequence[Any] = (),
        pad_value: int = 0,
        max_norm: float | None = 1.0,
    ) -> None:
        compares = advantage_estimator in ("group", "rloo")
        settings = PolicySettings(
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            actor_wd=actor_wd,
            critic_wd=critic_wd,
            betas=betas,
            eps_clip=eps_clip,
            eps_clip_high=eps_clip_high,
            value_clip=value_clip,
            value_loss_weight=value_loss_weight,
            beta_s=beta_s,
            kl_div_loss_weight=kl_div_loss_weight,
            kl_in=kl_in,
            kl_estimator=kl_estimator,
            kl_target=kl_target,
            kl_horizon=kl_horizon,
            gamma=gamma,
            gae_lambda=gae_lambda,
            advantage_estimator=advantage_estimator,
            group_size=(4 if compares else 1) if group_size is None else group_size,
            aggregation=aggregation,
            whiten_rewards=whiten_rewards,
            whiten_advantages=whiten_advantages,
            missing_eos_penalty=missing_eos_penalty,
            minibatch_size=minibatch_size,
            micro_batch_size=micro_batch_size,
            epochs=epochs,
            max_grad_norm=either(1.0, max_grad_norm=max_grad_norm, max_norm=max_norm),
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            seed=seed,
            device=device,
            precision=precision,
        )
        policy = only_one(palm=palm, policy=policy, actor_critic=actor_critic)
        if actor_critic is not None and advantage_estimator == "gae" and actor_critic.value_head is None:
            raise ValueError("actor_critic must have a critic for advantage_estimator 'gae', got with_critic=False")

        def make_policy() -> ActorCritic:
            if actor_critic is not None:
                return actor_critic
            return ActorCritic(
                policy,
                critic,
                critic_pooled_values,
                actor_lora,
                critic_lora,
                actor_lora_r,
                critic_lora_r,
                actor_dropout=actor_dropout,
                critic_dropout=critic_dropout,
                value_range=value_range,
                value_bins=value_bins,
                with_critic=advantage_estimator == "gae",
            )

        self.pad_id = either(0, pad_id=pad_id, pad_value=pad_value)
        super().__init__(
            make_policy=make_policy,
            vocab_size=getattr(policy, "num_tokens", None),
            prompts=only_one(
                allow_none=True, prompts=prompts, prompts_path=prompts_path, prompt_token_ids=prompt_token_ids
            ),
            reward=only_one(allow_none=True, reward_model=reward_model, reward=reward),
            tokenizer=tokenizer,
            settings=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
        )

    @typed
    def train(
        self,
        num_episodes: int = 50_000,
        max_timesteps: int = 1,
        update_timesteps: int = 64,
        max_batch_size: int = 64,
        max_seq_len: int | None = None,
        eos_token: int | None = None,
        temperature: float = 1.0,
        *,
        max_new_tokens: int | None = None,
        eos_id: int | None = None,
        filters: Sequence[Filter] = (),
        min_new_tokens: int = 0,
        stop_strings: Sequence[str] = (),
    ) -> PolicyResult:
        """Trains; an episode is one response, and its length has no say in how many there are.

        Args:
            num_episodes: responses, over the whole run.
            max_timesteps: multiplies ``num_episodes``.
            update_timesteps: responses drawn before learning from them.
            max_batch_size: responses drawn at a time.
            max_seq_len: tokens of prompt and response together at most.
            eos_token: see ``eos_id``.
            temperature: divides the logits.
            max_new_tokens: tokens of a response at most.
            eos_id: ends a response; by default the tokenizer's (alias ``eos_token``).
            filters: of logits, such as ``functools.partial(top_p, p=0.9)``.
            min_new_tokens: before which no EOS is drawn.
            stop_strings: end a response too.

        Raises:
            ValueError: a number is out of range, or a prompt leaves no room.
            RuntimeError: another run is using the folder, or losses were not finite too often in a row.
        """
        for name, value in (
            ("num_episodes", num_episodes),
            ("max_timesteps", max_timesteps),
            ("update_timesteps", update_timesteps),
            ("max_batch_size", max_batch_size),
        ):
            check_positive(value, name)
        total = num_episodes * max_timesteps
        count = min(update_timesteps, total)
        sampling = self.sampling(
            max_seq_len=max_seq_len,
            max_new_tokens=max_new_tokens,
            eos_id=either(None, eos_id=eos_id, eos_token=eos_token),
            temperature=temperature,
            filters=filters,
            min_new_tokens=min_new_tokens,
            stop_strings=stop_strings,
        )
        self._check_room(sampling)
        return self._train(sampling, phases=total // count, count=count, batch_size=max_batch_size)

    @typed
    def sampling(
        self,
        *,
        max_seq_len: int | None = None,
        max_new_tokens: int | None = None,
        eos_id: int | None = None,
        temperature: float = 1.0,
        filters: Sequence[Filter] = (),
        min_new_tokens: int = 0,
        stop_strings: Sequence[str] = (),
        eos_token: int | None = None,
    ) -> SamplingSettings:
        """How responses are drawn, with the tokenizer's EOS by default; for ``rollout``. Arguments as of ``train``.

        Raises:
            ValueError: neither length is given, or a number is out of range.
        """
        if max_seq_len is None and max_new_tokens is None:
            raise ValueError("give max_new_tokens or max_seq_len, got neither")
        if max_new_tokens is not None:
            check_positive(max_new_tokens, "max_new_tokens")
        if max_seq_len is not None and max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {max_seq_len}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        if isinstance(stop_strings, str) or any(not stop for stop in stop_strings):
            raise ValueError(f"stop_strings must be a list of non-empty strings, got {stop_strings!r}")
        if stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, got tokenizer=None")
        if not 0 <= min_new_tokens <= (max_new_tokens or min_new_tokens):
            raise ValueError(f"min_new_tokens must be in [0, max_new_tokens = {max_new_tokens}], got {min_new_tokens}")
        eos_id = either(None, eos_id=eos_id, eos_token=eos_token)
        eos = getattr(self.tokenizer, "eos_id", None) if eos_id is None else eos_id
        size = self.actor_critic.vocab_size
        if eos is not None and (eos < 0 or (size is not None and eos >= size)):
            raise ValueError(f"eos_id must be in [0, {size}), got {eos}")
        return SamplingSettings(
            max_new_tokens=max_new_tokens or max_seq_len or 1,
            max_seq_len=max_seq_len,
            temperature=temperature,
            filters=tuple(filters),
            eos_id=eos,
            min_new_tokens=min_new_tokens,
            stop_strings=tuple(stop_strings),
            pad_id=self.pad_id,
        )

    @typed
    def generate(
        self,
        max_seq_len: int,
        prompt: Any,
        num_samples: int = 4,
        *,
        eos_id: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        eos_token: int | None = None,
    ) -> Tensor:
        """The best of ``num_samples`` responses by reward: 1-D ids without the prompt.

        Args:
            max_seq_len: tokens of prompt and response together.
            prompt: ids, text or chat.
            num_samples: responses to choose from.
            eos_id: ends a response (alias ``eos_token``).
            temperature: divides the logits.
            generator: source of randomness.
            eos_token: see ``eos_id``.

        Raises:
            ValueError: a number is out of range, or there is no reward to choose by.
        """
        eos_id = either(None, eos_id=eos_id, eos_token=eos_token)
        sampling = self.sampling(max_seq_len=max_seq_len, eos_id=eos_id, temperature=temperature)
        return self.best_of(prompt, num_samples=num_samples, sampling=sampling, generator=generator)[0]

    def _check_room(self, sampling: SamplingSettings) -> None:
        if not self.prompts:
            return
        longest = max(prompt.ids.shape[0] for prompt in self.prompts)
        limits = {"max_seq_len": sampling.max_seq_len, "the model's limit": self.actor_critic.max_length}
        for name, limit in limits.items():
            if limit is not None and longest >= limit:
                raise ValueError(f"prompts must be shorter than {name} {limit}, the longest has {longest} tokens")


def only_one(*, allow_none: bool = False, **given: Any) -> Any:
    """The one argument that was given.

    Raises:
        ValueError: several were, or none where one must be.
    """
    present = [name for name, value in given.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"give one of {', '.join(given)}, got {' and '.join(present)}")
    if not present and not allow_none:
        raise ValueError(f"give one of {', '.join(given)}, got none")
    return given[present[0]] if present else None
