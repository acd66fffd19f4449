"""Inputs of people who compose models: checkpoints, tokenizers, files and interruptions as they are in the field.

The references are transformers' own tokenizers and generation, csv and json, and a run that was never interrupted.
"""

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from calm_pytorch import CALM, AugmentParams, CrossAttentionBlock, FineTuner, evaluate
from calm_pytorch.cli import main
from calm_pytorch.cli.models import Models
from calm_pytorch.model.adapter_files import read_adapter
from calm_pytorch.training.data import TextExamples, read_documents
from lm_core.tokenizers import load_tokenizer

COMPILE = torch.compile
WORDS = [f"w{number}" for number in range(36)]
CHAT = (
    "{% for m in messages %}{{ '<bos> ' if loop.first else '' }}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
)


def word_tokenizer(words, *, bos=True):
    """A fast tokenizer of words that begins texts with BOS, as Llama's and Gemma's do."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: id_ for id_, token in enumerate(["<unk>", "<bos>", "<eos>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="module")
def folders(model_of, tmp_path_factory):
    """Folders of an anchor, an augment with its tokenizer, one with another and an encoder; and a file of texts."""
    root = tmp_path_factory.mktemp("models")
    anchor = model_of("llama")
    anchor.generation_config.eos_token_id = [2, 3]
    tokenizers = {"same": word_tokenizer(WORDS), "other": word_tokenizer(WORDS[::-1], bos=False)}
    for name, model, tokenizer in (
        ("anchor", anchor, "same"),
        ("augment", model_of("gpt2", seed=1), "same"),
        ("other", model_of("gpt2", seed=2), "other"),
        ("encoder", model_of("bert", seed=3), "other"),
        ("half", model_of("llama").to(torch.bfloat16), "same"),
    ):
        model.save_pretrained(root / name)
        tokenizers[tokenizer].save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    (root / "texts").mkdir()
    for number in range(6):
        chosen = torch.randint(0, 36, (20,), generator=generator).tolist()
        (root / "texts" / f"{number}.txt").write_text(" ".join(WORDS[word] for word in chosen))
    return root


@pytest.fixture
def train(folders, tmp_path):
    """``train(name, *flags)``: a short run of the command, into the folder that is returned."""

    def run(name, *flags, augment="augment", data=None, steps=2):
        chosen = ["--anchor", folders / "anchor", "--augments", folders / augment, "--data", data or folders / "texts"]
        sizes = ["--sequence_length", 8, "--max_steps", steps, "--batch_size", 2, "--checkpoint_dir", tmp_path / name]
        # a test's flags come last, so they win
        assert main(["train", *map(str, [*chosen, *sizes, "--device", "cpu", *flags])]) == 0
        return tmp_path / name

    return run


def loaded(folders, *augments, anchor="anchor", mode=None):
    names = [str(folders / name) for name in augments]
    return Models(anchor=str(folders / anchor), augments=names, mode=mode, device="cpu").load()


# ------------------------------------------------------------------------------------------- pretrained language models


@pytest.mark.parametrize("source", ["file", "folder", "glob"])
def test_texts_are_trained_on_as_files_folders_and_globs(folders, train, capsys, source):
    data = {"file": folders / "texts" / "0.txt", "folder": folders / "texts", "glob": f"{folders}/texts/*.txt"}[source]
    train("run", data=data)
    documents = 1 if source == "file" else 6
    assert f"{documents} documents in {3 * documents} rows of up to 8 tokens" in capsys.readouterr().out


def test_ids_begin_as_the_tokenizer_begins_them(folders):
    tokenizer = load_tokenizer(folders / "anchor")
    examples = TextExamples(read_documents(folders / "texts" / "0.txt"), tokenizer, 8)
    expected = tokenizer.tokenizer((folders / "texts" / "0.txt").read_text())["input_ids"]
    assert expected[0] == tokenizer.bos_id
    assert [id_ for seq, _, _ in examples for id_ in seq] == expected


@pytest.mark.parametrize("prompts", [False, True])
def test_every_text_is_trained_on_however_short_and_padding_changes_nothing(folders, prompts):
    tokenizer = load_tokenizer(folders / "anchor")
    texts = [("short", "w1 w2"), ("long", " ".join(WORDS[:20])), ("empty", "")]
    examples = TextExamples(texts, tokenizer, 8, readers=[None] * prompts)
    assert examples.left_out == 1  # the text without words
    batch = examples.collate([examples[index] for index in range(len(examples))])
    counted = int((batch["seq"] != -1).sum())
    # the first piece of a text is only read by the augment
    assert counted == (2 + 13 if prompts else 3 + 21)  # of 3 and 21 tokens, BOS among them
    calm = loaded(folders, "augment", mode="prompt" if prompts else "shared").calm
    rows = [examples.collate([examples[index]]) for index in range(len(examples))]
    alone = sum(float(calm(**row, reduction="sum").detach()) for row in rows)
    assert float(calm(**batch, reduction="sum").detach()) == pytest.approx(alone, rel=1e-5)


def test_an_augment_reads_prompts_in_the_ids_of_its_own_tokenizer(folders):
    models = loaded(folders, "other", "augment", "encoder", mode="prompt")
    examples = TextExamples(read_documents(folders / "texts" / "0.txt"), models.tokenizer, 8, readers=models.readers)
    words = (folders / "texts" / "0.txt").read_text().split()
    seq, _, (other, same, encoder) = examples[0]
    assert same == models.tokenizer.tokenizer(" ".join(words[:7]))["input_ids"]
    assert other == encoder == [39 - WORDS.index(word) for word in words[:7]]
    assert seq == [4 + WORDS.index(word) for word in words[7:15]]


def test_a_shared_sequence_of_models_with_different_tokenizers_is_refused_by_name(folders):
    with pytest.raises(ValueError, match=r"augment .*other must have the anchor's tokenizer in mode shared"):
        loaded(folders, "other")


def test_the_trained_part_of_a_composition_in_bfloat16_is_float32(folders, train, capsys):
    run = train("run", "--anchor", str(folders / "half"), steps=4)
    assert "frozen in bfloat16, float32, trained in float32" in capsys.readouterr().out
    from safetensors.torch import load_file

    state = load_file(run / "adapter" / "adapter.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    calm = loaded(folders, "augment", anchor="half").calm
    assert {parameter.dtype for parameter in calm.anchor_llm.parameters()} == {torch.bfloat16}


def test_trained_weights_in_bfloat16_become_float32(folders, tmp_path, capsys):
    calm = loaded(folders, "augment", anchor="half").calm.to(torch.bfloat16)
    before = {name: value.clone() for name, value in calm.anchor_llm.state_dict().items()}
    data = [{"seq": torch.arange(6)}] * 4
    FineTuner(calm, max_steps=2, learning_rate=1e-5, batch_size=2, dataset=data, checkpoint_dir=tmp_path)()
    assert {parameter.dtype for parameter in calm.trainable_parameters()} == {torch.float32}
    assert "trained in float32" in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in calm.anchor_llm.state_dict().items())
    assert not any(module._forward_pre_hooks for module in calm.anchor_llm.modules())


def test_every_end_token_ends_a_text_as_in_transformers(folders, train, capsys):
    run = train("run", "--learning_rate", "1e-30")
    anchor = loaded(folders, "augment").calm.anchor_llm
    tokenizer = load_tokenizer(folders / "anchor").tokenizer
    capsys.readouterr()
    ended = set()
    for word in WORDS[:20]:
        assert (
            main(["generate", str(run), word, "--temperature", "0", "--max_new_tokens", "30", "--device", "cpu"]) == 0
        )
        ids = torch.tensor([tokenizer(word)["input_ids"]])
        options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": [2, 3]}
        expected = anchor.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        assert capsys.readouterr().out.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
        ended.add(int(expected[-1]))
    assert 3 in ended  # which the tokenizer alone does not name


@pytest.mark.parametrize("prompt", ["-", "@"])
def test_a_prompt_is_read_from_standard_input_or_a_file(folders, train, capsys, tmp_path, monkeypatch, prompt):
    run = train("run")
    (tmp_path / "prompt.txt").write_text("w1 w2")
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2"))
    texts = []
    for given in ("w1 w2", prompt if prompt == "-" else f"@{tmp_path / 'prompt.txt'}"):
        capsys.readouterr()
        assert main(["generate", str(run), given, "--top_k", "5", "--max_new_tokens", "9", "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_the_seed_covers_the_connections(folders, train):
    runs = [train(f"run {number}", "--seed", "5") for number in range(2)]
    first, second = ((run / "adapter" / "adapter.safetensors").read_bytes() for run in runs)
    assert first == second
    assert first != (train("run 2", "--seed", "6") / "adapter" / "adapter.safetensors").read_bytes()


def test_a_short_run_reaches_its_learning_rate(model_of, compose, tmp_path):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1))
    data = [{"seq": torch.arange(6), "prompt": torch.arange(4)}] * 4
    trainer = FineTuner(calm, max_steps=20, learning_rate=1e-3, batch_size=2, dataset=data, checkpoint_dir=tmp_path)
    trainer()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([5e-4] + [1e-3] * 19)


def test_the_command_normalises_states_as_pretrained_models_need_it(folders, train):
    wiring = read_adapter(train("run") / "adapter")
    assert wiring["attn_kwargs"]["norm_context"] is True
    assert read_adapter(train("plain", "--norm_context", "false") / "adapter")["attn_kwargs"]["norm_context"] is False
    block = CrossAttentionBlock(dim=16, dim_context=24, norm_context=True, zero_init_output=False)
    plain = CrossAttentionBlock(dim=16, dim_context=24, zero_init_output=False)
    plain.load_state_dict(block.state_dict())
    hidden = torch.randn(2, 5, 24)
    hidden[:, 0] *= 1000  # the first token of pretrained models
    normed = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt()
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(block(x, hidden), plain(x, normed))


def test_chats_are_trained_on_by_template_and_the_answers_count(folders, train, tmp_path, capsys):
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 4)
    tokenizer = load_tokenizer(folders / "anchor")
    ((seq, counted, _), *_) = TextExamples(read_documents(tmp_path / "chats.jsonl"), tokenizer, 32)
    expected = tokenizer.tokenizer.apply_chat_template(chat, tokenize=False)
    assert seq == tokenizer.tokenizer(expected, add_special_tokens=False)["input_ids"]
    answer = [
        tokenizer.tokenizer.convert_ids_to_tokens(id_) for id_, counts in zip(seq, counted, strict=True) if counts
    ]
    assert answer[-4:] == ["w3", "w4", "w5", "<eos>"]
    assert "w2" not in answer
    train("run", data=tmp_path / "chats.jsonl")
    assert "4 documents in 8 rows" in capsys.readouterr().out


@pytest.mark.parametrize("answers", ["response", "completion", "answer"])
@pytest.mark.parametrize("chat", [False, True])
def test_of_a_prompt_with_an_answer_the_answer_counts(folders, tmp_path, answers, chat):
    row = {"prompt": "w1 w2", answers: "w3 w4"}
    if chat:
        row = {"prompt": [{"role": "user", "content": "w1 w2"}], answers: [{"role": "assistant", "content": "w3 w4"}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    tokenizer = load_tokenizer(folders / "anchor")
    (example,) = TextExamples(read_documents(tmp_path / "pairs.jsonl"), tokenizer, 32)
    seq, counted, prompts = example
    words = [tokenizer.tokenizer.convert_ids_to_tokens(id_) for id_ in seq]
    learned = [word for word, counts in zip(words, counted, strict=True) if counts]
    assert words[0] == "<bos>"
    assert learned[-3:] == ["w3", "w4", "<eos>"]
    assert "w2" not in learned
    assert prompts == []
    # an augment reads the prompt in its own ids, next to every piece of the answer
    other = load_tokenizer(folders / "other")
    examples = TextExamples(read_documents(tmp_path / "pairs.jsonl"), tokenizer, 4, readers=[None, other])
    starts = [start for start in range(0, len(seq), 4) if any(counted[start + 1 : start + 4])]
    assert [piece for piece, _, _ in examples] == [seq[start : start + 4] for start in starts]
    border = counted.index(True)
    for _, _, (same, own) in examples:
        assert same == seq[:border]
        assert own == [39 - 1, 39 - 2]


def test_further_arguments_reach_the_chat_template(folders, train, tmp_path):
    template = load_tokenizer(folders / "anchor").tokenizer
    template.chat_template = CHAT.replace("{{ m['role'] }}", "{{ word }}")
    template.save_pretrained(tmp_path / "worded")
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 4)
    tokenizer = load_tokenizer(tmp_path / "worded")
    examples = TextExamples(read_documents(tmp_path / "chats.jsonl"), tokenizer, 32, template_kwargs={"word": "w9"})
    assert tokenizer.tokenizer.convert_ids_to_tokens(examples[0][0])[:4] == ["<bos>", "w9", "w1", "w2"]
    train("run", "--template_kwargs", '{"word": "w9"}', data=tmp_path / "chats.jsonl")


def test_held_out_texts_are_scored_with_the_composition_and_the_anchor_alone(folders, train, capsys):
    run = train("run", steps=4)
    capsys.readouterr()
    assert main(["eval", str(run), str(folders / "texts"), "--sequence_length", "8", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    models = Models(anchor=str(run), device="cpu").load()
    examples = TextExamples(read_documents(folders / "texts"), models.tokenizer, 8)
    scores = evaluate(models.calm, examples, collate_fn=examples.collate, batch_size=4)
    # one row at a time, from full logits
    totals, count = torch.zeros(2, dtype=torch.float64), 0
    for index in range(len(examples)):
        seq = torch.tensor(examples[index][0])
        both = (models.calm(seq[None], return_loss=False)[0], models.calm.anchor_llm(seq[None]).logits[0])
        for place, logits in enumerate(both):
            log_probs = logits.detach().double().log_softmax(-1)[:-1]
            totals[place] -= log_probs.gather(1, seq[1:, None]).sum()
        count += len(seq) - 1
    assert scores.tokens == count
    assert [scores.loss, scores.anchor_loss] == pytest.approx((totals / count).tolist(), rel=1e-5)
    assert scores.loss != scores.anchor_loss
    assert f"{scores.loss:.4f} nats/token over {count} tokens" in out
    assert f"{scores.anchor_loss:.4f} nats/token of the anchor alone" in out


def test_a_number_of_connections_may_be_chosen(folders, train):
    assert read_adapter(train("run", "--num_connections", "2") / "adapter")["connections"] == [[[2, 2], [4, 4]]]
    with pytest.raises(ValueError, match="connect_every or num_connections"):
        Models(anchor="a", augments=["b"], connect_every=2, num_connections=2).load()


def rope_model(limit, seed=0):
    """A Llama whose rotary frequencies change where a sequence is longer than ``limit``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": limit, "factor": 4.0}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 9.0, 11.0]}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=40, initializer_range=0.5, rope_parameters=scaling, max_position_embeddings=64, **sizes
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "prompt"])
@pytest.mark.parametrize(("anchor", "augment"), [(8, None), (None, 8), (8, 12)])
def test_a_row_next_to_a_longer_one_has_the_rotary_frequencies_of_its_own_length(
    model_of, compose, ids, anchor, augment, shared
):
    models = [
        model_of("llama", seed) if limit is None else rope_model(limit, seed)
        for seed, limit in enumerate((anchor, augment))
    ]
    calm = compose(*models, trained=True, shared=shared)
    lengths, seq = [5, 8, 9, 13, 20], ids(5, 20)
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    seq = seq.masked_fill(~mask, -1)
    prompts = {} if shared else {"prompt": seq.flip(0)}
    logits = calm(seq, return_loss=False, **prompts)
    loss = calm(seq, reduction="sum", **prompts)
    total = 0.0
    for row, length in enumerate(lengths):
        own = {} if shared else {"prompt": seq[4 - row, : lengths[4 - row]][None]}
        alone = calm(seq[row, :length][None], return_loss=False, **own)[0]
        assert torch.allclose(logits[row, :length], alone, atol=1e-4)
        total += float(calm(seq[row, :length][None], reduction="sum", **own).detach())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    if shared:
        rows = [seq[row, :length] for row, length in enumerate(lengths)]
        settings = {"temperature": 0.0, "filter_fn": None, "output_keep_prompt": True}
        together = calm.generate(seq, 24, **settings)
        for row, prompt in enumerate(rows):
            assert torch.equal(together[row], calm.generate(prompt[None], 24, use_cache=False, **settings)[0])


