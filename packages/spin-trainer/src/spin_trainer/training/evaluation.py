"""Evaluation on held-out prompts: likelihood of human answers, exact match, win rate over an opponent."""

from dataclasses import dataclass
from typing import Any

import torch

from lm_core.causal_lm import eval_mode
from lm_core.training.accelerator import Precision
from spin_trainer.data.opponent_answers import Sampling, answer_prompts, batches_by_length, opponent_log_probs
from spin_trainer.data.sft_data import SFTDataset
from spin_trainer.model.losses import self_play_margins


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on held-out examples.

    Attributes:
        nll_per_sequence: negative log-likelihood per human answer, in nats.
        nll_per_token: negative log-likelihood per answer token, in nats.
        exact_match: share of greedy answers equal to the human one; None if not requested.
        sequences, tokens: number of answers and of answer tokens.
    """

    nll_per_sequence: float
    nll_per_token: float
    exact_match: float | None
    sequences: int
    tokens: int


@torch.no_grad()
def evaluate(
    model: Any,
    dataset: SFTDataset,
    *,
    max_seq_len: int,
    eos_id: int | tuple[int, ...] | None = None,
    batch_size: int = 32,
    exact_match: bool = True,
    precision: Precision = "fp32",
) -> Evaluation:
    """Scores every example with a ``CausalLM`` in evaluation mode; ``exact_match`` also answers the prompts greedily.

    Answers end with ``eos_id``, or where prompt and answer reach ``max_seq_len`` tokens.
    """
    nats = tokens = matches = 0.0
    sampling = Sampling(max_seq_len=max_seq_len, temperature=0.0, top_p=None, eos_id=eos_id)
    with eval_mode(model):
        for rows in batches_by_length([len(e.prompt) + len(e.response) for e in dataset], batch_size):
            prompts, responses = [dataset[row].prompt for row in rows], [dataset[row].response for row in rows]
            nats -= sum(opponent_log_probs(model, prompts, responses, precision))
            tokens += sum(map(len, responses))
            if exact_match:
                answers = answer_prompts(model, prompts, sampling, 0)
                matches += sum(a.tokens == response for a, response in zip(answers, responses, strict=True))
    count = len(dataset)
    return Evaluation(nats / count, nats / tokens, matches / count if exact_match else None, count, int(tokens))


@torch.no_grad()
def win_rate_over(model: Any, opponent: Any, dataset: SFTDataset, sampling: Sampling, *, seed: int = 0) -> float:
    """Share of held-out rows where ``model`` prefers the human answer to the opponent's more than the opponent does.

    The opponent, also a ``CausalLM``, answers with ``sampling`` and ``seed``; equal preference counts one half.
    """
    wins = 0.0
    with eval_mode(model), eval_mode(opponent):
        for index, rows in enumerate(batches_by_length([len(e.prompt) for e in dataset], sampling.batch_size)):
            prompts, real = [dataset[row].prompt for row in rows], [dataset[row].response for row in rows]
            generated = [answer.tokens for answer in answer_prompts(opponent, prompts, sampling, seed + index)]
            scores = [
                torch.tensor(opponent_log_probs(player, prompts, answers, sampling.precision), dtype=torch.float64)
                for player in (model, opponent)
                for answers in (real, generated)
            ]
            margins = self_play_margins(*scores, lambda_=1)
            wins += float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    return wins / len(dataset)
