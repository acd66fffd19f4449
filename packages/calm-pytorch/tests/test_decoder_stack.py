"""A plain x-transformers decoder computed directly gives the library's states; any other is left to the library."""

import copy

import pytest
import torch

from calm_pytorch.model.decoder_stack import PlainDecoderLM, as_fast_causal_lm
from calm_pytorch.model.plain_decoders import is_plain
from lm_core.adapters import as_causal_lm

PLAIN = {
    "defaults": ({}, {}),
    "rotary": ({"rotary_pos_emb": True}, {}),
    "rotary without a table": ({"rotary_pos_emb": True}, {"use_abs_pos_emb": False}),
    "flash": ({"attn_flash": True}, {}),
    "glu, rms, one key head, tied": (
        {"ff_glu": True, "use_rmsnorm": True, "attn_kv_heads": 1},
        {"tie_embedding": True},
    ),
    "dropout": ({"attn_dropout": 0.1, "ff_dropout": 0.2}, {"emb_dropout": 0.3}),
}
OTHERS = [
    {"attn_qk_norm": True},
    {"sandwich_norm": True},
    {"attn_num_mem_kv": 2},
    {"attn_kv_heads": 2},
    {"pre_norm": False},
    {"scale_residual": True},
    {"rotary_xpos": True},
    {"attn_gate_values": True},
    {"shift_tokens": 1},
    {"attn_sparse_topk": 2},
    {"layer_dropout": 0.1},
    {"ff_swish": True},
    {"attn_max_attend_past": 3},
    {"cross_attend": True},
    {"macaron": True},
    {"residual_attn": True},
    {"attn_laser": True},
]


@pytest.fixture
def decoder():
    """``decoder(stack_options, **wrapper_options)``: four heads, three layers, weights far from their start."""

    def make(stack, **wrapper):
        from x_transformers import Decoder, TransformerWrapper

        torch.manual_seed(0)
        layers = Decoder(dim=32, depth=3, heads=4, attn_dim_head=32, **stack)
        net = TransformerWrapper(num_tokens=40, max_seq_len=64, attn_layers=layers, **wrapper).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        return net

    return make


@pytest.mark.parametrize("kind", PLAIN)
def test_states_are_the_library_s_whole_padded_and_token_by_token(decoder, ids, kind):
    stack, wrapper = PLAIN[kind]
    net = decoder(stack, **wrapper)
    fast, library = as_fast_causal_lm(net), as_causal_lm(net)
    assert isinstance(fast, PlainDecoderLM)
    seq, mask = ids(3, 12), torch.ones(3, 12, dtype=torch.bool)
    mask[1, :4] = False
    mask[2, :1] = False
    expected = library.hidden(seq, mask=mask)
    assert torch.allclose(fast.hidden(seq, mask=mask)[mask], expected[mask], atol=1e-4)
    cache = fast.init_cache(3, 12)
    pieces = [fast.hidden(seq[:, :5], mask=mask[:, :5], cache=cache)]
    pieces += [fast.hidden(seq[:, i : i + 1], mask=mask[:, : i + 1], cache=cache) for i in range(5, 12)]
    assert torch.allclose(torch.cat(pieces, dim=1)[mask], expected[mask], atol=1e-4)
    assert cache.buffer is not None


@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_a_decoder_with_any_other_option_is_left_to_the_library(decoder, options):
    assert not is_plain(decoder(options))


def test_a_changed_attribute_or_layer_is_not_plain(decoder):
    net = decoder({})
    assert is_plain(net)
    net.attn_layers.layers[2][1].attend.scale = 0.5
    assert not is_plain(net)
    other = decoder({})
    other.attn_layers.layers[1][1] = torch.nn.Linear(32, 32)
    assert not is_plain(other)


def test_a_hook_on_an_attention_is_called_and_the_cache_goes_over_to_the_library_and_back(decoder, ids):
    net = decoder({"rotary_pos_emb": True})
    fast, seq = as_fast_causal_lm(net), ids(2, 8)
    expected = as_causal_lm(net).hidden(seq)
    cache, calls = fast.init_cache(2, 8), []
    pieces = [fast.hidden(seq[:, :4], cache=cache)]
    handle = net.attn_layers.layers[0][1].register_forward_hook(lambda *arguments: calls.append(1))
    pieces += [fast.hidden(seq[:, i : i + 1], cache=cache) for i in (4, 5)]
    handle.remove()
    pieces += [fast.hidden(seq[:, i : i + 1], cache=cache) for i in (6, 7)]
    assert len(calls) == 2
    assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-4)


def test_a_clone_of_a_cache_is_independent_and_rows_are_reordered(decoder, ids):
    fast, seq = as_fast_causal_lm(decoder({})), ids(2, 6)
    expected = fast.hidden(seq)
    cache = fast.init_cache(2, 6)
    fast.hidden(seq[:, :5], cache=cache)
    twin = cache.clone()
    fast.hidden(1 - seq[:, 5:].clamp(max=1), cache=twin)
    cache.reorder(torch.tensor([1, 0, 1]))
    last = fast.hidden(seq[[1, 0, 1], 5:], cache=cache)
    assert torch.allclose(last[:, 0], expected[[1, 0, 1], -1], atol=1e-4)


def test_a_deep_copy_runs_on_its_own_weights(decoder, ids):
    fast = as_fast_causal_lm(decoder({}))
    expected, twin = fast.hidden(ids(1, 4)), copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in fast.model.parameters():
            parameter.zero_()
    assert torch.equal(twin.hidden(ids(1, 4)), expected)


def test_gradients_and_dropout_are_the_library_s(decoder, ids):
    net = decoder({"attn_dropout": 0.5})
    fast, library = as_fast_causal_lm(net), as_causal_lm(net)
    gradients = []
    for model in (fast, library):
        net.zero_grad()
        model.hidden(ids(2, 6)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name
    net.train()
    one, other = fast.hidden(ids(2, 6)), fast.hidden(ids(2, 6))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("kind", PLAIN)
def test_single_tokens_without_padding_or_gradients_have_the_library_s_states(decoder, ids, kind):
    stack, wrapper = PLAIN[kind]
    net = decoder(stack, **wrapper)
    fast, seq = as_fast_causal_lm(net), ids(2, 12)
    with torch.no_grad():
        expected = as_causal_lm(net).hidden(seq)
        cache = fast.init_cache(2, 12)
        pieces = [fast.hidden(seq[:, :5], cache=cache)]
        pieces += [fast.hidden(seq[:, i : i + 1], cache=cache) for i in range(5, 12)]
    assert cache.weights is not None
    assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-4)
