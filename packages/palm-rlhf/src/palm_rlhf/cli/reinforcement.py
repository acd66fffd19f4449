"""The commands ``reward``, ``ppo``, ``grpo`` and ``sample``: typed functions that flags and help are made from.

Without arguments they go on from one another: ``train``, ``reward`` and ``ppo`` on Python's own library.

Long because the help of four commands is made from the documentation of their arguments.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lm_core.checkpoint import checkpoint_folder
from lm_core.corpora import load_corpus
from lm_core.decoding import Filter
from lm_core.distributed import rank
from lm_core.manifest import read_json
from lm_core.sampling import top_k as keep_best
from lm_core.sampling import top_p as keep_nucleus
from lm_core.tokenizers import load_tokenizer
from lm_core.training import pick_device
from palm_rlhf.cli.commands import INTERRUPTED, command_line
from palm_rlhf.palm import PaLM

BASE = "runs/palm-quickstart"
REWARD = "runs/palm-reward"


def reward(
    *,
    checkpoint: str = BASE,
    pairs: str = "stdlib",
    validation_pairs: str | None = None,
    tokenizer: str | None = None,
    num_binned_output: int = 0,
    lora_r: int = 8,
    dropout: float = 0.05,
    stdlib_pairs: int = 1600,
    max_steps: int = 100,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: str = "auto",
    checkpoint_dir: str = REWARD,
    checkpoint_every: int = 100,
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a reward model on pairs; by default, real continuations of Python source against shuffled ones.

    Args:
        checkpoint: folder of a PaLM or of the run that trained it.
        pairs: "stdlib", or a .jsonl file with prompt, chosen, rejected (and margin), or prompt, response, label.
        validation_pairs: the same, held out; by default a tenth of the pairs.
        tokenizer: instead of the one in the checkpoint.
        num_binned_output: bins of labels; 0 for pairs and numbers.
        lora_r: rank of the reward scope.
        dropout: of the reward scope.
        stdlib_pairs: how many pairs are cut out of the library.
        max_steps: updates.
        batch_size: examples an update.
        learning_rate: at its peak.
        seed: of order and dropout.
        device: auto takes CUDA, then MPS, then the CPU.
        checkpoint_dir: folder of the run.
        checkpoint_every: updates between checkpoints.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    from palm_rlhf.corrupted_pairs import corrupted_pairs
    from palm_rlhf.reward_model import RewardModel
    from palm_rlhf.reward_trainer import RewardModelTrainer

    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    examples: Any = pairs
    held_out: Any = validation_pairs
    if pairs == "stdlib":
        corpus = load_corpus("stdlib", tokenizer=encoder)
        examples = corrupted_pairs(corpus.train, count=stdlib_pairs, seed=0)
        held_out = held_out or corrupted_pairs(corpus.validation, count=300, seed=1)
    torch.manual_seed(seed)
    model = RewardModel(
        PaLM.from_pretrained(folder), num_binned_output=num_binned_output, lora_r=lora_r, dropout=dropout
    )
    trainer = RewardModelTrainer(
        reward_model=model,
        pairs=examples,
        validation_pairs=held_out,
        tokenizer=encoder,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
        seed=seed,
        device=device,
    )
    say = print if rank() == 0 else (lambda *_: None)
    say(f"reward model on {folder}: {len(trainer.examples)} examples, {len(trainer.held_out)} held out")
    result = trainer.train()
    say(f"held out    accuracy {result.first_accuracy:.3f} before training, {result.last_accuracy:.3f} now")
    say(f"checkpoint  {Path(checkpoint_dir) / 'checkpoints' / f'step-{result.step}'}")
    return _ended(result.outcome)


def ppo(
    *,
    reward: str = REWARD,
    checkpoint: str | None = None,
    prompts: str = "stdlib",
    tokenizer: str | None = None,
    num_episodes: int = 1280,
    update_timesteps: int = 64,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_strings: list[str] | None = None,
    actor_lr: float = 1e-3,
    critic_lr: float = 1e-3,
    actor_lora: bool = True,
    critic_lora: bool = True,
    actor_lora_r: int | None = None,
    critic_lora_r: int | None = None,
    eps_clip: float = 0.2,
    value_clip: float = 0.4,
    beta_s: float = 0.0,
    kl_div_loss_weight: float = 0.1,
    kl_in: Literal["reward", "loss"] = "reward",
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    kl_target: float | None = None,
    gae_lambda: float = 0.95,
    advantage_estimator: Literal["gae", "group", "rloo", "reinforce"] = "gae",
    missing_eos_penalty: float = 0.0,
    minibatch_size: int = 16,
    epochs: int = 2,
    max_norm: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    checkpoint_dir: str = "runs/palm-ppo",
    checkpoint_every: int = 40,
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a policy by PPO against a reward; by default the quickstart's model against its reward model.

    Args:
        reward: folder of a reward model or of its run, or module:function.
        checkpoint: folder of the policy; by default the base the reward model was trained on, which both then share.
        prompts: "stdlib", or a .jsonl file with a column prompt; other columns reach text rewards.
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
        value_clip: how far a value may.
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
        max_norm: clips gradients.
        seed: of everything.
        device: auto takes CUDA, then MPS, then the CPU.
        checkpoint_dir: folder of the run.
        checkpoint_every: updates between checkpoints.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    from palm_rlhf.ppo import RLHFTrainer

    judge, base = _reward(reward)
    folder, encoder, asked = _sources(checkpoint, base, tokenizer, prompts)
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
        max_norm=max_norm,
        seed=seed,
        device=device,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    return _learn(
        trainer,
        num_episodes=num_episodes,
        update_timesteps=update_timesteps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        filters=_filters(top_k, top_p),
        stop_strings=stop_strings or [],
    )


def grpo(
    *,
    reward: str = REWARD,
    checkpoint: str | None = None,
    prompts: str = "stdlib",
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
    max_norm: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    checkpoint_dir: str = "runs/palm-grpo",
    checkpoint_every: int = 40,
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a policy by GRPO against a reward.

    Args:
        reward: folder of a reward model or of its run, or module:function.
        checkpoint: folder of the policy; by default the base the reward model was trained on.
        prompts: "stdlib", or a .jsonl file with a column prompt; other columns reach text rewards.
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
        max_norm: clips gradients.
        seed: of everything.
        device: auto takes CUDA, then MPS, then the CPU.
        checkpoint_dir: folder of the run.
        checkpoint_every: updates between checkpoints.
        resume: auto goes on if the folder has a checkpoint, true demands one, false demands a folder without a run.

    Returns:
        The exit status.
    """
    from palm_rlhf.grpo import GRPOTrainer

    judge, base = _reward(reward)
    folder, encoder, asked = _sources(checkpoint, base, tokenizer, prompts)
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
        max_norm=max_norm,
        seed=seed,
        device=device,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    return _learn(
        trainer,
        num_episodes=num_episodes,
        update_timesteps=update_timesteps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        filters=_filters(top_k, top_p),
        stop_strings=stop_strings or [],
    )


