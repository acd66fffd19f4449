"""Table of bad input: each case is refused by name, before anything is written or changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from spin_trainer import SPIN, SelfPlaySettings, SPINTrainer, as_sft_dataset, load_original_checkpoint, set_dropout_
from spin_trainer.cli import main
from spin_trainer.data.opponent_answers import Sampling, answer_prompts
from spin_trainer.data.row_store import RowStore
from spin_trainer.interop import load_model, with_lora
from spin_trainer.training.checks import run_folder

pytestmark = pytest.mark.plain
BYTES = ByteTokenizer()
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class NoEnd:
    """A tokenizer without EOS."""

    vocab_size, eos_id, pad_id = 256, None, None

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


class BadTemplate(ByteTokenizer):
    """Its template writes a conversation that does not begin with its own prompt."""

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return self.encode(str(len(messages))) + self.encode("x") * add_generation_prompt + [self.eos_id]


class EndlessTemplate(ByteTokenizer):
    """Its template never ends an answer."""

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return self.encode("".join(message["content"] for message in messages))


DATA = {
    "prompt longer than the sequence": (
        [([1] * 9, 8)],
        {},
        ValueError,
        r"leave room for an answer below max_seq_len 8",
    ),
    "no response tokens": ([([1, 2], 2)], {}, ValueError, r"answer tokens behind its prompt_len 2, got 2 tokens"),
    "only padding behind the prompt": ([([1, 2, -1, -1], 2)], {}, ValueError, r"got 2 tokens"),
    "prompt_len 0": ([([1, 2], 0)], {}, ValueError, r"prompt_len of at least 1, got 0"),
    "negative ids": ([([1, -7, 2], 1)], {}, ValueError, r"ids of at least 0 \(pad_id is -1\), got -7"),
    "ids in two dimensions": ([(torch.ones(2, 2).long(), 1)], {}, ValueError, r"1-D integer ids"),
    "ids that are floats": ([(torch.ones(3), 1)], {}, ValueError, r"got torch.float32"),
    "ids that are nothing": ([(None, 1)], {}, TypeError, r"must be \(token ids, prompt_len\)"),
    "rows of three": ([(1, 2, 3)], {}, TypeError, r"must be \(sequence, prompt_len\)"),
    "rows that are numbers": ([3], {}, TypeError, r"got int '3'"),
    "no rows": ([], {}, ValueError, r"at least one row, got none"),
    "a number as dataset": (3, {}, TypeError, r"path, a dataset or an iterable of rows, got int"),
    "a file that is not there": ("nowhere.jsonl", {}, FileNotFoundError, r"nowhere.jsonl"),
    "missing EOS": ([([1, 2, 3], 1)], {"eos_id": 11}, ValueError, r"answers that end with eos_id 11, none does"),
    "text without a tokenizer": ([("a", "b")], {}, ValueError, r"a tokenizer is needed, got tokenizer=None"),
    "text and no EOS": ([("a", "b")], {"tokenizer": NoEnd()}, ValueError, r"the tokenizer has no eos_id, pass eos_id"),
    "an empty answer": ([("a", "")], {"tokenizer": BYTES}, ValueError, r"an answer of at least one token"),
    "an empty prompt": ([("", "a")], {"tokenizer": BYTES}, ValueError, r"a prompt of at least one token"),
    "an answer that is a number": (
        [("a", 3)],
        {"tokenizer": BYTES},
        TypeError,
        r"texts as prompt and answer, got str, int",
    ),
    "wrong columns": (
        [{"question": "a"}],
        {"tokenizer": BYTES},
        ValueError,
        r"columns 'messages', or 'prompt'.*question",
    ),
    "prompt without response": ([{"prompt": "a"}], {"tokenizer": BYTES}, ValueError, r"one of \['response'"),
    "chat without an answer": ([{"messages": CHAT[:1]}], {"tokenizer": BYTES}, ValueError, r"got the roles \['user'\]"),
    "chat that the user ends": (
        [{"messages": [*CHAT, CHAT[0]]}],
        {"tokenizer": BYTES},
        ValueError,
        r"must end with an answer of the assistant",
    ),
    "messages without content": (
        [{"messages": [{"role": "user"}]}],
        {"tokenizer": BYTES},
        ValueError,
        r"'role' and 'con",
    ),
    "no chat template": (
        [{"messages": CHAT}],
        {"tokenizer": NoEnd(), "eos_id": 3},
        ValueError,
        r"no apply_chat_template",
    ),
    "a template that rewrites": ([{"messages": CHAT}], {"tokenizer": BadTemplate()}, ValueError, r"its own prompt"),
    "a template without an end": (
        [{"messages": CHAT}],
        {"tokenizer": EndlessTemplate()},
        ValueError,
        r"end an answer with",
    ),
    "max_seq_len 1": ([([1, 2], 1)], {"max_seq_len": 1}, ValueError, r"max_seq_len must be at least 2, got 1"),
}


@pytest.mark.parametrize("name", DATA)
def test_a_dataset_is_refused_by_row(name):
    source, changes, error, message = DATA[name]

    with pytest.raises(error, match=message):
        as_sft_dataset(source, **{"max_seq_len": 8, **changes})


def test_a_transformers_tokenizer_without_template_is_named(chat_tokenizer):
    import copy

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template; set tokenizer.chat_template"):
        as_sft_dataset([{"messages": CHAT}], max_seq_len=50, tokenizer=HuggingFaceTokenizer(tokenizer))


SETTINGS = [
    ({"max_seq_len": 1}, ValueError, r"max_seq_len must be at least 2"),
    ({"iterations": 0}, ValueError, r"iterations must be at least 1, got 0"),
    ({"learning_rate_num_decay_steps": 0}, ValueError, r"learning_rate_num_decay_steps must be at least 1, got 0"),
    ({"epochs": -1}, ValueError, r"epochs must be at least 1"),
    ({"batch_size": 0}, ValueError, r"batch_size must be at least 1"),
    ({"gradient_accumulation": 0}, ValueError, r"gradient_accumulation"),
    ({"learning_rate": 0.0}, ValueError, r"learning_rate must be a finite number above 0"),
    ({"end_learning_rate": 1.0}, ValueError, r"end_learning_rate must be in \[0, learning_rate"),
    ({"learning_rates": []}, ValueError, r"learning_rates must hold finite numbers"),
    ({"lambdas": [0.1, -1.0]}, ValueError, r"lambdas must hold finite numbers above 0"),
    ({"lambda_": float("nan")}, ValueError, r"lambda_ must be a finite number above 0, got nan"),
    ({"temperature": -1.0}, ValueError, r"temperature must be a finite number of at least 0"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
    ({"ref_model_ema_decay": 1.5}, ValueError, r"ref_model_ema_decay must be in \[0, 1\], got 1.5"),
    ({"loss": "ipo"}, TypeError, r"ipo"),
    ({"opponent": "nobody"}, TypeError, r"nobody"),
    ({"checkpoint_every": 0}, ValueError, r"checkpoint_every"),
    ({"early_stop_patience": 0}, ValueError, r"early_stop_patience"),
    ({"warmup": 1.0}, ValueError, r"warmup must be a part of the updates in \[0, 1\), got 1.0"),
    (
        {"gradient_accumulation": 2, "grad_accum_steps": 4},
        ValueError,
        r"gradient_accumulation and grad_accum_steps are one argument, got \{'gradient_accumulation': 2, 'grad_ac",
    ),
    ({"weight_decay": -1.0}, ValueError, r"weight_decay"),
    ({"seed": -1}, ValueError, r"seed must be in"),
    ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm"),
    ({"iteration": 3}, TypeError, r"iteration"),
    (
        {"fsdp": True, "opponent": "policy"},
        ValueError,
        r"fsdp=True needs precompute_reference=True, opponent='reference'",
    ),
    ({"fsdp": True, "precompute_reference": False}, ValueError, r"got False, 'reference' and 1.0"),
    ({"fsdp": True, "ref_model_ema_decay": 0.9}, ValueError, r"got True, 'reference' and 0.9"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SETTINGS, ids=lambda value: str(value)[:30])
def test_a_setting_is_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        SelfPlaySettings.of({"max_seq_len": 8, **changes})


SPINS = [
    ({"lambda_": 0.0}, ValueError, r"lambda_ must be a finite number above 0, got 0"),
    ({"loss": "ipo"}, ValueError, r"loss must be one of"),
    ({"reduction": "max"}, ValueError, r'reduction must be "sum" or "mean"'),
    ({"ref_model_ema_decay": -0.1}, ValueError, r"ref_model_ema_decay"),
    ({"ema_kwargs": {"update_every": 1}}, ValueError, r"ema_kwargs go with ref_model_ema_decay below 1"),
    ({"beta": 1.0}, TypeError, r"SPIN has no argument beta"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SPINS, ids=lambda value: str(value)[:30])
def test_a_spin_argument_is_refused_by_name(make_model, changes, error, message):
    with pytest.raises(error, match=message):
        SPIN(make_model(), **changes)


def test_a_model_that_is_no_module_or_trains_nothing_is_refused(make_model):
    with pytest.raises(TypeError, match=r"model must be a module, got function"):
        SPIN(lambda ids: ids)
    frozen = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"must have trainable parameters, got a SmallDecoder with none"):
        SPIN(frozen)


IDS = torch.tensor([[1, 2, 3, 4]])
MASK = torch.ones(1, 4, dtype=torch.bool)
BATCHES = [
    ((IDS.float(), IDS, torch.tensor([2])), r"generated_seq must hold token ids"),
    ((IDS, IDS[0], torch.tensor([2])), r"real_seq must hold token ids \(b, n\)"),
    ((IDS, IDS, torch.tensor([2, 2])), r"prompt_len must have shape \(1,\), got \(2,\)"),
    ((IDS, IDS, torch.tensor([0])), r"prompt_len must be at least 1, got 0"),
    ((IDS, IDS, torch.tensor([4])), r"must have answer tokens behind every prompt, rows \[0\] have none"),
    ((IDS + 20, IDS, torch.tensor([2])), r"generated_seq must hold token ids in \[0, 12\), got 24"),
    ((IDS, IDS, torch.tensor([2]), MASK[:, :2]), r"generated_seq_mask must be boolean \(1, 4\)"),
    ((IDS, IDS, torch.tensor([2]), None, MASK.long()), r"real_seq_mask must be boolean"),
]


@pytest.mark.parametrize(("arguments", "message"), BATCHES, ids=range(len(BATCHES)))
def test_a_batch_is_refused_by_name(make_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        SPIN(make_model())(*arguments)


def test_masks_beside_pad_id_are_refused(make_model):
    with pytest.raises(ValueError, match=r"generated_seq_mask must be None where pad_id marks padding"):
        SPIN(make_model(), pad_id=-1)(IDS, IDS, torch.tensor([2]), MASK, MASK)


def test_a_released_reference_is_named(make_model):
    spin = SPIN(make_model())
    spin.ref_model.release()
    with pytest.raises(RuntimeError, match=r"the reference was released; update_reference_model_with_policy"):
        spin(IDS, IDS, torch.tensor([2]))


TRAINERS = [
    ({"max_seq_len": 4}, ValueError, r"room for an answer below max_seq_len 4|fit into max_seq_len"),
    ({"eos_id": 12}, ValueError, r"end with eos_id 12"),
    (
        {"early_stop_patience": 1, "valid_sft_dataset": None},
        ValueError,
        r"early_stop_patience needs a valid_sft_dataset",
    ),
    (
        {"accelerate_kwargs": {"gradient_accumulation_steps": 2}},
        ValueError,
        r"gradient_accumulation_steps is gradient_accumulation here",
    ),
    ({"accelerate_kwargs": {"mixed_precision": "bf16"}}, ValueError, r"mixed_precision is precision= here"),
    ({"spin_kwargs": {"ref_model_ema_decay": 0.5}}, ValueError, r"ref_model_ema_decay is an argument of the trainer"),
    ({"device": "tpu"}, ValueError, r"device must be auto, cpu, cuda"),
    (
        {"train_sft_dataset": [([1, 2, 15, 11], 1)]},
        ValueError,
        r"row 0 of train_sft_dataset must hold token ids in \[0, 12\)",
    ),
    ({"valid_sft_dataset": [([1, 2], 2)]}, ValueError, r"row 0 of valid_sft_dataset must have answer tokens"),
    ({"checkpoint_every": 1.5}, TypeError, r"checkpoint_every"),
    ({"fsdp": True}, ValueError, r"fsdp=True needs several processes, got one"),
    ({"overlong": "cut"}, TypeError, r"overlong"),
    (
        {"config": SelfPlaySettings(max_seq_len=8)},
        ValueError,
        r"settings must be in config where one is given, got \['device",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), TRAINERS, ids=lambda value: str(value)[:40])
def test_a_trainers_argument_is_refused_before_anything_is_written(make_model, tmp_path, changes, error, message):
    rows = [([1, 2, 3, 10, 1, 2, 3, 11], 4)] * 4
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    arguments = {"train_sft_dataset": rows, "max_seq_len": 10, "eos_id": 11, "device": "cpu", **changes}
    with pytest.raises(error, match=message):
        SPINTrainer(model, checkpoint_folder=tmp_path / "run", **arguments)

    assert not (tmp_path / "run").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spin_kwargs": {"λ": 1.0}}, r"spin_kwargs must be None where model is a SPIN already"),
        ({"ref_model_ema_decay": 0.9}, r"ref_model_ema_decay must be that of the SPIN that is given, got 0.9"),
        ({"lambda_": 2.0}, r"lambda_ must be that of the SPIN that is given, got 2.0"),
        ({"reduction": "mean"}, r"reduction must be that of the SPIN"),
    ],
)
def test_settings_that_a_given_spin_would_ignore_are_refused(make_model, make_rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        SPINTrainer(
            SPIN(make_model()), train_sft_dataset=make_rows(4), max_seq_len=10, checkpoint_folder=tmp_path, **changes
        )


def test_a_run_of_other_data_or_settings_is_not_gone_on_with(train, make_rows):
    train()
    with pytest.raises(
        CheckpointError, match=r"is of another run: train_sft_dataset is \w+, but was \w+, sampling is .+; train into"
    ):
        train(seed=0, train_sft_dataset=make_rows(12, seed=9), temperature=0.5, iterations=2)


def test_a_run_whose_answers_are_gone_says_so(train, tmp_path, stop_at):
    with pytest.raises(SystemError):
        train(checkpoint_every=1, trackers=[stop_at(2)])
    shutil.rmtree(tmp_path / "run" / "generations")
    with pytest.raises(FileNotFoundError, match=r"has 0 of 12 rows, and the weights that made them are gone"):
        train(checkpoint_every=1)


def test_a_cache_of_another_model_is_refused(tmp_path):
    store = RowStore(tmp_path, "answers", {"weights": "a"})
    (store.folder / "description.json").write_text(json.dumps({"weights": "b"}))
    with pytest.raises(ValueError, match=r"holds rows of other weights, prompts or settings"):
        RowStore(tmp_path, "answers", {"weights": "a"})


def test_damaged_rows_are_named(tmp_path):
    store = RowStore(tmp_path, "answers", {})
    (store.folder / "rows-0.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"rows-0.jsonl, line 1, is damaged"):
        RowStore(tmp_path, "answers", {})


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2, is not JSON"):
        as_sft_dataset(tmp_path / "a.jsonl", max_seq_len=9, tokenizer=BYTES)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2, must have the columns 'messages', or 'prompt' and one of"):
        as_sft_dataset(tmp_path / "a.jsonl", max_seq_len=9, tokenizer=BYTES)
    (tmp_path / "a.xlsx").write_text("a,b")
    with pytest.raises(ValueError, match=r"the format .xlsx is not read. Convert it"):
        as_sft_dataset(tmp_path / "a.xlsx", max_seq_len=9, tokenizer=BYTES)


def test_prompts_that_leave_no_room_are_refused(make_model):
    with pytest.raises(ValueError, match=r"max_seq_len must exceed the longest prompt \(3\), got 3"):
        answer_prompts(make_model(), [(1, 2, 3)], Sampling(max_seq_len=3), 0)


def test_other_files_and_models_are_refused(tmp_path, make_model):
    torch.save({"model": {"weight": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"is no SPIN checkpoint"):
        load_original_checkpoint(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match=r"model must be a folder or organisation/name"):
        load_model("./nowhere")
    with pytest.raises(TypeError, match=r"LoRA adapters need a transformers model, got SmallDecoder"):
        with_lora(make_model(), r=4)
    with pytest.raises(ValueError, match=r"lora_r must be at least 1, got 0"):
        with_lora(make_model(), r=0)
    with pytest.raises(ValueError, match=r"prob must be in \[0, 1\), got 1.0"):
        set_dropout_(make_model(), 1.0)


COMMANDS = [
    (["train", "--data", "x.jsonl"], r"model must be given together with data"),
    (["train", "--model", "nowhere"], r"data must be given together with a model"),
    (["train", "--model", "nowhere", "--data", "x.jsonl"], r"nowhere"),
    (["train", "--lora_r=4"], r"lora_r and tokenizer need a model"),
    (["train", "--temperature=-1"], r"temperature must be a finite number of at least 0"),
    (["generate", "a", "b.jsonl", "out.csv"], r"output must be a .jsonl file"),
    (["eval", "./nowhere"], r"checkpoint must be a folder"),
]


@pytest.mark.parametrize(("argv", "message"), COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_says_what_is_wrong_and_ends_with_1(argv, message, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_run_folder_may_have_either_name_but_not_both():
    assert run_folder("here", None) == run_folder(None, "here") == Path("here")
    assert run_folder(None, None) == Path("spin-checkpoints")
    with pytest.raises(ValueError, match=r"are one argument, got \{'checkpoint_dir': 'a', 'checkpoint_folder': 'b'\}"):
        run_folder("a", "b")
