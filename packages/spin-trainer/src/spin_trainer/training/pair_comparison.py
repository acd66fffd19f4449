"""Comparing the human answers of some rows with generated ones: one forward of the policy for both."""

from collections.abc import Sequence

import torch
from torch import nn

from lm_core.training.accelerator import Precision, autocast
from spin_trainer.model.response_scores import ResponseScores, collate, response_log_probs
from spin_trainer.model.spin import SPIN, Comparison


class PairComparison:
    """Loss, margins and log-probabilities of rows of any lengths.

    Args:
        spin: policy and reference.
        precision: of matrix products.
    """

    def __init__(self, spin: SPIN, *, precision: Precision) -> None:
        self.spin, self.precision = spin, precision
        self.scores = ResponseScores(spin.policy, precision=precision)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        real: Sequence[Sequence[int]],
        generated: Sequence[Sequence[int]],
        reference: tuple[list[float], list[float]] | None = None,
        *,
        scores: nn.Module | None = None,
    ) -> Comparison:
        """Compares.

        Args:
            prompts: token ids.
            real: human answers.
            generated: the opponent's.
            reference: its log-probabilities of the human and of the generated answers; computed here if None.
            scores: what to call instead of the plain ``ResponseScores``: the one that DDP wraps.
        """
        ids, answer, mask = collate([*prompts, *prompts], [*real, *generated], self.spin.device)
        if reference is None:
            # before the policy's forward: the reference may borrow the policy's module
            with torch.no_grad(), self.spin.ref_model.model() as opponent, autocast(self.precision, ids.device):
                known = response_log_probs(opponent, ids, answer, mask)
        policy = (scores or self.scores)(ids, answer, mask)
        if reference is not None:
            known = torch.tensor([*reference[0], *reference[1]], dtype=policy.dtype, device=policy.device)
        if self.spin.reduction == "mean":
            lengths = answer.sum(dim=-1)
            policy, known = policy / lengths, known / lengths
        return self.spin.comparison(policy, known)
