"""Tokenizers: one small protocol, a byte tokenizer that needs no vocabulary file, and Hugging Face's.

The byte tokenizer has the 256 byte values plus BOS, EOS and PAD, so that a byte model can end a reply and no real byte
has to double as padding. Special tokens are added only on request: the caller, not the tokenizer, knows where a
document begins and ends.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from lm_core.checks import typed

BYTE_TOKENIZER_FILE = "byte_tokenizer.json"
_BYTE_TOKENIZER = {"format_version": 1, "kind": "bytes", "vocab_size": 259}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Message = Mapping[str, Any]


@runtime_checkable
class Tokenizer(Protocol):
    """The tokenizer protocol of this library.

    ``bos_id`` and ``apply_chat_template(messages, add_generation_prompt=True) -> list[int]`` are optional; so are
    ``save_pretrained(directory)``, which stores the tokenizer with a checkpoint, and ``fingerprint``, which keys the
    cache of a tokenised corpus.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included: every id is below it."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document or a reply."""

    @property
    def pad_id(self) -> int | None:
        """The id that fills unused positions."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens."""


@typed
def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt: what a transformers tokenizer gives when it is called, BOS included if it adds one.

    A text that begins with BOS, such as a rendered chat template, does not get a second one. Tokenizers without special
    tokens of their own (bytes) give plain ``encode``.

    Raises:
        ValueError: the text holds a lone surrogate that the tokenizer cannot encode.
    """
    method = getattr(tokenizer, "prompt_ids", tokenizer.encode)
    return list(method(text))


def end_ids(tokenizer: Any = None, model: Any = None) -> tuple[int, ...]:
    """All tokens that end a text: those of the model's generation config, the tokenizer and the model's config.

    Chat models end a turn with another token than a document, and only some of these places name both. Ids outside the
    model's vocabulary (defaults of a config) are left out.

    Args:
        tokenizer: a ``Tokenizer`` or a transformers tokenizer.
        model: a transformers model, also in an adapter or peft; other models add nothing.
    """
    inner = getattr(model, "model", model) if hasattr(model, "init_cache") else model
    config = getattr(inner, "config", None)
    places = [getattr(inner, "generation_config", None), tokenizer, config, getattr(config, "text_config", None)]
    named = [getattr(place, name, None) for place in places for name in ("eos_id", "eos_token_id") if place is not None]
    flat = [id_ for ids in named for id_ in (ids if isinstance(ids, list | tuple) else [ids])]
    size = getattr(model, "vocab_size", None) or getattr(config, "vocab_size", None)
    bound = size if isinstance(size, int) else float("inf")
    return tuple(dict.fromkeys(id_ for id_ in flat if type(id_) is int and 0 <= id_ < bound))


def continuation_text(tokenizer: Any, prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """Text of generated tokens: the text of all tokens without that of the prompt.

    Tokens decoded alone lose the space that a SentencePiece tokenizer puts between them and the prompt.
    """
    before = tokenizer.decode(list(prompt))
    whole = tokenizer.decode([*prompt, *continuation])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(continuation))


def full_text(tokenizer: Any, ids: "Tensor | Iterable[int]") -> str:
    """Text of ``ids`` with special tokens, for stop strings that are special tokens."""
    method = getattr(tokenizer, "full_text", tokenizer.decode)
    return str(method(_id_list(ids)))


def as_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer in the protocol of this library.

    Args:
        tokenizer: a ``Tokenizer``, a transformers tokenizer or processor, or a source of ``load_tokenizer``.

    Raises:
        TypeError: it is none of these.
        FileNotFoundError, ValueError, ImportError: as for ``load_tokenizer``.
    """
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer)
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has a tokenizer
    if hasattr(inner, "eos_token_id") and hasattr(inner, "save_pretrained"):
        return HuggingFaceTokenizer(inner)
    missing = [name for name in ("encode", "decode", "vocab_size", "eos_id", "pad_id") if not hasattr(tokenizer, name)]
    raise TypeError(
        "tokenizer must be a transformers tokenizer, a source of load_tokenizer, or have encode, decode, vocab_size, "
        f"eos_id and pad_id, got {type(tokenizer).__name__} without {', '.join(missing)}"
    )


def _id_list(ids: "Tensor | Iterable[int]") -> list[int]:
    if isinstance(ids, Tensor):
        if ids.ndim > 1:
            raise ValueError(f"ids must be one sequence of token ids, got a tensor of shape {tuple(ids.shape)}")
        return [int(value) for value in ids.reshape(-1).tolist()]
    return [int(value) for value in ids]


