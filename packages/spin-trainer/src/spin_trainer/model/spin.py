"""SPIN: a policy, its frozen reference, and the loss between them (arXiv 2401.01335, equation 4.7).

Deviations from common implementations: log-probabilities are SUMS over the answer's tokens, as in the paper (a mean is
an option); tokens after an answer's EOS do not count; the mode of the policy (train or eval) is never changed.

Legend: b batch, n sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.adapters import as_causal_lm
from lm_core.checks import check_above_zero, check_ids, check_mask, typed
from lm_core.generation.decoding import as_eos_ids
from lm_core.tokenizers import end_ids
from lm_core.training.accelerator import Precision
from spin_trainer.model.losses import LOSS_NAMES, LossName, self_play_losses, self_play_margins
from spin_trainer.model.reference import FrozenReference, MovingReference
from spin_trainer.model.response_scores import ResponseScores, response_log_probs, response_mask

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Comparison:
    """Losses, margins and log-probabilities of a batch of pairs, each of shape (b,).

    Attributes:
        losses: loss of each pair.
        margins: arguments of the loss; positive where the policy prefers the human answer more than the reference does.
        policy_real, policy_generated, reference_real, reference_generated: log-probabilities of answers, in nats.
    """

    losses: Float[Tensor, " b"]
    margins: Float[Tensor, " b"]
    policy_real: Float[Tensor, " b"]
    policy_generated: Float[Tensor, " b"]
    reference_real: Float[Tensor, " b"]
    reference_generated: Float[Tensor, " b"]


class SPIN(nn.Module):
    """A policy that learns to prefer human answers to those of its opponent, a frozen copy of itself.

    Args:
        model: causal language model in any form that ``lm_core.adapters.as_causal_lm`` accepts; it is not copied.
        lambda_: weight of the log-ratios; the original's keyword ``λ`` is accepted too.
        pad_id: id that marks padding at the ends of rows passed to ``forward``. It may be an end token too: the first
            one after the answer then belongs to the answer.
        ref_model_ema_decay: 1 freezes the reference between promotions; below 1 it is a moving average.
        ema_kwargs: further arguments of ``ema_pytorch.EMA``, for a decay below 1.
        loss: "logistic" (the paper's choice), "hinge", "exponential" or "correlation".
        reduction: "sum" over the answer's tokens (the paper), or "mean".
        eos_id: token or tokens that end an answer, by default those of a transformers model; () for none. Tokens after
            the first of them do not count.

    Raises:
        ValueError: a number is out of range, a name is unknown, or ``ema_kwargs`` come without a decay below 1.
        TypeError: ``model`` is not a module, or an argument has the wrong type.
    """

    @typed
    def __init__(
        self,
        model: Any,
        *,
        lambda_: float = 0.1,
        pad_id: int | None = None,
        ref_model_ema_decay: float = 1.0,
        ema_kwargs: Mapping[str, Any] | None = None,
        loss: str = "logistic",
        reduction: str = "sum",
        eos_id: int | Sequence[int] | None = None,
        **original: Any,
    ) -> None:
        super().__init__()
        # the original's keyword, and checks of all arguments
        lambda_ = original.pop("λ", lambda_)
        if original:
            raise TypeError(f"SPIN has no argument {', '.join(sorted(original))}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        check_above_zero(lambda_, "lambda_")
        if not 0 <= ref_model_ema_decay <= 1:
            raise ValueError(f"ref_model_ema_decay must be in [0, 1], got {ref_model_ema_decay}")
        if ema_kwargs and ref_model_ema_decay == 1:
            raise ValueError(f"ema_kwargs go with ref_model_ema_decay below 1, got {dict(ema_kwargs)} and 1")
        if loss not in LOSS_NAMES:
            raise ValueError(f"loss must be one of {LOSS_NAMES}, got {loss!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"model must have trainable parameters, got a {type(model).__name__} with none")
        self.lambda_ = float(lambda_)
        self.pad_id = pad_id
        self.loss: LossName = loss  # type: ignore[assignment]
        self.reduction: Reduction = reduction  # type: ignore[assignment]
        self.policy_model = model
        # not a submodule: its parameters are those of policy_model
        object.__setattr__(self, "policy", as_causal_lm(model))
        self.eos_ids = end_ids(model=self.policy) if eos_id is None else as_eos_ids(eos_id)
        self._reference_arguments = (ref_model_ema_decay, dict(ema_kwargs or {}))
        self.reset_reference()

    policy: Any
    ref_model: FrozenReference | MovingReference

    def reset_reference(self) -> None:
        """Makes a new reference from the policy, for one whose weights have changed their dtypes."""
        decay, settings = self._reference_arguments
        frozen = decay == 1
        self.ref_model = (
            FrozenReference(self.policy)
            if frozen
            else MovingReference(self.policy_model, decay=decay, settings=settings)
        )

    @property
    def device(self) -> torch.device:
        """Device of the policy's parameters."""
        return next(self.policy_model.parameters()).device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the policy that require gradients, each once."""
        return [parameter for parameter in self.policy_model.parameters() if parameter.requires_grad]

    def update_reference_model_with_policy(self) -> None:
        """Promotes the policy: copies its current weights into the reference."""
        self.ref_model.copy_params_from_model()

    def update_ema(self) -> None:
        """Advances a moving reference by one step; a frozen one stays as it is."""
        if isinstance(self.ref_model, MovingReference):
            self.ref_model.update()

    def forward(
        self,
        generated_seq: Int[Tensor, "b n"],
        real_seq: Int[Tensor, "b m"],
        prompt_len: Int[Tensor, " b"],
        generated_seq_mask: Bool[Tensor, "b n"] | None = None,
        real_seq_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss averaged over pairs; arguments and errors as for ``compare``."""
        return self.compare(generated_seq, real_seq, prompt_len, generated_seq_mask, real_seq_mask).losses.mean()

    def compare(
        self,
        generated_seq: Int[Tensor, "b n"],
        real_seq: Int[Tensor, "b m"],
        prompt_len: Int[Tensor, " b"],
        generated_seq_mask: Bool[Tensor, "b n"] | None = None,
        real_seq_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Comparison:
        """Loss, margin and log-probabilities of each pair; the arguments are not modified.

        Args:
            generated_seq: prompts with the opponent's answers.
            real_seq: the same prompts with the human answers.
            prompt_len: number of tokens in each prompt.
            generated_seq_mask: True at real tokens; not together with ``pad_id``.
            real_seq_mask: True at real tokens; not together with ``pad_id``.

        Raises:
            ValueError: shapes, ids or prompt lengths are invalid, or a row has no answer tokens.
            TypeError: a mask is not boolean.
        """
        generated = self._checked(generated_seq, prompt_len, generated_seq_mask, "generated_seq")
        real = self._checked(real_seq, prompt_len, real_seq_mask, "real_seq")
        # both answers in one batch: under DDP one forward belongs to one backward
        width = max(generated_seq.shape[1], real_seq.shape[1])
        ids, answer, mask = (
            torch.cat([F.pad(rows[part], (0, width - rows[part].shape[1])) for rows in (real, generated)])
            for part in range(3)
        )
        padding_mask = None if bool(mask.all()) else mask
        # before the policy's forward: a frozen reference runs in the policy's module
        reference = self.reference_log_probs(ids, answer, padding_mask)
        return self.comparison(response_log_probs(self.policy, ids, answer, padding_mask), reference, answer)

    @torch.no_grad()
    def reference_log_probs(
        self,
        ids: Int[Tensor, "b n"],
        answer: Bool[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        precision: Precision = "fp32",
    ) -> Float[Tensor, " b"]:
        """Log-probabilities of the answers under the reference; arguments as for ``response_log_probs``."""
        with self.ref_model.model() as reference:
            scores: Tensor = ResponseScores(reference, precision=precision)(ids, answer, mask)
            return scores

    def comparison(
        self,
        policy: Float[Tensor, " two_b"],
        reference: Float[Tensor, " two_b"],
        answer: Bool[Tensor, "two_b n"],
    ) -> Comparison:
        """Compares summed log-probabilities of b human answers, followed by those of b generated ones.

        ``answer`` is True at answer tokens; the reduction "mean" divides by their number.
        """
        if self.reduction == "mean":
            lengths = answer.sum(dim=-1).clamp(min=1)
            policy, reference = policy / lengths, reference / lengths
        policy_real, policy_generated = policy.chunk(2)
        reference_real, reference_generated = reference.chunk(2)
        margins = self_play_margins(
            policy_real, policy_generated, reference_real, reference_generated, lambda_=self.lambda_
        )
        losses = self_play_losses(margins, self.loss)
        return Comparison(losses, margins, policy_real, policy_generated, reference_real, reference_generated)

    def _real_tokens(self, seq: Tensor, name: str) -> Tensor:
        """Mask of all tokens but the runs of ``pad_id`` at both ends of a row."""
        if self.pad_id is None:
            return torch.ones_like(seq, dtype=torch.bool)
        other = (seq != self.pad_id).long()
        begun, more = other.cumsum(-1) > 0, other.flip(-1).cumsum(-1).flip(-1) > 0
        mask = begun & more
        if self.pad_id in self.eos_ids:
            checked = seq.device.type == "cpu" and not torch.compiler.is_compiling()
            if checked and bool((~begun[:, :1]).any()):
                raise ValueError(
                    f"{name} must not begin with pad_id {self.pad_id}, which is an end token too, so that padding on "
                    f"the left cannot be told from text; pass {name}_mask and pad_id=None"
                )
            mask |= F.pad(more, (1, -1)) & ~more  # the answer's end
        return mask

    def _checked(
        self, seq: Tensor, prompt_len: Tensor, mask: Tensor | None, name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Checks a batch; returns ids with 0 at padding, the answer mask and the mask of real tokens."""
        if seq.ndim != 2 or seq.dtype == torch.bool or seq.is_floating_point():
            raise ValueError(f"{name} must hold token ids (b, n), got {seq.dtype} of shape {tuple(seq.shape)}")
        if prompt_len.shape != seq.shape[:1]:
            raise ValueError(f"prompt_len must have shape {tuple(seq.shape[:1])}, got {tuple(prompt_len.shape)}")
        if mask is not None and self.pad_id is not None:
            raise ValueError(f"{name}_mask must be None where pad_id marks padding, got both (pad_id {self.pad_id})")
        if mask is not None:
            check_mask(mask, f"{name}_mask", seq.shape)
        else:
            mask = self._real_tokens(seq, name)
        ids = seq.long().masked_fill(~mask, 0)
        answer = response_mask(ids, prompt_len, mask, self.eos_ids or None)
        if seq.device.type == "cpu" and not torch.compiler.is_compiling():
            vocabulary = getattr(self.policy, "vocab_size", None)
            if vocabulary is not None:
                check_ids(ids, vocabulary, name)
            if bool((prompt_len < 1).any()):
                raise ValueError(f"prompt_len must be at least 1, got {int(prompt_len.min())}")
            empty = (~answer.any(dim=-1)).nonzero().flatten().tolist()
            if empty:
                raise ValueError(f"{name} must have answer tokens after every prompt, rows {empty[:8]} have none")
        return ids, answer, mask
