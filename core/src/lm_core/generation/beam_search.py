"""Beam search over any causal language model.

Legend: b batch, v vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lm_core.causal_lm import Generation
from lm_core.checks import check_positive, typed
from lm_core.generation.decoding import Decoder, Filter, is_any
from lm_core.nn.masking import prompt_mask_from_lengths


@torch.no_grad()
@typed
def beam_search(
    model: Any,
    prompt: Any,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    filters: Sequence[Filter] = (),
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    use_cache: bool = True,
    progress: bool = False,
    **model_kwargs: Any,
) -> Generation:
    """The best continuation found by beam search, by ``sum of log-probs / length ** length_penalty``.

    A row stops when no beam can still beat the best finished one, so the result does not depend on the batch.
    With as many beams as there are sequences the search is exhaustive.

    Args:
        beams: hypotheses kept for each row; 1 is greedy decoding.
        length_penalty: 0 compares sums, 1 compares means; larger values favour long answers.
        filters: as in ``generate``; a filtered token is never chosen.
        model, prompt, max_new_tokens, mask, prompt_lengths, eos_id, pad_id, min_new_tokens, repetition_penalty,
            use_cache, progress, **model_kwargs: as in ``generate``.

    Raises:
        ValueError: as in ``generate``, or ``beams`` is below 1.
    """
    check_positive(beams, "beams")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    decoder = Decoder(
        model,
        prompt,
        mask=mask,
        prompt_lengths=prompt_lengths,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        eos_id=eos_id,
        repetition_penalty=repetition_penalty,
        use_cache=use_cache,
        model_kwargs=model_kwargs,
    )
    state = _Beams(decoder.ids.shape[0], beams, max_new_tokens, length_penalty, decoder.ids.device)
    with decoder:
        for step in tqdm(range(max_new_tokens), desc="beam search", unit="token", disable=not progress):
            logits = decoder.next_logits()
            for filter_ in filters:
                logits = filter_(logits)
            log_probs = logits.log_softmax(dim=-1)
            if bool(log_probs[:, 0].isnan().any()):  # a NaN makes its whole row NaN
                raise ValueError("logits must not hold NaN, and leave an entry above -inf in every row")
            token, parent = state.extend(log_probs, decoder.eos_ids)
            if step + 1 == max_new_tokens:
                continue  # nothing will read the last token
            if state.all_decided():
                break
            decoder.reorder(parent)
            decoder.append(token)
    return state.best(pad_id)


class _Beams:
    """Running beams and the best finished hypothesis of each row."""

    def __init__(self, b: int, beams: int, max_length: int, length_penalty: float, device: torch.device) -> None:
        self._beams = beams
        self._max_length = max_length
        self._penalty = length_penalty
        self._step = 0
        self._tokens = torch.zeros(b, 1, max_length, dtype=torch.long, device=device)
        self._log_probs = torch.zeros(b, 1, max_length, device=device)
        self._sums = torch.zeros(b, 1, device=device)
        self._best_tokens = torch.zeros(b, max_length, dtype=torch.long, device=device)
        self._best_log_probs = torch.zeros(b, max_length, device=device)
        self._best_score = torch.full((b,), -torch.inf, device=device)
        self._best_length = torch.zeros(b, dtype=torch.long, device=device)
        self._best_ended = torch.zeros(b, dtype=torch.bool, device=device)

    def extend(self, log_probs: Tensor, eos_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Takes log-probabilities ``(rows * beams, v)``; returns the new tokens and the flat index of their parents."""
        b, width = self._sums.shape
        v = log_probs.shape[-1]
        log_probs = log_probs.view(b, width, v)
        totals = (self._sums.unsqueeze(-1) + log_probs).flatten(1)
        # Even if every beam ends, enough candidates must continue. A single beam (greedy) stops at its first ending.
        count = 1 if self._beams == 1 else min(self._beams * (1 + len(eos_ids)), totals.shape[1])
        sums, flat = totals.topk(count, dim=-1)
        parent, token = flat.div(v, rounding_mode="floor"), flat.remainder(v)
        token_log_prob = log_probs.flatten(1).gather(1, flat)

        self._step += 1
        ends = is_any(token, eos_ids)
        finished = ends & (torch.arange(count, device=token.device) < self._beams)
        if self._step == self._max_length:
            finished = finished | ~ends
        self._finish(sums, parent, token, token_log_prob, finished, ends)

        # Keep the best that continue; too few are filled up with endings, whose score never wins.
        alive_sums = sums.masked_fill(ends, -torch.inf)
        kept = min(self._beams, count)
        self._sums, order = alive_sums.topk(kept, dim=-1)
        parent, token, token_log_prob = (t.gather(1, order) for t in (parent, token, token_log_prob))
        self._tokens = self._grown(self._tokens, parent, token)
        self._log_probs = self._grown(self._log_probs, parent, token_log_prob)
        rows = torch.arange(b, device=token.device).unsqueeze(-1) * width
        return token.flatten(), (rows + parent).flatten()

    def all_decided(self) -> bool:
        """True if no running beam can still beat the best finished one: more tokens only lower its sum."""
        length = self._max_length if self._penalty > 0 else self._step
        return bool((self._best_score >= self._sums[:, 0] / length**self._penalty).all())

    def best(self, pad_id: int) -> Generation:
        longest = int(self._best_length.max())
        padding = ~prompt_mask_from_lengths(self._best_length, self._max_length)
        tokens = self._best_tokens.masked_fill(padding, pad_id)
        log_probs = self._best_log_probs.masked_fill(padding, 0.0)
        return Generation(tokens[:, :longest], self._best_length, log_probs[:, :longest], self._best_ended)

    def _grown(self, history: Tensor, parent: Tensor, new: Tensor) -> Tensor:
        history = history.gather(1, parent.unsqueeze(-1).expand(-1, -1, self._max_length))
        history[:, :, self._step - 1] = new
        return history

    def _finish(
        self, sums: Tensor, parent: Tensor, token: Tensor, token_log_prob: Tensor, finished: Tensor, ends: Tensor
    ) -> None:
        """Keeps the best of the ``finished`` candidates if it beats the best so far."""
        scores = (sums / self._step**self._penalty).masked_fill(~finished, -torch.inf)
        score, rank = scores.max(dim=-1)
        parent, token, token_log_prob, ended = (
            t.gather(1, rank.unsqueeze(-1)) for t in (parent, token, token_log_prob, ends)
        )
        tokens = self._grown(self._tokens, parent, token).squeeze(1)
        log_probs = self._grown(self._log_probs, parent, token_log_prob).squeeze(1)
        better = score > self._best_score
        self._best_score = torch.where(better, score, self._best_score)
        self._best_length = torch.where(better, self._step, self._best_length)
        self._best_ended = torch.where(better, ended.squeeze(1), self._best_ended)
        self._best_tokens = torch.where(better.unsqueeze(-1), tokens, self._best_tokens)
        self._best_log_probs = torch.where(better.unsqueeze(-1), log_probs, self._best_log_probs)
