"""Reports on the memory: its gain by position in the document, and a page of the tokens retrieved in generation.

For every generated token the page shows the tokens that most heads retrieved for its query, or the nearest entries of a
datastore, with the text around them and links to their places.
"""

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lm_core.checkpoints.atomic_io import write_file
from lm_core.generation.generate import generate
from lm_core.tokenizers import Tokenizer, continuation_text
from memorizing_transformer.memory.datastore import Datastore
from memorizing_transformer.model.augmented import MemoryAugmentedLM
from memorizing_transformer.model.knn_lm import KNNLM, neighbour_weights
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.evaluation import Evaluation

SHOWN = 4  # retrieved tokens on the page, for each new token
_STYLE = """:root { color-scheme: light dark; --text: #1f2328; --page: #ffffff; --line: #d8dee4; --soft: #f4f6f8;
--token: #ffe1a6; --found: #b6deff; --small: #636c76 }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #12161b; --line: #30363d; --soft: #1b2128;
--token: #6b4a00; --found: #0a4a80; --small: #9aa4ae } }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: var(--text);
background: var(--page) }
code, pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: var(--soft); border-radius: .5em; padding: 1em; max-height: 32em; overflow: auto }
pre.new { max-height: none } small { color: var(--small) } h2 { font-size: 1.1em; margin-top: 2em }
.token { background: var(--token); border-radius: .2em } .found { background: var(--found); border-radius: .2em }
a { color: inherit; text-decoration: none } a:hover { background: var(--soft) } :target { outline: .2em solid #d29922 }
table { border-collapse: collapse; width: 100% } td, th { border-bottom: 1px solid var(--line); padding: .5em .7em;
text-align: left; vertical-align: top } td:first-child { width: 38% } tr:hover { background: var(--soft) }"""


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
        positions: retrieved tokens, each with the number of heads that retrieved it, most heads first, then nearest;
            or entries of a datastore, each with its weight in percent, nearest first.
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

    Every retrieved token is a link to its place in the text, which follows.

    Args:
        path: path of the page.
        prompt: token ids of the prompt; positions count from its first token.
        generated: result of ``retrieved_while_generating``.
        tokenizer: decodes the ids.
    """
    ids = [*prompt.tolist(), *(new.token for new in generated)]
    rows = []
    for at, new in enumerate(generated, start=len(prompt)):
        shown = [
            _link(f"t{position}", _around(ids, position, tokenizer, "found", after=24))
            + f" <small>token {position:,}, {count} head{'s' if count > 1 else ''}</small>"
            for position, count in new.positions[:SHOWN]
        ]
        rows.append((_around(ids, at, tokenizer, "token", after=0), shown))
    cited = {position for new in generated for position, _ in new.positions[:SHOWN]}
    return _write(
        path,
        "Retrieved memories",
        f"{len(generated)} tokens generated after {len(prompt):,} of a prompt",
        continuation_text(tokenizer, prompt.tolist(), [new.token for new in generated]),
        rows,
        {"The text": _with_anchors(ids, cited, tokenizer, "t")},
        empty="the memory was empty",
    )


@torch.no_grad()
def neighbours_while_generating(
    model: KNNLM, prompt: Int[Tensor, " n"], *, max_new_tokens: int, seed: int = 0, **sampling: Any
) -> list[GeneratedToken]:
    """Continues a prompt; returns the entries of the datastore for each new token, with their weights in percent.

    Arguments are those of ``retrieved_while_generating``.
    """
    steps: list[list[tuple[int, int]]] = []
    with model.recorded() as records:

        def note(logits: Tensor) -> Tensor:
            found = records[-1]  # the last query is that of these logits
            weights = (100 * neighbour_weights(found, model.temperature)[-1]).round().int().tolist()
            pairs = zip(found.entries[-1].tolist(), weights, strict=True)
            steps.append([(entry, weight) for entry, weight in pairs if entry >= 0])
            records.clear()
            return logits

        sampling["filters"] = (note, *sampling.get("filters", ()))
        sampling["generator"] = torch.Generator(model.device).manual_seed(seed)
        result = generate(model, prompt.unsqueeze(0), max_new_tokens=max_new_tokens, **sampling)
    tokens = result.tokens[0, : int(result.lengths[0])].tolist()
    return [GeneratedToken(token, entries) for token, entries in zip(tokens, steps, strict=False)]


def write_datastore_page(
    path: str | Path,
    prompt: Int[Tensor, " n"],
    generated: list[GeneratedToken],
    datastore: Datastore,
    tokenizer: Tokenizer,
) -> Path:
    """Writes ``write_page`` for the result of ``neighbours_while_generating``; links lead to the cited documents."""
    ids = [*prompt.tolist(), *(new.token for new in generated)]
    rows = []
    cited: dict[int, set[int]] = {}
    for at, new in enumerate(generated, start=len(prompt)):
        shown = []
        for entry, weight in new.positions[:SHOWN]:
            document, position = datastore.place(entry)
            cited.setdefault(document, set()).add(position + 1)
            text = datastore.corpus[document].tolist()
            shown.append(
                _link(f"d{document}-{position + 1}", _around(text, position + 1, tokenizer, "found", after=16))
                + f" <small>document {document:,}, token {position + 1:,}, {weight} %</small>"
            )
        rows.append((_around(ids, at, tokenizer, "token", after=0), shown))
    documents = {
        f"Document {document:,}": _with_anchors(
            datastore.corpus[document].tolist(), positions, tokenizer, f"d{document}-"
        )
        for document, positions in sorted(cited.items())
    }
    return _write(
        path,
        "Neighbours in the datastore",
        f"{len(generated)} tokens generated after {len(prompt):,} of a prompt",
        continuation_text(tokenizer, prompt.tolist(), [new.token for new in generated]),
        rows,
        documents,
        empty="none",
    )


def _write(
    path: str | Path,
    title: str,
    subtitle: str,
    text: str,
    rows: Sequence[tuple[str, list[str]]],
    documents: dict[str, str],
    *,
    empty: str,
) -> Path:
    """Writes a page: a table of new tokens and what was retrieved for each, then the documents that links lead to."""
    body = "".join(
        f"<tr><td><code>{token}</code></td><td>{'<br>'.join(shown) or f'<small>{empty}</small>'}</td></tr>"
        for token, shown in rows
    )
    parts = "".join(f"<h2>{heading}</h2><pre>{content}</pre>" for heading, content in documents.items())
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1><p>{subtitle}:</p>"
        f"<pre class=new>{html.escape(text)}</pre><table><tr><th>new token</th>"
        f"<th>retrieved by the query that chose it</th></tr>{body}</table>{parts}</html>\n"
    )
    target = Path(path).expanduser()
    write_file(target, page)
    return target


def _link(anchor: str, content: str) -> str:
    return f"<a href='#{anchor}'><code>{content}</code></a>"


def _around(ids: list[int], at: int, tokenizer: Tokenizer, kind: str, *, after: int) -> str:
    """A token, marked, with the text around it."""
    start, end = max(0, at - 24), at + 1
    before = html.escape(tokenizer.decode(ids[start:at]))
    token = html.escape(continuation_text(tokenizer, ids[start:at], ids[at:end]))
    rest = html.escape(continuation_text(tokenizer, ids[start:end], ids[end : end + after]))
    return f"{before}<span class={kind}>{_visible(token)}</span>{rest}"


def _with_anchors(ids: list[int], positions: set[int], tokenizer: Tokenizer, prefix: str) -> str:
    """The whole text, with an anchor at each of some tokens."""

    def piece(start: int, stop: int) -> str:
        return html.escape(continuation_text(tokenizer, ids[max(0, start - 24) : start], ids[start:stop]))

    out, done = [], 0
    for position in sorted(positions):
        token = _visible(piece(position, position + 1))
        out += [piece(done, position), f"<span class=found id={prefix}{position}>{token}</span>"]
        done = position + 1
    return "".join([*out, piece(done, len(ids))])


def _visible(token: str) -> str:
    return token.replace("\n", "\u21b5\n") or "\u25a1"
