"""GRPO with a verifiable reward: two-digit addition, scored by exact match on held-out sums.

A small PaLM is first trained on a few worked sums, until it is sometimes right. GRPO then draws answers to other sums
and rewards the correct ones, without showing any. The defaults take about a minute;
``tests/benchmarks/study_palm_rlhf_addition.py`` runs the full study over three seeds.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lm_core.generation.generate import generate
from lm_core.nn.masking import right_pad
from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import GRPOTrainer, PaLM

TOKENIZER = ByteTokenizer()
SIZES = {"dim": 128, "depth": 3, "dim_head": 32, "heads": 4}
HELD_OUT = 1000


@dataclass(frozen=True)
class Outcome:
    """Exact match on held-out sums after the supervised start and after GRPO, and the mean reward of each phase."""

    before: float
    after: float
    rewards: list[float]


def sums(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All sums of two two-digit numbers as rows of prompt and answer: training rows and held-out rows."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def supervise(palm: PaLM, rows: Sequence[dict[str, str]], *, updates: int, batch_size: int = 64) -> None:
    """Supervised training on prompts followed by their answers."""
    optimizer = torch.optim.AdamW(palm.parameters(), lr=2e-3, weight_decay=0.01)
    texts = [torch.tensor([*TOKENIZER.encode(row["prompt"] + row["answer"]), TOKENIZER.eos_id]) for row in rows]
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (update + 1) / 50)
        chosen = torch.randint(len(texts), (batch_size,)).tolist()
        ids, mask = right_pad([texts[k] for k in chosen], TOKENIZER.pad_id)
        palm(ids, mask=mask, return_loss=True).backward()
        torch.nn.utils.clip_grad_norm_(palm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def exact(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Reward of 1 for the right answer, else 0; ``answer`` is a column of the prompts' rows."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def exact_match(palm: PaLM, rows: Sequence[dict[str, str]]) -> float:
    """Fraction of rows whose greedy answer is right."""
    prompts = [torch.tensor(TOKENIZER.encode(row["prompt"])) for row in rows]
    result = generate(palm, prompts, max_new_tokens=4, temperature=0.0, eos_id=TOKENIZER.eos_id)
    answers = [
        TOKENIZER.decode(ids[:n].tolist()) for ids, n in zip(result.tokens, result.lengths.tolist(), strict=True)
    ]
    return sum(exact([], answers, [row["answer"] for row in rows])) / len(rows)


def run(*, seed: int, supervised_rows: int, supervised_updates: int, phases: int, group_size: int = 16) -> Outcome:
    """Supervised start, then GRPO; held-out sums appear in neither."""
    torch.manual_seed(seed)
    learned, held_out = sums(seed)
    palm = PaLM(num_tokens=TOKENIZER.vocab_size, **SIZES)
    supervise(palm, learned[:supervised_rows], updates=supervised_updates)
    before = exact_match(palm.eval(), held_out)
    print(f"seed {seed}: {before:.3f} of the held-out sums after the supervised start", flush=True)
    trainer = GRPOTrainer(
        palm=palm,
        prompts=learned,
        reward=exact,
        tokenizer=TOKENIZER,
        group_size=group_size,
        actor_lora=False,
        actor_lr=2e-4,
        kl_div_loss_weight=0.0,
        minibatch_size=256,
        epochs=2,
        seed=seed,
        device="cpu",
    )
    result = trainer.train(num_episodes=phases * 512, update_timesteps=512, max_batch_size=512, max_new_tokens=4)
    after = exact_match(palm.eval(), held_out)
    print(f"seed {seed}: {after:.3f} after {phases} phases of GRPO", flush=True)
    return Outcome(before, after, [row["reward"] for row in result.metrics])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--supervised-rows", type=int, default=2000)
    parser.add_argument("--supervised-updates", type=int, default=150)
    parser.add_argument("--phases", type=int, default=3)
    run(**vars(parser.parse_args()))
