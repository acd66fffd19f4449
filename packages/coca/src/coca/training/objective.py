"""The losses of an update, for the whole batch at once or accumulated over its parts.

The contrastive loss compares all pairs of a batch, so gradients of parts cannot simply be added. ``accumulate``
(GradCache, arXiv 2101.06983) encodes all parts without gradients, takes the loss's gradient for the latents, and then
runs every part again with gradients, which start from those of its latents. The result equals the gradient of the whole
batch, on the memory of one part; an encoder with batch norms sees each part alone, and twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coca.data.pair_batches import PairBatch
from coca.model.coca import CoCa, PairStates
from coca.model.text_layout import IGNORED
from lm_core.distributed import all_reduce_sum
from lm_core.training.accelerator import autocast


@dataclass(frozen=True)
class LatentGradients:
    """Gradients of the weighted contrastive loss for one part of a batch.

    Attributes:
        image: for its image latents.
        text: for its text latents.
        scale: for the logit scale; zero in all parts but the last.
        bias: for the logit bias, likewise; None without a bias.
        value: this part's share of the loss's value.
        normalizer: predicted tokens of the whole batch, of all processes.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    value: Tensor
    normalizer: Tensor


class CoCaObjective(nn.Module):
    """The losses of ``model`` as one module, which DDP, FSDP and ``torch.compile`` wrap."""

    def __init__(self, model: CoCa) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, text: Tensor, images: Tensor, gradients: LatentGradients | None = None, *, only_latents: bool = False
    ) -> Any:
        """Total, captioning and contrastive loss of the batch of all processes.

        Args:
            text: token ids.
            images: normalised images.
            gradients: gradients of the contrastive loss for this part of a batch, which are used in place of the loss.
            only_latents: returns ``PairStates`` without features instead.
        """
        model = self.model
        if only_latents:
            return model.pair_states(text, images, captions=False)
        if gradients is None:
            loss = model.loss(text, images)
            return loss.total, loss.caption, loss.contrastive
        states = model.pair_states(text, images)
        caption = model.caption_loss(states, gradients.normalizer)
        # a scalar whose gradient is that of the loss; its value is replaced
        linear = (states.image_latents * gradients.image).sum() + (states.text_latents * gradients.text).sum()
        linear = linear + model.logit_scale * gradients.scale
        if model.logit_bias is not None and gradients.bias is not None:
            linear = linear + model.logit_bias * gradients.bias
        contrastive = linear - linear.detach() + gradients.value
        return model.caption_loss_weight * caption + contrastive, caption, contrastive


def accumulate(session: Any, parts: Sequence[PairBatch], precision: Any) -> tuple[Tensor, Tensor]:
    """Gradients of both losses of a batch, part by part; returns the captioning and the contrastive loss.

    Args:
        session: training session whose objective is a ``CoCaObjective``.
        parts: the batch of this process; every process has as many.
        precision: of the forwards.
    """
    model, device = session.objective.model, session.device
    # every part without gradients; the second forward draws the same random numbers
    generators, encoded = [], []
    with torch.no_grad():
        for part in parts:
            generators.append(_generator_states(device))
            with autocast(precision, device):
                encoded.append(session.module(part.text, part.images, only_latents=True))
    gradients, contrastive = _latent_gradients(model, encoded)
    caption = torch.zeros((), device=device)
    for part, state, gradient in zip(session.micro_batches(parts), generators, gradients, strict=True):
        _restore_generators(device, state)
        with autocast(precision, device):
            total, share, _ = session.module(part.text, part.images, gradient)
        session.backward(total)
        caption = caption + share.detach()
    return caption, contrastive


def _latent_gradients(model: CoCa, encoded: Sequence[PairStates]) -> tuple[list[LatentGradients], Tensor]:
    """Gradients for each part, and the contrastive loss."""
    images, texts = (
        torch.cat([getattr(part, name) for part in encoded]).requires_grad_()
        for name in ("image_latents", "text_latents")
    )
    scale = model.logit_scale.detach().requires_grad_()
    bias = None if model.logit_bias is None else model.logit_bias.detach().requires_grad_()
    with torch.enable_grad():
        loss = model.contrastive_loss(images, texts, scale, bias)
        inputs = [images, texts, scale, *([] if bias is None else [bias])]
        weighted = model.contrastive_loss_weight * loss
        found = list(torch.autograd.grad(weighted, inputs))
    normalizer = all_reduce_sum(torch.stack([(part.targets != IGNORED).sum() for part in encoded]).sum())
    sizes = [len(part.image_latents) for part in encoded]
    last = len(encoded) - 1
    value = weighted.detach() / len(encoded)
    return [
        LatentGradients(
            image,
            text,
            found[2] * (index == last),
            None if bias is None else found[3] * (index == last),
            value,
            normalizer,
        )
        for index, (image, text) in enumerate(zip(found[0].split(sizes), found[1].split(sizes), strict=True))
    ], loss.detach()


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_generators(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
