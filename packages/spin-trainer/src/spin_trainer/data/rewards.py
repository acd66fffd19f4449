"""Scores of answers by a language model that rates them (LLM-as-a-Judge, arXiv 2401.10020), or by any function.

The rater reads a question with a response and writes a rating, which is drawn several times and averaged. A draw
without a rating in range is invalid and left out.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_core.checks import check_positive, typed
from lm_core.data.conversations import prompt_of_chat
from lm_core.tokenizers import prompt_ids
from spin_trainer.data.opponent_answers import Answer
from spin_trainer.data.prompt_data import Prompt

# Five points that add up, as in the paper's template, in our words.
RATING_TEMPLATE = """Rate a response to a user's question with 0 to 5 points, one for each statement that holds:
1. The response is relevant to the question, even if it is incomplete.
2. It answers a large part of what was asked.
3. It answers the basic elements of the question in a useful way.
4. It is written from the view of an assistant, clear, complete and well organised, with little to improve.
5. It is made for this user, without superfluous content, and shows expert knowledge.

<question>{prompt}</question>

<response>{response}</response>

Explain your rating in at most 60 words. End with a line of this form, with the sum of the points:
Score: <points>"""
SCORE = re.compile(r"score\W*(\d+(?:\.\d+)?)", re.IGNORECASE)


@typed
@dataclass(frozen=True, kw_only=True)
class Rater:
    """Ratings of answers by the policy itself.

    Args:
        rating_template: text with ``{prompt}`` and ``{response}``, which the rater answers with a line "Score: 4".
        rating_draws: ratings to average for each answer.
        rating_max_new_tokens: maximum length of a rating, in tokens.
        rating_max_score: largest valid rating; the smallest is 0.

    Raises:
        ValueError: a number is out of range, or the template lacks a place.
    """

    rating_template: str = RATING_TEMPLATE
    rating_draws: int = 3
    rating_max_new_tokens: int = 128
    rating_max_score: float = 5.0

    def __post_init__(self) -> None:
        check_positive(self.rating_draws, "rating_draws")
        check_positive(self.rating_max_new_tokens, "rating_max_new_tokens")
        if not 0 < self.rating_max_score < float("inf"):
            raise ValueError(f"rating_max_score must be a finite number above 0, got {self.rating_max_score}")
        for place in ("{prompt}", "{response}"):
            if place not in self.rating_template:
                raise ValueError(f"rating_template must contain {place}, got {self.rating_template[:60]!r}")

    def prompt(self, tokenizer: Any, question: str, response: str) -> list[int]:
        """Token ids of the request for a rating, as a chat if the tokenizer has a template."""
        texts = {"prompt": question, "response": response}
        text = re.sub(r"\{(prompt|response)\}", lambda place: texts[place[1]], self.rating_template)
        if hasattr(tokenizer, "chat_text") and getattr(tokenizer.tokenizer, "chat_template", None) is None:
            return prompt_ids(tokenizer, text)
        if not hasattr(tokenizer, "apply_chat_template"):
            return prompt_ids(tokenizer, text)
        return prompt_of_chat(tokenizer, [{"role": "user", "content": text}])

    def score(self, rating: str) -> float | None:
        """The last rating in a text; None if it has none, or one out of range."""
        matches = SCORE.findall(rating)
        value = float(matches[-1]) if matches else None
        return value if value is not None and value <= self.rating_max_score else None


def sums_of_rewards(
    functions: Sequence[Callable[..., Any]],
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    answers: Sequence[Answer],
) -> list[float | None]:
    """Sum of several rewards for each answer; None counts as nothing, and is the sum where all are None."""
    columns = [rewards_of(function, prompts, texts, answers) for function in functions]
    known = [[score for score in row if score is not None] for row in zip(*columns, strict=True)]
    return [sum(row) if row else None for row in known]


def rewards_of(
    function: Callable[..., Any], prompts: Sequence[Prompt], texts: Sequence[str], answers: Sequence[Answer]
) -> list[float | None]:
    """Scores by a function in TRL's form: keyword arguments of lists, one number or None for each answer.

    The arguments are ``prompts`` and ``completions`` (texts, or messages for chats), ``completion_ids`` and the further
    columns of the data, as far as the function takes them.

    Raises:
        TypeError, ValueError: the function returns something else.
    """
    chats = [prompt.messages is not None for prompt in prompts]
    columns = {name for prompt in prompts for name in prompt.columns}
    arguments: dict[str, Any] = {
        **{name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(columns)},
        "prompts": [prompt.messages if chat else prompt.text for prompt, chat in zip(prompts, chats, strict=True)],
        "completions": [
            [{"role": "assistant", "content": text}] if chat else text for text, chat in zip(texts, chats, strict=True)
        ],
        "completion_ids": [list(answer.tokens) for answer in answers],
    }
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    name = getattr(function, "__name__", type(function).__name__)
    values = list(function(**arguments))
    if len(values) != len(texts):
        raise ValueError(f"reward {name} must return one number for each of {len(texts)} answers, got {len(values)}")
    try:
        scores = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"reward {name} must return numbers or None, got {str(values)[:60]}") from error
    if wrong := [score for score in scores if score is not None and not abs(score) < float("inf")]:
        raise ValueError(f"reward {name} must return finite numbers, got {wrong[0]}")
    return scores
