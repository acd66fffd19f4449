"""Inputs from the field that went wrong once, by kind, with the right outcome of each."""

import copy
import io
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from lm_core.adapters import as_causal_lm
from lm_core.adapters.loading import load_causal_lm, lora
from lm_core.checkpoints.checkpoint import list_checkpoints, save_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import run_command
from lm_core.cli.parser import command_parser, preset_name
from lm_core.cli.text_generation import SamplingFlags, TextGeneration, read_prompt
from lm_core.distributed import data_parallel, release
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
    load_tokenizer,
    prompt_ids,
)
from lm_core.training.config import CommonSettings
from lm_core.training.metrics import read_metrics
from lm_core.training.precision import float32_masters
from lm_core.training.run_directory import RunDirectory
from lm_core.training.session import TrainingSession, adamw

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


# ------------------------------------------------------------------------------------------------- precision


def chosen_parts(model, part):
    """``model`` with only a part of it trained, as users do it."""
    from peft import LoraConfig, get_peft_model

    if part == "all":
        return model
    if part == "lora":
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).bfloat16()
    if part == "lora and head":
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).bfloat16()
    if part == "new tokens":
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


def gradients(model, ids, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.grad.dtype for p in trained.values()} == {torch.float32}
    return torch.cat([p.grad.flatten() for p in trained.values()])


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    "part", ["all", "lora", "lora and head", "new tokens", "q_proj", "norm", "lm_head", "layers.1"]
)
def test_any_part_of_a_bfloat16_model_is_trained_in_float32(part, autocast):
    ids = torch.randint(0, 259, (4, 12), generator=torch.Generator().manual_seed(0))
    sizes = {"num_hidden_layers": 2, "tie_word_embeddings": False, "initializer_range": 0.2}
    torch.manual_seed(1)
    model = chosen_parts(tiny_llama(**sizes).bfloat16(), part)
    reference = copy.deepcopy(model).float()
    frozen = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    precisions = float32_masters(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert "stored in bfloat16, trained in float32" in str(precisions)
    expected = gradients(reference, ids, autocast=False)
    assert torch.cosine_similarity(gradients(model, ids, autocast), expected, dim=0) > 0.99


def test_small_updates_of_a_bfloat16_model_are_kept(tmp_path):
    settings = CommonSettings(max_steps=3, learning_rate=1e-6, warmup=0.0, final_learning_rate=1.0, device="cpu")
    model = tiny_llama().bfloat16()
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    session = TrainingSession("Trainer", config=settings, checkpoint_dir=None)
    session.register(model=model, optimizer=lambda: adamw(model, settings))
    ids = torch.arange(40).reshape(2, 20)
    with session.run():
        for _ in session.steps():
            logits = session.module(input_ids=ids).logits
            session.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()))
            session.optimizer_step()
    changed = sum(int((p != before[name]).sum()) for name, p in model.named_parameters() if "embed" not in name)
    assert changed > 0.99 * sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    with session.precisions.as_stored():
        model.save_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert load_causal_lm(tmp_path).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- processes


def linear_session(folder, trackers=()):
    settings = CommonSettings(max_steps=4, validate_every=9, checkpoint_every=9, device="cpu")
    session = TrainingSession("Trainer", config=settings, checkpoint_dir=folder, trackers=trackers)
    model = torch.nn.Linear(2, 2)
    session.register(model=model, optimizer=lambda: adamw(model, settings))
    return session


def train(session, at=lambda step: None):
    with session.run():
        for step in session.steps():
            at(step)
            session.backward(session.module(torch.ones(1, 2)).square().sum())
            session.log(session.optimizer_step())
    return session.outcome, [path.name for path in list_checkpoints(session.checkpoint_dir / "checkpoints")]


