"""Adapters of Hugging Face, x-transformers and plain models: exact under padding, caching and reordering."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lm_core.adapters import as_causal_lm
from lm_core.adapters.base import Adapter
from lm_core.adapters.huggingface import HuggingFaceCache, HuggingFaceLM
from lm_core.adapters.padding import moved_back, with_padding_first, with_padding_last
from lm_core.adapters.plain import PlainLM
from lm_core.adapters.x_transformers import XTransformersLM

VOCABULARY = 48

# The libraries' own, at import and at first use.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch\\.jit.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning"),
]

HUGGING_FACE = ["gpt2", "llama", "mistral", "gemma2", "cohere", "opt", "gpt_neox", "bloom", "mamba"]
X_TRANSFORMERS = ["absolute", "rotary", "xpos", "alibi", "t5", "flash alibi", "window"]
KINDS = [*HUGGING_FACE, *X_TRANSFORMERS]
CACHED = [kind for kind in KINDS if kind != "mamba"]


class Successors(nn.Module):
    """A causal model of absolute positions and running means, in float64, without any notion of a mask."""

    def __init__(self, dim=8):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Embedding(32, dim)
        self.out = nn.Linear(dim, VOCABULARY)
        self.double()

    def forward(self, ids):
        x = self.tokens(ids) * (1 + self.positions.weight[: ids.shape[1]])
        means = x.cumsum(dim=1) / torch.arange(1, ids.shape[1] + 1).view(1, -1, 1)
        return self.out(torch.tanh(x + means))


def assert_close(actual, expected, mask=...):
    """Equal to 1e-5 of the largest expected entry, in float32, at the real tokens."""
    scale = max(1.0, float(expected[mask].detach().abs().max()))
    torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5 * scale, rtol=0)


def random_ids(b, n, seed=0):
    return torch.randint(0, VOCABULARY, (b, n), generator=torch.Generator().manual_seed(seed))


def left_mask(n, *lengths):
    return torch.arange(n) >= n - torch.tensor(lengths).unsqueeze(-1)


@torch.no_grad()
def rows_alone(model, ids, mask, **arguments):
    """Logits of each row's real tokens by the library itself, at the columns of those tokens."""
    result = None
    for row, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        output = model(row_ids[row_mask].unsqueeze(0), **arguments)
        logits = getattr(output, "logits", output)[0]
        if result is None:
            result = logits.new_zeros(*ids.shape, logits.shape[-1])
        result[row, row_mask] = logits[-int(row_mask.sum()) :]  # a learned prompt has logits too
    return result


@torch.no_grad()
def decoded_in_steps(model, ids, mask, steps, hidden=False):
    cache = model.init_cache(ids.shape[0], ids.shape[1])
    call = model.hidden if hidden else model
    pieces, start = [], 0
    for size in steps:
        stop = start + size
        pieces.append(call(ids[:, start:stop], mask=None if mask is None else mask[:, :stop], cache=cache))
        assert cache.length == stop
        start = stop
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def assert_exact_without_cache(model, mask, **arguments):
    """Asserts that the adapter of ``model`` has no cache, and that its logits are those of each row alone."""
    adapter, ids = as_causal_lm(model), random_ids(*mask.shape)
    assert not hasattr(adapter, "init_cache")
    batched = {name: value.repeat(len(ids), 1, 1) for name, value in arguments.items()}
    assert_close(adapter(ids, mask=mask, **batched), rows_alone(model, ids, mask, **arguments), mask)
    return adapter


def assert_exact_in_any_steps(data, model):
    """Asserts that a left-padded batch, of drawn size and decoded in drawn steps, has the logits of each row alone."""
    steps = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    n, b = sum(steps), data.draw(st.integers(1, 3))
    # A prompt holds at least one token of each row.
    lengths = [data.draw(st.integers(n - steps[0] + 1, n)) for _ in range(b)]
    ids, mask = random_ids(b, n, seed=n), left_mask(n, *lengths)
    assert_close(decoded_in_steps(as_causal_lm(model), ids, mask, steps), rows_alone(model, ids, mask), mask)


def with_lora(model, *targets):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets)))


