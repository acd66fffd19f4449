"""One generation loop for every causal language model: sampling and greedy decoding.

Beam search is in ``lm_core.generation.beam_search``.

Finished rows leave the batch. Guarantees: cached equals uncached, a batch of prompts of different lengths equals each
prompt alone, an EOS inside the prompt does not stop generation, and nothing after a generated EOS counts.

Legend: b batch, n sequence, v vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from lm_core.causal_lm import CausalLM, Generation
from lm_core.checks import check_temperature, typed
from lm_core.generation.beam_search import beam_search
from lm_core.generation.decoding import (
    STEPS_BETWEEN_CHECKS_ON_ACCELERATOR,
    Decoder,
    Filter,
    LogitsProcessor,
    is_any,
    prompt_rows,
    run_on_the_device,
)
from lm_core.generation.sampling import filters_of, gumbel_sample
from lm_core.generation.sampling import top_p as nucleus
from lm_core.generation.text_stream import OnText, TextWatch

__all__ = ["CausalLM", "Generation", "beam_search", "generate", "sample"]


@torch.no_grad()
@typed
def generate(
    model: Any,
    prompt: Any,
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    filters: Sequence[Filter] = (),
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    processors: Sequence[LogitsProcessor] = (),
    num_return_sequences: int = 1,
    stop_strings: Sequence[str] = (),
    on_text: OnText | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    use_cache: bool = True,
    compile: bool = False,
    progress: bool = False,
    **model_kwargs: Any,
) -> Generation:
    """Generates a continuation of each prompt.

    Logits pass through the repetition penalty, the n-gram exclusion, the minimum length, the processors, the
    temperature and the filters (top-k, top-p, min-p, then ``filters``), in this order.

    Args:
        model: a ``CausalLM``, or anything ``lm_core.adapters.as_causal_lm`` accepts.
        prompt: ids ``(b, n)``, or a list of 1-D tensors of different lengths.
        max_new_tokens: maximum number of new tokens in a row.
        mask: ``(b, n)`` True at real tokens, padding on either side.
        prompt_lengths: ``(b,)`` lengths of right-padded prompts, instead of ``mask``.
        temperature: divisor of the logits; 0 takes the most likely token that the filters leave.
        top_k: number of most likely tokens to sample from; None for no limit.
        top_p: probability mass of the most likely tokens to sample from; None for no limit.
        min_p: minimum probability of a token, as a fraction of the most likely token's; None for no limit.
        filters: further functions ``(b, v) -> (b, v)`` that set excluded logits to minus infinity.
        eos_id: token or tokens that end a row.
        pad_id: token after the end of a row.
        min_new_tokens: number of new tokens before which EOS is not generated.
        repetition_penalty: above 1, tokens already seen become less likely (arXiv 1909.05858).
        no_repeat_ngram_size: length of token sequences that no row repeats, its prompt included; 0 for no limit.
        processors: further functions ``(logits (rows, v), rows (rows,)) -> logits``, given the index in the result of
            each row, since ended rows leave the batch.
        num_return_sequences: continuations of each prompt, which follow one another in the result.
        stop_strings: texts that end a row with the token that completes them; special tokens count.
        on_text: called with the index of a row and its next text, in whole characters, without special tokens.
        tokenizer: tokenizer of the model, for ``stop_strings`` and ``on_text``.
        generator: source of randomness; or one for each row, whose draws then do not depend on the other rows.
        use_cache: False recomputes the whole sequence for each token.
        compile: compiles the step of one token a row (``torch.compile``), which takes about a minute for each number of
            rows and range of lengths, and is kept as long as the model lives. A model whose step cannot be compiled
            runs as without it, with a warning that gives the reason. On CUDA a step is captured into a CUDA graph in
            any case, where it can be.
        progress: shows a progress bar.
        **model_kwargs: arguments of the model, passed with the prompt (without a cache in every call). A tensor whose
            first size is the number of prompts has an entry for each of them, and so has an object whose ``batch_size``
            is that number, with ``selected(rows)``.

    Raises:
        ValueError: an argument is out of range, ``stop_strings`` or ``on_text`` come without a tokenizer, prompt and
            new tokens exceed the model's ``max_length``, or the logits
            are NaN.
        TypeError: the prompt holds no integers.
    """
    check_temperature(temperature)
    on_host = bool(processors or stop_strings or on_text)
    generators = None if on_host or not run_on_the_device(filters) else _capturable(generator, temperature)
    filters = [*filters_of(top_k=top_k, top_p=top_p, min_p=min_p), *filters]
    decoder = Decoder(
        model,
        prompt,
        mask=mask,
        prompt_lengths=prompt_lengths,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        eos_id=eos_id,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        num_return_sequences=num_return_sequences,
        use_cache=use_cache,
        compile=compile,
        model_kwargs=model_kwargs,
    )
    b, device = decoder.ids.shape[0], decoder.ids.device
    if isinstance(generator, Sequence) and len(generator) != b:
        raise ValueError(f"generator must have one entry a row ({b}), got {len(generator)}")
    can_end = bool(decoder.eos_ids or stop_strings)
    rows = _Rows(b, max_new_tokens, pad_id, can_end=can_end, device=device)
    watch: TextWatch | None = None
    if stop_strings or on_text is not None:
        watch = TextWatch(tokenizer, decoder.prompts(), stop_strings=stop_strings, on_text=on_text)

    def choose(logits: Tensor) -> Tensor:
        for processor in processors:
            logits = processor(logits, rows.index)
        token, log_prob = _draw(logits, temperature, filters, generator)
        ends = is_any(token, decoder.eos_ids)
        if watch is not None:
            ends = torch.tensor(watch.push(rows.index, token, ends), device=device)
        rows.write(token, log_prob, ends)
        return token

    check_every = 1 if device.type == "cpu" else STEPS_BETWEEN_CHECKS_ON_ACCELERATOR
    with decoder:
        for step in tqdm(range(max_new_tokens), desc="generate", unit="token", disable=not progress):
            if can_end and step and step % check_every == 0:
                remaining = int(rows.alive.sum())
                if remaining == 0:
                    break
                # Dropping rows copies the cache, so they are dropped only when that halves the work.
                if 2 * remaining <= rows.alive.shape[0] and not decoder.keeps_rows:
                    keep = rows.drop_ended()
                    decoder.reorder(keep)
                    if isinstance(generator, Sequence):
                        generator = [generator[index] for index in keep.tolist()]
            decoder.step(choose, generators)
    if watch is not None:
        watch.close()
    return rows.result()


class _Rows:
    """The generated tokens of the rows in the decoder, and of those that have left it.

    ``write`` reads and writes tensors that stay in place, so that a CUDA graph can hold it.

    Attributes:
        index: ``(rows,)`` indices in the result of the rows in the decoder.
        alive: ``(rows,)`` True at rows in the decoder that have not ended.
    """

    def __init__(self, b: int, max_new_tokens: int, pad_id: int, *, can_end: bool, device: torch.device) -> None:
        self._pad_id = pad_id
        self._can_end = can_end
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._tokens = torch.full((b, max_new_tokens), pad_id, dtype=torch.long, device=device)
        self._log_probs = torch.zeros(b, max_new_tokens, device=device)
        self._lengths = torch.zeros(b, dtype=torch.long, device=device)
        self.alive = torch.ones(b, dtype=torch.bool, device=device)
        self.index = torch.arange(b, device=device)
        self._left: list[tuple[Tensor, ...]] = []  # rows that have left the decoder

    def write(self, token: Tensor, log_prob: Tensor, ends: Tensor) -> None:
        """Writes the next column: ``token (rows,)`` and its log-probability, or padding where a row has ended.

        A row is written to the one where ``ends`` is True.
        """
        if self._can_end:
            token, log_prob = token.where(self.alive, self._pad_id), log_prob.where(self.alive, 0.0)
        self._tokens.index_copy_(1, self._column, token.unsqueeze(-1))
        self._log_probs.index_copy_(1, self._column, log_prob.unsqueeze(-1))
        self._lengths.add_(self.alive)
        self._column.add_(1)
        if self._can_end:
            self.alive.logical_and_(~ends)

    def drop_ended(self) -> Tensor:
        """Removes the rows that have ended; returns the former indices of those that stay."""
        self._left.append(self._state(~self.alive))
        keep = self.alive.nonzero().squeeze(-1)
        self.index, self._tokens, self._log_probs, self._lengths, self.alive = self._state(self.alive)
        return keep

    def result(self) -> Generation:
        """All rows in their order.

        Raises:
            ValueError: logits were NaN.
        """
        parts = (*self._left, self._state(torch.ones_like(self.alive)))
        index, tokens, log_probs, lengths, alive = (torch.cat(part) for part in zip(*parts, strict=True))
        if bool(log_probs.isnan().any()):  # on an accelerator, steps are not checked
            raise ValueError("logits must not hold NaN")
        order, longest = index.argsort(), int(lengths.max())
        return Generation(tokens[order, :longest], lengths[order], log_probs[order, :longest], ~alive[order])

    def _state(self, rows: Tensor) -> tuple[Tensor, ...]:
        state = (self.index, self._tokens, self._log_probs, self._lengths, self.alive)
        return tuple(tensor[rows] for tensor in state)


@typed
def sample(
    model: Any,
    prompts: Any,
    seq_len: int,
    temperature: float = 1.0,
    filter_fn: Callable[..., Tensor] | None = nucleus,
    filter_kwargs: dict[str, Any] | None = None,
    pad_id: int = -1,
    eos_id: int | Sequence[int] | None = None,
    output_keep_prompt: bool = False,
    *,
    filters: Sequence[Filter] = (),
    **kwargs: Any,
) -> Int[Tensor, "b n"]:
    """Samples continuations up to a TOTAL length ``seq_len`` of prompt and answer, for prompts of different lengths.

    Args:
        prompts: ids ``(b, n)`` or a list of 1-D tensors.
        seq_len: length of the longest row, prompt included.
        filter_fn: filter, called as ``filter_fn(logits, **filter_kwargs)``; None for no filter.
        filter_kwargs: keyword arguments of the filter, ``thres=0.9`` by default.
        pad_id: token after the end of a row.
        output_keep_prompt: True returns rows that begin with their prompt.
        filters: further filters, after ``filter_fn``.
        model, temperature, eos_id, **kwargs: as in ``generate``.

    Returns:
        Right-padded ids.

    Raises:
        ValueError: a prompt has ``seq_len`` tokens or more, or as in ``generate``.
    """
    rows = prompt_rows(prompts)
    longest = max(row.shape[0] for row in rows)
    if longest >= seq_len:
        raise ValueError(f"seq_len must exceed the longest prompt ({longest} tokens), got {seq_len}")
    if filter_fn is not None:
        settings = {"thres": 0.9} if filter_kwargs is None else filter_kwargs
        filters = (lambda logits: filter_fn(logits, **settings), *filters)
    # The shortest prompt may be continued further than the longest; each row is cut at `seq_len` afterwards.
    shortest = min(row.shape[0] for row in rows)
    result = generate(
        model,
        rows,
        max_new_tokens=seq_len - shortest,
        temperature=temperature,
        filters=filters,
        eos_id=eos_id,
        **kwargs,
    )
    # cut each row to the total length, then pad
    answers = [
        tokens[: min(int(length), seq_len - row.shape[0])]
        for tokens, length, row in zip(result.tokens, result.lengths, rows, strict=True)
    ]
    if output_keep_prompt:
        answers = [torch.cat((row.to(answer.device), answer)) for row, answer in zip(rows, answers, strict=True)]
    return nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad_id)


def _capturable(
    generator: torch.Generator | Sequence[torch.Generator] | None, temperature: float
) -> tuple[torch.Generator, ...] | None:
    """The generators that a CUDA graph of ``_draw`` must know of; None if it cannot be captured."""
    if generator is None or temperature == 0.0:
        return ()
    if isinstance(generator, torch.Generator) and generator.device.type == "cuda":
        return (generator,)
    return None


def _draw(
    logits: Tensor,
    temperature: float,
    filters: Sequence[Filter],
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> tuple[Tensor, Tensor]:
    filtered = logits if temperature in (0.0, 1.0) else logits / temperature
    for filter_ in filters:
        filtered = filter_(filtered)
    if temperature == 0.0:
        token = gumbel_sample(filtered, temperature=0)
        log_probs = logits.log_softmax(dim=-1)
    elif isinstance(generator, Sequence):
        token = torch.stack([gumbel_sample(row, generator=own) for row, own in zip(filtered, generator, strict=True)])
        log_probs = filtered.log_softmax(dim=-1)
    else:
        token = gumbel_sample(filtered, generator=generator)
        log_probs = filtered.log_softmax(dim=-1)
    return token, log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1).float()
