"""Inputs of people who fine-tune real checkpoints: each case of the field that went wrong, with the right value."""

import copy
import json
import math
import os

import pytest
import torch

from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints.weights import read_weights
from lm_core.tokenizers import ByteTokenizer
from lm_core.training.metrics import read_metrics
from spin_trainer import SPIN, as_sft_dataset
from spin_trainer.cli import main

# peft uses an attribute that newer transformers have renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def logits_of(model, ids=((5, 6, 7, 8),)):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float()


# --------------------------------------------------------------------------------------------- padding and ends


@pytest.mark.parametrize("ends", [11, (10, 11)])
def test_an_answers_end_is_scored_also_where_padding_has_the_same_id(make_model, ends):
    spin = SPIN(make_model().double(), pad_id=11, eos_id=ends, lambda_=1.0)
    by_mask = SPIN(make_model().double(), eos_id=ends, lambda_=1.0)
    # an end token inside the prompt, an answer with its end, one that was cut off
    real = torch.tensor([[1, 11, 5, 11, 11, 11], [3, 4, 6, 7, 8, 11]])
    generated = torch.tensor([[1, 11, 9, 11], [3, 4, 5, 5]])
    lengths = torch.tensor([2, 2])
    real_mask, generated_mask = real != -1, generated != -1
    real_mask[0, 4:] = False
    with torch.no_grad():
        for parameter in (*spin.trainable_parameters(), *by_mask.trainable_parameters()):
            parameter.mul_(1.5)

    found = spin.compare(generated, real, lengths)
    expected = by_mask.compare(generated, real, lengths, generated_mask, real_mask)
    torch.testing.assert_close(found.policy_real, expected.policy_real)
    torch.testing.assert_close(found.policy_generated, expected.policy_generated)
    assert found.losses.mean().item() != pytest.approx(math.log(2), abs=1e-6)


def test_padding_on_the_left_with_an_end_tokens_id_is_refused(make_model):
    ids = torch.tensor([[11, 1, 2, 11]])
    with pytest.raises(ValueError, match=r"real_seq must not begin with pad_id 11.*pass real_seq_mask and pad_id=None"):
        SPIN(make_model(), pad_id=11, eos_id=11)(ids[:, 1:], ids, torch.tensor([1]))


def test_rows_of_ids_keep_their_end_where_padding_has_the_same_id():
    rows = [(torch.tensor([1, 2, 3, 11, 11, 11]), 2), ([1, 11, 5, 11], 2), ([4, 5, 6], 1)]
    dataset = as_sft_dataset(rows, max_seq_len=8, eos_id=(10, 11), pad_id=11)

    assert [(*row.prompt, *row.response) for row in dataset] == [(1, 2, 3, 11), (1, 11, 5, 11), (4, 5, 6)]


# ----------------------------------------------------------------------------------------------------- adapters


def test_the_dropout_of_adapters_is_as_configured_and_the_models_as_asked(train, llama_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama_model(attention_dropout=0.5), config)
    layer = model.base_model.model.model.layers[0].self_attn
    seen = set()

    class Watch:
        def log(self, values, step):
            seen.add((layer.q_proj.lora_dropout["default"].p, layer.attention_dropout))

    train(model=model, trackers=[Watch()], dropout=0.1)
    assert seen == {(0.25, 0.1)}
    assert (layer.q_proj.lora_dropout["default"].p, layer.attention_dropout) == (0.25, 0.5)


ADAPTERS = {
    "new tokens": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "saved modules": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "dora": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about names and initial values
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_an_adapter_trains_is_trained_and_stored(train, llama_model, kind):
    peft = pytest.importorskip("peft")
    name, settings = ADAPTERS[kind]
    model = peft.get_peft_model(llama_model(), getattr(peft, name)(task_type="CAUSAL_LM", **settings))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    _, result = train(model=model, epochs=2)
    after = dict(model.named_parameters())

    assert not [name for name, value in before.items() if torch.equal(after[name], value)]
    umask = os.umask(0)
    os.umask(umask)
    for folder in (result.iterations_folder / "iteration-1", result.checkpoints / f"step-{result.step}"):
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir() if file.is_file()} == {0o666 & ~umask}
        opened = peft.PeftModel.from_pretrained(llama_model(), folder)
        torch.testing.assert_close(logits_of(opened), logits_of(model.eval()), rtol=0, atol=0)


