"""kNN-LM (arXiv 1911.00172): a language model interpolated with the next tokens of its nearest earlier states.

    p(y | x) = lambda p_kNN(y | x) + (1 - lambda) p_LM(y | x)                                        (equation 3)
    p_kNN(y | x) proportional to the sum of exp(-d(k_i, f(x)) / temperature) over neighbours with token y  (equation 2)

d is the squared L2 distance; the temperature is that of the paper's follow-ups (arXiv 2109.04212). f(x) is the state
before the output layer, which every model of the protocol has; the paper's is the input of the last feed-forward.

A text is read in pieces of ``segment_length`` tokens, each with up to ``window`` tokens of its document before it.

Legend: b batch, n sequence, v vocabulary, d feature, q queries, k neighbours.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from lm_core.adapters import as_causal_lm
from lm_core.causal_lm import device_of, eval_mode
from lm_core.checkpoints.tensor_files import hash_of
from lm_core.checks import check_above_zero, check_ids, check_positive, typed
from lm_core.data.documents import Documents
from memorizing_transformer.memory.datastore import Datastore, DatastoreWriter, Neighbours, num_entries
from memorizing_transformer.memory.ring_storage import StorageFormat

QUERIES_AT_ONCE = 512


class KNNLM(nn.Module):
    """A causal language model with a datastore, for generation, scores and evaluation; nothing is trained.

    Args:
        model: a model of the protocol ``lm_core.causal_lm.CausalLM`` with hidden states, or a transformers model.
        datastore: an open datastore made with the same model, or its folder.
        k: number of neighbours.
        temperature: divisor of the squared distances.
        lambda_: weight of the neighbours, in [0, 1).

    Raises:
        ValueError: a number is out of range, the model has no hidden states, or the datastore is of another model.
    """

    @typed
    def __init__(
        self,
        model: nn.Module,
        datastore: Datastore | str | Path,
        *,
        k: int = 64,
        temperature: float = 1.0,
        lambda_: float = 0.25,
    ) -> None:
        super().__init__()
        check_positive(k, "k")
        check_above_zero(temperature, "temperature")
        if not 0 <= lambda_ < 1:
            raise ValueError(f"lambda_ must be in [0, 1), got {lambda_}")
        self.model = with_states(model)
        self.datastore = datastore if isinstance(datastore, Datastore) else Datastore(datastore)
        self.datastore.check(model=model_fingerprint(model))
        self.k = k
        self.temperature = temperature
        self.lambda_ = lambda_
        self.max_length = getattr(self.model, "max_length", None)
        self.vocab_size = int(self.model.output_weight.shape[0])
        self._records: list[Neighbours] | None = None

    @contextmanager
    def recorded(self) -> Iterator[list[Neighbours]]:
        """Records the result of every search in the block in the yielded list."""
        before, self._records = self._records, []
        try:
            yield self._records
        finally:
            self._records = before

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return device_of(self.model) or torch.device("cpu")

    @property
    def init_cache(self) -> Any:
        """``init_cache`` of the model."""
        return self.model.init_cache

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b total"] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Float[Tensor, "b n v"]:
        """Log-probabilities, which are logits too; arguments as for the model."""
        states = self.model.hidden(ids, mask=mask, cache=cache, **kwargs)
        layer = getattr(self.model, "output_layer", None)
        logits = F.linear(states, self.model.output_weight) if layer is None else layer(states)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        if self.lambda_ == 0:
            return probabilities.log()
        flat = probabilities.mul(1 - self.lambda_).flatten(0, 1)
        parts = zip(states.flatten(0, 1).split(QUERIES_AT_ONCE), flat.split(QUERIES_AT_ONCE), strict=True)
        mixed = []
        for queries, part in parts:
            neighbours = self.datastore.search(queries, self.k)
            if self._records is not None:
                self._records.append(neighbours)
            weights = neighbour_weights(neighbours, self.temperature).to(part)
            mixed.append(part.scatter_add(1, neighbours.tokens, self.lambda_ * weights))
        return torch.cat(mixed).view_as(probabilities).log()


def neighbour_weights(neighbours: Neighbours, temperature: float) -> Float[Tensor, "q k"]:
    """The part of each neighbour in p_kNN (equation 2)."""
    return (-neighbours.distances / temperature).softmax(dim=-1)


def with_states(model: nn.Module) -> Any:
    """The model in the protocol, which must have hidden states.

    Raises:
        ValueError: it has none.
    """
    adapted = as_causal_lm(model)
    if not hasattr(adapted, "hidden") or not hasattr(adapted, "output_weight"):
        raise ValueError(
            f"model must have hidden states and an output layer that is a product with them, {type(model).__name__} "
            "has not"
        )
    return adapted


def model_fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and first numbers of all weights."""
    inner = model.model if hasattr(model, "init_cache") and hasattr(model, "max_cached_length") else model
    some = [(f"{name} {tuple(value.shape)}", value.flatten()[:256].cpu()) for name, value in _weights(inner).items()]
    return hash_of(sorted(some, key=lambda pair: pair[0]))[:32]


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


