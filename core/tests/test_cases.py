"""Inputs from the field that went wrong once, by kind, with the right outcome of each."""

import io
import json
import sys
from functools import partial

import pytest
import torch

from lm_core.adapters import as_causal_lm
from lm_core.adapters.loading import load_causal_lm, lora
from lm_core.cli.corpus import TextCorpus
from lm_core.cli.parser import preset_name
from lm_core.cli.text_generation import SamplingFlags, TextGeneration, read_prompt
from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate
from lm_core.generation.sampling import filters_of
from lm_core.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    as_tokenizer,
    continuation_text,
    end_ids,
    full_text,
    prompt_ids,
)

# of peft, about renamed attributes of transformers and Mamba's kernels
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:.*mamba.*")


def test_a_prompt_is_read_from_the_words_a_file_or_standard_input(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("\N{BYTE ORDER MARK}Zürich\n".encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert read_prompt("words") == "words"
    assert read_prompt("-") == "from a pipe"
    assert read_prompt(f"@{tmp_path / 'prompt.txt'}") == "Zürich\n"
    (tmp_path / "prompt.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match="prompt must be UTF-8 text"):
        read_prompt(f"@{tmp_path / 'prompt.txt'}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be a number in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"min_p must be a number in \[0, 1\], got -0.1"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0, got 0.0"),
    ],
)
def test_sampling_flags_are_checked_before_a_model_is_loaded(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingFlags(**values)
    with pytest.raises(ValueError, match=message):
        TextGeneration(**values)


def test_sampling_keywords_of_generate_are_the_filters_of_the_same_name():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3

    def model(ids):
        return logits.expand(*ids.shape, 50)

    def draw(**keywords):
        generator = torch.Generator().manual_seed(1)
        return generate(model, torch.zeros(8, 1, dtype=torch.long), max_new_tokens=6, generator=generator, **keywords)

    values = {"top_k": 20, "top_p": 0.8, "min_p": 0.05}
    assert torch.equal(draw(**values).tokens, draw(filters=filters_of(**values)).tokens)
    assert not torch.equal(draw(**values).tokens, draw().tokens)
    with pytest.raises(ValueError, match="top_p must be"):
        draw(top_p=2.0)


def test_held_out_text_may_come_from_its_own_source(tmp_path):
    (tmp_path / "train.txt").write_text("training text")
    (tmp_path / "held-out.txt").write_text("held out")
    _, corpus = TextCorpus(data=str(tmp_path / "train.txt"), validation_data=str(tmp_path / "held-out.txt")).load()
    assert bytes(corpus.train[0].tolist()) == b"training text"
    assert bytes(corpus.validation[0].tolist()) == b"held out"


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"preset": None, "data": "stdlib", "model": None}, "quickstart"),
        ({"preset": None, "data": "mine.txt", "model": None}, "small"),
        ({"preset": None, "data": None, "model": "runs/mine"}, "small"),
        ({"preset": "large", "data": None, "model": None}, "large"),
    ],
)
def test_toy_settings_are_for_runs_without_own_data_and_model(chosen, name):
    assert preset_name(chosen, "data", "model") == name


# ------------------------------------------------------------------------------------ pretrained models and tokenizers


