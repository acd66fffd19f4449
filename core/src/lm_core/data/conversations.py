"""Conversations as token ids: prompt and answer, or a mask of all answers.

The border between prompt and answer is found in the text that the chat template writes, not in its token ids: a token
of the whole text may reach across it (a line break of the prompt and two of the answer), and some templates begin an
answer with words that they leave out once it is there ("<think>"). Tokenizers without a template in text (bytes) are
compared by ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lm_core.tokenizers import check_messages, check_unicode, message_text, prompt_ids

__all__ = [
    "ANSWER_COLUMNS",
    "NoBorderError",
    "assistant_mask",
    "check_messages",
    "conversation_ids",
    "prompt_of_chat",
    "text_answer_ids",
    "with_explicit_prompt",
]

# Names of the column with the answer to a prompt.
ANSWER_COLUMNS = ("response", "completion", "answer")


class NoBorderError(ValueError):
    """The chat template does not write a conversation as its prompt followed by the answer."""


def text_answer_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a text and of the answer that follows it, without an end token."""
    ids, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + answer)
    # alone, an answer may be encoded with a space before it
    return ids, whole[len(ids) :] if whole[: len(ids)] == ids else list(tokenizer.encode(answer))


def prompt_of_chat(
    tokenizer: Any, messages: Any, *, template_kwargs: Mapping[str, Any] | None = None, where: str = "messages"
) -> list[int]:
    """Ids of a conversation and the beginning of its next answer; arguments and errors as in ``conversation_ids``."""
    checked = check_messages(messages, where)
    text = _text(tokenizer, checked, True, template_kwargs, where)
    if text is None:
        return list(tokenizer.apply_chat_template(checked, add_generation_prompt=True))
    return list(tokenizer.encode(text))


def conversation_ids(
    tokenizer: Any,
    messages: Any,
    *,
    answer: int = -1,
    template_kwargs: Mapping[str, Any] | None = None,
    where: str = "messages",
) -> tuple[list[int], list[int]]:
    """Ids of a conversation's prompt, as generation gets it, and of the answer that follows, as the template writes it.

    Args:
        tokenizer: tokenizer with ``chat_text``, or with ``apply_chat_template`` alone.
        messages: see ``check_messages``.
        answer: index of the first message of the answer.
        template_kwargs: further arguments of the template, such as ``enable_thinking``.
        where: location of the conversation in error messages.

    Raises:
        NoBorderError: the template writes no such border.
        ValueError, TypeError: a message is invalid, the tokenizer has no template, or the template refuses the
            conversation; the message names it.
    """
    checked = check_messages(messages, where)
    before = checked[:answer]
    if not before:
        raise ValueError(f"{where} must have a question before the answer, got {len(checked)} message(s)")
    prompt = _text(tokenizer, before, True, template_kwargs, where)
    if prompt is None:
        ids, whole_ids = (
            list(tokenizer.apply_chat_template(part, add_generation_prompt=part is before))
            for part in (before, checked)
        )
        if whole_ids[: len(ids)] != ids:
            raise _no_border(where)
        return ids, whole_ids[len(ids) :]
    whole = str(_text(tokenizer, checked, False, template_kwargs, where))
    base = str(_text(tokenizer, before, False, template_kwargs, where))
    border = _border(base, prompt, whole, message_text(checked[answer]))
    if border is None:
        raise _no_border(where)
    ids, whole_ids = list(tokenizer.encode(whole[:border])), list(tokenizer.encode(whole))
    if whole_ids[: len(ids)] == ids:
        return ids, whole_ids[len(ids) :]
    # a token reaches across the border: the answer is what follows the prompt, token by token
    answer_ids = list(tokenizer.encode(whole[border:]))
    if tokenizer.full_text([*ids, *answer_ids]) != tokenizer.full_text(whole_ids):
        raise _no_border(where)
    return ids, answer_ids


