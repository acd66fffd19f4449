"""Reward models sharded over two processes train to the weights of one process, resume, and open without FSDP."""

import pytest
import torch
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="FSDP on a CPU needs torch 2.7 or newer"),
]

# five examples an update on two processes: the last pass has a row on one of them only
WORKER = """
import signal, sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from peft import LoraConfig, get_peft_model

from lm_core.distributed import rank
from palm_rlhf import PaLM
from palm_rlhf.reward.classifier import Classifier
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.trainer import RewardModelTrainer

folder, fsdp = Path(sys.argv[1]), sys.argv[2] == "2"

def palm(**changes):
    torch.manual_seed(0)
    return PaLM(dim=16, num_tokens=13, depth=2, dim_head=8, heads=2, **changes).double()

def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", exclude_modules=["score"])
    model = LlamaForSequenceClassification(config)
    return Classifier(get_peft_model(model, lora).double(), pad_id=0)

pairs = [{"prompt": [k % 13], "chosen": [2, 4, k % 6], "rejected": [1, 3]} for k in range(20)]
labelled = [{"prompt": [k % 13], "response": [k % 6, 2], "label": k % 3} for k in range(20)]
made = {
    "lora": lambda: (RewardModel(palm(), dropout=0.0).double(), pairs),
    "whole": lambda: (RewardModel(palm(gradient_checkpointing=True), dropout=0.0, use_lora=False).double(), pairs),
    "bins": lambda: (RewardModel(palm(), dropout=0.0, num_binned_output=3).double(), labelled),
    "classifier": lambda: (classifier(), pairs),
}

class Stop:
    def log(self, values, step):
        if step == 2 and "loss" in values and rank() == 0:
            signal.raise_signal(signal.SIGINT)

def train(name, run, trackers=()):
    model, data = made[name]()
    return RewardModelTrainer(
        reward_model=model, pairs=data, max_steps=4, batch_size=5, micro_batch_size=2, device="cpu", fsdp=fsdp,
        validate_every=2, checkpoint_every=4, checkpoint_dir=folder / run, trackers=trackers,
    ).train()

for name in made:
    train(name, name)
for name in ("lora", "classifier"):
    assert train(name, f"{name}-parts", [Stop()]).step == 2
    assert train(name, f"{name}-parts").first_step == 2
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_worker):
    """``runs(processes, name)``: weights of the last checkpoint of a run."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    folders = {processes: tmp_path_factory.mktemp(f"processes-{processes}") for processes in (1, 2)}
    for processes, folder in folders.items():
        done = run_worker(WORKER, folder, processes, processes=processes)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    def weights(processes, name):
        checkpoint = folders[processes] / name / "checkpoints" / "step-4"
        adapter = checkpoint / "adapter_model.safetensors"
        return load_file(adapter if adapter.is_file() else checkpoint / "model.safetensors")

    return weights


@pytest.mark.parametrize("name", ["lora", "whole", "bins", "classifier"])
def test_two_sharded_processes_train_to_the_weights_of_one(runs, name):
    sharded, reference = runs(2, name), runs(1, name)
    assert sharded.keys() == reference.keys()
    for key, weight in reference.items():
        torch.testing.assert_close(sharded[key], weight, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["lora", "classifier"])
def test_a_sharded_run_that_is_stopped_resumes_bit_for_bit(runs, name):
    parts, reference = runs(2, f"{name}-parts"), runs(2, name)
    assert all(torch.equal(parts[key], weight) for key, weight in reference.items())
