"""CLIP's byte-level BPE (arXiv 2103.00020, section 2.4) from the files next to open_clip's weights.

They are a ``tokenizer.json``, ``vocab.json`` with ``merges.txt``, or open_clip's ``bpe_simple_vocab_16e6.txt.gz``.
open_clip also repairs wrongly decoded characters (ftfy) and HTML entities, which is left to the caller.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_core.checkpoints.manifest import read_json
from lm_core.data.text_files import lines_of
from lm_core.tokenizers import HuggingFaceTokenizer, load_tokenizer

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(source: str | Path) -> HuggingFaceTokenizer | None:
    """CLIP's BPE from the files of a folder; None if it has none.

    Raises:
        ValueError: the files are damaged.
        ImportError: transformers is not installed.
    """
    path = Path(source).expanduser()
    folder = path.parent if path.is_file() else path
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        return tokenizer
    try:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError("CLIP's tokenizer needs transformers: pip install transformers") from error
    try:
        if (folder / "tokenizer.json").is_file():
            inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            inner = _bpe(vocabulary, _merges((folder / "merges.txt").read_text(encoding="utf-8")))
        elif (folder / _MERGES_FILE).is_file():
            content = gzip.decompress((folder / _MERGES_FILE).read_bytes()).decode("utf-8")
            merges = _merges(content)[: 49152 - 256 - 2]  # the file has more than CLIP uses
            inner = _bpe(_vocabulary(merges), merges)
        else:
            return None
    except Exception as error:  # the parsers of tokenizers raise bare exceptions
        raise ValueError(f"{folder} holds no tokenizer of CLIP that could be read: {error}") from error
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=_BOS, eos_token=_EOS, unk_token=_EOS)
    )


def special_ids(folder: Path, num_tokens: int) -> tuple[int, int]:
    """Ids that begin and end a caption: the tokenizer's, or the last two, as in CLIP's vocabulary."""
    if (folder / "tokenizer.json").is_file():
        added = {
            entry["content"]: entry["id"] for entry in read_json(folder / "tokenizer.json").get("added_tokens", [])
        }
        if {_BOS, _EOS} <= set(added):
            return int(added[_BOS]), int(added[_EOS])
    return num_tokens - 2, num_tokens - 1


def _merges(content: str) -> list[tuple[str, str]]:
    pairs = [
        tuple(line.split()) for line in lines_of(content) if line.strip() and not line.startswith(("#version", '"'))
    ]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's vocabulary: the 256 bytes, the same at the end of a word, the merges, and the special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible]
    letters += sorted(set(ByteLevel.alphabet()) - set(letters), key=ord)
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), _BOS, _EOS]
    return {word: index for index, word in enumerate(words)}


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> Any:
    """CLIP's tokenizer: lower case, words by its pattern, bytes, and pairs that end with ``</w>``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    inner = Tokenizer(
        models.BPE(
            vocab=dict(vocabulary),
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=_EOS,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("</w>", "Ġ"),
            decoders.ByteLevel(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=0, right=1),
        ]
    )
    inner.add_special_tokens([AddedToken(_BOS, special=True), AddedToken(_EOS, special=True)])
    return inner
