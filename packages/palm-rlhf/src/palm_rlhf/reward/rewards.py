"""Rewards: one interface for everything that scores responses.

| reward | called with |
|---|---|
| ``RewardModel`` | the tokens |
| Hugging Face sequence classifier, with its own tokenizer | prompt and response as text |
| callable ``(sequences, prompt_lengths) -> rewards`` | padded ids ``(b, n)`` and lengths |
| callable with ``prompts``, ``completions``, ``completion_ids`` or ``**kwargs``, also ``async`` | TRL's form, below |
| list of these, or of ``(weight, reward)`` | each in turn; the weighted sum, and metrics of each |
| ``"module:name"``, ``"module:name(argument=1)"`` | the object, or the result of the call |
| ``RolloutReward`` | the rollout |

A function in TRL's form is called with those that it takes of ``prompts``, ``completions``, ``completion_ids``, the
columns of the prompts' rows, ``trainer_state`` (``palm_rlhf.reward.log.TrainerState``), ``log_metric(name, number)``
and ``log_extra(name, values)``; with ``**kwargs``, all of them. A chat is passed as its messages, its completion as
``[{"role": "assistant", "content": text}]``. It returns a number for each response, or a list of numbers for each of
its tokens; with None, its term is left out. A tensor ``(b, n)`` has a reward for each token of a row.
"""

import ast
import asyncio
import contextlib
import functools
import hashlib
import importlib
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.causal_lm import eval_mode
from lm_core.checkpoints.tensor_files import hash_of
from palm_rlhf.data.rollouts import Rollout
from palm_rlhf.reward.log import RewardLog
from palm_rlhf.reward.model import RewardModel

_UNLIMITED = 10**9  # tokenizers without a limit have 10**30


class RolloutReward(ABC):
    """A reward of rollouts; subclass it for a reward that needs all of a rollout."""

    @abstractmethod
    def __call__(self, rollout: Rollout, log: RewardLog | None = None) -> Tensor:
        """Rewards of responses ``(b,)`` or of their tokens ``(b, n)``, NaN for a response that is left out."""

    def state_dict(self) -> dict[str, Any]:
        """State of a reward that learns during a run, for a checkpoint; empty otherwise."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from ``state``."""
        assert not state, "a reward with a state loads it"


@dataclass(frozen=True)
class ModelReward(RolloutReward):
    """A ``RewardModel`` with the vocabulary of the policy, applied in batches."""

    model: RewardModel
    batch_size: int = 64

    @torch.no_grad()
    def __call__(self, rollout: Rollout, log: RewardLog | None = None) -> Tensor:
        """Scores of whole sequences."""
        parts = (t.split(self.batch_size) for t in (rollout.ids, rollout.prompt_lengths, rollout.lengths))
        with eval_mode(self.model):
            scores = [
                self.model(ids, prompt_lengths=prompts, lengths=lengths)
                for ids, prompts, lengths in zip(*parts, strict=True)
            ]
        return check_scores(torch.cat(scores), rollout)


