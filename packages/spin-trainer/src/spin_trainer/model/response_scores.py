"""Log-probability of an answer given its prompt, the quantity that the self-play loss compares.

Logits at position i score token i + 1, so the first token of the answer is scored by the last token of the prompt, and
the sum equals ``-cross_entropy(reduction="sum")`` over the answer. For models with ``hidden`` and ``output_weight``
the logits of a whole sequence are never materialised, and the output layer is applied to answers only.

Legend: b batch, n sequence, d feature, v vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checks import check_mask
from lm_core.losses.losses import hidden_log_probs, token_log_probs
from lm_core.nn.masking import positions_from_mask, right_pad
from lm_core.training.accelerator import Precision, autocast


def prompt_mask_from_len(lengths: Int[Tensor, " b"], seq: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """Mask that is True at the first ``lengths`` positions of each row of ``seq``."""
    return torch.arange(seq.shape[-1], device=seq.device) < rearrange(lengths, "... -> ... 1")


def log_prob_from_model_and_seq(model: Any, seq: Int[Tensor, "b n"]) -> Float[Tensor, "b n-1"]:
    """Log-probabilities of the tokens of ``seq`` from the second on, in nats."""
    return token_log_probs(model, seq)


def response_mask(
    ids: Int[Tensor, "b n"],
    prompt_lengths: Int[Tensor, " b"],
    mask: Bool[Tensor, "b n"] | None = None,
    eos_id: int | Sequence[int] | None = None,
) -> Bool[Tensor, "b n"]:
    """Mask of the answer tokens: real tokens after the prompt, up to and including the first EOS of the answer.

    Args:
        ids: prompts with their answers.
        prompt_lengths: number of real tokens in each prompt.
        mask: True at real tokens; padding may be on either side.
        eos_id: token or tokens that end an answer; an EOS inside the prompt is ignored.
    """
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    check_mask(mask, "mask", ids.shape)
    answer = mask & (positions_from_mask(mask) >= rearrange(prompt_lengths, "b -> b 1"))
    if eos_id is None:
        return answer
    ends = answer & torch.isin(ids, torch.tensor(eos_id, dtype=torch.long, device=ids.device))
    return answer & (ends.cumsum(dim=-1) - ends.long() == 0)


def response_log_probs(
    model: Any,
    ids: Int[Tensor, "b n"],
    answer: Bool[Tensor, "b n"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, " b"]:
    """Log-probability of each answer, summed over the tokens that ``answer`` marks.

    Args:
        model: ``CausalLM`` to score with; its mode (train or eval) is kept.
        ids: prompts with their answers.
        answer: mask of the answer tokens, see ``response_mask``.
        mask: True at real tokens; None if nothing is padded.

    Returns:
        Shape (b,), in nats, float32 or float64.
    """
    check_mask(answer, "answer", ids.shape)
    if mask is not None:
        check_mask(mask, "mask", ids.shape)
    arguments: dict[str, Any] = {} if mask is None else {"mask": mask}
    weight = getattr(model, "output_weight", None)
    if isinstance(weight, Tensor) and callable(getattr(model, "hidden", None)):
        # logits are needed at the answer's positions and at the one before
        scored = answer.clone()
        scored[:, :-1] |= answer[:, 1:]
        hidden = model.hidden(ids, **arguments)
        # hidden states may have another dtype than the output layer (float32 norms)
        log_probs = hidden_log_probs(hidden, model.output_weight.to(hidden.dtype), ids, mask=scored)
    else:
        log_probs = token_log_probs(model, ids, **arguments)
    return torch.where(answer[:, 1:], log_probs, 0).sum(dim=-1)


class ResponseScores(nn.Module):
    """``response_log_probs`` as a module that DDP can wrap, with matrix products in ``precision``."""

    def __init__(self, model: nn.Module, *, precision: Precision = "fp32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(
        self, ids: Int[Tensor, "b n"], answer: Bool[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, " b"]:
        """Log-probabilities of the answers, summed over their tokens, in nats."""
        with autocast(self.precision, ids.device):
            return response_log_probs(self.model, ids, answer, mask)


def collate(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"], Bool[Tensor, "b n"] | None]:
    """Pads prompts with answers to ids, answer mask and mask of real tokens (None if nothing is padded)."""
    rows = [torch.tensor([*prompt, *answer], dtype=torch.long) for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = right_pad(rows, 0)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    answer_mask = mask & ~prompt_mask_from_len(lengths, ids)
    padded = None if bool(mask.all()) else mask.to(device)
    return ids.to(device), answer_mask.to(device), padded
