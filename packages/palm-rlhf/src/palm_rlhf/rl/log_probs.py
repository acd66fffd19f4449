"""Log-probabilities and entropies of responses under the distribution they were drawn from.

Sampling may penalise repeated tokens, divides logits by the temperature and may then filter them. A filtered token was
drawn from the KEPT set of its step, so its log-probability is renormalised over that set, which is stored with the
rollout: a nucleus that is recomputed after an update would exclude some of the drawn tokens. The KL from the reference
is between the distributions without penalty and filters, which is why both are computed.

Legend: b batch, m positions, r response tokens, d feature, v vocabulary, k bytes of a packed kept set.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lm_core.generation.sampling import apply_repetition_penalty
from lm_core.losses.losses import hidden_log_probs, hidden_log_probs_and_entropy
from palm_rlhf.rl.value_bins import ValueBins

_TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class PolicyOutput:
    """Policy outputs for each token but the first, ``(b, n - 1)``; 0 outside responses.

    Attributes:
        log_probs: log-probabilities under the sampled distribution.
        unfiltered: log-probabilities under the distribution before filters.
        entropy: entropies of the unfiltered distributions, in nats; None unless requested.
        values: expected return before each token; None without a critic.
        value_logits: ``(b, n - 1, k)`` outputs of a binned critic, else None.
        bins: bins of ``value_logits``, else None.
        network: ``(b,)`` outputs of the objective's network; None without one.
    """

    log_probs: Float[Tensor, "b m"]
    unfiltered: Float[Tensor, "b m"]
    entropy: Float[Tensor, "b m"] | None = None
    values: Float[Tensor, "b m"] | None = None
    value_logits: Float[Tensor, "b m k"] | None = None
    bins: ValueBins | None = None
    network: Float[Tensor, " b"] | None = None


@dataclass(frozen=True)
class SampledBy:
    """Changes of the logits in sampling, for r response tokens.

    Attributes:
        kept: ``(r, k)`` packed kept sets of a filtered draw; None without filters.
        repetition_penalty: penalty of tokens that occurred before.
        ids: ``(b, n)`` all sequences.
        row: ``(r,)`` the sequence of each token.
        position: ``(r,)`` the last position before it.
    """

    kept: Tensor | None
    repetition_penalty: float
    ids: Tensor
    row: Tensor
    position: Tensor

    def rows(self, start: int, stop: int) -> "SampledBy":
        """A slice of the tokens."""
        kept = None if self.kept is None else self.kept[start:stop]
        return replace(self, kept=kept, row=self.row[start:stop], position=self.position[start:stop])

    def log_probs(self, logits: Float[Tensor, "r v"], labels: Tensor, temperature: float) -> Float[Tensor, " r"]:
        """Log-probabilities of labels under the sampled distribution, from raw logits."""
        if self.repetition_penalty != 1.0:
            before = torch.arange(self.ids.shape[1], device=self.ids.device) <= self.position[:, None]
            logits = apply_repetition_penalty(logits, self.ids[self.row], self.repetition_penalty, before)
        logits = logits / temperature
        if self.kept is not None:
            logits = logits.masked_fill(~unpack_kept(self.kept, logits.shape[-1]), -torch.inf)
        return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1)


def hidden_scores(
    rows: Float[Tensor, "r d"],
    weight: Float[Tensor, "v d"],
    labels: Int[Tensor, " r"],
    sampled: SampledBy | None,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of labels as sampled and unfiltered, and entropies, from states before the output layer."""
    # the core's functions shift by one: a pair of each state and its label scores exactly that label
    pairs = torch.stack((rows, rows), dim=1), weight, torch.stack((torch.zeros_like(labels), labels), dim=1)
    if with_entropy:
        unfiltered, entropy = (t[:, 0] for t in hidden_log_probs_and_entropy(*pairs, temperature=temperature))
    else:
        unfiltered, entropy = hidden_log_probs(*pairs, temperature=temperature)[:, 0], None
    log_probs = unfiltered if sampled is None else _sampled_log_probs(rows, weight, labels, sampled, temperature)
    return log_probs, unfiltered, entropy


def logit_scores(
    logits: Float[Tensor, "r v"],
    labels: Int[Tensor, " r"],
    sampled: SampledBy | None,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``hidden_scores`` for a model without hidden states, from its logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = (logits / temperature).log_softmax(dim=-1)
    unfiltered = log_probs.gather(-1, labels[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1) if with_entropy else None
    return unfiltered if sampled is None else sampled.log_probs(logits, labels, temperature), unfiltered, entropy


def pack_kept(kept: Bool[Tensor, "*shape v"]) -> UInt8[Tensor, "*shape k"]:
    """A kept set as bits, eight tokens a byte."""
    return torch.from_numpy(np.packbits(kept.cpu().numpy(), axis=-1)).to(kept.device)


def unpack_kept(packed: UInt8[Tensor, "*shape k"], vocab_size: int) -> Bool[Tensor, "*shape v"]:
    """Inverse of ``pack_kept``."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()


def _sampled_log_probs(
    rows: Float[Tensor, "r d"], weight: Float[Tensor, "v d"], labels: Tensor, sampled: SampledBy, temperature: float
) -> Float[Tensor, " r"]:
    """Log-probabilities as sampled, a tile of rows at a time; the backward recomputes the logits."""
    dtype = torch.promote_types(rows.dtype, torch.float32)

    def tile(rows: Tensor, weight: Tensor, labels: Tensor, part: SampledBy) -> Tensor:
        return part.log_probs((rows @ weight.t()).to(dtype), labels, temperature)

    size = max(1, _TILE_BYTES // (4 * weight.shape[0]))
    parts = [
        checkpoint(tile, rows[i:j], weight, labels[i:j], sampled.rows(i, j), use_reentrant=False)
        for i, j in ((start, start + size) for start in range(0, rows.shape[0], size))
    ]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=dtype)