def test_the_reference_of_a_fine_tuned_adapter_is_the_policy_as_it_was_given(llama_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    spin = SPIN(peft.get_peft_model(llama_model(), config).eval(), eos_id=())
    with spin.policy_model.disable_adapter(), torch.no_grad():
        base = spin.policy(torch.tensor([[1, 2, 3, 4]]))
    loss = spin(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 4, 3]]), torch.tensor([2]))

    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert (spin.ref_model(torch.tensor([[1, 2, 3, 4]])) - base).abs().max().item() > 1e-3


# --------------------------------------------------------------------------------------------- texts and chats


@pytest.fixture
def bos_tokenizer(chat_tokenizer):
    """A transformers tokenizer that begins every text with BOS, as those of Llama and Gemma do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.bos_token = "<|user|>"
    bos = [("<|user|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=bos)
    return tokenizer


def test_a_text_prompt_has_the_ids_that_the_tokenizer_gives_and_one_bos(bos_tokenizer):
    rows = [("sort 3 1 = ", "1 3"), ("<|user|>sort 2 = ", "2")]
    dataset = as_sft_dataset(rows, max_seq_len=64, tokenizer=bos_tokenizer)  # as it is, without a wrapper

    assert list(dataset[0].prompt) == bos_tokenizer(rows[0][0])["input_ids"]
    assert dataset[1].prompt.count(bos_tokenizer.bos_token_id) == 1
    for row, (prompt, answer) in zip(dataset, rows, strict=True):
        text = bos_tokenizer.decode([*row.prompt, *row.response])
        assert text == f"<|user|>{prompt.removeprefix('<|user|>')}{answer}<|end|>"


def test_a_chat_that_its_template_begins_with_bos_has_one(bos_tokenizer):
    template = bos_tokenizer.chat_template.replace("<|{{ m['role'] }}|>", "{{ m['role'] }}: ")
    bos_tokenizer.chat_template = "<|user|>" + template.replace("<|assistant|>", "assistant: ")
    messages = [{"role": "user", "content": "sort 3 1"}, {"role": "assistant", "content": "1 3"}]
    (row,) = as_sft_dataset([{"messages": messages}], max_seq_len=64, tokenizer=bos_tokenizer)

    assert row.prompt.count(bos_tokenizer.bos_token_id) == 1


@pytest.fixture
def two_ends(hugging_face_folder):
    """Folder of a model that ends a turn with <|pad|> or <|end|>, of which only its generation config says both."""
    path = hugging_face_folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [3, 2]}))
    return hugging_face_folder


def test_every_end_token_of_the_model_ends_an_answer(two_ends, tmp_path, train, rows_of):
    data = {f"{name}_sft_dataset": tmp_path / f"{name}.jsonl" for name in ("train", "valid")}
    changes = {"max_seq_len": 60, "eos_id": None, "temperature": 1.5, "top_p": None}
    trainer, _ = train(model=two_ends, **data, **changes)
    answers = [row["tokens"] for row in rows_of(tmp_path / "run", "answers-train")]

    assert set(trainer.eos_ids) == set(trainer.model.eos_ids) == {2, 3}
    assert {answer[-1] for answer in answers} >= {2, 3}
    assert not any({2, 3} & set(answer[:-1]) for answer in answers)
    ends = trainer.tokenizer.tokenizer
    assert all(ends.decode(row.response).endswith("<|end|>") for row in trainer.train_dataset)


def test_an_answer_ends_at_the_first_of_several_end_tokens(chat_tokenizer):
    chat_tokenizer = copy.deepcopy(chat_tokenizer)
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<|end|>", "<|pad|>")
    messages = [{"role": "user", "content": "sort 3 1"}, {"role": "assistant", "content": "1 3"}]
    (row,) = as_sft_dataset([{"messages": messages}], max_seq_len=64, tokenizer=chat_tokenizer, eos_id=[2, 3])
    text = as_sft_dataset([("sort 3 1", "1 3")], max_seq_len=64, tokenizer=chat_tokenizer, eos_id=[3, 2])

    assert chat_tokenizer.decode(row.response) == "1 3<|pad|>"
    assert chat_tokenizer.decode(text[0].response) == "1 3<|end|>"  # the tokenizer's own


CHAT = [{"role": "user", "content": "sort 3 1"}, {"role": "assistant", "content": "1 3"}]


def with_template(tokenizer, header, opening=""):
    """The tokenizer with a template whose answers begin after ``header``, and in the prompt after ``opening`` too."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        f"<|{{{{ m['role'] }}}}|>{header}{{{{ m['content'] }}}}<|end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|assistant|>{header}{opening}{{% endif %}}"
    )
    return tokenizer


