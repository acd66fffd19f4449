"""Self-play: generation, log-probability steps at a large vocabulary next to DPO's formula, precomputed references.

The limit of generation is reading all weights once a token ("share of limit"); costs are shown as the length of the
answers and the vocabulary grow. Memory is what a first step takes at its peak above model and batch, gradients
included, in a process of its own.
"""

import json
from functools import cache, partial

import torch
import torch.nn.functional as F
from measure import (
    arguments,
    bytes_of,
    in_own_process,
    in_turns,
    median,
    memory_growth,
    ratio,
    read_bandwidth,
    report,
    thread_counts,
    timed,
)
from torch import Tensor

from spin_trainer import SPIN
from spin_trainer.data.opponent_answers import Sampling, answer_prompts
from spin_trainer.model.response_scores import collate, response_log_probs
from spin_trainer.quickstart.small_decoder import SmallDecoder

VOCABULARY, LENGTH = 32_000, 168
SPIN_LIVE, SPIN_STORED, DPO = "SPIN", "SPIN, reference precomputed", "DPO formula"
STEPS = (SPIN_LIVE, SPIN_STORED, DPO)


def small(vocabulary: int = 256) -> SmallDecoder:
    torch.manual_seed(0)
    return SmallDecoder(num_tokens=vocabulary, dim=256, depth=4, heads=8, dim_head=32)


def pairs(vocabulary: int, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Four prompts of 16 to 40 tokens, ``length`` tokens with their answers."""
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randint(0, vocabulary, (4, length), generator=generator) for _ in range(2))
    prompt_len = torch.tensor([16, 24, 32, 40])
    for row, own in enumerate(prompt_len.tolist()):
        generated[row, :own] = real[row, :own]
    return generated, real, prompt_len


def generation_row(length: int, rounds: int) -> dict[str, object]:
    model, sampling = small(), Sampling(max_seq_len=length)
    _, real, prompt_len = pairs(256, length)
    prompts = [row[:own].tolist() for row, own in zip(real, prompt_len.tolist(), strict=True)]
    tokens = sum(length - len(prompt) for prompt in prompts)
    seconds = in_turns({"cached": partial(answer_prompts, model, prompts, sampling, 0)}, min(rounds, 3))
    matrices = [parameter.detach() for parameter in model.parameters() if parameter.ndim == 2]
    steps = length - min(len(prompt) for prompt in prompts)
    limit = steps * bytes_of(matrices) / read_bandwidth(matrices)
    return {
        "tokens with prompt": length,
        "prompts": 4,
        "new tokens": tokens,
        "tokens/s": tokens / median(seconds["cached"]),
        "share of limit": limit / median(seconds["cached"]),
    }


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


class Step:
    """A loss with its gradient, one of ``STEPS``."""

    def __init__(self, kind: str, vocabulary: int, length: int) -> None:
        self.kind, self.batch = kind, pairs(vocabulary, length)
        self.model = small(vocabulary)
        self.reference = small(vocabulary) if kind == DPO else None
        self.spin = None if kind == DPO else SPIN(self.model)
        generated, real, lengths = self.batch
        if self.spin is not None and kind == SPIN_STORED:
            prompts, real_answers, generated_answers = zip(
                *(
                    (r[:own].tolist(), r[own:].tolist(), g[own:].tolist())
                    for r, g, own in zip(real, generated, lengths.tolist(), strict=True)
                ),
                strict=True,
            )
            self.ids, self.answer, _ = collate([*prompts, *prompts], [*real_answers, *generated_answers])
            self.spin.ref_model.release()
            self.known = torch.zeros(8)

    def __call__(self) -> float:
        generated, real, lengths = self.batch
        self.model.zero_grad()
        if self.reference is not None:
            loss = dpo_formula(self.model, self.reference, generated, real, lengths)
        elif self.kind == SPIN_LIVE:
            loss = self.spin(generated, real, lengths)
        else:
            policy = response_log_probs(self.spin.policy, self.ids, self.answer)
            loss = self.spin.comparison(policy, self.known, self.answer).losses.mean()
        loss.backward()
        return loss.item()


def measure_one(kind: str, vocabulary: int, length: int) -> tuple[float, float]:
    """MB that the first step takes at its peak above what there was, and seconds of a second one."""
    step = Step(kind, vocabulary, length)
    small(64)(torch.zeros(2, 8, dtype=torch.long)).sum().backward()  # what any first step takes
    return memory_growth(step), timed(step)


@cache
def measured(kind: str, vocabulary: int, length: int) -> tuple[float, float]:
    """``measure_one`` in a process of its own."""
    return tuple(in_own_process(__file__, kind, vocabulary, length))


def step_rows(rounds: int) -> list[dict[str, object]]:
    steps = {kind: Step(kind, VOCABULARY, LENGTH) for kind in STEPS}
    seconds = in_turns(dict(steps), min(rounds, 4))
    return [
        {
            "step at vocabulary 32k": kind,
            "s": median(seconds[kind]),
            "time / DPO formula": ratio(seconds[kind], seconds[DPO]),
            "share saved by precomputing": 1 - ratio(seconds[kind], seconds[SPIN_LIVE])
            if kind == SPIN_STORED
            else None,
            "peak memory of the step, MB": measured(kind, VOCABULARY, LENGTH)[0],
            "full logits, MB": 8 * LENGTH * VOCABULARY * 4 / 1e6,
        }
        for kind in STEPS
    ]


def growth_rows() -> list[dict[str, object]]:
    rows = []
    for vocabulary, length in ((8_000, 168), (32_000, 84), (32_000, 168), (64_000, 168)):
        ours, formula = (measured(kind, vocabulary, length) for kind in (SPIN_STORED, DPO))
        row = {"vocabulary": vocabulary, "tokens": length}
        row |= {"SPIN, MB": ours[0], "DPO formula, MB": formula[0], "memory / DPO formula": ours[0] / formula[0]}
        row |= {"SPIN, s": ours[1], "DPO formula, s": formula[1], "time / DPO formula": ours[1] / formula[1]}
        rows.append(row)
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0], default_rounds=3)
    if options.measure:
        torch.set_num_threads(options.threads[0])
        kind, *sizes = options.measure
        print(json.dumps(measure_one(kind, *map(int, sizes))))
        return
    for threads in thread_counts(options):
        rows = [generation_row(length, options.rounds) for length in (84, 168, 336)]
        report(f"The opponent's answers, 4 x 256 model, {threads} thread(s)", rows, options.json)
        report(f"A step at vocabulary 32k, {threads} thread(s)", step_rows(options.rounds), options.json)
        report(f"A step as vocabulary and length grow, {threads} thread(s)", growth_rows(), options.json)


if __name__ == "__main__":
    main()
