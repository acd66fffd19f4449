"""Which x-transformers decoders are plain: sizes and common choices only, and no option beyond.

A plain one of the same sizes is built (on the meta device, so without weights), and every attribute of every part is
compared with it.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn


def is_plain(net: Any) -> bool:
    """Whether an x-transformers ``TransformerWrapper`` has sizes and common choices only, and no option beyond."""
    try:
        reference = _plain_like(net)
    except (AttributeError, IndexError, TypeError, AssertionError):
        return False  # parts are missing, or this version of the library has other arguments
    return _described(net) == _described(reference)


def _plain_like(net: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    stack = net.attn_layers
    attention, feedforward = stack.layers[0][1], stack.layers[1][1]
    has_table = isinstance(net.pos_emb, nn.Module)
    if attention.kv_heads not in (1, attention.heads) or type(net.token_emb).__name__ != "TokenEmbedding":
        raise TypeError("its keys are shared in another order")
    with torch.device("meta"):
        layers = Decoder(
            dim=stack.dim,
            depth=len(stack.layers) // 2,
            heads=attention.heads,
            attn_kv_heads=attention.kv_heads,
            attn_dim_head=attention.to_q.out_features // attention.heads,
            attn_flash=attention.attend.flash,
            attn_dropout=attention.attend.attn_dropout.p,
            ff_dropout=next(m.p for m in feedforward.ff if isinstance(m, nn.Dropout)),
            ff_mult=_inner_width(feedforward) / stack.dim,
            ff_glu=any(type(m).__name__ == "GLU" for m in feedforward.modules()),
            use_rmsnorm=type(stack.final_norm).__name__ == "RMSNorm",
            rotary_pos_emb=stack.rotary_pos_emb is not None,
        )
        return TransformerWrapper(
            num_tokens=net.num_tokens,
            max_seq_len=net.max_seq_len,
            attn_layers=layers,
            emb_dropout=net.emb_dropout.p,
            use_abs_pos_emb=has_table,
            tie_embedding=not isinstance(net.to_logits, nn.Module),
        )


def _inner_width(feedforward: Any) -> int:
    last = [module for module in feedforward.ff if isinstance(module, nn.Linear)][-1]
    return int(last.in_features)


def _described(net: nn.Module) -> dict[str, Any]:
    """Of each part its class, its attributes as text without addresses, and the sizes of its tensors."""
    found: dict[str, Any] = {}
    for name, part in net.named_modules():
        texts = {
            key: re.sub(r" at 0x[0-9a-f]+", "", repr(value))
            for key, value in vars(part).items()
            if not key.startswith("_") and key != "training" and not isinstance(value, (Tensor, nn.Module))
        }
        tensors = {
            key: tuple(t.shape) for key, t in (*part._parameters.items(), *part._buffers.items()) if t is not None
        }
        absent = sorted(key for key, module in part._modules.items() if module is None)
        found[name] = (type(part).__qualname__, texts, tensors, absent)
    return found
