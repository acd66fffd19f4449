"""PaLM and a whole PPO update beside the original package (PaLM-rlhf-pytorch), equal sizes in turns in one run.

    nox -s bench_peers -- palm

- PPO: 16 prompts of 32 tokens, rollout, reward model, and one epoch of learning in one minibatch (dim 256, depth 4,
  LoRA of rank 8, vocabulary 256), at several numbers of new tokens. "kept of a rollout" is what is stored of the
  responses between drawing and learning; the original keeps the probability of every token of the vocabulary at every
  position, so a second row counts at a vocabulary of 4,096.
- Generation and training of 22.5 M parameters; the limit of generation is reading every weight once a token in products
  with one row, that of training the speed of one large matrix product, both measured in the same run.

The original draws one response at a time, without a cache, so few tokens are asked of it. It is looked for in
$BENCH_PEERS/palm-rlhf.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_training import operations, stepped
from measure import arguments, in_turns, matmul_flops, median, ratio, read_bandwidth, report

from lm_core.generation.generate import generate
from palm_rlhf import PaLM, RewardModel, RLHFTrainer

PEER = "PaLM-rlhf-pytorch"
PROMPT = 128
SIZES = {"dim": 512, "depth": 6, "num_tokens": 256}
POLICY = {"dim": 256, "depth": 4}
PROMPTS, PROMPT_TOKENS = 16, 32


def original_package() -> Any:
    """The original's module."""
    folder = Path(os.environ.get("BENCH_PEERS", ""), "palm-rlhf")
    if not folder.is_dir():
        raise SystemExit(f"the original package is not in {folder}: run nox -s bench_peers")
    sys.path.append(str(folder))
    import palm_rlhf_pytorch

    return palm_rlhf_pytorch


def row_of(
    what: str,
    threads: int,
    seconds: dict[str, list[float]],
    text: Callable[[float], str],
    *,
    axis: str = "",
    size: int | None = None,
    limit: float | None = None,
) -> dict[str, object]:
    """One line of the table; ``limit`` is the least number of seconds that it could take."""
    row: dict[str, object] = {
        "what": what,
        "threads": threads,
        PEER: text(median(seconds["original"])),
        "ours": text(median(seconds["ours"])),
        "times as fast": ratio(seconds["original"], seconds["ours"]),
    }
    if limit is not None:
        row["share of limit"] = limit / median(seconds["ours"])
    if size is not None:
        row |= {"axis": axis, "size": size, "unit": "s"}
        row |= {"cost": median(seconds["ours"]), "peer cost": median(seconds["original"])}
    return row


def rate_of(tokens: int) -> Callable[[float], str]:
    return lambda seconds: f"{tokens / seconds:.0f} tokens/s"


