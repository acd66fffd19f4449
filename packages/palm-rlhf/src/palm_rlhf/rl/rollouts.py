"""Sampling of rollouts: responses drawn from the policy, stored without distributions over the vocabulary.

Where sampling was filtered, the kept set of each step is stored as packed bits, one bit per token of the vocabulary.

Legend: b batch, r rows still generating, v vocabulary, k bytes of a packed kept set.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lm_core.causal_lm import eval_mode
from lm_core.checks import check_above_zero, check_positive, typed
from lm_core.generation.decoding import Filter
from lm_core.generation.sampling import filters_of
from lm_core.tokenizers import continuation_text, full_text
from palm_rlhf.data.prompts import Prompt
from palm_rlhf.data.rollouts import Rollout, rollout_of
from palm_rlhf.rl.engines import kept_by_engine
from palm_rlhf.rl.log_probs import pack_kept
from palm_rlhf.rl.policy import ActorCritic, Role


@typed
@dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling.

    Attributes:
        max_new_tokens: maximum length of a response, in tokens.
        max_seq_len: maximum length of prompt and response together; None for no such limit.
        temperature: divisor of the logits; above 0, since a policy is trained on the sampled distribution.
        top_k: number of most likely tokens to sample from; None for no limit.
        top_p: probability mass of the most likely tokens to sample from; None for no limit.
        min_p: minimum probability of a token, as a fraction of the most likely token's; None for no limit.
        filters: further filters of the logits, functions ``(b, v) -> (b, v)``.
        repetition_penalty: penalty of tokens already in the text; above 1 makes them less likely.
        eos_id: id or ids that end a response.
        min_new_tokens: minimum number of tokens before an EOS.
        stop_strings: texts that end a response with the token that completes them.
        pad_id: id that fills rows after their end.
        use_cache: False recomputes the whole sequence for each token.

    Raises:
        ValueError: a number is out of range, or a stop string is empty.
    """

    max_new_tokens: int
    max_seq_len: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    filters: list[Filter] | tuple[Filter, ...] = ()
    repetition_penalty: float = 1.0
    eos_id: int | list[int] | tuple[int, ...] | None = None
    min_new_tokens: int = 0
    stop_strings: list[str] | tuple[str, ...] = ()
    pad_id: int = 0
    use_cache: bool = True

    def __post_init__(self) -> None:
        check_positive(self.max_new_tokens, "max_new_tokens")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be at least 2, got {self.max_seq_len}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature}")
        if not all(self.stop_strings):
            raise ValueError(f"stop_strings must be non-empty strings, got {self.stop_strings!r}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be in [0, max_new_tokens = {self.max_new_tokens}], got {self.min_new_tokens}"
            )
        check_above_zero(self.repetition_penalty, "repetition_penalty")
        self.all_filters()  # raises for a value out of range

    def all_filters(self) -> list[Filter]:
        """Filters by ``top_k``, ``top_p`` and ``min_p``, then ``filters``."""
        return [*filters_of(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p), *self.filters]


def new_token_limit(policy: ActorCritic, prompts: Sequence[Prompt], settings: SamplingSettings) -> int:
    """Maximum length of a response to the shortest of some prompts.

    Raises:
        ValueError: the longest prompt leaves no token for a response.
    """
    lengths = [prompt.ids.shape[0] for prompt in prompts]
    limits = [settings.max_new_tokens]
    for name, limit, used in (
        ("max_seq_len", settings.max_seq_len, min(lengths)),
        ("the model's limit", policy.max_length, max(lengths)),  # prompts are padded to one length
    ):
        if limit is not None:
            limits.append(limit - used)
            if max(lengths) >= limit:
                raise ValueError(f"prompts must be shorter than {name} {limit}, the longest has {max(lengths)} tokens")
    return min(limits)