# ---------------------------------------------------------------- both libraries


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gets_the_adapter_of_its_library_which_has_its_logits(build, kind):
    model, ids = build(kind), random_ids(2, 9)
    adapter = as_causal_lm(model)
    assert isinstance(adapter, HuggingFaceLM if kind in HUGGING_FACE else XTransformersLM)
    with torch.no_grad():
        output = model(ids)
        torch.testing.assert_close(adapter(ids), getattr(output, "logits", output), atol=0, rtol=0)


@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize(("padded", "steps"), [(False, [1] * 12), (False, [5, 1, 4, 2]), (True, [7, 1, 1, 3])])
def test_cached_logits_equal_those_of_each_row_alone(build, kind, padded, steps):
    model, ids = build(kind), random_ids(3, 12)
    adapter, mask = as_causal_lm(model), left_mask(12, 12, 9, 6) if padded else None
    if kind == "gemma2" and not hasattr(adapter, "init_cache"):
        version = pytest.importorskip("transformers").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < (4, 56):
            pytest.skip(f"transformers {version} keeps a cache of fixed size, which cannot be continued")
    real = ids >= 0 if mask is None else mask
    assert_close(decoded_in_steps(adapter, ids, mask, steps), rows_alone(model, ids, real), real)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_each_row_of_a_padded_batch_equals_that_row_alone(build, kind, side):
    model, ids, mask = build(kind), random_ids(3, 10), left_mask(10, 10, 7, 3)
    if side == "right":
        mask = mask.flip(1)
    elif side == "anywhere":
        mask = torch.stack([row[torch.randperm(10, generator=torch.Generator().manual_seed(1))] for row in mask])
    with torch.no_grad():
        actual = as_causal_lm(model)(ids.masked_fill(~mask, -1), mask=mask)
    assert_close(actual, rows_alone(model, ids, mask), mask)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])  # sliding windows of 4 positions
def test_more_padding_than_a_sliding_window_leaves_a_row_as_it_is_alone(hugging_face, kind):
    adapter = as_causal_lm(hugging_face(kind))
    ids = torch.tensor([[5, 6, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 2:] = False
    together = adapter(ids, mask=mask)
    torch.testing.assert_close(together[0, :2], adapter(ids[:1, :2])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "absolute", "rotary"])
def test_a_right_padded_prompt_can_be_continued(build, kind):
    model, ids = build(kind), random_ids(2, 8)
    mask = torch.cat((left_mask(5, 5, 2).flip(1), torch.ones(2, 3, dtype=torch.bool)), dim=1)
    assert_close(decoded_in_steps(as_causal_lm(model), ids, mask, [5, 1, 2]), rows_alone(model, ids, mask), mask)


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "bloom", "absolute", "rotary", "alibi"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_after_a_reorder_equals_recomputation(build, kind, padded):
    model = as_causal_lm(build(kind))
    ids, mask = random_ids(3, 6), left_mask(6, 6, 4, 3) if padded else None
    cache = model.init_cache(3, 12)
    with torch.no_grad():
        model(ids, mask=mask, cache=cache)
        # Rows are duplicated and dropped, then the batch shrinks.
        for index in (torch.tensor([2, 0, 2, 1]), torch.tensor([3, 0])):
            cache.reorder(index)
            new = random_ids(len(index), 2, seed=len(index))
            ids = torch.cat((ids[index], new), dim=1)
            if mask is not None:
                mask = torch.cat((mask[index], torch.ones_like(new, dtype=torch.bool)), dim=1)
            assert_close(model(new, mask=mask, cache=cache), model(ids, mask=mask)[:, -2:])
    assert cache.batch_size == 2


@pytest.mark.parametrize("kind", ["llama", "mistral", "absolute", "rotary", "alibi"])
def test_a_clone_of_a_cache_is_independent(build, kind):
    model = as_causal_lm(build(kind))
    ids, mask = random_ids(2, 8), left_mask(8, 8, 5)
    cache = model.init_cache(2, 12)
    with torch.no_grad():
        model(ids[:, :5], mask=mask[:, :5], cache=cache)
        clone = cache.clone()
        model(ids[:, 5:].flip(0), mask=mask, cache=cache)
        cache.reorder(torch.tensor([1]))
        assert_close(model(ids[:, 5:], mask=mask, cache=clone), model(ids, mask=mask)[:, 5:])
    assert (clone.length, clone.batch_size, cache.batch_size) == (8, 2, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("cohere", "gemma2")] + ["tied", "projected"])
