"""Conversations: the border of an answer in any template, messages as transformers takes them, masks of all answers."""

import pytest

from lm_core.data.conversations import NoBorderError, assistant_mask, check_messages, conversation_ids, prompt_of_chat
from lm_core.tokenizers import ByteTokenizer, HuggingFaceTokenizer

ASK = {"role": "user", "content": "say hi"}
# what opens an answer in the prompt, and in the whole conversation
PLAIN = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}"
OPENED = PLAIN + "{% if add_generation_prompt %}<assistant>\n{% endif %}"
THINKS = PLAIN + "{% if add_generation_prompt %}<assistant>\n<think>\n{% endif %}"
PREFILLED = PLAIN + (
    "{% if add_generation_prompt %}<assistant>\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OTHER_HEADER = PLAIN + "{% if add_generation_prompt %}<answer>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + OPENED
WITH_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_of():
    """``tokenizer_of(template)``: byte-level BPE that merges line breaks, as GPT-2's and SmolLM2's do."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = ByteLevelBPETokenizer()
    special = ["<user>", "<assistant>", "<system>", "<end>"]
    backend.train_from_iterator(["a\n\n\n\nb", "\n\n<think>"] * 9, special_tokens=special, show_progress=False)

    def make(template):
        hugging_face = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(backend.to_str()), eos_token="<end>", chat_template=template
        )
        return HuggingFaceTokenizer(hugging_face)

    return make


@pytest.mark.parametrize(
    ("template", "answer", "prompt_end", "response"),
    [
        (OPENED, "hi", "<assistant>\n", "hi<end>\n"),
        (OPENED, "\n\nhi", "<assistant>\n", "\n\nhi<end>\n"),  # a token of line breaks reaches across the border
        (OPENED, "", "<assistant>\n", "<end>\n"),
        (THINKS, "<think>\nsure\n</think>hi", "<assistant>\n<think>\n", "sure\n</think>hi<end>\n"),
        (THINKS, "\nsure</think>", "<assistant>\n", "\nsure</think><end>\n"),  # the opening word is left out
        (THINKS, "<b>hi", "<assistant>\n", "<b>hi<end>\n"),  # "<" of both the opening word and the answer
        (THINKS, "hi", "<assistant>\n", "hi<end>\n"),  # which occurs in the question too
        (THINKS, "a", "<assistant>\n", "a<end>\n"),  # which occurs in the header too
    ],
)
def test_an_answer_begins_where_its_prompt_ends(tokenizer_of, template, answer, prompt_end, response):
    tokenizer = tokenizer_of(template)
    prompt, ids = conversation_ids(tokenizer, [ASK, {"role": "assistant", "content": answer}])

    assert tokenizer.full_text(prompt) == f"<user>\nsay hi<end>\n{prompt_end}"
    assert tokenizer.full_text(ids) == response
    assert prompt == tokenizer.encode(tokenizer.full_text(prompt))  # as generation gets it


def test_a_template_gets_its_arguments(tokenizer_of):
    tokenizer, chat = tokenizer_of(PREFILLED), [ASK, {"role": "assistant", "content": "<think>\n\n</think>\n\nhi"}]
    prompts = [
        (
            conversation_ids(tokenizer, chat, template_kwargs=given)[0],
            prompt_of_chat(tokenizer, [ASK], template_kwargs=given),
        )
        for given in (None, {"enable_thinking": False})
    ]

    assert [prompt == of_chat for prompt, of_chat in prompts] == [True, True]
    assert [tokenizer.full_text(prompt).endswith("</think>\n\n") for prompt, _ in prompts] == [False, True]
    with pytest.raises(ValueError, match=r"template_kwargs need a chat template, got .* for ByteTokenizer"):
        conversation_ids(ByteTokenizer(), chat, template_kwargs={"enable_thinking": False})


def test_a_conversation_without_a_border_is_told_from_one_that_is_refused(tokenizer_of):
    chat = [ASK, {"role": "assistant", "content": "hi"}]
    with pytest.raises(NoBorderError, match=r"row 3: the chat template must write a conversation so that"):
        conversation_ids(tokenizer_of(OTHER_HEADER), chat, where="row 3")
    with pytest.raises(ValueError, match=r"row 3 is refused by the chat template: no system role") as refused:
        conversation_ids(tokenizer_of(NO_SYSTEM), [{"role": "system", "content": "x"}, *chat], where="row 3")
    assert not isinstance(refused.value, NoBorderError)


# messages, and the text that transformers' own apply_chat_template makes of them
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}


@pytest.mark.parametrize(
    "messages",
    [
        [ASK, {**CALL, "content": None}],
        [{**ASK, "name": None, "weight": 3}, CALL],
        [ASK, {**CALL, "content": ""}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "4"}],
        [ASK, {"role": "assistant", "content": "hi", "tool_calls": None, "reasoning": None}],
    ],
)
def test_messages_are_taken_as_transformers_takes_them(tokenizer_of, messages):
    tokenizer = tokenizer_of(WITH_TOOLS)
    expected = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)

    assert tokenizer.chat_text(messages, False) == expected
    prompt, answer = conversation_ids(tokenizer, messages)
    assert tokenizer.full_text([*prompt, *answer]) == expected
    assert check_messages(messages) == messages


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"role": "user"}, ValueError, r"row 1, message 57, must have 'role' and 'content', got the keys \['role'\]"),
        ({"content": "a"}, ValueError, r"message 57, must have 'role'"),
        ({"role": 3, "content": "a"}, TypeError, r"message 57, must have texts as 'role' and 'content', got 3 and 'a'"),
        ({"role": "user", "content": 3}, TypeError, r"message 57, must have texts"),
        ({"role": "user", "content": ["a"]}, TypeError, r"message 57, must have parts with 'type'"),
        ("user: a", TypeError, r"message 57, must be a message"),
    ],
)
def test_every_message_is_checked(wrong, error, message):
    with pytest.raises(error, match=message):
        check_messages([*[ASK] * 57, wrong, *[ASK] * 42], "row 1,")


@pytest.mark.parametrize(
    ("messages", "error"), [("text", TypeError), (ASK, TypeError), (None, TypeError), ([], ValueError)]
)
def test_what_is_no_conversation_is_refused(messages, error):
    with pytest.raises(error, match=r"^row 1 must"):
        check_messages(messages, "row 1")


def test_bytes_have_the_text_of_messages():
    parts = [{"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "hi"}]}]
    tokenizer = ByteTokenizer()

    assert tokenizer.apply_chat_template(parts) == tokenizer.apply_chat_template([ASK])
    assert tokenizer.apply_chat_template([{"role": "user", "content": None}], False) == [256, *b"user: ", 257]


@pytest.mark.parametrize("answers", [("hi", "ho"), ("\n\nhi", "\nho")])
@pytest.mark.parametrize("kind", ["template", "bytes"])
def test_a_mask_marks_the_tokens_of_every_answer(tokenizer_of, answers, kind):
    tokenizer = tokenizer_of(OPENED) if kind == "template" else ByteTokenizer()
    chat = [ASK, {"role": "assistant", "content": answers[0]}, ASK, {"role": "assistant", "content": answers[1]}]
    ids, mask = assistant_mask(tokenizer, chat)

    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=False)
    marked = tokenizer.decode([token for token, marks in zip(ids, mask, strict=True) if marks])
    # a token of line breaks that began in the prompt is none of the answer's
    assert "".join(marked.split()) == "hiho"
    assert sum(mask) >= 4
    assert (mask[0], mask[-1]) == (False, True)
