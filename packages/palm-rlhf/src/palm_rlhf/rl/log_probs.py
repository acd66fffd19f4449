"""Log-probabilities and entropies of responses, of the distribution they were drawn from.

Sampling divides logits by the temperature and then may filter them. A filtered token was drawn from the KEPT set of
its step, so its log-probability is renormalised over that set, as stored at the draw: a nucleus found anew after an
update would leave out some of the very tokens that were drawn. The divergence from the reference is of the unfiltered
distributions, which is why both are computed.

Legend: b batch, n sequence, d feature, v vocabulary, k bytes of a packed kept set.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm_core.losses.losses import hidden_log_probs_and_entropy

_TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Scores:
    """Of each token but the first, ``(b, n - 1)``; 0 outside responses.

    Attributes:
        log_probs: under the distribution that was sampled.
        unfiltered: under the one before filters.
        entropy: of the unfiltered distributions, in nats.
    """

    log_probs: Float[Tensor, "b m"]
    unfiltered: Float[Tensor, "b m"]
    entropy: Float[Tensor, "b m"]


def score_responses(
    model: Any,
    ids: Int[Tensor, "b n"],
    mask: Bool[Tensor, "b n"],
    response_mask: Bool[Tensor, "b m"],
    *,
    temperature: float,
    kept: UInt8[Tensor, "b m k"] | None = None,
    detach_output: bool = False,
    needs_mask: bool = True,
    **model_kwargs: Any,
) -> Scores:
    """Scores the response tokens of right-padded rows.

    Args:
        model: in the protocol of ``lm_core.generation.generate.CausalLM``.
        ids: prompts and responses.
        mask: True at real tokens.
        response_mask: True where the NEXT token is one of the response.
        temperature: divides the logits.
        kept: packed kept sets of every step; see ``pack_kept``.
        detach_output: no gradient to the output layer's weight.
        needs_mask: False where the model is causal and so never sees the padding on the right.
        **model_kwargs: go to the model.
    """
    if needs_mask and not bool(mask.all()):
        model_kwargs["mask"] = mask
    weight = getattr(model, "output_weight", None)
    if isinstance(weight, Tensor) and hasattr(model, "hidden"):
        weight = weight.detach() if detach_output else weight
        hidden = model.hidden(ids, **model_kwargs)
    else:  # logits are then all there is: as hidden states with the identity for a weight
        hidden = model(ids, **model_kwargs)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return _scores_of_logits(hidden[:, :-1], ids, response_mask, temperature, kept)
    # a token that is scored is real, and so is the position before it: mark both and score only such pairs
    labels = ids[:, 1:][response_mask]
    rows = hidden[:, :-1][response_mask]
    pairs = torch.stack((torch.zeros_like(labels), labels), dim=1)
    states = torch.stack((rows, rows), dim=1)
    log_probs, entropy = hidden_log_probs_and_entropy(states, weight, pairs, temperature=temperature)
    unfiltered, entropy = log_probs[:, 0], entropy[:, 0]
    sampled = unfiltered if kept is None else _kept_log_probs(rows, weight, labels, kept[response_mask], temperature)
    return Scores(*(_spread(t, response_mask) for t in (sampled, unfiltered, entropy)))


def pack_kept(kept: Bool[Tensor, "*shape v"]) -> UInt8[Tensor, "*shape k"]:
    """A kept set as bits, eight tokens a byte."""
    return torch.from_numpy(np.packbits(kept.cpu().numpy(), axis=-1)).to(kept.device)


def unpack_kept(packed: UInt8[Tensor, "*shape k"], vocab_size: int) -> Bool[Tensor, "*shape v"]:
    """What ``pack_kept`` packed."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()


def _kept_log_probs(
    rows: Float[Tensor, "r d"], weight: Float[Tensor, "v d"], labels: Tensor, kept: Tensor, temperature: float
) -> Float[Tensor, " r"]:
    """Log-probabilities over kept sets, a tile of rows at a time; the backward makes the logits again."""
    dtype = torch.promote_types(rows.dtype, torch.float32)

    def tile(rows: Tensor, weight: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        logits = (rows @ weight.t()).to(dtype) / temperature
        logits = logits.masked_fill(~unpack_kept(kept, weight.shape[0]), -torch.inf)
        return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1)

    size = max(1, _TILE_BYTES // (4 * weight.shape[0]))
    parts = [
        checkpoint(tile, rows[i : i + size], weight, labels[i : i + size], kept[i : i + size], use_reentrant=False)
        for i in range(0, rows.shape[0], size)
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=dtype)


def _scores_of_logits(logits: Tensor, ids: Tensor, mask: Tensor, temperature: float, kept: Tensor | None) -> Scores:
    rows, labels = logits[mask] / temperature, ids[:, 1:][mask]
    log_probs = rows.log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    unfiltered = log_probs.gather(-1, labels[:, None])[:, 0]
    sampled = unfiltered
    if kept is not None:
        left = rows.masked_fill(~unpack_kept(kept[mask], rows.shape[-1]), -torch.inf)
        sampled = left.gather(-1, labels[:, None])[:, 0] - left.logsumexp(dim=-1)
    return Scores(*(_spread(t, mask) for t in (sampled, unfiltered, entropy)))


def _spread(t: Tensor, mask: Tensor) -> Tensor:
    return t.new_zeros(mask.shape).masked_scatter(mask, t)