def check_messages(messages: Any, where: str = "messages") -> list[dict[str, Any]]:
    """Checks every message of a conversation and returns them as new dicts.

    Args:
        messages: mappings with 'role' and 'content', as transformers takes them: the content is a text, None, or parts,
            which are mappings with 'type'; it may be missing next to 'tool_calls'. Other keys are for the template.
        where: location of the conversation in error messages.

    Raises:
        TypeError: they are no sequence of mappings, or a value has the wrong type.
        ValueError: there are none, or one has no role or no content.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f"{where} must be a list of messages, got {type(messages).__name__} {str(messages)[:60]!r}")
    checked: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        place = f"{where}[{index}]" if where.isidentifier() else f"{where.rstrip(',')}, message {index},"
        if not isinstance(message, Mapping):
            raise TypeError(f"{place} must be a message with 'role' and 'content', got {str(message)[:60]!r}")
        if not {"content", "tool_calls"} & set(message) or message.get("role") is None:
            raise ValueError(f"{place} must have 'role' and 'content', got the keys {sorted(map(str, message))}")
        role, content = message["role"], message.get("content")
        parts = content if isinstance(content, list | tuple) else []
        if not isinstance(role, str) or not isinstance(content, str | list | tuple | None):
            raise TypeError(f"{place} must have texts as 'role' and 'content', got {role!r:.40} and {content!r:.40}")
        if not all(isinstance(part, Mapping) and "type" in part for part in parts):
            raise TypeError(f"{place} must have parts with 'type' as 'content', got {content!r:.60}")
        checked.append(dict(message))
    if not checked:
        raise ValueError(f"{where} must hold at least one message, got none")
    return checked


def check_unicode(text: str, where: str) -> None:
    """Raises ``ValueError`` for half of a surrogate pair, which JSON files hold and only bytes can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} must be valid Unicode, got the lone surrogate {text[error.start]!r} at position {error.start}"
        ) from error


def message_text(message: Message) -> str:
    """The text of a message: its content, or the text parts of it, one after the other."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens: ids 0 to 255 are bytes, 256 is BOS, 257 EOS, 258 PAD."""

    vocab_size: ClassVar[int] = 259
    bos_id: ClassVar[int] = 256
    eos_id: ClassVar[int] = 257
    pad_id: ClassVar[int] = 258

    @property
    def fingerprint(self) -> str:
        """Name of the mapping from text to ids."""
        return "bytes-259"

    @typed
    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """UTF-8 bytes of ``text``, with BOS before and EOS after them on request.

        A lone surrogate (JSON files hold them) is encoded like any other code point instead of failing.
        """
        ids = list(text.encode("utf-8", errors="surrogatepass"))
        return [self.bos_id] * add_bos + ids + [self.eos_id] * add_eos

    def decode(self, ids: "Tensor | Iterable[int]") -> str:
        """Text of ``ids``: ids of 256 and above are skipped, bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is negative, or ``ids`` is a tensor of more than one dimension.
        """
        values = _id_list(ids)
        if any(value < 0 for value in values):
            raise ValueError(f"ids must not be negative, got {min(values)}")
        return bytes(value for value in values if value < 256).decode("utf-8", errors="replace")

    @typed
    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: ``BOS``, then ``role: content EOS`` for each message, then ``assistant: ``.

        Each message ends with the EOS id, which no text can contain, so a message cannot forge another one.

        Raises:
            ValueError, TypeError: as for ``check_messages``.
        """
        ids = [self.bos_id]
        for message in check_messages(messages):
            ids += self.encode(f"{message['role']}: {message_text(message)}", add_eos=True)
        return ids + self.encode("assistant: ") if add_generation_prompt else ids

    def save_pretrained(self, directory: "str | Path") -> None:
        """Writes the tokenizer into ``directory``, for ``load_tokenizer``."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BYTE_TOKENIZER_FILE).write_text(json.dumps(_BYTE_TOKENIZER, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: "str | Path") -> "ByteTokenizer":
        """Reads the file of ``save_pretrained``.

        Raises:
            ValueError: the file is missing, damaged, or of a later format.
        """
        path = Path(directory) / BYTE_TOKENIZER_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a byte tokenizer's file: {error}") from error
        if content != _BYTE_TOKENIZER:
            raise ValueError(f"{path} must hold {_BYTE_TOKENIZER}, got {content}")
        return cls()


