"""Statements of trl 1.12.0's PPO trainer, executed and compared with ours; skipped if that release is not installed.

They are part of ``PPOTrainer.train``, between its forwards and its optimizer, so they cannot be imported: they are
located by the names they assign and executed unchanged on our tensors. trl itself is not imported, so its
requirements need not be installed. ``test_trl_formulas.py`` has the same formulas written out.
"""

import ast
import importlib.metadata
import types

import pytest
import torch

from palm_rlhf.rl.advantages import generalized_advantages, whiten
from palm_rlhf.rl.kl import kl_estimate
from palm_rlhf.rl.losses import clipped_surrogate, clipped_value_loss, token_weights

RELEASE = "1.12.0"
SETTINGS = {"kl_coef": 0.05, "gamma": 0.98, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
LAST = [5, 5, 5, 5]


def trainer_source():
    try:
        found = importlib.metadata.distribution("trl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"trl {RELEASE} is not installed: pip install --no-deps trl=={RELEASE}")
    if found.version != RELEASE:
        pytest.skip(f"trl {RELEASE} is what the formulas are compared with, got {found.version}")
    return ast.parse(found.locate_file("trl/experimental/ppo/ppo_trainer.py").read_text())


@pytest.fixture(scope="module")
def theirs():
    """Functions of the module; the statements of ``train`` from padding masks to advantages, and those of the loss."""
    module = trainer_source()
    names = ("masked_mean", "masked_var", "masked_whiten")
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name in names]
    trainer = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "PPOTrainer")
    train = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    return types.SimpleNamespace(
        functions=functions,
        advantages=statements(train, "response_idxs", "advantages"),
        loss=statements(train, "vpredclipped", "loss"),
    )


def assigned(node):
    return [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]


def statements(function, first, last):
    """The run of statements in one block from the first that assigns ``first`` to the last that assigns ``last``."""
    for node in ast.walk(function):
        block = getattr(node, "body", None)
        if isinstance(block, list) and any(first in assigned(one) for one in block):
            start = next(i for i, one in enumerate(block) if first in assigned(one))
            end = max(i for i, one in enumerate(block) if last in assigned(one))
            return block[start : end + 1]
    raise AssertionError(f"no block of trl's train assigns {first}")


def execute(theirs, nodes, *, whiten_rewards=False, kl_estimator="k1", **names):
    """The names after running the statements, on ours."""
    settings = types.SimpleNamespace(**SETTINGS, whiten_rewards=whiten_rewards, kl_estimator=kl_estimator)
    scope = {"torch": torch, "INVALID_LOGPROB": 1.0, "empty_cache": lambda: None, "args": settings, **names}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # trl's Bessel correction is a quotient of integers
    try:
        exec(compile(ast.Module([*theirs.functions, *nodes], []), "trl", "exec"), scope)
    finally:
        torch.set_default_dtype(default)
    return scope


def draw(last=LAST):
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs, values = -torch.rand(3, 4, 6, dtype=torch.float64, generator=generator)
    return {
        "responses": torch.zeros(4, 6, dtype=torch.long),
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "values": values,
        "scores": torch.randn(4, dtype=torch.float64, generator=generator),
        "sequence_lengths": torch.tensor(last),
    }


def ours(given, *, kl_estimator="k1", whiten_rewards=False):
    mask = torch.arange(6) <= given["sequence_lengths"][:, None]
    kl = kl_estimate(given["logprobs"], given["ref_logprobs"], kl_estimator)
    rewards = (-SETTINGS["kl_coef"] * kl).where(mask, 0)
    rewards[torch.arange(4), given["sequence_lengths"]] += given["scores"]
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    gamma, lambda_ = SETTINGS["gamma"], SETTINGS["lam"]
    advantages, returns = generalized_advantages(rewards, given["values"], mask, gamma=gamma, lambda_=lambda_)
    return whiten(advantages, mask), returns, mask


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_advantages_and_returns_are_those_of_trls_own_statements(theirs, kl_estimator, whiten_rewards):
    given = draw()
    options = {"kl_estimator": kl_estimator, "whiten_rewards": whiten_rewards}
    wanted = execute(theirs, theirs.advantages, **given, **options)
    advantages, returns, _ = ours(given, **options)
    torch.testing.assert_close(advantages, wanted["advantages"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, wanted["returns"], rtol=1e-12, atol=1e-12)


def loss_of_trl(theirs, wanted, new, values, rows=slice(None)):
    scope = {f"mb_{short}": wanted[long][rows] for short, long in MINIBATCH.items()}
    masks = {name: wanted[name][rows] for name in ("padding_mask", "padding_mask_p1")}
    return execute(theirs, theirs.loss, **scope, **masks, micro_batch_inds=slice(None), vpred=values[rows],
                   new_logprobs=new[rows])  # fmt: skip


MINIBATCH = {"advantage": "advantages", "logprobs": "logprobs", "return": "returns", "values": "values"}


def loss_of_ours(given, advantages, returns, mask, new, values):
    weights = token_weights(mask)
    policy = clipped_surrogate(new, given["logprobs"], advantages, eps_clip=0.2)
    critic, _ = clipped_value_loss(values, given["values"], returns, value_clip=0.2)
    return (policy.loss * weights).sum(), (critic * weights).sum()


def moved(given):
    generator = torch.Generator().manual_seed(1)
    new, values = (0.3 * torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    return given["logprobs"] + new, given["values"] + values


def test_clipped_losses_are_those_of_trls_own_statements(theirs):
    given = draw()
    new, values = moved(given)
    wanted = loss_of_trl(theirs, execute(theirs, theirs.advantages, **given), new, values)
    policy, critic = loss_of_ours(given, *ours(given), new, values)
    torch.testing.assert_close(policy, wanted["pg_loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(critic, wanted["vf_loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(policy + SETTINGS["vf_coef"] * critic, wanted["loss"], rtol=1e-12, atol=1e-12)


def test_trl_puts_the_score_of_a_shorter_response_after_its_end_and_reads_a_value_there(theirs):
    given = draw([5, 2, 3, 0])
    seen = [execute(theirs, theirs.advantages, **given)]
    assert [int(place) for place in seen[0]["actual_end"]] == [5, 3, 4, 1]
    given["values"] = given["values"].clone()
    given["values"][1, 3] += 1.0  # after the end of the second response
    seen.append(execute(theirs, theirs.advantages, **given))
    assert not torch.allclose(seen[0]["returns"][1, :3], seen[1]["returns"][1, :3])
    assert not seen[0]["padding_mask_p1"][1, 3]  # the critic is trained there


def test_trl_averages_micro_batches_regardless_of_their_numbers_of_tokens(theirs):
    given = draw([5, 2, 3, 0])
    wanted = execute(theirs, theirs.advantages, **given)
    new, values = moved(given)
    whole = loss_of_trl(theirs, wanted, new, values)["pg_loss"]
    halves = [loss_of_trl(theirs, wanted, new, values, rows)["pg_loss"] for rows in (slice(0, 2), slice(2, 4))]
    assert abs(whole - sum(halves) / 2) > 1e-3