@dataclass(frozen=True)
class Piece:
    """Tokens that are read at once.

    Attributes:
        document: number of the document.
        start: position of the first new token in it.
        stop: position after the last one.
        begin: position of the first token that is read, ``window`` tokens before or the document's first.
    """

    document: int
    start: int
    stop: int
    begin: int


def pieces_of(documents: Documents, *, segment_length: int, window: int) -> Iterator[Piece]:
    """The pieces of all documents, in order."""
    for number, length in enumerate(documents.lengths.tolist()):
        for start in range(0, length, segment_length):
            yield Piece(number, start, min(start + segment_length, length), max(0, start - window))


def read_pieces(
    model: Any, documents: Documents, pieces: Sequence[Piece], device: torch.device
) -> list[tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]]:
    """For each piece, the states of its new tokens that have a next token, and these next tokens."""
    texts = [
        torch.from_numpy(documents[piece.document][piece.begin : piece.stop + 1].astype("int64")) for piece in pieces
    ]
    # the last token of a document predicts nothing, the one after a piece is only a label
    lengths = [piece.stop - piece.begin for piece in pieces]
    longest = max(lengths)
    ids = torch.stack(
        [F.pad(text[:length], (0, longest - length)) for text, length in zip(texts, lengths, strict=True)]
    )
    states = model.hidden(ids.to(device))  # no mask: the padding comes last, and the model is causal
    out = []
    for row, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
        before = piece.start - piece.begin
        labels = text[before + 1 :]
        out.append((states[row, before : before + len(labels)], labels.to(device)))
    return out


@typed
@torch.no_grad()
def build_datastore(
    model: nn.Module,
    documents: Documents,
    directory: str | Path,
    *,
    storage: StorageFormat = "int8",
    segment_length: int = 512,
    window: int = 0,
    batch_size: int = 8,
    tokenizer: Any = None,
    progress: bool = False,
) -> Datastore:
    """Writes the states of a model on documents to a datastore, and opens it; an unfinished one is continued.

    Args:
        model: as for ``KNNLM``, on its device; it is put in evaluation mode meanwhile.
        documents: documents in the model's token ids.
        directory: new folder, or that of an unfinished datastore of the same model, documents and settings.
        storage: number format of the states.
        segment_length: new tokens in a forward.
        window: tokens before them in the same forward.
        batch_size: forwards in a batch.
        tokenizer: tokenizer of the documents, whose ``fingerprint`` is stored, so that another one is noticed.
        progress: whether a progress bar is shown.

    Raises:
        ValueError: a size is out of range, a token is outside the vocabulary, no document has two tokens, or the folder
            has other content.
        RuntimeError: another process is building in the folder.
        OSError: the disk is full; the entries so far stay.
    """
    for name, value in (("segment_length", segment_length), ("batch_size", batch_size)):
        check_positive(value, name)
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    adapted = with_states(model)
    longest = getattr(adapted, "max_length", None)
    if longest is not None and segment_length + window > longest:
        raise ValueError(
            f"segment_length and window must together be at most the model's {longest}, got {segment_length + window}"
        )
    total = num_entries(documents)
    if not total:
        raise ValueError("documents must have at least one with two tokens, got none")
    weight = adapted.output_weight
    for document in documents:
        check_ids(torch.from_numpy(document.astype("int64")), weight.shape[0], "documents")
    device = device_of(adapted) or torch.device("cpu")
    made_from = {
        "model": model_fingerprint(model),
        "tokenizer": getattr(tokenizer, "fingerprint", None),
        "dim": int(weight.shape[1]),
        "storage": storage,
        "segment_length": segment_length,
        "window": window,
        "batch_size": batch_size,
    }
    with DatastoreWriter(directory, documents, made_from) as writer, eval_mode(adapted):
        bar = tqdm(total=total, initial=writer.written, desc="datastore", unit="token", disable=not progress)
        pieces = pieces_of(documents, segment_length=segment_length, window=window)
        done = 0
        while batch := list(islice(pieces, batch_size)):
            count = sum(min(piece.stop, int(documents.lengths[piece.document]) - 1) - piece.start for piece in batch)
            done += count
            if done <= writer.written:
                continue  # written before, by a build that ended here or later
            keys = torch.cat([states for states, _ in read_pieces(adapted, documents, batch, device)])
            writer.append(keys)
            bar.update(count)
        bar.close()
        writer.sync()
    return Datastore(directory)