def test_hidden_times_output_weight_gives_the_logits(build, decoder, kind):
    tied = {"tied": {"tie_embedding": True}, "projected": {"tie_embedding": True, "emb_dim": 32}}
    adapter = as_causal_lm(decoder("rotary", **tied[kind]) if kind in tied else build(kind))
    ids, mask = random_ids(3, 9), left_mask(9, 9, 6, 4)
    with torch.no_grad():
        logits = adapter.hidden(ids, mask=mask) @ adapter.output_weight.T
        assert_close(logits, adapter(ids, mask=mask), mask)
    if hasattr(adapter, "init_cache"):
        assert_close(decoded_in_steps(adapter, ids, mask, [6, 3], hidden=True) @ adapter.output_weight.T, logits, mask)


@pytest.mark.parametrize(
    "kind", ["cohere", "gemma2", "bias", "LoRA", "mixture_of_softmax", "sigsoftmax_logits", "to_logits"]
)
def test_no_hidden_where_logits_are_more_than_a_product(hugging_face, decoder, kind):
    if kind in ("cohere", "gemma2"):
        model = hugging_face(kind)
        with torch.no_grad():
            # Logits so small that a cap of 30 changes none of them in float32.
            for parameter in model.parameters():
                parameter.mul_(1e-2)
    elif kind == "bias":
        model = hugging_face("llama")
        model.lm_head = nn.Linear(32, VOCABULARY, bias=True)
    elif kind == "LoRA":
        model = with_lora(hugging_face("llama"), "q_proj", "lm_head")
    else:
        model = decoder(**{kind: nn.Linear(32, VOCABULARY) if kind == "to_logits" else True})
    adapter = as_causal_lm(model)
    assert not hasattr(adapter, "hidden")
    assert not hasattr(adapter, "output_weight")


# ---------------------------------------------------------------- Hugging Face


def test_a_cache_of_nested_tuples_is_reordered_and_cloned_too():
    # What transformers before its cache objects hands back.
    cache = HuggingFaceCache(3)
    cache.transformers_cache = tuple((torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)) for _ in range(2))
    before, clone = cache.transformers_cache, cache.clone()
    cache.reorder(torch.tensor([2, 0]))
    for layer, copied, old in zip(cache.transformers_cache, clone.transformers_cache, before, strict=True):
        for tensor, copied_tensor, old_tensor in zip(layer, copied, old, strict=True):
            assert torch.equal(tensor, old_tensor[[2, 0]])
            assert torch.equal(copied_tensor, old_tensor)
    assert (cache.batch_size, clone.batch_size) == (2, 3)


def test_a_recurrent_model_or_one_that_counts_positions_its_own_way_is_decoded_without_a_cache(hugging_face):
    adapter = as_causal_lm(hugging_face("mamba"))
    assert not hasattr(adapter, "init_cache")
    assert "uncached (it is recurrent)" in repr(adapter)
    assert not hasattr(as_causal_lm(hugging_face("roberta", is_decoder=True)), "init_cache")


