"""Training on documents in order.

Each batch row reads one document after another, one segment per update (or several with gradient accumulation); the XL
window and the memories continue from segment to segment and are cleared where a document ends. An update divides the
summed loss by the labels of ALL processes together, so it does not depend on how rows are sharded over them.

A checkpoint has the state of each process: memories, XL window, position in the documents, random states. A run that
was killed and resumed ends with the same weights, bit for bit, as an uninterrupted one (with equal settings, device,
torch and number of processes; with ``compile`` up to rounding, since the resumed run compiles for other shapes first).
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lm_core.checkpoints.pretrained import check_vocabulary
from lm_core.checks import check_ids, typed
from lm_core.data.corpora import Corpus
from lm_core.data.packing import bits_per_byte
from lm_core.distributed import loss_normalizer, rank, world_size
from lm_core.tokenizers import ByteTokenizer, Tokenizer, as_tokenizer
from lm_core.training.accelerator import Precision, autocast
from lm_core.training.blocks import blocks_of
from lm_core.training.session import TrainingResult as SessionResult
from lm_core.training.session import TrainingSession, adamw
from memorizing_transformer.memory.memory_list import KNNMemoryList
from memorizing_transformer.model.augmented import MemoryAugmentedLM
from memorizing_transformer.model.segment import XLMemories
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.documents import DocumentStreams
from memorizing_transformer.training.evaluation import Evaluation, evaluate

CURVES = (
    "train_bits_per_byte",
    "validation_bits_per_byte",
    "validation_bits_per_byte_without_memory",
    "memory_gain_far",
    "learning_rate",
    "grad_norm",
    "memories",
)
# A memory gains most in long documents: memory_gain_far covers tokens with at least so many before them.
FAR = 2048
# Arguments of the model that may differ in a resumed run.
_FREE = ("attn_dropout", "ff_dropout", "segment_length", "knn_memories_directory", "memories_directory")


@dataclass(frozen=True, kw_only=True)
class TrainingResult(SessionResult):
    """Result of a run; see also ``lm_core.training.session.TrainingResult``.

    Attributes:
        first_bits_per_byte: bits per byte of held-out documents before training.
        last: scores of the last validation of this call; None if there was none.
        without_memory: scores of the same weights without kNN memories.
    """

    first_bits_per_byte: float
    last: Evaluation | None
    without_memory: Evaluation | None
    checkpoints: Path


class SegmentLoss(nn.Module):
    """The model with its loss, memories and XL window."""

    def __init__(self, model: MemorizingTransformer | MemoryAugmentedLM, *, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        # not arguments of forward: DDP would rebuild them as plain lists
        self.memories: KNNMemoryList | None = None
        self.window: XLMemories | None = None

    def forward(self, ids: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
        """Summed loss of a segment over ``normalizer``; updates memories and window."""
        with autocast(self.precision, ids.device):
            result = self.model(ids, self.memories, self.window, labels, loss_normalizer=normalizer)
        loss, self.window = result if isinstance(result, tuple) else (result, None)
        return loss


class _Remembered:
    """Checkpoint state of the memories and the window of a process's rows."""

    def __init__(self, objective: SegmentLoss) -> None:
        self.objective = objective
        # content of the memories while none are open
        self.closed: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        memories, window = self.objective.memories, self.objective.window
        return {
            "memories": self.closed if memories is None else memories.state_dict(),
            "window": None if window is None else {"kv": list(window), "mask": window.mask},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.closed = state["memories"]
        if state["window"] is not None:
            device, mask = self.objective.model.device, state["window"]["mask"]
            self.objective.window = XLMemories(kv.to(device) for kv in state["window"]["kv"])
            self.objective.window.mask = None if mask is None else mask.to(device)


class MemoryTrainer:
    """Trains a MemorizingTransformer, or the memory of a MemoryAugmentedLM, on documents in order, resumably.

    Args:
        model: model to train in place; it is moved to the device.
        corpus: documents in the ids of ``tokenizer``; see ``lm_core.data.corpora``.
        checkpoint_dir: folder of the run; see ``lm_core.training.run_directory.RunDirectory``.
        tokenizer: tokenizer with the id that ends documents, or its folder or name; saved with the checkpoints. The
            default reads bytes.
        settings: training settings.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of trackers that ``accelerate`` knows, and objects with ``log(values, step=...)``.

    Raises:
        ValueError: the model does not clear its memories at the tokenizer's EOS, or has fewer tokens than the
            tokenizer; the device or the precision is not available; a side of the corpus is too small.
        TypeError: an argument is of another type.
    """

    @typed
    def __init__(
        self,
        *,
        model: MemorizingTransformer | MemoryAugmentedLM,
        corpus: Corpus,
        checkpoint_dir: str | Path,
        tokenizer: Any = None,
        settings: TrainingSettings | None = None,
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
    ) -> None:
        self.settings = settings = TrainingSettings() if settings is None else settings
        self.tokenizer: Tokenizer = ByteTokenizer() if tokenizer is None else as_tokenizer(tokenizer)
        check_vocabulary(self.tokenizer, model.num_tokens)
        eos_id = self.tokenizer.eos_id
        if eos_id is None or model.eos_id != eos_id:
            raise ValueError(
                f"model must have clear_memories_on_eos_token_id = {eos_id}, the tokenizer's eos_id, got {model.eos_id}"
            )
        if isinstance(model, MemoryAugmentedLM):
            if settings.compile:
                raise ValueError("compile must be False for a transformers model with a memory: its layers have hooks")
            if settings.fsdp:
                # a segment of several documents takes several forwards, of which every process must make as many
                raise ValueError("fsdp must be False for a transformers model with a memory")
        self.corpus = corpus
        self.session = TrainingSession(
            type(self).__name__,
            config=settings,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            trackers=trackers,
            packages=("memorizing-transformer",),
        )
        self.device = self.session.device
        self.streams = DocumentStreams(
            documents=corpus.train,
            segment_length=settings.segment_length,
            batch_size=settings.batch_size,
            eos_id=eos_id,
            seed=settings.seed,
            rank=rank(),
            world_size=world_size(),
        )
        self.model = self.session.place(model)
        self.objective = SegmentLoss(model, precision=settings.precision)
        self.use_memory = settings.use_memory and bool(model.memorizing_layers)
        self._remembered = _Remembered(self.objective)
        self.last: Evaluation | None = None
        self.without_memory: Evaluation | None = None
        arguments = model.config["arguments"]
        self.session.register(
            model=model,
            objective=self.objective,
            optimizer=lambda: adamw(model, settings),
            blocks=lambda: blocks_of(model),
            rank_state={"streams": self.streams, "remembered": self._remembered},
            architecture={name: value for name, value in arguments.items() if name not in _FREE},
            identity={"use_memory": self.use_memory, "validation_data": corpus.validation.fingerprint},
            tokenizer=self.tokenizer,
            validate=self._validate,
            record={"model": arguments, "corpus_fingerprint": corpus.fingerprint},
            curves=CURVES,
        )

    def train(self) -> TrainingResult:
        """Trains up to ``max_steps``, or until Ctrl-C or ``max_seconds``, and writes a checkpoint at the end.

        Raises:
            RuntimeError, CheckpointError, FileNotFoundError, FileExistsError: see ``TrainingSession.run``.
            ValueError: the checkpoint has other data or another segment length.
            OSError: a checkpoint could not be written; earlier ones are untouched.
        """
        settings, objective = self.settings, self.objective
        self.last = self.without_memory = None
        # the session first: memories take their content from the checkpoint it loads
        with self.session.run() as session, self._memories() if self.use_memory else contextlib.nullcontext():
            for _ in session.steps():
                started = time.monotonic()
                segments = [next(self.streams) for _ in range(settings.gradient_accumulation)]
                for segment in segments:
                    check_ids(segment.ids, self.model.num_tokens, "corpus")
                labels, normalizer = loss_normalizer(sum(segment.num_labels for segment in segments), self.device)
                for segment in session.micro_batches(segments):
                    ids, targets = segment.ids.to(self.device), segment.labels.to(self.device)
                    session.backward(session.module(ids, targets, normalizer))
                update = session.optimizer_step()
                nats = update["loss"] * labels
                session.log(
                    update,
                    train_bits_per_byte=bits_per_byte(nats, max(1, round(labels)), self.corpus.train),
                    memories=len(objective.memories[0]) / settings.batch_size if objective.memories else 0,
                    tokens_per_second=round(labels / (time.monotonic() - started)),
                    epoch=self.streams.epoch,
                )
        return session.result(
            TrainingResult,
            first_bits_per_byte=session.first_validation["validation_bits_per_byte"],
            last=self.last,
            without_memory=self.without_memory,
        )

    @contextlib.contextmanager
    def _memories(self) -> Iterator[None]:
        """Memories for a run, closed at its end; later checkpoints and runs continue with their content."""
        remembered = self._remembered
        with self.model.knn_memories_context(batch_size=self.settings.batch_size) as memories:
            if remembered.closed is not None:
                memories.load_state_dict(remembered.closed)
            remembered.closed = None
            self.objective.memories = memories
            try:
                yield
            finally:
                self.objective.memories = None
                remembered.closed = memories.state_dict()

    def _validate(self) -> dict[str, float]:
        settings = self.settings
        score = partial(
            evaluate,
            self.model,
            self.corpus.validation,
            eos_id=self.streams.eos_id,
            segment_length=settings.segment_length,
            batch_size=settings.batch_size,
            max_documents=settings.validation_documents,
            precision=settings.precision,
        )
        # processes read different numbers of segments
        with self.session.gathered():
            self.last = score(use_memory=self.use_memory)
            if self.use_memory:
                self.without_memory = score(use_memory=False)
        values = {"validation_bits_per_byte": self.last.bits_per_byte, "validation_loss": self.last.loss}
        if self.without_memory is not None:
            values["validation_bits_per_byte_without_memory"] = self.without_memory.bits_per_byte
            values["memory_gain_far"] = _mean_from(self.without_memory, FAR) - _mean_from(self.last, FAR)
        return values


def _mean_from(evaluation: Evaluation, position: int) -> float:
    """Mean loss in bits of tokens with at least ``position`` before them; NaN if there are none."""
    far = [(count, loss) for first, count, loss in evaluation.by_position if first >= position]
    total = sum(count for count, _ in far)
    return sum(count * loss for count, loss in far) / total / math.log(2) if total else float("nan")