@pytest.mark.parametrize("answer", ["\n\n1 3", " 1 3", "1 3"])
@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_a_chats_answer_is_whole_with_any_beginning(chat_tokenizer, answer, opening):
    tokenizer = with_template(chat_tokenizer, "\n", opening)
    (row,) = as_sft_dataset(
        [{"messages": [CHAT[0], {**CHAT[1], "content": answer}]}], max_seq_len=64, tokenizer=tokenizer
    )

    assert tokenizer.decode(row.prompt) == "<|user|>\nsort 3 1<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(row.response) == f"{answer}<|end|>"


def test_rows_without_a_border_are_left_out_and_counted(chat_tokenizer, train):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% if messages[1] %}{{ messages[1]['content'] }}<|end|>{% else %}<|user|>1{% endif %}"
    rows = [{"messages": [CHAT[0], {**CHAT[1], "content": text}]} for text in ("<|user|>1 3", "1 3", "<|user|>1")]
    with pytest.warns(UserWarning, match=r"1 of 3 rows left out, such as: train_sft_dataset\[1\]: the chat template"):
        dataset = as_sft_dataset(rows, max_seq_len=64, tokenizer=tokenizer)

    assert (len(dataset), dataset.dropped) == (2, 1)
    with pytest.raises(ValueError, match=r"at least one row, got none \(1 left out, such as: train_sft"):
        as_sft_dataset(rows[1:2], max_seq_len=64, tokenizer=tokenizer)


def test_a_chat_that_the_template_refuses_is_named(chat_tokenizer):
    chat = [{"role": "system", "content": "be brief"}, *CHAT]
    with pytest.raises(ValueError, match=r"train_sft_dataset\[1\] is refused by the chat template: no system role"):
        as_sft_dataset(
            [{"messages": CHAT}, {"messages": chat}], max_seq_len=64, tokenizer=with_template(chat_tokenizer, "")
        )


