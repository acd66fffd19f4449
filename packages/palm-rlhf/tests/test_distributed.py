"""Two gloo processes make the updates of one: of PaLM with DDP and FSDP, of policies and of reward models.

Processes are started by torchrun, which ``accelerate launch --cpu`` does not replace: that runs one process in silence.
Every worker asserts the number of processes it is one of.
"""

import pytest
import torch
from torch.torch_version import TorchVersion

from lm_core.checkpoints.tensor_files import load_tensors
from palm_rlhf import PaLM
from palm_rlhf.cli import main

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]

needs_sharding = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7", reason="FSDP on a CPU needs torch 2.7 or newer"
)

WORKER = """
import signal, sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.torch_version import TorchVersion

from lm_core.checkpoints.tensor_files import save_tensors
from lm_core.data.corpora import split_documents
from lm_core.data.documents import tokenise
from palm_rlhf import PaLM
from palm_rlhf.pretrain.trainer import PretrainTrainer
from palm_rlhf.pretrain.config import TrainingSettings
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.trainer import RewardModelTrainer
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
SHARDS = TorchVersion(torch.__version__) >= "2.7"
generator = torch.Generator().manual_seed(0)
texts = [bytes([97 + n % 26]) * int(torch.randint(2, 60, (), generator=generator)) for n in range(50)]
corpus = split_documents(tokenise(texts), 0.2)
settings = TrainingSettings(
    max_steps=5, sequence_length=20, batch_size=4 // processes, gradient_accumulation=2, learning_rate=1e-2,
    validate_every=5, validation_tokens=100, checkpoint_every=5, max_grad_norm=0.5, device="cpu",
)
counts = []

def trainer(name, dtype, fsdp=False, trackers=(), **changes):
    torch.manual_seed(0)
    palm = PaLM(dim=16, depth=2, dim_head=8, heads=2, num_tokens=259).to(dtype)
    return PretrainTrainer(
        model=palm, corpus=corpus, checkpoint_dir=folder / name,
        settings=replace(settings, fsdp=fsdp, **changes), trackers=trackers,
    )

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

# One update in float32, to see its gradient before clipping and before Adam hides its scale.
gradients = {}
one = trainer("gradient", torch.float32, max_steps=1, max_grad_norm=None)
def keep(optimizer, args, kwargs):
    gradients.update({name: p.grad.clone() for name, p in one.model.named_parameters()})
handle = register_optimizer_step_pre_hook(keep)
counts.append(next(trainer("gradient", torch.float32).batches).num_labels)
one.train()
handle.remove()
assert world() == processes, f"{world()} processes, expected {processes}"

plain = trainer("plain", torch.float64)
plain.train()
outcome = {"gradients": gradients, "plain": plain.model.state_dict()}
gathered = [None] * processes
if processes > 1:
    dist.all_gather_object(gathered, counts)
    outcome["counts"] = [count for entry in gathered for count in entry]
    if SHARDS:
        sharded = trainer("sharded", torch.float64, fsdp=True)
        sharded.train()
        parameter = sharded.model.layers[0].proj_in.weight
        assert type(parameter).__name__ == "DTensor" and parameter.to_local().numel() < parameter.numel()

    class StopAt:
        def log(self, values, step):
            if step == 2 and "loss" in values:
                signal.raise_signal(signal.SIGINT)
    # only rank 0 hears of it, and both stop
    for fsdp in (False, True) if SHARDS else (False,):
        name = f"parts-{fsdp}"
        result = trainer(name, torch.float64, fsdp, trackers=[StopAt()]).train()
        assert (result.outcome, result.step) == ("interrupted", 2), result
        result = trainer(name, torch.float64, fsdp).train()
        assert (result.outcome, result.first_step, result.step) == ("finished", 2, 5), result

# Policies and a reward model.
def reward(ids, prompt_lengths, lengths):
    position = torch.arange(ids.shape[1])
    response = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return ((ids == 5) & response).sum(1) / response.sum(1)

def palm():
    torch.manual_seed(0)
    return PaLM(dim=16, num_tokens=13, depth=2, dim_head=8, heads=2).double()

generator = torch.Generator().manual_seed(0)
prompts = [torch.randint(13, (n,), generator=generator) for n in (4, 9, 2, 5)]
saved = outcome["policies"] = {}
for kind in (RLHFTrainer, GRPOTrainer):
    more = {"group_size": 4} if kind is GRPOTrainer else {}
    learner = kind(palm=palm(), prompt_token_ids=prompts, reward=reward, actor_lr=1e-2, epochs=2,
                   minibatch_size=5, device="cpu", **more)
    learner.actor_critic.double()
    result = learner.train(num_episodes=48, update_timesteps=16, max_new_tokens=6, eos_token=3)
    saved[kind.__name__] = torch.cat([p.detach().flatten() for p in learner.actor_parameters])
    saved[kind.__name__ + " reward"] = torch.tensor([row["reward"] for row in result.metrics])
    saved[kind.__name__ + " ratio"] = torch.tensor([row["ratio_max"] for row in result.metrics])
pairs = [{"prompt": [k % 13], "chosen": [2, 4, k % 6], "rejected": [1, 3]} for k in range(20)]
model = RewardModel(palm(), dropout=0.0).double()
RewardModelTrainer(reward_model=model, pairs=pairs, max_steps=5, batch_size=5, device="cpu").train()
saved["reward model"] = torch.cat([p.detach().flatten() for p in model.trainable_parameters()])

# The reward trainer has seeded each process by its rank: scopes that the user makes now differ, until training begins.
policy = ActorCritic(model.palm)
drawn = torch.cat([p.detach().flatten() for p in policy.actor_parameters()])
RLHFTrainer(policy, model, prompt_token_ids=prompts, device="cpu").train(8, update_timesteps=8, max_new_tokens=4)
trained = torch.cat([p.detach().flatten() for p in [*policy.actor_parameters(), *policy.critic_parameters()]])
if processes > 1:
    for name, tensor in (("drawn", drawn), ("trained", trained)):
        parts = [torch.empty_like(tensor) for _ in range(processes)]
        dist.all_gather(parts, tensor)
        outcome[name] = [bool(torch.equal(part, parts[0])) for part in parts[1:]]
if not dist.is_initialized() or dist.get_rank() == 0:
    save_tensors(folder / "outcome.safetensors", outcome)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, run_worker):
    """Weights and gradients of one process and of two."""
    folders = {processes: tmp_path_factory.mktemp(f"processes-{processes}") for processes in (1, 2)}
    for processes, folder in folders.items():
        done = run_worker(WORKER, folder, processes, processes=processes)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {processes: (folder, load_tensors(folder / "outcome.safetensors")) for processes, folder in folders.items()}


def greatest_difference(state, reference):
    assert state.keys() == reference.keys()
    return max(float((state[name] - weight).abs().max()) for name, weight in reference.items())


def test_two_processes_train_to_the_weights_of_one(outcomes):
    first, second = outcomes[2][1]["counts"]
    assert first != second  # labels, so a mean of the processes' means would be wrong
    assert greatest_difference(outcomes[2][1]["plain"], outcomes[1][1]["plain"]) < 1e-10


def test_gradients_of_two_processes_in_float32_are_those_of_one(outcomes):
    gradients, reference = outcomes[2][1]["gradients"], outcomes[1][1]["gradients"]
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error}"


@needs_sharding
def test_sharded_training_ends_with_the_weights_of_one_process_and_opens_on_one(outcomes):
    opened = PaLM.from_pretrained(outcomes[2][0] / "sharded" / "checkpoints" / "step-5")
    # older versions of torch (seen in 2.7) take the norm of sharded gradients, for clipping, in float32
    tolerance = 1e-10 if TorchVersion(torch.__version__) >= "2.13" else 1e-8
    assert greatest_difference(opened.state_dict(), outcomes[1][1]["plain"]) < tolerance


@pytest.mark.parametrize(("fsdp", "whole"), [(False, "plain"), pytest.param(True, "sharded", marks=needs_sharding)])
def test_two_processes_stopped_and_resumed_end_as_the_uninterrupted_bit_for_bit(outcomes, fsdp, whole):
    folder = outcomes[2][0]
    uninterrupted = PaLM.from_pretrained(folder / whole / "checkpoints" / "step-5").state_dict()
    resumed = PaLM.from_pretrained(folder / f"parts-{fsdp}" / "checkpoints" / "step-5").state_dict()
    assert all(torch.equal(weight, uninterrupted[name]) for name, weight in resumed.items())


def test_two_processes_make_the_updates_of_one(outcomes):
    """Covers policies and reward models."""
    one, two = (outcomes[processes][1]["policies"] for processes in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_replicas_that_begin_different_are_made_equal(outcomes):
    assert outcomes[2][1]["drawn"] == [False]
    assert outcomes[2][1]["trained"] == [True]


def test_a_run_of_two_processes_is_not_resumed_by_one(outcomes, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "some text"}\n{"text": "more of it"}\n')
    sizes = ["--dim=16", "--depth=2", "--dim_head=8", "--heads=2", "--sequence_length=20", "--max_steps=9"]
    place = ["--checkpoint_dir", str(outcomes[2][0] / "plain"), "--data", str(tmp_path / "text.jsonl")]

    assert main(["train", *place, *sizes]) == 1
    message = "was written by 2 processes and can only be resumed by as many, got 1"
    assert message in capsys.readouterr().err
