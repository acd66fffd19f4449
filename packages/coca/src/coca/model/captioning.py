"""Captions: the decoder with its cache; the search is that of ``lm_core.generate``.

The cache holds the text's keys and values, the image's, which are computed once for a caption, and the decoder prepared
for steps of one token. Generation runs the text without CLS: no token sees it.

Legend: b batch, n sequence, q captioning tokens, d feature, v vocabulary.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coca.model.decoding_step import DecodingStep, is_plain
from lm_core.checks import check_ids, typed
from lm_core.generation.beam_search import beam_search
from lm_core.generation.decoding import Filter, eval_mode, prompt_rows
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_k as keep_top_k
from lm_core.generation.sampling import top_p as keep_top_p
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.masking import positions_from_mask, right_pad


class CoCaCache(KVCache):
    """Keys and values of the text, and of the image for each multimodal layer."""

    def __init__(self, *, layers: int, batch_size: int, max_length: int) -> None:
        super().__init__(layers=layers, batch_size=batch_size, max_length=max_length)
        self.max_length = max_length
        self.image: tuple[tuple[Tensor, Tensor], ...] | None = None
        # The decoder for one token a row: None before the first step, False where the model does not allow it.
        self.step: DecodingStep | Literal[False] | None = None
        self._image_of_row: Tensor | None = None

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Row ``r`` becomes what row ``index[r]`` was, its image too."""
        super().reorder(index)
        if self.image is None:
            return
        if index.device.type == "cpu":
            # The beams of an image change places among themselves: their image stays where it is.
            before = torch.arange(self.image[0][0].shape[0]) if self._image_of_row is None else self._image_of_row
            self._image_of_row = before[index]
            if torch.equal(before, self._image_of_row):
                return
        self.image = tuple((keys[index], values[index]) for keys, values in self.image)

    def step_of(self, model: Any) -> DecodingStep | None:
        """The decoder for one token a row, prepared at the first call; None where ``forward`` has to be called."""
        if self.step is None:
            steps = self.max_length - self.length
            self.step = DecodingStep(model, steps=steps) if is_plain(model) else False
        return self.step or None


def decoder_states(
    model: Any,
    text: Int[Tensor, "b n"],
    *,
    mask: Bool[Tensor, "b total"] | None,
    cache: CoCaCache | None,
    pooled: Float[Tensor, "b q d"] | None,
) -> Float[Tensor, "b n d"]:
    """``CoCa.hidden``: both halves of the decoder over text without CLS.

    Raises:
        ValueError: see ``CoCa.hidden``.
    """
    past = 0 if cache is None else cache.length
    image = None if cache is None else cache.image
    _check(text, mask, cache, pooled, past)
    if image is None:
        assert pooled is not None
        image = tuple(layer.cross_attention.keys_values(pooled) for layer in model.multimodal_layers)
        if cache is not None:
            cache.image = image
    x = model.token_emb(text)
    n = text.shape[1]
    if mask is None:
        rotation = model.rotary.at_range(past, past + n, device=x.device, dtype=x.dtype)
    else:
        rotation = model.rotary(positions_from_mask(mask)[:, past:], x.dtype)
    one_token = n == 1 and not torch.is_grad_enabled()
    step = cache.step_of(model) if cache is not None and one_token else None
    if cache is not None and step is not None:
        x = step.hidden(x[:, 0], rotation, cache, image, mask).unsqueeze(1)
    else:
        if mask is not None:
            rotation = (rotation[0].unsqueeze(1), rotation[1].unsqueeze(1))  # the same for all heads
        unimodal = len(model.unimodal_layers)
        for number, layer in enumerate(model.unimodal_layers):
            x = layer(x, rotation, mask, cache=cache, layer=number)
        for number, layer in enumerate(model.multimodal_layers):
            place = unimodal + number
            x = layer(x, rotation, mask=mask, keys_values=image[number], cache=cache, layer=place)
        x = model.norm(x)
    if cache is not None:
        cache.masked = mask is not None
        cache.advance(n)
    return x


class _Captioner:
    """A ``CoCa`` as the language model of its captions: logits of the last position only, and never ``pad_id``.

    Args:
        model: the ``CoCa``.
        forbidden: a token that is never generated, or None.
    """

    def __init__(self, model: Any, forbidden: int | None) -> None:
        self._model = model
        self._forbidden = forbidden
        self.output_weight = model.output_weight  # of which the search reads the vocabulary's size
        self.init_cache = model.init_cache

    def __call__(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: CoCaCache | None = None,
        pooled: Float[Tensor, "b q d"] | None = None,
    ) -> Float[Tensor, "b 1 v"]:
        hidden = decoder_states(self._model, ids, mask=mask, cache=cache, pooled=pooled)[:, -1]
        step = None if cache is None else cache.step
        logits = step.logits(hidden) if step else F.linear(hidden, self.output_weight)
        if self._forbidden is not None:
            logits[:, self._forbidden] = -torch.inf
        return logits.unsqueeze(1)


