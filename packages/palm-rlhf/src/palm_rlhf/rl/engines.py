"""The engine that draws responses: ``lm_core`` decodes the policy itself, others are sent its weights before a draw.

An engine has ``generate`` with the arguments of ``lm_core.generate``, which returns a ``Generation``, and
``update_weights(model, adapters=[...])``. Its responses keep the engine's own log-probs, by whose difference from the
policy's the updates are weighted; see ``palm_rlhf.rl.importance``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from lm_core.causal_lm import Generation
from lm_core.generation.decoding import as_eos_ids
from lm_core.training.accelerator import pick_precision
from palm_rlhf.data.rollouts import Rollout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.rl.log_probs import pack_kept
from palm_rlhf.rl.policy import ActorCritic


def as_engine(
    engine: Any, policy: ActorCritic, *, tokenizer: Any = None, arguments: Mapping[str, Any] | None = None
) -> Any:
    """An engine by its name; None for "lm_core", and any object with ``generate`` and ``update_weights`` unchanged.

    Args:
        engine: "lm_core", "vllm" or an engine.
        policy: policy whose responses it draws.
        tokenizer: tokenizer for stop strings.
        arguments: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: there is no such engine, it does not run the policy, or there are arguments for no new engine.
        ImportError: vLLM is not installed.
    """
    if arguments and engine != "vllm":
        raise ValueError(f"engine_arguments are for engine 'vllm', got engine={engine!r}")
    if engine == "vllm":
        from lm_core.engines.vllm import VLLMEngine

        if isinstance(policy.actor, PaLM):
            raise ValueError("engine 'vllm' needs a Hugging Face policy, got a PaLM")
        half = pick_precision(policy.precision, policy.device)
        return VLLMEngine(
            policy.actor,
            tokenizer=tokenizer,
            dtype=None if half == torch.float32 else half,
            requirement="palm-rlhf[vllm]",
            **(arguments or {}),
        )
    if engine == "lm_core":
        return None
    if not (hasattr(engine, "generate") and hasattr(engine, "update_weights")):
        raise ValueError(f'engine must be "lm_core", "vllm" or have generate and update_weights, got {engine!r}')
    return engine


def kept_by_engine(
    result: Generation, rollout: Rollout, *, vocab_size: int, min_new_tokens: int, eos_id: Any
) -> UInt8[Tensor, "b m k"] | None:
    """Packed kept sets of a rollout at the positions of ``response_mask``; None if every token could be drawn."""
    sets = getattr(result, "kept", None)
    if sets is None and not min_new_tokens:
        return None
    ends = list(as_eos_ids(eos_id))
    kept = rollout.ids.new_full((len(rollout), rollout.ids.shape[1] - 1, -(-vocab_size // 8)), 255, dtype=torch.uint8)
    for row, (start, end) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)):
        allowed = torch.ones(end - start, vocab_size, dtype=torch.bool)
        if sets is None:
            allowed[:min_new_tokens, ends] = False
        else:
            for step in range(end - start):
                allowed[step] = False
                allowed[step, sets[row][step]] = True
        kept[row, start - 1 : end - 1] = pack_kept(allowed).to(kept.device)
    return kept