def test_a_deleted_metrics_file_does_not_end_a_run(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert train(linear_session(tmp_path), lambda step: step == 2 and log.unlink()) == ("finished", ["step-4"])
    assert [row["step"] for row in read_metrics(log)] == [3, 4]


def test_a_tracker_that_raises_does_not_end_a_run(tmp_path):
    class Offline:
        def log(self, values, step):
            raise ConnectionError("no route to the server")

    with pytest.warns(UserWarning, match="tracker Offline raised ConnectionError: no route .* the run continues"):
        assert train(linear_session(tmp_path, [Offline()])) == ("finished", ["step-4"])


def test_one_process_of_several_is_refused(monkeypatch):
    # the environment of `accelerate launch --cpu --num_processes 2`
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="started one, as it does on a CPU; start with torchrun --nproc_per_node N"):
        linear_session(None)


def test_tasks_of_srun_that_are_runs_of_their_own_are_named(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.warns(UserWarning, match="srun started 4 tasks, each of which is a run of its own; start one torchrun"):
        linear_session(None)


PROCESSES = """
import json, os, signal, sys, torch, torch.distributed as dist
from torch import nn
from lm_core.distributed import all_gather, rank
from lm_core.training.config import CommonSettings
from lm_core.training.run_directory import RunDirectory
from lm_core.training.session import TrainingSession, adamw

settings = CommonSettings(max_steps=6, validate_every=99, checkpoint_every=99, device="cpu")
folder, gradients, action = sys.argv[1:]

class Objective(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(rank())  # adapters made before anything is seeded
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
    def forward(self, rows):
        return self.frozen(self.used(rows)).square().mean()

session = TrainingSession("Trainer", config=settings, checkpoint_dir=folder)
assert dist.get_world_size() == 2
model = Objective()
session.register(model=model, optimizer=lambda: adamw(model, settings), gradients=gradients)
def draw():
    if session.step == 3 and rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return True

with session.run():
    for step in session.steps():
        if action == "terminate" and step == 2:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        if action == "draw" and session.interruptible(draw) is None:
            break
        module = session.module if gradients == "average" else model
        session.backward(module(torch.randn(2, 4)))
        session.log(session.optimizer_step())
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
both = all_gather(weights[None])[0]
assert torch.equal(both[0], both[1]), (both[0] - both[1]).abs().max()
if rank() == 0:
    print(json.dumps([session.outcome, session.step, sorted(os.listdir(os.path.join(folder, "checkpoints")))]))
"""


@pytest.mark.distributed
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize(
    ("gradients", "action", "outcome"),
    [
        ("average", "train", ["finished", 6]),
        ("sum", "train", ["finished", 6]),
        ("sum", "terminate", ["interrupted", 3]),
        ("average", "draw", ["interrupted", 3]),
    ],
)
def test_two_processes_train_one_model_whatever_they_began_with(tmp_path, gradients, action, outcome):
    (tmp_path / "script.py").write_text(PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "run"), gradients, action]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launcher + arguments, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of 4 trained tensors have no gradient in the first update: unused.weight, unused.bias\n" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == [*outcome, [f"step-{outcome[1]}"]]


# ------------------------------------------------------------------------------------- positions of other libraries


def rope_model(kind, original=16):
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"rope_type": kind, "rope_theta": 10_000.0, "original_max_position_embeddings": original, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 9.0, 11.0]}
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    positions = {"rope_parameters": scaling, "max_position_embeddings": 64 if kind == "longrope" else original}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.5, **sizes, **positions)
    return LlamaForCausalLM(config).eval()


LENGTHS = [3, 12, 16, 17, 30]


def test_rotary_scaling_by_length_is_that_of_each_row_alone():
    model = rope_model("longrope")
    rows = [torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    adapted = as_causal_lm(model)
    with torch.no_grad():
        right, left = adapted(ids, mask=mask), adapted(_left(rows), mask=mask.flip(1))
        for index, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            assert torch.allclose(right[index, : len(row)], alone, atol=1e-4)
            assert torch.allclose(left[index, -len(row) :], alone, atol=1e-4)


def _left(rows):
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])


def bare_greedy(model, row, steps):
    """Greedy decoding by calls of the bare model on the whole sequence."""
    ids = row[None]
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, len(row) :]


