"""Self-rewarding fine-tuning (arXiv 2401.10020): the policy learns from the best and the worst of its own answers.

An iteration of ``training.pair_trainer``: several answers to each prompt are drawn and scored, by the policy as rater
or by a function; best and worst make a pair, which a preference loss trains on. Answers, ratings and scores are stored
row by row, so a run that is killed in any phase resumes exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from lm_core.causal_lm import eval_mode
from lm_core.checks import typed
from lm_core.cli.text_generation import SamplingFlags
from lm_core.data.epochs import seed_of
from lm_core.distributed import all_reduce_sum, barrier, rank, world_size
from lm_core.generation.decoding import as_eos_ids
from lm_core.tokenizers import continuation_text, end_ids
from spin_trainer.data.given_answers import read_answers
from spin_trainer.data.iteration_data import IterationData, answers_fingerprint
from spin_trainer.data.opponent_answers import Answer, Engine, Sampling, answer_prompts, batches_by_length
from spin_trainer.data.prompt_data import Prompt, as_prompt_dataset
from spin_trainer.data.rewards import Rater, sums_of_rewards
from spin_trainer.data.row_store import RowStore, fingerprint_of, name_of_function
from spin_trainer.data.sft_data import Example, Overlong, SFTDataset, training_and_validation
from spin_trainer.training.checks import check_datasets, check_policy
from spin_trainer.training.dpo import CURVES, NAMES, DPOSettings
from spin_trainer.training.pair_trainer import PairTrainer, SPINResult, started_engine
from spin_trainer.training.policy_trainer import opened


@typed
@dataclass(frozen=True, kw_only=True)
class SelfRewardingSettings(DPOSettings, SamplingFlags, Rater):
    """Settings of self-rewarding: rounds, answers, ratings, preference loss.

    Args:
        iterations: rounds of answers, ratings and training.
        candidates: answers to each prompt.
        epochs: passes over the pairs in each iteration.
        max_new_tokens: maximum length of an answer; null is what max_seq_len leaves.
        generation_batch_size: prompts per generation batch; null is twice the batch size.
        validate_every: updates between validations; both ends of an iteration are always validated.
        learning_rate: learning rate at the beginning of each iteration, or after the warmup.
        end_learning_rate: learning rate at the end of each iteration, reached by linear decay.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    iterations: int = 1
    candidates: int = 4
    max_new_tokens: int | None = None
    temperature: float = 0.7
    top_p: float | None = 0.9
    generation_batch_size: int | None = None

    def __post_init__(self) -> None:
        DPOSettings.__post_init__(self)
        SamplingFlags.__post_init__(self)
        Rater.__post_init__(self)
        self.check_counts("iterations", "max_new_tokens", "generation_batch_size")
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}")
        if self.temperature == 0:
            raise ValueError("temperature must be above 0, since candidates are equal at 0")


