"""The learned part: an anchor's hidden states read those of an augment (arXiv 2401.02412, section 3.1).

``H_B <- H_B + CrossAttention(queries = H_B, keys and values = W_proj H_A)``. Beyond the paper: an RMSNorm before the
queries, a gate for each head's values (arXiv 2306.12929), and an output that starts at zero, so that composition
begins as the anchor alone.

The parameters are those of an x-transformers ``Attention``, under its names. Keys and values are computed apart from
the queries, once for all tokens that are decoded. That holds for the options in ``PLAIN_OPTIONS``; with any other
option the x-transformers module runs as a whole.

Legend: b batch, n anchor positions, m augment positions, d anchor and c augment features, h heads, e head features.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from calm_pytorch.model.hooks import is_heard
from lm_core.checks import check_positive, typed
from lm_core.generation.decoding import by_columns
from lm_core.nn.attention import attend

PLAIN_OPTIONS = frozenset(
    {
        *("dim_head", "heads", "kv_heads", "one_kv_head", "flash", "dropout", "value_dim_head"),
        *("gate_value_heads", "zero_init_output", "project_out"),
    }
)
Context = tuple[Tensor, Tensor]
_NORM_EPS = 1e-24


class OneRow(NamedTuple):
    """What a ``CrossAttentionBlock`` multiplies single tokens with.

    Attributes:
        weight: of queries, or with ``values`` the context's keys times it, and of gates below; the norm's gain is in.
        bias: of queries (zeros) and gates, or None without gates.
        values: the context's values times the output's weight, ``(h m, d)``; None: the context is read as it is.
    """

    weight: Tensor
    bias: Tensor | None
    values: Tensor | None


class CrossAttentionBlock(nn.Module):
    """``x + attention(norm(x), project(context))``.

    Args:
        dim: features of the anchor.
        dim_context: features of the augment.
        linear_project_context: projects the context to the anchor's width first, as the paper does.
        pre_rmsnorm: normalises the queries' side.
        attention_options: of x-transformers' ``Attention``; by default a zero-initialised output and gated heads.

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
        **attention_options: Any,
    ) -> None:
        super().__init__()
        from x_transformers.x_transformers import Attention, RMSNorm

        check_positive(dim, "dim")
        check_positive(dim_context, "dim_context")
        options = {"zero_init_output": True, "gate_value_heads": True, **attention_options}
        if options.get("heads") == 1:
            options.setdefault("project_out", True)  # or there is no output to start at zero
        for name in ("heads", "dim_head"):
            if name in options:
                check_positive(options[name], name)
        self.dim, self.dim_context = dim, dim_context
        self.pre_rmsnorm: Any = RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.context_proj = nn.Linear(dim_context, dim) if linear_project_context else None
        try:
            self.attn = Attention(dim=dim, dim_context=dim if linear_project_context else dim_context, **options)
        except TypeError as error:
            raise TypeError(f"attn_kwargs must be options of x-transformers' Attention: {error}") from error
        except AssertionError as error:
            raise ValueError(f"attn_kwargs must fit together, got {options}: {error}") from error
        self.dropout = float(options.get("dropout", 0.0))
        self._is_plain = set(options) <= PLAIN_OPTIONS

    def context(self, hidden: Float[Tensor, "b m c"]) -> Context:
        """Keys and values ``(b, h, m, e)`` of an augment's hidden states, for ``attend_to``."""
        dtype = self.attn.to_q.weight.dtype
        states = hidden.to(dtype) if hidden.dtype != dtype else hidden
        if self.context_proj is not None:
            states = self.context_proj(states)
        if not self._is_plain:
            return states.unsqueeze(1), states.new_empty(states.shape[0], 1, states.shape[1], 0)
        h, attention = self.attn.kv_heads, self.attn
        keys = rearrange(attention.to_k(states), "b m (h e) -> b h m e", h=h)
        return keys, rearrange(attention.to_v(states), "b m (h e) -> b h m e", h=h)

    def _normed(self, x: Tensor) -> Tensor:
        x = x.to(self.attn.to_q.weight.dtype)
        if isinstance(self.pre_rmsnorm, nn.Identity):
            return x
        # x-transformers' RMSNorm in one operation
        return F.rms_norm(x, (self.dim,), self._gain(), eps=_NORM_EPS)

    def _gain(self) -> Tensor:
        gain: Tensor = self.pre_rmsnorm.g + float(getattr(self.pre_rmsnorm, "unit_offset", False))
        return gain

    def one_row(self, context: Context | None = None) -> OneRow | None:
        """What ``attend_to`` needs for single tokens without a mask; None where they are no special case.

        On a CPU the calls and passes around the products of one token cost more than the products do. A context that
        stays as it is, of no more positions than a head has features, is multiplied with the weights on its two sides
        once: a token then costs two products, not larger than those of queries and output, and a softmax.

        Args:
            context: of one row, if it is the same for all tokens that follow.
        """
        attention = self.attn
        weight, shared = attention.to_q.weight, attention.kv_heads != attention.heads
        if not self._is_plain or shared or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None
        gates, values = attention.to_v_head_gate, None
        used = [part for part in (attention.to_q, attention.to_out, gates) if part is not None]
        if any(type(part) is not nn.Linear or is_heard(part) for part in used):
            return None
        with torch.no_grad():
            if context is not None and context[0].shape[2] <= min(context[0].shape[3], context[1].shape[3]):
                keys, held = context[0][0], context[1][0]
                of_heads = weight.unflatten(0, (attention.heads, -1)) * keys.shape[-1] ** -0.5
                weight = (keys @ of_heads).flatten(0, 1)
                values = (held @ attention.to_out.weight.t().unflatten(0, (attention.heads, -1))).flatten(0, 1)
            both, bias = weight, None
            if gates is not None:
                both = torch.cat((weight, gates.weight))
                bias = F.pad(gates.bias, (weight.shape[0], 0))
            if not isinstance(self.pre_rmsnorm, nn.Identity):
                both = both * self._gain()
            return OneRow(by_columns(both), bias, values)

    def _attend_to_one(self, x: Tensor, context: Context, one_row: OneRow) -> Tensor:
        """``attend_to`` of a single token."""
        attention, row, gates = self.attn, x.reshape(1, -1), None
        h, normed = attention.heads, row
        if not isinstance(self.pre_rmsnorm, nn.Identity):
            flat = row.view(-1)
            normed = row * (float(torch.dot(flat, flat)) / self.dim + _NORM_EPS) ** -0.5
        projected = F.linear(normed, one_row.weight, one_row.bias)
        if one_row.bias is not None:
            width = projected.shape[1] - h
            projected, gates = projected.narrow(1, 0, width), projected.narrow(1, width, h).sigmoid_()
        if one_row.values is not None:
            weights = projected.view(h, -1).softmax(dim=-1)
            if gates is not None:
                weights *= gates.view(h, 1)
            return torch.addmm(row, weights.view(1, -1), one_row.values).view(x.shape)
        read = F.scaled_dot_product_attention(projected.view(1, h, 1, -1), *context)
        if gates is not None:
            read = read * gates.view(1, h, 1, 1)
        return torch.addmm(row, read.view(1, -1), attention.to_out.weight.t()).view(x.shape)

    def attend_to(
        self,
        x: Float[Tensor, "b n d"],
        context: Context,
        *,
        mask: Bool[Tensor, "..."] | None = None,
        causal: bool = False,
        one_row: OneRow | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Anchor states with what they read of a context.

        Args:
            x: hidden states of the anchor.
            context: from ``context``.
            mask: True where a query may look, ``(b, m)`` or ``(b, n, m)``; a query that may look nowhere reads zeros.
            causal: queries are the last ``n`` of the ``m`` positions and see no later one.
            one_row: of ``one_row``, for single tokens in evaluation mode, without gradients.
        """
        if one_row is not None and mask is None and x.numel() == self.dim and x.dtype == torch.float32:
            return self._attend_to_one(x, context, one_row)
        normed = self._normed(x)
        if self._is_plain:
            keys, values = context
            # plain reshapes, and rows: this runs once a connection for every generated token
            b, n, _ = normed.shape
            rows = normed.reshape(b * n, -1)
            queries = self.attn.to_q(rows).view(b, n, self.attn.heads, -1).transpose(1, 2)
            dropout = self.dropout if self.training else 0.0
            read = attend(queries, keys, values, mask=mask, causal=causal, dropout=dropout)
            if self.attn.to_v_head_gate is not None:
                gates = self.attn.to_v_head_gate(rows).sigmoid().view(b, n, -1)
                read = read * gates.transpose(1, 2).unsqueeze(-1)
            out = self.attn.to_out(read.transpose(1, 2).reshape(b * n, -1)).view(b, n, -1)
        else:
            out = self._whole_module(normed, context[0].squeeze(1), mask, causal)
        return x + out.to(x.dtype)

    def _whole_module(self, normed: Tensor, states: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        n, m = normed.shape[1], states.shape[1]
        if causal:
            triangle = torch.ones(1, n, m, dtype=torch.bool, device=states.device).tril(m - n)
            mask = (
                triangle if mask is None else triangle & (rearrange(mask, "b m -> b 1 m") if mask.ndim == 2 else mask)
            )
        if mask is None:
            return self.attn(normed, states)
        pairs = rearrange(mask, "b m -> b 1 m") if mask.ndim == 2 else mask
        pairs = pairs.expand(normed.shape[0], n, m)
        visible = pairs.any(dim=-1, keepdim=True)
        # memory keys stand before the context and are always seen
        allowed = F.pad(pairs | ~visible, (self.attn.num_mem_kv, 0), value=True)
        out: Tensor = self.attn(normed, states, attn_mask=rearrange(allowed, "b n m -> b 1 n m"))
        return out.masked_fill(~visible, 0.0)

    def weights(
        self, x: Float[Tensor, "b n d"], context: Context, *, mask: Tensor | None = None, causal: bool = False
    ) -> Float[Tensor, "b h n m"]:
        """Attention weights of each head, times its gate: how strongly each position is read.

        Raises:
            ValueError: the block has options beyond ``PLAIN_OPTIONS``.
        """
        if not self._is_plain:
            raise ValueError("attention weights are known for plain attention options only")
        normed = self._normed(x)
        keys = context[0]
        queries = rearrange(self.attn.to_q(normed), "b n (h e) -> b h n e", h=self.attn.heads)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        if causal:
            visible = visible.tril(scores.shape[-1] - scores.shape[-2])
        visible = visible[None, None]
        if mask is not None:
            visible = visible & (mask[:, None, None] if mask.ndim == 2 else mask[:, None])
        weights = F.softmax(scores.float().masked_fill(~visible, -torch.inf), dim=-1)
        weights = torch.where(visible.any(dim=-1, keepdim=True), weights, 0.0)
        if self.attn.to_v_head_gate is not None:
            weights = weights * rearrange(self.attn.to_v_head_gate(normed).sigmoid(), "b n h -> b h n 1")
        return weights

    def forward(
        self, x: Float[Tensor, "b n d"], hidden: Float[Tensor, "b m c"], *, mask: Tensor | None = None
    ) -> Float[Tensor, "b n d"]:
        """``attend_to`` the ``context`` of an augment's hidden states."""
        return self.attend_to(x, self.context(hidden), mask=mask)
