"""Reports on the memory: its gain by position in the document, and a page of the tokens retrieved in generation.

For every generated token the page shows the tokens that most heads retrieved for its query, with the text around them.
"""

import html
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.checkpoints.atomic_io import write_file
from lm_core.generation.generate import generate
from lm_core.tokenizers import Tokenizer, continuation_text
from memorizing_transformer.model.augmented import MemoryAugmentedLM
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.evaluation import Evaluation

SHOWN = 4  # retrieved tokens on the page, for each new token
_STYLE = """body { font: 14px/1.5 sans-serif; max-width: 70em; margin: 2em auto; color: #222; background: #fff }
code { font: 13px/1.4 monospace; white-space: pre-wrap } .token { background: #ffd27f } .found { background: #a6d8ff }
table { border-collapse: collapse; width: 100% } td, th { border-bottom: 1px solid #ddd; padding: .3em .6em;
text-align: left; vertical-align: top }"""


def gain_by_position(on: Evaluation, off: Evaluation) -> list[str]:
    """Lines of a table of bits per token with memory and without, by position in the document."""
    lines = ["bits per token by position in the document: without memory - with memory = gain"]
    for (first, count, with_memory), (_, _, without) in zip(on.by_position, off.by_position, strict=True):
        a, b = without / math.log(2), with_memory / math.log(2)
        lines.append(f"from {first:6,}: {a:.4f} - {b:.4f} = {a - b:+.4f}   ({count:,} tokens)")
    return lines


@dataclass(frozen=True)
class GeneratedToken:
    """A new token and the tokens that were retrieved for it.

    Attributes:
        token: token id.
        positions: retrieved tokens, each with the number of heads that retrieved it, most heads first, then nearest.
    """

    token: int
    positions: list[tuple[int, int]]


@torch.no_grad()
def retrieved_while_generating(
    model: MemorizingTransformer | MemoryAugmentedLM,
    prompt: Int[Tensor, " n"],
    *,
    max_new_tokens: int,
    layer: int = 0,
    seed: int = 0,
    **sampling: Any,
) -> list[GeneratedToken]:
    """Continues a prompt; returns the tokens retrieved for each new one.

    Args:
        model: the model; its memory begins empty and takes the prompt segment by segment.
        prompt: token ids.
        max_new_tokens: maximum number of new tokens.
        layer: index among the memorizing layers, counted from 0.
        seed: seed of the draws.
        **sampling: further arguments of ``lm_core.generate``.

    Raises:
        ValueError: the model has no such memorizing layer.
    """
    layers = model.memory_attentions()
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer must be an index among the model's {len(layers)} memorizing layers, got {layer}")
    steps: list[list[int]] = []
    with layers[layer].recorded() as records:

        def note(logits: Tensor) -> Tensor:
            # the last record belongs to the query of these logits; there is none while the memory is empty
            steps.append(records[-1].positions[0, :, -1].T.flatten().tolist() if records else [])
            records.clear()
            return logits

        sampling["filters"] = (note, *sampling.get("filters", ()))
        sampling["generator"] = torch.Generator(model.device).manual_seed(seed)
        result = generate(model, prompt.unsqueeze(0), max_new_tokens=max_new_tokens, **sampling)
    tokens = result.tokens[0, : int(result.lengths[0])].tolist()
    out = []
    for token, nearest_first in zip(tokens, steps, strict=False):
        # a counter keeps the order of insertion, nearest first, and a stable sort keeps it among equal counts
        counts = Counter(position for position in nearest_first if position >= 0)
        out.append(GeneratedToken(token, sorted(counts.items(), key=lambda pair: -pair[1])))
    return out


def write_page(
    path: str | Path, prompt: Int[Tensor, " n"], generated: list[GeneratedToken], tokenizer: Tokenizer
) -> Path:
    """Writes an HTML page of the new tokens, each with the four tokens that most heads retrieved for it.

    Args:
        path: path of the page.
        prompt: token ids of the prompt; positions count from its first token.
        generated: result of ``retrieved_while_generating``.
        tokenizer: decodes the ids.
    """
    ids = [*prompt.tolist(), *(new.token for new in generated)]
    rows = []
    for at, new in enumerate(generated, start=len(prompt)):
        retrieved = "<br>".join(
            f"<code>{_around(ids, position, tokenizer, 'found', after=24)}</code> <small>token {position:,}, "
            f"{count} head{'s' if count > 1 else ''}</small>"
            for position, count in new.positions[:SHOWN]
        )
        rows.append(
            f"<tr><td><code>{_around(ids, at, tokenizer, 'token', after=0)}</code></td>"
            f"<td>{retrieved or '<small>the memory was empty</small>'}</td></tr>"
        )
    text = html.escape(continuation_text(tokenizer, prompt.tolist(), [new.token for new in generated]))
    page = (
        f"<!doctype html><meta charset=utf-8><title>Retrieved memories</title><style>{_STYLE}</style>"
        f"<h1>Retrieved memories</h1><p>{len(generated)} tokens generated after {len(prompt):,} of a prompt:</p>"
        f"<p><code>{text}</code></p><table><tr><th>new token</th><th>retrieved by the query that chose it</th></tr>"
        f"{''.join(rows)}</table>\n"
    )
    target = Path(path).expanduser()
    write_file(target, page)
    return target


def _around(ids: list[int], at: int, tokenizer: Tokenizer, kind: str, *, after: int) -> str:
    start, end = max(0, at - 24), at + 1
    before = html.escape(tokenizer.decode(ids[start:at]))
    token = html.escape(continuation_text(tokenizer, ids[start:at], ids[at:end]))
    rest = html.escape(continuation_text(tokenizer, ids[start:end], ids[end : end + after]))
    shown = token.replace("\n", "\u21b5\n") or "\u25a1"
    return f"{before}<span class={kind}>{shown}</span>{rest}"
