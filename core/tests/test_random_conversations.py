"""Random conversations: read as transformers reads them, or refused by the row's name, the same on a second try."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_core.data.conversations import NoBorderError, assistant_mask, conversation_ids
from lm_core.data.rows import load_rows
from lm_core.tokenizers import HuggingFaceTokenizer

transformers = pytest.importorskip("transformers")

TURNS = "{% for m in messages %}<{{ m.role }}>\n{{ CONTENT }}<end>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<assistant>\nBEGIN{% endif %}"
PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
TEMPLATES = {
    "plain": TURNS.replace("CONTENT", "m.content") + OPENS.replace("BEGIN", ""),
    "trimmed": TURNS.replace("CONTENT", "m.content | trim") + OPENS.replace("BEGIN", ""),
    "thinks": TURNS.replace("CONTENT", "m.content") + OPENS.replace("BEGIN", "<think>\\n"),
    "parts": TURNS.replace("{{ CONTENT }}", PARTS) + OPENS.replace("BEGIN", ""),
    "alternates": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
        + TURNS.replace("CONTENT", "m.content")
        + OPENS.replace("BEGIN", "")
    ),
}

# separators of Unicode and ASCII, quotes, marks, template syntax, and half of a surrogate pair
CHARACTERS = "\u2028\u2029\u0085\x0b\x0c\x1c\"',;\t\r\n\\ \ufeff\U0001f642ab1{}%<>"
CLEAN = st.text(st.sampled_from(CHARACTERS), max_size=8)
TEXTS = st.text(st.sampled_from(CHARACTERS + "\ud83d"), max_size=8)
PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})
CONTENTS = st.none() | TEXTS | st.lists(PART | TEXTS | PART | st.just({"text": "a"}), max_size=2) | st.just(3)
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool", None, 3])},
    optional={
        "content": CONTENTS,
        "tool_calls": st.sampled_from([None, [CALL]]),
        "name": st.none() | TEXTS,
        "weight": st.none() | st.integers(0, 1),
    },
)


def talks(texts):
    """Conversations that end with an answer."""
    turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
    answer = texts.map(lambda text: {"role": "assistant", "content": text})
    return st.tuples(st.lists(turn, min_size=1, max_size=3), answer).map(lambda parts: [*parts[0], parts[1]])


# half of them are well formed
CHATS = st.booleans().flatmap(
    lambda whole: talks(TEXTS) if whole else st.lists(MESSAGES | st.none() | TEXTS, max_size=4) | MESSAGES | TEXTS
)
RANDOM = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer_of():
    """``tokenizer_of(name)``: byte-level BPE without merges across the templates' marks."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    backend = ByteLevelBPETokenizer()
    special = ["<user>", "<assistant>", "<system>", "<tool>", "<end>"]
    backend.train_from_iterator(["a\n\n\n\nb", "\n\n<think>"] * 9, special_tokens=special, show_progress=False)

    def make(name):
        return HuggingFaceTokenizer(
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(backend.to_str()),
                eos_token="<end>",
                chat_template=TEMPLATES[name],
            )
        )

    return {name: make(name) for name in TEMPLATES}.__getitem__


def outcome(read, *arguments, **named):
    """What a reader returns, or the class and text of its refusal; any other error ends the test."""
    try:
        return read(*arguments, **named)
    except (ValueError, TypeError) as error:
        return type(error), str(error)


def is_conversation(chat):
    """Whether ``chat`` has the form that transformers documents."""
    if not isinstance(chat, list) or not chat:
        return False
    for message in chat:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return False
        if "content" not in message and "tool_calls" not in message:
            return False
        content = message.get("content")
        if not isinstance(content, str | list | None):
            return False
        if isinstance(content, list) and not all(isinstance(part, dict) and "type" in part for part in content):
            return False
    return True


def reference_text(tokenizer, chat, **settings):
    """The text that transformers writes and the tokenizer can encode; None where one of them raises."""
    try:
        text = tokenizer.tokenizer.apply_chat_template(chat, tokenize=False, **settings)
        text.encode("utf-8")
    except Exception:
        return None
    return text


@pytest.mark.parametrize("template", TEMPLATES)
@given(chat=CHATS)
@RANDOM
def test_a_random_conversation_is_read_as_transformers_reads_it_or_refused(template, chat, tokenizer_of):
    tokenizer = tokenizer_of(template)
    result = outcome(conversation_ids, tokenizer, chat, where="row 7")
    assert result == outcome(conversation_ids, tokenizer, chat, where="row 7")

    whole = reference_text(tokenizer, chat) if is_conversation(chat) and len(chat) > 1 else None
    prompt = None if whole is None else reference_text(tokenizer, chat[:-1], add_generation_prompt=True)
    if isinstance(result[0], list):
        assert tokenizer.full_text([*result[0], *result[1]]) == whole
        if whole.startswith(prompt):
            assert result[0] == tokenizer.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        assert "row 7" in result[1]
        # what transformers reads is refused only where the template writes no border
        assert whole is None or prompt is None or issubclass(result[0], NoBorderError), (result, whole, prompt)


@pytest.mark.parametrize("template", ["plain", "parts"])
@given(chat=CHATS)
@RANDOM
def test_a_mask_of_a_random_conversation_has_the_ids_of_transformers(template, chat, tokenizer_of):
    tokenizer = tokenizer_of(template)
    result = outcome(assistant_mask, tokenizer, chat, where="row 7")
    assert result == outcome(assistant_mask, tokenizer, chat, where="row 7")

    whole = reference_text(tokenizer, chat) if is_conversation(chat) else None
    if isinstance(result[0], list):
        ids, mask = result
        assert ids == tokenizer.tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert any(mask) == any(message["role"] == "assistant" for message in chat)
    else:
        assert "row 7" in result[1]
        assert whole is None or issubclass(result[0], NoBorderError) or "assistant" in result[1], (result, whole)


@given(rows=st.lists(talks(CLEAN), min_size=1, max_size=12))
@settings(RANDOM, max_examples=60)
def test_conversations_are_the_same_from_json_lines_and_from_a_table(rows, tokenizer_of, tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizer = tokenizer_of("plain")
    # a table fills the keys that a message lacks with None
    chats = [[{**message, "weight": 1} if n == 0 else message for n, message in enumerate(row)] for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    datasets.Dataset.from_list([{"messages": chat} for chat in chats]).to_parquet(tmp_path / "a.parquet")
    from_lines, from_table = (
        [outcome(conversation_ids, tokenizer, row["messages"], where="row") for row in load_rows(tmp_path / name)]
        for name in ("a.jsonl", "a.parquet")
    )
    assert from_lines == from_table