@torch.no_grad()
def test_decoding_past_a_change_of_the_rotary_scaling_equals_the_bare_model():
    model = rope_model("longrope")
    rows = [torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    expected = torch.stack([bare_greedy(model, row, 10) for row in rows])
    assert torch.equal(generate(model, rows, max_new_tokens=10, temperature=0.0).tokens, expected)
    adapted = as_causal_lm(model)
    cache = adapted.init_cache(1, 40)
    adapted(rows[4][None, :10], cache=cache)
    with pytest.raises(ValueError, match="cache must end within 16 positions of LlamaForCausalLM, whose rotary freq"):
        adapted(rows[4][None, 10:], cache=cache)


def test_rotary_scaling_that_depends_on_earlier_calls_is_refused_past_its_length():
    adapted = as_causal_lm(rope_model("dynamic"))
    assert adapted(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 64)
    with pytest.raises(ValueError, match="ids must end within 16 positions, got 17"):
        adapted(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("positions", ["alibi_pos_bias", "rotary_pos_emb", "rotary_xpos"])
def test_prompts_of_different_lengths_decode_from_a_cache_of_x_transformers_as_without(positions, flash, dtype):
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=16, depth=2, heads=4, attn_dim_head=32, attn_flash=flash, **{positions: True})
    settings = {"num_tokens": 64, "max_seq_len": 64, "use_abs_pos_emb": False, "attn_layers": layers}
    model = as_causal_lm(x_transformers.TransformerWrapper(**settings).eval().to(dtype))
    rows = [torch.arange(n) for n in (2, 7, 30)]
    cached, uncached = (generate(model, rows, max_new_tokens=6, temperature=0.0, use_cache=u) for u in (True, False))
    assert not cached.log_probs.isnan().any()
    if dtype != torch.bfloat16:  # ties of rounding
        assert torch.equal(cached.tokens, uncached.tokens)
    assert torch.allclose(
        cached.log_probs[:, 0], uncached.log_probs[:, 0], atol=0.1 if dtype == torch.bfloat16 else 1e-5
    )


def test_states_are_offered_where_logits_are_no_product_of_them():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, num_key_value_heads=2, head_dim=8, **sizes)).eval()
    adapted = as_causal_lm(model)
    ids = torch.arange(12).reshape(2, 6)
    assert not hasattr(adapted, "hidden")
    with torch.no_grad():
        assert torch.allclose(adapted.states(ids), model.model(ids).last_hidden_state, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["[0, 1, 2]"], ["0", "1", "2"]),
        (["[cat, yes]"], ["cat", "yes"]),
        (["[a].png"], ["[a].png"]),
        (["0", "[b].png"], ["0", "[b].png"]),
        (["a b", "c"], ["a b", "c"]),
    ],
)
def test_words_of_a_list_of_texts_are_texts(words, values):
    chosen = []

    def work(*, names: list[str]) -> int:
        chosen.extend(names)
        return 0

    parser = command_parser("lm", "description", {"work": work}, package="lm_core")
    assert run_command(parser, ["work", "--names", *words]) == 0
    assert chosen == values


def test_adapters_of_transposed_layers_are_made_without_a_warning():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    trained = {
        name.split(".")[-4]
        for name, p in lora(GPT2LMHeadModel(GPT2Config(**sizes)), r=2).named_parameters()
        if p.requires_grad
    }
    assert trained == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.plain
@pytest.mark.parametrize("position", range(4))
def test_every_entry_of_a_list_of_end_tokens_is_checked(position):
    ids = [1, 2, 3, 4]
    ids[position] = "2"
    with pytest.raises(TypeError, match=r"eos_id"):
        generate(lambda ids: torch.zeros(*ids.shape, 5), torch.ones(1, 1).long(), max_new_tokens=1, eos_id=ids)


def test_a_tracker_that_cannot_finish_does_not_fail_a_finished_run(tmp_path):
    class Offline:
        name = "offline"

        def finish(self):
            raise ConnectionError("no route")

    session = linear_session(tmp_path)
    session.accelerator.trackers = [Offline()]
    session._tracker_names = ["offline"]
    session.accelerator.init_trackers = lambda *_, **__: None
    session.accelerator.log = lambda *_, **__: None
    with pytest.warns(UserWarning, match="tracker offline raised ConnectionError: no route"):
        assert train(session)[0] == "finished"


