"""Flags of the training text, for the ``train`` commands."""

from dataclasses import dataclass

from lm_core.checks import typed
from lm_core.data.corpora import Corpus, load_corpus
from lm_core.tokenizers import Tokenizer, load_tokenizer


@typed
@dataclass(frozen=True, kw_only=True)
class TextCorpus:
    """Text: source, tokenizer and held-out part.

    Args:
        data: training text: "stdlib" (Python's own library), files, folders or globs of text, JSON, tables or arrow
            files, a data set on the hub as organisation/name, or bytes:FILE for a file's raw bytes.
        field: column of the text, in formats with columns.
        tokenizer: tokenizer to use: "bytes", a folder with a Hugging Face tokenizer, or organisation/name on the hub.
        validation_data: held-out data, from the same kinds of source; null holds out a fraction of the data.
        validation_fraction: fraction of the data held out for validation.
        cache_dir: folder that caches the tokenised corpus, memory-mapped; null keeps the corpus in memory.
    """

    data: str = "stdlib"
    field: str = "text"
    tokenizer: str = "bytes"
    validation_data: str | None = None
    validation_fraction: float = 0.05
    cache_dir: str | None = None

    def load(self) -> tuple[Tokenizer, Corpus]:
        """The tokenizer and the tokenised corpus.

        Raises:
            FileNotFoundError, ValueError, TypeError: as for ``lm_core.data.corpora.load_corpus``.
        """
        encoder = load_tokenizer(self.tokenizer)
        corpus = load_corpus(
            self.data,
            tokenizer=encoder,
            field=self.field,
            validation_source=self.validation_data,
            validation_fraction=self.validation_fraction,
            cache_dir=self.cache_dir,
        )
        return encoder, corpus