class SelfRewardingTrainer(PairTrainer):
    """Trains any causal language model on pairs of its own answers, chosen by its own ratings or by a reward.

    Args:
        model: anything that ``lm_core.adapters.as_causal_lm`` accepts, or a folder or hub name. Trained in place.
        train_dataset: prompts; see ``spin_trainer.data.prompt_data``.
        valid_dataset: held-out prompts, whose answers are rated before and after each iteration.
        reward: function, or several whose scores are summed, that score answers instead of the rater, in TRL's form;
            see ``spin_trainer.data.rewards.rewards_of``.
        answers: candidates of another engine for the only iteration; see ``spin_trainer.data.given_answers``.
        engine: engine that generates answers: "lm_core", or "vllm" (extra ``vllm``) for transformers models.
        engine_arguments: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``.
        tokenizer: tokenizer of texts and chats, saved with the policies; see ``SPINTrainer``.
        accelerator: ``accelerate.Accelerator`` to use instead of a new one.
        adam_kwargs: further arguments of ``torch.optim.AdamW``.
        eos_id: token or tokens that end an answer, by default those of tokenizer and model; () for none.
        template_kwargs: further arguments of the chat template, such as ``enable_thinking``.
        overlong: handling of prompts that leave no room for an answer: "error", or "drop" the row.
        checkpoint_dir: folder of the run.
        resume: "auto" resumes if the folder has a checkpoint, True demands one, False demands a folder without a run.
        trackers: names of ``accelerate``'s trackers, and objects with ``log(values, step=...)``.
        config: settings.
        settings: fields of ``SelfRewardingSettings``, instead of ``config``.

    Raises:
        ValueError, TypeError: an argument or a dataset's row is invalid; raised before anything is written.
    """

    settings: SelfRewardingSettings

    @typed
    def __init__(
        self,
        model: Any,
        *,
        train_dataset: Any,
        valid_dataset: Any = None,
        reward: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
        answers: Any = None,
        engine: Engine = "lm_core",
        engine_arguments: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        accelerator: Any = None,
        adam_kwargs: Mapping[str, Any] | None = None,
        eos_id: int | Sequence[int] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        overlong: Overlong = "error",
        checkpoint_dir: str | Path = "./self-reward-checkpoints",
        resume: bool | Literal["auto"] = "auto",
        trackers: Sequence[Any] = (),
        config: SelfRewardingSettings | None = None,
        **settings: Any,
    ) -> None:
        self.settings = SelfRewardingSettings.of(settings, config)
        if answers is not None and self.settings.iterations > 1:
            raise ValueError(
                f"answers are those of the model at the start, so iterations must be 1, got {self.settings.iterations}"
            )
        model, tokenizer = opened(model, tokenizer)
        if tokenizer is None:
            raise ValueError("tokenizer is required: answers are scored as texts, got tokenizer=None")
        policy = check_policy(model, "model")
        self.eos_ids = as_eos_ids(end_ids(tokenizer, policy) if eos_id is None else eos_id)
        self.rewards = [reward] if callable(reward) else list(reward or ())
        self.train_dataset, self.valid_dataset = training_and_validation(
            partial(
                as_prompt_dataset,
                max_seq_len=self.settings.max_seq_len,
                tokenizer=tokenizer,
                template_kwargs=template_kwargs,
                overlong=overlong,
            ),
            {"train_dataset": train_dataset, "valid_dataset": valid_dataset},
            fraction=self.settings.validation_fraction,
            seed=self.settings.seed,
        )
        datasets = {"train_dataset": self.train_dataset, "valid_dataset": self.valid_dataset}
        check_datasets(policy, self.settings.max_seq_len, datasets, self.eos_ids)
        self.given: list[Answer] | None = None
        if answers is not None:
            self.given = read_answers(
                answers,
                self.train_dataset,
                max_seq_len=self.settings.max_seq_len,
                tokenizer=tokenizer,
                eos_ids=self.eos_ids,
                count=self.settings.candidates,
            )
        chosen = {field.name: getattr(self.settings, field.name) for field in fields(SamplingFlags)}
        self.sampling = Sampling(
            **chosen,
            max_seq_len=self.settings.max_seq_len,
            max_new_tokens=self.settings.max_new_tokens,
            eos_id=self.eos_ids or None,
            batch_size=self.settings.generation_batch_size or 2 * self.settings.batch_size,
            seed=self.settings.seed,
            precision=self.settings.precision,
            engine=engine,
        )
        # the rater reads an answer next to its template
        request = self.settings.prompt(tokenizer, "", "")
        rating = 0 if self.rewards else len(request) + self.settings.rating_max_new_tokens
        self._longest = 2 * self.settings.max_seq_len + rating
        loss = self.settings.preference_loss
        super().__init__(
            model,
            policy,
            self.settings,
            comparison=loss.comparison,
            needs_reference=loss.needs_reference,
            iterations=self.settings.iterations,
            selected_by="-score",
            engine=started_engine(engine, model, tokenizer, max_length=self._longest, arguments=engine_arguments),
            names=NAMES,
            tokenizer=tokenizer,
            checkpoint_dir=Path(checkpoint_dir).expanduser(),
            resume=resume,
            trackers=trackers,
            accelerator=accelerator,
            adam_kwargs=adam_kwargs,
        )
        self._register_pairs(
            identity=lambda: {
                "train_dataset": self.train_dataset.fingerprint,
                "valid_dataset": None if self.valid_dataset is None else self.valid_dataset.fingerprint,
                "loss": [getattr(loss, field.name) for field in fields(loss)],
                "sampling": repr(sorted(self.sampling.description().items())),
                "candidates": self.settings.candidates,
                "reward": [name_of_function(function) for function in self.rewards],
                "rater": fingerprint_of({field.name: getattr(self.settings, field.name) for field in fields(Rater)}),
                "answers": None if self.given is None else answers_fingerprint(self.given),
            },
            curves=("score", "best_score", *CURVES),
            validate=None if self.valid_dataset is None else self._validate,
            shown=("iteration", "loss", "accuracy"),
        )

    def train(self, *, overwrite: bool = True) -> SPINResult:
        """Runs all iterations, or resumes the run in ``checkpoint_dir``; arguments and errors as in ``SPINTrainer``."""
        return self._run(overwrite)

    def _pairs_of(self, iteration: int) -> None:
        """The number of pairs depends on the scores."""

    def _iteration_data(self) -> tuple[IterationData, IterationData | None]:
        """The best and the worst answer to each prompt on which the scores differ."""
        count = self.settings.candidates
        prompts = [prompt for prompt in self.train_dataset.examples for _ in range(count)]
        answers, scores = self._scored(prompts, "train", self.iteration, self.given)
        pairs: list[tuple[Example, Answer]] = []
        best: list[float] = []
        for first in range(0, len(prompts), count):
            valid = [(score, -index) for index in range(first, first + count) if (score := scores[index]) is not None]
            if not valid:
                continue
            (high, chosen), (low, rejected) = max(valid), min(valid)
            best.append(high)
            if high > low:
                better, worse = answers[-chosen], answers[-rejected]
                pairs.append((Example(prompts[first].prompt, better.tokens, not better.finished), worse))
        known = [score for score in scores if score is not None]
        self._summary = {
            "score": fmean(known) if known else 0.0,
            "best_score": fmean(best) if best else 0.0,
            "invalid_rate": 1 - len(known) / len(scores),
            "pairs": float(len(pairs)),
        }
        if not pairs:
            raise ValueError(
                f"no prompt of iteration {self.iteration} has answers of different scores: {len(known)} of "
                f"{len(scores)} scores are valid; try more candidates, a higher temperature or another rating_template"
            )
        train = IterationData(
            dataset=SFTDataset([example for example, _ in pairs]),
            answers=[worse for _, worse in pairs],
            root=self.run_folder / "generations",
            sampling=self.sampling,
            split="pairs",
            iteration=self.iteration,
            weights=self.state.opponent,
            score_batch_size=self.settings.rows_per_pass,
        )
        self._complete([train])
        return train, None

    def _update(self, data: IterationData, order: Any) -> dict[str, Any]:
        """Makes one optimizer update; the first of an iteration logs the scores that its pairs are from."""
        summary = self._summary if self.state.update == 0 else {}
        return {**super()._update(data, order), **summary}

    def _scored(
        self, prompts: Sequence[Example], split: str, iteration: int, given: list[Answer] | None = None
    ) -> tuple[list[Answer], list[float | None]]:
        """An answer of the opponent to each prompt, and its score; both are stored."""
        stored: Any = partial(
            IterationData,
            root=self.run_folder / "generations",
            iteration=iteration,
            weights=self.state.opponent,
        )

        def drawn(asked: Sequence[Example], sampling: Sampling, kind: str, answers: Any = None) -> IterationData:
            data: IterationData = stored(
                dataset=SFTDataset(asked), sampling=sampling, split=f"{split}-{kind}", answers=answers
            )
            self._complete([data], scores=False)
            return data

        candidates = drawn(prompts, self.sampling, "candidates", given)
        if self.rewards:
            return candidates.answers, self._rewarded(prompts, candidates, f"{split}-{iteration}")
        texts = self._texts(prompts, candidates.answers)
        return candidates.answers, self._rated(
            prompts, texts, lambda asked, sampling: drawn(asked, sampling, "ratings").answers
        )

    def _texts(self, prompts: Sequence[Example], answers: Sequence[Answer]) -> list[str]:
        return [
            continuation_text(self.tokenizer, prompt.prompt, answer.tokens)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _rated(
        self,
        prompts: Sequence[Example],
        texts: Sequence[str],
        draw: Callable[[list[Example], Sampling], list[Answer]],
    ) -> list[float | None]:
        """The rater's mean rating of each text; ``draw`` answers the requests for ratings."""
        draws = self.settings.rating_draws
        asked = [
            Example(tuple(self.settings.prompt(self.tokenizer, prompt.text, text)), ())
            for prompt, text in zip(prompts, texts, strict=True)
            if isinstance(prompt, Prompt)
            for _ in range(draws)
        ]
        length = max(len(example.prompt) for example in asked) + self.settings.rating_max_new_tokens
        limit = getattr(self.policy, "max_length", None)
        if limit is not None and length > limit:
            raise ValueError(f"a rating needs {length} tokens, more than the model's {limit}; lower max_new_tokens")
        sampling = replace(
            self.sampling, max_seq_len=length, max_new_tokens=self.settings.rating_max_new_tokens, own_filters=()
        )
        values = [
            self.settings.score(continuation_text(self.tokenizer, example.prompt, rating.tokens))
            for example, rating in zip(asked, draw(asked, sampling), strict=True)
        ]
        groups = [values[first : first + draws] for first in range(0, len(values), draws)]
        valid = [[value for value in group if value is not None] for group in groups]
        return [fmean(group) if group else None for group in valid]

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean score of the policy's answers to held-out prompts, and the share of answers without one."""
        assert self.valid_dataset is not None
        sums = torch.zeros(3, dtype=torch.float32, device=self.device)
        batches = batches_by_length([len(prompt.prompt) for prompt in self.valid_dataset], self.sampling.batch_size)
        with self.session.gathered(), eval_mode(self.policy):
            answering = self._answering()
            for index, rows in list(enumerate(batches))[rank() :: world_size()]:
                prompts = [self.valid_dataset[row] for row in rows]
                seed = seed_of("valid", self.settings.seed, index)
                answers = answer_prompts(answering, [prompt.prompt for prompt in prompts], self.sampling, seed)
                texts = self._texts(prompts, answers)
                if self.rewards:
                    scores = sums_of_rewards(self.rewards, prompts, texts, answers)
                else:
                    scores = self._rated(prompts, texts, partial(self._live_ratings, answering, seed=seed))
                known = [score for score in scores if score is not None]
                sums += sums.new_tensor([sum(known), len(known), len(scores)])
        total, count, asked = all_reduce_sum(sums).tolist()
        return {"validation_score": total / max(count, 1), "validation_invalid_rate": 1 - count / asked}

    def _live_ratings(self, answering: Any, asked: list[Example], sampling: Sampling, *, seed: int) -> list[Answer]:
        ratings: list[Answer] = []
        for first in range(0, len(asked), sampling.batch_size):
            part = [example.prompt for example in asked[first : first + sampling.batch_size]]
            ratings += answer_prompts(answering, part, sampling, seed_of(seed, first))
        return ratings

    def _rewarded(self, prompts: Sequence[Example], candidates: IterationData, kind: str) -> list[float | None]:
        """Scores of the reward function, computed once; each process scores its share of the answers."""
        names = [name_of_function(function) for function in self.rewards]
        description = {"answers": candidates.answers_fingerprint, "reward": names}
        store = RowStore(self.run_folder / "generations", f"rewards-{kind}", description, rank=rank())
        answers, size = candidates.answers, self.sampling.batch_size
        for first in range(rank() * size, len(prompts), world_size() * size):
            rows = [row for row in range(first, min(first + size, len(prompts))) if row not in store.rows]
            if rows:
                asked = [prompt for row in rows if isinstance(prompt := prompts[row], Prompt)]
                drawn = [answers[row] for row in rows]
                values = sums_of_rewards(self.rewards, asked, self._texts(asked, drawn), drawn)
                store.append({"row": row, "score": value} for row, value in zip(rows, values, strict=True))
        barrier()
        store.refresh()
        return [store.rows[row]["score"] for row in range(len(prompts))]
