"""Responses of other engines: importance weights of stale ones, kept sets, vLLM, and draws that a signal interrupts.

A stale engine here is ``lm_core``'s decoder on a policy that is not sent the new weights. Tests of vLLM run where it is
installed (`nox -s engines`).
"""

import copy
import signal
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from lm_core.engines.vllm import EngineGeneration
from lm_core.generation.generate import generate
from lm_core.generation.sampling import top_k
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.data.rollouts import rollout_of
from palm_rlhf.rl.engines import as_engine, kept_by_engine
from palm_rlhf.rl.experience import Experience
from palm_rlhf.rl.importance import importance_weights
from palm_rlhf.rl.log_probs import unpack_kept
from palm_rlhf.rl.objectives import REINFORCE
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.rollouts import SamplingSettings, draw_rollout
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Decoder:
    """An engine: ``lm_core``'s decoder on a network of its own, stale unless it is told to follow the policy."""

    has_tokenizer = True

    def __init__(self, network, follows=False):
        self.network = network
        self.follows = follows
        self.updates = 0

    def update_weights(self, model, adapters):
        self.updates += 1
        if self.follows:
            self.network.load_state_dict(model.state_dict())

    def generate(self, prompt, *, stop_strings, **settings):
        return generate(self.network, prompt, **settings)


# ------------------------------------------------------------------------------------------------------- the correction


@pytest.mark.parametrize("cap", [2.0, 1e9], ids=["truncated", "whole ratio"])
def test_with_a_stale_engine_the_correction_keeps_the_updates_direction(make_palm, moved, trainer, cap):
    """All one-token responses, each weighted by its probability under the engine: the exact expected gradient."""
    palm, stale = make_palm().double(), make_palm().double()
    policy = ActorCritic(palm, actor_lora=False, with_critic=False)
    moved(policy, 0.15)  # the policy has learned on; the engine has not
    made = trainer(policy, RLHFTrainer, objective=REINFORCE(kl_div_loss_weight=0.0, whiten_advantages=False))
    prompt, tokens = torch.tensor([3, 1, 4]), torch.arange(13)
    rewards = torch.randn(13, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        engine = stale(prompt[None])[0, -1].log_softmax(-1)

    # the reference: gradient of the expected reward under the policy itself
    log_probs = palm(prompt[None])[0, -1].log_softmax(-1)
    on_policy = torch.autograd.grad(-(log_probs.exp() * rewards).sum(), policy.actor_parameters())

    prompts = load_prompts([prompt] * 13)
    rollout = rollout_of(prompts, list(tokens[:, None]), log_probs=list(engine.float()[:, None]))
    rollout = replace(rollout, engine_log_probs=rollout.engine_log_probs.double())
    rollout.engine_log_probs[:, -1] = engine
    mask = rollout.response_mask
    experience = replace(Experience.from_rollout(rollout, rewards), advantages=rewards[:, None] * mask)
    old = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, log_probs.detach())
    importance = importance_weights(old, rollout.engine_log_probs, mask, cap=cap)

    def gradient(batch):
        loss, _ = made.update.loss(batch, engine.exp()[:, None] * mask)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.actor_parameters())])

    expected = torch.cat([g.flatten() for g in on_policy])
    corrected, plain = gradient(replace(experience, importance=importance)), gradient(experience)
    cosine = partial(torch.cosine_similarity, expected, dim=0)
    assert float(importance.max()) == pytest.approx(min(cap, float((log_probs - engine).exp().max())))
    if cap > 1e6:
        torch.testing.assert_close(corrected, expected, rtol=1e-9, atol=1e-12)
    assert cosine(plain) < 0.7
    assert cosine(corrected) > 0.9


