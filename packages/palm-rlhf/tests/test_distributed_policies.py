"""Two processes make the updates that one would make, for policies and for reward models."""

import pytest
import torch

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from palm_rlhf import PaLM
from palm_rlhf.rl.trainer import GRPOTrainer
from palm_rlhf.rl.trainer import RLHFTrainer
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.trainer import RewardModelTrainer

def reward(ids, prompt_lengths, lengths):
    position = torch.arange(ids.shape[1])
    response = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return ((ids == 5) & response).sum(1) / response.sum(1)

def palm():
    torch.manual_seed(0)
    return PaLM(dim=16, num_tokens=13, depth=2, dim_head=8, heads=2).double()

generator = torch.Generator().manual_seed(0)
prompts = [torch.randint(13, (n,), generator=generator) for n in (4, 9, 2, 5)]
saved = {}
for kind in (RLHFTrainer, GRPOTrainer):
    more = {"group_size": 4} if kind is GRPOTrainer else {}
    trainer = kind(palm=palm(), prompt_token_ids=prompts, reward=reward, actor_lr=1e-2, epochs=2,
                   minibatch_size=5, device="cpu", **more)
    trainer.actor_critic.double()
    result = trainer.train(num_episodes=48, update_timesteps=16, max_batch_size=8, max_new_tokens=6, eos_token=3)
    saved[kind.__name__] = torch.cat([p.detach().flatten() for p in trainer.actor_parameters])
    saved[kind.__name__ + " reward"] = torch.tensor([row["reward"] for row in result.metrics])
    saved[kind.__name__ + " ratio"] = torch.tensor([row["ratio_max"] for row in result.metrics])
pairs = [{"prompt": [k % 13], "chosen": [2, 4, k % 6], "rejected": [1, 3]} for k in range(20)]
model = RewardModel(palm(), dropout=0.0).double()
RewardModelTrainer(reward_model=model, pairs=pairs, max_steps=5, batch_size=5, device="cpu").train()
saved["reward model"] = torch.cat([p.detach().flatten() for p in model.trainable_parameters()])
world = dist.get_world_size() if dist.is_initialized() else 1
assert world == int(sys.argv[2]), world
if world == 1 or dist.get_rank() == 0:
    torch.save(saved, sys.argv[1])
"""


@pytest.mark.distributed
def test_two_processes_make_the_updates_of_one(tmp_path, run_worker):
    for count in (1, 2):
        done = run_worker(SCRIPT, tmp_path / f"{count}.pt", count, processes=count)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
