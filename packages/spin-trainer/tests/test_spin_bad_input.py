"""Tables of invalid input: each case raises an error that names it, before anything is written or changed."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from spin_trainer import (
    SPIN,
    DPOSettings,
    DPOTrainer,
    SelfPlaySettings,
    SFTTrainer,
    SPINTrainer,
    as_preference_dataset,
    as_sft_dataset,
    load_original_checkpoint,
    set_dropout_,
)
from spin_trainer.cli import main
from spin_trainer.data.opponent_answers import Sampling, answer_prompts
from spin_trainer.data.row_store import RowStore
from spin_trainer.interop import load_model, with_lora

pytestmark = pytest.mark.plain
BYTES = ByteTokenizer()
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


PROTOCOL = {"vocab_size": 259, "pad_id": BYTES.pad_id, "encode": BYTES.encode, "decode": BYTES.decode}
NO_END = SimpleNamespace(eos_id=None, **PROTOCOL)


def with_template(template):
    """A tokenizer whose ``template(messages, add_generation_prompt)`` gives the text of a chat."""
    encoded = lambda messages, add_generation_prompt: BYTES.encode(template(messages, add_generation_prompt))  # noqa: E731
    return SimpleNamespace(eos_id=BYTES.eos_id, apply_chat_template=encoded, **PROTOCOL)


# source, changed arguments, message
DATA = [
    ([([1] * 9, 8)], {}, r"leave room for an answer below max_seq_len 8"),
    ([([1, 2], 2)], {}, r"answer tokens after its prompt_len 2, got 2 tokens"),
    ([([1, 2, -1, -1], 2)], {}, r"got 2 tokens"),
    ([([1, 2], 0)], {}, r"prompt_len of at least 1, got 0"),
    ([([1, -7, 2], 1)], {}, r"ids of at least 0 \(pad_id is -1\), got -7"),
    ([(torch.ones(2, 2).long(), 1)], {}, r"1-D integer ids"),
    ([(torch.ones(3), 1)], {}, r"got torch.float32"),
    ([], {}, r"at least one row, got none"),
    ([([1, 2, 3], 1)], {"eos_id": 11}, r"answers that end with eos_id 11, none does"),
    ([("a", "b")], {"tokenizer": None}, r"a tokenizer is needed, got tokenizer=None"),
    ([("a", "b")], {"tokenizer": NO_END}, r"the tokenizer has no eos_id, pass eos_id"),
    ([("a", "")], {}, r"an answer of at least one token"),
    ([("", "a")], {}, r"a prompt of at least one token"),
    ([{"question": "a"}], {}, r"columns 'messages', or 'prompt'.*question"),
    ([{"prompt": "a"}], {}, r"one of \['response'"),
    ([{"messages": CHAT[:1]}], {}, r"got the roles \['user'\]"),
    ([{"messages": [*CHAT, CHAT[0]]}], {}, r"must end with an answer of the assistant"),
    ([{"messages": [{"role": "user"}]}], {}, r"'role' and 'con"),
    ([{"messages": CHAT}], {"tokenizer": NO_END, "eos_id": 3}, r"no apply_chat_template"),
    ([{"messages": CHAT}], {"tokenizer": with_template(lambda chat, asks: f"{len(chat)}{asks}")}, r"its own prompt"),
    ([{"messages": CHAT}], {"tokenizer": with_template(lambda chat, asks: "a" * len(chat))}, r"end an answer with"),
    ([([1, 2], 1)], {"max_seq_len": 1}, r"max_seq_len must be at least 2, got 1"),
]
DATA_OF_OTHER_TYPES = [
    ([(None, 1)], {}, r"must be \(token ids, prompt_len\)"),
    ([(1, 2, 3)], {}, r"must be \(sequence, prompt_len\)"),
    ([3], {}, r"got int '3'"),
    (3, {}, r"path, a dataset or an iterable of rows, got int"),
    ([("a", 3)], {}, r"texts as prompt and answer, got str, int"),
]


def typed(values, types):
    """Rows of a table, each with the error that it raises."""
    return [(*row, ValueError) for row in values] + [(*row, TypeError) for row in types]


@pytest.mark.parametrize(("source", "changes", "message", "error"), typed(DATA, DATA_OF_OTHER_TYPES))
def test_a_dataset_is_refused_by_row(source, changes, message, error):
    with pytest.raises(error, match=message):
        as_sft_dataset(source, **{"max_seq_len": 8, "tokenizer": BYTES, **changes})


def test_a_transformers_tokenizer_without_template_is_named(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template; set tokenizer.chat_template"):
        as_sft_dataset([{"messages": CHAT}], max_seq_len=50, tokenizer=HuggingFaceTokenizer(tokenizer))


SETTINGS = [
    ({"max_seq_len": 1}, r"max_seq_len must be at least 2"),
    ({"iterations": 0}, r"iterations must be at least 1, got 0"),
    ({"learning_rate_num_decay_steps": 0}, r"learning_rate_num_decay_steps must be at least 1, got 0"),
    ({"epochs": -1}, r"epochs must be at least 1"),
    ({"batch_size": 0}, r"batch_size must be at least 1"),
    ({"gradient_accumulation": 0}, r"gradient_accumulation"),
    ({"learning_rate": 0.0}, r"learning_rate must be a finite number above 0"),
    ({"end_learning_rate": 1.0}, r"end_learning_rate must be in \[0, learning_rate"),
    ({"learning_rates": []}, r"learning_rates must hold finite numbers"),
    ({"lambdas": [0.1, -1.0]}, r"lambdas must hold finite numbers above 0"),
    ({"lambda_": float("nan")}, r"lambda_ must be a finite number above 0, got nan"),
    ({"temperature": -1.0}, r"temperature must be a finite number of at least 0"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"ref_model_ema_decay": 1.5}, r"ref_model_ema_decay must be in \[0, 1\], got 1.5"),
    ({"checkpoint_every": 0}, r"checkpoint_every"),
    ({"early_stop_patience": 0}, r"early_stop_patience"),
    ({"max_steps": 0}, r"max_steps must be at least 1, got 0"),
    ({"top_p": 1.5}, r"top_p must be a number in \[0, 1\], got 1.5"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty must be a finite number above 0"),
    ({"warmup": 1.0}, r"warmup must be a fraction of the updates in \[0, 1\), got 1.0"),
    (
        {"gradient_accumulation": 2, "grad_accum_steps": 4},
        r"are one argument, got \{'gradient_accumulation': 2, 'grad_",
    ),
    ({"weight_decay": -1.0}, r"weight_decay"),
    ({"seed": -1}, r"seed must be in"),
    ({"max_grad_norm": 0.0}, r"max_grad_norm"),
    ({"reference_free": True, "opponent": "policy"}, r"reference_free=True has no reference to compute"),
    ({"micro_batch_size": 0}, r"micro_batch_size must be at least 1, got 0"),
    ({"fsdp": True, "opponent": "policy"}, r"fsdp=True needs precompute_reference=True, opponent='reference'"),
    ({"fsdp": True, "precompute_reference": False}, r"got False, 'reference' and 1.0"),
    ({"fsdp": True, "ref_model_ema_decay": 0.9}, r"got True, 'reference' and 0.9"),
]
SETTINGS_OF_OTHER_TYPES = [
    ({"loss": "ipo"}, r"ipo"),
    ({"opponent": "nobody"}, r"nobody"),
    ({"iteration": 3}, r"iteration"),
]


@pytest.mark.parametrize(("changes", "message", "error"), typed(SETTINGS, SETTINGS_OF_OTHER_TYPES))
def test_a_setting_is_refused_by_name(changes, message, error):
    with pytest.raises(error, match=message):
        SelfPlaySettings.of({"max_seq_len": 8, **changes})


SPINS = [
    ({"lambda_": 0.0}, r"lambda_ must be a finite number above 0, got 0"),
    ({"loss": "ipo"}, r"loss must be one of"),
    ({"reduction": "max"}, r'reduction must be "sum" or "mean"'),
    ({"ref_model_ema_decay": -0.1}, r"ref_model_ema_decay"),
    ({"ema_kwargs": {"update_every": 1}}, r"ema_kwargs go with ref_model_ema_decay below 1"),
]


@pytest.mark.parametrize(("changes", "message", "error"), typed(SPINS, [({"beta": 1.0}, r"SPIN has no argument beta")]))
def test_a_spin_argument_is_refused_by_name(make_model, changes, message, error):
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
    ((IDS, IDS, torch.tensor([4])), r"must have answer tokens after every prompt, rows \[0\] have none"),
    ((IDS + 20, IDS, torch.tensor([2])), r"generated_seq must hold token ids in \[0, 12\), got 24"),
    ((IDS, IDS, torch.tensor([2]), MASK[:, :2]), r"generated_seq_mask must have shape \(1, 4\), got \(1, 2\)"),
    ((IDS, IDS, torch.tensor([2]), MASK, MASK), r"generated_seq_mask must be None where pad_id marks padding"),
]


BATCHES_OF_OTHER_TYPES = [
    ((IDS, IDS, torch.tensor([2]), None, MASK.long()), r"real_seq_mask must be boolean, got dtype torch.int64"),
]


@pytest.mark.parametrize(("arguments", "message", "error"), typed(BATCHES, BATCHES_OF_OTHER_TYPES))
def test_a_batch_is_refused_by_name(make_model, arguments, message, error):
    with pytest.raises(error, match=message):
        SPIN(make_model(), pad_id=-1 if "pad_id" in message else None)(*arguments)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
PREFERENCES = [
    (
        [{"prompt": "a", "chosen": "b"}],
        {},
        r"the columns 'prompt', 'chosen' and 'rejected', got \['chosen', 'prompt'\]",
    ),
    ([{**PAIR, "rejected": None}], {}, r"got \['chosen', 'prompt'\]"),
    ([{**PAIR, "rejected": ""}], {}, r"an answer of at least one token after its prompt, got none"),
    ([{**PAIR, "prompt": ""}], {}, r"a prompt of at least one token"),
    ([{"chosen": "b", "rejected": "c"}], {}, r"has no prompt, and chosen and rejected have no common beginning"),
    ([{**PAIR, "prompt": "a" * 20}], {}, r"leave room for an answer below max_seq_len 8"),
    ([{**PAIR, "prompt": "a" * 20}], {"overlong": "drop"}, r"at least one row, got none \(1 left out"),
    ([PAIR], {"tokenizer": None}, r"a tokenizer is needed, got tokenizer=None"),
    ([{"prompt": [1], "chosen": [2], "rejected": [3]}], {}, r"answers that end with eos_id \d+, none does"),
    ([{"prompt": [1], "chosen": [-2], "rejected": [3]}], {}, r"ids of at least 0"),
    ([], {}, r"at least one row, got none"),
    ([PAIR], {"max_seq_len": 1}, r"max_seq_len must be at least 2, got 1"),
]
PREFERENCES_OF_OTHER_TYPES = [
    (["a"], {}, r"columns 'prompt', 'chosen' and 'rejected', got str 'a'"),
    ([{**PAIR, "chosen": 3}], {}, r"texts as prompt and answer, got str, int"),
    ([{"prompt": [1], "chosen": "b", "rejected": [3]}], {}, r"so chosen must be token ids too, got 'b'"),
    (as_sft_dataset([([1, 2], 1)], max_seq_len=4), {}, r"must hold preferences, got an SFTDataset without"),
]


@pytest.mark.parametrize(("source", "changes", "message", "error"), typed(PREFERENCES, PREFERENCES_OF_OTHER_TYPES))
def test_preferences_are_refused_by_row(source, changes, message, error):
    with pytest.raises(error, match=message):
        as_preference_dataset(source, **{"max_seq_len": 8, "tokenizer": BYTES, **changes})


LOSSES = [
    ({"beta": 0.0}, r"beta must be a finite number above 0, got 0"),
    ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ({"loss": "hinge", "label_smoothing": 0.1}, r"goes with loss sigmoid or robust, got 0.1 and 'hinge'"),
    ({"simpo_margin": 0.5}, r"simpo_margin goes with loss 'simpo', got 0.5 and 'sigmoid'"),
    ({"loss": "simpo", "simpo_margin": -1.0}, r"simpo_margin must be a finite number of at least 0, got -1"),
    ({"micro_batch_size": 0}, r"micro_batch_size must be at least 1, got 0"),
    ({"end_learning_rate": 1.0}, r"end_learning_rate must be in \[0, learning_rate"),
]


@pytest.mark.parametrize(("changes", "message", "error"), typed(LOSSES, [({"loss": "dpo"}, r"dpo")]))
def test_a_setting_of_dpo_is_refused_by_name(changes, message, error):
    with pytest.raises(error, match=message):
        DPOSettings(**{"max_seq_len": 8, **changes})


FINE_TUNING = [
    ({"max_seq_len": 3}, r"room for an answer below max_seq_len 3"),
    ({"eos_id": 12}, r"end with eos_id 12"),
    (
        {"train_dataset": [{"prompt": [1, 2], "chosen": [15, 11], "rejected": [3, 11]}]},
        r"train_dataset\[0\] .*in \[0, 12\)",
    ),
    (
        {"train_dataset": [{"prompt": [1, 2], "chosen": [3, 11], "rejected": [15, 11]}]},
        r"train_dataset\[0\] .*in \[0, 12\)",
    ),
    ({"validation_fraction": 0.5, "valid_dataset": "same"}, r"pass validation data or validation_fraction, not both"),
    ({"validation_fraction": 0.01}, r"validation_fraction 0.01 of 4 rows leaves one part empty"),
    ({"reference_model": 3, "loss": "orpo"}, r"reference_model must be None, since loss 'orpo' has no reference"),
    ({"fsdp": True}, r"fsdp=True needs several processes, got one"),
]
FINE_TUNING_OF_OTHER_TYPES = [
    ({"reference_model": lambda ids: ids}, r"reference_model must be a module, got function"),
    (
        {"gradient_checkpointing": True},
        r"gradient_checkpointing needs a model of .*, got SmallDecoder",
    ),
    ({"lambda_": 0.1}, r"lambda_"),
]


@pytest.mark.parametrize(("changes", "message", "error"), typed(FINE_TUNING, FINE_TUNING_OF_OTHER_TYPES))
def test_an_argument_of_dpo_is_refused_before_anything_is_written(make_model, tmp_path, changes, message, error):
    rows = [{"prompt": [1, 2, 10], "chosen": [1, 2, 11], "rejected": [2, 1, 11]}] * 4
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    if changes.get("valid_dataset") == "same":
        changes = {**changes, "valid_dataset": rows}
    arguments = {"train_dataset": rows, "max_seq_len": 10, "eos_id": 11, "device": "cpu", **changes}
    with pytest.raises(error, match=message):
        DPOTrainer(model, checkpoint_dir=tmp_path / "run", **arguments)

    assert not (tmp_path / "run").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [SPINTrainer, SFTTrainer])
def test_activation_checkpointing_of_other_models_is_refused_before_anything_is_written(
    kind, make_model, make_rows, tmp_path
):
    names = {SPINTrainer: "train_sft_dataset", SFTTrainer: "train_dataset"}
    with pytest.raises(TypeError, match=r"gradient_checkpointing needs a model of .*, got SmallDecoder"):
        kind(
            make_model(),
            **{names[kind]: make_rows(4)},
            max_seq_len=10,
            eos_id=11,
            checkpoint_dir=tmp_path / "run",
            gradient_checkpointing=True,
        )
    assert not (tmp_path / "run").exists()


def test_a_released_reference_is_named(make_model):
    spin = SPIN(make_model())
    spin.ref_model.release()
    with pytest.raises(RuntimeError, match=r"the reference was released; update_reference_model_with_policy"):
        spin(IDS, IDS, torch.tensor([2]))


TRAINERS = [
    ({"max_seq_len": 4}, r"room for an answer below max_seq_len 4|fit into max_seq_len"),
    ({"eos_id": 12}, r"end with eos_id 12"),
    ({"early_stop_patience": 1, "valid_sft_dataset": None}, r"early_stop_patience needs a valid_sft_dataset"),
    ({"accelerate_kwargs": {"gradient_accumulation_steps": 2}}, r"steps is gradient_accumulation here"),
    ({"accelerate_kwargs": {"mixed_precision": "bf16"}}, r"mixed_precision is precision= here"),
    ({"spin_kwargs": {"ref_model_ema_decay": 0.5}}, r"ref_model_ema_decay is an argument of the trainer"),
    ({"device": "tpu"}, r"device must be auto, cpu, cuda"),
    ({"train_sft_dataset": [([1, 2, 15, 11], 1)]}, r"train_sft_dataset\[0\] must hold token ids in \[0, 12\)"),
    ({"valid_sft_dataset": [([1, 2], 2)]}, r"valid_sft_dataset\[0\] must have answer tokens"),
    ({"fsdp": True}, r"fsdp=True needs several processes, got one"),
    (
        {"config": SelfPlaySettings(max_seq_len=8)},
        r"pass config or single settings, not both; got config and \['device",
    ),
    ({"checkpoint_dir": "a"}, r"checkpoint_dir and checkpoint_folder are one argument, got \{'checkpoint_dir': 'a'"),
]
TRAINERS += [
    ({"answers": [], "iterations": 2}, r"so iterations must be 1 and opponent 'reference', got 2 and 'reference'"),
    ({"answers": [{"answer_ids": [3, 11]}]}, r"answers must have one row for each of the 4 prompts, got 1"),
]
TRAINERS_OF_OTHER_TYPES = [({"checkpoint_every": 1.5}, r"checkpoint_every"), ({"overlong": "cut"}, r"overlong")]


@pytest.mark.parametrize(("changes", "message", "error"), typed(TRAINERS, TRAINERS_OF_OTHER_TYPES))
def test_a_trainers_argument_is_refused_before_anything_is_written(make_model, tmp_path, changes, message, error):
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
        ({"spin_kwargs": {"λ": 1.0}}, r"spin_kwargs must be None if model is a SPIN already"),
        ({"ref_model_ema_decay": 0.9}, r"ref_model_ema_decay must match the SPIN that is passed as model, got 0.9"),
        ({"lambda_": 2.0}, r"lambda_ must match the SPIN that is passed as model, got 2.0"),
        ({"reduction": "mean"}, r"reduction must match the SPIN"),
    ],
)
def test_settings_that_a_given_spin_would_ignore_are_refused(make_model, make_rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        SPINTrainer(
            SPIN(make_model()), train_sft_dataset=make_rows(4), max_seq_len=10, checkpoint_folder=tmp_path, **changes
        )


def test_a_run_of_other_data_or_settings_is_not_resumed(train, make_rows):
    train()
    with pytest.raises(
        CheckpointError, match=r"is of another run: train_sft_dataset is \w+, but was \w+, sampling is .+; train into"
    ):
        train(train_sft_dataset=make_rows(12, seed=9), temperature=0.5, iterations=2)


@pytest.mark.archives
def test_a_run_whose_answers_are_gone_is_refused(train, tmp_path, stop_at):
    with pytest.raises(SystemExit):
        train(checkpoint_every=1, trackers=[stop_at(2)])
    shutil.rmtree(tmp_path / "run" / "generations")
    with pytest.raises(FileNotFoundError, match=r"has 0 of 12 rows, and the weights that made them are gone"):
        train(checkpoint_every=1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("description.json", json.dumps({"weights": "b"}), r"holds rows of other weights, prompts or settings"),
        ("description.json", "{", r"description.json is damaged"),
        ("rows-0.jsonl", "{}\n", r"rows-0.jsonl, line 1, is damaged"),
    ],
)
def test_rows_of_another_model_or_damaged_ones_are_refused(tmp_path, file, content, message):
    store = RowStore(tmp_path, "answers", {"weights": "a"})
    (store.folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        RowStore(tmp_path, "answers", {"weights": "a"})


def test_files_that_are_missing_damaged_or_of_another_format_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        as_sft_dataset(tmp_path / "nowhere.jsonl", max_seq_len=9)
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


@pytest.mark.archives
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
    (["dpo"], r"model must be given together with data, got data None and no model"),
    (["dpo", "--model", "nowhere"], r"data must be given together with a model"),
    (["dpo", "--model", "nowhere", "--data", "x.jsonl", "--loss=ipo", "--simpo_margin=1"], r"goes with loss 'simpo'"),
    (["sft", "--data", "x.jsonl"], r"model must be given together with data"),
    (["sft", "--model", "nowhere", "--data", "x.jsonl"], r"nowhere"),
    (["train", "--lora_r=4"], r"model is required with lora_r"),
    (["train", "--temperature=-1"], r"temperature must be a finite number of at least 0"),
    (["generate", "a", "b.jsonl", "out.csv"], r"output must be a .jsonl file"),
    (["eval", "./nowhere"], r"model must be a folder"),
]


@pytest.mark.parametrize(("argv", "message"), COMMANDS)
def test_a_command_prints_what_is_wrong_and_ends_with_1(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    assert re.search(message, capsys.readouterr().err)
