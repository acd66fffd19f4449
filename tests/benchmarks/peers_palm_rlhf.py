"""PaLM and a whole PPO update next to the original package (PaLM-rlhf-pytorch), equal sizes in turns in one run.

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
import warnings
from typing import Any

import torch
from measure import (
    arguments,
    bytes_of,
    compared,
    in_turns,
    matmul_flops,
    median,
    peer_folder,
    read_bandwidth,
    report,
    thread_counts,
    tokens_per_second,
)
from peers_hugging_face import operations, stepped

from lm_core.generation.generate import generate
from palm_rlhf import PaLM, RewardModel, RLHFTrainer

PEER = "PaLM-rlhf-pytorch"
PROMPT = 128
SIZES = {"dim": 512, "depth": 6, "num_tokens": 256}
POLICY = {"dim": 256, "depth": 4}
PROMPTS, PROMPT_TOKENS = 16, 32


def original_package() -> Any:
    """The original's module."""
    peer_folder("palm-rlhf")
    import palm_rlhf_pytorch

    return palm_rlhf_pytorch


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
            sizes["ours"] = bytes_of(list(experience.tensors().values()))
            ours(experience, metrics)

        def their_learn(memories: Any) -> None:
            sizes["theirs"] = bytes_of([value for memory in memories for value in memory])
            theirs(memories)

        self.ours.phase.begin, self.theirs.learn = our_begin, their_learn  # type: ignore[method-assign]
        self.our_update()
        self.their_update()
        return sizes


@contextlib.contextmanager
def quietly() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def update_row(original: Any, new_tokens: int, rounds: int) -> dict[str, object]:
    with quietly():
        updates = Updates(original, new_tokens, 256)
        seconds = in_turns({"ours": updates.our_update, "theirs": updates.their_update}, rounds)
    what = f"whole PPO update, {PROMPTS} prompts, {new_tokens} new tokens"
    return compared(what, PEER, seconds, axis="new tokens, PPO update", size=new_tokens)


def kept_row(original: Any, vocabulary: int, new_tokens: int) -> dict[str, object]:
    with quietly():
        sizes = Updates(original, new_tokens, vocabulary).kept()
    return {
        "what": f"kept of a rollout, {new_tokens} new tokens, vocabulary {vocabulary:,}",
        "threads": torch.get_num_threads(),
        PEER: f"{sizes['theirs'] / 1e6:.2f} MB",
        "ours": f"{sizes['ours'] / 1e6:.2f} MB",
        "times as small": sizes["theirs"] / sizes["ours"],
    }


def generation_row(original: Any, new_tokens: int, rounds: int) -> dict[str, object]:
    palm, theirs = PaLM(**SIZES), original.PaLM(**SIZES)
    prompt = torch.randint(256, (1, PROMPT))
    matrices = [parameter.detach() for parameter in palm.parameters() if parameter.ndim == 2]
    rates: list[float] = []
    seconds = in_turns(
        {
            "limit": lambda: rates.append(read_bandwidth(matrices)),
            "ours": lambda: generate(palm, prompt, max_new_tokens=new_tokens),
            "theirs": lambda: theirs.generate(PROMPT + new_tokens, prompt),
        },
        rounds,
    )
    what = f"generation, prompt {PROMPT}, {new_tokens} new tokens"
    series: dict[str, Any] = {"axis": "new tokens, generation", "size": new_tokens}
    limit = new_tokens * bytes_of(matrices) / median(rates)
    return compared(what, PEER, seconds, tokens_per_second(new_tokens), limit=limit, **series)


def training_row(original: Any, rounds: int) -> dict[str, object]:
    palm, theirs = PaLM(**SIZES), original.PaLM(**SIZES)
    ids = torch.randint(1, 256, (4, 513))
    peaks: list[float] = []
    seconds = in_turns(
        {
            "peak": lambda: peaks.append(matmul_flops()),
            "ours": lambda: stepped(palm, palm(ids, return_loss=True)),
            "theirs": lambda: stepped(theirs, theirs(ids, return_loss=True)),
        },
        rounds,
    )
    limit = operations(palm, 4, 512) / median(peaks)
    return compared("training step, 4 x 512", PEER, seconds, tokens_per_second(2048), limit=limit)


def main() -> None:
    options = arguments(__doc__.splitlines()[0], new_tokens={"type": int, "nargs": "+", "default": [16, 64]})
    warnings.simplefilter("ignore")
    original = original_package()
    rounds = min(options.rounds, 2)
    rows = []
    for _ in thread_counts(options):
        rows += [update_row(original, new_tokens, rounds) for new_tokens in options.new_tokens]
        rows += [kept_row(original, vocabulary, 16) for vocabulary in (256, 4096)]
        rows += [generation_row(original, new_tokens, rounds) for new_tokens in options.new_tokens]
        rows += [training_row(original, rounds)]
    report("Next to the original: policies of 256 x 4, language models of 22.5 M parameters", rows, options.json)


if __name__ == "__main__":
    main()