def test_the_augment_may_be_on_another_device_than_the_anchor(model_of, compose, ids):
    # no values on the meta device, but an operation on tensors of two devices is refused there too
    calm = compose(model_of("x-transformers").to("meta"), model_of("gpt2", seed=1))
    seq = torch.zeros(2, 7, dtype=torch.long, device="meta")
    logits = calm(seq, prompt=ids(2, 5), prompt_mask=torch.arange(5) < torch.tensor([[5], [3]]), return_loss=False)
    assert (logits.device.type, logits.shape) == ("meta", (2, 7, 40))
    assert {parameter.device.type for parameter in calm.augment_llms.parameters()} == {"cpu"}


def test_code_of_a_folder_is_never_run_and_never_asked_about(folders, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "code"
    folder.mkdir()
    config = {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.C"}}
    config["auto_map"] |= {"AutoModelForCausalLM": "mine.M", "AutoModel": "mine.M"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    word_tokenizer(WORDS).save_pretrained(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for mode in ("shared", "prompt"):
        for anchor, augment in ((folder, folders / "augment"), (folders / "anchor", folder)):
            assert main(["describe", str(anchor), "--augments", str(augment), "--mode", mode]) == 1
            assert "error" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_an_augment_whose_config_names_files_of_its_own_is_refused(folders, tmp_path, capsys):
    config = {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"checkpoint_path": "evil.pkl"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [str(folders / "anchor"), "--augments", str(tmp_path), "--mode", "prompt"]
    assert main(["describe", *arguments]) == 1
    assert "augments must be models of text" in capsys.readouterr().err


def test_rows_of_mixed_tables_are_read_and_wrong_ones_named(folders, tmp_path):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    rows = [{"text": None, "messages": chat}, {"text": "w1 w2", "messages": None}]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [document for _, document in read_documents(tmp_path / "mixed.jsonl")] == [chat, "w1 w2"]
    for wrong, message in (
        ({"text": "\ud800"}, "line 2.*surrogate"),
        ({"prompt": "w1"}, "'text' is missing in .*line 2"),
        (
            {"prompt": "w1", "response": 3},
            "line 2.* must have a prompt and an answer of text or messages, got str and int",
        ),
        ({"prompt": [{"role": "user", "content": "w1"}], "response": None}, "'text' is missing in .*line 2"),
    ):
        (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[1], wrong)))
        with pytest.raises(ValueError, match=message):
            TextExamples(read_documents(tmp_path / "wrong.jsonl"), load_tokenizer(folders / "anchor"), 8)


# ---------------------------------------------------------------------------------------------- memory and composition


CALLS = {
    "forward, mask": lambda c, ids, mask: c(ids, mask=mask),
    "generate": lambda c, ids, mask: c.generate(ids, 8, prompt_mask=mask),
    "generate, masks": lambda c, ids, mask: c.generate([ids], 8, prompt_mask=[mask]),
    "language model": lambda c, ids, mask: c.as_causal_lm()(ids, mask=mask),
}
PROMPT_CALLS = {
    "forward, prompt_mask": lambda c, ids, mask: c(ids, prompt=ids, prompt_mask=mask),
    "augment_states": lambda c, ids, mask: c.augment_states(ids, mask),
    "alignment": lambda c, ids, mask: c(ids, prompt=ids, alignment=mask.unsqueeze(-1).expand(-1, -1, 5)),
    "language model, prompt_mask_0": lambda c, ids, mask: c.as_causal_lm()(ids, prompt_0=ids, prompt_mask_0=mask),
    "generate": CALLS["generate"],
}


@pytest.mark.parametrize("call", [*CALLS, *(f"prompt: {name}" for name in PROMPT_CALLS)])
def test_a_mask_of_integers_is_refused_in_every_call(model_of, compose, ids, call):
    shared = call in CALLS
    function = CALLS[call] if shared else PROMPT_CALLS[call.removeprefix("prompt: ")]
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), shared=shared)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with pytest.raises(TypeError, match="must be boolean"):
        function(calm, ids(2, 5), mask)
    function(calm, ids(2, 5), mask.bool())


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"num_mem_kv": 2}], ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_composition_is_copied_and_saved_whole(model_of, compose, ids, how, options):
    flash = model_of("x-transformers", attn_flash=True)
    calm = compose(flash, model_of("llama", seed=1), trained=True, attn_kwargs=options)
    inputs = {"prompt": ids(2, 4), "return_loss": False}
    before = calm(ids(2, 5), **inputs)
    if how == "deepcopy":
        other = copy.deepcopy(calm)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(calm))
    else:
        buffer = io.BytesIO()
        torch.save(calm, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(ids(2, 5), **inputs), before)
    with torch.no_grad():
        for parameter in other.trainable_parameters():
            parameter.add_(1.0)
    assert not torch.equal(other(ids(2, 5), **inputs), before)
    assert torch.equal(calm(ids(2, 5), **inputs), before)


