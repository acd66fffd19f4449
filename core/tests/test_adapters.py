"""Adapters of Hugging Face, x-transformers and plain models: exact under padding, caching and reordering."""

import copy
import random
import subprocess
import sys

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

HUGGING_FACE = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "cohere": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
}
WITHOUT_CACHE = ("mamba",)
WITHOUT_HIDDEN = ("cohere", "gemma2")
WITH_CACHE = [name for name in HUGGING_FACE if name not in WITHOUT_CACHE]

X_TRANSFORMERS = {
    "absolute": {},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True},
    "t5": {"rel_pos_bias": True},
    "flash alibi": {"alibi_pos_bias": True, "attn_flash": True},
    "window": {"rotary_pos_emb": True, "attn_max_attend_past": 3, "attn_kv_heads": 2},
}


def enlarged(model):
    """Weights large enough for a wrong mask or position to show far above rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def hugging_face_config(name, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if name in ("gpt2", "bloom", "mamba"):
        for size in ("num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
            del sizes[size]
    if name == "gpt2":
        del sizes["hidden_size"]
    if name == "mamba":
        sizes["num_hidden_layers"] = 2
    # What a model caches by itself is not tested here, and fails in some versions.
    sizes["use_cache"] = False
    return transformers.AutoConfig.for_model(name, **{**sizes, **HUGGING_FACE.get(name, {}), **options})


@pytest.fixture(scope="module")
def hugging_face():
    """A function from the name of an architecture to a tiny model of it."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()

    def build(name, **options):
        return enlarged(transformers.AutoModelForCausalLM.from_config(hugging_face_config(name, **options)))

    return build


