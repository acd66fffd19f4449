"""What the commands of reinforcement learning share: where models, prompts and rewards come from, and how a run ends.

Without arguments the commands go on from one another: ``train``, ``reward`` and ``ppo`` on Python's own library.
"""

from functools import partial
from pathlib import Path
from typing import Any

from lm_core.checkpoint import checkpoint_folder
from lm_core.corpora import load_corpus
from lm_core.decoding import Filter
from lm_core.distributed import rank
from lm_core.manifest import read_json
from lm_core.sampling import top_k as keep_best
from lm_core.sampling import top_p as keep_nucleus
from lm_core.tokenizers import load_tokenizer
from palm_rlhf.cli.commands import INTERRUPTED, command_line

BASE = "runs/palm-quickstart"
REWARD = "runs/palm-reward"
PPO = "runs/palm-ppo"


def find_reward(reward: str) -> tuple[Any, Path | None]:
    """A reward, and the folder of its model if it is one of ours."""
    from palm_rlhf.reward_model import RewardModel

    if ":" in reward and not Path(reward).exists():
        return reward, None
    folder = checkpoint_folder(reward)
    if read_json(folder / "config.json").get("class") != "RewardModel":
        raise ValueError(f"reward must be the folder of a RewardModel or module:function, got {reward}")
    return RewardModel.from_pretrained(folder), folder


def find_sources(
    checkpoint: str | None, base: Path | None, tokenizer: str | None, prompts: str
) -> tuple[Path, Any, Any]:
    """The policy's folder, its tokenizer, and prompts."""
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


def find_filters(top_k: int | None, top_p: float | None) -> list[Filter]:
    """Filters of logits for the flags of this name."""
    filters: list[Filter] = [] if top_k is None else [partial(keep_best, k=top_k)]
    return filters if top_p is None else [*filters, partial(keep_nucleus, p=top_p)]


def ended(outcome: str) -> int:
    """The exit status; says how to go on after an interruption."""
    if outcome == "finished":
        return 0
    if rank() == 0:
        print(f"\nStopped ({outcome}). To go on:\n  {command_line()}")
    return INTERRUPTED