@dataclass
class ClassifierReward(RolloutReward):
    """A Hugging Face sequence classifier with one label, and the tokenizer it was trained with.

    A chat is scored as the text of the classifier's chat template, or of the policy's if it has none. Texts that exceed
    the classifier's limit lose their beginning, and a warning counts them.

    Args:
        model: a ``...ForSequenceClassification`` with ``num_labels=1``.
        tokenizer: tokenizer of ``transformers``.
        batch_size: responses per forward pass.

    Attributes:
        truncated: responses so far whose text exceeded the limit.
    """

    model: Any
    tokenizer: Any
    batch_size: int = 16
    truncated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        labels = getattr(getattr(self.model, "config", None), "num_labels", None)
        if labels != 1:
            raise ValueError(f"reward must be a classifier with num_labels=1, got num_labels={labels}")
        if getattr(self.tokenizer, "pad_token_id", 0) is None:
            raise ValueError("the reward's tokenizer must have a pad token, got pad_token=None")

    @torch.no_grad()
    def __call__(self, rollout: Rollout, log: RewardLog | None = None) -> Tensor:
        """Scores of prompt and response as one text."""
        chats = rollout.messages or [None] * len(rollout)
        texts = [self._text(*row) for row in zip(*_texts(rollout), chats, strict=True)]
        device = next(self.model.parameters()).device
        scores, too_long, limit = torch.zeros(len(texts), device=device), 0, self._limit()
        with eval_mode(self.model), self._truncation_on_the_left():
            # a template has written the special tokens of a chat already
            kinds: tuple[tuple[bool, dict[str, Any]], ...] = ((False, {}), (True, {"add_special_tokens": False}))
            for is_chat, settings in kinds:
                rows = [row for row, chat in enumerate(chats) if (chat is not None) == is_chat]
                for first in range(0, len(rows), self.batch_size):
                    chosen = rows[first : first + self.batch_size]
                    part = [texts[row] for row in chosen]
                    bounds = {} if limit is None else {"max_length": limit}
                    if limit is not None:
                        too_long += sum(len(ids) > limit for ids in self.tokenizer(part, **settings)["input_ids"])
                    batch = self.tokenizer(
                        part, padding=True, truncation=True, return_tensors="pt", **settings, **bounds
                    )
                    scores[chosen] = self.model(**batch.to(device)).logits[:, 0].float()
        if too_long:
            self.truncated += too_long
            warnings.warn(f"{too_long} of {len(texts)} texts exceed the reward's limit, cut on the left", stacklevel=2)
        return check_scores(scores, rollout)

    def _text(self, prompt: str, completion: str, messages: Any) -> str:
        if messages is None or not getattr(self.tokenizer, "chat_template", None):
            return prompt + completion
        chat = [*map(dict, messages), {"role": "assistant", "content": completion}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False))

    def _limit(self) -> int | None:
        """Maximum number of tokens; None if tokenizer and model define none."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():
            if positions is not None and name.endswith("position_embeddings") and hasattr(module, "padding_idx"):
                # RoBERTa and related models count positions from after the padding id
                positions = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        limits = (getattr(self.tokenizer, "model_max_length", None), positions)
        known = [limit for limit in limits if limit is not None and limit < _UNLIMITED]
        return min(known) if known and hasattr(self.tokenizer, "model_max_length") else None

    @contextlib.contextmanager
    def _truncation_on_the_left(self) -> Iterator[None]:
        """The response is what is scored, so it must stay."""
        side = getattr(self.tokenizer, "truncation_side", None)
        try:
            self.tokenizer.truncation_side = "left"
            yield
        finally:
            if side is not None:
                self.tokenizer.truncation_side = side


@dataclass(frozen=True)
class FunctionReward(RolloutReward):
    """A function in TRL's form by the names of its parameters, else of padded ids; see the module's table."""

    function: Callable[..., Any]

    def __call__(self, rollout: Rollout, log: RewardLog | None = None) -> Tensor:
        """Rewards of the function, NaN where it returns None."""
        log = RewardLog() if log is None else log
        parameters = _parameters(self.function)
        if not _is_text_function(parameters, rollout):
            more = {"lengths": rollout.lengths} if "lengths" in parameters else {}
            values = self.function(rollout.ids, rollout.prompt_lengths, **more)
            return check_scores(_as_scores(values, rollout, self.function), rollout)
        arguments = _text_arguments(rollout, log)
        required = [name for name, parameter in parameters.items() if _is_required(parameter)]
        if missing := [name for name in required if name not in arguments]:
            raise TypeError(
                f"reward {_name(self.function)} needs {', '.join(missing)}, but gets {', '.join(sorted(arguments))}"
            )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            arguments = {name: value for name, value in arguments.items() if name in parameters}
        values = self.function(**arguments)
        if inspect.isawaitable(values):
            with ThreadPoolExecutor(1) as pool:  # a notebook runs a loop of its own in this thread
                values = pool.submit(asyncio.run, _awaited(values)).result()
        for name, column in log.columns.items():
            if len(column) != len(rollout):
                raise ValueError(f"log_extra({name!r}) needs {len(rollout)} values, one a response, got {len(column)}")
        scores = _as_scores(values, rollout, self.function)
        return check_scores(scores, rollout) if isinstance(values, Tensor) else scores  # only None leaves one out


@dataclass(frozen=True)
class WeightedRewards(RolloutReward):
    """The weighted sum of several rewards, without the terms that are None for a response."""

    terms: tuple[tuple[float, RolloutReward], ...]

    def __call__(self, rollout: Rollout, log: RewardLog | None = None) -> Tensor:
        """NaN only where every term is None; of tokens ``(b, n)`` if any term is."""
        columns: list[Tensor] = []
        for weight, reward in self.terms:
            values = reward(rollout, log).to(torch.float32)
            if log is not None:
                log.add_term(_name(getattr(reward, "function", reward)), rollout.totals(values))
            columns.append(weight * values.to(columns[0].device if columns else values.device))
        if any(column.ndim == 2 for column in columns):
            columns = [column if column.ndim == 2 else _at_last_tokens(column, rollout) for column in columns]
        table = torch.stack(columns)
        return table.nansum(dim=0).masked_fill(table.isnan().all(dim=0), torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """States of the terms that have one."""
        states = {str(index): reward.state_dict() for index, (_, reward) in enumerate(self.terms)}
        return {index: state for index, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from ``state``."""
        for index, part in state.items():
            self.terms[int(index)][1].load_state_dict(part)


