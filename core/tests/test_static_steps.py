"""Static steps: the same tokens as eager steps, one graph for several prompt lengths, and fallbacks that are said once.

Most tests trace without generating code (backend "eager"): what is traced, and how often, is what matters.
"""

import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lm_core.adapters import as_causal_lm
from lm_core.generation import static_step
from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.norms import LayerNorm
from lm_core.nn.parallel_block import ParallelBlock, Positions
from lm_core.nn.rotary import RotaryEmbedding

VOCABULARY = 48

pytestmark = [pytest.mark.plain, pytest.mark.filterwarnings("ignore:.*torch\\.jit.*")]


class TinyDecoder(nn.Module):
    """A decoder of two blocks on a static or growing cache."""

    def __init__(self, *, use_xpos=False, kv_heads=1, theta=10000.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.rotary = RotaryEmbedding(8, use_xpos=use_xpos, scale_base=4.0, theta=theta)
        self.blocks = nn.ModuleList(ParallelBlock(dim=32, dim_head=8, heads=4, kv_heads=kv_heads) for _ in range(2))
        self.norm = LayerNorm(32)

    @property
    def output_weight(self):
        return self.embedding.weight

    def init_cache(self, batch_size, max_length, *, static=False):
        return KVCache(layers=2, batch_size=batch_size, max_length=max_length, static=static)

    def hidden(self, ids, *, mask=None, cache=None):
        x = self.embedding(ids)
        positions = Positions.of(self.rotary, x, cache=cache, mask=mask)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, cache=cache, layer=layer)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)

    def forward(self, ids, **inputs):
        return F.linear(self.hidden(ids, **inputs), self.output_weight)


