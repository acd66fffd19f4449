"""CoCa next to open_clip's CoCa formulas at equal sizes: a training step, captions, and the contrastive losses.

The formulas are written out here, as open_clip computes them: pre-norm blocks of full multi-head attention, then a GELU
feed-forward of four times the width, in series; a text tower with a CLS token after the text; an attentional pooler;
multimodal layers of self- and cross-attention; the whole matrix of similarities (``ClipLoss``) and the whole logits.
Its captioning encodes the image once and runs the text again for every token, without a cache.

The model of equal sizes is another one, with more weights: rows compare the cost of a step, not of a result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import arguments, compared, in_turns, report, thread_counts, tokens_per_second
from torch import Tensor, nn

from coca import CoCa, sigmoid_contrastive_loss, softmax_contrastive_loss

DIM, HEADS, VOCABULARY, BATCH, TEXT, IMAGE, QUERIES = 256, 8, 8192, 16, 65, 64, 256
PEER = "open_clip's formulas"


class Block(nn.Module):
    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.context_norm = nn.LayerNorm(DIM) if cross else None
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)
        )

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        seen = normed if context is None or self.context_norm is None else self.context_norm(context)
        x = x + self.attention(normed, seen, seen, need_weights=False, attn_mask=mask)[0]
        return x + self.feed_forward(x)


class Pooler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUERIES + 1, DIM))
        self.norm, self.context_norm, self.last = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        seen, queries = self.context_norm(tokens), self.norm(self.queries).expand(len(tokens), -1, -1)
        return self.last(self.attention(queries, seen, seen, need_weights=False)[0])


class OpenClipCoCa(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Parameter(0.01 * torch.randn(256, DIM))
        self.cls, self.pooler = nn.Parameter(0.01 * torch.randn(DIM)), Pooler()
        self.unimodal = nn.ModuleList(Block() for _ in range(3))
        self.multimodal = nn.ModuleList(nn.ModuleList([Block(), Block(cross=True)]) for _ in range(3))
        self.cls_norm, self.norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.to_logits = nn.Linear(DIM, VOCABULARY, bias=False)
        self.text_projection, self.image_projection = (nn.Linear(DIM, DIM, bias=False) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def text_tower(self, text: Tensor) -> tuple[Tensor, Tensor]:
        x = (
            torch.cat((self.embedding(text), self.cls.expand(len(text), 1, -1)), dim=1)
            + self.positions[: text.shape[1] + 1]
        )
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        for block in self.unimodal:
            x = block(x, mask=mask)
        return self.cls_norm(x[:, -1]), x[:, :-1]

    def logits(self, tokens: Tensor, image: Tensor) -> Tensor:
        mask = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
        for block, cross in self.multimodal:
            tokens = cross(block(tokens, mask=mask), image)
        return self.to_logits(self.norm(tokens))

    def loss(self, text: Tensor, image_tokens: Tensor) -> Tensor:
        pooled = self.pooler(image_tokens)
        cls, tokens = self.text_tower(text)
        logits = self.logits(tokens[:, :-1], pooled[:, 1:])
        caption = F.cross_entropy(logits.transpose(1, 2), text[:, 1:])
        images = F.normalize(self.image_projection(pooled[:, 0]), dim=-1)
        texts = F.normalize(self.text_projection(cls), dim=-1)
        return caption + clip_loss(images, texts, self.logit_scale.exp())

    @torch.no_grad()
    def generate(self, image_tokens: Tensor, start: Tensor, tokens: int) -> Tensor:
        image, text = self.pooler(image_tokens)[:, 1:], start
        for _ in range(tokens):
            logits = self.logits(self.text_tower(text)[1], image)[:, -1]
            text = torch.cat((text, logits.argmax(dim=-1, keepdim=True)), dim=1)
        return text


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * images @ texts.t(), torch.arange(len(images))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def siglip_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * (scale * images @ texts.t() + bias)).sum() / len(images)


def rows_of_models(captions: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    theirs = OpenClipCoCa()
    ours = CoCa(
        dim=DIM, num_tokens=VOCABULARY, unimodal_depth=3, multimodal_depth=3, num_img_queries=QUERIES, heads=HEADS
    )
    text, image = torch.randint(1, VOCABULARY, (BATCH, TEXT)), torch.randn(BATCH, IMAGE, DIM)
    losses = {
        "theirs": lambda: theirs.loss(text, image),
        "ours": lambda: ours(text, image_tokens=image, return_loss=True),
    }
    optimizers = {"theirs": torch.optim.AdamW(theirs.parameters()), "ours": torch.optim.AdamW(ours.parameters())}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        losses[name]().backward()
        optimizers[name].step()

    steps = {name: partial(step, name) for name in losses}
    few, start = image[:captions], torch.ones(captions, 1, dtype=torch.long)
    captioning = {
        "theirs": lambda: theirs.generate(few, start, tokens),
        "ours": lambda: ours.generate(image_tokens=few, prefix=start, max_new_tokens=tokens),
    }
    made = tokens_per_second(captions * tokens)
    return [
        compared(f"training step, batch {BATCH}, text {TEXT}", PEER, in_turns(steps, rounds)),
        compared(f"captions, {captions} x {tokens} tokens", PEER, in_turns(captioning, rounds), made),
    ]


def rows_of_losses(pairs: int, rounds: int) -> list[dict[str, Any]]:
    latents = [F.normalize(torch.randn(pairs, 512), dim=-1).requires_grad_() for _ in range(2)]
    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    variants: dict[str, dict[str, Callable[[], object]]] = {
        "softmax": {
            "theirs": lambda: clip_loss(*latents, scale).backward(),
            "ours": lambda: softmax_contrastive_loss(*latents, scale).backward(),
        },
        "sigmoid": {
            "theirs": lambda: siglip_loss(*latents, scale, bias).backward(),
            "ours": lambda: sigmoid_contrastive_loss(*latents, scale, bias).backward(),
        },
    }
    return [
        compared(f"{name} loss with gradients, {pairs} x 512", PEER, in_turns(pair, rounds), "{:.3f} s".format)
        for name, pair in variants.items()
    ]


def main() -> None:
    options = arguments(
        __doc__ or "",
        captions={"type": int, "default": 4, "help": "captions at a time"},
        tokens={"type": int, "default": 64, "help": "tokens of a caption"},
    )
    rows = []
    for _ in thread_counts(options):
        rows += rows_of_models(options.captions, options.tokens, options.rounds)
        for pairs in (512, 4096):
            rows += rows_of_losses(pairs, min(options.rounds, 3))
    report("CoCa and open_clip's formulas", rows, options.json)


if __name__ == "__main__":
    main()