Reward = RolloutReward


def as_reward(reward: Any) -> Reward:
    """A reward from any of the forms of the module's table.

    Raises:
        TypeError: it is none of these.
        ValueError: an empty list, or a name that is not "module:function".
    """
    if isinstance(reward, RolloutReward):
        return reward
    if isinstance(reward, RewardModel):
        return ModelReward(reward)
    if isinstance(reward, str):
        return as_reward(_imported(reward))
    if isinstance(reward, Sequence):
        pairs = [entry if _is_weighted(entry) else (1.0, entry) for entry in reward]
        if not pairs:
            raise ValueError("reward must hold at least one reward, got an empty list")
        return WeightedRewards(tuple((float(weight), as_reward(inner)) for weight, inner in pairs))
    if isinstance(reward, nn.Module) and hasattr(getattr(reward, "config", None), "num_labels"):
        raise TypeError("a Hugging Face classifier needs its tokenizer: pass ClassifierReward(model, tokenizer)")
    if callable(reward):
        return FunctionReward(reward)
    raise TypeError(f"reward must be a RewardModel, a callable, or a list of these, got {type(reward).__name__}")


def reward_identity(reward: Reward | None) -> str | None:
    """A description that distinguishes rewards, to recognise the reward of a run.

    Models are known by their weights, functions by name, arguments of ``functools.partial`` and source. What a function
    calls or reads is not followed.
    """
    if reward is None:
        return None
    if isinstance(reward, WeightedRewards):
        return " + ".join(f"{weight:g} * {reward_identity(term)}" for weight, term in reward.terms)
    function = reward.function if isinstance(reward, FunctionReward) else getattr(reward, "model", reward)
    if isinstance(function, nn.Module):
        return f"{type(function).__name__} (weights {hash_of(function.state_dict().items())[:12]})"
    arguments = ""
    while isinstance(function, functools.partial):
        arguments += f", {function.args} {sorted(function.keywords.items())}"
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):  # built in, or typed at a prompt
        source = ""
    digest = hashlib.sha256((source + arguments).encode("utf-8", "replace")).hexdigest()[:12]
    return f"{named.__module__}:{named.__qualname__} (source {digest})"


def check_scores(scores: Any, rollout: Rollout) -> Float[Tensor, "*shape"]:
    """One finite number for each response ``(b,)`` or for each of its tokens ``(b, n)``, in float32.

    Raises:
        TypeError: it is not a tensor of numbers.
        ValueError: it has another shape, or a score is NaN or infinite (all terms of a response were None).
    """
    scores = _as_scores(scores, rollout, "reward")
    wrong = (~torch.isfinite(scores)).nonzero()
    if len(wrong):
        raise ValueError(
            f"rewards must be finite, got {scores[tuple(wrong[0])].item()} for response {int(wrong[0, 0])}"
        )
    return scores


def _as_scores(values: Any, rollout: Rollout, source: Any) -> Tensor:
    """Rewards ``(b,)`` or ``(b, n)`` of what a function returned, NaN for None."""
    name = source if isinstance(source, str) else _name(source)
    if not isinstance(values, Tensor) and isinstance(values, Sequence) and not isinstance(values, str):
        if any(isinstance(value, Sequence | Tensor) and not isinstance(value, str) for value in values):
            return _token_scores(values, rollout, name)
        _check_not_nan(values, name)
        values = [math.nan if value is None else value for value in values]
    try:
        scores = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must return one number for each response, got {type(values).__name__}") from error
    if scores.is_complex():
        raise TypeError(f"{name} must return real numbers, got dtype {scores.dtype}")
    if scores.shape not in (rollout.ids.shape[:1], rollout.ids.shape):
        shapes = f"({len(rollout)},) or {tuple(rollout.ids.shape)}"
        raise ValueError(f"{name} must return shape {shapes}, by response or by token, got {tuple(scores.shape)}")
    return scores.float()


