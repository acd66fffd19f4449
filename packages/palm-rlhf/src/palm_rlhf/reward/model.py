"""Reward model: a PaLM with a head that scores responses (arXiv 2203.02155, section 3.5).

The features of the response's tokens (of all tokens where no prompt is marked) are averaged and mapped to a scalar, or
to a distribution over bins whose expectation is the reward. Learned embeddings distinguish prompt and response.

Legend: b batch, n sequence, d feature, k bins.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.checks import check_probability, typed
from lm_core.generation.sampling import gumbel_sample
from lm_core.nn.masking import masked_mean, maybe_and_mask, prompt_mask_from_lengths
from palm_rlhf.model.palm import PaLM


class RewardModel(PretrainedMixin):
    """Reward model: a PaLM with a head that scores responses.

    Args:
        palm: base network; shared, not copied.
        dropout: dropout on the LoRA scope's inputs; without LoRA, on the features before the head.
        num_binned_output: number of bins, where bin i is the reward i; 0 for a scalar output.
        use_lora: trains a LoRA scope on the frozen base instead of the base itself.
        lora_r: rank of the LoRA scope.
        reward_lora_scope: name of the scope; an existing one is used.
        pooling: "response" averages the features of the response (where the prompt is marked), "sequence" those of
            prompt and response.

    Raises:
        ValueError: a number is out of range.
    """

    @typed
    def __init__(
        self,
        palm: PaLM,
        dropout: float = 0.1,
        num_binned_output: int = 0,
        use_lora: bool = True,
        lora_r: int = 8,
        reward_lora_scope: str = "reward",
        *,
        pooling: Literal["response", "sequence"] = "response",
    ) -> None:
        super().__init__()
        check_probability(dropout, "dropout")
        if num_binned_output < 0 or num_binned_output == 1:
            raise ValueError(f"num_binned_output must be 0 or at least 2, got {num_binned_output}")
        self.palm = palm
        self.num_binned_output = num_binned_output
        self.scope = reward_lora_scope if use_lora else None
        self.dropout = dropout
        self.pooling = pooling
        if self.scope is not None and self.scope not in palm.finetune_modules:
            palm.add_finetune_params(self.scope, lora_r, lora_dropout=dropout)
        weight = palm.output_weight
        self.prompt_embed = nn.Parameter(weight.new_zeros(palm.dim))
        self.response_embed = nn.Parameter(weight.new_zeros(palm.dim))
        self.head = nn.Linear(palm.dim, num_binned_output or 1).to(weight)
        if not num_binned_output:
            nn.init.zeros_(self.head.bias)

    def config_state(self) -> dict[str, Any]:
        """The network's scopes, for checkpoints; they may differ from those at construction."""
        return self.palm.config_state()

    def apply_config_state(self, state: dict[str, Any]) -> None:
        """Restores the scopes of ``config_state``."""
        self.palm.apply_config_state(state)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the scope (or the base), the head, and the prompt and response embeddings."""
        if self.scope is None:
            yield from self.palm.palm_parameters()
        else:
            yield from self.palm.finetune_parameters(self.scope)
        yield self.prompt_embed
        yield self.response_embed
        yield from self.head.parameters()

    def finetune_parameters(self) -> Iterator[nn.Parameter]:
        """``trainable_parameters`` under the original's name."""
        return self.trainable_parameters()

    @torch.no_grad()
    def standardize(self, *, mean: float, deviation: float) -> None:
        """Changes the head so that rewards become ``(reward - mean) / deviation``.

        Pairs determine neither the offset of rewards nor their scale. A fixed scale makes weights of the KL, value
        losses and clipping comparable between reward models (arXiv 1909.08593, section 2.2).

        Raises:
            ValueError: outputs are bins, or a number is out of range.
        """
        if self.num_binned_output:
            raise ValueError(f"num_binned_output must be 0 to standardize rewards, got {self.num_binned_output}")
        if not math.isfinite(mean) or not 0 < deviation < math.inf:
            raise ValueError(f"deviation must be a finite number above 0, got {deviation}, and mean finite, got {mean}")
        self.head.bias.sub_(mean).div_(deviation)
        self.head.weight.div_(deviation)

    def logits(
        self,
        x: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None = None,
        prompt_mask: Bool[Tensor, "b n"] | None = None,
        prompt_lengths: Int[Tensor, " b"] | None = None,
        lengths: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b k"]:
        """Outputs of the head for each sequence; arguments as in ``forward``."""
        if prompt_mask is not None and prompt_lengths is not None:
            raise ValueError("give prompt_mask or prompt_lengths, not both")
        if lengths is not None:
            mask = maybe_and_mask(mask, prompt_mask_from_lengths(lengths, x.shape[1]))
        if prompt_lengths is not None:
            if prompt_lengths.shape != x.shape[:1]:
                raise ValueError(f"prompt_lengths must have shape ({x.shape[0]},), got {tuple(prompt_lengths.shape)}")
            prompt_mask = prompt_mask_from_lengths(prompt_lengths, x.shape[1])
        for name, tensor in (("mask", mask), ("prompt_mask", prompt_mask)):
            if tensor is not None and tensor.shape != x.shape:
                raise ValueError(f"{name} must have the shape of x {tuple(x.shape)}, got {tuple(tensor.shape)}")
            if tensor is not None and tensor.dtype != torch.bool:
                raise TypeError(f"{name} must be boolean, got dtype {tensor.dtype}")
        extra, counted = None, mask
        if prompt_mask is not None:
            extra = torch.where(prompt_mask[..., None], self.prompt_embed, self.response_embed)
            if self.pooling == "response":
                counted = maybe_and_mask(mask, ~prompt_mask)
        embed = self.palm.hidden(
            x, mask=None if mask is None or bool(mask.all()) else mask, finetune_scope=self.scope, extra_embed=extra
        )
        if self.scope is None and self.training and self.dropout:
            embed = F.dropout(embed, self.dropout)
        return self.head(masked_mean(embed, counted, dim=1))

    def forward(
        self,
        x: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n"] | None = None,
        prompt_mask: Bool[Tensor, "b n"] | None = None,
        prompt_lengths: Int[Tensor, " b"] | None = None,
        labels: Tensor | None = None,
        sample: bool = False,
        sample_temperature: float = 1.0,
        *,
        lengths: Int[Tensor, " b"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Rewards ``(b,)``, or the loss if ``labels`` are given.

        Args:
            x: sequences of prompt and response.
            mask: True at real tokens; reaches the attention.
            prompt_mask: True at the prompt's tokens.
            prompt_lengths: ``(b,)`` tokens of prompts at the start of rows, in place of ``prompt_mask``.
            labels: target rewards; integer bins where outputs are binned.
            sample: draws a bin instead of taking the expected one.
            sample_temperature: temperature of the drawn bin.
            lengths: ``(b,)`` real tokens of right-padded rows, in place of ``mask``.
            generator: source of randomness of the drawn bin.

        Raises:
            ValueError: shapes do not fit, or a bin is out of range.
            TypeError: a mask is not boolean, or labels of bins are not integers.
        """
        logits = self.logits(x, mask, prompt_mask, prompt_lengths, lengths)
        # a loss: regression, or classification over bins
        if labels is not None:
            if labels.shape != x.shape[:1]:
                raise ValueError(f"labels must have shape ({x.shape[0]},), got {tuple(labels.shape)}")
            if not self.num_binned_output:
                return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
            if labels.is_floating_point():
                raise TypeError(f"labels must be integers with num_binned_output, got dtype {labels.dtype}")
            if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < self.num_binned_output)).all()):
                raise ValueError(f"labels must be in [0, {self.num_binned_output}), got {labels.tolist()}")
            return F.cross_entropy(logits, labels.long())
        # or rewards: the scalar, a drawn bin, or the expected bin
        if not self.num_binned_output:
            return logits[:, 0]
        if sample:
            return gumbel_sample(logits, temperature=sample_temperature, generator=generator)
        return logits.softmax(dim=-1) @ torch.arange(self.num_binned_output, device=x.device).to(logits.dtype)
