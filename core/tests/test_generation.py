"""Generation against a loop that decodes one row at a time in plain Python, over small models of ``conftest``."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_k, top_p
from lm_core.nn.masking import left_pad, right_pad

VOCABULARY = 7
KINDS = ("history", "cached", "hidden")


def drawn_prompts(generator, rows, longest=6):
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def check_row(result, row, tokens, log_probs, eos_id, pad_id):
    """Asserts that one row of a ``Generation`` is ``tokens``, followed by padding only."""
    length = int(result.lengths[row])
    assert result.tokens[row, :length].tolist() == tokens
    assert result.tokens[row, length:].eq(pad_id).all()
    assert result.log_probs[row, :length].tolist() == pytest.approx(log_probs, abs=1e-5)
    assert result.log_probs[row, length:].eq(0).all()
    assert bool(result.finished[row]) == (tokens[-1] == eos_id)


@given(
    seed=st.integers(0, 100_000),
    rows=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    use_cache=st.booleans(),
    form=st.sampled_from(["list", "left", "right", "lengths"]),
    ends=st.booleans(),
    minimum=st.integers(0, 5),
)
def test_a_batch_of_different_lengths_equals_each_prompt_alone(
    seed, rows, kind, use_cache, form, ends, minimum, models, naive_greedy
):
    generator = torch.Generator().manual_seed(seed)
    model = getattr(models, kind)(VOCABULARY, seed)
    prompts = drawn_prompts(generator, rows)  # an EOS inside them is likely
    eos_id = 2 if ends else None
    (left, left_mask), (right, right_mask) = left_pad(prompts, 6), right_pad(prompts, 6)
    prompt, named = {
        "list": (prompts, {}),
        "left": (left, {"mask": left_mask}),
        "right": (right, {"mask": right_mask}),
        "lengths": (right, {"prompt_lengths": right_mask.sum(-1)}),
    }[form]
    limits = {"max_new_tokens": 8, "min_new_tokens": minimum, "eos_id": eos_id}
    result = generate(model, prompt, **limits, temperature=0.0, pad_id=9, use_cache=use_cache, **named)
    assert result.log_probs.dtype == torch.float32
    assert result.tokens.shape[1] == int(result.lengths.max())
    for row, ids in enumerate(prompts):
        check_row(result, row, *naive_greedy(model, ids, 8, eos_id, minimum), eos_id, 9)


def test_rows_that_have_ended_leave_the_batch_and_change_no_other(models, naive_greedy):
    model = models.cached(VOCABULARY, 5)
    prompts = drawn_prompts(torch.Generator().manual_seed(5), 16)
    result = generate(model, prompts, max_new_tokens=30, temperature=0.0, eos_id=1)
    sizes = [call.ids.shape[0] for call in model.calls]
    assert sizes[0] == 15  # two prompts are equal and read once
    assert sizes[-1] <= 2
    for row, ids in enumerate(prompts):
        check_row(result, row, *naive_greedy(model, ids, 30, 1), 1, 0)


@pytest.fixture
def linear_model(monkeypatch):
    """A model of two layers, whose weights are large enough to be copied, on a processor that reads blocks faster."""
    monkeypatch.setattr("lm_core.generation.weight_layout._reads_blocks_faster", lambda: True)
    for name in ("_SMALLEST_BYTES", "_SMALLEST_BYTES_CACHED"):
        monkeypatch.setattr(f"lm_core.generation.weight_layout.{name}", 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(32, 4)
            self.wide, self.deep, self.prompt_only = nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(4, 4)
            self.shared = nn.Linear(4, 16, bias=False)
            self.shared.weight = self.wide.weight

        def init_cache(self, batch_size, max_length):
            return SimpleNamespace(reorder=lambda index: None)

        @property
        def output_weight(self):
            return self.embedding.weight

        def hidden(self, ids, *, mask=None, cache=None):
            x = self.embedding(ids)
            if ids.shape[1] > 1:
                x = self.prompt_only(x)
            return torch.tanh(self.deep(self.wide(x) + self.shared(x)) * 9)

        def forward(self, ids, *, mask=None, cache=None):
            return self.hidden(ids) @ self.output_weight.T

    return Model().eval()


class Products(TorchDispatchMode):
    """Records the layout of each weight in a product: by rows or in blocks."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::mm", "aten::addmm"):
            self.read.append("rows")
        elif name == "mkldnn::_linear_pointwise":
            self.read.append("blocks")
        return function(*args, **(kwargs or {}))