def _check(text: Tensor, mask: Tensor | None, cache: CoCaCache | None, pooled: Tensor | None, past: int) -> None:
    if text.dtype.is_floating_point or text.ndim != 2 or 0 in text.shape:
        raise ValueError(f"text must be integer ids (b, n), got {text.dtype} of shape {tuple(text.shape)}")
    if pooled is None and (cache is None or cache.image is None):
        raise ValueError("pooled image tokens are needed for the first call: pass pooled=model.embed_image(images)[1]")
    if pooled is not None and pooled.shape[0] != text.shape[0]:
        raise ValueError(f"pooled must have a row for each text, got {pooled.shape[0]} and {text.shape[0]}")
    if cache is not None and cache.batch_size != text.shape[0]:
        raise ValueError(f"cache holds {cache.batch_size} rows, got a batch of {text.shape[0]}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (text.shape[0], past + text.shape[1])):
        expected = (text.shape[0], past + text.shape[1])
        raise ValueError(f"mask must be boolean of shape {expected}, got {mask.dtype} of {tuple(mask.shape)}")
    if mask is None and cache is not None and cache.masked:
        raise ValueError("mask is None but the cache was filled under one: pass the mask of all positions")


@torch.no_grad()
@typed
def caption(
    model: Any,
    images: Tensor | None = None,
    image_tokens: Tensor | None = None,
    prefix: Any = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    min_new_tokens: int = 0,
    eos_id: int | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    return_prefix: bool = False,
    prefix_mask: Tensor | None = None,
    progress: bool = False,
) -> Int[Tensor, "b new"]:
    """Captions of images as token ids, right-padded with the model's ``pad_id``.

    Args:
        model: a ``CoCa``.
        images: given to the model's encoder.
        image_tokens: what an encoder returned, instead of images.
        prefix: ids ``(n,)`` for all images, ``(b, n)``, or a list of 1-D tensors; by default the model's ``bos_id``.
        max_new_tokens: tokens to generate at most, a caption.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: samples among so many of the most likely tokens only.
        top_p: samples among the most likely tokens of this mass only.
        beams: above 1 searches with so many beams instead of sampling.
        length_penalty: of the beam search; see ``lm_core.generation.generate.beam_search``.
        min_new_tokens: EOS is not generated before this many tokens.
        eos_id: ends a caption; the model's by default.
        repetition_penalty: above 1, tokens already seen become less likely.
        generator: source of randomness.
        use_cache: False recomputes the whole caption for each token.
        return_prefix: whether captions begin with their prefix.
        prefix_mask: True at real tokens of a padded ``prefix``.
        progress: shows a progress bar.

    Raises:
        ValueError: an argument is out of range, the prefix does not fit the images, or there is neither a prefix nor a
            ``bos_id``; settings of sampling together with beams.
    """
    if beams > 1 and (temperature != 0.0 or top_k is not None or top_p is not None):
        raise ValueError(f"beams = {beams} searches: temperature, top_k and top_p must be left at their defaults")
    if temperature == 0.0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p need a temperature above 0, got 0 (the most likely token)")
    end = model.eos_id if eos_id is None else eos_id
    with eval_mode(model):
        pooled = model.embed_image(images, image_tokens)[1]
    rows = [row.to(model.device) for row in _prefix_rows(model, prefix, prefix_mask, pooled.shape[0])]
    captioner = _Captioner(model, forbidden=None if end == model.pad_id else model.pad_id)
    filters: list[Filter] = []
    if top_k is not None:
        filters.append(partial(keep_top_k, k=top_k))
    if top_p is not None:
        filters.append(partial(keep_top_p, p=top_p))
    shared: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "filters": filters,
        "eos_id": end,
        "pad_id": model.pad_id,
        "min_new_tokens": min_new_tokens,
        "repetition_penalty": repetition_penalty,
        "use_cache": use_cache,
        "progress": progress,
        "pooled": pooled,
    }
    with eval_mode(model):
        if beams != 1:
            result = beam_search(captioner, rows, beams=beams, length_penalty=length_penalty, **shared)
        else:
            result = generate(captioner, rows, temperature=temperature, generator=generator, **shared)
    if not return_prefix:
        return result.tokens
    whole = [
        torch.cat((row.to(tokens), tokens[:length]))
        for row, tokens, length in zip(rows, result.tokens, result.lengths.tolist(), strict=True)
    ]
    return right_pad(whole, model.pad_id)[0]


def _prefix_rows(model: Any, prefix: Any, mask: Tensor | None, count: int) -> list[Tensor]:
    if prefix is None:
        if model.bos_id is None:
            raise ValueError("prefix must be given, since the model was made without a bos_id")
        prefix = torch.tensor([model.bos_id])
    if isinstance(prefix, Tensor) and prefix.ndim == 1:
        prefix = prefix.expand(count, -1)
    rows = prompt_rows(prefix, mask)
    if len(rows) != count:
        raise ValueError(f"prefix must have a row for each of the {count} images, got {len(rows)}")
    for row in rows:
        check_ids(row, model.num_tokens, "prefix")
    return rows
