"""Attention layers of a transformers model: queries, keys and values as its own projections make them.

Hooks on the projections read queries and keys after their norm (where there is one) and before rotary embeddings, and a
hook before the output projection may replace the output of the heads. They exist within ``hooked`` only.

| projections | models |
|---|---|
| ``q_proj``, ``k_proj``, ``v_proj``, then ``q_norm`` and ``k_norm`` | Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 |
| ``c_attn`` or ``qkv_proj``: queries, keys, values one after another | GPT-2, Phi-3 |
| ``query_key_value``: the three of each head one after another | GPT-NeoX, BLOOM |

Legend: b batch, n sequence, h query heads, g key heads, d feature of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
SEPARATE = ("q_proj", "k_proj", "v_proj")
CONTIGUOUS = ("c_attn", "qkv_proj")
BY_HEAD = "query_key_value"
# (q (b, h, n, d), k (b, g, n, d), v (b, g, n, d), output of the heads (b, h, n, d)) -> new output of the heads
Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class ProjectedAttention:
    """One attention layer with projections that can be hooked.

    Attributes:
        heads: query heads.
        key_heads: key heads; each serves ``heads / key_heads`` query heads in a row.
        dim_head: features of a head.
    """

    def __init__(self, module: nn.Module, config: Any) -> None:
        """Raises ``ValueError`` naming the size if the projections have other sizes than the configuration says."""
        self._module = module
        parts = dict(module.named_children())
        self._output = parts[next(name for name in OUTPUTS if name in parts)]
        self.heads = int(config.num_attention_heads)
        dim_head = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        self.dim_head = int(dim_head or config.hidden_size // self.heads)
        self._fused = next((parts[name] for name in (*CONTIGUOUS, BY_HEAD) if name in parts), None)
        self._by_head = BY_HEAD in parts
        # norms that return (b, h, n, d) instead of (b, n, h, d); known after a trial
        self.heads_first = False
        h, d = self.heads, self.dim_head
        if self._fused is None:
            self._sources = [parts.get(f"{name}_norm", parts[f"{name}_proj"]) for name in "qkv"]
            self._is_normed = "q_norm" in parts
            widths = [_width(parts[f"{name}_proj"]) for name in "qkv"]
        else:
            total = _width(self._fused)
            rest = (total - h * d) // 2
            widths = [h * d, rest, total - h * d - rest]
        q, k, v = widths
        if q != h * d or k != v or k <= 0 or k % d or h % (k // d) or (self._by_head and k != q):
            raise ValueError(
                f"the projections of {type(module).__name__} must make {h} heads of {d} queries and as many or "
                f"fewer of keys and values, got {q}, {k} and {v} features"
            )
        self.key_heads = k // d

    @contextmanager
    def hooked(self, mix: Mix) -> Iterator[None]:
        """Replaces the output of the heads by ``mix`` in every call of the layer in the block."""
        made: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                made[name] = output

            return hook

        def replace(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            q, k, v = self._heads(made)
            made.clear()
            local = rearrange(inputs[0], "b n (h d) -> b h n d", h=self.heads)
            return (rearrange(mix(q, k, v, local), "b h n d -> b n (h d)").to(inputs[0].dtype), *inputs[1:])

        if self._fused is None:
            handles = [
                source.register_forward_hook(keep(name)) for name, source in zip("qkv", self._sources, strict=True)
            ]
        else:
            handles = [self._fused.register_forward_hook(keep("qkv"))]
        handles.append(self._output.register_forward_pre_hook(replace))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _heads(self, made: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        h, g, d = self.heads, self.key_heads, self.dim_head
        if self._fused is None:
            q, k, v = (self._by_heads(made[name], count) for name, count in (("q", h), ("k", g), ("v", g)))
            return q, k, v
        if self._by_head:
            both = rearrange(made["qkv"], "b n (h three d) -> three b h n d", h=h, three=3)
            return both[0], both[1], both[2]
        q, k, v = made["qkv"].split((h * d, g * d, g * d), dim=-1)
        return self._by_heads(q, h), self._by_heads(k, g), self._by_heads(v, g)

    def _by_heads(self, x: Tensor, heads: int) -> Float[Tensor, "b h n d"]:
        if x.ndim == 3:
            return rearrange(x, "b n (h d) -> b h n d", h=heads)
        return x if self.heads_first else x.transpose(1, 2)

    @contextmanager
    def observed(self) -> Iterator[dict[str, Any]]:
        """Notes, for a trial, the shapes of the queries and of the output projection's input."""
        notes: dict[str, Any] = {}
        source = self._sources[0] if self._fused is None else self._fused
        handles = [
            source.register_forward_hook(lambda module, inputs, output: notes.update(queries=tuple(output.shape))),
            self._output.register_forward_pre_hook(lambda module, inputs: notes.update(heads=inputs[0].shape[-1])),
        ]
        try:
            yield notes
        finally:
            for handle in handles:
                handle.remove()

    def learn_layout(self, notes: dict[str, Any], n: int) -> None:
        """Learns from a trial of ``n`` tokens, another number than that of the heads, which dimension is the heads'.

        Raises:
            ValueError: the layer did not call its projections.
        """
        shape = notes.get("queries")
        if shape is None or notes.get("heads") != self.heads * self.dim_head:
            raise ValueError(f"{type(self._module).__name__} does not call its projections, so it cannot have a memory")
        self.heads_first = len(shape) == 4 and shape[2] == n


def find_attentions(model: nn.Module) -> list[ProjectedAttention]:
    """The attention layers of a transformers model, in order.

    Raises:
        ValueError: the model has none with projections to queries, keys, values and output, or they do not fit its
            configuration.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = []
    for module in model.modules():
        names = {name for name, _ in module.named_children()}
        makes_queries = names.issuperset(SEPARATE) or names & {*CONTIGUOUS, BY_HEAD}
        if makes_queries and names & set(OUTPUTS):
            found.append(ProjectedAttention(module, config))
    if not found:
        raise ValueError(
            f"model must have attention layers with projections ({', '.join(SEPARATE)} or {', '.join(CONTIGUOUS)} or "
            f"{BY_HEAD}, and {' or '.join(OUTPUTS)}), but {type(model).__name__} has none"
        )
    return found


def _width(module: nn.Module) -> int:
    """Number of output features of a linear layer, or of GPT-2's transposed one."""
    features: Any = getattr(module, "out_features", None) or getattr(module, "nf", 0)
    return int(features)
