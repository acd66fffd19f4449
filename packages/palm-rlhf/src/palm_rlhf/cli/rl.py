"""Commands of reinforcement learning, one per objective: training, then a comparison of actor and reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lm_core.adapters.loading import DType
from lm_core.checks import check_positive, typed
from lm_core.cli.main import report, report_run
from lm_core.cli.parser import Command, Group, preset_name
from lm_core.cli.text_generation import SamplingFlags
from lm_core.distributed import rank
from lm_core.rng import seed_everything
from lm_core.tokenizers import load_tokenizer
from lm_core.training.run_directory import Result
from palm_rlhf.cli.sources import QUICKSTART, REWARD, VALIDATION_PROMPTS, find_prompts, find_rewards, open_policy
from palm_rlhf.rl.config import RLConfig
from palm_rlhf.rl.objectives import OBJECTIVES, Objective
from palm_rlhf.rl.policy import ActorCritic

SHOWN = 2  # pairs of responses printed at the end
# Arguments of ActorCritic that the commands set themselves.
SETTLED = ("palm", "critic_palm", "with_critic", "precision", "actor_lora_scope", "critic_lora_scope")
# Settings of the quickstart: a LoRA scope on a small model allows high learning rates.
QUICK = {"actor_lr": 1e-3, "critic_lr": 3e-3, "checkpoint_every": 40, "max_steps": 80, "max_new_tokens": 32}
QUICK_OF = {"ppo": {"kl_div_loss_weight": 0.2, "value_clip": None, "epochs": 2, "max_steps": 136}}


@typed
@dataclass(frozen=True, kw_only=True)
class Responses(SamplingFlags):
    """Responses: number, length and sampling.

    Args:
        update_timesteps: responses per phase, drawn before its updates; a multiple of the group size.
        stop_strings: texts that end a response.
    """

    update_timesteps: int = 64
    max_new_tokens: int = 128
    stop_strings: list[str] | None = None

    def sampling(self) -> dict[str, Any]:
        """Arguments of ``RLHFTrainer.sampling``."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop_strings": self.stop_strings or [],
        }


def train_policy(
    *,
    method: Objective,
    config: RLConfig,
    policy: dict[str, Any],
    responses: Responses,
    objective: str | None = None,
    max_steps: int = 1000,
    reward: str = REWARD,
    further_rewards: list[str] | None = None,
    reward_weights: list[float] | None = None,
    model: str | None = None,
    data: str = "stdlib",
    validation_data: str | None = None,
    validation_fraction: float = 0.05,
    tokenizer: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    dtype: DType = "auto",
    lora_r: int | None = None,
    checkpoint_dir: str = "runs/palm-ppo",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
    engine: Literal["lm_core", "vllm"] = "lm_core",
    engine_arguments: dict[str, Any] | None = None,
) -> int:
    """Trains a policy against a reward.

    Args:
        method: the objective with its options.
        config: optimizer, batches, precision and checkpoints.
        policy: arguments of ``ActorCritic``.
        responses: length and sampling of responses.
        objective: name of the objective, whose options are further flags: ppo, grpo, gspo, cispo, spo, rloo, reinforce,
            reinforce++, tpo or flowrl; null for that of the command, and for GRPO in rl.
        max_steps: optimizer updates of the run.
        reward: folder of a reward model or of its run, or module:function; with arguments, module:function(a=1).
        further_rewards: rewards that are added to it.
        reward_weights: a weight for each reward in this order; 1 by default.
        model: policy to start from: a PaLM's folder or run, a Hugging Face model or adapter (folder, or
            organisation/name on the hub); by default the base of the reward model, which both then share.
        data: "stdlib", or rows with a column prompt (a file, a folder or a glob); other columns reach text rewards.
        template_kwargs: further arguments of the chat template in JSON, such as '{"enable_thinking": false}'.
        dtype: dtype of a Hugging Face model's frozen weights; auto keeps the stored one.
        lora_r: rank of the actor's and the critic's adapter, where these have no flag of their own.
        engine: engine that draws responses; vllm needs a Hugging Face policy and the extra vllm.
        engine_arguments: further arguments of vllm.LLM in JSON, such as '{"max_model_len": 2048}'.
    """
    from palm_rlhf.rl.evaluation import evaluate_policy
    from palm_rlhf.rl.trainer import RLHFTrainer

    check_positive(max_steps, "max_steps")
    if objective is not None and OBJECTIVES.get(objective) is not type(method):
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    seed_everything(config.seed)  # covers adapters and value heads
    # a reward model and the policy trained from its base share that base
    scores, shared, base = find_rewards([reward, *(further_rewards or [])], reward_weights)
    encoder: Any
    if model is None and base is not None:
        network, encoder, origin = shared, load_tokenizer(tokenizer or base), f"base of the reward model {base}"
    else:
        opened = open_policy(model or QUICKSTART, tokenizer=tokenizer, dtype=dtype)
        network, encoder, origin = opened.model, opened.tokenizer, opened.description
    for name in ("actor_lora_r", "critic_lora_r"):
        policy[name] = lora_r if policy[name] is None else policy[name]
    prompts, held_out = find_prompts(data, validation_data, validation_fraction, encoder, template_kwargs)
    trainer = RLHFTrainer(
        network,
        scores,
        objective=method,
        config=config,
        prompts=prompts,
        validation_prompts=None if config.validate_every is None else held_out[:VALIDATION_PROMPTS],
        tokenizer=encoder,
        template_kwargs=template_kwargs,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        trackers=trackers or (),
        engine=engine,
        engine_arguments=engine_arguments,
        **policy,
    )
    report("model", origin)
    sampling = responses.sampling()
    steps = trainer.whole_phases(max_steps, responses.update_timesteps)
    rounded = "" if steps == max_steps else f" ({max_steps} rounded up to whole phases)"
    report("run", f"{checkpoint_dir}, {steps} updates{rounded}, {len(trainer.prompts)} prompts, {trainer.device}")
    result = trainer.train(max_steps=max_steps, update_timesteps=responses.update_timesteps, **sampling)
    lines = [*_progress(result.metrics), ("updates", f"{result.updates} in {result.phases} phases")]
    if result.best is not None:
        lines.append(("best", f"held-out reward {result.best['reward']:.3f} after {result.best['step']:.0f} updates"))
    results: list[Result] = []
    if result.outcome == "finished" and rank() == 0:
        # compare actor and reference on held-out prompts
        chosen = held_out[:VALIDATION_PROMPTS]
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


def _presets(objective: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the quickstart, without own model, data and reward."""
    own = {**chosen, "reward": None if chosen["reward"] == REWARD else chosen["reward"]}
    is_quick = preset_name(own, "model", "data", "reward") == "quickstart"
    return {**QUICK, **QUICK_OF.get(objective, {})} if is_quick else {}


def command_of(name: str) -> Command:
    """The command that trains a policy by one objective of ``OBJECTIVES``."""
    kind = OBJECTIVES[name]
    return Command(
        train_policy,
        {
            "method": Group(kind),
            "config": Group(RLConfig),
            "policy": Group(ActorCritic, skip=SETTLED, as_dict=True),
            "responses": Group(Responses),
        },
        f"Trains a policy by {kind.__name__} against a reward.",
        partial(_presets, name),
        defaults={"checkpoint_dir": f"runs/palm-{name}"},
    )
