"""Captions: cached = uncached = full forward, a batch = each image alone, beams = exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.losses.losses import token_log_probs

PAD, BOS, EOS = 0, 1, 2


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    st.sampled_from(["shared", "parallel", "cascade"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from([1, 3]),
    st.integers(0, 2**30),
)
def test_cached_captions_equal_uncached_ones_for_prefixes_of_different_lengths(
    make_coca, pooling, lengths, beams, seed
):
    model = make_coca(pooling=pooling, seed=seed % 7).eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), 5, 12, generator=generator)
    prefix = [torch.randint(3, 23, (length,), generator=generator) for length in lengths]
    inputs = {"image_tokens": tokens, "prefix": prefix, "max_new_tokens": 12, "beams": beams}

    cached, uncached = (model.generate(**inputs, use_cache=use_cache) for use_cache in (True, False))

    assert torch.equal(cached, uncached)
    for row, one in enumerate(prefix):
        inputs |= {"image_tokens": tokens[row : row + 1], "prefix": one[None]}
        alone = model.generate(**inputs)[0]
        assert torch.equal(cached[row, : len(alone)], alone)
        assert bool((cached[row, len(alone) :] == PAD).all())


def test_cached_features_equal_the_full_forward(make_coca, make_batch):
    model, (text, tokens) = make_coca().double().eval(), make_batch(dtype=torch.float64)
    pooled = model.embed_image(image_tokens=tokens)[1]
    expected = model(text, image_tokens=tokens)

    with torch.no_grad():
        cache = model.init_cache(4, 2)  # too small at first: it grows
        parts = [model.hidden(text[:, :3], cache=cache, pooled=pooled)]
        parts += [model.hidden(text[:, place : place + 1], cache=cache) for place in range(3, 7)]
    logits = torch.cat(parts, dim=1) @ model.output_weight.T

    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


def test_captions_follow_weights_that_have_changed(make_coca, make_batch):
    """Weight layouts are rebuilt for each caption, since a change through ``.data`` cannot be detected."""
    model, (_, tokens) = make_coca().eval(), make_batch()
    inputs = {"image_tokens": tokens, "max_new_tokens": 12, "min_new_tokens": 12}
    before = model.generate(**inputs)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))

    after = model.generate(**inputs)

    assert not torch.equal(before, after)
    assert torch.equal(after, model.generate(**inputs, use_cache=False))


def test_beams_of_one_image_share_its_keys_without_copies(make_coca, make_batch):
    model, (_, tokens) = make_coca().eval(), make_batch()
    cache = model.init_cache(4, 9)
    with torch.no_grad():
        model.hidden(torch.ones(4, 1, dtype=torch.long), cache=cache, pooled=model.embed_image(image_tokens=tokens)[1])
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    widened = cache.image[2][0]
    cache.reorder(torch.tensor([1, 0, 2, 2, 5, 4, 6, 7]))
    assert cache.image[2][0] is widened

    cache.reorder(torch.tensor([6, 0]))

    assert torch.equal(cache.image[2][0], widened[[6, 0]])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_what_exhaustive_search_finds(make_coca, length_penalty, use_cache):
    model = make_coca(num_tokens=5, seed=3).double().eval()
    tokens = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pooled = model.embed_image(image_tokens=tokens)[1]
    words = [token for token in range(5) if token != PAD]
    candidates = [
        ids
        for n in range(1, 4)
        for ids in itertools.product(words, repeat=n)
        if EOS not in ids[:-1] and (ids[-1] == EOS or n == 3)
    ]

    search = {"beams": len(candidates), "length_penalty": length_penalty, "use_cache": use_cache}
    found = model.generate(image_tokens=tokens, max_new_tokens=3, **search)

    for row in range(2):
        scores = {}
        for ids in candidates:
            sequence = torch.tensor([[BOS, *ids]])
            logits = model.hidden(sequence, pooled=pooled[row : row + 1]) @ model.output_weight.T
            logits[..., PAD] = -torch.inf
            steps = logits[0, :-1].log_softmax(-1).gather(-1, sequence[0, 1:, None]).detach()
            scores[ids] = steps.sum().item() / len(ids) ** length_penalty
        best = max(scores, key=scores.get)
        assert found[row, : len(best)].tolist() == list(best)
        assert bool((found[row, len(best) :] == PAD).all())


def test_padding_is_never_generated(make_coca, make_batch):
    model, (_, tokens) = make_coca().eval(), make_batch()
    generator = torch.Generator().manual_seed(0)

    captions = model.generate(
        image_tokens=tokens, max_new_tokens=40, min_new_tokens=40, temperature=5.0, generator=generator
    )

    assert captions.shape == (4, 40)
    assert not bool((captions == PAD).any())


def test_padding_is_generated_where_it_is_the_end(make_coca, make_batch):
    model, (_, tokens) = make_coca(pad_id=2, eos_id=2).eval(), make_batch()
    generator = torch.Generator().manual_seed(0)

    captions = model.generate(image_tokens=tokens, max_new_tokens=200, temperature=5.0, generator=generator)

    assert bool((captions == 2).any(dim=-1).all())


def test_a_seed_gives_the_same_sample_and_filters_keep_to_the_likely(make_coca, make_batch):
    model, (_, tokens) = make_coca().eval(), make_batch()

    def sample(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            image_tokens=tokens, max_new_tokens=12, min_new_tokens=12, temperature=2.0, generator=generator, **settings
        )

    greedy = model.generate(image_tokens=tokens, max_new_tokens=12, min_new_tokens=12)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1, top_k=1), greedy)
    assert torch.equal(sample(1, top_p=0.0), greedy)


def test_captions_keep_their_prefix_if_asked(make_coca, make_batch):
    model, (text, tokens) = make_coca().eval(), make_batch()

    new = model.generate(image_tokens=tokens, prefix=text[:, :3], max_new_tokens=4)
    whole = model.generate(image_tokens=tokens, prefix=text[:, :3], max_new_tokens=4, return_prefix=True)

    assert torch.equal(whole[:, :3], text[:, :3])
    assert torch.equal(whole[:, 3:], new)


def test_generation_leaves_the_models_mode_alone(make_coca, make_batch):
    model, (_, tokens) = make_coca().train(), make_batch()
    model.generate(image_tokens=tokens, max_new_tokens=2)

    assert all(module.training for module in model.modules())


def test_a_caption_is_scored_as_a_language_model_scores_it(make_coca, make_batch):
    model, (text, tokens) = make_coca().eval(), make_batch()
    logits = model(text, image_tokens=tokens)
    expected = logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]

    found = token_log_probs(model, text, pooled=model.embed_image(image_tokens=tokens)[1])

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.plain
@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_a_static_step_is_one_graph_and_equals_the_full_forward(make_coca, make_batch, block):
    from torch._dynamo.testing import CompileCounter

    changes = {} if block == "parallel" else {"block": block, "max_text_length": 12}
    model, (text, tokens) = make_coca(**changes).double().eval(), make_batch(n=9, dtype=torch.float64)
    counter = CompileCounter()
    step = torch.compile(model.hidden, fullgraph=True, backend=counter)
    pooled = model.embed_image(image_tokens=tokens)[1]

    with torch.no_grad():
        expected = model(text, image_tokens=tokens)
        for read in (2, 5):  # lengths of the prompt
            cache = model.init_cache(4, 16, static=True)
            parts = [model.hidden(text[:, :read], cache=cache, pooled=pooled)]
            cache.begin_steps()
            parts += [step(text[:, place : place + 1], cache=cache) for place in range(read, 9)]
            torch.testing.assert_close(torch.cat(parts, dim=1) @ model.output_weight.T, expected, atol=1e-9, rtol=0)

    assert counter.frame_count == 1  # neither a break of the graph nor a second compilation