def test_a_model_that_cannot_read_its_cache_is_decoded_without_one(hugging_face):
    class Forgetful(pytest.importorskip("transformers").GPT2LMHeadModel):
        def forward(self, input_ids, past_key_values=None, position_ids=None, **kwargs):
            if past_key_values is not None:
                raise RuntimeError("no way back")
            return super().forward(input_ids, position_ids=position_ids, **kwargs)

    adapter = as_causal_lm(hugging_face("gpt2", Forgetful))
    assert not hasattr(adapter, "init_cache")
    assert "its cache fails with RuntimeError: no way back" in repr(adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_decode_incrementally_too(hugging_face, dtype):
    adapter = as_causal_lm(hugging_face("llama").to(dtype))
    assert hasattr(adapter, "init_cache")
    assert hasattr(adapter, "hidden")
    assert adapter(random_ids(1, 3)).dtype == dtype


def test_rounding_of_half_precision_is_no_reason_against_a_cache(hugging_face):
    model = hugging_face("llama").bfloat16()
    generator = torch.Generator().manual_seed(0)

    def rounded(module, arguments, output):
        noise = torch.randn(output.shape, generator=generator)
        return output + (0.05 * output.float().std() * noise).to(output.dtype)

    # single logits are then off by a fifth of the spread
    model.model.norm.register_forward_hook(rounded)
    assert hasattr(as_causal_lm(model), "init_cache")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cache_that_forgets_a_token_is_found_in_any_precision(hugging_face, dtype):
    class Forgetful(pytest.importorskip("transformers").GPT2LMHeadModel):
        def forward(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
            if past_key_values is not None and past_key_values.get_seq_length():
                attention_mask = attention_mask.clone()
                attention_mask[:, 2] = 0
            return super().forward(input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)

    adapter = as_causal_lm(hugging_face("gpt2", Forgetful).to(dtype))
    assert "its cached logits differ from its uncached ones" in repr(adapter)


def test_wrapping_leaves_the_model_and_the_random_state_alone(hugging_face):
    model = hugging_face("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random.seed(0)
    torch.manual_seed(0)
    expected = (torch.rand(3), random.random())
    random.seed(0)
    torch.manual_seed(0)
    # A model may draw in evaluation mode too.
    handle = model.register_forward_hook(lambda *call: None if torch.rand(1) < 2 else call)
    as_causal_lm(model)
    handle.remove()
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_parameters_are_shared_and_modes_pass_through(hugging_face):
    model = hugging_face("gpt2")
    adapter = as_causal_lm(model)
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in model.parameters()]
    assert set(adapter.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    for mode in (True, False):
        adapter.train(mode)
        assert model.training == model.transformer.h[0].training == mode
    assert (adapter.vocab_size, adapter.max_length, adapter.device) == (VOCABULARY, 32, torch.device("cpu"))
    assert adapter.config is model.config


def test_a_copy_of_an_adapter_has_parameters_of_its_own(hugging_face):
    adapter = as_causal_lm(hugging_face("llama"))
    twin = copy.deepcopy(adapter)
    ids = random_ids(1, 4)
    with torch.no_grad():
        before = twin(ids)
        for parameter in adapter.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(ids), before, atol=0, rtol=0)
        assert_close(twin.hidden(ids) @ twin.output_weight.T, before)


def test_gradients_of_a_padded_batch_are_the_sum_of_the_rows_alone(hugging_face):
    model = hugging_face("llama").double()
    adapter = as_causal_lm(model)
    ids, mask = random_ids(3, 8), left_mask(8, 8, 5, 2)
    adapter(ids, mask=mask)[mask].square().sum().backward()
    actual = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, row_mask in zip(ids, mask, strict=True):
        model(row[row_mask].unsqueeze(0)).logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), actual, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-9, rtol=1e-9)


def test_a_lora_model_goes_through_its_adapters(hugging_face):
    model = with_lora(hugging_face("llama"), "q_proj", "v_proj")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    adapter = as_causal_lm(model.eval())
    ids, mask = random_ids(2, 9), left_mask(9, 9, 5)
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, expected, atol=0.1)
        torch.testing.assert_close(adapter(ids), expected, atol=0, rtol=0)
        assert_close(adapter.hidden(ids) @ adapter.output_weight.T, expected)
    assert_close(decoded_in_steps(adapter, ids, None, [3, 1, 5]), expected)
    assert_close(decoded_in_steps(adapter, ids, mask, [6, 3]), rows_alone(model, ids, mask), mask)


def test_a_learned_prompt_is_decoded_without_a_cache(hugging_face):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapter = assert_exact_without_cache(peft.get_peft_model(hugging_face("gpt2"), config).eval(), left_mask(6, 6, 3))
    assert not hasattr(adapter, "hidden")
    assert adapter.max_length == 32 - 3


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_any_hugging_face_model_decodes_any_left_padded_batch_in_any_steps(hugging_face, data):
    name = data.draw(st.sampled_from(["gpt2", "llama", "mistral"]))
    heads, layers = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 3))
    if name == "gpt2":
        options = {"n_embd": 4 * heads, "n_head": heads, "n_layer": layers}
    else:
        options = {
            "hidden_size": 4 * heads,
            "num_attention_heads": heads,
            "num_key_value_heads": data.draw(st.sampled_from([h for h in (1, 2, 4) if h <= heads])),
            "num_hidden_layers": layers,
            "intermediate_size": 8,
        }
    if name == "mistral":
        options["sliding_window"] = data.draw(st.integers(2, 12))
    assert_exact_in_any_steps(data, hugging_face(name, **options))


# ---------------------------------------------------------------- x-transformers