def test_a_run_stopped_at_once_says_where_the_same_command_begins(tmp_path, capsys):
    def work(*, checkpoint_dir: str) -> int:
        if steps:
            save_checkpoint(tmp_path / "checkpoints", steps, model=torch.nn.Linear(1, 1))
        raise KeyboardInterrupt

    parser = command_parser("lm", "description", {"work": work}, package="lm_core")
    for steps, advice in (  # noqa: B007 - read by the command
        (0, "There is no checkpoint yet, so the same command starts over:"),
        (3, "The run resumes from its newest checkpoint:"),
    ):
        assert run_command(parser, ["work", "--checkpoint_dir", str(tmp_path)]) == 130
        assert f"Stopped at once. {advice}\n" in capsys.readouterr().err


def test_a_folder_without_all_weights_is_refused(tmp_path):
    tiny_llama(tie_word_embeddings=False).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"policy .* holds no whole LlamaForCausalLM, it lacks lm_head.weight"):
        load_causal_lm(tmp_path, name="policy")


def test_an_adapter_whose_base_lacks_weights_is_refused(tmp_path):
    base = tiny_llama(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "whole")
    base.model.save_pretrained(tmp_path / "base")  # without the output layer
    adapted = lora(load_causal_lm(tmp_path / "whole"), r=2)
    adapted.save_pretrained(tmp_path / "adapter")
    opened = load_causal_lm(tmp_path / "adapter")
    assert type(opened).__name__ == "PeftModelForCausalLM"
    ids = torch.arange(6)[None]
    assert torch.equal(opened.eval()(ids).logits, adapted.eval()(ids).logits)
    assert any(parameter.requires_grad for parameter in opened.parameters())

    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "whole"), str(tmp_path / "base")))
    message = r"the base of policy '.*adapter', '.*base' holds no whole LlamaForCausalLM, it lacks lm_head.weight"
    with pytest.raises(ValueError, match=message):
        load_causal_lm(tmp_path / "adapter", name="policy")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 150}),
        ("GPT2", {"n_positions": 10**8}),
    ],
)
def test_a_folder_that_describes_gigabytes_it_does_not_hold_is_refused(tmp_path, kind, sizes):
    transformers = pytest.importorskip("transformers")
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=259, **small)
    model = tiny_llama() if kind == "Llama" else transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    assert isinstance(load_causal_lm(tmp_path), type(model))
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **sizes}))
    with pytest.raises(CheckpointError, match=rf"describes a {kind}\w+ of [\d,]+ weights and holds [\d,]+"):
        load_causal_lm(tmp_path)


def test_a_tilde_in_a_path_of_a_file_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sentencepiece(CAT).save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer("~/tokenizer").encode("the cat") == [4, 5]
    assert train(linear_session("~/runs/a")) == ("finished", ["step-4"])
    run = RunDirectory("~/runs/b")
    with run:
        assert run.path == tmp_path / "runs" / "b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "tokenizer"]


@pytest.mark.distributed
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # renamed in transformers 5
@pytest.mark.parametrize("reentrant", [False, True])
def test_reentrant_checkpointing_trains_under_data_parallelism(reentrant):
    model = tiny_llama(num_hidden_layers=2).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = data_parallel(model, torch.device("cpu"))
        for _ in range(2):
            wrapped(input_ids=torch.ones(2, 4).long(), use_cache=False).logits.sum().backward()
        release(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters())


def test_a_tokenizer_folder_that_names_itself_or_is_nested_too_deeply_is_refused(tmp_path):
    config = tmp_path / "adapter_config.json"
    for content in (json.dumps({"base_model_name_or_path": str(tmp_path)}), "{}", "[" * 100_000):
        config.write_text(content)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            load_tokenizer(tmp_path)
    config.unlink()
    (tmp_path / "byte_tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a byte tokenizer's file"):
        load_tokenizer(tmp_path)
