"""Random rows of preferences: read with transformers' ids, or refused by row and column, the same on a second try."""

import json
import math
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_core.tokenizers import HuggingFaceTokenizer
from palm_rlhf.data.preferences import Labelled, load_preferences

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# separators of Unicode and ASCII, quotes, marks, and half of a surrogate pair
TEXTS = st.text(st.sampled_from("\u2028\u0085\x0b\x1c\"',;\t\r\n\\ \ufeff\U0001f642ab1\ud800"), max_size=6)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS})
REPLY = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS})
WRONG = st.none() | st.integers() | st.lists(st.integers(0, 9), max_size=2) | st.just({"role": "user"}) | st.booleans()
NUMBERS = st.none() | st.floats(allow_nan=True) | st.integers(-3, 3) | st.booleans() | st.sampled_from(["0.5", "x"])


def rows_of(prompts, responses):
    """Rows with ``prompts`` and ``responses`` that now and then lack a column or hold another value."""
    value = st.integers(0, 9).flatmap(lambda chance: WRONG if chance == 0 else responses)
    columns = {"prompt": prompts, "chosen": value, "rejected": value}
    return st.fixed_dictionaries(columns, optional={"margin": NUMBERS, "source": TEXTS}) | st.fixed_dictionaries(
        {}, optional={**columns, "response": value, "completion": value, "label": NUMBERS}
    )


ROWS = rows_of(TEXTS, TEXTS) | rows_of(st.lists(USER, min_size=1, max_size=2), TEXTS | st.lists(REPLY, max_size=1))
RANDOM = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    backend = ByteLevelBPETokenizer()
    special = ["<user>", "<assistant>", "<end>"]
    backend.train_from_iterator(["a\n\nb"] * 9, special_tokens=special, show_progress=False)
    return HuggingFaceTokenizer(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(backend.to_str()), eos_token="<end>", chat_template=TEMPLATE
        )
    )


def outcome(path, tokenizer):
    """Prompt, responses and number of the only row, or the class and text of its refusal; other errors end the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a row that is left out is counted by a warning
            (example,) = load_preferences(str(path), tokenizer=tokenizer)
    except (ValueError, TypeError, UserWarning) as error:
        return type(error), str(error)
    if isinstance(example, Labelled):
        return example.prompt.tolist(), [example.response.tolist()], example.label
    return example.prompt.tolist(), [example.chosen.tolist(), example.rejected.tolist()], example.margin


def expected(row, tokenizer):
    """What a row of texts or chats that the module's table lists becomes; None for any other row."""
    row = {name: value for name, value in row.items() if value is not None}
    names = ("chosen", "rejected") if {"chosen", "rejected"} <= set(row) else ("response",)
    if "completion" in row:
        row.setdefault("response", row["completion"])
    number = row.get("margin", 0.0) if names != ("response",) else row.get("label")
    if (
        "prompt" not in row
        or not set(names) <= set(row)
        or r"\ud800" in json.dumps([row["prompt"], *map(row.get, names)])
    ):
        return None
    try:
        number = float(number)
    except (TypeError, ValueError):
        return None
    prompt, responses = row["prompt"], [row[name] for name in names]
    encode = tokenizer.tokenizer
    if not math.isfinite(number):
        return None
    if isinstance(prompt, str) and prompt and all(isinstance(response, str) for response in responses):
        ids = [encode(response)["input_ids"] + [encode.eos_token_id] for response in responses]
        return encode(prompt)["input_ids"], ids, number
    if isinstance(prompt, list) and all(isinstance(response, str) for response in responses):
        start = encode.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return encode(start)["input_ids"], [encode(response + "<end>")["input_ids"] for response in responses], number
    return None


@given(row=ROWS)
@RANDOM
def test_a_random_pair_is_read_with_the_ids_of_transformers_or_refused(row, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    result = outcome(path, tokenizer)
    assert repr(result) == repr(outcome(path, tokenizer))

    wanted = expected(json.loads(path.read_text()), tokenizer)
    if wanted is not None:
        assert result == wanted
    elif isinstance(result[0], list):  # token ids, messages as a response, or an implicit prompt
        assert result[0]
        assert all(result[1])
        assert math.isfinite(result[2])
    else:
        assert "line 1" in result[1] or "must hold at least one" in result[1]
