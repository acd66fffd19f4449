"""Generation through PaLM: cached equals uncached, batches equal single prompts, and the originals' interface."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core import beam_search, generate, left_pad, right_pad


def chunks_of(n, drawn):
    """Random sizes that sum to ``n``, mostly of one token, as in decoding."""
    sizes = []
    while sum(sizes) < n:
        sizes.append(min(n - sum(sizes), drawn.choose(1, 1, 1, 2, 5)))
    return sizes


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    seed=st.integers(0, 1_000_000),
    padding=st.sampled_from([None, "left", "right"]),
    long=st.sampled_from([False, False, False, True]),
    block=st.sampled_from([None, None, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    gradients=st.booleans(),
)
def test_cached_logits_equal_uncached_logits(seed, padding, long, block, dtype, gradients, random_model):
    drawn = random_model(seed)
    palm, generator, vocabulary = drawn.palm.to(dtype), drawn.generator, drawn.settings["num_tokens"]
    if block is not None:  # decoding crosses blocks of queries, as it does every few thousand tokens
        palm.rotary.xpos_blocks = partial(palm.rotary.xpos_blocks, block=block)
    lengths = [drawn.choose(1, 2, 4, 7) for _ in range(drawn.choose(1, 3))]
    new = 62 if long else drawn.choose(1, 3, 6)  # the first table of angles ends at position 64
    prompts = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    answers = torch.randint(vocabulary, (len(prompts), new), generator=generator)
    if padding is None:
        prompts = [row[: min(lengths)] for row in prompts]
    prompt, mask = (left_pad if padding == "left" else right_pad)(prompts, vocabulary - 1)
    ids = torch.cat((prompt, answers), dim=1)
    mask = None if padding is None else torch.cat((mask, torch.ones_like(answers, dtype=torch.bool)), dim=1)

    cache, parts, done = palm.init_cache(len(prompts), drawn.choose(1, ids.shape[1])), [], 0
    with torch.set_grad_enabled(gradients):
        for size in [prompt.shape[1], *chunks_of(new, drawn)]:
            stop = done + size
            seen = None if mask is None else mask[:, :stop]
            parts.append(palm(ids[:, done:stop], mask=seen, cache=cache).detach())
            done = stop
        cached, whole = torch.cat(parts, dim=1), palm(ids, mask=mask).detach()
    assert cache.length == ids.shape[1]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    scale = whole.abs().max().clamp(min=1).item()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * scale
    torch.testing.assert_close(cached[real], whole[real], rtol=0, atol=tolerance)
    for row, (tokens, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = palm(torch.cat((tokens, answer))[None])[0].detach()
        torch.testing.assert_close(cached[row][real[row]], alone, rtol=0, atol=tolerance)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 1_000_000),
    use_cache=st.booleans(),
    ends=st.booleans(),
    beams=st.sampled_from([None, None, 3]),
    form=st.sampled_from(["list", "left", "right"]),
)
def test_a_batch_of_different_lengths_equals_each_prompt_alone(seed, use_cache, ends, beams, form, random_model):
    drawn = random_model(seed)
    palm, vocabulary = drawn.palm.double(), drawn.settings["num_tokens"]
    prompts = [torch.randint(vocabulary, (n,), generator=drawn.generator) for n in (3, 1, 6, 2)]
    prompt, mask = {"list": (prompts, None), "left": left_pad(prompts), "right": right_pad(prompts)}[form]
    decode = partial(generate, temperature=0.0) if beams is None else partial(beam_search, beams=beams)
    decode = partial(decode, palm, max_new_tokens=7, eos_id=1 if ends else None, pad_id=vocabulary)
    together = decode(prompt, mask=mask, use_cache=use_cache)
    for row, tokens in enumerate(prompts):
        alone, length = decode([tokens], use_cache=False), int(together.lengths[row])
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert together.tokens[row, length:].eq(vocabulary).all()
        assert together.log_probs[row, :length].tolist() == pytest.approx(alone.log_probs[0].tolist(), abs=1e-6)


def test_log_probs_are_those_of_the_whole_sequence_scored_at_once(make_palm):
    palm, prompts = make_palm(), [torch.tensor([1, 2, 3]), torch.tensor([4])]
    generator = torch.Generator().manual_seed(0)
    result = generate(palm, prompts, max_new_tokens=9, temperature=1.3, eos_id=5, generator=generator)
    for row, prompt in enumerate(prompts):
        answer = result.tokens[row, : result.lengths[row]]
        logits = palm.double()(torch.cat((prompt, answer))[None])[0] / 1.3
        exact = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, answer[:, None]).flatten()
        assert result.log_probs[row, : len(answer)].tolist() == pytest.approx(exact.tolist(), abs=1e-5)
        palm.float()


def test_seq_len_is_the_total_length_and_max_new_tokens_counts_new_ones(make_palm):
    palm, prompt = make_palm(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = partial(palm.generate, prompt=prompt, temperature=0.0)
    assert greedy(8).shape == (2, 5)
    assert torch.equal(greedy(8), greedy(max_new_tokens=5))
    assert torch.equal(greedy(8), generate(palm, prompt, max_new_tokens=5, temperature=0.0).tokens)
    whole = greedy(8, return_seq_without_prompt=False)
    assert torch.equal(whole, torch.cat((prompt, greedy(8)), dim=1))


@pytest.mark.parametrize("leading", [(), (1,), (3,), (3, 2), (1, 2, 2)])
def test_leading_dimensions_of_the_prompt_are_those_of_the_result(leading, make_palm):
    palm = make_palm()
    prompt = torch.randint(13, (*leading, 4))
    result = palm.generate(9, prompt, temperature=0.0)
    assert result.shape == (*leading, 5)
    flat = palm.generate(9, prompt.reshape(-1, 4), temperature=0.0)
    assert torch.equal(result.reshape(-1, 5), flat)
    lengths = torch.randint(1, 5, leading)
    masked = palm.generate(prompt=prompt, mask=torch.arange(4) < lengths[..., None], max_new_tokens=3, temperature=0.0)
    assert masked.shape == (*leading, 3)
    assert torch.equal(masked, palm.generate(prompt=prompt, prompt_lengths=lengths, max_new_tokens=3, temperature=0.0))


def test_without_a_prompt_a_random_token_starts_and_is_returned(make_palm):
    palm = make_palm()
    starts = set()
    for seed in range(40):
        result = palm.generate(5, temperature=0.0, generator=torch.Generator().manual_seed(seed))
        assert result.shape == (1, 5)
        assert torch.equal(result[:, 1:], palm.generate(5, result[:, :1], temperature=0.0))
        starts.add(int(result[0, 0]))
    assert len(starts) > 8


def test_prompts_of_different_lengths_may_come_back_before_their_answers(make_palm):
    palm, prompts = make_palm(), [torch.tensor([1, 2, 3]), torch.tensor([4])]
    answers = palm.generate(prompt=prompts, max_new_tokens=2, temperature=0.0)
    whole = palm.generate(
        prompt=prompts, max_new_tokens=2, temperature=0.0, return_seq_without_prompt=False, pad_value=12
    )
    assert whole.tolist() == [[1, 2, 3, *answers[0].tolist()], [4, *answers[1].tolist(), 12, 12]]


@pytest.mark.parametrize("names", [("eos_token", "pad_value"), ("eos_id", "pad_id")])
def test_an_answer_ends_with_eos_under_either_name_and_is_padded(names, make_palm):
    palm, prompts = make_palm(), torch.arange(12).reshape(6, 2)
    free = palm.generate(22, prompts, temperature=0.0)
    ids, counts = free.unique(return_counts=True)
    eos = int(ids[counts.argmax()])
    ended = palm.generate(22, prompts, temperature=0.0, **dict(zip(names, (eos, 77), strict=True)))
    assert ended.eq(77).any()
    for row, unended in zip(ended.tolist(), free.tolist(), strict=True):
        length = unended.index(eos) + 1 if eos in unended else len(unended)
        assert row == unended[:length] + [77] * (ended.shape[1] - length)


def test_the_default_filter_keeps_a_tenth_of_the_vocabulary(make_palm):
    palm, prompt = make_palm(num_tokens=40), torch.tensor([3, 5])
    kept = palm(prompt[None])[0, -1].topk(4).indices
    drawn = palm.generate(3, prompt.expand(500, 2), generator=torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == set(kept.tolist())
    free = palm.generate(3, prompt.expand(500, 2), filter_logits_fn=None, generator=torch.Generator().manual_seed(0))
    assert len(free.unique()) > 10


@pytest.mark.parametrize(("shape", "seed"), [((16,), 6), ((1, 16), 6), ((1, 1, 16), 6), ((6, 1, 16), 13)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_extra_embedding_holds_for_new_tokens_too(shape, seed, use_cache, make_palm):
    palm, extra = make_palm(seed).double(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    prompts = [torch.tensor([row + 1, 2 * row, 3][: 1 + row % 3]) for row in range(6)]
    answer = partial(palm.generate, prompt=prompts, max_new_tokens=8, temperature=0.0, extra_embed=extra)
    free = answer(use_cache=use_cache)
    hits = [(int((free[:, :7] == token).any(dim=1).sum()), token) for token in range(13)]
    count, ending = max(hit for hit in hits if hit[0] < 6)
    assert count >= 3  # enough rows end early for the others to be moved together
    for eos_id in (None, ending):
        result = answer(eos_id=eos_id, use_cache=use_cache)
        for row, ids in enumerate(prompts):
            for token in result[row].tolist():
                own = extra if extra.ndim < 3 or len(extra) == 1 else extra[row : row + 1]
                assert token == int(palm(ids[None], extra_embed=own)[0, -1].argmax())
                ids = torch.cat((ids, torch.tensor([token])))
                if token == eos_id:
                    break


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_finetune_scope_named_with_the_prompt_holds_for_new_tokens_too(use_cache, make_palm, trained):
    palm = make_palm(finetune_scopes=("actor",)).double()
    trained(palm.finetune_modules)
    prompt = torch.tensor([[1, 2, 3]])
    ids = prompt
    for _ in range(6):
        ids = torch.cat((ids, palm(ids, finetune_scope="actor")[:, -1:].argmax(-1)), dim=1)
    result = palm.generate(9, prompt, temperature=0.0, finetune_scope="actor", use_cache=use_cache)
    assert torch.equal(result, ids[:, 3:])
    base = palm.generate(9, prompt, temperature=0.0, use_cache=use_cache)
    assert not torch.equal(result, base)
    disabled = palm.generate(9, prompt, temperature=0.0, finetune_scope="actor", disable_lora=True, use_cache=use_cache)
    assert torch.equal(disabled, base)


def filled(palm, ids, **settings_):
    cache = palm.init_cache(ids.shape[0], 1)
    palm(ids, cache=cache, **settings_)
    return cache


def test_a_cloned_cache_continues_like_its_original(make_palm, trained):
    palm, ids, new = make_palm(finetune_scopes=("actor",)).double(), torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    trained(palm.finetune_modules)
    settings_ = {"finetune_scope": "actor", "extra_embed": torch.ones(16)}
    cache = filled(palm, ids, **settings_)
    copy = cache.clone()
    first, second = palm(new, cache=cache), palm(new, cache=copy)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, palm(torch.cat((ids, new), dim=1), **settings_)[:, 3:], rtol=1e-9, atol=1e-9)


def test_a_forward_that_fails_leaves_the_cache_as_it_was(make_palm):
    palm, ids, new = make_palm(finetune_scopes=("actor",)), torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
    untouched, cache, empty = filled(palm, ids), filled(palm, ids), palm.init_cache(1, 5)

    def fail(module, inputs):
        raise RuntimeError("out of memory")

    hook = palm.layers[1].register_forward_pre_hook(fail)
    for victim in (cache, empty):
        with pytest.raises(RuntimeError, match="out of memory"):
            palm(new, cache=victim, mask=torch.ones(1, victim.length + 1, dtype=torch.bool), finetune_scope=None)
    with pytest.raises(RuntimeError, match="out of memory"):
        palm(new, cache=empty, finetune_scope="actor", extra_embed=torch.ones(16))
    hook.remove()
    assert (cache.length, empty.length) == (3, 0)
    assert (cache.masked, empty.masked, empty.finetune_scope, empty.extra_embed) == (False, False, None, None)
    assert torch.equal(palm(new, cache=cache), palm(new, cache=untouched))
    assert torch.equal(palm(ids, cache=empty), palm(ids))


def test_memory_is_taken_once_a_generation(make_palm):
    palm, places = make_palm(), set()
    whole = palm.init_cache

    def watched(*sizes):
        cache = whole(*sizes)
        advance = cache.advance

        def noted(count):
            places.add((*(buffer.data_ptr() for buffer in cache._buffers), cache.nbytes))
            advance(count)

        cache.advance = noted
        return cache

    palm.init_cache = watched
    generate(palm, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=100, temperature=0.0)
    assert len(places) == 1
    assert next(iter(places))[-1] == 2 * 2 * 2 * 2 * 102 * 8 * 4  # keys and values, layers, rows, heads, length, ...


def test_listeners_to_blocks_hear_every_decoding_step(make_palm):
    palm, heard = make_palm(), []
    palm.layers[0].register_forward_hook(lambda module, inputs, output: heard.append(output.shape[1]))
    expected = make_palm().generate(8, torch.tensor([1, 2]), temperature=0.0)
    assert torch.equal(palm.generate(8, torch.tensor([1, 2]), temperature=0.0), expected)
    assert heard == [2, 1, 1, 1, 1, 1]


def test_generation_restores_modes_keeps_the_rng_and_leaves_the_model_trainable(make_palm):
    palm = make_palm(attn_dropout=0.1).train()
    palm.layers[0].eval()
    modes, rng = [module.training for module in palm.modules()], torch.get_rng_state()
    with torch.inference_mode():
        first = palm.generate(80, torch.tensor([1, 2]), temperature=0.0)
    assert torch.equal(first, palm.generate(80, torch.tensor([1, 2]), temperature=0.0))
    assert [module.training for module in palm.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    palm(torch.arange(13)[None], return_loss=True).backward()
    assert palm.token_emb.weight.grad.isfinite().all()


@pytest.mark.parametrize("qk_rmsnorm", [False, True])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_generation_in_bfloat16_is_cached_as_it_is_uncached(qk_rmsnorm, how, make_palm):
    palm = make_palm(qk_rmsnorm=qk_rmsnorm)
    palm = palm.bfloat16() if how == "weights" else palm
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        cached, uncached = (
            generate(palm, prompts, max_new_tokens=6, temperature=0.0, use_cache=use_cache)
            for use_cache in (True, False)
        )
        single = generate(palm, prompts[:1], max_new_tokens=6, temperature=0.0)
    for result in (cached, uncached, single):
        assert result.log_probs.isfinite().all()
        assert result.log_probs.dtype == torch.float32
    torch.testing.assert_close(cached.log_probs[:, 0], uncached.log_probs[:, 0], rtol=0, atol=0.05)
