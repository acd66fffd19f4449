"""Commands of reinforcement learning, one per objective: training, then a comparison of actor and reference."""

from dataclasses import dataclass
from typing import Any, Literal

from lm_core.checks import typed
from lm_core.cli.main import report_run
from lm_core.cli.parser import Command, Group
from lm_core.distributed import rank
from lm_core.generation.sampling import filters_of
from lm_core.training.run_directory import Result
from palm_rlhf.cli.sources import REWARD, VALIDATION_PROMPTS, find_reward, find_sources
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.model.palm import PaLM
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.objectives import OBJECTIVES, Objective
from palm_rlhf.rl.policy import ActorCritic

SHOWN = 2  # pairs of responses printed at the end
# Arguments of ActorCritic that the commands set themselves.
SETTLED = ("palm", "critic_palm", "with_critic", "precision", "actor_lora_scope", "critic_lora_scope")
# Defaults of the quickstart: a LoRA scope on a small model allows high learning rates.
CONFIG = {"actor_lr": 1e-3, "critic_lr": 3e-3, "checkpoint_every": 40}
OBJECTIVE_OPTIONS = {"ppo": {"kl_div_loss_weight": 0.2, "value_clip": None}}
EPOCHS = {"ppo": 2}
EPISODES = {"ppo": 1088}


@typed
@dataclass(frozen=True, kw_only=True)
class Responses:
    """Responses: number, length and sampling.

    Args:
        num_episodes: responses of the whole run.
        update_timesteps: responses per phase, drawn before its updates; a multiple of the group size.
        max_new_tokens: maximum length of a response, in tokens.
        temperature: divisor of the logits.
        top_k: keeps the k most likely tokens.
        top_p: keeps the most likely tokens up to this probability together.
        stop_strings: texts that end a response.
    """

    num_episodes: int = 1280
    update_timesteps: int = 64
    max_new_tokens: int = 32
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_strings: list[str] | None = None

    def sampling(self) -> dict[str, Any]:
        """Arguments of ``RLHFTrainer.sampling``."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "filters": filters_of(top_k=self.top_k, top_p=self.top_p),
            "stop_strings": self.stop_strings or [],
        }


def train_policy(
    *,
    objective: Objective,
    config: RLConfig,
    policy: dict[str, Any],
    responses: Responses,
    reward: str = REWARD,
    checkpoint: str | None = None,
    prompts: str = "stdlib",
    validation_prompts: str | None = None,
    tokenizer: str | None = None,
    checkpoint_dir: str = "runs/palm-ppo",
    resume: bool | Literal["auto"] = "auto",
) -> int:
    """Trains a policy against a reward.

    Args:
        objective: objective to optimize.
        config: optimizer, batches, precision and checkpoints.
        policy: arguments of ``ActorCritic``.
        responses: number, length and sampling of responses.
        reward: folder of a reward model or of its run, or module:function.
        checkpoint: folder of the policy; by default the base the reward model was trained on, which both then share.
        prompts: "stdlib", or rows with a column prompt (a file, a folder or a glob); other columns reach text rewards.
        validation_prompts: rows for the final comparison of actor and reference; by default from other documents of the
            library, or for a file the first of ``prompts``.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        checkpoint_dir: folder of the run.
        resume: auto resumes if the folder has a checkpoint, true demands one, false demands a folder without a run.
    """
    from palm_rlhf.rl.evaluation import evaluate_policy
    from palm_rlhf.rl.trainer import RLHFTrainer

    # a reward model and the policy trained from its base share that base
    scores, base = find_reward(reward)
    folder, encoder, train_prompts, held_out = find_sources(checkpoint, base, tokenizer, prompts, validation_prompts)
    trainer = RLHFTrainer(
        scores.palm if checkpoint is None and base is not None else PaLM.from_pretrained(folder),
        scores,
        objective=objective,
        config=config,
        prompts=train_prompts,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        **policy,
    )
    sampling = responses.sampling()
    result = trainer.train(responses.num_episodes, update_timesteps=responses.update_timesteps, **sampling)
    lines = [*_progress(result.metrics), ("updates", f"{result.updates} in {result.phases} phases")]
    results: list[Result] = []
    if result.outcome == "finished" and rank() == 0:
        # compare actor and reference on held-out prompts
        chosen = load_prompts(held_out, tokenizer=trainer.tokenizer)[:VALIDATION_PROMPTS]
        comparison = evaluate_policy(trainer, chosen, trainer.sampling(**sampling), seed=config.seed)
        lines += [
            (
                "held out",
                f"reward {comparison.reward_before:.3f} of the reference, {comparison.reward_after:.3f} of the actor",
            ),
            ("kl", f"{comparison.kl:.2f} nats a response from the reference"),
        ]
        results = [
            Result("reward of held-out prompts", comparison.reward_after, comparison.reward_before, "higher"),
            Result("KL from the reference, nats a response", comparison.kl, 0.0, "lower"),
        ]
        for before, after in list(zip(comparison.before, comparison.after, strict=True))[:SHOWN]:
            print(f"--- prompt\n{before['prompt']}")
            for name, sample in (("before", before), ("after", after)):
                print(f"--- {name}, reward {sample['reward']:.2f}\n{sample['response']}")
    return report_run(
        "palm-rlhf", result, checkpoint_dir, max_steps=trainer.session.max_steps, lines=lines, results=results
    )


def _progress(phases: list[dict[str, float]]) -> list[tuple[str, object]]:
    """Report lines on the first and the last phase of a run."""
    if not phases:
        return []
    first, last = phases[0], phases[-1]
    lines: list[tuple[str, object]] = [
        ("reward", f"{first['reward']:.3f} in the first phase of this call, {last['reward']:.3f} in the last"),
        ("entropy", f"{first['entropy']:.2f} nats a token in the first, {last['entropy']:.2f} in the last"),
    ]
    if "explained_variance" in last:
        lines.append(("critic", f"explained variance of the returns: {last['explained_variance']:.2f}"))
    if "ratio_deviation_at_start" in last:
        lines.append(("ratio", f"within {last['ratio_deviation_at_start']:.1e} of 1 before a phase's first update"))
    return lines


def command_of(name: str) -> Command:
    """The command that trains a policy by one objective of ``OBJECTIVES``."""
    kind = OBJECTIVES[name]
    episodes = {"num_episodes": EPISODES[name]} if name in EPISODES else {}
    return Command(
        train_policy,
        {
            "objective": Group(kind, defaults=OBJECTIVE_OPTIONS.get(name, {})),
            "config": Group(RLConfig, defaults={**CONFIG, "epochs": EPOCHS.get(name)}),
            "policy": Group(ActorCritic, skip=SETTLED, as_dict=True),
            "responses": Group(Responses, defaults=episodes),
        },
        f"Trains a policy by {kind.__name__} against a reward.",
        defaults={"checkpoint_dir": f"runs/palm-{name}"},
    )