def draw_rollout(
    policy: ActorCritic,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    tokenizer: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    role: Role = "actor",
    engine: Any = None,
) -> Rollout:
    """One response of the actor or the reference to each prompt.

    With a ``generator`` for each prompt, a response does not depend on the other prompts of the batch.

    Args:
        engine: engine that was sent the weights of ``role``; see ``palm_rlhf.rl.engines``. None decodes ``policy``.

    Raises:
        ValueError: a prompt leaves no token for a response, stop strings come without a tokenizer, or filters are
            functions that the engine cannot apply.
    """
    if settings.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, got tokenizer=None")
    # generate in one batch, recording kept sets if tokens are filtered
    limit = new_token_limit(policy, prompts, settings)
    ids = [prompt.ids.to(policy.device) for prompt in prompts]
    least = min(settings.min_new_tokens, limit)
    common: dict[str, Any] = {
        "max_new_tokens": limit,
        "temperature": settings.temperature,
        "repetition_penalty": settings.repetition_penalty,
        "eos_id": settings.eos_id,
        "min_new_tokens": least,
        "generator": generator,
    }
    recorder = None
    if engine is not None:
        if settings.filters:
            raise ValueError("filters are functions, which only engine 'lm_core' applies; give top_k, top_p or min_p")
        # what it does not end at a stop string is cut below
        stops = settings.stop_strings if getattr(engine, "has_tokenizer", False) else ()
        named = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p, "stop_strings": stops}
        result = engine.generate(ids, **common, **named)
    else:
        filters = settings.all_filters()
        recorder = _KeptSets() if filters or least else None
        with torch.no_grad(), eval_mode(policy):
            filters = [*filters, *([] if recorder is None else [recorder])]
            result = policy.generate(
                ids,
                role=role,
                filters=filters,
                use_cache=settings.use_cache,
                stop_strings=settings.stop_strings,
                tokenizer=tokenizer if settings.stop_strings else None,
                **common,
            )
    # cut responses at the length limit and at stop strings
    finished = result.finished.tolist()
    responses, texts = [], []
    for row, (prompt, length) in enumerate(zip(prompts, result.lengths.tolist(), strict=True)):
        tokens = result.tokens[row, :length].tolist()
        if settings.max_seq_len is not None and length > settings.max_seq_len - prompt.ids.shape[0]:
            tokens, finished[row] = tokens[: settings.max_seq_len - prompt.ids.shape[0]], False
        stop = _stop_at(tokens, settings.stop_strings, tokenizer, prompt.ids.tolist())
        if stop is not None:
            tokens, finished[row] = tokens[:stop], True
        responses.append(torch.tensor(tokens, dtype=torch.long))
        texts.append("" if tokenizer is None else continuation_text(tokenizer, prompt.ids.tolist(), tokens))
    rollout = rollout_of(
        prompts,
        responses,
        finished=finished,
        pad_id=settings.pad_id,
        temperature=settings.temperature,
        texts=None if tokenizer is None else texts,
        log_probs=None
        if engine is None
        else [row[: len(r)] for row, r in zip(result.log_probs, responses, strict=True)],
    ).to(policy.device)
    if settings.repetition_penalty != 1.0:
        rollout = replace(rollout, repetition_penalty=settings.repetition_penalty)
    if engine is None:
        return rollout if recorder is None else replace(rollout, kept=recorder.aligned(rollout, result.lengths))
    assert policy.vocab_size is not None
    kept = kept_by_engine(result, rollout, vocab_size=policy.vocab_size, min_new_tokens=least, eos_id=settings.eos_id)
    return rollout if kept is None else replace(rollout, kept=kept)


class _KeptSets:
    """Last filter of a generation: records the tokens that the others kept at each step; returns logits unchanged."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, logits: Float[Tensor, "r v"]) -> Float[Tensor, "r v"]:
        self.steps.append(pack_kept(logits > -torch.inf))
        return logits

    def aligned(self, rollout: Rollout, generated: Int[Tensor, " b"]) -> Tensor:
        """``(b, n - 1, k)``: each set at the position of its token in ``response_mask``.

        Generation drops rows that have ended, so the rows of a step are those that generated more tokens.
        """
        n, (_, k) = rollout.ids.shape[1], self.steps[0].shape
        active = torch.arange(len(rollout), device=generated.device)
        # sets of tokens that a stop string cut off are recorded after the end
        whole = self.steps[0].new_full((len(rollout), n - 1 + len(self.steps), k), 255)
        for step, packed in enumerate(self.steps):
            if packed.shape[0] != active.shape[0]:
                active = active[generated[active] > step]
            assert packed.shape[0] == active.shape[0]
            whole[active, rollout.prompt_lengths[active] - 1 + step] = packed
        return whole[:, : n - 1]


def _stop_at(tokens: list[int], stop_strings: Sequence[str], tokenizer: Any, prompt: list[int]) -> int | None:
    """Number of tokens up to the one that completes a stop string, which may be a special token."""
    if not stop_strings:
        return None
    before = full_text(tokenizer, prompt)

    def stops(length: int) -> bool:
        whole = full_text(tokenizer, [*prompt, *tokens[:length]])
        text = whole[len(before) :] if whole.startswith(before) else full_text(tokenizer, tokens[:length])
        return any(stop in text for stop in stop_strings)

    if not stops(len(tokens)):
        return None
    return 1 + bisect.bisect_left(range(1, len(tokens)), True, key=stops)