@pytest.fixture(scope="session")
def tiny():
    """A function from options to a ``TinyDecoder`` with large random weights."""

    def build(**options):
        torch.manual_seed(0)
        model = TinyDecoder(**options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        return model

    return build


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Traces without generating code; a function that counts the graphs since the test began."""
    monkeypatch.setattr(static_step, "_BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no step may fall back unexpectedly
        yield lambda: counters["stats"]["unique_graphs"]


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    use_xpos=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
    beams=st.sampled_from([0, 1, 3]),
    eos_id=st.none() | st.integers(0, VOCABULARY - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    min_new_tokens=st.integers(0, 5),
)
def test_compiled_steps_give_the_eager_tokens(
    tiny, use_xpos, kv_heads, lengths, seed, beams, eos_id, repetition_penalty, min_new_tokens
):
    model = tiny(use_xpos=use_xpos, kv_heads=kv_heads).double()
    options = {
        "max_new_tokens": 20,
        "eos_id": eos_id,
        "repetition_penalty": repetition_penalty,
        "min_new_tokens": min_new_tokens,
    }

    def tokens(**more):
        if beams:
            return beam_search(model, prompts(*lengths, seed=seed), beams=beams, **options, **more)
        draws = torch.Generator().manual_seed(seed)
        return generate(model, prompts(*lengths, seed=seed), generator=draws, **options, **more)

    eager, compiled = tokens(), tokens(compile=True)
    assert torch.equal(eager.tokens, compiled.tokens)
    assert torch.equal(eager.lengths, compiled.lengths)
    torch.testing.assert_close(eager.log_probs, compiled.log_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "qwen2", "rotary"])
def test_a_step_of_another_library_is_traced_once_and_gives_the_eager_tokens(build, kind, traced):
    model, limits = as_causal_lm(build(kind)), {"max_new_tokens": 20, "temperature": 0.0}
    for count, rows in enumerate((prompts(5, 3, 1), prompts(9, 2, 4))):
        eager = generate(model, rows, **limits)
        assert torch.equal(generate(model, rows, **limits, compile=True).tokens, eager.tokens), count
    assert traced() == 1
    if kind not in ("llama", "rotary"):
        return
    searched = beam_search(model, prompts(4), beams=3, max_new_tokens=20)
    assert torch.equal(beam_search(model, prompts(4), beams=3, max_new_tokens=20, compile=True).tokens, searched.tokens)
    assert traced() == 2


def test_one_graph_serves_64_tokens_after_prompts_of_two_lengths(tiny, traced):
    model = tiny(use_xpos=True)
    for length in (5, 40):
        for _ in range(2):
            generate(model, prompts(length), max_new_tokens=64, compile=True)
    assert traced() == 1
    assert not counters["graph_break"]
    generate(model, prompts(5, 3), max_new_tokens=64, compile=True)
    assert traced() == 2


def test_generated_code_gives_the_eager_tokens(tiny, monkeypatch):
    monkeypatch.setattr(static_step, "_BACKEND", "inductor")
    model = tiny(use_xpos=True, kv_heads=2)
    eager, compiled = (
        generate(model, prompts(5, 3), max_new_tokens=30, temperature=0.0, compile=c) for c in (False, True)
    )
    assert torch.equal(eager.tokens, compiled.tokens)


def test_weights_that_change_between_calls_are_read(tiny, traced):
    model = tiny()
    generate(model, prompts(5), max_new_tokens=20, compile=True)
    with torch.no_grad():
        model.blocks[0].proj_in.weight.normal_()
    eager, compiled = (
        generate(model, prompts(5), max_new_tokens=20, temperature=0.0, compile=c) for c in (False, True)
    )
    assert torch.equal(eager.tokens, compiled.tokens)
    assert traced() == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="weights keep their layout without oneDNN")
def test_a_compiled_step_reads_weights_by_column_and_is_not_traced_again(tiny, traced, monkeypatch):
    for name in ("_SMALLEST_BYTES", "_SMALLEST_BYTES_CACHED"):
        monkeypatch.setattr(f"lm_core.generation.weight_layout.{name}", 1)
    strides = []

    def recording(graph, inputs):
        strides.append({tuple(t.stride()) for t in inputs if isinstance(t, torch.Tensor) and t.ndim == 2})
        return graph.forward

    monkeypatch.setattr(static_step, "_BACKEND", recording)
    model = tiny()
    for _ in range(2):
        eager, compiled = (
            generate(model, prompts(5), max_new_tokens=20, temperature=0.0, compile=c) for c in (False, True)
        )
        assert torch.equal(eager.tokens, compiled.tokens)
    assert traced() == 1
    assert (1, VOCABULARY) in strides[0] or any(stride[0] == 1 for stride in strides[0])
    assert not any("forward" in vars(module) for module in model.modules())


def test_compiled_steps_are_forgotten_with_their_model(tiny):
    model = tiny()
    generate(model, prompts(5), max_new_tokens=20, compile=True)
    reference = weakref.ref(model)
    assert model in static_step._compiled_steps
    del model
    gc.collect()
    assert reference() is None


def test_a_model_of_a_library_keeps_its_compiled_step_when_it_is_wrapped_again(build, traced):
    model = build("llama")
    for _ in range(2):
        generate(model, prompts(5), max_new_tokens=20, compile=True)
    assert traced() == 1


def hooked(model):
    model.norm.register_forward_hook(lambda *_: None)


def unsearchable(model):
    class Searched(KVCache):
        def begin_steps(self):
            raise ValueError("its memory is searched")

    model.init_cache = lambda b, n, *, static=False: Searched(layers=2, batch_size=b, max_length=n, static=static)


def growing_only(model):
    model.init_cache = lambda batch_size, max_length: KVCache(layers=2, batch_size=batch_size, max_length=max_length)


def untraceable(model):
    forward = model.norm.forward

    def waiting(x):
        float(x.sum())
        print(end="")
        return forward(x)

    model.norm.forward = torch.compiler.disable(waiting)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "a LayerNorm has forward hooks"),
        (unsearchable, "its memory is searched"),
        (growing_only, "the cache of TinyDecoder has no static form"),
        (untraceable, "torch.compile failed with"),
    ],
)
def test_a_step_that_cannot_be_static_runs_eagerly_and_says_why_once(tiny, change, reason):
    model = tiny()
    expected = generate(model, prompts(5, 3), max_new_tokens=20, temperature=0.0)
    change(model)
    with pytest.warns(RuntimeWarning, match=reason):
        result = generate(model, prompts(5, 3), max_new_tokens=20, temperature=0.0, compile=True)
    assert torch.equal(result.tokens, expected.tokens)
    again = generate(model, prompts(5, 3), max_new_tokens=20, temperature=0.0, compile=True)  # no second warning
    assert torch.equal(again.tokens, expected.tokens)


@pytest.mark.parametrize("kind", ["mamba", "plain"])
def test_a_model_without_a_cache_is_decoded_without_one_and_says_so(hugging_face, kind):
    embedding = nn.Embedding(VOCABULARY, VOCABULARY)
    model = as_causal_lm(hugging_face("mamba") if kind == "mamba" else nn.Sequential(embedding))
    with pytest.warns(RuntimeWarning, match="without a cache"):
        result = generate(model, prompts(5), max_new_tokens=20, temperature=0.0, compile=True)
    assert torch.equal(result.tokens, generate(model, prompts(5), max_new_tokens=20, temperature=0.0).tokens)


def test_xpos_scales_of_unwritten_positions_do_not_overflow():
    rotary = RotaryEmbedding(8, use_xpos=True, scale_base=1.0)
    cache = KVCache(layers=1, batch_size=1, max_length=4000, static=True)
    keys = torch.ones(1, 1, 3, 8)
    cache.update(0, keys, keys)
    cache.advance(3)
    cache.begin_steps()
    positions = Positions.of(rotary, torch.ones(1, 1, 8), cache=cache)
    (block,) = positions.xpos
    assert block.key_scale.isfinite().all()
    assert int(positions.mask.sum()) == 4


@pytest.mark.parametrize(("length", "limit", "capacity"), [(1, None, 128), (129, None, 256), (2100, None, 2560)])
def test_capacities_are_rounded_up(length, limit, capacity):
    assert static_step.rounded_capacity(length, limit) == capacity
    assert static_step.rounded_capacity(length, length) == length


@pytest.mark.cuda
@pytest.mark.parametrize("beams", [0, 3])
@pytest.mark.parametrize(
    "options", [{}, {"eos_id": [3, 4]}, {"repetition_penalty": 1.3, "min_new_tokens": 5, "eos_id": 3}]
)
@pytest.mark.parametrize("kind", ["ours", "llama", "gpt2", "gemma2", "rotary"])
def test_a_replayed_graph_gives_the_eager_tokens(tiny, build, monkeypatch, kind, options, beams):
    model = tiny(use_xpos=True) if kind == "ours" else as_causal_lm(build(kind).cuda())
    model = model.double().cuda()
    replays = []
    replay = static_step.CapturedStep.replay
    monkeypatch.setattr(static_step.CapturedStep, "replay", lambda self: replays.append(1) or replay(self))

    def tokens():
        if beams:
            return beam_search(model, prompts(5, 3, 1), beams=beams, max_new_tokens=40, **options)
        return generate(model, prompts(5, 3, 1), max_new_tokens=40, temperature=0.0, **options)

    captured = tokens()
    assert replays
    monkeypatch.setattr("lm_core.generation.decoding._STEPS_WORTH_A_GRAPH", 1000)
    eager = tokens()
    assert torch.equal(captured.tokens, eager.tokens)
    assert torch.equal(captured.lengths, eager.lengths)
    torch.testing.assert_close(captured.log_probs, eager.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_draws_inside_and_outside_of_a_graph_are_reproducible(tiny, device):
    model = tiny().cuda()

    def tokens():
        torch.manual_seed(1)
        generator = None if device is None else torch.Generator(device).manual_seed(1)
        return generate(model, prompts(5, 3), max_new_tokens=40, top_p=0.9, generator=generator).tokens

    first = tokens()
    assert torch.equal(first, tokens())
    assert len(first.unique()) > 5  # a graph that repeated its noise would repeat tokens


@pytest.mark.cuda
def test_user_filters_run_on_the_host_next_to_a_graph_of_the_model(tiny):
    model, calls = tiny().cuda(), []

    def only_even(logits):
        calls.append(bool(logits.isfinite().any()))  # waits for the device, which a graph could not
        odd = torch.arange(VOCABULARY, device=logits.device) % 2 == 1
        return logits.masked_fill(odd, -torch.inf)

    result = generate(model, prompts(5), max_new_tokens=40, filters=[only_even])
    assert not (result.tokens % 2).any()
    assert len(calls) == 40


@pytest.mark.cuda
def test_rows_leave_a_captured_batch(tiny):
    model = tiny().double().cuda()
    rows = prompts(*range(1, 17))
    together = generate(model, rows, max_new_tokens=100, temperature=0.0, eos_id=list(range(8)))
    for row, prompt in enumerate(rows):
        alone = generate(model, [prompt], max_new_tokens=100, temperature=0.0, eos_id=list(range(8)))
        assert torch.equal(together.tokens[row, : together.lengths[row]], alone.tokens[0, : alone.lengths[0]])