@dataclass(frozen=True)
class KNNEvaluation:
    """Bits per byte of a model on documents, with a datastore and without.

    Attributes:
        without: bits per byte of the model.
        with_datastore: bits per byte of the mixture.
        tokens: number of predicted tokens.
        lambda_: weight of the neighbours.
        temperature: divisor of the squared distances.
    """

    without: float
    with_datastore: float
    tokens: int
    lambda_: float
    temperature: float


# Values tried by ``tuned``: temperatures are multiples of the median distance to the nearest neighbour.
LAMBDAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class TokenScores:
    """Scores of the tokens of documents, from which any weight and temperature can be evaluated.

    Attributes:
        lm: log-probability of each token under the model, in nats.
        neighbours: its neighbours' distances, and whether each has the right token.
    """

    def __init__(self, lm: Float[Tensor, " n"], distances: Float[Tensor, "n k"], is_right: Bool[Tensor, "n k"]) -> None:
        self.lm = lm
        self.distances = distances
        self.is_right = is_right

    def log_probs(self, lambda_: float, temperature: float) -> Float[Tensor, " n"]:
        """Log-probability of each token under the mixture."""
        weights = (-self.distances.double() / temperature).softmax(dim=-1)
        knn = (weights * self.is_right).sum(dim=-1)
        return (lambda_ * knn + (1 - lambda_) * self.lm.double().exp()).log()

    def tuned(self) -> tuple[float, float]:
        """The weight and the temperature, of a grid, with the greatest mean log-probability."""
        scale = float(self.distances[:, 0].median())
        grid = [(lambda_, scale * part) for lambda_ in LAMBDAS for part in TEMPERATURES if scale * part > 0]
        return max(grid, key=lambda pair: float(self.log_probs(*pair).mean()), default=(LAMBDAS[0], 1.0))


@torch.no_grad()
def score_documents(
    model: nn.Module,
    datastore: Datastore,
    documents: Documents,
    *,
    k: int = 64,
    segment_length: int = 512,
    window: int = 0,
    batch_size: int = 4,
    progress: bool = False,
) -> TokenScores:
    """Scores every token but the first of each document; arguments as for ``KNNLM`` and ``build_datastore``.

    Raises:
        ValueError: the datastore is of another model, or no document has two tokens.
    """
    check_positive(k, "k")
    adapted = with_states(model)
    datastore.check(model=model_fingerprint(model))
    if not num_entries(documents):
        raise ValueError("documents must have at least one with two tokens, got none")
    device = device_of(adapted) or torch.device("cpu")
    pieces = list(pieces_of(documents, segment_length=segment_length, window=window))
    lm, distances, is_right = [], [], []
    with eval_mode(adapted):
        for start in tqdm(range(0, len(pieces), batch_size), desc="evaluate", disable=not progress, leave=False):
            for states, labels in read_pieces(adapted, documents, pieces[start : start + batch_size], device):
                layer = getattr(adapted, "output_layer", None)
                logits = F.linear(states, adapted.output_weight) if layer is None else layer(states)
                scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
                lm.append(scores.gather(1, labels[:, None])[:, 0].cpu())
                found = datastore.search(states, k)
                distances.append(found.distances.cpu())
                is_right.append((found.tokens == labels[:, None]).cpu() & distances[-1].isfinite())
    return TokenScores(torch.cat(lm), torch.cat(distances), torch.cat(is_right))


def evaluate_datastore(
    model: nn.Module,
    datastore: Datastore,
    documents: Documents,
    *,
    lambda_: float | None = None,
    temperature: float | None = None,
    **reading: Any,
) -> KNNEvaluation:
    """Bits per byte with and without a datastore.

    Without ``lambda_`` or ``temperature``, both are chosen on every other document and reported on the others.

    Args:
        model, datastore: as for ``KNNLM``.
        documents: held-out documents, at least two if something is chosen.
        lambda_, temperature: as for ``KNNLM``; None chooses them.
        **reading: further arguments of ``score_documents``.

    Raises:
        ValueError: as for ``score_documents``, or there are too few documents.
    """
    if lambda_ is None or temperature is None:
        if len(documents) < 2:
            raise ValueError(f"documents must be at least 2 to choose lambda_ and temperature, got {len(documents)}")
        best = score_documents(model, datastore, documents[1::2], **reading).tuned()
        lambda_ = best[0] if lambda_ is None else lambda_
        temperature = best[1] if temperature is None else temperature
        documents = documents[::2]
    scores = score_documents(model, datastore, documents, **reading)
    # bytes of the tokens that are predicted: all but the first of each document
    share = num_entries(documents) / documents.num_tokens * documents.num_bytes * math.log(2)
    without = -float(scores.lm.double().sum()) / share
    mixed = -float(scores.log_probs(lambda_, temperature).sum()) / share
    return KNNEvaluation(without, mixed, len(scores.lm), lambda_, temperature)
