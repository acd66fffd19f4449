"""Small models and data with known right answers, also imported by the scripts that tests run in new processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spin_trainer import SPINTrainer
from spin_trainer.data.sft_data import Example, SFTDataset
from spin_trainer.quickstart.small_decoder import SmallDecoder

EOS = 11


def pytest_collection_modifyitems(items):
    """Skips GPU tests on machines without a GPU; with REQUIRE_CUDA=1 they run there, and fail."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and os.environ.get("REQUIRE_CUDA") != "1" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


def decoder(seed=0, **changes):
    """A decoder of 12 tokens whose logits are of order one."""
    torch.manual_seed(seed)
    model = SmallDecoder(**{"num_tokens": 12, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, **changes})
    with torch.no_grad():
        model.embedding.weight.mul_(25)
    return model


def sorting_rows(count, seed=0):
    """Sorting tasks of two to four digits, so rows have different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        digits = torch.randint(0, 10, (int(torch.randint(2, 5, (), generator=generator)),), generator=generator)
        rows.append(Example((*digits.tolist(), 10), (*digits.sort().values.tolist(), EOS)))
    return SFTDataset(rows)


def llama(**config):
    """A tiny Llama."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **config))


@pytest.fixture(scope="session")
def make_model():
    return decoder


@pytest.fixture(scope="session")
def llama_model():
    """``llama_model(**config)``: a tiny Llama of 12 tokens that has no end token of its own."""
    pytest.importorskip("transformers")
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    return lambda **config: llama(**{"vocab_size": 12, "initializer_range": 0.5, **ends, **config})


@pytest.fixture(scope="session")
def make_rows():
    return sorting_rows


@pytest.fixture(scope="session")
def rows_of():
    """``rows_of(run, kind)``: the rows on disk of all processes, in the order in which they were written."""

    def read(run, kind):
        files = sorted(run.glob(f"generations/{kind}-*/rows-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def run_python():
    """``run_python(*arguments)``: output of python, or of torchrun; scripts can import modules of this folder."""

    def run(*arguments, processes=1, timeout=300, **environment):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, *launcher, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    return run


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train(folder, **changes)`` runs a small training; returns its trainer and result."""

    def run(folder="run", *, model=None, rows=12, curves=False, **changes):
        if not curves:  # drawing takes longer than the training
            monkeypatch.setattr("lm_core.training.session.draw_curves", lambda *_: None)
        settings = {
            "train_sft_dataset": sorting_rows(rows),
            "valid_sft_dataset": sorting_rows(5, seed=1),
            "max_seq_len": 10,
            "eos_id": EOS,
            "batch_size": 3,
            "gradient_accumulation": 1,
            "epochs": 1,
            "learning_rate": 1e-2,
            "end_learning_rate": 1e-3,
            "device": "cpu",
            "checkpoint_folder": tmp_path / folder,
            **changes,
        }
        trainer = SPINTrainer(decoder() if model is None else model, **settings)
        return trainer, trainer()

    return run


@pytest.fixture(scope="session")
def stop_at():
    """``stop_at(step)``: a tracker that raises at an update, like a crash that leaves files open."""

    class StopAt:
        def __init__(self, step):
            self.step = step

        def log(self, values, step):
            if step == self.step and "loss" in values:
                raise SystemExit("stopped here")

    return StopAt


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A transformers tokenizer with a chat template, trained here: byte-level BPE with special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.ByteLevelBPETokenizer()
    special = ["<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]
    texts = ["sort 3 1 2", "1 2 3"] * 4
    backend.train_from_iterator(texts, vocab_size=300, special_tokens=special, show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend.to_str()),
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=(
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        ),
    )


@pytest.fixture
def hugging_face_folder(chat_tokenizer, tmp_path):
    """Folder of a tiny Llama saved by transformers with its tokenizer, next to files of chats."""
    folder = tmp_path / "llama"
    ends = {"eos_token_id": chat_tokenizer.eos_token_id, "pad_token_id": chat_tokenizer.pad_token_id}
    sizes = {"vocab_size": len(chat_tokenizer), "num_key_value_heads": 1, "max_position_embeddings": 64}
    llama(**sizes, **ends).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    for name, count in (("train", 6), ("valid", 3)):
        with (tmp_path / f"{name}.jsonl").open("w") as stream:
            for digits in (f"{number % 5 + 2} {number % 3}" for number in range(count)):
                answer = " ".join(sorted(digits.split()))
                messages = [{"role": "user", "content": f"sort {digits}"}, {"role": "assistant", "content": answer}]
                stream.write(json.dumps({"messages": messages}) + "\n")
    return folder