def sentencepiece(words, **special):
    """A tokenizer in the manner of SentencePiece that adds BOS, as those of Llama and Gemma do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<turn>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<turn>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **special)


CAT = ["▁the", "▁cat", "▁sat"]


def tiny_llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 259, "num_key_value_heads": 2, **sizes, **settings}))


def test_prompt_ids_are_those_of_the_called_tokenizer():
    tokenizer = sentencepiece(CAT)
    ours = as_tokenizer(tokenizer)
    assert prompt_ids(ours, "the cat") == tokenizer("the cat")["input_ids"] == [1, 4, 5]
    assert ours.encode("the cat") == [4, 5]
    assert prompt_ids(ByteTokenizer(), "hé") == list("hé".encode())


def test_a_rendered_chat_template_gets_no_second_bos():
    tokenizer = sentencepiece(CAT)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}<turn>{% endfor %}"
    messages = [{"role": "user", "content": "the cat"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt_ids(as_tokenizer(tokenizer), text) == tokenizer.apply_chat_template(messages)["input_ids"]


def test_every_named_end_token_ends():
    model = tiny_llama(eos_token_id=2)
    model.generation_config.eos_token_id = [2, 7]
    assert end_ids(sentencepiece(CAT), model) == (2, 7)
    assert end_ids(as_tokenizer(sentencepiece(CAT)), as_causal_lm(model)) == (2, 7)
    model.generation_config.eos_token_id = [9, 50_256]
    assert end_ids(ByteTokenizer(), model) == (9, 257, 2)  # 50,256 is no token of this model
    assert end_ids() == ()
    assert end_ids(ByteTokenizer()) == (257,)


def test_a_printed_continuation_keeps_the_space_to_its_prompt():
    tokenizer = as_tokenizer(sentencepiece(CAT))
    assert continuation_text(tokenizer, [1, 4, 5], [6]) == " sat"
    assert tokenizer.decode([6]) == "sat"
    assert continuation_text(ByteTokenizer(), list(b"caf"), list("é".encode())) == "é"


def test_text_with_special_tokens_shows_them():
    tokenizer = as_tokenizer(sentencepiece(CAT))
    assert "<turn>" in full_text(tokenizer, [4, 3])
    assert "<turn>" not in tokenizer.decode([4, 3])
    assert full_text(ByteTokenizer(), b"ab") == "ab"


def test_any_tokenizer_is_taken_as_it_is(tmp_path):
    tokenizer = sentencepiece(CAT)
    tokenizer.save_pretrained(tmp_path)
    for source in (tokenizer, HuggingFaceTokenizer(tokenizer), tmp_path, str(tmp_path)):
        assert as_tokenizer(source).encode("the cat") == [4, 5]
    assert as_tokenizer("bytes") == as_tokenizer(ByteTokenizer()) == ByteTokenizer()
    with pytest.raises(TypeError, match=r"tokenizer must be .* got object without encode, decode, vocab_size, eos_id"):
        as_tokenizer(object())


def test_a_lone_surrogate_is_named():
    with pytest.raises(ValueError, match=r"text must be valid Unicode, got the lone surrogate '\\ud800' at position 4"):
        as_tokenizer(sentencepiece(CAT)).encode("the \ud800")


@pytest.mark.parametrize("decode", [generate, partial(beam_search, beams=2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(decode, temperature):
    def model(ids):
        return torch.full((*ids.shape, 5), float("nan"))

    settings = {"temperature": temperature} if decode is generate else {}
    with pytest.raises(ValueError, match="logits must not hold NaN"):
        decode(model, torch.zeros(1, 2, dtype=torch.long), max_new_tokens=3, eos_id=4, **settings)


def test_draws_of_a_row_with_its_own_generator_do_not_depend_on_the_other_rows():
    def model(ids):
        return torch.linspace(0, 2, 12).expand(*ids.shape, 12)

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [torch.tensor([0, 1])] * len(seeds)
        return generate(model, rows, max_new_tokens=12, eos_id=11, generator=generators)

    together = draw(range(6))
    for seed in range(6):
        alone = draw([seed])
        length = int(alone.lengths)
        assert int(together.lengths[seed]) == length
        assert torch.equal(together.tokens[seed, :length], alone.tokens[0])
    with pytest.raises(ValueError, match="generator must have one entry a row"):
        generate(model, torch.zeros(2, 1, dtype=torch.long), max_new_tokens=1, generator=[torch.Generator()])


def test_a_model_is_loaded_from_any_folder_in_its_stored_dtype(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model = load_causal_lm(tmp_path / "base")
    assert model.dtype == torch.bfloat16
    assert load_causal_lm(str(tmp_path / "base"), dtype=torch.float32).dtype == torch.float32
    adapted = lora(model, r=2)
    adapted.save_pretrained(tmp_path / "adapter")
    opened = load_causal_lm(tmp_path / "adapter")
    assert {name for name, p in opened.named_parameters() if p.requires_grad} == {
        name for name, p in adapted.named_parameters() if p.requires_grad
    }
    assert load_causal_lm(model) is model
    with pytest.raises(FileNotFoundError, match="policy must be a folder or organisation/name"):
        load_causal_lm("./nowhere", name="policy")


def test_code_of_a_folder_is_not_run_and_nothing_is_asked(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {n: f"code.{n}" for n in ("AutoConfig", "AutoModelForCausalLM")}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "adapter").mkdir()
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "model"),
        "r": 2,
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    for folder in ("model", "adapter"):
        with pytest.raises(ValueError, match="could not be loaded by transformers"):
            load_causal_lm(tmp_path / folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconH1", "Llama"])
def test_default_lora_targets_leave_out_what_peft_refuses(kind):
    import transformers

    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1}
    if kind == "Mamba2":
        sizes |= {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4}
    if kind in ("FalconH1", "Llama"):
        sizes |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    if kind == "FalconH1":
        sizes |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    linear = {name.split(".")[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    trained = {name.split(".")[-4] for name, p in lora(model, r=2).named_parameters() if p.requires_grad}
    assert trained == linear - {"lm_head", *(() if kind == "Llama" else ("out_proj",))}


def test_adapters_are_not_added_to_adapters():
    with pytest.raises(ValueError, match=r"model must have no adapters, got \['default'\]"):
        lora(lora(tiny_llama(), r=2), r=4)
