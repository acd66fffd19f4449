"""Text of generated tokens as it grows: increments of whole characters, and stop strings."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lm_core.tokenizers import as_tokenizer, full_text

# Tokens of a prompt that are decoded together with the first new ones, which alone could lose a leading space.
_CONTEXT = 8
_REPLACEMENT = "\ufffd"

OnText = Callable[[int, str], None]


class TextStream:
    """Text of one row, token by token.

    Only the tokens since the last increment but one are decoded again, so a long text costs no more a token than a
    short one. Tokens that end within a character give it once it is whole.

    Args:
        decode: maps ids to text.
        prompt: ids before the first token.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-_CONTEXT:])
        self._start = 0
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """Appends a token; returns the text that it adds, empty while a character is incomplete."""
        self._ids.append(token)
        return self._increment(complete=True)

    def flush(self) -> str:
        """Returns the text that is left, with replacement characters for incomplete ones."""
        return self._increment(complete=False)

    def _increment(self, *, complete: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        whole = self._decode(self._ids[self._start :])
        if len(whole) <= len(before) or (complete and whole.endswith(_REPLACEMENT)):
            return ""
        self._ids = self._ids[self._read :]
        self._start = 0
        self._read = len(self._ids)
        return whole[len(before) :]


class TextWatch:
    """Texts of all rows: reports their increments, and finds the rows that a stop string ends.

    Args:
        tokenizer: tokenizer of the model.
        prompts: prompt of each row.
        stop_strings: texts that end a row with the token that completes them; special tokens count.
        on_text: called with the index of a row and its next text, without special tokens.

    Raises:
        ValueError: there is no tokenizer, or a stop string is empty.
        TypeError: a stop string is no string, or ``tokenizer`` is no tokenizer.
    """

    def __init__(
        self, tokenizer: Any, prompts: Sequence[list[int]], *, stop_strings: Sequence[str], on_text: OnText | None
    ) -> None:
        if tokenizer is None:
            raise ValueError("stop_strings and on_text need a tokenizer, got tokenizer=None")
        if isinstance(stop_strings, str) or not all(isinstance(stop, str) for stop in stop_strings):
            raise TypeError(f"stop_strings must be a list of strings, got {stop_strings!r}")
        if not all(stop_strings):
            raise ValueError(f"stop_strings must not be empty, got {list(stop_strings)}")
        tokenizer = as_tokenizer(tokenizer)
        self._stop_strings = list(stop_strings)
        self._on_text = on_text
        self._searched = [TextStream(lambda ids: full_text(tokenizer, ids), prompt) for prompt in prompts]
        self._shown = [TextStream(tokenizer.decode, prompt) for prompt in prompts]
        # the end of each text that a stop string may have begun in
        self._kept = max(map(len, self._stop_strings), default=1) - 1
        self._tails = [""] * len(prompts)
        self._open = [True] * len(prompts)

    def push(self, rows: Tensor, tokens: Tensor, ends: Tensor) -> list[bool]:
        """Appends a token to each row that is still open.

        Args:
            rows: ``(b,)`` indices of the rows.
            tokens: ``(b,)`` their next tokens.
            ends: ``(b,)`` True at rows that end with it in any case.

        Returns:
            For each of ``rows`` whether it has ended.
        """
        for row, token, end in zip(rows.tolist(), tokens.tolist(), ends.tolist(), strict=True):
            if self._open[row]:
                self._open[row] = not (self._stops(row, token) or end)
                self._show(row, self._shown[row].push(token))
                if not self._open[row]:
                    self._show(row, self._shown[row].flush())
        return [not self._open[row] for row in rows.tolist()]

    def close(self) -> None:
        """Reports the text that is left of rows that have not ended."""
        for row, is_open in enumerate(self._open):
            if is_open:
                self._show(row, self._shown[row].flush())

    def _stops(self, row: int, token: int) -> bool:
        if not self._stop_strings:
            return False
        text = self._tails[row] + self._searched[row].push(token)
        self._tails[row] = text[len(text) - self._kept :] if self._kept else ""
        return any(stop in text for stop in self._stop_strings)

    def _show(self, row: int, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(row, text)
