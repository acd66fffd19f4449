"""The command ``sample``: responses of a trained policy, the best first."""

from typing import Any

import torch

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device
from palm_rlhf.cli.sources import find_reward
from palm_rlhf.model.palm import PaLM


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
    from lm_core.generation.generate import generate
    from palm_rlhf.data.prompts import load_prompts
    from palm_rlhf.reward.rewards import as_reward, check_scores
    from palm_rlhf.rl.rollouts import rollout_of

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
    judge, _ = find_reward(reward)
    rollout = rollout_of([asked] * num_samples, responses, finished=result.finished.tolist())
    rollout = type(rollout)(**{**vars(rollout), "texts": texts})
    scores = check_scores(as_reward(judge)(rollout), num_samples).tolist()
    for score, text in sorted(zip(scores, texts, strict=True), reverse=True):
        print(f"--- reward {score:.3f}\n{prompt + text}")
    return 0
