"""Ready reward functions in TRL's form, which read texts, token ids and columns of the prompts' rows.

>>> from palm_rlhf.reward.functions import FormatReward, SoftOverlong, numeric_answer
>>> reward = [numeric_answer, (0.2, FormatReward()), SoftOverlong(max_length=256, buffer=64)]

On the command line: ``--reward palm_rlhf.reward.functions:numeric_answer``, with arguments
``"palm_rlhf.reward.functions:SoftOverlong(max_length=256, buffer=64)"``.
"""

import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from lm_core.checks import check_positive, typed

THINKING = r"<think>(?!.*<think>).*?</think>.*"
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")


@typed
@dataclass(frozen=True)
class FormatReward:
    """1 for a response that a pattern matches as a whole, else 0.

    Args:
        pattern: regular expression, in which a dot matches line breaks too; by default one ``<think>`` block followed
            by an answer.
    """

    pattern: str = THINKING

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression, got {self.pattern!r}: {error}") from error

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """One reward for each response."""
        return [float(re.fullmatch(self.pattern, text, re.DOTALL) is not None) for text in map(text_of, completions)]


@typed
@dataclass(frozen=True)
class RepetitionPenalty:
    """The fraction of repeated n-grams of tokens, times a penalty (arXiv 2502.03373, appendix C.2).

    Args:
        ngram_size: tokens of an n-gram; shorter responses get 0.
        max_penalty: reward of endless repetition, at most 0.
    """

    ngram_size: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        check_positive(self.ngram_size, "ngram_size")
        if not -math.inf < self.max_penalty <= 0:
            raise ValueError(f"max_penalty must be a finite number of at most 0, got {self.max_penalty}")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """One reward for each response."""
        rewards = []
        for ids in completion_ids:
            ngrams = [tuple(ids[start : start + self.ngram_size]) for start in range(len(ids) - self.ngram_size + 1)]
            rewards.append(self.max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0)
        return rewards


@typed
@dataclass(frozen=True)
class SoftOverlong:
    """A penalty that grows from 0 to -1 over the last tokens before the maximum length (arXiv 2503.14476, equation 13).

    Args:
        max_length: tokens at which the penalty is -1.
        buffer: tokens before it over which the penalty grows.
    """

    max_length: int
    buffer: int

    def __post_init__(self) -> None:
        check_positive(self.max_length, "max_length")
        if not 0 <= self.buffer <= self.max_length:
            raise ValueError(f"buffer must be in [0, max_length = {self.max_length}], got {self.buffer}")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """One reward for each response."""
        free = self.max_length - self.buffer
        excess = [max(0, len(ids) - free) for ids in completion_ids]
        return [-1.0 if tokens > self.buffer else -tokens / max(self.buffer, 1) for tokens in excess]


@typed
@dataclass(frozen=True)
class LengthReward:
    """Minus the distance of a response's length from a target, as a fraction of the target and at least -1.

    Args:
        target: target length in tokens.
    """

    target: int

    def __post_init__(self) -> None:
        check_positive(self.target, "target")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """One reward for each response."""
        return [-min(1.0, abs(len(ids) - self.target) / self.target) for ids in completion_ids]


def exact_answer(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 for the text of the column ``answer``, apart from surrounding white space, else 0; None without an answer."""
    return [
        None if right is None else float(text_of(text).strip() == str(right).strip())
        for text, right in zip(completions, answer, strict=True)
    ]


def numeric_answer(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1 if the last number of a response equals the last number of the column ``answer``, else 0.

    Thousands separators, decimals, powers of ten and fractions are read exactly (``1,000 = 1e3``, ``1/2 = 0.5``). None,
    which leaves the response out, where the answer has no number.
    """
    rewards: list[float | None] = []
    for text, right in zip(completions, answer, strict=True):
        wanted = _last_number(str(right))
        rewards.append(None if wanted is None else float(_last_number(text_of(text)) == wanted))
    return rewards


def math_answer(
    completions: Sequence[Any], solution: Sequence[str], log_extra: Any = None, **_: Any
) -> list[float | None]:
    """1 if math-verify finds the response's LaTeX answer equal to the column ``solution``, else 0.

    None, which leaves the response out, where the solution cannot be parsed.

    Raises:
        ImportError: math-verify is not installed (extra ``math``).
    """
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ImportError("math_answer needs math-verify: pip install 'palm-rlhf[math]'") from error
    # its time limits are signals, which only the main thread may set
    is_main = threading.current_thread() is threading.main_thread()
    limit: dict[str, int | None] = {"parsing_timeout": 10 if is_main else None}
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    rewards: list[float | None] = []
    found = []
    for text, right in zip(completions, solution, strict=True):
        gold = parse(right, **limit)
        answer = parse(text_of(text), extraction_config=[latex], extraction_mode="first_match", **limit)
        found.append(str(answer))
        equal = bool(gold) and verify(gold, answer, timeout_seconds=5 if is_main else None)
        rewards.append(float(equal) if gold else None)
    if log_extra is not None:
        log_extra("parsed_answer", found)
    return rewards


def text_of(completion: Any) -> str:
    """The text of a completion: a text itself, or the contents of its messages.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(part, dict) and "content" in part for part in completion):
        return "".join(str(part["content"] or "") for part in completion)
    raise TypeError(f"completions must be texts or lists of messages, got {completion!r}"[:200])


def _last_number(text: str) -> Fraction | None:
    numbers = [match[0] for match in _NUMBER.finditer(text) if any(map(str.isdigit, match[0]))]
    if not numbers:
        return None
    top, _, bottom = numbers[-1].replace(",", "").partition("/")
    value = Fraction(Decimal(top.strip()))
    return value if not bottom or int(bottom) == 0 else value / int(bottom)
