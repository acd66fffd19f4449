"""Beam search against the enumeration of every sequence, over small models of ``conftest``."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_k


@pytest.fixture(scope="module")
def every_sequence(next_log_probs):
    """All answers of at most ``room`` tokens with their log-probabilities; an answer ends at its first EOS."""

    def sequences(model, prompt, vocabulary, room, eos_id, minimum=0):
        unfinished = [([], [])]
        for step in range(room):
            grown = []
            for tokens, log_probs in unfinished:
                scores = next_log_probs(model, prompt + tokens)
                if step < minimum and eos_id is not None:
                    scores[eos_id] = -math.inf
                    scores = scores - scores.exp().sum().log()
                for token in range(vocabulary):
                    answer = ([*tokens, token], [*log_probs, float(scores[token])])
                    if token == eos_id or step + 1 == room:
                        yield answer
                    else:
                        grown.append(answer)
            unfinished = grown

    return sequences


def score(log_probs, length_penalty):
    return sum(log_probs) / len(log_probs) ** length_penalty


@given(
    seed=st.integers(0, 100_000),
    vocabulary=st.integers(3, 5),
    room=st.integers(3, 4),
    ends=st.booleans(),
    minimum=st.integers(0, 2),
    length_penalty=st.sampled_from([0.0, 0.5, 1.0, 2.0, -0.5]),
    kind=st.sampled_from(["history", "cached", "hidden"]),
)
def test_with_as_many_beams_as_sequences_the_best_of_all_is_found(
    seed, vocabulary, room, ends, minimum, length_penalty, kind, models, every_sequence
):
    model = getattr(models, kind)(vocabulary, seed, sharpness=0.7)
    prompt, eos_id = [1, 0, 2][: 1 + seed % 3], vocabulary - 1 if ends else None
    answers = every_sequence(model, prompt, vocabulary, room, eos_id, minimum)
    ranked = sorted(answers, key=lambda answer: -score(answer[1], length_penalty))
    assume(score(ranked[0][1], length_penalty) - score(ranked[1][1], length_penalty) > 1e-5)  # no tie
    limits = {"beams": vocabulary**room, "max_new_tokens": room, "min_new_tokens": minimum, "eos_id": eos_id}
    result = beam_search(model, torch.tensor([prompt]), **limits, length_penalty=length_penalty)
    best, log_probs = ranked[0]
    assert result.tokens[0].tolist() == best
    assert result.log_probs[0].tolist() == pytest.approx(log_probs, abs=1e-5)
    assert int(result.lengths[0]) == len(best)
    assert bool(result.finished[0]) == (best[-1] == eos_id)


@given(
    seed=st.integers(0, 100_000),
    beams=st.integers(1, 4),
    ends=st.booleans(),
    length_penalty=st.sampled_from([0.0, 1.0, 1.5]),
    use_cache=st.booleans(),
)
def test_a_batch_equals_each_prompt_alone(seed, beams, ends, length_penalty, use_cache, models):
    model, generator = models.cached(6, seed, sharpness=1.0), torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(6, (n,), generator=generator) for n in torch.randint(1, 5, (4,), generator=generator).tolist()
    ]
    limits = {"beams": beams, "max_new_tokens": 6, "eos_id": 2 if ends else None, "pad_id": 7}
    search = partial(beam_search, model, **limits, length_penalty=length_penalty, use_cache=use_cache)
    together = search(prompts)
    for row, prompt in enumerate(prompts):
        alone, length = search([prompt]), int(together.lengths[row])
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert together.tokens[row, length:].eq(7).all()
        assert together.log_probs[row, :length].tolist() == pytest.approx(alone.log_probs[0].tolist(), abs=1e-6)
        assert together.log_probs[row, length:].eq(0).all()
        assert together.finished[row] == alone.finished[0]


@given(seed=st.integers(0, 100_000), ends=st.booleans(), length_penalty=st.sampled_from([0.0, 1.0, 3.0]))
def test_one_beam_is_greedy_decoding(seed, ends, length_penalty, models):
    model, prompts = models.cached(5, seed, sharpness=1.0), [torch.tensor([1]), torch.tensor([2, 4, 0])]
    settings_ = {"max_new_tokens": 7, "eos_id": 3 if ends else None, "repetition_penalty": 1.2}
    searched = beam_search(model, prompts, beams=1, length_penalty=length_penalty, **settings_)
    greedy = generate(model, prompts, temperature=0.0, **settings_)
    for name in ("tokens", "lengths", "finished"):
        assert torch.equal(getattr(searched, name), getattr(greedy, name))
    torch.testing.assert_close(searched.log_probs, greedy.log_probs, rtol=0, atol=1e-6)


@given(seed=st.integers(0, 100_000), length_penalty=st.sampled_from([0.0, 1.0, 1.5]))
def test_more_beams_never_lose_to_the_classic_search_by_hand(seed, length_penalty, models, next_log_probs):
    """Two beams in plain Python: the best two of four candidates continue; endings count among the best two."""
    model, room, eos_id, beams = models.cached(4, seed, sharpness=1.0), 5, 3, 2
    running, finished = [([], [])], []
    for _ in range(room):
        grown = []
        for tokens, log_probs in running:
            scores = next_log_probs(model, [1, *tokens])
            grown += [([*tokens, token], [*log_probs, float(scores[token])]) for token in range(4)]
        grown.sort(key=lambda answer: -sum(answer[1]))
        finished += [answer for answer in grown[:beams] if answer[0][-1] == eos_id]
        running = [answer for answer in grown[: 2 * beams] if answer[0][-1] != eos_id][:beams]
    best = max(finished + running, key=lambda answer: score(answer[1], length_penalty))
    result = beam_search(
        model, torch.tensor([[1]]), beams=beams, max_new_tokens=room, eos_id=eos_id, length_penalty=length_penalty
    )
    assert result.tokens[0].tolist() == best[0]
    assert result.log_probs[0].tolist() == pytest.approx(best[1], abs=1e-5)


def test_log_probs_are_the_models_own_and_eos_waits_for_the_minimum_length(models, next_log_probs):
    model = models.cached(5, 0, sharpness=1.0)
    for minimum, eos_id in itertools.product((0, 3), range(5)):
        result = beam_search(
            model, torch.tensor([[1, 2]]), beams=3, max_new_tokens=5, min_new_tokens=minimum, eos_id=eos_id
        )
        ids = [1, 2]
        for step, token in enumerate(result.tokens[0].tolist()):
            scores = next_log_probs(model, ids)
            if step < minimum:
                assert token != eos_id
                scores[eos_id] = -math.inf
                scores = scores - scores.exp().sum().log()
            assert float(result.log_probs[0, step]) == pytest.approx(float(scores[token]), abs=1e-5)
            ids.append(token)


def test_a_filtered_token_is_never_taken(models, next_log_probs):
    model = models.cached(6, 0, sharpness=1.0)
    result = beam_search(model, torch.tensor([[1]]), beams=4, max_new_tokens=6, filters=[partial(top_k, k=2)])
    ids = [1]
    for token in result.tokens[0].tolist():
        assert token in next_log_probs(model, ids).topk(2).indices.tolist()
        ids.append(token)


def test_a_search_with_a_length_limit_stops_early_when_nothing_can_win(models):
    model = models.cached(5, 0, sharpness=30.0).eval()  # one token has nearly all probability
    first = int(model(torch.tensor([[1]])).argmax())
    model.calls.clear()
    result = beam_search(model, torch.tensor([[1]]), beams=2, max_new_tokens=50, eos_id=first, length_penalty=0.0)
    assert result.tokens.tolist() == [[first]]
    assert len(model.calls) < 5


def test_per_row_kwargs_follow_their_beams(models):
    model, shift = models.history(5, 3, sharpness=1.0), torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
    search = partial(beam_search, model, beams=3, max_new_tokens=5)
    # the size of `other` equals the number of beams in all, not of prompts: it belongs to no row
    together = search(torch.tensor([[1], [1], [1]]), shift=shift, other=torch.zeros(9))
    assert all(call.kwargs["other"].shape == (9,) for call in model.calls)
    for row in range(3):
        assert torch.equal(together.tokens[row], search(torch.tensor([[1]]), shift=shift[row : row + 1]).tokens[0])
