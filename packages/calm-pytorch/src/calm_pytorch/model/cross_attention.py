"""The learned part: an anchor's hidden states read those of an augment (arXiv 2401.02412, section 3.1).

``H_B <- H_B + CrossAttention(queries = H_B, keys and values = W_proj H_A)``. Beyond the paper: an RMSNorm before the
queries, a gate for each head's values (arXiv 2306.12929), and an output that starts at zero, so that composition
begins as the anchor alone.

Keys and values are computed apart from the queries, so that decoding keeps those of earlier positions. Parameters have
the names of an x-transformers ``Attention``, and with options beyond ``CONTEXT_OPTIONS`` that module itself runs.

Legend: b batch, n anchor positions, m augment positions, d anchor and c augment features, h heads, e head features.
"""

import copyreg
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from lm_core.checks import check_mask, check_positive, typed
from lm_core.nn.attention import attend

CONTEXT_OPTIONS = frozenset(
    {
        *("dim_head", "heads", "kv_heads", "one_kv_head", "flash", "dropout", "value_dim_head"),
        *("gate_value_heads", "zero_init_output", "project_out"),
    }
)
Context = tuple[Tensor, Tensor]


def _backend(value: int) -> Any:
    return SDPBackend(value)


# x-transformers' flash attention holds members of this enumeration, which torch does not make picklable.
copyreg.pickle(SDPBackend, lambda backend: (_backend, (backend.value,)))


