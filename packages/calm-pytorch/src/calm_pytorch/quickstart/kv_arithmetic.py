"""The paper's key-value arithmetic (arXiv 2401.02412, section 4.1), small enough for a CPU.

An augment knows which number each of 400 keys stands for; an anchor adds and subtracts numbers modulo 11 and has never
seen a key. Composed, they are trained on expressions over some of the keys and asked for expressions over the others.
Neither can do that alone, and a composition that only learned its training keys by heart cannot either.

An expression is ``a + b = c`` or ``a - b = c``; operands stand at even positions, where the augment's own training
(``key value key value ...``) had its keys.

Legend: b batch, n sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core.causal_lm import eval_mode
from lm_core.checks import check_positive, typed
from lm_core.training.metrics import progress_bar

MODULUS = 11
PLUS, MINUS, EQUALS = MODULUS, MODULUS + 1, MODULUS + 2
FIRST_KEY = MODULUS + 3


@typed
@dataclass(frozen=True, kw_only=True)
class KeyValueTask:
    """Keys, the numbers they stand for, and the split into trained and held-out keys.

    Args:
        keys: number of keys.
        held_out: number of keys that composition never sees.
        operands: operands of an expression.
        seed: seed of the assignment of numbers to keys.
    """

    keys: int = 400
    held_out: int = 100
    operands: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self.keys, "keys")
        check_positive(self.operands, "operands")
        if not 0 < self.held_out < self.keys:
            raise ValueError(f"held_out must be in [1, keys - 1 = {self.keys - 1}], got {self.held_out}")

    @property
    def vocab_size(self) -> int:
        """Numbers, signs and keys."""
        return FIRST_KEY + self.keys

    @property
    def values(self) -> Tensor:
        """``(keys,)`` the number of each key; every number has about as many keys."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.arange(self.keys)[torch.randperm(self.keys, generator=generator)] % MODULUS

    @property
    def split(self) -> tuple[Tensor, Tensor]:
        """Keys composition is trained on, and keys held out."""
        order = torch.randperm(self.keys, generator=torch.Generator().manual_seed(self.seed + 1))
        return order[self.held_out :], order[: self.held_out]

    def pairs(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """``(count, 2 * length)`` rows ``key value key value ...`` over all keys."""
        keys = torch.randint(self.keys, (count, length), generator=generator)
        return torch.stack((keys + FIRST_KEY, self.values[keys]), dim=-1).flatten(1)

    def expressions(
        self, count: int, generator: torch.Generator, keys: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """``(count, 2 * operands + 1)`` rows ``a + b = c``.

        Args:
            count: rows.
            generator: source of randomness.
            keys: keys that operands are drawn from; None for numbers only.
            share: fraction of the operands that are keys; the others are numbers.
        """
        signs = torch.randint(2, (count, self.operands - 1), generator=generator)
        values = torch.randint(MODULUS, (count, self.operands), generator=generator)
        tokens = values
        if keys is not None:
            chosen = keys[torch.randint(len(keys), (count, self.operands), generator=generator)]
            is_key = torch.rand(count, self.operands, generator=generator) < share
            values = torch.where(is_key, self.values[chosen], values)
            tokens = torch.where(is_key, chosen + FIRST_KEY, tokens)
        factors = torch.cat((torch.ones(count, 1, dtype=torch.long), 1 - 2 * signs), dim=1)
        results = (values * factors).sum(dim=1, keepdim=True) % MODULUS
        marks = torch.cat((signs + PLUS, torch.full((count, 1), EQUALS)), dim=1)
        return torch.cat((torch.stack((tokens, marks), dim=-1).flatten(1), results), dim=1)


def token_name(token: int) -> str:
    """A token as text: "7", "+" or "key 12"."""
    if token < MODULUS:
        return str(token)
    signs = {PLUS: "+", MINUS: "-", EQUALS: "="}
    return signs.get(token, f"key {token - FIRST_KEY}")


LENGTH = 32  # context length of the small models


def small_decoder(
    task: KeyValueTask,
    *,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    library: Literal["x-transformers", "hugging-face"] = "x-transformers",
) -> nn.Module:
    """A decoder over the task's vocabulary: of x-transformers, or a Llama of Hugging Face built from a config."""
    if library == "hugging-face":
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads}
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        bounds = {"vocab_size": task.vocab_size, "max_position_embeddings": LENGTH, "intermediate_size": 4 * dim}
        return LlamaForCausalLM(LlamaConfig(**sizes, **bounds, **ends))
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=dim, depth=depth, heads=heads, attn_dim_head=dim // heads)
    return TransformerWrapper(num_tokens=task.vocab_size, max_seq_len=LENGTH, attn_layers=layers)


def train_alone(
    model: Any,
    draw: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    description: str,
    every_other: bool = False,
) -> None:
    """Trains a model from scratch, on the last token of its rows or on every second one.

    The weight decay pulls the states of keys with one value together, so that a composition learns values, not keys.

    Args:
        model: an x-transformers or Hugging Face decoder.
        draw: returns the rows ``(b, n)`` of an update.
        steps: updates.
        learning_rate: peak learning rate.
        description: label of the progress bar.
        every_other: scores the second, fourth, ... token instead of the last.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    scored = slice(0, None, 2) if every_other else slice(-1, None)
    model.train()
    with progress_bar(steps, description=description) as progress:
        for _ in range(steps):
            rows = draw()
            logits = logits_of(model(rows[:, :-1]))
            loss = F.cross_entropy(logits[:, scored].flatten(0, 1), rows[:, 1:][:, scored].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update()
    model.eval()


def logits_of(output: Any) -> Tensor:
    """Logits of a model's output."""
    return getattr(output, "logits", output)


@torch.no_grad()
def accuracy(model: Any, rows: Tensor, **kwargs: Any) -> float:
    """Share of rows whose last token is the most likely number after the tokens before it."""
    with eval_mode(model):
        logits = logits_of(model(rows[:, :-1], **kwargs))[:, -1, :MODULUS]
    return float((logits.argmax(dim=-1) == rows[:, -1]).float().mean())