@pytest.mark.parametrize("fails", ["safetensors.torch.save_file", "os.replace", "pathlib.Path.replace"])
def test_an_adapter_that_cannot_be_replaced_is_still_there(model_of, compose, ids, tmp_path, monkeypatch, fails):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True)
    calm.save_adapter(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fails, full)
        with torch.no_grad():
            next(calm.trainable_parameters()).add_(1.0)
        try:
            calm.save_adapter(tmp_path / "adapter", overwrite=True)
        except OSError:
            assert (tmp_path / "adapter" / "adapter.safetensors").read_bytes() == before
    compose(model_of("llama"), model_of("gpt2", seed=1)).load_adapter(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "adapter.safetensors"]


def test_an_adapter_of_a_compiled_part_is_that_of_the_part(model_of, compose, tmp_path):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True)
    calm.save_adapter(tmp_path / "plain")
    calm.cross_attns = torch.compile(calm.cross_attns)
    calm.save_adapter(tmp_path / "compiled")
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("plain", "compiled")]
    assert files[0] == files[1]


def test_a_tilde_is_the_home_of_the_user(folders, train, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train("run", "--checkpoint_dir", "~/mine")
    short = ["--augment_steps", "1", "--anchor_steps", "1", "--max_steps", "1", "--batch_size", "2", "--device", "cpu"]
    assert main(["train", *short, "--checkpoint_dir", "~/quick"]) == 0
    for name in ("mine", "quick"):
        assert (tmp_path / name / "adapter" / "adapter.safetensors").is_file()
        assert (tmp_path / name / "summary.json").is_file()
    assert not (tmp_path / "~").exists()


def test_a_run_without_a_checkpoint_says_that_it_starts_over(folders, monkeypatch, tmp_path, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FineTuner, "train", stop)
    flags = [
        "--anchor",
        str(folders / "anchor"),
        "--augments",
        str(folders / "augment"),
        "--data",
        str(folders / "texts"),
    ]
    flags += ["--batch_size", "2", "--checkpoint_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["train", *flags]) == 130
    assert "There is no checkpoint yet" in capsys.readouterr().err


def test_an_adapter_names_its_models_in_any_working_directory(folders, train, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folders)
    run = train("run", "--anchor", "anchor", "--augments", "other", "--mode", "prompt", "--connect_every", "2")
    monkeypatch.chdir(tmp_path)
    assert main(["describe", str(run), "--device", "cpu"]) == 0
    assert "layer   2 (32) -> anchor layer   2" in capsys.readouterr().out
    assert main(["generate", str(run), "w1 w2", "--max_new_tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("w1 w2")
    # settings that contradict the adapter are refused
    assert main(["describe", str(run), "--mode", "shared", "--augments", str(folders / "augment")]) == 1
    assert "shared_sequence is [True], but was [False]" in capsys.readouterr().err
    two = ["--augments", str(folders / "other"), str(folders / "augment")]
    assert main(["describe", str(run), *two, "--mode", "prompt"]) == 1
    assert "is an adapter of another wiring: connections is" in capsys.readouterr().err


@pytest.mark.parametrize("bias", ["alibi_pos_bias", "rel_pos_bias", "rotary_pos_emb"])
@pytest.mark.parametrize("shared", [True, False])
def test_prompts_of_different_lengths_are_continued_as_without_a_cache(model_of, compose, bias, shared):
    options = {bias: True}
    calm = compose(
        model_of("x-transformers", **options),
        model_of("x-transformers", seed=1, **options),
        trained=True,
        shared=shared,
    )
    prompt = torch.tensor([[3, 4, 5, -1, -1, -1], [7, 8, 9, 10, 11, 12], [13, -1, -1, -1, -1, -1]])
    cached, uncached = (calm.generate(prompt, 14, temperature=0.0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


# ------------------------------------------------------------------------------------------------------------ processes


def test_kept_states_are_the_same_bits_when_a_run_resumes(model_of, compose, stop_at, tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 9, 5, 12, 4, 7, 10, 6, 11, 8, 5, 9]
    data = [{"seq": torch.randint(0, 40, (7,), generator=generator), "prompt": torch.full((12,), -1)} for _ in lengths]
    for example, length in zip(data, lengths, strict=True):
        example["prompt"][:length] = torch.randint(0, 40, (length,), generator=generator)

    def run(name, trackers=()):
        calm = compose(model_of("llama"), model_of("bert", seed=1), trained=True)
        settings = {"max_steps": 9, "learning_rate": 1e-2, "batch_size": 3, "cache_augment_states": True}
        FineTuner(calm, dataset=data, checkpoint_dir=tmp_path / name, trackers=trackers, **settings).train()
        return calm.cross_attns.state_dict()

    whole = run("whole")
    for step in (2, 5, 7):
        run("parts", [stop_at(step)])
    resumed = run("parts")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_run_of_other_data_of_the_same_size_is_refused(model_of, compose, tmp_path):
    def tuner(changed=None):
        calm = compose(model_of("llama"), model_of("gpt2", seed=1))
        data = [{"seq": torch.arange(6) + (index == changed), "prompt": torch.arange(4)} for index in range(300)]
        return FineTuner(calm, max_steps=2, batch_size=2, dataset=data, checkpoint_dir=tmp_path)

    tuner()()
    with pytest.raises(ValueError, match="another run: data is"):
        tuner(changed=131)()
    tuner()()


def test_the_quickstart_resumes_where_it_was_interrupted(tmp_path, capsys):
    short = ["--augment_steps", "2", "--anchor_steps", "2", "--max_steps", "6", "--batch_size", "4"]
    assert main(["train", *short, "--checkpoint_dir", str(tmp_path / "whole")]) == 0
    for seconds in ("1e-9", "1e-9", "null"):
        flags = [*short, "--checkpoint_dir", str(tmp_path / "parts"), "--max_seconds", seconds]
        assert main(["train", *flags]) == 0
    assert "after 1 of 6 updates" in capsys.readouterr().out
    adapters = [(tmp_path / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("flag", ["--augment_steps", "--keys_share"])
def test_settings_of_the_quickstart_are_refused_with_an_anchor(folders, capsys, flag):
    arguments = ["--anchor", str(folders / "anchor"), "--augments", str(folders / "augment"), "--data", str(folders)]
    assert main(["train", *arguments, flag, "1"]) == 1
    assert f"{flag[2:]} must not be given with an anchor" in capsys.readouterr().err


def test_quickstart_defaults_do_not_reach_a_run_with_an_anchor(folders, capsys):
    for chosen, rate in (([], "0.002"), (["--anchor", "x"], "0.0003")):
        with pytest.raises(SystemExit):
            main(["train", *chosen, "--print_config"])
        assert f"learning_rate: {rate}\n" in capsys.readouterr().out


def test_the_default_filter_gives_way_to_common_keywords(model_of, compose, ids):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1))
    greedy = calm.generate(ids(2, 4), 9, temperature=0.0)

    def most_likely(logits):
        return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True), float("-inf"))

    for options in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"filters": [most_likely]}):
        assert torch.equal(calm.generate(ids(2, 4), 9, **options), greedy)
    with pytest.raises(TypeError):
        CALM(calm.anchor_llm, AugmentParams(calm.augment_llms[0])).generate(ids(2, 4), 9, top_q=1)


@pytest.mark.distributed
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("how", ["models", "models, fsdp", "quickstart"])
def test_of_two_processes_one_writes_and_prints(folders, tmp_path, how):
    quickstart = how == "quickstart"
    flags = ["--checkpoint_dir", str(tmp_path / "run"), "--max_steps", "2", "--batch_size", "2", "--device", "cpu"]
    if quickstart:
        flags += ["--augment_steps", "1", "--anchor_steps", "1"]
    else:
        chosen = {"anchor": folders / "anchor", "augments": folders / "augment", "data": folders / "texts"}
        flags += [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        flags += ["--fsdp", "true", "--sequence_length", "8"] if "fsdp" in how else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "calm_pytorch", "train", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("metrics     ") == 1
    assert done.stdout.count("parameters, reads") == (0 if quickstart else 1)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()
    if not quickstart:  # one process opens what two have written
        calm = Models(anchor=str(tmp_path / "run"), device="cpu").load().calm
        assert any(bool(block.attn.to_out.weight.any()) for block in calm.cross_attns[0])


@pytest.mark.parametrize("name", ["compile", "fsdp"])
def test_the_quickstart_neither_compiles_nor_shards(capsys, tmp_path, name):
    assert main(["train", f"--{name}", "true", "--checkpoint_dir", str(tmp_path / "run")]) == 1
    assert f"{name} must be false in the quickstart" in capsys.readouterr().err


# torch hides this warning of its own, unless warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("kind", "checkpointing"), [("llama", True), ("x-transformers", False)])
def test_a_compiled_anchor_trains_as_the_same_anchor(
    model_of, compose, ids, tmp_path, monkeypatch, kind, checkpointing
):
    compiled = []

    def counted(function, **options):
        compiled.append(function)
        return COMPILE(function, backend="aot_eager")  # inductor would take a minute

    monkeypatch.setattr(torch, "compile", counted)
    rows = [{"seq": row} for row in ids(8, 6)]
    learned = []
    for compile_blocks in (False, True):
        calm = compose(model_of(kind), model_of("gpt2", seed=1), shared=True)
        settings = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "gradient_checkpointing": checkpointing}
        folder = tmp_path / str(compile_blocks)
        trainer = FineTuner(calm, dataset=rows, checkpoint_dir=folder, compile=compile_blocks, **settings)
        trainer.train()
        learned.append(calm.cross_attns.state_dict())
        assert bool(compiled) == compile_blocks
    for name, value in learned[0].items():
        assert torch.allclose(learned[1][name], value, atol=1e-5)