def assistant_mask(
    tokenizer: Any, messages: Any, *, template_kwargs: Mapping[str, Any] | None = None, where: str = "messages"
) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation, and a mask that is True at the tokens of the assistant's messages.

    A token that reaches across the border of an answer does not belong to it. Arguments and errors are those of
    ``conversation_ids``; the tokenizer needs ``chat_text`` and character offsets (a fast transformers tokenizer), or
    ``apply_chat_template`` alone.
    """
    checked = check_messages(messages, where)
    turns = [index for index, message in enumerate(checked) if message["role"] == "assistant"]
    whole = _text(tokenizer, checked, False, template_kwargs, where)
    if whole is None:
        ids = list(tokenizer.apply_chat_template(checked, add_generation_prompt=False))
        mask = [False] * len(ids)
        for index in turns:
            prompt = tokenizer.apply_chat_template(checked[:index], add_generation_prompt=True) if index else []
            turn = tokenizer.apply_chat_template(checked[: index + 1], add_generation_prompt=False)
            if turn != ids[: len(turn)] or list(prompt) != ids[: len(prompt)]:
                raise _no_border(where)
            mask[len(prompt) : len(turn)] = [True] * (len(turn) - len(prompt))
        return ids, mask
    spans = []
    for index in turns:
        base, prompt = (
            str(_text(tokenizer, checked[:index], asks, template_kwargs, where)) if index else ""
            for asks in (False, True)
        )
        turn = str(_text(tokenizer, checked[: index + 1], False, template_kwargs, where))
        start = _border(base, prompt, turn, message_text(checked[index]))
        if start is None or not whole.startswith(turn):
            raise _no_border(where)
        spans.append((start, len(turn)))
    encoded = tokenizer.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [any(first <= start < last for first, last in spans) for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask


def with_explicit_prompt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row of preference data whose prompt is the common beginning of ``chosen`` and ``rejected``.

    That beginning is whole messages, whole token ids, or text up to a word.

    Raises:
        ValueError: the two are of different kinds, or have no common beginning.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if not any(isinstance(chosen, kind) and isinstance(rejected, kind) for kind in (str, list | tuple, Tensor)):
        raise ValueError(
            f"{where} must have two texts or two lists in chosen and rejected, got {chosen!r:.60} and {rejected!r:.60}"
        )
    pairs = enumerate(zip(chosen, rejected, strict=False))
    border = next((at for at, (a, b) in pairs if a != b), min(len(chosen), len(rejected)) - 1)
    if isinstance(chosen, str):  # a blank belongs to the word after it, as in most vocabularies
        border = max(chosen.rfind(" ", 0, border), chosen.rfind("\n", 0, border) + 1)
    if border <= 0:
        raise ValueError(f"{where} has no prompt, and chosen and rejected have no common beginning")
    return {**row, "prompt": chosen[:border], "chosen": chosen[border:], "rejected": rejected[border:]}


def _text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any] | None,
    where: str,
) -> str | None:
    """The conversation as text; None for a tokenizer that writes ids only."""
    if hasattr(tokenizer, "chat_text"):
        text: str = tokenizer.chat_text(messages, add_generation_prompt, where=where, **(template_kwargs or {}))
        check_unicode(text, where)
        return text
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ValueError(f"{where} is a chat, but {type(tokenizer).__name__} has no apply_chat_template")
    if template_kwargs:
        raise ValueError(f"template_kwargs need a chat template, got {dict(template_kwargs)} for {tokenizer!r}")
    return None


def _border(base: str, prompt: str, whole: str, content: str) -> int | None:
    """Number of characters of ``whole`` before the answer; None if the prompt does not lead to it.

    Args:
        base: the messages before the answer.
        prompt: these messages and the beginning of an answer.
        whole: these messages and the answer.
        content: text of the answer's message.
    """
    if whole.startswith(prompt):
        return len(prompt)
    # the prompt begins the answer with words that are left out here: both have the text before these
    shared = next(index for index, (a, b) in enumerate(zip(prompt, whole + "\0", strict=False)) if a != b)
    places = [whole.rfind(text, len(base), shared + len(text)) for text in (content, content.strip()) if text]
    return next((place for place in places if place >= 0 and prompt.startswith(base)), None)


def _no_border(where: str) -> NoBorderError:
    return NoBorderError(
        f"{where}: the chat template must write a conversation so that it begins with its own prompt, it does not"
    )
