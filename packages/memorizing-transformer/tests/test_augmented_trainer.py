"""Training a memory for a transformers model: what changes, resume, processes, and the commands."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.data.corpora import load_corpus
from lm_core.rng import seed_everything
from memorizing_transformer import MemoryAugmentedLM
from memorizing_transformer.cli import main
from memorizing_transformer.training.config import TrainingSettings
from memorizing_transformer.training.trainer import MemoryTrainer

transformers = pytest.importorskip("transformers")

EOS = 257
TEXTS = ["-".join([chr(97 + n % 4) * (7 + 13 * n % 31) + str(n)] * 3) for n in range(24)]
SIZES = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 1, "bos_token_id": 256, "eos_token_id": 257}


def base():
    seed_everything(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, pad_token_id=258))


def model(**settings):
    defaults = {"layers": 2, "segment_length": 8, "window": 6, "num_retrieved": 4, "max_memories": 20}
    return MemoryAugmentedLM(base(), clear_memories_on_eos_token_id=EOS, **{**defaults, **settings})


def settings(**changes):
    defaults = {"max_steps": 6, "segment_length": 8, "batch_size": 2, "validate_every": 3, "checkpoint_every": 3}
    defaults |= {"validation_documents": 3, "device": "cpu", "learning_rate": 0.05}
    return TrainingSettings(**{**defaults, **changes})


def corpus():
    return load_corpus(TEXTS, validation_fraction=0.2)


def trained(folder, *, lora_r=None, **changes):
    one = model(lora_r=lora_r).double()
    trainer = MemoryTrainer(model=one, corpus=corpus(), checkpoint_dir=folder, settings=settings(**changes))
    return one, trainer.train()


@pytest.mark.parametrize("lora_r", [None, 2])
def test_training_changes_gates_and_adapters_only_and_resumes_bit_for_bit(tmp_path, lora_r):
    whole, result = trained(tmp_path / "whole", lora_r=lora_r)
    new = model(lora_r=lora_r).double().state_dict()
    changed = {name for name, value in whole.state_dict().items() if not torch.equal(value, new[name])}
    assert {name for name in changed if "lora_" not in name} == {"readers.0.gate", "readers.0.log_scale"}
    assert bool(changed - {"readers.0.gate", "readers.0.log_scale"}) == (lora_r is not None)
    assert result.last.bits_per_byte != result.without_memory.bits_per_byte

    assert trained(tmp_path / "parts", lora_r=lora_r, max_seconds=1e-6)[1].outcome == "out of time"
    resumed, result = trained(tmp_path / "parts", lora_r=lora_r)
    assert result.step == 6
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), atol=0, rtol=0)
    stored = MemoryAugmentedLM.from_pretrained(tmp_path / "parts" / "checkpoints" / "step-6")
    torch.testing.assert_close(stored.state_dict(), whole.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["compile", "fsdp"])
def test_what_hooks_do_not_allow_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be False"):
        trained(tmp_path / "run", **{name: True})


def test_a_run_of_another_memory_is_not_resumed(tmp_path):
    trained(tmp_path / "run", max_steps=3)
    run = {"corpus": corpus(), "checkpoint_dir": tmp_path / "run", "settings": settings()}
    with pytest.raises(CheckpointError, match="max_memories is 21, but was 20"):
        MemoryTrainer(model=model(max_memories=21).double(), **run).train()


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_augmented_trainer as t
from torch.distributed import get_world_size
t.trained(sys.argv[2], gradient_accumulation=2)
assert get_world_size() == 2
"""


@pytest.mark.distributed
def test_two_processes_train_like_one_with_all_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", f"--master_port={port}"]
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, *launch, str(tmp_path / "ranks.py"), here, str(tmp_path / "two")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, _ = trained(tmp_path / "one", batch_size=4, gradient_accumulation=2)
    both = MemoryAugmentedLM.from_pretrained(tmp_path / "two" / "checkpoints" / "step-6")
    torch.testing.assert_close(both.state_dict(), alone.state_dict(), atol=1e-9, rtol=0)


def test_the_commands_take_a_folder_of_transformers(tmp_path, capsys):
    base().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("the same words again and again " * 8)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text * 2)
    train = ["train", "--model", str(tmp_path / "base"), "--data", str(tmp_path / "texts"), "--tokenizer", "bytes"]
    sizes = ["--segment_length", "16", "--xl_max_memories", "8", "--memorizing_layers", "2", "--batch_size", "2"]
    steps = ["--max_steps", "2", "--validate_every", "2", "--sample_tokens", "4", "--device", "cpu"]
    folder = tmp_path / "run"
    assert main([*train, *sizes, *steps, "--lora_r", "2", "--checkpoint_dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "memory in layer(s) [2]" in out
    assert "LoRA adapters" in out
    assert (folder / "retrieved.html").is_file()
    more = ["train", "--model", str(folder), "--data", str(tmp_path / "texts"), "--max_knn_memories", "64"]
    assert main([*more, *steps, "--batch_size", "2", "--checkpoint_dir", str(tmp_path / "more")]) == 0
    assert "64 tokens a row; window of 8" in capsys.readouterr().out
    text = str(tmp_path / "text.txt")
    assert main(["eval", str(folder), "--data", text, "--device", "cpu"]) == 0
    assert "bits/byte without memory" in capsys.readouterr().out
    assert main(["generate", str(folder), f"@{text}", "--max_new_tokens", "4", "--device", "cpu"]) == 0
    page = str(tmp_path / "page.html")
    inspect = ["inspect", str(folder), "--prompt", f"@{text}", "--page", page, "--max_new_tokens", "4"]
    assert main([*inspect, "--device", "cpu"]) == 0
    assert "weight of the memory in each head" in capsys.readouterr().out
    assert main(["train", "--data", str(tmp_path / "texts"), "--lora_r", "2"]) == 1
    assert "lora_r is for a transformers model" in capsys.readouterr().err
