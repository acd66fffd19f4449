"""Random rows of supervised data: read with transformers' ids, or refused by row, the same on a second try."""

import json
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_core.tokenizers import HuggingFaceTokenizer
from spin_trainer.data.sft_data import as_sft_dataset

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# separators of Unicode and ASCII, quotes, marks, and half of a surrogate pair
TEXTS = st.text(st.sampled_from("\u2028\u0085\x0b\x1c\"',;\t\r\n\\ \ufeff\U0001f642ab1\ud800"), max_size=6)
WRONG = st.none() | st.integers() | st.lists(st.integers(0, 9), max_size=2) | st.just({"role": "user"}) | st.booleans()
VALUES = st.integers(0, 9).flatmap(lambda chance: WRONG if chance == 0 else TEXTS)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": VALUES})
REPLY = st.fixed_dictionaries({"role": st.just("assistant"), "content": VALUES})
CHATS = st.lists(USER | USER | REPLY, min_size=1, max_size=3)
COLUMNS = {"prompt": VALUES | st.lists(USER, max_size=2), "response": VALUES, "completion": VALUES | st.lists(REPLY)}
ROWS = (
    st.fixed_dictionaries({"prompt": TEXTS, "response": TEXTS}, optional={"source": TEXTS})
    | st.tuples(CHATS, REPLY).map(lambda parts: {"messages": [*parts[0], parts[1]]})
    | st.fixed_dictionaries({}, optional={**COLUMNS, "messages": CHATS | WRONG})
    | st.lists(VALUES, max_size=3)
)
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
    """Ids of prompt and answer of the only row, or the class and text of its refusal; other errors end the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (example,) = as_sft_dataset(str(path), max_seq_len=999, tokenizer=tokenizer)
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    return list(example.prompt), list(example.response)


def expected(row, tokenizer):
    """What a row of two texts, or a chat of texts that ends with an answer, becomes; None for any other row."""
    if r"\ud800" in json.dumps(row):
        return None
    encode = tokenizer.tokenizer
    if isinstance(row, list):
        row = dict(zip(("prompt", "response"), row, strict=False)) if len(row) == 2 else {}
    row = {name: value for name, value in row.items() if value is not None}
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) and message.get("role") for message in messages):
        if any(not isinstance(message.get("content"), str) for message in messages):
            return None
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            return None
        start = encode.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        return encode(start)["input_ids"], encode(messages[-1]["content"] + "<end>")["input_ids"]
    prompt, response = row.get("prompt"), row.get("response")
    if "messages" in row or not prompt or not response or not isinstance(prompt, str) or not isinstance(response, str):
        return None
    # as generation gets the prompt, and as the whole text continues it
    before, whole = encode(prompt)["input_ids"], encode(prompt + response)["input_ids"]
    answer = whole[len(before) :] if whole[: len(before)] == before else encode(response)["input_ids"]
    return before, [*answer, encode.eos_token_id]


@given(row=ROWS)
@RANDOM
def test_a_random_row_is_read_with_the_ids_of_transformers_or_refused(row, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    result = outcome(path, tokenizer)
    assert result == outcome(path, tokenizer)

    wanted = expected(json.loads(path.read_text()), tokenizer)
    if wanted is not None:
        assert result == wanted
    elif isinstance(result[0], list):  # token ids, or a prompt of messages with its answer
        assert result[0]
        assert result[1]
    else:
        assert "line 1" in result[1]