class HuggingFaceTokenizer:
    """A ``transformers`` tokenizer (any ``PreTrainedTokenizerBase``) in the protocol above."""

    def __init__(self, tokenizer: Any) -> None:
        missing = [name for name in ("encode", "decode", "save_pretrained") if not hasattr(tokenizer, name)]
        if missing:
            raise TypeError(
                f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__} without {missing}"
            )
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (``transformers``' own ``vocab_size`` leaves those out)."""
        return len(self.tokenizer)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a document, if the tokenizer has one."""
        return self.tokenizer.bos_token_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, if the tokenizer has one."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int | None:
        """The padding id, or EOS for the many tokenizers that have none."""
        return self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def fingerprint(self) -> str:
        """Hash of the whole mapping for a fast tokenizer, of vocabulary and class for a slow one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            content = backend.to_str()
        else:
            content = json.dumps([type(self.tokenizer).__name__, self.tokenizer.get_vocab()], sort_keys=True)
        return "hf-" + hashlib.sha256(content.encode()).hexdigest()[:16]

    @typed
    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of ``text``, with BOS before and EOS after them on request.

        Raises:
            ValueError: BOS or EOS is requested and the tokenizer has none.
        """
        for wanted, value, name in ((add_bos, self.bos_id, "bos"), (add_eos, self.eos_id, "eos")):
            if wanted and value is None:
                raise ValueError(f"add_{name}=True needs a tokenizer with a {name} token, got {self!r}")
        ids = self._ids(text, add_special_tokens=False)
        before = [self.bos_id] if add_bos and self.bos_id is not None else []
        after = [self.eos_id] if add_eos and self.eos_id is not None else []
        return before + ids + after

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer adds; see ``lm_core.tokenizers.prompt_ids``."""
        ids = self._ids(text, add_special_tokens=True)
        bos = self.tokenizer.bos_token
        doubled = bos and text.startswith(bos) and ids[:2] == [self.bos_id, self.bos_id]
        return ids[1:] if doubled else ids

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        check_unicode(text, "text")
        # verbose=False: no warning for every corpus document that is longer than the model's context
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, ids: "Tensor | Iterable[int]") -> str:
        """Text of ``ids`` without special tokens."""
        return self.tokenizer.decode(_id_list(ids), skip_special_tokens=True)

    def full_text(self, ids: "Tensor | Iterable[int]") -> str:
        """Text of ``ids`` with special tokens."""
        return self.tokenizer.decode(_id_list(ids), skip_special_tokens=False)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Ids of ``chat_text``, whose arguments and errors it has."""
        return self.encode(self.chat_text(messages, add_generation_prompt, **template_kwargs))

    @typed
    def chat_text(
        self, messages: Sequence[Any], add_generation_prompt: bool = True, *, where: str = "messages", **kwargs: Any
    ) -> str:
        """A conversation as the tokenizer's own template writes it.

        Args:
            messages: see ``check_messages``.
            add_generation_prompt: True adds the beginning of an answer.
            where: location of the conversation in error messages.
            **kwargs: further arguments of the template, such as ``enable_thinking``.

        Raises:
            ValueError: the tokenizer has no template, or the template refuses the conversation.
            TypeError: as for ``check_messages``.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{self!r} has no chat template; set tokenizer.chat_template or pass plain text")
        # tables have None where a message lacks a key; a template does not see it, as in transformers 5
        checked = [
            {name: value for name, value in message.items() if value is not None}
            for message in check_messages(messages, where)
        ]
        try:
            text: str = self.tokenizer.apply_chat_template(
                checked, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        except Exception as error:  # jinja raises what the template's own expressions raise
            raise ValueError(f"{where} is refused by the chat template: {error}") from error
        return text

    def save_pretrained(self, directory: "str | Path") -> None:
        """Writes the tokenizer's own files into ``directory``."""
        self.tokenizer.save_pretrained(str(directory))

    def __repr__(self) -> str:
        return f"HuggingFaceTokenizer({type(self.tokenizer).__name__}, vocab_size={self.vocab_size})"


@typed
def load_tokenizer(source: str | Path) -> ByteTokenizer | HuggingFaceTokenizer:
    """The byte tokenizer, a tokenizer stored in a folder, or one from the Hugging Face hub.

    Args:
        source: ``"bytes"``; a folder with a saved tokenizer, or with a checkpoint that carries one in ``tokenizer/``
            (read without network access); or ``organisation/name`` on the hub. Code from the hub is never run.

    Raises:
        FileNotFoundError: ``source`` is none of the three.
        ValueError: the folder holds no readable tokenizer.
        ImportError: ``transformers`` is needed and not installed.
    """
    if source == "bytes":
        return ByteTokenizer()
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (folder / "tokenizer").is_dir():
            folder = folder / "tokenizer"
        if (folder / BYTE_TOKENIZER_FILE).is_file():
            return ByteTokenizer.from_pretrained(folder)
        if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            if (folder / "adapter_config.json").is_file():  # of peft: the tokenizer is that of the base model
                return load_tokenizer(_base_of(folder))
            raise ValueError(
                f"source must be a folder with a tokenizer, got {folder} without {BYTE_TOKENIZER_FILE}, "
                "tokenizer_config.json or tokenizer.json"
            )
        return HuggingFaceTokenizer(_auto_tokenizer(str(folder), local=True))
    if HUB_ID.fullmatch(str(source)) and not folder.exists():
        return HuggingFaceTokenizer(_auto_tokenizer(str(source), local=False))
    raise FileNotFoundError(f'source must be "bytes", a folder with a tokenizer, or organisation/name, got {source!r}')


def _base_of(folder: Path) -> str:
    """The base model that a folder of peft names, which is no adapter itself."""
    path = folder / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} names no base model: {error!r}") from error
    if not isinstance(base, str) or (Path(base).expanduser() / "adapter_config.json").is_file():
        raise ValueError(f"{path} must name a base model that is no adapter, got {base!r}")
    return base


def _auto_tokenizer(name: str, *, local: bool) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"the tokenizer {name} needs transformers: pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises all that its parsers and the network raise
        raise ValueError(f"source {name!r} holds no tokenizer that could be loaded: {error}") from error