@pytest.mark.parametrize(
    ("layer_options", "options"),
    [
        ({"pre_and_post_norm": True}, {"looped": True}),
        ({"shift_tokens": 1}, {}),
        ({"attn_data_dependent_alibi": True}, {}),
        ({"attn_sparse_topk": 1}, {}),
        ({"rotary_pos_emb": True, "attn_num_mem_kv": 2}, {}),
        ({}, {"num_memory_tokens": 2}),
        ({}, {"scaled_sinu_pos_emb": True}),
    ],
    ids=["looped", "token shift", "forgetting", "sparse", "memory keys", "memory tokens", "sinusoidal"],
)
def test_what_a_cache_would_get_wrong_is_decoded_without_one(decoder, layer_options, options):
    assert_exact_without_cache(decoder(layer_options=layer_options, **options), left_mask(9, 9, 6, 4))


def test_a_decoder_with_cross_attention_is_decoded_without_a_cache(decoder):
    context = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))
    assert_exact_without_cache(decoder(layer_options={"cross_attend": True}), left_mask(7, 7, 4), context=context)


def test_a_part_of_the_users_own_is_decoded_without_a_cache(decoder):
    class Smoothed(nn.Linear):
        def forward(self, x):
            return super().forward(x.cumsum(dim=1))

    net = decoder()
    net.attn_layers.final_norm = Smoothed(32, 32)
    assert not hasattr(as_causal_lm(net), "init_cache")


def test_an_autoregressive_wrapper_is_taken_by_its_network(decoder):
    net = decoder("rotary")
    adapter = as_causal_lm(pytest.importorskip("x_transformers").AutoregressiveWrapper(net))
    assert adapter.model is net
    ids = random_ids(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(adapter(ids), net(ids), atol=0, rtol=0)
    assert set(adapter.state_dict()) == {f"model.{name}" for name in net.state_dict()}
    assert (adapter.vocab_size, adapter.max_length) == (VOCABULARY, None)


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_any_x_transformers_model_decodes_any_left_padded_batch_in_any_steps(decoder, data):
    positions = data.draw(st.sampled_from(sorted(X_TRANSFORMERS)))
    flags = ("ff_glu", "use_rmsnorm", "attn_qk_norm", "sandwich_norm", "attn_gate_values", "gate_residual")
    options = {flag: True for flag in flags if data.draw(st.booleans())}
    options["depth"] = data.draw(st.integers(1, 3))
    if positions not in ("rotary", "xpos", "window"):
        options["attn_num_mem_kv"] = data.draw(st.integers(0, 2))
    assert_exact_in_any_steps(data, decoder(positions, options))


# ---------------------------------------------------------------- plain callables


@given(data=st.data())
def test_each_row_under_any_mask_equals_its_real_tokens_alone(data):
    torch.manual_seed(0)
    model = Successors()
    b, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    bits = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b))
    ids, mask = random_ids(b, n, seed=n), torch.tensor(bits)
    with torch.no_grad():
        actual = as_causal_lm(model)(ids, mask=mask)
    torch.testing.assert_close(actual[mask], rows_alone(model, ids, mask)[mask], atol=1e-12, rtol=1e-12)


def test_a_function_becomes_a_module_without_a_cache():
    model, ids = Successors(), random_ids(2, 5)
    adapter = as_causal_lm(lambda ids, scale=1.0: SimpleNamespace(logits=model(ids) * scale), vocab_size=VOCABULARY)
    assert isinstance(adapter, nn.Module)
    assert isinstance(adapter, PlainLM)
    assert list(adapter.parameters()) == []
    assert not any(hasattr(adapter, name) for name in ("init_cache", "hidden", "output_weight"))
    assert (adapter.vocab_size, adapter.device) == (VOCABULARY, torch.device("cpu"))
    torch.testing.assert_close(adapter(ids), model(ids), atol=0, rtol=0)
    torch.testing.assert_close(adapter(ids, scale=2.0), model(ids) * 2)


def test_a_model_may_view_its_ids():
    adapter = as_causal_lm(lambda ids: nn.functional.one_hot(ids.view(-1), VOCABULARY).view(*ids.shape, -1).double())
    ids = random_ids(3, 8)[:, 2:5]
    assert torch.equal(adapter(ids).argmax(dim=-1), ids)