class ContextAttention(nn.Module):
    """Attention to keys and values that are computed once for all queries.

    Args:
        library: an x-transformers ``Attention`` with ``CONTEXT_OPTIONS``, whose layers this module takes.
        dropout: dropout probability of the attention weights.
    """

    def __init__(self, library: Any, dropout: float) -> None:
        super().__init__()
        self.heads: int = library.heads
        self.kv_heads: int = library.kv_heads
        self.dropout = dropout
        self.to_q = library.to_q
        self.to_k = library.to_k
        self.to_v = library.to_v
        self.to_v_head_gate = library.to_v_head_gate
        self.to_out = library.to_out

    def context(self, states: Tensor) -> Context:
        """Keys and values ``(b, kv_heads, m, e)`` of states ``(b, m, c)``."""
        b, m, _ = states.shape
        keys, values = self.to_k(states), self.to_v(states)
        return keys.view(b, m, self.kv_heads, -1).transpose(1, 2), values.view(b, m, self.kv_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, context: Context, mask: Tensor | None, causal: bool) -> Tensor:
        """``(b, n, d)``; arguments as of ``CrossAttentionBlock.forward``."""
        # plain reshapes: this runs once a connection for every generated token
        b, n, _ = x.shape
        q = self.to_q(x).view(b, n, self.heads, -1).transpose(1, 2)
        out = attend(q, *context, mask=mask, causal=causal, dropout=self.dropout if self.training else 0.0)
        out = out.transpose(1, 2)
        if self.to_v_head_gate is not None:
            out = out * self.to_v_head_gate(x).sigmoid().unsqueeze(-1)
        projected: Tensor = self.to_out(out.reshape(b, n, -1))
        return projected

    def weights(self, x: Tensor, context: Context, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention weights ``(b, h, n, m)`` of each head, times its gate: how much each position contributes."""
        b, m = x.shape[0], context[0].shape[2]
        # attention to one-hot values is its weights
        positions = torch.eye(m, dtype=x.dtype, device=x.device).expand(b, self.kv_heads, m, m)
        q = rearrange(self.to_q(x), "b n (h e) -> b h n e", h=self.heads)
        weights = attend(q, context[0], positions, mask=mask, causal=causal)
        if self.to_v_head_gate is not None:
            weights = weights * rearrange(self.to_v_head_gate(x).sigmoid(), "b n h -> b h n 1")
        return weights


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) with the parameter's name of x-transformers, in one operator.

    Args:
        dim: features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)``."""
        return F.rms_norm(x, self.g.shape, self.g, eps=1e-24)


class CrossAttentionBlock(nn.Module):
    """``x + attention(norm(x), project(hidden))``.

    Args:
        dim: features of the anchor.
        dim_context: features of the augment.
        linear_project_context: projects the context to the anchor's width first, as the paper does.
        pre_rmsnorm: normalises the queries' side.
        norm_context: normalises the context, without parameters. Pretrained models have states a thousand times the
            usual size at the first token (arXiv 2402.17762), which dominate a context that is not normalised: training
            with SmolLM2 then jumps to a loss above 11 after one update at 1e-4, and with it learns at 1e-3.
        attention_options: options of x-transformers' ``Attention``; the output starts at zero and heads are gated.

    Raises:
        ValueError: a width is below 1, or x-transformers refuses an option.
        TypeError: x-transformers knows no such option.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int,
        dim_context: int,
        linear_project_context: bool = True,
        pre_rmsnorm: bool = True,
        norm_context: bool = False,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        from x_transformers.x_transformers import Attention

        check_positive(dim, "dim")
        check_positive(dim_context, "dim_context")
        options = {"zero_init_output": True, "gate_value_heads": True, **attention_options}
        if options.get("heads") == 1:
            options.setdefault("project_out", True)  # or there is no output to start at zero
        for name in ("heads", "dim_head"):
            if name in options:
                check_positive(options[name], name)
        self.dim = dim
        self.dim_context = dim_context
        self.norm_context = norm_context
        self.pre_rmsnorm: nn.Module = RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.context_proj = nn.Linear(dim_context, dim) if linear_project_context else None
        try:
            library = Attention(dim=dim, dim_context=dim if linear_project_context else dim_context, **options)
        except TypeError as error:
            raise TypeError(f"attn_kwargs must be options of x-transformers' Attention: {error}") from error
        except AssertionError as error:
            raise ValueError(f"attn_kwargs must fit together, got {options}: {error}") from error
        keeps_context = set(options) <= CONTEXT_OPTIONS
        self.attn: Any = ContextAttention(library, options.get("dropout", 0.0)) if keeps_context else library

    def context(self, hidden: Float[Tensor, "b m c"]) -> Context:
        """Keys and values ``(b, h, m, e)`` of an augment's hidden states, for ``forward``."""
        parameter = self._first_parameter(hidden)
        states = hidden.to(parameter.device, parameter.dtype)
        if self.norm_context:
            states = F.rms_norm(states, states.shape[-1:], eps=1e-6)
        if self.context_proj is not None:
            states = self.context_proj(states)
        if isinstance(self.attn, ContextAttention):
            return self.attn.context(states)
        return rearrange(states, "b m c -> b 1 m c"), states.new_empty(states.shape[0], 1, states.shape[1], 0)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        hidden: Float[Tensor, "b m c"] | None = None,
        *,
        context: Context | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b n d"]:
        """Anchor states plus their cross-attention to an augment.

        Args:
            x: hidden states of the anchor.
            hidden: hidden states of the augment.
            context: result of ``context``, instead of ``hidden``.
            mask: True where a query may look, ``(b, m)`` or ``(b, n, m)``; a query that may look nowhere reads zeros.
            causal: queries are the last ``n`` of the ``m`` positions and see no later one.

        Raises:
            ValueError: neither or both of hidden and context are given.
        """
        if (hidden is None) == (context is None):
            given = "neither" if hidden is None else "both"
            raise ValueError(f"exactly one of hidden and context must be given, got {given}")
        context = self.context(hidden) if context is None else context  # type: ignore[arg-type]
        normed = self.pre_rmsnorm(x.to(self._first_parameter(x).dtype))
        if isinstance(self.attn, ContextAttention):
            out = self.attn(normed, context, mask, causal)
        else:
            out = self._library_attention(normed, context[0].squeeze(1), mask, causal)
        return x + out.to(x.dtype)

    def weights(
        self, x: Float[Tensor, "b n d"], context: Context, *, mask: Tensor | None = None, causal: bool = False
    ) -> Float[Tensor, "b h n m"]:
        """Attention weights of each head, times its gate: how much each position contributes.

        Raises:
            ValueError: the block has options beyond ``CONTEXT_OPTIONS``.
        """
        if not isinstance(self.attn, ContextAttention):
            raise ValueError(f"attention weights are known for the options {sorted(CONTEXT_OPTIONS)} only")
        normed = self.pre_rmsnorm(x.to(self._first_parameter(x).dtype))
        return self.attn.weights(normed, context, mask, causal)

    def _first_parameter(self, x: Tensor) -> Tensor:
        """A parameter with the dtype and device of all, also where some are quantised or wrapped; ``x`` without any."""
        gain: Tensor | None = getattr(self.pre_rmsnorm, "g", None)
        return gain if gain is not None else next(self.parameters(), x)

    def _library_attention(self, normed: Tensor, states: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        n, m = normed.shape[1], states.shape[1]
        if mask is not None:
            check_mask(mask, "mask")
        if mask is not None and mask.ndim == 2:
            mask = rearrange(mask, "b m -> b 1 m")
        if causal:
            triangle = torch.ones(1, n, m, dtype=torch.bool, device=states.device).tril(m - n)
            mask = triangle if mask is None else triangle & mask
        if mask is None:
            return self.attn(normed, states)
        pairs = mask.expand(normed.shape[0], n, m)
        visible = pairs.any(dim=-1, keepdim=True)
        # memory keys stand before the context and are always seen
        allowed = F.pad(pairs | ~visible, (self.attn.num_mem_kv, 0), value=True)
        out: Tensor = self.attn(normed, states, attn_mask=rearrange(allowed, "b n m -> b 1 n m"))
        return out.masked_fill(~visible, 0.0)
