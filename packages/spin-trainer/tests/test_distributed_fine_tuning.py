"""DPO, supervised fine-tuning and self-rewarding on two gloo processes, with DDP and FSDP, end as on one process."""

import os

import pytest
import torch
from torch.torch_version import TorchVersion

from lm_core.checkpoints.tensor_files import load_tensors
from lm_core.checkpoints.weights import read_weights
from spin_trainer.quickstart.small_decoder import SmallDecoder

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]
LONG = pytest.mark.skipif(not os.environ.get("LM_LONG"), reason="a proof of minutes: set LM_LONG=1")
SHARDS = TorchVersion(torch.__version__) >= "2.7"
KINDS = ["ddp", "fsdp"] if SHARDS else ["ddp"]

WORKER = """
import functools, os, signal, sys
from pathlib import Path

import torch
import torch.distributed as dist

import conftest
import lm_core.training.session
from lm_core.checkpoints.tensor_files import save_tensors
from lm_core.tokenizers import ByteTokenizer
from spin_trainer import DPOTrainer, Preference, SelfRewardingTrainer, SFTDataset, SFTTrainer
from spin_trainer.data.opponent_answers import Answer

lm_core.training.session.draw_curves = lambda *_: None
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # inductor would take a minute
LONG = os.environ.get("LM_LONG")
folder, processes, shards = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"

def pairs(count, seed=0):
    rows = conftest.sorting_rows(count, seed)
    return SFTDataset(
        [Preference(e.prompt, e.response, rejected=Answer((*e.response[-2::-1], 11, )[1:], True)) for e in rows]
    )

def low(completions):
    return [sum(c < "@" for c in text) / len(text) if text else None for text in completions]

DATA = {
    DPOTrainer: {"train_dataset": pairs(11), "valid_dataset": pairs(5, 1), "eos_id": 11, "max_seq_len": 10},
    SFTTrainer: {
        "train_dataset": conftest.sorting_rows(11), "valid_dataset": conftest.sorting_rows(5, 1), "eos_id": 11,
        "max_seq_len": 10,
    },
    SelfRewardingTrainer: {
        "train_dataset": ["aa", "bc", "d", "ef", "g"], "valid_dataset": ["x", "yz", "w"], "tokenizer": ByteTokenizer(),
        "reward": low, "max_seq_len": 8, "temperature": 1.0, "top_p": None, "iterations": 2,
        "generation_batch_size": 3, "candidates": 3,
    },
}

def llama():
    ends = {"eos_token_id": 11, "bos_token_id": None, "pad_token_id": None}
    return conftest.llama(vocab_size=12, initializer_range=0.5, **ends).double()

def run(kind, name, model=None, **changes):
    model = model or conftest.decoder(num_tokens=259 if kind is SelfRewardingTrainer else 12).double()
    settings = {
        "batch_size": 4 // processes, "epochs": 1, "learning_rate": 1e-2, "validate_every": 2, "checkpoint_every": 1,
        "device": "cpu", "checkpoint_dir": folder / name,
    }
    trainer = kind(model, **{**settings, **DATA[kind], **changes})
    assert (dist.get_world_size() if dist.is_initialized() else 1) == processes
    return trainer, trainer.train()

class StopAt:
    def log(self, values, step):
        if step == 2 and "loss" in values:
            signal.raise_signal(signal.SIGINT)

outcome = {}
for kind in DATA:
    label = kind.__name__
    trainer, result = run(kind, f"{label}-ddp")
    outcome[label] = [float(v) for v in trainer.session.last_validation.values()]
    if processes == 2 and shards:
        trainer, _ = run(kind, f"{label}-fsdp", fsdp=True, micro_batch_size=1)
        parameter = trainer.policy_model.blocks[0].proj_in.weight
        assert type(parameter).__name__ == "DTensor" and parameter.to_local().numel() < parameter.numel()
        outcome[f"{label}-fsdp"] = [float(v) for v in trainer.session.last_validation.values()]
        if kind is not DPOTrainer and not LONG:
            continue
        # only rank 0 gets the interrupt, and both stop
        result = run(kind, f"{label}-parts", fsdp=True, micro_batch_size=1, trackers=[StopAt()])[1]
        assert (result.outcome, result.step) == ("interrupted", 2), result
        result = run(kind, f"{label}-parts", fsdp=True, micro_batch_size=1)[1]
        assert result.outcome == "finished", result
if LONG:
    # activation checkpointing and torch.compile, together with FSDP where there are two processes
    settings = {"gradient_checkpointing": True, "compile": True, "fsdp": shards} if processes == 2 else {}
    trainer, _ = run(DPOTrainer, "llama", model=llama(), **settings)
    outcome["llama"] = [float(v) for v in trainer.session.last_validation.values()]
if not dist.is_initialized() or dist.get_rank() == 0:
    save_tensors(folder / "outcome.safetensors", outcome)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, run_python):
    """Folder and outcome of the runs, by number of processes."""
    results = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        (folder / "worker.py").write_text(WORKER)
        run_python(folder / "worker.py", folder, processes, SHARDS, processes=processes)
        results[processes] = folder, load_tensors(folder / "outcome.safetensors")
    return results


def policy_of(folder):
    return next(path for path in (folder / "policy", folder / "iterations" / "iteration-2") if path.is_dir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", ["DPOTrainer", "SFTTrainer", "SelfRewardingTrainer"])
def test_two_processes_train_and_validate_as_one(outcomes, trainer, kind):
    one = SmallDecoder.from_pretrained(policy_of(outcomes[1][0] / f"{trainer}-ddp")).state_dict()
    two = SmallDecoder.from_pretrained(policy_of(outcomes[2][0] / f"{trainer}-{kind}")).state_dict()

    assert max(float((one[name] - weight).abs().max()) for name, weight in two.items()) < 1e-9
    measured = outcomes[2][1][trainer if kind == "ddp" else f"{trainer}-fsdp"]
    assert measured == pytest.approx(outcomes[1][1][trainer], abs=1e-6 if trainer == "SelfRewardingTrainer" else 1e-9)


@pytest.mark.skipif(not SHARDS, reason="FSDP on a CPU needs torch 2.7 or newer")
@pytest.mark.parametrize(
    "trainer",
    ["DPOTrainer", pytest.param("SFTTrainer", marks=LONG), pytest.param("SelfRewardingTrainer", marks=LONG)],
)
def test_a_sharded_run_stopped_and_resumed_ends_as_the_uninterrupted_bit_for_bit(outcomes, trainer):
    whole, parts = (
        read_weights(policy_of(outcomes[2][0] / f"{trainer}-{name}") / "model.safetensors")
        for name in ("fsdp", "parts")
    )
    assert all(torch.equal(whole[name], weight) for name, weight in parts.items())


@LONG
def test_checkpointing_and_compile_of_a_sharded_model_change_nothing(outcomes):
    one, two = (outcomes[count][1]["llama"] for count in (1, 2))
    assert two == pytest.approx(one, abs=1e-9)