def test_a_modules_parameters_are_shared_and_gradients_reach_real_tokens_only():
    model = Successors()
    ids, mask = torch.tensor([[7, 1, 2], [3, 4, 5]]), torch.tensor([[False, True, True], [True, True, True]])
    adapter = as_causal_lm(model)
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in model.parameters()]
    assert not adapter.eval().model.training
    adapter(ids, mask=mask)[mask].sum().backward()
    touched = model.tokens.weight.grad.abs().sum(dim=-1).nonzero().flatten()
    assert touched.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("last", [True, False])
def test_realigned_rows_keep_the_order_of_their_tokens_and_come_back(last):
    ids, mask = torch.arange(600).view(2, 300), torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    realigned = with_padding_last(ids, mask) if last else with_padding_first(ids, mask)
    for row in range(2):
        real, padding = ids[row][mask[row]].tolist(), [False] * int((~mask[row]).sum())
        assert realigned.ids[row][realigned.mask[row]].tolist() == real
        expected = [True] * len(real) + padding if last else padding + [True] * len(real)
        assert realigned.mask[row].tolist() == expected
    assert torch.equal(moved_back(realigned.ids.unsqueeze(-1).double(), realigned).squeeze(-1).long(), ids)


def test_wrapping_twice_is_wrapping_once(hugging_face, decoder):
    for model in (hugging_face("llama"), hugging_face("mamba"), decoder(), Successors(), lambda ids: ids):
        adapter = as_causal_lm(model)
        assert isinstance(adapter, Adapter)
        assert as_causal_lm(adapter) is adapter


def test_what_already_has_init_cache_is_returned_as_it_is():
    model = SimpleNamespace(init_cache=lambda batch_size, max_length: None)
    assert as_causal_lm(model) is model


# ---------------------------------------------------------------- bad input


@pytest.mark.plain
@pytest.mark.parametrize(
    ("x", "words"), [(3, "got int"), ("gpt2", "got str"), (None, "got NoneType"), (nn.Linear, "class Linear")]
)
def test_what_is_no_model_is_refused(x, words):
    with pytest.raises(TypeError, match=words):
        as_causal_lm(x)


@pytest.mark.plain
def test_a_vocabulary_size_that_is_not_the_models_is_refused(hugging_face):
    with pytest.raises(ValueError, match=f"vocab_size must be {VOCABULARY} for this LlamaForCausalLM, got 7"):
        as_causal_lm(hugging_face("llama"), vocab_size=7)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        as_causal_lm(Successors(), vocab_size=0)
    with pytest.raises(TypeError, match="vocab_size"):
        as_causal_lm(Successors(), vocab_size="48")


T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


@pytest.mark.plain
def test_models_of_hugging_face_that_are_no_causal_language_models_are_refused(hugging_face):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(TypeError, match="BertLMHeadModel is not causal"):
        as_causal_lm(hugging_face("bert"))
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        as_causal_lm(transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **T5)))
    with pytest.raises(TypeError, match="GPT2Model has no language-modelling head"):
        as_causal_lm(hugging_face("gpt2").transformer)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hugging_face("llama").config)
    with pytest.raises(ValueError, match="LlamaForCausalLM must have its weights loaded"):
        as_causal_lm(model)


@pytest.mark.plain
def test_encoders_of_x_transformers_are_refused():
    x_transformers = pytest.importorskip("x_transformers")
    encoder = x_transformers.Encoder(dim=8, depth=1, heads=1)
    with pytest.raises(TypeError, match="Encoder of x-transformers is not causal"):
        as_causal_lm(x_transformers.TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=encoder))
    with pytest.raises(TypeError, match="Encoder of x-transformers is no language model"):
        as_causal_lm(encoder)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("layer_options", "options", "words"),
    [
        ({}, {"return_only_embed": True}, "return_only_embed=True has no logits"),
        ({}, {"num_output_heads": 2}, "num_output_heads > 1"),
        ({}, {"average_pool_embed": True}, "average_pool_embed"),
        ({"orthog_residual": True}, {}, "OrthogonalResidualUpdate mixes in later tokens"),
        ({"rotary_xpos": True, "attn_num_mem_kv": 1}, {}, "logits depend on the length"),
    ],
)
def test_decoders_that_are_no_causal_language_models_are_refused(decoder, layer_options, options, words):
    with pytest.raises(TypeError, match=words):
        as_causal_lm(decoder(layer_options=layer_options, **options))