@pytest.fixture(scope="module")
def decoder():
    """A function from options of x-transformers to a tiny decoder."""
    x_transformers = pytest.importorskip("x_transformers")

    def build(layer_options, **options):
        layers = x_transformers.Decoder(**{"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, **layer_options})
        options = {"num_tokens": VOCABULARY, "max_seq_len": 32, **options}
        return enlarged(x_transformers.TransformerWrapper(attn_layers=layers, **options))

    # Options come with versions.
    def build_where_it_exists(layer_options, **options):
        try:
            return build(layer_options, **options)
        except (AssertionError, TypeError) as error:
            if "unrecognized" in str(error) or "unexpected" in str(error):
                pytest.skip(f"this version of x-transformers has no such option: {error}")
            raise

    return build_where_it_exists


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


def assert_close(actual, expected):
    """Equal to 1e-5 of the largest expected entry, in float32."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, atol=1e-5 * scale, rtol=0)


def random_ids(b, n, seed=0):
    return torch.randint(0, VOCABULARY, (b, n), generator=torch.Generator().manual_seed(seed))


def left_mask(n, *lengths):
    return torch.arange(n) >= n - torch.tensor(lengths).unsqueeze(-1)


@torch.no_grad()
def rows_alone(model, ids, mask):
    """Logits of each row's real tokens, put where those tokens are."""
    result = None
    for row, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        logits = model(row_ids[row_mask].unsqueeze(0))[0]
        if result is None:
            result = logits.new_zeros(*ids.shape, logits.shape[-1])
        result[row, row_mask] = logits
    return result


@torch.no_grad()
def decoded_in_steps(model, ids, mask, steps, hidden=False):
    cache = model.init_cache(ids.shape[0], ids.shape[1])
    call = model.hidden if hidden else model
    pieces, start = [], 0
    for size in steps:
        stop = start + size
        given = None if mask is None else mask[:, :stop]
        pieces.append(call(ids[:, start:stop], mask=given, cache=cache))
        assert cache.length == stop
        start = stop
    return torch.cat(pieces, dim=1)


def skip_where_gemma_has_no_growing_cache(name, adapter):
    """Older transformers give Gemma 2 a cache of fixed size, which cannot be continued."""
    if name == "gemma2" and not hasattr(adapter, "init_cache"):
        import transformers

        if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 56):
            pytest.skip(f"transformers {transformers.__version__} keeps a cache of fixed size")


class TestHuggingFace:
    @pytest.mark.parametrize("name", HUGGING_FACE)
    def test_logits_are_those_of_the_model(self, hugging_face, name):
        model = hugging_face(name)
        ids = random_ids(2, 9)
        with torch.no_grad():
            torch.testing.assert_close(as_causal_lm(model)(ids), model(ids).logits, atol=0, rtol=0)

    @pytest.mark.parametrize("name", WITH_CACHE)
    @pytest.mark.parametrize("steps", [[1] * 11, [5, 1, 3, 2]])
    def test_cached_logits_equal_uncached_logits(self, hugging_face, name, steps):
        model = hugging_face(name)
        ids = random_ids(2, 11)
        with torch.no_grad():
            expected = model(ids).logits
        adapter = as_causal_lm(model)
        skip_where_gemma_has_no_growing_cache(name, adapter)
        assert_close(decoded_in_steps(adapter, ids, None, steps), expected)

    @pytest.mark.parametrize("name", HUGGING_FACE)
    @pytest.mark.parametrize("side", ["left", "right", "anywhere"])
    def test_each_row_of_a_padded_batch_equals_that_row_alone(self, hugging_face, name, side):
        model = hugging_face(name)
        ids, mask = random_ids(3, 10), left_mask(10, 10, 7, 3)
        if side == "right":
            mask = mask.flip(1)
        elif side == "anywhere":
            mask = torch.stack([row[torch.randperm(10, generator=torch.Generator().manual_seed(1))] for row in mask])
        with torch.no_grad():
            actual = as_causal_lm(model)(ids.masked_fill(~mask, -1), mask=mask)
        expected = rows_alone(lambda row: model(row).logits, ids, mask)
        assert_close(actual[mask], expected[mask])

    @pytest.mark.parametrize("name", WITH_CACHE)
    def test_each_row_of_a_left_padded_batch_decoded_in_steps_equals_that_row_alone(self, hugging_face, name):
        model = hugging_face(name)
        ids, mask = random_ids(3, 12), left_mask(12, 12, 9, 6)
        adapter = as_causal_lm(model)
        skip_where_gemma_has_no_growing_cache(name, adapter)
        actual = decoded_in_steps(adapter, ids, mask, [7, 1, 1, 3])
        expected = rows_alone(lambda row: model(row).logits, ids, mask)
        assert_close(actual[mask], expected[mask])

    @pytest.mark.parametrize("name", ["gpt2", "mistral"])
    def test_a_right_padded_prompt_can_be_continued(self, hugging_face, name):
        model = hugging_face(name)
        ids, prompt_mask = random_ids(2, 8), left_mask(5, 5, 2).flip(1)
        mask = torch.cat((prompt_mask, torch.ones(2, 3, dtype=torch.bool)), dim=1)
        actual = decoded_in_steps(as_causal_lm(model), ids, mask, [5, 1, 2])
        expected = rows_alone(lambda row: model(row).logits, ids, mask)
        assert_close(actual[mask], expected[mask])

    @pytest.mark.parametrize("name", ["gpt2", "mistral", "bloom"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_decoding_after_a_reorder_equals_recomputation(self, hugging_face, name, padded):
        model = as_causal_lm(hugging_face(name))
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
                actual = model(new, mask=mask, cache=cache)
                assert_close(actual, model(ids, mask=mask)[:, -2:])
        assert cache.batch_size == 2

    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_a_clone_of_a_cache_is_independent(self, hugging_face, name):
        model = as_causal_lm(hugging_face(name))
        ids, mask = random_ids(2, 8), left_mask(8, 8, 5)
        cache = model.init_cache(2, 12)
        with torch.no_grad():
            model(ids[:, :5], mask=mask[:, :5], cache=cache)
            clone = cache.clone()
            model(ids[:, 5:].flip(0), mask=mask, cache=cache)
            cache.reorder(torch.tensor([1]))
            actual = model(ids[:, 5:], mask=mask, cache=clone)
            assert_close(actual, model(ids, mask=mask)[:, 5:])
        assert (clone.length, clone.batch_size, cache.batch_size) == (8, 2, 1)

    def test_a_cache_of_nested_tuples_is_reordered_and_cloned_too(self):
        # What transformers before its cache objects hands back.
        cache = HuggingFaceCache(3)
        cache.past = tuple((torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)) for _ in range(2))
        before, clone = cache.past, cache.clone()
        cache.reorder(torch.tensor([2, 0]))
        for layer, old in zip(cache.past, before, strict=True):
            for tensor, old_tensor in zip(layer, old, strict=True):
                assert torch.equal(tensor, old_tensor[[2, 0]])
        assert all(
            torch.equal(a, b)
            for new, old in zip(clone.past, before, strict=True)
            for a, b in zip(new, old, strict=True)
        )
        assert (cache.batch_size, clone.batch_size) == (2, 3)

    @pytest.mark.parametrize("name", [name for name in HUGGING_FACE if name not in WITHOUT_HIDDEN])
    def test_hidden_times_output_weight_gives_the_logits(self, hugging_face, name):
        model = hugging_face(name)
        adapter = as_causal_lm(model)
        ids, mask = random_ids(3, 9), left_mask(9, 9, 6, 2)
        with torch.no_grad():
            logits = adapter.hidden(ids, mask=mask) @ adapter.output_weight.T
            assert_close(logits[mask], adapter(ids, mask=mask)[mask])
        if hasattr(adapter, "init_cache"):
            stepped = decoded_in_steps(adapter, ids, mask, [4, 5], hidden=True) @ adapter.output_weight.T
            assert_close(stepped[mask], logits[mask])

    @pytest.mark.parametrize("name", WITHOUT_HIDDEN)
    def test_no_hidden_where_logits_are_scaled_or_capped(self, hugging_face, name):
        model = hugging_face(name)
        with torch.no_grad():
            # Logits so small that a cap of 30 changes none of them in float32.
            for parameter in model.parameters():
                parameter.mul_(1e-2)
        adapter = as_causal_lm(model)
        assert not hasattr(adapter, "hidden")
        assert not hasattr(adapter, "output_weight")

    def test_no_hidden_where_the_output_layer_has_a_bias(self, hugging_face):
        model = hugging_face("llama")
        model.lm_head = nn.Linear(32, VOCABULARY, bias=True)
        assert not hasattr(as_causal_lm(model), "hidden")

    @pytest.mark.parametrize("name", WITHOUT_CACHE)
    def test_a_recurrent_model_is_decoded_without_a_cache(self, hugging_face, name):
        adapter = as_causal_lm(hugging_face(name))
        assert not hasattr(adapter, "init_cache")
        assert "uncached (it is recurrent)" in repr(adapter)

    def test_a_model_that_counts_positions_its_own_way_is_decoded_without_a_cache(self, hugging_face):
        adapter = as_causal_lm(hugging_face("roberta", is_decoder=True))
        assert not hasattr(adapter, "init_cache")

    def test_a_model_that_cannot_read_its_cache_is_decoded_without_one(self):
        transformers = pytest.importorskip("transformers")

        class Forgetful(transformers.GPT2LMHeadModel):
            def forward(self, input_ids, past_key_values=None, position_ids=None, **kwargs):
                if past_key_values is not None:
                    raise RuntimeError("no way back")
                return super().forward(input_ids, position_ids=position_ids, **kwargs)

        adapter = as_causal_lm(enlarged(Forgetful(hugging_face_config("gpt2"))))
        assert not hasattr(adapter, "init_cache")
        assert "its cache fails with RuntimeError: no way back" in repr(adapter)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes_decode_incrementally_too(self, hugging_face, dtype):
        adapter = as_causal_lm(hugging_face("llama").to(dtype))
        assert hasattr(adapter, "init_cache")
        assert hasattr(adapter, "hidden")
        assert adapter(random_ids(1, 3)).dtype == dtype

    def test_wrapping_leaves_the_model_and_the_random_state_alone(self, hugging_face):
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

    def test_parameters_are_shared_and_modes_pass_through(self, hugging_face):
        model = hugging_face("gpt2")
        adapter = as_causal_lm(model)
        assert [id(p) for p in adapter.parameters()] == [id(p) for p in model.parameters()]
        assert set(adapter.state_dict()) == {f"model.{name}" for name in model.state_dict()}
        adapter.train()
        assert model.training
        assert model.transformer.h[0].training
        adapter.eval()
        assert not model.transformer.h[0].training
        assert (adapter.vocab_size, adapter.max_length, adapter.device) == (VOCABULARY, 32, torch.device("cpu"))
        assert adapter.config is model.config

    def test_a_copy_of_an_adapter_has_parameters_of_its_own(self, hugging_face):
        adapter = as_causal_lm(hugging_face("llama"))
        twin = copy.deepcopy(adapter)
        ids = random_ids(1, 4)
        with torch.no_grad():
            before = twin(ids)
            for parameter in adapter.parameters():
                parameter.zero_()
            torch.testing.assert_close(twin(ids), before, atol=0, rtol=0)
            assert_close(twin.hidden(ids) @ twin.output_weight.T, before)

    def test_gradients_of_a_padded_batch_are_the_sum_of_the_rows_alone(self, hugging_face):
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

    def test_a_lora_model_goes_through_its_adapters(self, hugging_face):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        model = enlarged(peft.get_peft_model(hugging_face("llama"), config))
        adapter = as_causal_lm(model)
        ids, mask = random_ids(2, 9), left_mask(9, 9, 5)
        with torch.no_grad():
            expected = model(ids).logits
            with model.disable_adapter():
                assert not torch.allclose(model(ids).logits, expected, atol=0.1)
            torch.testing.assert_close(adapter(ids), expected, atol=0, rtol=0)
            assert_close(adapter.hidden(ids) @ adapter.output_weight.T, expected)
        assert_close(decoded_in_steps(adapter, ids, None, [3, 1, 5]), expected)
        stepped = decoded_in_steps(adapter, ids, mask, [6, 3])
        expected = rows_alone(lambda row: model(row).logits, ids, mask)
        assert_close(stepped[mask], expected[mask])

    def test_a_lora_on_the_output_layer_withdraws_hidden(self, hugging_face):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
        adapter = as_causal_lm(peft.get_peft_model(hugging_face("llama"), config))
        assert not hasattr(adapter, "hidden")

    def test_a_learned_prompt_is_decoded_without_a_cache(self, hugging_face):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = enlarged(peft.get_peft_model(hugging_face("gpt2"), config))
        adapter = as_causal_lm(model)
        assert not hasattr(adapter, "init_cache")
        assert not hasattr(adapter, "hidden")
        assert adapter.max_length == 32 - 3
        ids, mask = random_ids(2, 6), left_mask(6, 6, 3)
        with torch.no_grad():
            actual = adapter(ids, mask=mask)
        expected = rows_alone(lambda row: model(row).logits[:, 3:], ids, mask)
        assert_close(actual[mask], expected[mask])

    @given(data=st.data())
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test_any_configuration_decodes_any_left_padded_batch_in_any_steps(self, hugging_face, data):
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
        model = hugging_face(name, **options)
        steps = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
        n, b = sum(steps), data.draw(st.integers(1, 3))
        # A prompt holds at least one token of each row.
        lengths = [data.draw(st.integers(n - steps[0] + 1, n)) for _ in range(b)]
        ids, mask = random_ids(b, n, seed=n), left_mask(n, *lengths)
        actual = decoded_in_steps(as_causal_lm(model), ids, mask, steps)
        expected = rows_alone(lambda row: model(row).logits, ids, mask)
        assert_close(actual[mask], expected[mask])


class TestXTransformers:
    @pytest.mark.parametrize("name", X_TRANSFORMERS)
    @pytest.mark.parametrize("padded", [False, True])
    def test_cached_logits_equal_each_row_alone(self, decoder, name, padded):
        net = decoder(X_TRANSFORMERS[name])
        adapter = as_causal_lm(net)
        assert isinstance(adapter, XTransformersLM)
        ids = random_ids(3, 12)
        mask = left_mask(12, 12, 9, 6) if padded else torch.ones(3, 12, dtype=torch.bool)
        expected = rows_alone(net, ids, mask)
        actual = decoded_in_steps(adapter, ids, mask if padded else None, [7, 1, 1, 3])
        assert_close(actual[mask], expected[mask])
        with torch.no_grad():
            actual = adapter(ids, mask=mask)
        assert_close(actual[mask], expected[mask])

    @pytest.mark.parametrize("name", ["absolute", "rotary", "alibi"])
    def test_decoding_after_a_reorder_equals_recomputation(self, decoder, name):
        model = as_causal_lm(decoder(X_TRANSFORMERS[name]))
        ids, mask = random_ids(3, 6), left_mask(6, 6, 4, 3)
        cache = model.init_cache(3, 12)
        with torch.no_grad():
            model(ids, mask=mask, cache=cache)
            for index in (torch.tensor([2, 0, 2, 1]), torch.tensor([3, 0])):
                cache.reorder(index)
                new = random_ids(len(index), 2, seed=len(index))
                ids = torch.cat((ids[index], new), dim=1)
                mask = torch.cat((mask[index], torch.ones_like(new, dtype=torch.bool)), dim=1)
                clone = cache.clone()
                actual = model(new, mask=mask, cache=cache)
                assert_close(actual, model(ids, mask=mask)[:, -2:])
                assert_close(actual, model(new, mask=mask, cache=clone))

    @pytest.mark.parametrize("options", [{}, {"tie_embedding": True}, {"tie_embedding": True, "emb_dim": 32}])
    def test_hidden_times_output_weight_gives_the_logits(self, decoder, options):
        adapter = as_causal_lm(decoder({"rotary_pos_emb": True}, **options))
        ids, mask = random_ids(3, 9), left_mask(9, 9, 6, 4)
        with torch.no_grad():
            logits = adapter(ids, mask=mask)
            product = adapter.hidden(ids, mask=mask) @ adapter.output_weight.T
        assert_close(product[mask], logits[mask])
        stepped = decoded_in_steps(adapter, ids, mask, [6, 3], hidden=True) @ adapter.output_weight.T
        assert_close(stepped[mask], logits[mask])

    @pytest.mark.parametrize(
        "options",
        [{"mixture_of_softmax": True}, {"sigsoftmax_logits": True}, {"to_logits": nn.Linear(32, VOCABULARY)}],
        ids=["mixture", "sigsoftmax", "bias"],
    )
    def test_no_hidden_where_logits_are_more_than_a_product(self, decoder, options):
        assert not hasattr(as_causal_lm(decoder({}, **options)), "hidden")

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
    def test_what_a_cache_would_get_wrong_is_decoded_without_one(self, decoder, layer_options, options):
        net = decoder(layer_options, **options)
        adapter = as_causal_lm(net)
        assert not hasattr(adapter, "init_cache")
        ids, mask = random_ids(3, 9), left_mask(9, 9, 6, 4)
        with torch.no_grad():
            actual = adapter(ids, mask=mask)
        assert_close(actual[mask], rows_alone(net, ids, mask)[mask])

    def test_a_decoder_with_cross_attention_is_decoded_without_a_cache(self, decoder):
        net = decoder({"cross_attend": True})
        adapter = as_causal_lm(net)
        assert not hasattr(adapter, "init_cache")
        ids, mask = random_ids(2, 7), left_mask(7, 7, 4)
        context = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            actual = adapter(ids, mask=mask, context=context.repeat(2, 1, 1))
        expected = rows_alone(lambda row: net(row, context=context), ids, mask)
        assert_close(actual[mask], expected[mask])

    def test_a_part_of_the_users_own_is_decoded_without_a_cache(self, decoder):
        class Smoothed(nn.Linear):
            def forward(self, x):
                return super().forward(x.cumsum(dim=1))

        net = decoder({})
        net.attn_layers.final_norm = Smoothed(32, 32)
        assert not hasattr(as_causal_lm(net), "init_cache")

    def test_an_autoregressive_wrapper_is_taken_by_its_network(self, decoder):
        x_transformers = pytest.importorskip("x_transformers")
        net = decoder({"rotary_pos_emb": True})
        adapter = as_causal_lm(x_transformers.AutoregressiveWrapper(net))
        assert adapter.model is net
        ids = random_ids(2, 5)
        with torch.no_grad():
            torch.testing.assert_close(adapter(ids), net(ids), atol=0, rtol=0)
        assert set(adapter.state_dict()) == {f"model.{name}" for name in net.state_dict()}
        assert (adapter.vocab_size, adapter.max_length) == (VOCABULARY, None)

    @given(data=st.data())
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test_any_configuration_decodes_any_left_padded_batch_in_any_steps(self, decoder, data):
        positions = data.draw(st.sampled_from(sorted(X_TRANSFORMERS)))
        flags = ("ff_glu", "use_rmsnorm", "attn_qk_norm", "sandwich_norm", "attn_gate_values", "gate_residual")
        options = {flag: True for flag in flags if data.draw(st.booleans())}
        options["depth"] = data.draw(st.integers(1, 3))
        if positions not in ("rotary", "xpos", "window"):
            options["attn_num_mem_kv"] = data.draw(st.integers(0, 2))
        net = decoder({**X_TRANSFORMERS[positions], **options})
        steps = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
        n, b = sum(steps), data.draw(st.integers(1, 3))
        lengths = [data.draw(st.integers(n - steps[0] + 1, n)) for _ in range(b)]
        ids, mask = random_ids(b, n, seed=n), left_mask(n, *lengths)
        actual = decoded_in_steps(as_causal_lm(net), ids, mask, steps)
        assert_close(actual[mask], rows_alone(net, ids, mask)[mask])


class TestPlain:
    @given(data=st.data())
    @settings(max_examples=50, deadline=None, derandomize=True)
    def test_each_row_under_any_mask_equals_its_real_tokens_alone(self, data):
        torch.manual_seed(0)
        model = Successors()
        b, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
        bits = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b))
        ids, mask = random_ids(b, n, seed=n), torch.tensor(bits)
        with torch.no_grad():
            actual = as_causal_lm(model)(ids, mask=mask)
        torch.testing.assert_close(actual[mask], rows_alone(model, ids, mask)[mask], atol=1e-12, rtol=1e-12)

    def test_a_function_becomes_a_module_without_a_cache(self):
        model = Successors()
        adapter = as_causal_lm(lambda ids: model(ids), vocab_size=VOCABULARY)
        assert isinstance(adapter, nn.Module)
        assert isinstance(adapter, PlainLM)
        assert list(adapter.parameters()) == []
        assert not any(hasattr(adapter, name) for name in ("init_cache", "hidden", "output_weight"))
        assert (adapter.vocab_size, adapter.device) == (VOCABULARY, torch.device("cpu"))
        ids = random_ids(2, 5)
        torch.testing.assert_close(adapter(ids), model(ids), atol=0, rtol=0)

    def test_a_modules_parameters_are_shared(self):
        model = Successors()
        adapter = as_causal_lm(model)
        assert [id(p) for p in adapter.parameters()] == [id(p) for p in model.parameters()]
        adapter.eval()
        assert not model.training

    def test_an_output_with_logits_and_further_arguments_are_passed_on(self):
        class Output:
            def __init__(self, logits):
                self.logits = logits

        model = Successors()
        adapter = as_causal_lm(lambda ids, scale=1.0: Output(model(ids) * scale))
        ids = random_ids(2, 5)
        torch.testing.assert_close(adapter(ids, scale=2.0), model(ids) * 2)

    def test_a_model_may_view_its_ids(self):
        adapter = as_causal_lm(
            lambda ids: nn.functional.one_hot(ids.view(-1), VOCABULARY).view(*ids.shape, -1).double()
        )
        ids = random_ids(3, 8)[:, 2:5]
        assert torch.equal(adapter(ids).argmax(dim=-1), ids)

    def test_gradients_reach_real_tokens_only(self):
        model = Successors()
        ids, mask = torch.tensor([[7, 1, 2], [3, 4, 5]]), torch.tensor([[False, True, True], [True, True, True]])
        as_causal_lm(model)(ids, mask=mask)[mask].sum().backward()
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
    for model in (hugging_face("llama"), hugging_face("mamba"), decoder({}), Successors(), lambda ids: ids):
        adapter = as_causal_lm(model)
        assert isinstance(adapter, Adapter)
        assert as_causal_lm(adapter) is adapter


