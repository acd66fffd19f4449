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
from lm_core.generation.decoding import STEPS_BETWEEN_CHECKS_ON_ACCELERATOR, Decoder, Filter, is_any, run_on_the_device
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
    no_repeat_ngram_size: int = 0,
    use_cache: bool = True,
    compile: bool = False,
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
            no_repeat_ngram_size, use_cache, compile, progress, **model_kwargs: as in ``generate``.

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
        no_repeat_ngram_size=no_repeat_ngram_size,
        num_return_sequences=1,
        use_cache=use_cache,
        compile=compile,
        model_kwargs=model_kwargs,
    )
    state = _Beams(decoder.ids.shape[0], beams, max_new_tokens, length_penalty, decoder.ids.device)

    def choose(logits: Tensor) -> Tensor:
        for filter_ in filters:
            logits = filter_(logits)
        token, parent = state.extend(logits.log_softmax(dim=-1), decoder.eos_ids)
        decoder.reorder(parent)
        return token

    on_device = run_on_the_device(filters)
    check_every = 1 if decoder.ids.device.type == "cpu" else STEPS_BETWEEN_CHECKS_ON_ACCELERATOR
    with decoder:
        for step in tqdm(range(max_new_tokens), desc="beam search", unit="token", disable=not progress):
            # While the number of beams grows, their tensors are replaced, which a CUDA graph cannot hold.
            decoder.step(choose, () if on_device and state.has_all_beams else None)
            if step % check_every == 0 or step + 1 == max_new_tokens:
                state.check()
                if state.all_decided():
                    break
    return state.best(pad_id)


class _Beams:
    """Running beams and the best finished hypothesis of each row, in tensors that stay in place once all beams run."""

    def __init__(self, b: int, beams: int, max_length: int, length_penalty: float, device: torch.device) -> None:
        self._beams = beams
        self._max_length = max_length
        self._penalty = length_penalty
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        self._has_nan = torch.zeros((), dtype=torch.bool, device=device)
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
        self._has_nan.logical_or_(log_probs[:, 0].isnan().any())  # a NaN makes its whole row NaN
        log_probs = log_probs.view(b, width, v)
        totals = (self._sums.unsqueeze(-1) + log_probs).flatten(1)
        # Even if every beam ends, enough candidates must continue. A single beam (greedy) stops at its first ending.
        count = 1 if self._beams == 1 else min(self._beams * (1 + len(eos_ids)), totals.shape[1])
        sums, flat = totals.topk(count, dim=-1)
        parent, token = flat.div(v, rounding_mode="floor"), flat.remainder(v)
        token_log_prob = log_probs.flatten(1).gather(1, flat)

        ends = is_any(token, eos_ids)
        finished = ends & (torch.arange(count, device=token.device) < self._beams)
        finished = finished | (~ends & (self._step == self._max_length - 1))
        self._finish(sums, parent, token, token_log_prob, finished, ends)

        # Keep the best that continue; too few are filled up with endings, whose score never wins.
        alive_sums = sums.masked_fill(ends, -torch.inf)
        kept = min(self._beams, count)
        sums, order = alive_sums.topk(kept, dim=-1)
        parent, token, token_log_prob = (t.gather(1, order) for t in (parent, token, token_log_prob))
        self._sums = _replaced(self._sums, sums)
        self._tokens = _replaced(self._tokens, self._grown(self._tokens, parent, token))
        self._log_probs = _replaced(self._log_probs, self._grown(self._log_probs, parent, token_log_prob))
        self._step.add_(1)
        rows = torch.arange(b, device=token.device).unsqueeze(-1) * width
        return token.flatten(), (rows + parent).flatten()

    @property
    def has_all_beams(self) -> bool:
        """True once as many hypotheses run as there can be, which the first steps need not have."""
        return self._sums.shape[1] == self._beams

    def check(self) -> None:
        """Raises ``ValueError`` if there was a NaN; waits for the device."""
        if bool(self._has_nan):
            raise ValueError("logits must not hold NaN, and leave an entry above -inf in every row")

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
        return history.index_copy_(2, self._step, new.unsqueeze(-1).to(history.dtype))

    def _finish(
        self, sums: Tensor, parent: Tensor, token: Tensor, token_log_prob: Tensor, finished: Tensor, ends: Tensor
    ) -> None:
        """Keeps the best of the ``finished`` candidates if it beats the best so far."""
        length = self._step + 1
        scores = (sums / length**self._penalty).masked_fill(~finished, -torch.inf)
        score, rank = scores.max(dim=-1)
        parent, token, token_log_prob, ended = (
            t.gather(1, rank.unsqueeze(-1)) for t in (parent, token, token_log_prob, ends)
        )
        tokens = self._grown(self._tokens, parent, token).squeeze(1)
        log_probs = self._grown(self._log_probs, parent, token_log_prob).squeeze(1)
        better = score > self._best_score
        rows = better.unsqueeze(-1)
        self._best_score = _replaced(self._best_score, torch.where(better, score, self._best_score))
        self._best_length = _replaced(self._best_length, torch.where(better, length, self._best_length))
        self._best_ended = _replaced(self._best_ended, torch.where(better, ended.squeeze(1), self._best_ended))
        self._best_tokens = _replaced(self._best_tokens, torch.where(rows, tokens, self._best_tokens))
        self._best_log_probs = _replaced(self._best_log_probs, torch.where(rows, log_probs, self._best_log_probs))


def _replaced(old: Tensor, new: Tensor) -> Tensor:
    """``new``, in the memory of ``old`` if shape and dtype are equal."""
    return old.copy_(new) if old.shape == new.shape and old.dtype == new.dtype else new
