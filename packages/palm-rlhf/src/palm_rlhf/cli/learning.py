"""How the commands ``ppo`` and ``grpo`` run and end: training, then reference and actor side by side."""

import time
from typing import Any

from lm_core.cli.main import print_resume_hint, say
from lm_core.distributed import rank
from lm_core.training.run_directory import Result, write_summary
from palm_rlhf.cli.sources import VALIDATION_PROMPTS
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.rl.evaluation import PolicyEvaluation, evaluate_policy
from palm_rlhf.rl.trainer import RLHFTrainer

SHOWN = 2


def learn(trainer: RLHFTrainer, held_out: Any, **schedule: Any) -> int:
    """Trains, compares on prompts held out, writes ``summary.json`` and says what came of it.

    Args:
        trainer: with a ``checkpoint_dir``.
        held_out: prompts to compare on; see ``load_prompts``.
        **schedule: as of ``RLHFTrainer.train``, with ``num_episodes`` and ``update_timesteps``.

    Returns:
        The exit status.
    """
    started = time.monotonic()
    result = trainer.train(**schedule)
    assert trainer.checkpoint_dir is not None
    drawn = min(schedule["update_timesteps"], schedule["num_episodes"])
    planned = schedule["num_episodes"] // drawn * trainer.epochs * -(-drawn // trainer.config.minibatch_size)
    if result.outcome == "finished" and not result.metrics:
        say("            finished before; another --checkpoint_dir trains anew")
    if result.metrics:
        first, last = result.metrics[0], result.metrics[-1]
        say(f"reward      {first['reward']:.3f} in the first phase of this call, {last['reward']:.3f} in the last")
        say(f"entropy     {first['entropy']:.2f} nats a token in the first, {last['entropy']:.2f} in the last")
        if "explained_variance" in last:
            say(f"critic      foresees {100 * last['explained_variance']:.0f} % of the variance of the returns")
        if "ratio_deviation_at_start" in last:
            say(f"ratio       within {last['ratio_deviation_at_start']:.1e} of 1 before the first update of a phase")
    say(f"updates     {result.updates} in {result.phases} phases; samples in {trainer.checkpoint_dir}/samples.jsonl")
    say(f"curves      {result.curves or 'not drawn: pip install matplotlib'}")
    if result.outcome == "finished" and rank() == 0:
        seconds = time.monotonic() - started
        sampling = {name: value for name, value in schedule.items() if name in SAMPLING}
        prompts = load_prompts(held_out, tokenizer=trainer.tokenizer)[:VALIDATION_PROMPTS]
        found = evaluate_policy(trainer, prompts, trainer.sampling(**sampling), seed=trainer.config.seed)
        _show(found, len(prompts))
        write_summary(
            trainer.checkpoint_dir,
            [
                Result("reward of held-out prompts", found.reward_after, found.reward_before, "higher"),
                Result("KL from the reference, nats a response", found.kl, 0.0, "lower"),
            ],
            steps=result.updates,
            seconds=seconds if result.metrics else None,
        )
    return print_resume_hint("palm-rlhf", result.outcome, result.updates, planned)


SAMPLING = ("max_new_tokens", "max_seq_len", "temperature", "filters", "min_new_tokens", "stop_strings")


def _show(found: PolicyEvaluation, count: int) -> None:
    print(f"\nOn {count} prompts of the comparison, from the reference (before) and from the actor (after):")
    print(f"reward      {found.reward_before:.3f} before, {found.reward_after:.3f} after")
    print(f"kl          {found.kl:.2f} nats a response from the reference\n")
    for before, after in list(zip(found.before, found.after, strict=True))[:SHOWN]:
        print(f"--- prompt\n{before['prompt']}")
        for name, sample in (("before", before), ("after", after)):
            print(f"--- {name}, reward {sample['reward']:.2f}\n{sample['response']}")