def test_what_already_has_init_cache_is_returned_as_it_is():
    class Model:
        def init_cache(self, batch_size, max_length):
            return None

    model = Model()
    assert as_causal_lm(model) is model


def test_importing_and_wrapping_a_plain_model_imports_no_library():
    code = (
        "import sys, lm_core.adapters as a; a.as_causal_lm(lambda ids: ids);"
        "print([m for m in ('transformers', 'x_transformers', 'peft', 'einx') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.plain
class TestRefusals:
    @pytest.mark.parametrize(
        ("x", "words"),
        [(3, "got int"), ("gpt2", "got str"), (None, "got NoneType"), (nn.Linear, "class Linear")],
    )
    def test_what_is_no_model(self, x, words):
        with pytest.raises(TypeError, match=words):
            as_causal_lm(x)

    def test_a_vocabulary_size_that_is_not_the_models(self, hugging_face):
        with pytest.raises(ValueError, match=f"vocab_size must be {VOCABULARY} for this LlamaForCausalLM, got 7"):
            as_causal_lm(hugging_face("llama"), vocab_size=7)
        with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
            as_causal_lm(Successors(), vocab_size=0)
        with pytest.raises(TypeError, match="vocab_size"):
            as_causal_lm(Successors(), vocab_size="48")

    def test_models_of_hugging_face_that_are_no_causal_language_models(self, hugging_face):
        transformers = pytest.importorskip("transformers")
        with pytest.raises(TypeError, match="BertLMHeadModel is not causal"):
            as_causal_lm(hugging_face("bert"))
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
            as_causal_lm(transformers.T5ForConditionalGeneration(config))
        with pytest.raises(TypeError, match="GPT2Model has no language-modelling head"):
            as_causal_lm(hugging_face("gpt2").transformer)

    def test_a_model_without_its_weights(self, hugging_face):
        transformers = pytest.importorskip("transformers")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(hugging_face_config("llama"))
        with pytest.raises(ValueError, match="LlamaForCausalLM must have its weights loaded"):
            as_causal_lm(model)

    def test_models_of_x_transformers_that_are_no_causal_language_models(self, decoder):
        x_transformers = pytest.importorskip("x_transformers")
        sizes = {"dim": 8, "depth": 1, "heads": 1}
        encoder = x_transformers.Encoder(**sizes)
        with pytest.raises(TypeError, match="Encoder of x-transformers is not causal"):
            as_causal_lm(x_transformers.TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=encoder))
        with pytest.raises(TypeError, match="Encoder of x-transformers is no language model"):
            as_causal_lm(encoder)
        with pytest.raises(TypeError, match="return_only_embed=True has no logits"):
            as_causal_lm(decoder({}, return_only_embed=True))
        with pytest.raises(TypeError, match="num_output_heads > 1"):
            as_causal_lm(decoder({}, num_output_heads=2))
        with pytest.raises(TypeError, match="average_pool_embed"):
            as_causal_lm(decoder({}, average_pool_embed=True))
        with pytest.raises(TypeError, match="OrthogonalResidualUpdate mixes in later tokens"):
            as_causal_lm(decoder({"orthog_residual": True}))
        with pytest.raises(TypeError, match="logits depend on the length"):
            as_causal_lm(decoder({"rotary_xpos": True, "attn_num_mem_kv": 1}))

    @pytest.mark.parametrize(
        ("ids", "mask", "error", "words"),
        [
            ([[1, 2]], None, TypeError, "ids must hold integer token ids, got list"),
            (torch.zeros(1, 2), None, TypeError, "ids must hold integer token ids, got torch.float32"),
            (torch.zeros(2, dtype=torch.long), None, ValueError, r"ids must have shape \(b, n\), got \(2,\)"),
            (
                torch.tensor([[VOCABULARY]]),
                None,
                ValueError,
                rf"ids must hold token ids in \[0, {VOCABULARY}\), got 48",
            ),
            (torch.tensor([[-1]]), None, ValueError, "got -1"),
            (torch.zeros(1, 33, dtype=torch.long), None, ValueError, "ids must end within 32 positions, got 33"),
            (torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), TypeError, "mask must be boolean"),
            (torch.zeros(1, 2, dtype=torch.long), [[True, True]], TypeError, "mask must be boolean, got list"),
            (
                torch.zeros(1, 2, dtype=torch.long),
                torch.ones(1, 3, dtype=torch.bool),
                ValueError,
                r"mask must have shape \(1, 2\), got \(1, 3\)",
            ),
        ],
    )
    def test_ids_and_masks_that_do_not_fit(self, hugging_face, ids, mask, error, words):
        adapter = as_causal_lm(hugging_face("gpt2"))
        cache = adapter.init_cache(1, 40)
        for arguments in ({}, {"cache": cache}):
            with pytest.raises(error, match=words):
                adapter(ids, mask=mask, **arguments)
        assert cache.length == 0

    def test_caches_that_do_not_fit(self, hugging_face, decoder):
        ids = random_ids(2, 3)
        adapter = as_causal_lm(hugging_face("llama"))
        with pytest.raises(ValueError, match="cache holds 3 rows, got ids of 2"):
            adapter(ids, cache=adapter.init_cache(3, 8))
        with pytest.raises(TypeError, match="cache must come from this model's init_cache, got dict"):
            adapter(ids, cache={})
        with pytest.raises(TypeError, match="got XTransformersCache"):
            adapter(ids, cache=as_causal_lm(decoder({})).init_cache(2, 8))
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            adapter.init_cache(0, 8)
        with pytest.raises(TypeError, match="cache must be None: an adapted Successors has no init_cache"):
            as_causal_lm(Successors())(ids, cache=adapter.init_cache(2, 8))
        with pytest.raises(TypeError, match="cache must be None: an adapted MambaForCausalLM has no init_cache"):
            as_causal_lm(hugging_face("mamba"))(ids, cache=adapter.init_cache(2, 8))

    def test_padding_between_cached_tokens(self, hugging_face):
        adapter = as_causal_lm(hugging_face("mistral"))
        cache = adapter.init_cache(1, 8)
        adapter(random_ids(1, 3), cache=cache)
        mask = torch.tensor([[True, True, True, False, True]])
        with pytest.raises(ValueError, match="mask must not have padding between the real tokens"):
            adapter(random_ids(1, 2), mask=mask, cache=cache)
        assert cache.length == 3

    def test_a_cache_while_gradient_checkpointing_disables_it(self, hugging_face):
        model = hugging_face("llama")
        adapter = as_causal_lm(model)
        # The older name is deprecated, the newer one is not there in older versions.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()
        with pytest.raises(ValueError, match="gradient checkpointing"):
            adapter(random_ids(1, 3), cache=adapter.init_cache(1, 8))

    @pytest.mark.parametrize(
        ("function", "error", "words"),
        [
            (lambda ids: (ids,), TypeError, "must return logits as a tensor, got tuple"),
            (
                lambda ids: ids.float(),
                ValueError,
                r"logits of shape \(b, n, v\) for ids of shape \(2, 3\), got \(2, 3\)",
            ),
            (lambda ids: torch.zeros(2, 1, 5), ValueError, r"got \(2, 1, 5\)"),
        ],
    )
    def test_callables_that_return_something_else(self, function, error, words):
        with pytest.raises(error, match=words):
            as_causal_lm(function)(random_ids(2, 3))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "rotary", "absolute", "alibi"])
def test_a_left_padded_batch_decodes_on_a_gpu_as_each_row_alone(hugging_face, decoder, kind):
    model = hugging_face(kind) if kind in HUGGING_FACE else decoder(X_TRANSFORMERS[kind])
    adapter = as_causal_lm(model.cuda())
    assert adapter.device.type == "cuda"
    ids, mask = random_ids(3, 12).cuda(), left_mask(12, 12, 9, 6).cuda()
    actual = decoded_in_steps(adapter, ids, mask, [7, 1, 1, 3])
    expected = rows_alone(as_causal_lm(model.cpu()), ids.cpu(), mask.cpu())
    # The GPU sums in another order.
    torch.testing.assert_close(actual[mask].cpu(), expected[mask.cpu()], atol=1e-4, rtol=0)


def test_hugging_face_models_get_their_adapter(hugging_face):
    assert isinstance(as_causal_lm(hugging_face("gpt2")), HuggingFaceLM)
