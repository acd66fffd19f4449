"""Adapters of other libraries' language models to the protocol ``lm_core.causal_lm.CausalLM``.

``as_causal_lm`` takes a Hugging Face causal language model (also inside peft), an x-transformers decoder, or any module
or function from ids to logits. Parameters are shared, not copied; the other library is imported only when used.
"""

from typing import Any

from lm_core.adapters.base import Adapter, AdapterCache
from lm_core.adapters.huggingface import HuggingFaceCache, HuggingFaceLM
from lm_core.adapters.plain import PlainLM
from lm_core.adapters.x_transformers import XTransformersCache, XTransformersLM
from lm_core.checks import check_positive, typed

__all__ = [
    "Adapter",
    "AdapterCache",
    "HuggingFaceCache",
    "HuggingFaceLM",
    "PlainLM",
    "XTransformersCache",
    "XTransformersLM",
    "as_causal_lm",
]


@typed
def as_causal_lm(x: Any, *, vocab_size: int | None = None) -> Any:
    """Adapts a language model of another library to the protocol ``lm_core.causal_lm.CausalLM``.

    The result is called as ``(ids, *, mask=None, cache=None, **kw) -> logits`` and is exact for any mask. It decodes
    incrementally (``init_cache``) and has hidden states (``hidden``, ``output_weight``) if these are exact too.

    - A model with ``init_cache``, or a result of this function: returned unchanged.
    - A transformers ``PreTrainedModel`` with a language-modelling head, or a ``PeftModel`` of one: ``HuggingFaceLM``.
      The model is tried on a few tokens, so wrap it once and keep the result, after peft and with its final output
      layer; its mode, its gradients and the random state do not change.
    - An x-transformers ``TransformerWrapper`` of a ``Decoder``, or an ``AutoregressiveWrapper`` of that:
      ``XTransformersLM``.
    - Any other ``nn.Module`` or callable from ids ``(b, n)`` to logits ``(b, n, v)``: ``PlainLM``, without a cache.

    Args:
        x: the model.
        vocab_size: bound of the ids, for a plain module or callable; other models have their own.

    Returns:
        An ``nn.Module``.

    Raises:
        TypeError: ``x`` is none of these, is an encoder-decoder, or is not causal.
        ValueError: ``vocab_size`` is not positive or not the model's, or weights of a Hugging Face model are missing.
    """
    if vocab_size is not None:
        check_positive(vocab_size, "vocab_size")
    model = _adapted(x, vocab_size)
    known = getattr(model, "vocab_size", None)
    if vocab_size is not None and known is not None and known != vocab_size:
        raise ValueError(f"vocab_size must be {known} for this {type(x).__name__}, got {vocab_size}")
    return model


def _adapted(x: Any, vocab_size: int | None) -> Any:
    if isinstance(x, type):
        raise TypeError(f"x must be a model, got the class {x.__name__}: make an instance of it")
    if isinstance(x, Adapter) or hasattr(x, "init_cache"):
        return x
    inner = x.get_base_model() if _is_a(x, "peft", "PeftModel") else x
    if _is_a(inner, "transformers", "PreTrainedModel"):
        return HuggingFaceLM(x)
    wrapper = _is_a(x, "x_transformers", "TransformerWrapper") or _is_a(x, "x_transformers", "AutoregressiveWrapper")
    # Other modules of x-transformers too, so that XTransformersLM rejects them by name.
    if wrapper or type(x).__module__.startswith("x_transformers."):
        return XTransformersLM(x)
    if callable(x):
        return PlainLM(x, vocab_size=vocab_size)
    raise TypeError(
        "x must be a Hugging Face causal language model, an x-transformers decoder, or a module or callable from ids "
        f"to logits, got {type(x).__name__}"
    )


def _is_a(x: object, package: str, name: str) -> bool:
    """True for an instance of the class ``name`` of ``package``, without importing the package."""
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == package for cls in type(x).__mro__)
