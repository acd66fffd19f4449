"""Rollouts: prompts with their responses, scored by rewards and learned from by policies.

Legend: b batch, n sequence, m = n - 1 (aligned with the token that is predicted), k bytes of a packed kept set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_core.nn.masking import prompt_mask_from_lengths, right_pad
from lm_core.tokenizers import continuation_text
from palm_rlhf.data.prompts import Prompt

R = TypeVar("R", bound="Rollout")


@dataclass(frozen=True)
class Rollout:
    """Prompts with responses.

    Attributes:
        ids: ``(b, n)`` prompt and response, right-padded.
        prompt_lengths: ``(b,)`` tokens of each prompt.
        lengths: ``(b,)`` tokens of prompt and response, EOS included.
        finished: ``(b,)`` True where the response ended by EOS or a stop string.
        temperature: sampling temperature.
        repetition_penalty: penalty of tokens already in the text, by which the logits were changed.
        kept: ``(b, n - 1, k)`` packed kept sets of a filtered draw.
        engine_log_probs: ``(b, n - 1)`` log-probs of the responses by the engine that sampled them, if that is not the
            policy; 0 outside responses.
        texts: responses as text; None without a tokenizer.
        prompt_texts: prompts as text.
        messages: prompts that are chats, as messages; None for the others.
        columns: columns of the prompts' dataset rows.
    """

    ids: Int[Tensor, "b n"]
    prompt_lengths: Int[Tensor, " b"]
    lengths: Int[Tensor, " b"]
    finished: Bool[Tensor, " b"]
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    kept: Tensor | None = None
    engine_log_probs: Float[Tensor, "b m"] | None = None
    texts: list[str] | None = None
    prompt_texts: list[str | None] | None = None
    messages: list[Sequence[Mapping[str, Any]] | None] | None = None
    columns: list[Mapping[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def mask(self) -> Bool[Tensor, "b n"]:
        """True at real tokens."""
        return prompt_mask_from_lengths(self.lengths, self.ids.shape[1])

    @property
    def response_mask(self) -> Bool[Tensor, "b m"]:
        """True where the NEXT token belongs to the response, EOS included."""
        position = torch.arange(1, self.ids.shape[1], device=self.ids.device)
        return (position >= self.prompt_lengths[:, None]) & (position < self.lengths[:, None])

    def totals(self, scores: Float[Tensor, "*shape"]) -> Float[Tensor, " b"]:
        """Rewards of responses: ``scores`` ``(b,)``, or the sum of ``(b, n)`` over the tokens of each response."""
        if scores.ndim == 1:
            return scores
        return scores[:, 1:].where(self.response_mask.to(scores.device), 0).sum(dim=1)

    def samples(
        self, scores: Float[Tensor, "*shape"], number: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[dict[str, Any]]:
        """Up to ``number`` responses with prompts and scores, for a log; token ids without a tokenizer.

        ``columns`` are further values, one for each response. Samples are evenly spaced over the rows, so that groups
        of responses to one prompt show several prompts.
        """
        chosen = []
        scores = self.totals(scores)
        count = min(max(number, 0), len(self))
        for row in (index * len(self) // count for index in range(count)):
            ids = self.ids[row, int(self.prompt_lengths[row]) : int(self.lengths[row])].tolist()
            chosen.append(
                {
                    "prompt": None if self.prompt_texts is None else self.prompt_texts[row],
                    "response": ids if self.texts is None else self.texts[row],
                    "reward": round(float(scores[row]), 4),
                    **{name: values[row] for name, values in (columns or {}).items()},
                }
            )
        return chosen

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self: R, device: torch.device | str) -> R:
        """The rollout on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)


