"""GRPO (arXiv 2402.03300): PPO without a critic, a response being measured against others to the same prompt.

The divergence from the reference is part of the loss, by the k3 estimator (equation 4). Length normalisation: the
paper's ("sequence"), Dr. GRPO's (arXiv 2503.20783: "constant", with ``scale_rewards="none"``), or a plain mean over
tokens ("token").
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lm_core.checks import check_positive, either, typed
from palm_rlhf.rl.config import PolicySettings
from palm_rlhf.rl.kl import KLEstimator
from palm_rlhf.rl.losses import Aggregation
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.ppo import RLHFTrainer, only_one
from palm_rlhf.rl.trainer import PolicyTrainer


class GRPOTrainer(RLHFTrainer):
    """GRPO on the rewards of responses; arguments not listed here are those of ``RLHFTrainer``.

    Args:
        group_size: responses to each prompt, at least 2. ``train`` draws whole groups.
        aggregation: "sequence" (the paper), "token", or "constant" (Dr. GRPO).
        constant_length: divisor of "constant": the longest response there can be.
        scale_rewards: "group" divides by the deviation within a group (the paper), "batch" by that of all, "none" not.
        kl_div_loss_weight: of the divergence from the reference, in the loss.

    Raises:
        ValueError: see ``RLHFTrainer``; also a group of fewer than 2.
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
        group_size: int = 8,
        actor_lr: float = 1e-4,
        actor_wd: float = 0.0,
        actor_lora: bool = True,
        actor_lora_r: int | None = None,
        actor_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        pad_id: int = 0,
        eps_clip: float = 0.2,
        eps_clip_high: float | None = None,
        beta_s: float = 0.0,
        kl_div_loss_weight: float = 0.04,
        kl_estimator: KLEstimator = "k3",
        aggregation: Aggregation = "sequence",
        constant_length: int | None = None,
        scale_rewards: Literal["group", "batch", "none"] = "group",
        missing_eos_penalty: float = 0.0,
        minibatch_size: int = 16,
        micro_batch_size: int | None = None,
        epochs: int = 1,
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
        check_positive(group_size, "group_size")
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, or there is nothing to compare with, got {group_size}")
        settings = PolicySettings(
            actor_lr=actor_lr,
            actor_wd=actor_wd,
            betas=betas,
            eps_clip=eps_clip,
            eps_clip_high=eps_clip_high,
            beta_s=beta_s,
            kl_div_loss_weight=kl_div_loss_weight,
            kl_in="loss",
            kl_estimator=kl_estimator,
            advantage_estimator="group",
            group_size=group_size,
            group_scale=scale_rewards,
            aggregation=aggregation,
            constant_length=constant_length,
            whiten_advantages=False,
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
        self.pad_id = either(0, pad_id=pad_id, pad_value=pad_value)
        network = only_one(palm=palm, policy=policy)
        PolicyTrainer.__init__(
            self,
            make_policy=lambda: ActorCritic(
                network,
                actor_lora=actor_lora,
                actor_lora_r=actor_lora_r,
                actor_dropout=actor_dropout,
                with_critic=False,
            ),
            vocab_size=getattr(network, "num_tokens", None),
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