class Updates:
    """A whole PPO update of either package: the same prompts, sizes, ranks and epochs."""

    def __init__(self, original: Any, new_tokens: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.new_tokens = new_tokens
        prompts = torch.randint(1, vocabulary, (PROMPTS, PROMPT_TOKENS))
        palm = PaLM(num_tokens=vocabulary, **POLICY)
        self.ours = RLHFTrainer(
            palm=palm,
            reward_model=RewardModel(palm),
            prompt_token_ids=prompts,
            critic_pooled_values=True,
            epochs=1,
            minibatch_size=PROMPTS,
            device="cpu",
        )
        palm = original.PaLM(num_tokens=vocabulary, **POLICY)
        self.theirs = original.RLHFTrainer(
            palm=palm,
            reward_model=original.RewardModel(palm),
            prompt_token_ids=prompts,
            epochs=1,
            minibatch_size=PROMPTS,
            accelerate_kwargs={"cpu": True},
        )

    def our_update(self) -> None:
        # a run's length is counted from its beginning: each call asks for one phase more
        phases = self.ours.phase.number + 1
        self.ours.train(
            num_episodes=phases * PROMPTS,
            update_timesteps=PROMPTS,
            max_batch_size=PROMPTS,
            max_new_tokens=self.new_tokens,
        )

    def their_update(self) -> None:
        self.theirs.train(
            num_episodes=1,
            max_timesteps=PROMPTS,
            update_timesteps=PROMPTS,
            max_seq_len=PROMPT_TOKENS + self.new_tokens,
        )

    def kept(self) -> dict[str, int]:
        """Bytes of a rollout's experience in either package."""
        sizes: dict[str, int] = {}
        ours, theirs = self.ours.phase.begin, self.theirs.learn

        def our_begin(experience: Any, metrics: dict[str, float]) -> None:
            sizes["ours"] = sum(value.numel() * value.element_size() for value in experience.tensors().values())
            ours(experience, metrics)

        def their_learn(memories: Any) -> None:
            sizes["original"] = sum(value.numel() * value.element_size() for memory in memories for value in memory)
            theirs(memories)

        self.ours.phase.begin, self.theirs.learn = our_begin, their_learn  # type: ignore[method-assign]
        self.our_update()
        self.their_update()
        return sizes


@contextlib.contextmanager
def quietly() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def update_row(original: Any, new_tokens: int, threads: int, rounds: int) -> dict[str, object]:
    with quietly():
        updates = Updates(original, new_tokens, 256)
        seconds = in_turns({"ours": updates.our_update, "original": updates.their_update}, rounds)
    what = f"whole PPO update, {PROMPTS} prompts, {new_tokens} new tokens"
    return row_of(what, threads, seconds, "{:.2f} s".format, axis="new tokens, PPO update", size=new_tokens)


def kept_row(original: Any, vocabulary: int, new_tokens: int, threads: int) -> dict[str, object]:
    with quietly():
        sizes = Updates(original, new_tokens, vocabulary).kept()
    return {
        "what": f"kept of a rollout, {new_tokens} new tokens, vocabulary {vocabulary:,}",
        "threads": threads,
        PEER: f"{sizes['original'] / 1e6:.2f} MB",
        "ours": f"{sizes['ours'] / 1e6:.2f} MB",
        "times as small": sizes["original"] / sizes["ours"],
    }


def generation_row(original: Any, new_tokens: int, threads: int, rounds: int) -> dict[str, object]:
    palm, theirs = PaLM(**SIZES), original.PaLM(**SIZES)
    prompt = torch.randint(256, (1, PROMPT))
    matrices = [parameter.detach() for parameter in palm.parameters() if parameter.ndim == 2]
    rates: list[float] = []
    seconds = in_turns(
        {
            "limit": lambda: rates.append(read_bandwidth(matrices)),
            "ours": lambda: generate(palm, prompt, max_new_tokens=new_tokens),
            "original": lambda: theirs.generate(PROMPT + new_tokens, prompt),
        },
        rounds,
    )
    size = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
    what = f"generation, prompt {PROMPT}, {new_tokens} new tokens"
    series: dict[str, Any] = {"axis": "new tokens, generation", "size": new_tokens}
    return row_of(what, threads, seconds, rate_of(new_tokens), limit=new_tokens * size / median(rates), **series)


def training_row(original: Any, threads: int, rounds: int) -> dict[str, object]:
    palm, theirs = PaLM(**SIZES), original.PaLM(**SIZES)
    ids = torch.randint(1, 256, (4, 513))
    peaks: list[float] = []
    seconds = in_turns(
        {
            "peak": lambda: peaks.append(matmul_flops()),
            "ours": lambda: stepped(palm, palm(ids, return_loss=True)),
            "original": lambda: stepped(theirs, theirs(ids, return_loss=True)),
        },
        rounds,
    )
    limit = operations(palm, 4, 512) / median(peaks)
    return row_of("training step, 4 x 512", threads, seconds, rate_of(2048), limit=limit)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], new_tokens={"type": int, "nargs": "+", "default": [16, 64]})
    warnings.simplefilter("ignore")
    original = original_package()
    rounds = min(options.rounds, 2)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows += [update_row(original, new_tokens, threads, rounds) for new_tokens in options.new_tokens]
        rows += [kept_row(original, vocabulary, 16, threads) for vocabulary in (256, 4096)]
        rows += [generation_row(original, new_tokens, threads, rounds) for new_tokens in options.new_tokens]
        rows += [training_row(original, threads, rounds)]
    report("Beside the original: policies of 256 x 4, language models of 22.5 M parameters", rows, options.json)


if __name__ == "__main__":
    main()