def sample(
    checkpoint: str,
    prompt: str,
    *,
    scope: str | None = "actor",
    reward: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    tokenizer: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Prints responses of a trained policy; with a reward, the best first.

    Args:
        checkpoint: folder of a run of ppo or grpo, or of a PaLM.
        prompt: the text to answer.
        scope: of the policy; null for the network as it is.
        reward: folder of a reward model or of its run, or module:function.
        num_samples: how many responses.
        max_new_tokens: tokens of a response at most.
        temperature: of the draws; above 0.
        tokenizer: instead of the one in the checkpoint.
        seed: of the draws.
        device: auto takes CUDA, then MPS, then the CPU.

    Returns:
        The exit status.
    """
    from lm_core.generation import generate
    from palm_rlhf.prompts import load_prompts
    from palm_rlhf.rewards import as_reward, check_scores
    from palm_rlhf.rollouts import rollout_of

    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    place = pick_device(device)
    palm = PaLM.from_pretrained(folder).to(place)
    (asked,) = load_prompts([prompt], tokenizer=encoder)
    role: dict[str, Any] = {} if scope is None else {"finetune_scope": scope}
    result = generate(
        palm,
        [asked.ids.to(place)] * num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_id=encoder.eos_id,
        generator=torch.Generator(place).manual_seed(seed),
        **role,
    )
    responses = [row[:length].cpu() for row, length in zip(result.tokens, result.lengths.tolist(), strict=True)]
    texts = [encoder.decode(row.tolist()) for row in responses]
    if reward is None:
        for text in texts:
            print(prompt + text)
        return 0
    judge, _ = _reward(reward)
    rollout = rollout_of([asked] * num_samples, responses, finished=result.finished.tolist())
    rollout = type(rollout)(**{**vars(rollout), "texts": texts})
    scores = check_scores(as_reward(judge)(rollout), num_samples).tolist()
    for score, text in sorted(zip(scores, texts, strict=True), reverse=True):
        print(f"--- reward {score:.3f}\n{prompt + text}")
    return 0


def _reward(reward: str) -> tuple[Any, Path | None]:
    """A reward, and the folder of its model if it is one of ours."""
    from palm_rlhf.reward_model import RewardModel

    if ":" in reward and not Path(reward).exists():
        return reward, None
    folder = checkpoint_folder(reward)
    if read_json(folder / "config.json").get("class") != "RewardModel":
        raise ValueError(f"reward must be the folder of a RewardModel or module:function, got {reward}")
    return RewardModel.from_pretrained(folder), folder


def _sources(checkpoint: str | None, base: Path | None, tokenizer: str | None, prompts: str) -> tuple[Path, Any, Any]:
    from palm_rlhf.corrupted_pairs import document_prompts

    folder = base if checkpoint is None and base is not None else checkpoint_folder(checkpoint or BASE)
    encoder = load_tokenizer(tokenizer or folder)
    asked: Any = prompts
    if prompts == "stdlib":
        asked = document_prompts(load_corpus("stdlib", tokenizer=encoder).train, count=512, seed=2)
    elif not Path(prompts).is_file():
        raise FileNotFoundError(f'prompts must be "stdlib" or a .jsonl file, got {prompts}')
    else:
        asked = Path(prompts)
    return folder, encoder, asked


def _filters(top_k: int | None, top_p: float | None) -> list[Filter]:
    filters: list[Filter] = [] if top_k is None else [partial(keep_best, k=top_k)]
    return filters if top_p is None else [*filters, partial(keep_nucleus, p=top_p)]


def _learn(trainer: Any, **schedule: Any) -> int:
    say = print if rank() == 0 else (lambda *_: None)
    result = trainer.train(**schedule)
    if result.metrics:
        first, last = result.metrics[0], result.metrics[-1]
        say(f"reward      {first['reward']:.3f} in the first phase of this call, {last['reward']:.3f} in the last")
        say(f"kl          {last['kl']:.2f} nats a response from the reference, entropy {last['entropy']:.2f} a token")
        say(f"ratio       within {last['ratio_deviation_at_start']:.1e} of 1 before the first update of a phase")
    say(
        f"updates     {result.updates} in {result.phases} phases; samples in {trainer.checkpoint_dir / 'samples.jsonl'}"
    )
    say(f"curves      {result.curves or 'not drawn: pip install matplotlib'}")
    return _ended(result.outcome)


def _ended(outcome: str) -> int:
    if outcome == "finished":
        return 0
    if rank() == 0:
        print(f"\nStopped ({outcome}). To go on:\n  {command_line()}")
    return INTERRUPTED
