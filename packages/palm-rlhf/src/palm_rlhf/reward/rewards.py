"""Rewards: one interface for everything that scores responses.

| reward | called with |
|---|---|
| ``RewardModel`` | the tokens |
| Hugging Face sequence classifier, with its own tokenizer | prompt and response as text |
| callable ``(sequences, prompt_lengths) -> rewards`` | padded ids ``(b, n)`` and lengths |
| callable with a parameter ``completions`` | TRL's ``f(prompts=, completions=, **columns) -> list[float | None]`` |
| list of these, or of ``(weight, reward)`` | each in turn; the weighted sum |
| ``"module:function"`` | as the function that it names |

Where a text callable returns None, its term is left out for that response.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_core.causal_lm import eval_mode
from palm_rlhf.data.rollouts import Rollout
from palm_rlhf.reward.model import RewardModel

Reward = Callable[[Rollout], Tensor]


@dataclass(frozen=True)
class ModelReward:
    """A ``RewardModel`` with the vocabulary of the policy, applied in batches."""

    model: RewardModel
    batch_size: int = 64

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores of whole sequences."""
        parts = (t.split(self.batch_size) for t in (rollout.ids, rollout.prompt_lengths, rollout.lengths))
        with eval_mode(self.model):
            scores = [
                self.model(ids, prompt_lengths=prompts, lengths=lengths)
                for ids, prompts, lengths in zip(*parts, strict=True)
            ]
        return torch.cat(scores)


@dataclass(frozen=True)
class ClassifierReward:
    """A Hugging Face sequence classifier with one label, and the tokenizer it was trained with.

    Args:
        model: a ``...ForSequenceClassification`` with ``num_labels=1``.
        tokenizer: called as ``tokenizer(texts, padding=True, return_tensors="pt")``.
        batch_size: responses per forward pass.
    """

    model: Any
    tokenizer: Any
    batch_size: int = 16

    def __post_init__(self) -> None:
        labels = getattr(getattr(self.model, "config", None), "num_labels", None)
        if labels != 1:
            raise ValueError(f"reward must be a classifier with num_labels=1, got num_labels={labels}")
        if getattr(self.tokenizer, "pad_token_id", 0) is None:
            raise ValueError("the reward's tokenizer must have a pad token, got pad_token=None")

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores of prompt and response as one text."""
        prompts, completions = _texts(rollout)
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        device = next(self.model.parameters()).device
        scores = []
        with eval_mode(self.model):
            for first in range(0, len(whole), self.batch_size):
                texts = whole[first : first + self.batch_size]
                batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
                scores.append(self.model(**batch.to(device)).logits[:, 0].float())
        return torch.cat(scores)


@dataclass(frozen=True)
class FunctionReward:
    """A function of texts if it has a parameter ``completions``, else of padded ids; see the module's table."""

    function: Callable[..., Any]

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards of the function, NaN where it returns None."""
        parameters = _parameters(self.function)
        if "completions" not in parameters:
            more = {"lengths": rollout.lengths} if "lengths" in parameters else {}
            values = self.function(rollout.ids, rollout.prompt_lengths, **more)
            return _as_scores(values, len(rollout), self.function)
        prompts, completions = _texts(rollout)
        names = sorted({name for columns in rollout.columns for name in columns})
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            names = [name for name in names if name in parameters]
        columns = {name: [row.get(name) for row in rollout.columns] for name in names}
        values = self.function(prompts=prompts, completions=completions, **columns)
        if not isinstance(values, Tensor):
            values = [float("nan") if value is None else value for value in values]
        return _as_scores(values, len(rollout), self.function)


@dataclass(frozen=True)
class WeightedRewards:
    """The weighted sum of several rewards, without the terms that are None for a response."""

    terms: tuple[tuple[float, Reward], ...]

    def __call__(self, rollout: Rollout) -> Tensor:
        """NaN only where every term is None."""
        columns = [weight * reward(rollout).to(torch.float32) for weight, reward in self.terms]
        table = torch.stack([column.to(columns[0].device) for column in columns])
        return table.nansum(dim=0).masked_fill(table.isnan().all(dim=0), torch.nan)


def as_reward(reward: Any) -> Reward:
    """A reward from any of the forms of the module's table.

    Raises:
        TypeError: it is none of these.
        ValueError: an empty list, or a name that is not "module:function".
    """
    if isinstance(reward, ModelReward | ClassifierReward | FunctionReward | WeightedRewards):
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


def check_scores(scores: Any, count: int) -> Float[Tensor, " b"]:
    """One finite number for each response, in float32.

    Raises:
        TypeError: it is not a tensor of numbers.
        ValueError: it has another shape, or a score is NaN or infinite (all terms of a response were None).
    """
    scores = _as_scores(scores, count, "reward")
    wrong = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"rewards must be finite, got {scores[wrong[0]].item()} for response {wrong[0]}")
    return scores


def _as_scores(values: Any, count: int, source: Any) -> Tensor:
    name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    try:
        scores = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must return one number for each response, got {type(values).__name__}") from error
    if scores.is_complex():
        raise TypeError(f"{name} must return real numbers, got dtype {scores.dtype}")
    if scores.shape != (count,):
        raise ValueError(f"{name} must return shape ({count},), one number a response, got {tuple(scores.shape)}")
    return scores.float()


def _texts(rollout: Rollout) -> tuple[list[str], list[str]]:
    prompts = rollout.prompt_texts
    if rollout.texts is None or prompts is None or any(text is None for text in prompts):
        raise ValueError("a reward on texts needs a tokenizer, got tokenizer=None")
    return [str(text) for text in prompts], rollout.texts


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _is_weighted(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], int | float)


def _imported(name: str) -> Any:
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f'reward must be "module:function" or a folder with a reward model, got {name!r}')
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
