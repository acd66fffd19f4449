"""Cached generation equals uncached, a batch equals each row alone, and a shared sequence shows no future."""

import math

import pytest
import torch

from calm_pytorch import AugmentParams, align_by_offsets
from lm_core.generation.beam_search import beam_search
from lm_core.generation.sampling import top_k

GREEDY = {"temperature": 0.0, "filter_fn": None}
KINDS = ["x-transformers", "gpt2", "llama", "neox", "bloom", "plain"]


@pytest.mark.parametrize("shared", [False, True], ids=["prompt", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_of_uneven_prompts_equals_uncached_and_each_prompt_alone(
    model_of, compose, ids, kind, shared
):
    augment = "x-transformers" if kind == "bloom" else kind
    calm = compose(model_of(kind), model_of(augment, seed=1), trained=True, shared=shared)
    assert calm.can_decode == (kind != "plain")
    prompt = ids(3, 7)
    prompt[0, 4:] = -1
    prompt[2, 2:] = -1
    cached = calm.generate(prompt, 14, **GREEDY)
    assert torch.equal(cached, calm.generate(prompt, 14, use_cache=False, **GREEDY))
    for row, length in zip(range(3), (4, 7, 2), strict=True):
        alone = calm.generate(prompt[row : row + 1, :length], 14, **GREEDY)
        assert torch.equal(cached[row, : 14 - length], alone[0, : 14 - length])


class Louder(torch.nn.Module):
    """In the place of a linear layer, with its weight, as an adapter is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight = inner.weight
        self.bias = inner.bias

    def forward(self, x):
        return 5 * self.inner(x)


LINEAR = [
    *("anchor_llm.attn_layers.layers.0.1.to_q", "anchor_llm.attn_layers.layers.1.1.ff.0.0"),
    "cross_attns.0.0.attn.to_out",
]
OTHERS = [f"anchor_llm.{name}" for name in ("attn_layers.layers.1.2", "token_emb.emb", "pos_emb")]


@pytest.mark.parametrize(
    ("part", "how"), [*((part, "hooked") for part in LINEAR + OTHERS), *((part, "replaced") for part in LINEAR)]
)
def test_a_hook_on_a_part_or_a_layer_in_its_place_changes_loss_and_generation(model_of, compose, ids, part, how):
    calm = compose(model_of("x-transformers"), model_of("x-transformers", seed=1), trained=True)
    before, loss = calm.generate(ids(1, 5), 17, **GREEDY), calm(ids(2, 9), prompt=ids(2, 5))
    layer = calm.get_submodule(part)
    if how == "hooked":
        layer.register_forward_hook(lambda module, args, output: 4 * output)
    else:
        calm.set_submodule(part, Louder(layer))
    after = calm.generate(ids(1, 5), 17, **GREEDY)
    assert not torch.equal(after, before)
    assert torch.equal(after, calm.generate(ids(1, 5), 17, use_cache=False, **GREEDY))
    logits = calm(ids(2, 9), prompt=ids(2, 5), return_loss=False)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids(2, 9)[:, 1:].flatten())
    changed = calm(ids(2, 9), prompt=ids(2, 5))
    assert torch.allclose(changed, expected, rtol=1e-4)
    assert not torch.allclose(changed, loss, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["prompt", "shared"])
@pytest.mark.parametrize("kind", ["x-transformers", "gpt2", "llama"])
def test_cached_logits_equal_uncached_logits(model_of, compose, ids, kind, shared):
    calm = compose(model_of(kind), model_of("llama", seed=1), trained=True, shared=shared)
    # x-transformers fills masks with float64's minimum and then takes a softmax in float32, which makes NaN of padding
    atol, rtol = (2e-4, 1e-4) if kind == "x-transformers" else (1e-9, 1e-9)
    model = (calm if kind == "x-transformers" else calm.double()).as_causal_lm()
    mask, prompt_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    mask[1, :3] = prompt_mask[0, 3:] = False
    seq, inputs = ids(2, 9), {} if shared else {"prompt_0": ids(2, 5, seed=1), "prompt_mask_0": prompt_mask}
    whole = model(seq, mask=mask, **inputs)
    cache = model.init_cache(2, 9)
    pieces = [model(seq[:, :5], mask=mask[:, :5], cache=cache, **inputs)]
    pieces += [model(seq[:, i : i + 1], mask=mask[:, : i + 1], cache=cache) for i in range(5, 8)]
    stepped = torch.cat(pieces, dim=1)
    assert torch.allclose(stepped[mask[:, :8]], whole[:, :8][mask[:, :8]], atol=atol, rtol=rtol)
    # the tokens of a beam search hide small errors, and beams of one row share its prompt
    order = torch.tensor([1, 0, 1])
    cache.reorder(order)
    moved = model(seq[order, 8:], mask=mask[order], cache=cache)
    assert torch.allclose(moved, whole[order, 8:], atol=atol, rtol=rtol)
    assert cache.length == 9


@pytest.mark.parametrize("options", [{"num_mem_kv": 2}, {"qk_norm": True}])
def test_cached_and_uncached_agree_with_any_attention_option(options, model_of, compose, ids):
    """Also with options for which x-transformers' own module runs."""
    for shared in (False, True):
        calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True, shared=shared, attn_kwargs=options)
        outs = [calm.generate(ids(2, 5), 12, temperature=0.0, use_cache=use) for use in (True, False)]
        assert torch.equal(*outs)


def test_beams_reorder_all_caches(model_of, compose, ids):
    for shared in (False, True):
        calm = compose(model_of("x-transformers"), model_of("llama", seed=1), trained=True, shared=shared)
        inputs = {} if shared else {"prompt_0": ids(2, 4)}
        results = [
            beam_search(calm.as_causal_lm(), ids(2, 4), beams=3, max_new_tokens=6, use_cache=use, **inputs)
            for use in (True, False)
        ]
        assert torch.equal(results[0].tokens, results[1].tokens)


def test_rows_that_end_leave_the_batch_without_harm(model_of, compose, ids):
    calm = compose(model_of("gpt2"), model_of("gpt2", seed=1), trained=True)
    prompt = ids(4, 5)
    free = calm.generate(prompt, 20, temperature=0.0)
    eos = int(free[0, 2])
    ended = calm.generate(prompt, 20, temperature=0.0, eos_id=eos)
    for row, whole in zip(ended, free, strict=True):
        stop = (whole == eos).nonzero()
        length = int(stop[0]) + 1 if len(stop) else len(whole)
        assert torch.equal(row[:length], whole[:length])
        assert bool((row[length:] == -1).all())


def test_a_generator_makes_samples_reproducible_and_filters_hold(model_of, compose, ids):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True)
    one, two = (calm.generate(ids(2, 4), 12, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    greedy = calm.generate(ids(2, 4), 12, temperature=0.0)
    assert torch.equal(calm.generate(ids(2, 4), 12, filter_fn=top_k, filter_kwargs={"k": 1}), greedy)


def test_the_anchor_may_continue_another_text_than_the_augment_reads(model_of, compose, ids):
    calm = compose(model_of("llama"), AugmentParams(model_of("vit", seed=1), input_shape=(3, 8, 8)), trained=True)
    out = calm.generate(torch.randn(2, 3, 8, 8), 9, anchor_prompt=ids(2, 3), temperature=0.0, output_keep_prompt=True)
    assert out.shape == (2, 9)
    assert torch.equal(out[:, :3], ids(2, 3))


# -------------------------------------------------------------------------------------------------------- no future


@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_editing_a_token_never_changes_logits_before_it(model_of, compose, ids, kind, trained):
    calm = compose(model_of(kind), model_of(kind, seed=1), trained=trained, shared=True)
    seq = ids(1, 12)
    logits = calm(seq, return_loss=False)
    for t in range(12):
        edited = seq.clone()
        edited[0, t] = (edited[0, t] + 7) % 40
        other = calm(edited, return_loss=False)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.equal(other[:, t:], logits[:, t:])


# ---------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("kind", ["x-transformers", "llama", "bert", "plain"])
def test_padding_of_prompts_changes_nothing(model_of, compose, ids, kind):
    """Also for models that take no mask, with padding on either side."""
    calm = compose(model_of("gpt2"), model_of(kind, seed=1), trained=True)
    seq, prompt = ids(3, 6), ids(3, 5, seed=2)
    lengths = [5, 3, 4]
    alone = [calm(seq[i : i + 1], prompt=prompt[i : i + 1, :n], return_loss=False) for i, n in enumerate(lengths)]
    right = prompt.clone()
    left = torch.full((3, 7), -1)
    for i, n in enumerate(lengths):
        right[i, n:] = -1
        left[i, 7 - n :] = prompt[i, :n]
    for padded in (right, left):
        together = calm(seq, prompt=padded, return_loss=False)
        assert torch.allclose(together, torch.cat(alone), atol=2e-4)
    mask = right != -1
    junk = right.masked_fill(~mask, 39)
    assert torch.equal(
        calm(seq, prompt=junk, prompt_mask=mask, return_loss=False), calm(seq, prompt=right, return_loss=False)
    )


@pytest.mark.parametrize("shared", [False, True], ids=["prompt", "shared"])
def test_padding_of_sequences_changes_no_logits_at_real_tokens(model_of, compose, ids, shared):
    for kind in ("x-transformers", "llama", "plain"):
        calm = compose(model_of(kind), model_of("gpt2", seed=1), trained=True, shared=shared)
        seq, prompt = ids(2, 6), None if shared else ids(2, 4)
        expected = calm(seq[:1, :4], prompt=None if shared else prompt[:1], return_loss=False)
        for padded in (
            torch.cat((seq[0, :4], torch.tensor([-1, -1]))),
            torch.cat((torch.tensor([-1, -1]), seq[0, :4])),
        ):
            rows = torch.stack((padded, seq[1]))
            logits = calm(rows, prompt=prompt, return_loss=False)
            assert torch.allclose(logits[0][padded != -1], expected[0], atol=2e-4)


def test_a_row_whose_prompt_is_all_padding_is_the_anchor_alone(model_of, compose, ids):
    anchor = model_of("llama")
    calm = compose(anchor, model_of("bert", seed=1), trained=True).train()
    prompt = ids(2, 4)
    prompt[0] = -1
    logits = calm(ids(2, 5), prompt=prompt, return_loss=False)
    assert torch.allclose(logits[0], anchor(ids(2, 5)).logits[0], atol=1e-5)
    logits.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in calm.trainable_parameters())


# -------------------------------------------------------------------------------------------------------- alignment


def test_alignment_by_offsets_shows_text_already_read_only():
    anchor = [[(0, 3), (3, 5), (5, 9)]]
    augment = [[(0, 0), (0, 2), (2, 4), (4, 5), (5, 9)]]
    expected = torch.tensor([[[0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]]).bool()
    assert torch.equal(align_by_offsets(anchor, augment), expected)


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_an_aligned_augment_with_other_tokens_does_not_leak_the_future(model_of, compose, ids, kind):
    """Two characters a token in the anchor, three in the augment."""
    calm = compose(model_of(kind), AugmentParams(model_of("gpt2", seed=1)), trained=True)
    pairs = align_by_offsets([[(2 * i, 2 * i + 2) for i in range(6)]], [[(3 * i, 3 * i + 3) for i in range(4)]])
    seq, prompt = ids(1, 6), ids(1, 4, seed=1)
    logits = calm(seq, prompt=prompt, alignment=pairs, return_loss=False)
    for token in range(4):
        edited = prompt.clone()
        edited[0, token] = (edited[0, token] + 7) % 40
        other = calm(seq, prompt=edited, alignment=pairs, return_loss=False)
        first = math.ceil((3 * token + 3) / 2) - 1  # the first anchor token that ends no earlier
        assert torch.equal(other[:, :first], logits[:, :first])
        assert not torch.equal(other[:, first:], logits[:, first:])
    calm(seq, prompt=prompt, alignment=pairs)
    left = torch.cat((torch.full((1, 2), -1), seq), dim=1)
    moved = torch.cat((torch.zeros(1, 2, 4, dtype=torch.bool), pairs), dim=1)
    assert torch.allclose(calm(left, prompt=prompt, alignment=moved, return_loss=False)[:, 2:], logits, atol=2e-4)
