"""Image encoders of any library, adapted to return tokens ``(b, m, d)``.

``ImageEncoder`` recognises a module's output by shape and attributes, without importing its library:

| module | taken as tokens |
|---|---|
| our ``VisionTransformer``, any module that returns ``(b, m, d)`` | the result |
| a Hugging Face vision model (``last_hidden_state``) | ``last_hidden_state``; CNNs' maps as below |
| a timm model (``forward_features``) | the features before its head |
| a CNN that returns a map ``(b, c, h, w)``, or ``(b, h, w, c)`` of the declared width | its ``h * w`` positions |
| vit-pytorch's ``Extractor`` | embeddings of its layer (the second of the pair it returns) |

Legend: b batch, m tokens, d feature.
"""

import warnings
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.adapters.loading import whole_model

# A timm model of several stages has its last width in num_features, its first in embed_dim.
_WIDTHS = ("dim", "num_features", "embed_dim", "hidden_size")


def token_width(encoder: Any) -> int | None:
    """Token width that an encoder declares, or None if it declares none.

    Looked up in turn: ``dim``, ``num_features``, ``embed_dim`` of the module, then ``hidden_size`` or the last of
    ``hidden_sizes`` of its ``config`` (or of the ``vision_config`` in it), then the wrapped ``vit`` of an Extractor.
    """
    config = getattr(encoder, "config", None)
    config = getattr(config, "vision_config", config)
    stages = getattr(config, "hidden_sizes", None) or [None]
    inner = getattr(encoder, "vit", None)
    modules = inner.modules() if isinstance(inner, nn.Module) else ()
    norms = [module.normalized_shape[0] for module in modules if isinstance(module, nn.LayerNorm)]
    declared = [*(getattr(encoder, name, None) for name in _WIDTHS), stages[-1], getattr(config, "hidden_size", None)]
    widths = (value for value in (*declared, *norms[-1:]) if isinstance(value, int) and not isinstance(value, bool))
    return next(widths, None)


class ImageEncoder(nn.Module):
    """Calls a module on images and returns its output as tokens.

    Args:
        encoder: module to call.
        width: features of its tokens; None if not known before the first call.
        frozen: keeps the module without gradient and in evaluation mode.
    """

    def __init__(self, encoder: nn.Module, *, width: int | None, frozen: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = width
        self.frozen = frozen
        self._has_warned = False
        if frozen:
            encoder.requires_grad_(False)
            encoder.eval()

    def train(self, mode: bool = True) -> "ImageEncoder":
        """As ``nn.Module.train``, but a frozen encoder stays in evaluation mode (for its batch norms)."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b m d"]:
        """Tokens of the images, which are cast to the dtype of the encoder's weights.

        Raises:
            ValueError: the encoder's output has no tokens, or tokens of another width than declared.
            TypeError: the output neither is nor contains a tensor.
        """
        encoder: Any = self.encoder
        weight = next((weight for weight in encoder.parameters() if weight.is_floating_point()), images)
        images = images.to(weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = encoder.forward_features(images) if hasattr(encoder, "forward_features") else encoder(images)
        tokens = tokens_of(features, self.width)
        if self.width is not None and tokens.shape[-1] != self.width:
            raise ValueError(
                f"img_encoder must return tokens of image_dim = {self.width} features, got {tokens.shape[-1]}"
            )
        self._warn_if_detached(tokens)
        return tokens

    def _warn_if_detached(self, tokens: Tensor) -> None:
        learns = self.training and torch.is_grad_enabled() and not self.frozen
        if torch.compiler.is_compiling() or self._has_warned or tokens.requires_grad or not learns:
            return
        if any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self._has_warned = True
            warnings.warn(
                f"img_encoder {type(self.encoder).__name__} returns tokens without gradient although it has trainable "
                "parameters, so it will not be trained. vit-pytorch's Extractor detaches unless it is made with "
                "detach=False; to keep the encoder as it is, pass freeze_img_encoder=True",
                UserWarning,
                stacklevel=4,
            )


def tokens_of(features: Any, width: int | None = None) -> Float[Tensor, "b m d"]:
    """The tokens in an encoder's output; see the module docstring.

    Args:
        features: tensor, output with ``last_hidden_state``, or tuple.
        width: features of a token, to distinguish a map ``(b, h, w, c)`` from ``(b, c, h, w)``.

    Raises:
        ValueError: the tensor has neither three nor four dimensions.
        TypeError: there is no tensor.
    """
    if not isinstance(features, Tensor):
        hidden = getattr(features, "last_hidden_state", None)
        if hidden is None and isinstance(features, tuple | list) and features:
            # vit-pytorch's Extractor returns (prediction, embeddings); others put the tokens first.
            tensors = [entry for entry in features if isinstance(entry, Tensor) and entry.ndim >= 3]
            hidden = tensors[-1] if tensors else None
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"img_encoder must return a tensor of tokens (b, m, d) or a map (b, c, h, w), got "
                f"{type(features).__name__}"
            )
        features = hidden
    if features.ndim == 4 and features.shape[-1] == width != features.shape[1]:
        return rearrange(features, "b h w c -> b (h w) c")
    if features.ndim == 4:
        return rearrange(features, "b c h w -> b (h w) c")
    if features.ndim != 3:
        raise ValueError(
            f"img_encoder must return tokens (b, m, d) or a map (b, c, h, w), got shape {tuple(features.shape)}; a "
            "classifier's head has to be removed"
        )
    return features


def load_encoder(source: str) -> nn.Module:
    """The vision model in a folder, or of ``organisation/name`` on the hub; no code or pickle of it is run.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no vision model can be loaded from there, or its configuration names another source to build from.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(f"the encoder {source} needs transformers: pip install transformers") from error
    try:
        model: Any = whole_model(AutoModel, source, name="encoder", optional="pooler")
    except Exception as error:  # transformers passes on the errors of its parsers and of the network
        raise ValueError(f"encoder {source!r} holds no vision model that could be loaded: {error}") from error
    # the inner timm model declares its width, and a checkpoint can name its architecture
    return getattr(model, "vision_model", getattr(model, "timm_model", model))
