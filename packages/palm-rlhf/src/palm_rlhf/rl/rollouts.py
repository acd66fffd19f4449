"""Rollouts: responses drawn from the policy, with what is needed to learn from them.

Tokens and masks are stored, never a distribution over the vocabulary. Where sampling was filtered, the kept set of each
step is stored as packed bits, an eighth of a byte a token of the vocabulary.

Legend: b batch, n sequence, m = n - 1 (aligned with the token that is predicted), k bytes of a packed kept set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_core.causal_lm import eval_mode
from lm_core.generation.decoding import Filter
from lm_core.nn.masking import prompt_mask_from_lengths, right_pad
from palm_rlhf.data.prompts import Prompt
from palm_rlhf.rl.log_probs import pack_kept
from palm_rlhf.rl.policy import ActorCritic, Role


@dataclass(frozen=True)
class Rollout:
    """Prompts with responses.

    Attributes:
        ids: ``(b, n)`` prompt and response, right-padded.
        prompt_lengths: ``(b,)`` tokens of each prompt.
        lengths: ``(b,)`` tokens of prompt and response, EOS included.
        finished: ``(b,)`` whether the response ended by EOS or a stop string.
        temperature: sampling temperature.
        kept: ``(b, n - 1, k)`` packed kept sets of a filtered draw.
        texts: responses as text, where there is a tokenizer.
        prompt_texts: prompts as text.
        columns: columns of the prompts' dataset rows.
    """

    ids: Int[Tensor, "b n"]
    prompt_lengths: Int[Tensor, " b"]
    lengths: Int[Tensor, " b"]
    finished: Bool[Tensor, " b"]
    temperature: float = 1.0
    kept: Tensor | None = None
    texts: list[str] | None = None
    prompt_texts: list[str | None] | None = None
    columns: list[Mapping[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def mask(self) -> Bool[Tensor, "b n"]:
        """True at real tokens."""
        return prompt_mask_from_lengths(self.lengths, self.ids.shape[1])

    @property
    def response_mask(self) -> Bool[Tensor, "b m"]:
        """True where the NEXT token is one of the response, its EOS included."""
        position = torch.arange(1, self.ids.shape[1], device=self.ids.device)
        return (position >= self.prompt_lengths[:, None]) & (position < self.lengths[:, None])

    @property
    def response_lengths(self) -> Int[Tensor, " b"]:
        """Tokens of each response."""
        return self.lengths - self.prompt_lengths

    def samples(self, scores: Float[Tensor, " b"], number: int) -> list[dict[str, Any]]:
        """The first responses with their prompts and scores, for a log; token ids where there is no tokenizer."""
        chosen = []
        for row in range(min(max(number, 0), len(self))):
            ids = self.ids[row, int(self.prompt_lengths[row]) : int(self.lengths[row])].tolist()
            chosen.append(
                {
                    "prompt": None if self.prompt_texts is None else self.prompt_texts[row],
                    "response": ids if self.texts is None else self.texts[row],
                    "reward": round(float(scores[row]), 4),
                }
            )
        return chosen

    def to(self, device: torch.device) -> "Rollout":
        """The rollout on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling of responses; checked by ``lm_core.generate``.

    Attributes:
        max_new_tokens: tokens of a response at most.
        max_seq_len: tokens of prompt and response together at most; None for no such limit.
        temperature: divides the logits; above 0.
        filters: functions such as ``functools.partial(top_p, p=0.9)``.
        eos_id: ends a response.
        min_new_tokens: tokens before which no EOS is drawn.
        stop_strings: a response ends with the token that completes one of these.
        pad_id: fills rows after their end.
        use_cache: False recomputes whole sequences for each token.
    """

    max_new_tokens: int
    max_seq_len: int | None = None
    temperature: float = 1.0
    filters: tuple[Filter, ...] = ()
    eos_id: int | tuple[int, ...] | None = None
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    pad_id: int = 0
    use_cache: bool = True


def draw_rollout(
    policy: ActorCritic,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    role: Role = "actor",
) -> Rollout:
    """One response to each prompt, of the actor or the reference.

    Raises:
        ValueError: a prompt leaves no room for a response, or a setting is out of range.
    """
    if settings.temperature <= 0:
        raise ValueError(
            f"temperature must be above 0: a policy is trained as it is sampled, got {settings.temperature}"
        )
    if settings.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, got tokenizer=None")
    longest = max(prompt.ids.shape[0] for prompt in prompts)
    if settings.max_seq_len is not None and longest >= settings.max_seq_len:
        raise ValueError(f"max_seq_len must exceed the longest prompt ({longest} tokens), got {settings.max_seq_len}")
    room = settings.max_new_tokens
    if settings.max_seq_len is not None:
        room = min(room, settings.max_seq_len - min(prompt.ids.shape[0] for prompt in prompts))
    if policy.max_length is not None:
        room = min(room, policy.max_length - longest)
        if room < 1:
            raise ValueError(f"prompts must leave room below the model's {policy.max_length} tokens, got {longest}")
    recorder = _KeptSets() if settings.filters or settings.min_new_tokens else None
    with torch.no_grad(), eval_mode(policy):
        result = policy.generate(
            [prompt.ids.to(policy.device) for prompt in prompts],
            role=role,
            max_new_tokens=room,
            temperature=settings.temperature,
            filters=[*settings.filters, *([] if recorder is None else [recorder])],
            eos_id=settings.eos_id,
            min_new_tokens=min(settings.min_new_tokens, room),
            generator=generator,
            use_cache=settings.use_cache,
        )
    lengths, finished = result.lengths.tolist(), result.finished.tolist()
    kept = None if recorder is None else recorder.by_row(result.lengths)
    rows, texts = [], []
    for row, prompt in enumerate(prompts):
        tokens = result.tokens[row, : lengths[row]].tolist()
        if settings.max_seq_len is not None and len(tokens) > settings.max_seq_len - prompt.ids.shape[0]:
            tokens, finished[row] = tokens[: settings.max_seq_len - prompt.ids.shape[0]], False
        stop = _stop_at(tokens, settings.stop_strings, tokenizer)
        if stop is not None:
            tokens, finished[row] = tokens[:stop], True
        rows.append(torch.tensor(tokens, dtype=torch.long))
        texts.append("" if tokenizer is None else tokenizer.decode(tokens))
    rollout = rollout_of(prompts, rows, finished=finished, pad_id=settings.pad_id, temperature=settings.temperature)
    if tokenizer is not None:
        rollout = replace(rollout, texts=texts)
    if kept is not None:
        rollout = replace(rollout, kept=_aligned(kept, rollout))
    return rollout.to(policy.device)


def rollout_of(
    prompts: Sequence[Prompt],
    responses: Sequence[Tensor],
    *,
    finished: Sequence[bool] | None = None,
    pad_id: int = 0,
    temperature: float = 1.0,
) -> Rollout:
    """A rollout of responses from elsewhere, such as another engine.

    Args:
        prompts: see ``load_prompts``.
        responses: 1-D ids, EOS included, one for each prompt, at least one token each.
        finished: whether each ended by itself; by default all did.
        pad_id: fills rows after their end.
        temperature: sampling temperature.

    Raises:
        ValueError: the numbers differ, or a response is empty.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"responses must be one for each of {len(prompts)} prompts, got {len(responses)}")
    for row, response in enumerate(responses):
        if response.ndim != 1 or response.shape[0] == 0:
            raise ValueError(f"responses[{row}] must be 1-D with at least one token, got shape {tuple(response.shape)}")
    whole = [torch.cat((p.ids.cpu(), r.long().cpu())) for p, r in zip(prompts, responses, strict=True)]
    ids, _ = right_pad(whole, pad_id)
    return Rollout(
        ids=ids,
        prompt_lengths=torch.tensor([prompt.ids.shape[0] for prompt in prompts]),
        lengths=torch.tensor([row.shape[0] for row in whole]),
        finished=torch.tensor([True] * len(prompts) if finished is None else list(finished)),
        temperature=temperature,
        prompt_texts=[prompt.text for prompt in prompts],
        columns=[prompt.columns for prompt in prompts],
    )


