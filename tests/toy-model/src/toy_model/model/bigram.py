"""A bigram language model: logits of the next token from the current one."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from lm_core.checkpoints.pretrained import PretrainedMixin


class ToyModel(PretrainedMixin):
    """A bigram model of ``num_tokens`` tokens with ``dim`` features."""

    def __init__(self, num_tokens: int, dim: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, dim)
        self.output = nn.Linear(dim, num_tokens)

    def forward(self, ids: Int[Tensor, "b n"], **_: Any) -> Float[Tensor, "b n v"]:
        """Logits of the token after each."""
        logits: Tensor = self.output(self.embedding(ids))
        return logits