# Of the wide, the shared, the deep and the output layer, in every step after the one that shows what is read.
BLOCKS = "blocks" if torch.backends.mkldnn.is_available() else "rows"
READ = {
    (20, 1): [BLOCKS] * 4,
    (20, 5): [BLOCKS] * 4,
    (15, 1): ["rows"] * 4,
    (15, 5): ["rows"] * 4,
    (20, 65): ["rows"] * 4,
}


@pytest.mark.parametrize(("new_tokens", "rows"), list(READ))
def test_weights_are_laid_out_for_few_rows_of_long_answers(linear_model, new_tokens, rows):
    model, ids = linear_model, torch.randint(32, (rows, 3), generator=torch.Generator().manual_seed(rows))
    before = list(model.parameters())
    calls = []
    model.deep.register_forward_hook(lambda *_: calls.append(1))
    with Products() as products:
        result = generate(model, ids, max_new_tokens=new_tokens, temperature=0.0)
    prompt, first, steps = products.read[:5], products.read[5:8], products.read[9:]
    assert set(prompt + first) == {"rows"}
    assert steps == READ[new_tokens, rows] * (new_tokens - 2)
    assert len(calls) == new_tokens
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert not any("forward" in vars(module) for module in model.modules())
    for step in range(1, new_tokens):  # a token depends on the one before it
        assert torch.equal(result.tokens[:, step], model(result.tokens[:, step - 1 : step])[:, -1].argmax(-1))


def test_single_rows_read_weights_with_many_outputs_by_column_where_blocks_are_slower(linear_model, monkeypatch):
    monkeypatch.setattr("lm_core.generation.weight_layout._reads_blocks_faster", lambda: False)
    strides = []
    product = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        strides.append(weight.stride())
        return product(x, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", linear)
    result = generate(linear_model, torch.tensor([[1, 2]]), max_new_tokens=20, temperature=0.0)
    # the wide, the shared, the deep layer and the output weight
    assert strides[-4:] == [(1, 16), (1, 16), (16, 1), (1, 32)]
    expected = generate(linear_model, torch.tensor([[1, 2]]), max_new_tokens=20, temperature=0.0, use_cache=False)
    assert not torch.equal(expected.tokens, torch.zeros_like(expected.tokens))
    for step in range(1, 20):  # a token depends on the one before it
        before = result.tokens[:, step - 1 : step]
        assert torch.equal(result.tokens[:, step], linear_model(before)[:, -1].argmax(-1))


@pytest.mark.parametrize(("rows", "cached", "layout"), [(1, 2**10, "rows"), (1, 2**8, BLOCKS), (5, 2**10, BLOCKS)])
def test_small_weights_that_stay_in_the_cache_keep_their_layout_for_one_row(
    linear_model, monkeypatch, rows, cached, layout
):
    monkeypatch.setattr("lm_core.generation.weight_layout._SMALLEST_BYTES_CACHED", 2**12)
    monkeypatch.setattr("lm_core.generation.weight_layout._CACHED_BYTES", cached)  # a step reads 768 bytes in layers
    with Products() as products:
        generate(linear_model, torch.arange(rows).view(rows, 1), max_new_tokens=20)
    assert set(products.read[9:]) == {layout}


def test_a_beam_search_lays_out_for_its_beams(linear_model):
    with Products() as products:
        beam_search(linear_model, torch.tensor([[1, 2]]), beams=3, max_new_tokens=20)
    assert products.read[9:] == [BLOCKS] * 4 * 18


def test_a_module_takes_its_own_way_where_a_copy_does_not_serve(linear_model):
    """Calls with gradients, and with a weight that was replaced in the meantime."""
    model, steps = linear_model, []
    other = nn.Parameter(torch.randn(16, 4))
    x = torch.randn(1, 4)

    def failing(logits):
        steps.append(1)
        if len(steps) == 5:
            assert "forward" in vars(model.wide)
            with torch.enable_grad():
                model.wide(x).sum().backward()
            model.shared.weight = other
            assert torch.equal(model.shared(x), x @ other.T)
        if len(steps) == 7:
            raise RuntimeError("stop")
        return logits

    with pytest.raises(RuntimeError, match="stop"):
        generate(model, torch.tensor([[1, 2]]), max_new_tokens=40, filters=(failing,))
    torch.testing.assert_close(model.wide.weight.grad, x.expand(16, 4))
    assert model.shared.weight is other
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("how", ["compiled", "double", "autocast", "transposed"])
def test_weights_of_another_kind_keep_their_layout(linear_model, how):
    model = linear_model.double() if how == "double" else linear_model
    if how == "transposed":
        model.wide.weight = model.shared.weight = nn.Parameter(torch.randn(4, 16).t())
    if how == "compiled":
        model.deep.compile()
    taken = []

    def look(logits):
        taken.append("forward" in vars(model.wide))
        return logits

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        generate(model, torch.tensor([[1, 2]]), max_new_tokens=20, filters=(look,))
    assert len(taken) == 20
    assert not any(taken)


def test_two_threads_generate_with_one_model_as_one_does(linear_model):
    model, prompts = linear_model, torch.arange(8).view(8, 1)
    answer = partial(generate, model, max_new_tokens=30, temperature=0.0)
    alone = [answer(ids[None]).tokens for ids in prompts]
    before = list(model.parameters())
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(answer, ids[None]) for ids in prompts for _ in "ab"]
        together = [job.result().tokens for job in jobs][::2]
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))