def test_the_template_gets_its_arguments(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{%", "<|assistant|>{{ opening }}{%")
    arguments = {"max_seq_len": 64, "tokenizer": tokenizer, "template_kwargs": {"opening": "1"}}
    (row,) = as_sft_dataset([{"messages": CHAT}], **arguments)

    assert tokenizer.decode(row.prompt).endswith("<|assistant|>1")
    assert tokenizer.decode(row.response) == " 3<|end|>"


# ----------------------------------------------------------------------------------------------- tables and rows


def test_datasets_of_every_form_are_read_or_told_apart():
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{n}", "response": f"r{n}"} for n in range(4)]
    table = datasets.Dataset.from_list(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    chats = [{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}], "prompt": None}]
    sources = [rows, columns, table, table.to_iterable_dataset(), (row for row in rows)]
    found = [as_sft_dataset(source, max_seq_len=20, tokenizer=ByteTokenizer()) for source in sources]

    assert {one.fingerprint for one in found} == {found[0].fingerprint}
    assert len(as_sft_dataset(chats, max_seq_len=50, tokenizer=ByteTokenizer())) == 1
    with pytest.raises(ValueError, match=r"must be one split of the dataset, got a dict of \['test', 'train'\]"):
        as_sft_dataset(datasets.DatasetDict(train=table, test=table), max_seq_len=20, tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match=r"train_sft_dataset\[1\] must have .*None in \['prompt'\]"):
        as_sft_dataset([rows[0], {**rows[1], "prompt": None}], max_seq_len=20, tokenizer=ByteTokenizer())


def test_a_lone_surrogate_names_its_row(chat_tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2, .*lone surrogate"):
        as_sft_dataset(tmp_path / "rows.jsonl", max_seq_len=20, tokenizer=chat_tokenizer)


def test_a_line_separator_inside_a_string_ends_no_row(tmp_path):
    text = "a\u2028b\x0cc\x85d"
    (tmp_path / "rows.jsonl").write_bytes(f'{{"prompt": "{text[:3]}c", "response": "{text[:3]}"}}\r\n'.encode() * 2)
    dataset = as_sft_dataset(tmp_path / "rows.jsonl", max_seq_len=20, tokenizer=ByteTokenizer())

    assert [bytes(row.response[:-1]).decode() for row in dataset] == ["a\u2028b"] * 2


def test_a_fraction_of_the_rows_is_held_out(train, make_rows):
    trainer, result = train(rows=20, valid_sft_dataset=None, validation_fraction=0.25)
    parts = [list(trainer.train_dataset), list(trainer.valid_dataset)]

    assert [len(part) for part in parts] == [15, 5]
    assert sorted(map(repr, parts[0] + parts[1])) == sorted(map(repr, make_rows(20)))
    assert len(result.history) == 2


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(hugging_face_folder, tmp_path, monkeypatch):
    """``command(folder, *words)`` runs ``train`` on the chats next to the model; returns its exit status."""
    monkeypatch.setattr("lm_core.training.session.draw_curves", lambda *_: None)
    common = ["--max_seq_len=40", "--batch_size=3", "--gradient_accumulation=1", "--epochs=1", "--device=cpu"]

    def run(folder, *words, model=hugging_face_folder):
        data = ["--data", f"{tmp_path}/train.jsonl", "--validation_data", f"{tmp_path}/valid.jsonl"]
        rates = ["--learning_rate=1e-3", "--end_learning_rate=1e-3"]
        where = ["--model", str(model), "--checkpoint_dir", f"{tmp_path}/{folder}"]
        return main(["train", *where, *data, *common, *rates, *words])

    return run


def adapters_of(folder):
    return read_weights(folder / "iterations" / "iteration-1" / "adapter_model.safetensors")


def test_a_runs_seed_covers_the_adapters(command, tmp_path):
    pytest.importorskip("peft")
    for folder, seed in (("one", 0), ("again", 0), ("other", 1)):
        torch.manual_seed(len(folder))
        assert command(folder, "--lora_r=4", f"--seed={seed}", "--max_steps=1", "--lora_dropout=0.1") == 0
    one, again, other = (adapters_of(tmp_path / name) for name in ("one", "again", "other"))

    assert all(torch.equal(again[name], value) for name, value in one.items())
    assert any((other[name] - value).abs().max() > 0.01 for name, value in one.items() if "lora_A" in name)


def test_a_home_folder_is_expanded_also_where_no_shell_does_it(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert command("unused", "--checkpoint_dir", "~/run", "--max_steps=1") == 0
    words = ["generate", "~/run/iterations/iteration-1", "valid.jsonl", "~/answers.jsonl", "--max_seq_len=40"]
    assert main([*words, "--device=cpu"]) == 0

    assert (tmp_path / "home" / "run" / "checkpoints").is_dir()
    assert (tmp_path / "home" / "answers.jsonl").is_file()
    assert not (tmp_path / "~").exists()


def test_a_run_continues_the_adapters_of_its_models_folder_or_refuses_new_ones(command, tmp_path, capsys):
    pytest.importorskip("peft")
    assert command("first", "--lora_r=4") == 0
    folder = tmp_path / "first" / "iterations" / "iteration-1"
    before = adapters_of(tmp_path / "first")
    assert command("second", "--max_steps=1", model=folder) == 0
    after = adapters_of(tmp_path / "second")
    assert 0 < max((after[name] - value).abs().max().item() for name, value in before.items()) < 2e-3

    capsys.readouterr()
    assert command("third", "--lora_r=4", model=folder) == 1
    assert "model must have no adapters, got ['default']" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_checkpoint_of_adapters_is_opened_by_peft_and_holds_no_base(command, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    assert command("run", "--lora_r=4", "--checkpoint_every=2") == 0
    exported = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "iterations" / "iteration-1")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint)  # by the name of its base
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    on_base = peft.PeftModel.from_pretrained(base, checkpoint)
    run = load_causal_lm(tmp_path / "run")

    for model in (opened, on_base, run):
        torch.testing.assert_close(logits_of(model), logits_of(exported), rtol=0, atol=0)
    assert (logits_of(opened) - logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama"))).any()
    words = ["--data", f"{tmp_path}/valid.jsonl", "--max_seq_len=40", "--device=cpu"]
    assert main(["eval", str(tmp_path / "run"), *words, "--opponent_model", str(tmp_path / "llama")]) == 0
    stored = {file.name: file.stat().st_size for file in checkpoint.glob("*.safetensors")}
    adapters = sum(value.numel() for name, value in exported.named_parameters() if "lora" in name)
    assert max(stored.values()) < 4 * adapters + 10_000 < (tmp_path / "llama" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_all_weights_is_opened_by_transformers(command, tmp_path, hugging_face_folder, dtype):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(hugging_face_folder, dtype=getattr(torch, dtype))
    model.save_pretrained(hugging_face_folder)
    assert command("run", "--max_steps=1") == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    opened = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "iterations" / "iteration-1", dtype="auto"
    )

    assert (opened.dtype, exported.dtype) == (torch.float32, getattr(torch, dtype))
    torch.testing.assert_close(logits_of(opened), logits_of(exported), rtol=0, atol=0.05 if dtype == "bfloat16" else 0)
    assert opened.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_every_weight_of_a_bfloat16_model_learns_at_the_rates_of_fine_tuning(
    command, tmp_path, hugging_face_folder, capsys
):
    transformers = pytest.importorskip("transformers")
    before = transformers.AutoModelForCausalLM.from_pretrained(hugging_face_folder, dtype=torch.bfloat16)
    before.save_pretrained(hugging_face_folder)
    before = {name: weight.float() for name, weight in before.state_dict().items()}
    assert command("run", "--learning_rate=5e-7", "--end_learning_rate=5e-7") == 0
    printed = capsys.readouterr().out.splitlines()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    after = read_weights(checkpoint / "model.safetensors")
    trained = {name: weight for name, weight in after.items() if (weight != before[name]).any()}

    assert "weights stored in bfloat16, trained in float32" in printed[0]
    assert trained.keys() == after.keys()
    # of embeddings, the rows of tokens that occur
    changed = [(weight != before[name]).float().mean().item() for name, weight in after.items() if "embed" not in name]
    assert min(changed) > 0.99


def half_frozen(model):
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("part", [lambda model: model, half_frozen], ids=["all weights", "half of them"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"precompute_reference": False}, {"opponent": "policy"}, {"ref_model_ema_decay": 0.9}],
    ids=["stored reference", "live reference", "live opponent", "moving reference"],
)
def test_a_bfloat16_model_and_its_reference_train_in_float32(train, tmp_path, llama_model, part, settings):
    model = part(llama_model().bfloat16())
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    train(model=model, learning_rate=1e-6, end_learning_rate=1e-6, **settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exported = read_weights(tmp_path / "run" / "iterations" / "iteration-1" / "model.safetensors")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]

    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {name: exported[name].dtype for name in exported} == {name: stored[name] for name in exported}
    assert losses[0] == pytest.approx(math.log(2), abs=2e-3)