def rollout_of(
    prompts: Sequence[Prompt],
    responses: Sequence[Tensor],
    *,
    finished: Sequence[bool] | None = None,
    pad_id: int = 0,
    temperature: float = 1.0,
    texts: list[str] | None = None,
    log_probs: Sequence[Tensor] | None = None,
) -> Rollout:
    """A rollout of responses that another program generated, such as an inference engine.

    Args:
        prompts: see ``load_prompts``.
        responses: 1-D ids, EOS included, one for each prompt, at least one token each.
        finished: True for responses that ended by EOS or a stop string; all by default.
        pad_id: id that fills rows after their end.
        temperature: sampling temperature.
        texts: responses as text; a trainer with a tokenizer decodes the ids where a reward needs texts.
        log_probs: 1-D log-probs of each response's tokens as the other program sampled them (temperature and filters
            included); trainers correct for their difference from the policy's by importance weights.

    Raises:
        ValueError: the numbers differ, a response is empty, or a log-prob is not a finite number of at most 0.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"responses must be one for each of {len(prompts)} prompts, got {len(responses)}")
    for row, response in enumerate(responses):
        if response.ndim != 1 or response.shape[0] == 0:
            raise ValueError(f"responses[{row}] must be 1-D with at least one token, got shape {tuple(response.shape)}")
    if log_probs is not None:
        _check_log_probs(log_probs, responses)
    ids, prompt_lengths, lengths = joined([p.ids.cpu() for p in prompts], [r.long().cpu() for r in responses], pad_id)
    rollout = Rollout(
        ids=ids,
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        finished=torch.tensor([True] * len(prompts) if finished is None else list(finished)),
        temperature=temperature,
        texts=texts,
        prompt_texts=[prompt.text for prompt in prompts],
        messages=[prompt.messages for prompt in prompts],
        columns=[prompt.columns for prompt in prompts],
    )
    if log_probs is None:
        return rollout
    mask = rollout.response_mask
    flat = torch.cat([row.detach().to("cpu", torch.float32) for row in log_probs])
    return replace(rollout, engine_log_probs=torch.zeros(mask.shape).masked_scatter(mask, flat))


def with_texts(rollout: Rollout, tokenizer: Any) -> Rollout:
    """The rollout with texts of prompts and responses, decoded where it has none; unchanged without a tokenizer."""
    prompts = rollout.prompt_texts
    if tokenizer is None or (rollout.texts is not None and prompts is not None and None not in prompts):
        return rollout
    bounds = zip(rollout.ids.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    rows = [(ids[:first], ids[first:last]) for ids, first, last in bounds]
    known = prompts or [None] * len(rows)
    return replace(
        rollout,
        texts=rollout.texts or [continuation_text(tokenizer, prompt, response) for prompt, response in rows],
        prompt_texts=[
            str(tokenizer.decode(prompt)) if text is None else text
            for (prompt, _), text in zip(rows, known, strict=True)
        ],
    )


def _check_log_probs(log_probs: Sequence[Tensor], responses: Sequence[Tensor]) -> None:
    if len(log_probs) != len(responses):
        raise ValueError(f"log_probs must be one row for each of {len(responses)} responses, got {len(log_probs)}")
    for row, (values, response) in enumerate(zip(log_probs, responses, strict=True)):
        if values.shape != response.shape or not values.is_floating_point():
            raise ValueError(
                f"log_probs[{row}] must hold one number for each of {response.shape[0]} tokens, got "
                f"{values.dtype} of shape {tuple(values.shape)}"
            )
        # rounding of an engine may exceed 0
        if not bool(torch.isfinite(values).all()) or float(values.max()) > 1e-3:
            raise ValueError(f"log_probs[{row}] must be finite and at most 0, got {values.tolist()}"[:200])


def joined(
    prompts: Sequence[Tensor], responses: Sequence[Tensor], pad_id: int = 0
) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Right-padded ids of prompts with responses, lengths of the prompts, and total lengths."""
    ids, mask = right_pad([torch.cat(both) for both in zip(prompts, responses, strict=True)], pad_id)
    return ids, torch.tensor([prompt.shape[0] for prompt in prompts]), mask.sum(dim=1)
