"""The commands ``ppo`` and ``grpo``: typed functions that flags and help are made from."""

from typing import Literal

from lm_core.generation.sampling import filters_of
from palm_rlhf.cli.learning import learn
from palm_rlhf.cli.sources import PPO, REWARD, find_reward, find_sources
from palm_rlhf.model.palm import PaLM


def ppo(
    *,
    reward: str = REWARD,
    checkpoint: str | None = None,
    prompts: str = "stdlib",
    validation_prompts: str | None = None,
    tokenizer: str | None = None,
    num_episodes: int = 1088,
    update_timesteps: int = 64,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_strings: list[str] | None = None,
    actor_lr: float = 1e-3,
    critic_lr: float = 3e-3,
    actor_lora: bool = True,
    critic_lora: bool = True,
    actor_lora_r: int | None = None,
    critic_lora_r: int | None = None,
    eps_clip: float = 0.2,
    value_clip: float | None = None,
    beta_s: float = 0.0,
    kl_div_loss_weight: float = 0.2,
    kl_in: Literal["reward", "loss"] = "reward",
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    kl_target: float | None = None,
    gae_lambda: float = 0.95,
    advantage_estimator: Literal["gae", "group", "rloo", "reinforce"] = "gae",
    missing_eos_penalty: float = 0.0,
    minibatch_size: int = 16,
    epochs: int = 2,
    max_grad_norm: float | None = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    checkpoint_dir: str = PPO,
    checkpoint_every: int = 40,
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a policy by PPO against a reward; by default the quickstart's model against its reward model.

    Args:
        reward: folder of a reward model or of its run, or module:function.
        checkpoint: folder of the policy; by default the base the reward model was trained on, which both then share.
        prompts: "stdlib", or a .jsonl file with a column prompt; other columns reach text rewards.
        validation_prompts: the same, for the comparison before and after; by default other documents of the library, or
            for a file the first of ``prompts``.
        tokenizer: instead of the one in the checkpoint.
        num_episodes: responses over the whole run.
        update_timesteps: responses drawn before learning from them.
        max_new_tokens: tokens of a response at most.
        temperature: of the draws.
        top_k: keeps the k most likely tokens.
        top_p: keeps the most likely tokens up to this probability together.
        stop_strings: end a response.
        actor_lr: learning rate of the actor.
        critic_lr: of the critic.
        actor_lora: trains a scope instead of the network.
        critic_lora: the same for the critic.
        actor_lora_r: rank.
        critic_lora_r: rank.
        eps_clip: how far the probability ratio may move.
        value_clip: how far a value may; null for the plain squared error.
        beta_s: weight of the entropy bonus.
        kl_div_loss_weight: of the divergence from the reference.
        kl_in: whether it is paid for in the reward or in the loss.
        kl_estimator: of that divergence.
        kl_target: nats a response; makes the weight adaptive.
        gae_lambda: of GAE.
        advantage_estimator: gae is PPO; the others need no critic.
        missing_eos_penalty: taken off the reward of a response that did not end.
        minibatch_size: responses an update.
        epochs: passes over each batch of responses.
        max_grad_norm: gradients with a greater global norm are scaled down; null only measures it.
        seed: of everything.
        device: auto takes CUDA, then MPS, then the CPU.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        checkpoint_dir: folder of the run.
        checkpoint_every: updates between checkpoints.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    from palm_rlhf.rl.trainer import RLHFTrainer

    judge, base = find_reward(reward)
    folder, encoder, asked, held_out = find_sources(checkpoint, base, tokenizer, prompts, validation_prompts)
    trainer = RLHFTrainer(
        palm=judge.palm if checkpoint is None and base is not None else PaLM.from_pretrained(folder),
        reward=judge,
        prompts=asked,
        tokenizer=encoder,
        actor_lr=actor_lr,
        critic_lr=critic_lr,
        actor_lora=actor_lora,
        critic_lora=critic_lora,
        actor_lora_r=actor_lora_r,
        critic_lora_r=critic_lora_r,
        eps_clip=eps_clip,
        value_clip=value_clip,
        beta_s=beta_s,
        kl_div_loss_weight=kl_div_loss_weight,
        kl_in=kl_in,
        kl_estimator=kl_estimator,
        kl_target=kl_target,
        gae_lambda=gae_lambda,
        advantage_estimator=advantage_estimator,
        missing_eos_penalty=missing_eos_penalty,
        minibatch_size=minibatch_size,
        epochs=epochs,
        max_grad_norm=max_grad_norm,
        seed=seed,
        device=device,
        precision=precision,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    return learn(
        trainer,
        held_out,
        num_episodes=num_episodes,
        update_timesteps=update_timesteps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        filters=filters_of(top_k=top_k, top_p=top_p),
        stop_strings=stop_strings or [],
    )


def grpo(
    *,
    reward: str = REWARD,
    checkpoint: str | None = None,
    prompts: str = "stdlib",
    validation_prompts: str | None = None,
    tokenizer: str | None = None,
    num_episodes: int = 1280,
    update_timesteps: int = 64,
    group_size: int = 8,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_strings: list[str] | None = None,
    actor_lr: float = 1e-3,
    actor_lora: bool = True,
    actor_lora_r: int | None = None,
    eps_clip: float = 0.2,
    kl_div_loss_weight: float = 0.04,
    aggregation: Literal["sequence", "token"] = "sequence",
    scale_rewards: Literal["group", "batch", "none"] = "group",
    minibatch_size: int = 16,
    epochs: int = 1,
    max_grad_norm: float | None = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    checkpoint_dir: str = "runs/palm-grpo",
    checkpoint_every: int = 40,
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a policy by GRPO against a reward.

    Args:
        reward: folder of a reward model or of its run, or module:function.
        checkpoint: folder of the policy; by default the base the reward model was trained on.
        prompts: "stdlib", or a .jsonl file with a column prompt; other columns reach text rewards.
        validation_prompts: the same, for the comparison before and after; by default other documents of the library, or
            for a file the first of ``prompts``.
        tokenizer: instead of the one in the checkpoint.
        num_episodes: responses over the whole run.
        update_timesteps: responses drawn before learning from them; whole groups.
        group_size: responses to each prompt.
        max_new_tokens: tokens of a response at most.
        temperature: of the draws.
        top_k: keeps the k most likely tokens.
        top_p: keeps the most likely tokens up to this probability together.
        stop_strings: end a response.
        actor_lr: learning rate.
        actor_lora: trains a scope instead of the network.
        actor_lora_r: rank.
        eps_clip: how far the probability ratio may move.
        kl_div_loss_weight: of the divergence from the reference.
        aggregation: mean over responses of means over tokens, or over all tokens.
        scale_rewards: divides by the deviation of the group, of all, or not at all.
        minibatch_size: responses an update.
        epochs: passes over each batch of responses.
        max_grad_norm: gradients with a greater global norm are scaled down; null only measures it.
        seed: of everything.
        device: auto takes CUDA, then MPS, then the CPU.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        checkpoint_dir: folder of the run.
        checkpoint_every: updates between checkpoints.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    from palm_rlhf.rl.trainer import GRPOTrainer

    judge, base = find_reward(reward)
    folder, encoder, asked, held_out = find_sources(checkpoint, base, tokenizer, prompts, validation_prompts)
    trainer = GRPOTrainer(
        palm=judge.palm if checkpoint is None and base is not None else PaLM.from_pretrained(folder),
        reward=judge,
        prompts=asked,
        tokenizer=encoder,
        group_size=group_size,
        actor_lr=actor_lr,
        actor_lora=actor_lora,
        actor_lora_r=actor_lora_r,
        eps_clip=eps_clip,
        kl_div_loss_weight=kl_div_loss_weight,
        aggregation=aggregation,
        scale_rewards=scale_rewards,
        minibatch_size=minibatch_size,
        epochs=epochs,
        max_grad_norm=max_grad_norm,
        seed=seed,
        device=device,
        precision=precision,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    return learn(
        trainer,
        held_out,
        num_episodes=num_episodes,
        update_timesteps=update_timesteps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        filters=filters_of(top_k=top_k, top_p=top_p),
        stop_strings=stop_strings or [],
    )
