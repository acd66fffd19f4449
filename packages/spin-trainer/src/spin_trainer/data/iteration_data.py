"""Data of one iteration: the opponent's answers to a dataset, and its log-probabilities of all answers.

The policy computes both at the beginning of the iteration, when it IS the opponent (it was just promoted). So a second
model is needed neither then nor, with both on disk, while the policy trains. Answers may also be given: those of
another engine, or the rejected ones of preference data.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_core.causal_lm import eval_mode
from lm_core.data.epochs import seed_of
from lm_core.distributed import barrier, rank, world_size
from spin_trainer.data.opponent_answers import Answer, Sampling, answer_prompts, batches_by_length, opponent_log_probs
from spin_trainer.data.row_store import RowStore, fingerprint_of
from spin_trainer.data.sft_data import SFTDataset


class Interrupted(Exception):
    """A stop was requested while rows were computed; completed rows are on disk."""


@dataclass(frozen=True)
class Pair:
    """An example of the dataset with an answer of the opponent.

    Attributes:
        row: index of the example.
        previous: True if the answer is from the previous iteration.
    """

    row: int
    previous: bool = False


def answers_fingerprint(answers: Sequence[Answer]) -> str:
    """SHA-256 of the token ids of given answers."""
    return fingerprint_of({"answers": [[*answer.tokens] for answer in answers]})


class IterationData:
    """Answers and reference log-probabilities of one dataset in one iteration.

    Args:
        dataset: prompts with human answers.
        root: folder of the row stores.
        sampling: sampling settings of the answers.
        split: name of the dataset, "train" or "valid".
        iteration: index of the iteration, from 0.
        weights: fingerprint of the opponent's weights.
        previous: data of the previous iteration, whose answers are mixed in.
        answers: an answer to each example, instead of those that the opponent generates.
        score_batch_size: rows per batch of log-probabilities.
    """

    def __init__(
        self,
        *,
        dataset: SFTDataset,
        root: Path,
        sampling: Sampling,
        split: str,
        iteration: int,
        weights: str,
        previous: "IterationData | None" = None,
        answers: Sequence[Answer] | None = None,
        score_batch_size: int = 16,
    ) -> None:
        self.dataset = dataset
        self.sampling = sampling
        self.split = split
        self.iteration = iteration
        self.previous = [] if previous is None else previous.answers
        self.score_batch_size = score_batch_size
        # row stores, named by everything that their rows depend on
        prompts = fingerprint_of({"prompts": [list(example.prompt) for example in dataset]})
        description = {"format_version": 1, "weights": weights, "prompts": prompts, **sampling.description()}
        description |= {"iteration": iteration, "split": split}
        self.answer_store: RowStore | None = None
        if answers is None:
            self.answer_store = RowStore(root, f"answers-{split}-{iteration}", description, rank=rank())
            self.answers_fingerprint = self.answer_store.fingerprint
        else:
            self.answers_fingerprint = answers_fingerprint(answers)
        scores = {
            "format_version": 1,
            "weights": weights,
            "dataset": dataset.fingerprint,
            "answers": self.answers_fingerprint,
            "previous": None if previous is None else previous.answers_fingerprint,
            "batch_size": score_batch_size,
            "precision": sampling.precision,
        }
        self.score_store = RowStore(root, f"scores-{split}-{iteration}", scores, rank=rank())
        self.answers: list[Answer] = list(answers or ())
        # each example with the opponent's answer, and with that of the previous iteration
        kinds = (False,) if previous is None else (False, True)
        self.pairs = [Pair(row, previous=kind) for kind in kinds for row in range(len(dataset))]

    def complete(
        self, model: Any, stop: Callable[[], bool] = lambda: False, *, scores: bool = True, engine: Any = None
    ) -> None:
        """Computes the rows that are not on disk yet; every process must call it.

        Args:
            model: the opponent, a ``CausalLM``; None after the policy's first update, when all rows must be on disk.
            stop: called between batches; True interrupts.
            scores: whether log-probabilities are needed.
            engine: engine that answers instead of the model.

        Raises:
            Interrupted: ``stop`` returned True before all rows were complete.
            FileNotFoundError: rows are missing and ``model`` is None.
        """
        with eval_mode(model):
            if self.answer_store is not None:
                lengths = [len(example.prompt) for example in self.dataset]
                batches = batches_by_length(lengths, self.sampling.batch_size)
                self._fill(
                    self.answer_store, "answers", batches, self._answer, model if engine is None else engine, stop
                )
                rows = sorted(self.answer_store.rows.items())
                self.answers = [Answer(tuple(row["tokens"]), row["finished"]) for _, row in rows]
            if scores:
                totals = [
                    len(example.prompt) + max(len(example.response), len(answer.tokens))
                    for example, answer in zip(self.dataset, self.answers, strict=True)
                ]
                batches = batches_by_length(totals, self.score_batch_size)
                self._fill(self.score_store, "log-probs", batches, self._score, model, stop)

    def _fill(
        self,
        store: RowStore,
        name: str,
        batches: Sequence[list[int]],
        work: Callable[[Any, int, list[int]], Iterator[dict[str, Any]]],
        model: Any,
        stop: Callable[[], bool],
    ) -> None:
        """Computes missing rows with ``work(model, batch index, row indices)``; each process takes its batches."""
        count = len(self.dataset)
        if model is None and len(store.rows) < count:
            raise FileNotFoundError(
                f"{store.folder} has {len(store.rows)} of {count} rows, and the weights that made them "
                "are gone: resume from an earlier checkpoint, or train into another folder"
            )
        share = list(enumerate(batches))[rank() :: world_size()]
        todo = [(index, rows) for index, rows in share if any(row not in store.rows for row in rows)]
        title = f"iteration {self.iteration}: {name} ({self.split})"
        for index, rows in tqdm(todo, desc=title, unit="batch", disable=rank() != 0 or not todo, leave=False):
            if stop():
                break
            store.append(work(model, index, rows))
        barrier()
        store.refresh()
        if len(store.rows) < count:
            raise Interrupted

    def _answer(self, model: Any, batch: int, rows: list[int]) -> Iterator[dict[str, Any]]:
        prompts = [self.dataset[row].prompt for row in rows]
        seed = seed_of("answers", self.sampling.seed, self.iteration, self.split, batch)
        for row, answer in zip(rows, answer_prompts(model, prompts, self.sampling, seed), strict=True):
            yield {"row": row, "tokens": list(answer.tokens), "finished": answer.finished}

    def _score(self, model: Any, _: int, rows: list[int]) -> Iterator[dict[str, Any]]:
        prompts = [self.dataset[row].prompt for row in rows]
        kinds: dict[str, Sequence[Sequence[int]]] = {
            "real": [self.dataset[row].response for row in rows],
            "generated": [self.answers[row].tokens for row in rows],
        }
        if self.previous:
            kinds["previous"] = [self.previous[row].tokens for row in rows]
        precision = self.sampling.precision
        scores = [opponent_log_probs(model, prompts, answers, precision) for answers in kinds.values()]
        for row, *values in zip(rows, *scores, strict=True):
            yield {"row": row, **dict(zip(kinds, values, strict=True))}

    def answer(self, pair: Pair) -> Answer:
        """The generated answer of a pair."""
        return (self.previous if pair.previous else self.answers)[pair.row]

    def reference(self, pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
        """Reference log-probabilities of the human and of the generated answers."""
        rows = [self.score_store.rows[pair.row] for pair in pairs]
        generated = [row["previous" if pair.previous else "generated"] for row, pair in zip(rows, pairs, strict=True)]
        return [row["real"] for row in rows], generated

    def summary(self) -> dict[str, float]:
        """Mean length of the answers, share cut off by the length limit, share equal to the human answer."""
        count = len(self.answers)
        equal = sum(a.tokens == example.response for a, example in zip(self.answers, self.dataset, strict=True))
        return {
            "generated_length": sum(len(answer.tokens) for answer in self.answers) / count,
            "truncation_rate": sum(not answer.finished for answer in self.answers) / count,
            "identical_rate": equal / count,
        }
