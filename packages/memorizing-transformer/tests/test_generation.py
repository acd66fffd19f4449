"""Generation with memory equals the teacher-forced pass, segment by segment."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate

MODELS = {
    "plain": {},
    "window": {"xl_max_memories": 6},
    "sigmoid, own keys": {"xl_max_memories": 6, "gate": "sigmoid", "multi_head_keys": True},
    "boundaries": {"xl_max_memories": 6, "clear_memories_on_eos_token_id": 3},
    "begins": {"xl_max_memories": 11, "clear_memories_on_sos_token_id": 3},
    "shifted": {
        "xl_max_memories": 20,
        "shift_xl_memories_down": 1,
        "memorizing_layers": (1, 3),
        "shift_knn_memories_down": 1,
    },
    "gated": {"gate_output": True},
}


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, derandomize=True, max_examples=7)
@given(st.integers(1, 9), st.integers(0, 12), st.lists(st.integers(1, 17), min_size=2, max_size=6), st.integers(0, 99))
def test_cached_logits_equal_the_teacher_forced_pass_at_the_same_segment_length(
    tiny_model, read_in_segments, name, length, window, pieces, seed
):
    model = tiny_model(seed, **{**MODELS[name], "xl_max_memories": window}, segment_length=length)
    ids = torch.randint(0, 20, (2, sum(pieces)))
    expected, _ = read_in_segments(model, ids, model.create_knn_memories(batch_size=2), length=length)
    cache = model.init_cache(2, 64)
    cached = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, 1)], dim=1)
    torch.testing.assert_close(cached, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_different_lengths_go_as_each_alone(tiny_model, read_in_segments, name):
    model, ids = tiny_model(**MODELS[name]), torch.randint(0, 20, (2, 33))
    expected, _ = read_in_segments(model, ids, model.create_knn_memories(batch_size=2))
    padded, mask = torch.zeros(2, 23, dtype=torch.long), torch.zeros(2, 23, dtype=torch.bool)
    padded[0, 10:], mask[0, 10:] = ids[0, :13], True
    padded[1], mask[1] = ids[1, :23], True
    cache = model.init_cache(2, 64)
    out = model(padded, mask=mask, cache=cache)
    torch.testing.assert_close(out[0, 10:], expected[0, :13], atol=1e-10, rtol=0)
    torch.testing.assert_close(out[1], expected[1, :23], atol=1e-10, rtol=0)
    for step in range(10):
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        new = ids[[0, 1], [13 + step, 23 + step]].unsqueeze(1)
        out = model(new, mask=mask, cache=cache)
        torch.testing.assert_close(out, expected[[0, 1], [13 + step, 23 + step]].unsqueeze(1), atol=1e-10, rtol=0)


def test_greedy_generation_equals_a_plain_loop(tiny_model, read_in_segments):
    model = tiny_model(xl_max_memories=5)
    prompts = [torch.randint(0, 20, (length,)) for length in (3, 12, 19)]
    tokens = generate(model, prompts, max_new_tokens=15, temperature=0.0).tokens
    for prompt, answer in zip(prompts, tokens, strict=True):
        ids = prompt.unsqueeze(0)
        for _ in range(15):
            logits, _ = read_in_segments(model, ids, model.create_knn_memories(batch_size=1))
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(answer, ids[0, len(prompt) :])
    assert torch.equal(model.generate(prompts, max_new_tokens=15, temperature=0.0), tokens)


def test_generation_reads_a_given_memory_and_leaves_it_as_it_was(tiny_model):
    model, past, prompt = tiny_model(), torch.randint(0, 20, (1, 24)), torch.randint(0, 20, (1, 5))
    memories = model.create_knn_memories(batch_size=1)
    for segment in past.split(8, 1):
        model(segment, knn_memories=memories)
    before = memories[0].state_dict()["kv"][0].clone()
    with_memory = generate(model, prompt, max_new_tokens=20, temperature=0.0, knn_memories=memories)
    without = generate(model, prompt, max_new_tokens=20, temperature=0.0)

    assert torch.equal(memories[0].state_dict()["kv"][0], before)
    assert not torch.equal(with_memory.log_probs, without.log_probs)
    expected = model(prompt, knn_memories=memories, add_knn_memory=False)[:, -1].detach().float().log_softmax(-1)
    assert with_memory.log_probs[0, 0] == pytest.approx(float(expected.max()), abs=1e-5)


def test_beams_carry_their_own_memories(tiny_model):
    model, prompt = tiny_model(xl_max_memories=5), torch.randint(0, 20, (2, 6))
    one = beam_search(model, prompt, beams=1, max_new_tokens=14)
    assert torch.equal(one.tokens, generate(model, prompt, max_new_tokens=14, temperature=0.0).tokens)
    assert beam_search(model, prompt, beams=3, max_new_tokens=14).tokens.shape == (2, 14)


def test_rows_that_end_leave_the_batch_and_the_others_continue(tiny_model):
    model = tiny_model(xl_max_memories=5)
    prompts = [torch.randint(0, 20, (length,)) for length in (3, 12, 19, 7)]
    together = generate(model, prompts, max_new_tokens=24, temperature=0.0, eos_id=int(model.num_tokens - 1))
    for number, prompt in enumerate(prompts):
        alone = generate(model, [prompt], max_new_tokens=24, temperature=0.0, eos_id=int(model.num_tokens - 1))
        length = int(alone.lengths[0])
        assert int(together.lengths[number]) == length
        assert torch.equal(together.tokens[number, :length], alone.tokens[0, :length])


def test_a_pad_id_is_padding_with_a_cache_as_well(tiny_model, read_in_segments):
    model, ids = tiny_model(pad_id=0, xl_max_memories=5), torch.randint(1, 20, (1, 30))
    expected, _ = read_in_segments(model, ids, model.create_knn_memories(batch_size=1))
    padded = torch.cat((ids[:, :7], torch.zeros(1, 3, dtype=torch.long), ids[:, 7:]), dim=1)
    cache = model.init_cache(1, 64)
    got = torch.cat([model(piece, cache=cache) for piece in padded.split([9, 4, 20], dim=1)], dim=1)
    torch.testing.assert_close(got[padded != 0], expected[0], atol=1e-10, rtol=0)