class _KeptSets:
    """Last filter of a generation: records the tokens that the others kept at each step, and changes nothing."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, logits: Float[Tensor, "r v"]) -> Float[Tensor, "r v"]:
        self.steps.append(pack_kept(logits > -torch.inf))
        return logits

    def by_row(self, lengths: Int[Tensor, " b"]) -> Tensor:
        """``(b, steps, k)``. Generation drops rows that have ended, so the rows left are those that are longer."""
        lengths = lengths.to(self.steps[0].device)
        active = torch.arange(lengths.shape[0], device=lengths.device)
        whole = self.steps[0].new_full((lengths.shape[0], len(self.steps), self.steps[0].shape[1]), 255)
        for step, packed in enumerate(self.steps):
            if packed.shape[0] != active.shape[0]:
                active = active[lengths[active] > step]
            assert packed.shape[0] == active.shape[0]
            whole[active, step] = packed
        return whole


def _aligned(kept: Tensor, rollout: Rollout) -> Tensor:
    """Kept sets of response steps, moved to where ``response_mask`` has them."""
    kept = kept.to(rollout.ids.device)
    whole = kept.new_full((len(rollout), rollout.ids.shape[1] - 1, kept.shape[-1]), 255)
    for row, (start, end) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)):
        whole[row, start - 1 : end - 1] = kept[row, : end - start]
    return whole


def _stop_at(tokens: list[int], stop_strings: tuple[str, ...], tokenizer: Any) -> int | None:
    """Number of tokens up to the one that completes a stop string."""
    if not stop_strings or not any(stop in tokenizer.decode(tokens) for stop in stop_strings):
        return None
    return next(n for n in range(1, len(tokens) + 1) if any(s in tokenizer.decode(tokens[:n]) for s in stop_strings))