def test_an_engine_with_the_policys_weights_trains_it_like_the_policys_own_draws(make_palm, trainer):
    def run(**changes):
        made = trainer(make_palm(), GRPOTrainer, actor_lora=False, actor_lr=1e-3, **changes)
        return made, made.train(num_episodes=32, update_timesteps=16, max_new_tokens=4).metrics

    engine = Decoder(make_palm(), follows=True)
    (own, plain), (other, measured) = run(), run(engine=engine)
    assert engine.updates == 2
    for name, value in own.actor_critic.state_dict().items():
        torch.testing.assert_close(other.actor_critic.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for row, reference in zip(measured, plain, strict=True):
        assert row["reward"] == reference["reward"]
        assert row["engine_mismatch_max"] < 1e-4
        assert row["importance_mean"] == pytest.approx(1, abs=1e-4)


def test_a_policy_learns_from_an_engine_that_gets_every_other_update_and_the_mismatch_is_logged(make_palm, trainer):
    class EveryOther(Decoder):
        def update_weights(self, model, adapters):
            self.follows = self.updates % 2 == 1
            super().update_weights(model, adapters)

    made = trainer(
        make_palm(), GRPOTrainer, engine=EveryOther(make_palm()), actor_lora=False, actor_lr=3e-3, group_size=8,
        kl_div_loss_weight=0.0,
    )  # fmt: skip
    rows = made.train(num_episodes=640, update_timesteps=64, max_new_tokens=4).metrics
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.2
    assert rows[0]["engine_mismatch_max"] < 1e-4 < rows[2]["engine_mismatch_mean"] < rows[2]["engine_mismatch_max"]


# ------------------------------------------------------------------------------------------------------ engines' draws


def test_kept_sets_of_an_engine_are_those_of_the_policys_own_draw(make_palm, prompt_ids):
    policy = ActorCritic(make_palm(), with_critic=False)
    prompts = load_prompts(prompt_ids)
    settings = SamplingSettings(max_new_tokens=6, top_k=4, eos_id=3)
    own = draw_rollout(policy, prompts, settings, generator=torch.Generator().manual_seed(0))
    lengths = own.lengths - own.prompt_lengths
    sets = [
        [allowed.nonzero().flatten().tolist() for allowed in unpack_kept(own.kept[row, start - 1 : start - 1 + n], 13)]
        for row, (start, n) in enumerate(zip(own.prompt_lengths.tolist(), lengths.tolist(), strict=True))
    ]
    blank = torch.zeros(len(own), 6)
    result = EngineGeneration(blank.long(), lengths, blank, own.finished, kept=sets)
    kept = kept_by_engine(result, own, vocab_size=13, min_new_tokens=0, eos_id=3)
    mask = own.response_mask
    assert torch.equal(unpack_kept(kept[mask], 13), unpack_kept(own.kept[mask], 13))


def test_a_minimum_length_of_an_engine_is_part_of_its_kept_sets(make_palm, prompt_ids):
    policy = ActorCritic(make_palm(), with_critic=False)
    settings = SamplingSettings(max_new_tokens=6, min_new_tokens=3, eos_id=[3, 5])
    rollouts = [
        draw_rollout(policy, load_prompts(prompt_ids), settings, generator=torch.Generator().manual_seed(0), engine=e)
        for e in (None, Decoder(policy.actor))
    ]
    own, other = rollouts
    assert torch.equal(own.ids, other.ids)
    mask = own.response_mask
    assert torch.equal(unpack_kept(own.kept[mask], 13), unpack_kept(other.kept[mask], 13))
    scores = policy.score(other.ids, other.mask, mask, kept=other.kept).log_probs
    torch.testing.assert_close(scores, other.engine_log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.plain
def test_what_an_engine_cannot_do_is_refused_by_name(make_palm, make_hugging_face, trainer, monkeypatch):
    with pytest.raises(ValueError, match="engine 'vllm' needs a Hugging Face policy, got a PaLM"):
        trainer(make_palm(), engine="vllm")
    with pytest.raises(ValueError, match='engine must be "lm_core", "vllm" or have generate and update_weights'):
        trainer(make_palm(), engine="sglang")
    with pytest.raises(ValueError, match="engine_arguments are for engine 'vllm', got engine='lm_core'"):
        trainer(make_palm(), engine_arguments={"max_model_len": 8})
    made = trainer(make_palm(), engine=Decoder(make_palm()))
    with pytest.raises(ValueError, match="filters are functions, which only engine 'lm_core' applies"):
        made.train(num_episodes=4, max_new_tokens=2, filters=[partial(top_k, k=3)])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'palm-rlhf\[vllm\]'"):
        as_engine("vllm", ActorCritic(make_hugging_face()))


# ------------------------------------------------------------------------------------------------------- interruptions


def test_a_signal_ends_a_run_within_its_draw_and_the_run_resumes_exactly(make_palm, trainer, tmp_path):
    calls = []

    def interrupting(logits):
        calls.append(len(logits))
        if len(calls) == 10 and not whole:  # in the second phase: there are four tokens a response
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the draw went on after the signal")
        return logits

    def run(name):
        made = trainer(make_palm(), GRPOTrainer, checkpoint_dir=tmp_path / name)
        settings = {"max_batch_size": 8, "max_new_tokens": 4, "filters": [interrupting]}
        return made, made.train(num_episodes=48, update_timesteps=16, **settings)

    whole = True
    expected, _ = run("whole")
    calls.clear()
    whole = False
    _, stopped = run("stopped")
    assert (stopped.outcome, stopped.step, len(calls)) == ("interrupted", 1, 10)
    whole = True
    resumed, result = run("stopped")
    assert (result.outcome, result.first_step, result.step) == ("finished", 1, 3)
    for name, value in expected.actor_critic.state_dict().items():
        assert torch.equal(value, resumed.actor_critic.state_dict()[name]), name


# ---------------------------------------------------------------------------------------------------------------- vLLM


def test_a_hugging_face_policy_learns_from_responses_of_vllm(make_hugging_face, trainer, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: nox -s engines")

    def run(episodes):
        made = trainer(
            copy.deepcopy(wide), GRPOTrainer, engine="vllm", actor_lr=2e-2, group_size=8, kl_div_loss_weight=0.0,
            engine_arguments={"max_model_len": 64, "gpu_memory_utilization": 0.1}, checkpoint_dir=tmp_path / "run",
        )  # fmt: skip
        try:
            return made.train(num_episodes=episodes, update_timesteps=32, max_new_tokens=5, min_new_tokens=2)
        finally:
            made.engine.close()

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    wide = transformers.LlamaForCausalLM(config).eval()
    first, second = run(96).metrics, run(192).metrics  # the second resumes
    assert len(second) == 3
    assert second[-1]["reward"] > first[0]["reward"] + 0.3
    assert all(row["engine_mismatch_max"] < 1e-3 for row in (*first, *second))