ID = torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("ids", "mask", "error", "words"),
    [
        ([[1, 2]], None, TypeError, "ids must hold integer token ids, got list"),
        (torch.zeros(1, 2), None, TypeError, "ids must hold integer token ids, got torch.float32"),
        (ID[0], None, ValueError, r"ids must have shape \(b, n\), got \(2,\)"),
        (ID + VOCABULARY, None, ValueError, rf"ids must hold token ids in \[0, {VOCABULARY}\), got 48"),
        (ID - 1, None, ValueError, "got -1"),
        (torch.zeros(1, 33, dtype=torch.long), None, ValueError, "ids must end within 32 positions, got 33"),
        (ID, torch.ones(1, 2), TypeError, "mask must be boolean"),
        (ID, [[True, True]], TypeError, "mask must be boolean, got list"),
        (ID, torch.ones(1, 3, dtype=torch.bool), ValueError, r"mask must have shape \(1, 2\), got \(1, 3\)"),
    ],
)
def test_ids_and_masks_that_do_not_fit_are_refused(hugging_face, ids, mask, error, words):
    adapter = as_causal_lm(hugging_face("gpt2"))
    cache = adapter.init_cache(1, 40)
    for arguments in ({}, {"cache": cache}):
        with pytest.raises(error, match=words):
            adapter(ids, mask=mask, **arguments)
    assert cache.length == 0


@pytest.mark.plain
def test_caches_that_do_not_fit_are_refused(hugging_face, decoder):
    ids = random_ids(2, 3)
    adapter = as_causal_lm(hugging_face("llama"))
    with pytest.raises(ValueError, match="cache holds 3 rows, got ids of 2"):
        adapter(ids, cache=adapter.init_cache(3, 8))
    with pytest.raises(TypeError, match="cache must come from this model's init_cache, got dict"):
        adapter(ids, cache={})
    with pytest.raises(TypeError, match="got XTransformersCache"):
        adapter(ids, cache=as_causal_lm(decoder()).init_cache(2, 8))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        adapter.init_cache(0, 8)
    for model in (Successors(), hugging_face("mamba")):
        name = type(model).__name__
        with pytest.raises(TypeError, match=f"cache must be None: an adapted {name} has no init_cache"):
            as_causal_lm(model)(ids, cache=adapter.init_cache(2, 8))


@pytest.mark.plain
def test_padding_between_cached_tokens_is_refused(hugging_face):
    adapter = as_causal_lm(hugging_face("mistral"))
    cache = adapter.init_cache(1, 8)
    adapter(random_ids(1, 3), cache=cache)
    mask = torch.tensor([[True, True, True, False, True]])
    with pytest.raises(ValueError, match="mask must not have padding between the real tokens"):
        adapter(random_ids(1, 2), mask=mask, cache=cache)
    assert cache.length == 3


@pytest.mark.plain
def test_a_cache_while_gradient_checkpointing_disables_it_is_refused(hugging_face):
    model = hugging_face("llama")
    adapter = as_causal_lm(model)
    # The older name is deprecated, the newer one is not there in older versions.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        adapter(random_ids(1, 3), cache=adapter.init_cache(1, 8))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda ids: (ids,), TypeError, "must return logits as a tensor, got tuple"),
        (lambda ids: ids.float(), ValueError, r"shape \(b, n, v\) for ids of shape \(2, 3\), got \(2, 3\)"),
        (lambda ids: torch.zeros(2, 1, 5), ValueError, r"got \(2, 1, 5\)"),
    ],
)
def test_callables_that_return_something_else_are_refused(function, error, words):
    with pytest.raises(error, match=words):
        as_causal_lm(function)(random_ids(2, 3))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "rotary", "absolute", "alibi"])
def test_a_left_padded_batch_decodes_on_a_gpu_as_each_row_alone(build, kind):
    model = build(kind)
    adapter = as_causal_lm(model.cuda())
    assert adapter.device.type == "cuda"
    ids, mask = random_ids(3, 12), left_mask(12, 12, 9, 6)
    actual = decoded_in_steps(adapter, ids.cuda(), mask.cuda(), [7, 1, 1, 3]).cpu()
    # The GPU sums in another order.
    torch.testing.assert_close(actual[mask], rows_alone(model.cpu(), ids, mask)[mask], atol=1e-4, rtol=0)