def test_the_first_logits_are_those_of_the_last_real_token(models):
    # a sampler that reads at a padding slot of [5, 0, 0] continues with 1
    model = models.successor(12)
    prompts = torch.tensor([[5, 0, 0], [1, 2, 3]])
    result = generate(model, prompts, prompt_lengths=torch.tensor([1, 3]), max_new_tokens=3, temperature=0.0)
    assert result.tokens.tolist() == [[6, 7, 8], [4, 5, 6]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_eos_in_the_prompt_does_not_stop_and_nothing_after_a_generated_one_counts(models, use_cache):
    prompts = [torch.tensor([8, 3]), torch.tensor([8, 8, 6]), torch.tensor([1])]
    options = {"temperature": 0.0, "eos_id": 8, "pad_id": 11, "use_cache": use_cache}
    result = generate(models.successor(12), prompts, max_new_tokens=6, **options)
    assert result.tokens.tolist() == [[4, 5, 6, 7, 8, 11], [7, 8, 11, 11, 11, 11], [2, 3, 4, 5, 6, 7]]
    assert result.lengths.tolist() == [5, 2, 6]
    assert result.finished.tolist() == [True, True, False]
    assert result.log_probs[1, 2:].tolist() == [0.0] * 4


def test_any_of_several_eos_ids_ends_a_row(models):
    prompts = torch.tensor([[1], [5]])
    result = generate(models.successor(12), prompts, max_new_tokens=9, temperature=0.0, eos_id=[4, 7])
    assert result.tokens.tolist() == [[2, 3, 4], [6, 7, 0]]


def seen_by_filter(model, prompts, **kwargs):
    seen = []

    def spy(logits):
        seen.append(logits.clone())
        return logits

    generator = torch.Generator().manual_seed(0)
    result = generate(model, prompts, filters=[spy], generator=generator, **kwargs)
    return seen, result


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_minimum_length_and_temperature_come_before_the_filters(models, next_logits, kind):
    model = getattr(models, kind)(VOCABULARY, 1)
    prompts = drawn_prompts(torch.Generator().manual_seed(1), 3)
    settings_ = {"temperature": 0.7, "eos_id": 2, "min_new_tokens": 4, "repetition_penalty": 1.3, "max_new_tokens": 4}
    seen, result = seen_by_filter(model, prompts, **settings_)
    assert len(seen) == 4
    for step, logits in enumerate(seen):
        for row, prompt in enumerate(prompts):
            ids = torch.cat((prompt, result.tokens[row, :step]))
            expected = next_logits(model, ids)
            for token in set(ids.tolist()):
                expected[token] = expected[token] * 1.3 if expected[token] < 0 else expected[token] / 1.3
            expected[2] = -math.inf
            torch.testing.assert_close(logits[row], expected / 0.7, rtol=1e-9, atol=1e-9)
    assert not result.tokens.eq(2).any()


def test_the_nucleus_is_cut_after_the_temperature(models, next_log_probs):
    model = models.history(VOCABULARY, 0)

    def nucleus(temperature):
        probabilities, order = next_log_probs(model, [1, 2], temperature).exp().sort(descending=True)
        size = int((probabilities.cumsum(0) < 0.6).sum()) + 1
        return set(order[:size].tolist())

    prompt, generator = torch.tensor([[1, 2]]).expand(400, 2), torch.Generator().manual_seed(0)
    filters = [partial(top_p, p=0.6)]
    result = generate(model, prompt, max_new_tokens=1, temperature=5.0, filters=filters, generator=generator)
    assert set(result.tokens.flatten().tolist()) == nucleus(5.0)
    assert nucleus(1.0) < nucleus(5.0)  # the wrong order would keep fewer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", [(), (partial(top_k, k=3), partial(top_p, p=0.8))])
def test_log_probs_are_those_of_the_sampled_distribution(models, next_log_probs, kind, filters):
    model = getattr(models, kind)(VOCABULARY, 2)
    prompts = drawn_prompts(torch.Generator().manual_seed(2), 4)
    generator = torch.Generator().manual_seed(0)
    result = generate(model, prompts, max_new_tokens=6, temperature=1.4, filters=filters, eos_id=3, generator=generator)
    for row, prompt in enumerate(prompts):
        ids = prompt.tolist()
        for step in range(int(result.lengths[row])):
            logits = next_log_probs(model, ids, temperature=1.4)[None]
            for filter_ in filters:
                logits = filter_(logits)
            token = int(result.tokens[row, step])
            exact = float(logits[0, token] - logits[0].exp().sum().log())
            assert float(result.log_probs[row, step]) == pytest.approx(exact, abs=1e-6)
            ids.append(token)


def test_filters_act_at_temperature_zero_but_log_probs_are_unfiltered_at_temperature_one(models, next_log_probs):
    model = models.cached(VOCABULARY, 2)
    scores = next_log_probs(model, [1, 2])
    best, second = scores.argsort(descending=True)[:2].tolist()
    banned = lambda logits: logits.index_fill(-1, torch.tensor([best]), -math.inf)  # noqa: E731
    for filter_, token in ((banned, second), (partial(top_k, k=1), best)):
        result = generate(model, torch.tensor([[1, 2]]), max_new_tokens=1, temperature=0.0, filters=[filter_])
        assert result.tokens.tolist() == [[token]]
        assert float(result.log_probs) == pytest.approx(float(scores[token]), abs=1e-6)


@pytest.mark.parametrize("filters", [(), (partial(top_k, k=4),)])
def test_sampled_tokens_follow_the_softmax(models, next_log_probs, filters):
    model, draws = models.cached(VOCABULARY, 4, sharpness=1.0), 20_000
    generator = torch.Generator().manual_seed(0)
    prompts, options = torch.tensor([[3, 1]]).expand(draws, 2), {"temperature": 1.5, "filters": filters}
    result = generate(model, prompts, max_new_tokens=1, generator=generator, **options)
    logits = next_log_probs(model, [3, 1], temperature=1.5)[None]
    for filter_ in filters:
        logits = filter_(logits)
    expected = logits[0].softmax(-1) * draws
    counts = torch.bincount(result.tokens.flatten(), minlength=VOCABULARY)
    possible = expected > 0
    assert counts[~possible].eq(0).all()
    assert expected[possible].min() > 5
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    # the 0.999 quantiles of chi-square with 6 and 3 degrees of freedom
    assert chi_square < {6: 22.46, 3: 16.27}[int(possible.sum()) - 1]


def test_equal_generators_give_equal_results_and_the_global_one_is_not_used(models):
    model, prompt = models.cached(VOCABULARY, 0, sharpness=0.5), torch.tensor([[1, 2], [3, 4]])
    before = torch.get_rng_state()
    answer = partial(generate, model, prompt, max_new_tokens=20)
    first, again, other = (answer(generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    generate(model, prompt, max_new_tokens=5, temperature=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_models_modes_are_restored_also_after_an_exception(models):
    model = models.cached(VOCABULARY, 0).train()
    frozen = model.add_module("frozen", torch.nn.Dropout(0.5)) or model.frozen.eval()
    modes = []
    model.dropout.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    generate(model, torch.tensor([[1, 2]]), max_new_tokens=2, temperature=0.0)
    assert modes == [False, False]
    assert (model.training, model.dropout.training, frozen.training) == (True, True, False)

    def failing(logits):
        raise RuntimeError("filter failed")

    with pytest.raises(RuntimeError, match="filter failed"):
        generate(model, torch.tensor([[1, 2]]), max_new_tokens=2, filters=[failing])
    assert (model.training, model.dropout.training, frozen.training) == (True, True, False)


@pytest.mark.parametrize("kind", KINDS)
def test_model_kwargs_come_with_the_prompt_only_where_the_rest_is_cached(models, kind):
    model = getattr(models, kind)(VOCABULARY, 0)
    shift = torch.zeros(3, 1)
    generate(model, torch.tensor([[1, 2], [3, 4], [5, 6]]), max_new_tokens=3, temperature=0.0, shift=shift)
    given_ = [call.kwargs.get("shift") is not None for call in model.calls]
    assert given_ == ([True, False, False] if kind != "history" else [True] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_prompts_are_read_once_where_they_are_cached_and_answered_as_if_alone(models, naive_greedy, kind):
    model = getattr(models, kind)(VOCABULARY, 0)
    prompts = [torch.tensor(row) for row in ([1, 2], [3, 4, 5], [1, 2], [2], [3, 4, 5], [1, 2])]
    result = generate(model, prompts, max_new_tokens=4, temperature=0.0, pad_id=9)
    assert [len(call.ids) for call in model.calls] == ([6] * 4 if kind == "history" else [3, 6, 6, 6])
    for row, ids in enumerate(prompts):
        check_row(result, row, *naive_greedy(model, ids, 4, None, 0), None, 9)


@pytest.mark.parametrize("eos_id", [None, *range(VOCABULARY)])
def test_rows_keep_their_own_kwargs_when_others_leave_the_batch(models, eos_id):
    model = models.history(VOCABULARY, 0)
    prompts, shift = torch.tensor([[1, 2]]).expand(6, 2), torch.linspace(-2, 2, 6, dtype=torch.float64)
    # neither is of one entry a row: they must stay as they are
    others = {"scalar": torch.tensor(2.0), "per_feature": torch.zeros(5)}
    answer = partial(generate, model, max_new_tokens=9, temperature=0.0, eos_id=eos_id)
    together = answer(prompts, shift=shift, **others)
    assert all(call.kwargs["per_feature"].shape == (5,) for call in model.calls)
    for row in range(6):
        alone = answer(prompts[:1], shift=shift[row : row + 1])
        length = int(alone.lengths[0])
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert int(together.lengths[row]) == length


def test_no_mask_is_made_where_no_row_is_padded(models):
    model = models.cached(VOCABULARY, 0)
    mask = torch.tensor([[False, True, True], [False, True, True]])
    generate(model, torch.tensor([[9, 1, 2], [9, 3, 4]]), mask=mask, max_new_tokens=2, temperature=0.0)
    assert [call.mask for call in model.calls] == [None, None]
    assert [call.ids.shape for call in model.calls] == [(2, 2), (2, 1)]


def test_a_progress_bar_is_shown_on_request_only(models, capsys):
    answer = partial(generate, models.cached(VOCABULARY, 0), torch.tensor([[1]]), max_new_tokens=3)
    answer()
    assert capsys.readouterr().err == ""
    answer(progress=True)
    assert re.search(r"generate.*3/3", capsys.readouterr().err)
