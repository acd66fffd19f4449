"""Text of generated tokens: increments, stop strings, n-grams, several sequences, processors with row identity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.adapters import as_causal_lm
from lm_core.generation.generate import generate
from lm_core.generation.sampling import forbid_repeated_ngrams
from lm_core.generation.text_stream import TextStream
from lm_core.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


@given(text=st.text(max_size=12), prompt=st.text(max_size=12), seed=st.integers(0, 1000))
def test_increments_are_whole_characters_and_sum_to_the_text(text, prompt, seed):
    stream = TextStream(TOKENIZER.decode, TOKENIZER.encode(prompt))
    parts = [stream.push(token) for token in TOKENIZER.encode(text)]
    assert "".join(parts) + stream.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(tokens=st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_characters_come_with_the_last_text(tokens):
    stream = TextStream(TOKENIZER.decode)
    parts = [stream.push(token) for token in tokens] + [stream.flush()]
    assert "".join(parts) == TOKENIZER.decode(tokens)


def test_a_sentence_piece_tokenizer_keeps_the_space_between_words():
    words = {0: "a", 1: "▁b", 2: "▁c"}

    def decode(ids):  # the first space of a text is dropped
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode, [0])
    assert [stream.push(token) for token in (1, 2, 0, 1)] == [" b", " c", "a", " b"]


class Script(torch.nn.Module):
    """Writes one text after every prompt, character by character."""

    def __init__(self, text):
        super().__init__()
        self.text = TOKENIZER.encode(text)

    def forward(self, ids, *, mask=None):
        logits = torch.full((*ids.shape, TOKENIZER.vocab_size), -10.0)
        for row in range(ids.shape[0]):
            written = ids[row, (ids[row] == TOKENIZER.encode("|")[0]).nonzero()[-1, 0] + 1 :].ne(0).sum()
            logits[row, :, self.text[min(int(written), len(self.text) - 1)]] = 10.0
        return logits


def prompt_rows(*texts):
    return [torch.tensor(TOKENIZER.encode(text + "|")) for text in texts]


@pytest.mark.parametrize(
    ("stops", "expected", "finished"),
    [
        (["END"], "abc END", True),
        (["c", "END"], "abc", True),
        (["nothing"], "abc END more", False),
        ([" "], "abc ", True),
    ],
)
def test_a_row_ends_with_the_token_that_completes_a_stop_string(stops, expected, finished):
    prompts = prompt_rows("x", "END")  # a stop string in a prompt ends nothing
    texts = {0: "", 1: ""}

    def on_text(row, text):
        texts[row] += text

    limits = {"max_new_tokens": 12, "temperature": 0.0, "use_cache": False}
    result = generate(
        as_causal_lm(Script("abc END more")),
        prompts,
        **limits,
        stop_strings=stops,
        on_text=on_text,
        tokenizer=TOKENIZER,
    )
    for row in range(2):
        assert TOKENIZER.decode(result.tokens[row, : result.lengths[row]].tolist()) == expected == texts[row]
        assert bool(result.finished[row]) == finished


def test_texts_of_rows_that_end_at_different_tokens_are_told_apart(models):
    model = models.cached(TOKENIZER.vocab_size, 3)
    rows = [torch.tensor([65 + row]) for row in range(8)]
    texts = {}
    result = generate(
        model,
        rows,
        max_new_tokens=30,
        eos_id=list(range(0, 250, 4)),
        generator=torch.Generator().manual_seed(0),
        on_text=lambda row, text: texts.__setitem__(row, texts.get(row, "") + text),
        tokenizer=TOKENIZER,
    )
    assert result.lengths.unique().numel() > 2
    for row in range(8):
        assert texts.get(row, "") == TOKENIZER.decode(result.tokens[row, : result.lengths[row]].tolist())


def test_stop_strings_end_rows_as_in_transformers(hugging_face):
    transformers = pytest.importorskip("transformers")
    model = hugging_face("llama")
    tokens = [chr(97 + index // 26) + chr(97 + index % 26) for index in range(48)]

    class Tokenizer(ByteTokenizer):
        def decode(self, ids):
            return "".join(tokens[int(index)] for index in ids)

        full_text = decode

    tokenizer, adapter = Tokenizer(), as_causal_lm(model)
    free = generate(adapter, torch.tensor([[1, 2]]), max_new_tokens=20, temperature=0.0)
    text = tokenizer.decode(free.tokens[0].tolist())
    stop = text[5:8]  # begins and ends within tokens

    class Contains(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.tensor([stop in tokenizer.decode(row[2:].tolist()) for row in ids])

    theirs = model.generate(
        torch.tensor([[1, 2]]),
        max_new_tokens=20,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([Contains()]),
    )
    limits = {"max_new_tokens": 20, "temperature": 0.0, "tokenizer": tokenizer}
    ours = generate(adapter, torch.tensor([[1, 2]]), stop_strings=[stop], **limits)
    assert torch.equal(ours.tokens, theirs[:, 2:])
    assert ours.tokens.shape[1] < 20


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), size=st.integers(1, 4), padded=st.integers(0, 5))
def test_repeated_ngrams_are_excluded_as_in_transformers(seed, size, padded):
    processors = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (2, 9), generator=generator)
    logits = torch.randn(2, 3, generator=generator)
    expected = processors.NoRepeatNGramLogitsProcessor(size)(ids, logits)
    assert torch.equal(forbid_repeated_ngrams(logits, ids, size), expected)
    mask = torch.ones(2, 9 + padded, dtype=torch.bool)
    mask[:, :padded] = False
    padding = torch.randint(3, (2, padded), generator=generator)
    assert torch.equal(forbid_repeated_ngrams(logits, torch.cat((padding, ids), dim=1), size, mask), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_generation_without_repeated_ngrams_is_that_of_transformers(hugging_face, size):
    model = hugging_face("llama")
    ids = torch.tensor([[1, 2, 1], [4, 4, 4]])
    settings = {"max_new_tokens": 20, "no_repeat_ngram_size": size}
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    ours = generate(model, ids, temperature=0.0, **settings)
    assert torch.equal(ours.tokens, theirs[:, 3:])
    assert torch.equal(generate(model, list(ids), temperature=0.0, use_cache=False, **settings).tokens, ours.tokens)


def test_sequences_of_one_prompt_follow_one_another(models):
    model = models.cached(12, 0)
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    shift = torch.tensor([0.1, 0.7], dtype=torch.float64)
    twice = generate(model, rows, max_new_tokens=6, temperature=0.0, num_return_sequences=3, shift=shift)
    once = generate(model, rows, max_new_tokens=6, temperature=0.0, shift=shift)
    assert torch.equal(twice.tokens, once.tokens.repeat_interleave(3, dim=0))
    drawn = generate(model, rows, max_new_tokens=20, num_return_sequences=3, generator=torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in drawn.tokens.tolist()}) == 6


def test_processors_know_the_rows_that_have_not_left_the_batch(models):
    model, rows_of_calls = models.cached(12, 5), []

    def own_token(logits, rows):
        """Row ``r`` may only write the token ``r`` or, at its step ``r``, the end."""
        rows_of_calls.append(rows.tolist())
        step = len(rows_of_calls)
        only = torch.full_like(logits, -torch.inf)
        for position, row in enumerate(rows.tolist()):
            only[position, 11 if step > row else row] = 0.0
        return only

    result = generate(
        model, torch.arange(8).unsqueeze(1), max_new_tokens=12, temperature=0.0, eos_id=11, processors=[own_token]
    )
    assert rows_of_calls[-1] != rows_of_calls[0] == list(range(8))
    for row in range(8):
        assert result.tokens[row, : result.lengths[row]].tolist() == [row] * row + [11]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"stop_strings": ["a"]}, ValueError, "need a tokenizer"),
        ({"on_text": print}, ValueError, "need a tokenizer"),
        ({"stop_strings": [""], "tokenizer": TOKENIZER}, ValueError, "must not be empty"),
        ({"stop_strings": "END", "tokenizer": TOKENIZER}, TypeError, "list of strings, got 'END'"),
        ({"stop_strings": ["a"], "tokenizer": 3}, TypeError, "tokenizer must be"),
        ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size must not be negative, got -1"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named_before_anything_is_read(models, arguments, error, words):
    model = models.cached(12, 0)
    with pytest.raises(error, match=words):
        generate(model, torch.tensor([[1]]), max_new_tokens=4, **arguments)
    assert not model.calls