def _token_scores(values: Sequence[Any], rollout: Rollout, name: str) -> Float[Tensor, "b n"]:
    """Lists of one number for each token of a response, or None, as a tensor over rows."""
    if len(values) != len(rollout):
        raise ValueError(f"{name} must return one list for each of {len(rollout)} responses, got {len(values)}")
    scores = torch.zeros(rollout.ids.shape)
    bounds = zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    for row, (credits, (first, last)) in enumerate(zip(values, bounds, strict=True)):
        if credits is None:
            scores[row] = math.nan
            continue
        try:
            numbers = torch.as_tensor(credits, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must return numbers for the tokens of response {row}, got {credits!r}"[:200]
            ) from error
        if numbers.shape != (last - first,):
            raise ValueError(
                f"{name} must return {last - first} numbers for the tokens of response {row}, got shape "
                f"{tuple(numbers.shape)}"
            )
        scores[row, first:last] = numbers
    return scores


def _check_not_nan(values: Sequence[Any], name: str) -> None:
    for row, value in enumerate(values):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name} returned nan for response {row}; return None to leave it out")


def _at_last_tokens(scores: Float[Tensor, " b"], rollout: Rollout) -> Float[Tensor, "b n"]:
    """Rewards of responses at their last tokens; a response that is left out is NaN at every token."""
    whole = scores.new_zeros(rollout.ids.shape).scatter(
        1, (rollout.lengths.to(scores.device) - 1)[:, None], scores[:, None]
    )
    return whole.masked_fill(scores.isnan()[:, None], torch.nan)


def _texts(rollout: Rollout) -> tuple[list[str], list[str]]:
    prompts = rollout.prompt_texts
    if rollout.texts is None or prompts is None or any(text is None for text in prompts):
        raise ValueError("a reward on texts needs a tokenizer, got tokenizer=None")
    return [str(text) for text in prompts], rollout.texts


def _is_text_function(parameters: dict[str, inspect.Parameter], rollout: Rollout) -> bool:
    """True for a function in TRL's form, False for one of padded ids and lengths."""
    if {"completions", "completion_ids", "prompts"} & set(parameters):
        return True
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return False
    known = {name for columns in rollout.columns for name in columns} | {"trainer_state", "log_metric", "log_extra"}
    return all(name in known for name, parameter in parameters.items() if _is_required(parameter))


def _text_arguments(rollout: Rollout, log: RewardLog) -> dict[str, Any]:
    """Arguments of a function in TRL's form."""
    prompts, completions = _texts(rollout)
    messages = rollout.messages or [None] * len(rollout)
    ends = zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    names = sorted({name for columns in rollout.columns for name in columns})
    return {
        **{name: [row.get(name) for row in rollout.columns] for name in names},
        "prompts": [prompt if chat is None else list(chat) for prompt, chat in zip(prompts, messages, strict=True)],
        "completions": [
            text if chat is None else [{"role": "assistant", "content": text}]
            for text, chat in zip(completions, messages, strict=True)
        ],
        "completion_ids": [ids[first:last] for ids, (first, last) in zip(rollout.ids.tolist(), ends, strict=True)],
        "trainer_state": log.trainer_state,
        "log_metric": log.log_metric,
        "log_extra": log.log_extra,
    }


async def _awaited(values: Any) -> Any:
    return await values


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return named and parameter.default is parameter.empty


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _is_weighted(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], int | float)


def _imported(name: str) -> Any:
    """The object that "module:name" names, or the result of "module:name(argument=value, ...)"."""
    module, colon, rest = name.partition(":")
    function, bracket, arguments = rest.partition("(")
    if not colon or not module or not function or (bracket and not arguments.endswith(")")):
        raise ValueError(f'reward must be "module:function" or a folder with a reward model, got {name!r}')
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if not bracket:
        return found() if inspect.isclass(found) else found
    try:
        call = ast.parse(f"f({arguments}", mode="eval").body
        assert isinstance(call, ast.Call)
        positional = [ast.literal_eval(value) for value in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"reward {name!r} must have plain values as arguments: {error}") from error
    return found(*positional, **named)
