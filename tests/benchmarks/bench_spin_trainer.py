"""Self-play: generation, log-probability steps at a large vocabulary beside DPO's formula, precomputed references."""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import arguments, in_turns, median, ratio, report
from torch import Tensor

from lm_core.distributed import world_size
from spin_trainer import SPIN, SPINTrainer
from spin_trainer.opponent_answers import Sampling, answer_prompts
from spin_trainer.response_scores import collate
from spin_trainer.sft_data import Example, SFTDataset
from spin_trainer.small_decoder import SmallDecoder

VOCABULARY = 32_000


def small(vocabulary: int = 256) -> SmallDecoder:
    torch.manual_seed(0)
    return SmallDecoder(num_tokens=vocabulary, dim=256, depth=4, heads=8, dim_head=32)


def pairs(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four prompts of 16 to 40 tokens, 168 tokens with their answers."""
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randint(0, vocabulary, (4, 168), generator=generator) for _ in range(2))
    prompt_len = torch.tensor([16, 24, 32, 40])
    for row, length in enumerate(prompt_len.tolist()):
        generated[row, :length] = real[row, :length]
    return generated, real, prompt_len


def generation_row(rounds: int) -> dict[str, object]:
    model, sampling = small(), Sampling(max_seq_len=168)
    _, real, prompt_len = pairs(256)
    prompts = [row[:length].tolist() for row, length in zip(real, prompt_len.tolist(), strict=True)]
    tokens = sum(168 - len(prompt) for prompt in prompts)
    seconds = in_turns({"cached": partial(answer_prompts, model, prompts, sampling, 0)}, rounds)
    return {"model": "4 x 256", "prompts": 4, "new tokens": tokens, "tokens/s": tokens / median(seconds["cached"])}


def dpo_formula(
    model: SmallDecoder, reference: SmallDecoder, generated: Tensor, real: Tensor, lengths: Tensor
) -> Tensor:
    """DPO's sigmoid loss as usually written: full logits, log-softmax and gather, of policy and reference."""
    ids = torch.cat((real, generated))
    answer = (torch.arange(ids.shape[1]) >= lengths[:, None]).repeat(2, 1)[:, 1:]

    def scores(scored: SmallDecoder) -> Tensor:
        log_probs = scored(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (log_probs * answer).sum(-1)

    policy = scores(model)
    with torch.no_grad():
        known = scores(reference)
    chosen, rejected = (policy - known).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def one_step(kind: str) -> None:
    """A step at vocabulary 32k in a process of its own; prints the growth of its peak memory in MB."""
    import resource

    model = small(VOCABULARY)
    generated, real, lengths = pairs(VOCABULARY)
    reference = small(VOCABULARY) if kind == "DPO formula" else None
    spin = None if reference else SPIN(model)
    small(64)(torch.zeros(2, 8, dtype=torch.long)).sum().backward()  # what any first step takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reference is not None:
        dpo_formula(model, reference, generated, real, lengths).backward()
    elif spin is not None:
        spin(generated, real, lengths).backward()
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def step_rows(threads: int, rounds: int) -> list[dict[str, object]]:
    model, reference = small(VOCABULARY), small(VOCABULARY)
    spin = SPIN(model)
    generated, real, lengths = pairs(VOCABULARY)
    known: list[Tensor] = []
    ids, answer, _ = collate(
        [row[:length].tolist() for row, length in zip(real, lengths.tolist(), strict=True)] * 2,
        [
            row[length:].tolist()
            for rows in (real, generated)
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ],
    )

    def precomputed() -> None:
        from spin_trainer.response_scores import response_log_probs

        policy = response_log_probs(spin.policy, ids, answer)
        if not known:
            known.append(policy.detach())
        spin.comparison(policy, known[0]).losses.mean().backward()

    variants = {
        "SPIN": lambda: spin(generated, real, lengths).backward(),
        "SPIN, reference precomputed": precomputed,
        "DPO formula": lambda: dpo_formula(model, reference, generated, real, lengths).backward(),
    }
    seconds = in_turns(variants, rounds)
    rows = []
    for name in variants:
        row: dict[str, object] = {"step": name, "vocabulary": VOCABULARY, "threads": threads}
        row |= {"s": median(seconds[name]), "time / DPO formula": ratio(seconds[name], seconds["DPO formula"])}
        if name != "SPIN, reference precomputed":
            measured = subprocess.run(
                [sys.executable, __file__, "--measure", name], capture_output=True, text=True, check=True
            )
            row["peak memory, MB"] = float(json.loads(measured.stdout.splitlines()[-1]))
        rows.append(row)
    return rows


def iteration_seconds() -> None:
    """One whole iteration of the trainer on four prompts; for the comparison with the original package."""
    generated, real, lengths = pairs(256)
    del generated
    rows = [
        Example(tuple(row[:length].tolist()), tuple(row[length:].tolist()))
        for row, length in zip(real, lengths.tolist(), strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        SPINTrainer(
            small(),
            train_sft_dataset=SFTDataset(rows),
            max_seq_len=168,
            batch_size=4,
            grad_accum_steps=1,
            epochs=1,
            device="cpu",
            checkpoint_folder=Path(folder) / "run",
        )()
    assert world_size() == 1


def main() -> None:
    options = arguments(__doc__.splitlines()[0], measure={"default": None, "help": "used by the script itself"})
    if options.measure is not None:
        one_step(options.measure)
        return
    for threads in options.threads:
        torch.set_num_threads(threads)
        report(f"The opponent's answers, {threads} thread(s)", [generation_row(options.rounds)], options.json)
        report(f"A step at vocabulary 32k, {threads} thread(s)", step_rows(threads, options.rounds), options.json)


if __name__ == "__main__":
    main()
