"""Inputs of people who do this work: each case of the field that went wrong, with the right value.

The references are transformers, peft, json and naive loops.
"""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from lm_core.checkpoints.checkpoint import latest_checkpoint
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.tokenizers import ByteTokenizer
from lm_core.training.metrics import read_metrics
from palm_rlhf import PaLM
from palm_rlhf.cli import main
from palm_rlhf.data.preferences import load_preferences
from palm_rlhf.data.prompts import load_prompts
from palm_rlhf.data.rollouts import rollout_of
from palm_rlhf.reward.model import RewardModel
from palm_rlhf.reward.rewards import ClassifierReward, as_reward, reward_identity
from palm_rlhf.reward.trainer import RewardModelTrainer
from palm_rlhf.rl.advantages import group_advantages, leave_one_out_advantages, whiten
from palm_rlhf.rl.policy import ActorCritic
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer

# peft uses an attribute that newer transformers have renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A byte-level tokenizer of transformers that adds BOS, with a chat template and a turn's end of its own."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    backend = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
    backend.train_from_iterator(["ab"], vocab_size=300, special_tokens=special)
    raw = tokenizers.Tokenizer.from_str(backend.to_str())
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=special[2:],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def chat_model(chat_tokenizer):
    """``chat_model(**config)``: a tiny Llama with the vocabulary of ``chat_tokenizer``."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")

    def make(**config):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings = {"vocab_size": len(chat_tokenizer), "initializer_range": 0.4, "max_position_embeddings": 128}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **{**settings, **config})).eval()

    return make


def lengths_of(prompts, completions):
    return [len(text) / 4 for text in completions]


def train_briefly(model, kind=RLHFTrainer, **changes):
    settings = {"prompt_token_ids": [torch.tensor([1, 2, 3]), torch.tensor([4, 5])], "device": "cpu", "epochs": 1}
    more = {"group_size": 4} if kind is GRPOTrainer else {}
    reward = changes.pop("reward", lambda ids, prompt_lengths: (ids == 5).float().mean(dim=1))
    trainer = kind(model, reward, **{**settings, **more, **changes})
    trainer.train(num_episodes=8, update_timesteps=8, max_new_tokens=4)
    return trainer


# ------------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize("size", [3, 7, 8])
@pytest.mark.parametrize("value", [1e6, 0.1, -3e7, 1 / 3])
def test_equal_rewards_have_an_advantage_of_exactly_zero(size, value):
    scores = torch.full((2 * size,), value)
    scores[size:] = 2 * value
    for scale in ("group", "batch", "none"):
        assert not group_advantages(scores, group_size=size, scale=scale).any()
    assert not leave_one_out_advantages(scores, group_size=size).any()
    assert not whiten(scores[None, :size], torch.ones(1, size, dtype=torch.bool)).any()


# ---------------------------------------------------------------------------------------- text, chats and end tokens


def test_a_text_prompt_is_what_the_tokenizer_gives_and_a_template_does_not_get_a_second_bos(chat_tokenizer, chat_model):
    trainer = RLHFTrainer(
        chat_model(), lengths_of, prompts=["ab", {"prompt": CHAT}], tokenizer=chat_tokenizer, device="cpu"
    )
    text, chat = (prompt.ids.tolist() for prompt in trainer.prompts)
    assert text == chat_tokenizer("ab")["input_ids"]
    assert text[0] == chat_tokenizer.bos_token_id
    expected = chat_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat == expected
    assert trainer.prompts[1].text == chat_tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, tokenize=False
    )
    (pair,) = load_preferences([{"prompt": "ab", "chosen": "a", "rejected": "b"}], tokenizer=trainer.tokenizer)
    assert pair.prompt.tolist() == text
    assert pair.chosen.tolist() == [*chat_tokenizer("a", add_special_tokens=False)["input_ids"], 1]


def test_every_end_token_of_the_generation_config_ends_a_response(chat_tokenizer, chat_model):
    model = chat_model()
    model.generation_config.eos_token_id = [1, 2]
    trainer = RLHFTrainer(model, lengths_of, prompts=["ab"], tokenizer=chat_tokenizer, device="cpu")
    assert set(trainer.sampling(max_new_tokens=4).eos_id) == {1, 2}
    ends = list(range(40))
    rollout = trainer.rollout(["ab"] * 16, sampling=trainer.sampling(max_new_tokens=60, eos_id=ends))
    for ids, first, last, ended in zip(
        rollout.ids.tolist(), rollout.prompt_lengths, rollout.lengths, rollout.finished, strict=True
    ):
        response = ids[int(first) : int(last)]
        assert not set(response[:-1]) & set(ends)
        assert (response[-1] in ends) == bool(ended)
    assert rollout.finished.any()
    result = trainer.train(num_episodes=4, update_timesteps=4, max_new_tokens=8, eos_token=ends)
    assert result.metrics[0]["eos_rate"] > 0


def test_a_stop_string_may_be_a_special_token(chat_tokenizer, chat_model):
    model = chat_model()
    with torch.no_grad():  # the turn's end follows nearly everything
        model.lm_head.weight[2] = 0
    trainer = RLHFTrainer(model, lengths_of, prompts=["ab"], tokenizer=chat_tokenizer, device="cpu")

    def only_ends(logits):
        return logits.masked_fill(torch.arange(logits.shape[1]) != 2, -torch.inf)

    sampling = trainer.sampling(max_new_tokens=6, stop_strings=["<|end|>"], filters=[only_ends])
    rollout = trainer.rollout(["ab"], sampling=sampling)
    assert rollout.ids[0, int(rollout.prompt_lengths[0]) : int(rollout.lengths[0])].tolist() == [2]
    assert bool(rollout.finished[0])


@pytest.mark.parametrize(
    "message",
    [{"role": "user", "content": None}, {"role": "user", "content": "ab", "name": "me"}],
)
def test_messages_are_read_as_transformers_reads_them(chat_tokenizer, message):
    from lm_core.tokenizers import HuggingFaceTokenizer

    (prompt,) = load_prompts([[message]], tokenizer=HuggingFaceTokenizer(chat_tokenizer))
    expected = chat_tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt.ids.tolist() == expected


def test_a_template_takes_arguments_of_its_own(chat_tokenizer, chat_model):
    import copy

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = TEMPLATE + "{% if thinking %}b{% endif %}"
    trainer = RLHFTrainer(
        chat_model(), lengths_of, prompts=[CHAT], tokenizer=tokenizer, device="cpu", template_kwargs={"thinking": True}
    )
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, thinking=True)
    assert trainer.prompts[0].ids.tolist() == expected["input_ids"]
    assert trainer.prompts[0].text.endswith("<|assistant|>b")


def test_pairs_of_chats_end_with_the_turn_and_those_without_a_border_are_counted(chat_tokenizer):
    import copy

    from lm_core.tokenizers import HuggingFaceTokenizer

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "</s>\n")
    row = {"prompt": CHAT, "chosen": "a", "rejected": [{"role": "assistant", "content": "bb"}]}
    (pair,) = load_preferences([row], tokenizer=HuggingFaceTokenizer(tokenizer))
    assert pair.chosen.tolist() == [*tokenizer("a", add_special_tokens=False)["input_ids"], 1]
    assert pair.rejected[-1] == 1
    # the prompt opens a thought that the finished answer does not have
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if m['content'] != 'lost' else 'other' }}|{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    lost = [{"role": "assistant", "content": "lost"}]
    with pytest.warns(UserWarning, match=r"1 of 2 pairs dropped, the first pairs\[1\]"):
        pairs = load_preferences([row, {**row, "chosen": lost}], tokenizer=HuggingFaceTokenizer(tokenizer))
    assert len(pairs) == 1


def test_the_row_that_cannot_be_tokenised_is_named(chat_tokenizer, tmp_path):
    from lm_core.tokenizers import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(chat_tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[1\].*surrogate"):
        load_prompts(["ab", "a\ud800"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"pairs\[0\], 'rejected'.*surrogate"):
        load_preferences([{"prompt": "a", "chosen": "b", "rejected": "\ud800"}], tokenizer=tokenizer)
    with pytest.raises((ValueError, TypeError), match=r"prompts\[1\]"):
        load_prompts([CHAT, [{"role": "user"}]], tokenizer=tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2.*surrogate"):
        load_prompts(tmp_path / "rows.jsonl", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 must have prompt"):
        load_preferences(str(tmp_path / "rows.jsonl"), tokenizer=tokenizer)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text('{"prompt": "ab"}\n')
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "folder"), tokenizer=tokenizer)] == ["ab"]


# -------------------------------------------------------------------------------------------------- files and rows


def test_a_path_of_prompts_is_read_and_what_cannot_be_read_is_refused(tmp_path, make_palm, trainer):
    (tmp_path / "p.txt").write_bytes("ab\fc\r\nd\u2028e\n\n".encode())
    tokenizer = ByteTokenizer()
    ppo = trainer(
        make_palm(num_tokens=259), prompt_token_ids=None, prompts_path=str(tmp_path / "p.txt"), tokenizer=tokenizer
    )
    assert [prompt.text for prompt in ppo.prompts] == ["ab\fc", "d\u2028e"]
    for source in ({"prompts": str(tmp_path / "p.txt")}, {"prompts_path": [str(tmp_path / "p.txt")] * 2}):
        more = trainer(make_palm(num_tokens=259), prompt_token_ids=None, tokenizer=tokenizer, **source)
        assert {prompt.text for prompt in more.prompts} == {"ab\fc", "d\u2028e"}
    (text,) = load_prompts("see p.txt", tokenizer=tokenizer)
    assert text.text == "see p.txt"
    (tmp_path / "p.pdf").write_bytes(b"%PDF")
    for name, error in (("p.pdf", ValueError), ("missing.txt", FileNotFoundError)):
        with pytest.raises(error, match=name):
            trainer(make_palm(), prompt_token_ids=None, prompts_path=str(tmp_path / name), tokenizer=tokenizer)


def test_rows_come_from_generators_columns_and_splits_and_none_is_a_missing_value():
    tokenizer = ByteTokenizer()
    rows = [{"prompt": None, "messages": CHAT, "answer": 1}, {"prompt": "ab", "messages": None, "answer": 2}]
    first, second = load_prompts((row for row in rows), tokenizer=tokenizer)
    assert first.ids.tolist() == tokenizer.apply_chat_template(CHAT)
    assert (second.text, second.columns["answer"]) == ("ab", 2)
    assert [prompt.text for prompt in load_prompts({"prompt": ["a", "b"]}, tokenizer=tokenizer)] == ["a", "b"]
    datasets = pytest.importorskip("datasets")
    split = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"prompt": ["a"]})})
    with pytest.raises(ValueError, match="test"):
        load_prompts(split, tokenizer=tokenizer)


def test_pairs_are_read_in_the_forms_of_public_data_sets():
    tokenizer = ByteTokenizer()
    answer = [{"role": "assistant", "content": "c"}]
    other = [{"role": "assistant", "content": "d"}]
    rows = [
        {"prompt": CHAT, "chosen": answer, "rejected": other, "margin": None},
        {"chosen": [*CHAT, *answer], "rejected": [*CHAT, *other]},
    ]
    for pair in load_preferences(rows, tokenizer=tokenizer):
        assert pair.prompt.tolist() == tokenizer.apply_chat_template(CHAT)
        whole = tokenizer.apply_chat_template([*CHAT, *answer], add_generation_prompt=False)
        assert [*pair.prompt.tolist(), *pair.chosen.tolist()] == whole
        assert pair.rejected.tolist() == [ord("d"), 257]
        assert pair.margin == 0.0
    (implicit,) = load_preferences(
        [{"chosen": "\n\nHuman: Hi\n\nAssistant: Isle", "rejected": "\n\nHuman: Hi\n\nAssistant: It"}],
        tokenizer=tokenizer,
    )
    assert bytes(implicit.prompt.tolist()) == b"\n\nHuman: Hi\n\nAssistant:"
    assert bytes(implicit.chosen.tolist()[:-1]) == b" Isle"
    (labelled,) = load_preferences([{"prompt": "a", "completion": "b", "label": True}], tokenizer=tokenizer)
    assert (labelled.response.tolist(), labelled.label) == ([98, 257], 1.0)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": "b", "label": None}, r"pairs\[0\] must have prompt"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"},
            r"\[0\] must have a number in 'margin'",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, r"\[0\] must have a number in 'margin'"),
        ({"prompt": "a", "response": "b", "label": math.inf}, r"\[0\] must have a number in 'label'"),
        ({"prompt": "a", "chosen": {"x": 1}, "rejected": "c"}, r"pairs\[0\] must have token ids or text in 'chosen'"),
        ({"chosen": "b", "rejected": "c"}, r"pairs\[0\] has no prompt"),
    ],
)
def test_what_is_no_pair_is_refused_by_row_and_column(row, message):
    with pytest.raises(ValueError, match=message):
        load_preferences([row], tokenizer=ByteTokenizer())


# ------------------------------------------------------------------------------------------------- adapted policies


@pytest.mark.parametrize("kind", ["palm", "llama"])
def test_the_reference_is_the_policy_as_it_was_given(kind, make_palm, make_hugging_face):
    """A policy that comes with a fine-tuned adapter has no KL before its first update."""
    if kind == "palm":
        model = make_palm()
        model.add_finetune_params("actor", 2)
        adapter = list(model.finetune_parameters("actor"))
    else:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], trainable_token_indices=[1, 2])
        model = peft.get_peft_model(make_hugging_face(), config, adapter_name="tuned")
        adapter = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    policy = ActorCritic(model, with_critic=False)
    ids = torch.tensor([[1, 2, 3, 4, 2]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    given = policy.score(ids, mask, mask[:, 1:]).log_probs.detach()
    reference = partial(policy.score, ids, mask, mask[:, 1:], role="reference")
    torch.testing.assert_close(reference().log_probs, given, atol=1e-6, rtol=0)
    with torch.no_grad():
        for parameter in policy.actor_parameters():
            parameter.add_(0.2)
    assert (policy.score(ids, mask, mask[:, 1:]).log_probs - given).abs().max() > 0.01
    torch.testing.assert_close(reference().log_probs, given, atol=1e-6, rtol=0)
    trained = {id(parameter) for parameter in policy.actor_parameters()}
    assert trained == {id(parameter) for parameter in adapter}


def test_every_parameter_of_an_adapter_is_trained(make_hugging_face):
    import peft

    configs = {
        "tokens": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "dora": peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        "head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }
    for name, config in configs.items():
        model = peft.get_peft_model(make_hugging_face(), config)
        asked = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        train_briefly(model, GRPOTrainer, actor_lr=1e-2, kl_div_loss_weight=0.0)
        now = dict(model.named_parameters())
        # LoRA's A has no gradient while its B is zero
        still = [n for n, value in asked.items() if torch.equal(now[n], value) and "lora_A" not in n]
        assert not still, name


def test_ppo_trains_an_adapter_with_whole_modules_and_all_weights_need_a_merged_model(make_hugging_face):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(make_hugging_face(), config)
    trainer = train_briefly(model, actor_lr=1e-2)
    actor, critic = ({id(p) for p in group} for group in (trainer.actor_parameters, trainer.critic_parameters))
    assert not actor & critic
    assert id(model.base_model.model.lm_head.modules_to_save["default"].weight) in actor
    with pytest.raises(
        ValueError, match=r"actor_lora=False trains all weights, but palm has adapters \(default, reference, critic"
    ):
        ActorCritic(model, actor_lora=False)


def test_an_adapter_that_trains_biases_of_the_base_is_refused(make_hugging_face):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    model = peft.get_peft_model(make_hugging_face("gpt2"), config)
    with pytest.raises(ValueError, match="must not train biases of the base, got bias='lora_only'"):
        ActorCritic(model, with_critic=False)


@pytest.mark.parametrize("given", ["by the user", "by actor_dropout"])
def test_the_dropout_that_was_asked_for_is_on_while_learning_and_no_other(make_hugging_face, given):
    import peft

    model = make_hugging_face("gpt2")  # with a dropout of 0.1 in its own configuration
    options = {"actor_dropout": 0.25}
    if given == "by the user":
        config = peft.LoraConfig(r=2, lora_dropout=0.25, target_modules=["c_attn"], fan_in_fan_out=True)
        model, options = peft.get_peft_model(model, config), {}
    policy = ActorCritic(model, with_critic=False, **options)
    modes = [module.training for module in policy.modules()]
    with policy.learning():
        active = {m.p for m in policy.modules() if isinstance(m, nn.Dropout) and m.training and m.p}
    assert active == {0.25}
    assert [module.training for module in policy.modules()] == modes


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "palm"])
def test_gradient_checkpointing_leaves_the_ratio_at_exactly_one(kind, make_hugging_face, make_palm):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "palm":
        model = make_palm()
    elif kind == "opt":  # a block with a dropout of its own
        sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.OPTConfig(vocab_size=13, word_embed_proj_dim=16, max_position_embeddings=64, **sizes)
        model = transformers.OPTForCausalLM(config)
    else:
        model = make_hugging_face(kind)
    trainer = train_briefly(model, gradient_checkpointing=True, minibatch_size=4)
    rollout = trainer.rollout(sampling=trainer.sampling(max_new_tokens=4))
    metrics = trainer.step(rollout)
    assert metrics["ratio_deviation_at_start"] == 0.0
    with trainer.actor_critic.learning():
        assert any(getattr(m, "gradient_checkpointing", False) and m.training for m in trainer.actor_critic.modules())


@pytest.mark.parametrize("kind", ["llama", "palm"])
def test_all_weights_of_a_bfloat16_model_are_trained_as_float32(kind, make_hugging_face, make_palm, capsys):
    model = (make_hugging_face() if kind == "llama" else make_palm()).to(torch.bfloat16)
    before = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    trainer = train_briefly(model, GRPOTrainer, actor_lora=False, actor_lr=1e-5, kl_div_loss_weight=0.1)
    assert "weights stored in bfloat16, trained in float32" in capsys.readouterr().out
    assert {parameter.dtype for parameter in trainer.actor_parameters} == {torch.float32}
    changed = [
        (parameter != before[name]).float().mean().item()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    ]
    assert min(changed) > 0.95
    rollout = trainer.rollout([torch.tensor([1, 2])] * 4, sampling=trainer.sampling(max_new_tokens=4))
    assert abs(trainer.step(rollout, torch.zeros(4))["kl"]) < 1e-2


@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Granite", "GPTJ", "Phi"])
def test_the_critic_takes_the_states_of_models_whose_logits_are_no_bare_product(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "GPTJ":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}
    more = {"logits_scaling": 4.0} if name == "Granite" else {}
    more |= {"head_dim": 8, "num_key_value_heads": 1} if name == "Gemma2" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=13, bos_token_id=0, eos_token_id=1, pad_token_id=0, **sizes, **more
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    policy = ActorCritic(model)
    nn.init.normal_(policy.value_head.weight)
    mask = torch.ones_like(ids, dtype=torch.bool)
    values = policy(ids, mask, mask[:, 1:]).values
    with policy.as_role("reference"):
        states = policy.actor.model.get_base_model().base_model(input_ids=ids)[0]
    torch.testing.assert_close(values, policy.value_head(states)[:, :-1, 0], atol=1e-5, rtol=1e-4)
    trainer = train_briefly(policy.palm.model)
    assert math.isfinite(trainer.step(trainer.rollout(sampling=trainer.sampling(max_new_tokens=3)))["value_loss"])


# ------------------------------------------------------------------------------------------------ rewards on texts


def test_a_reward_function_takes_trls_forms(chat_tokenizer):
    from lm_core.tokenizers import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(chat_tokenizer)
    prompts = load_prompts([{"prompt": CHAT, "answer": 7}, {"prompt": "ab", "answer": 8}], tokenizer=tokenizer)
    rollout = rollout_of(prompts, [torch.tensor([10, 11]), torch.tensor([12])], texts=["x", "yz"])
    seen = {}

    async def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [1.0, None]

    scores = as_reward(reward)(rollout)
    assert scores[0] == 1.0
    assert scores[1].isnan()
    assert seen["prompts"] == [CHAT, "ab"]
    assert seen["completions"] == [[{"role": "assistant", "content": "x"}], "yz"]
    assert seen["completion_ids"] == [[10, 11], [12]]
    assert seen["answer"] == [7, 8]

    def needs_more(completions, environments):
        return [0.0, 0.0]

    with pytest.raises(TypeError, match="needs_more needs environments, but gets answer, completion_ids, completions"):
        as_reward(needs_more)(rollout)


def test_a_reward_function_may_take_completion_ids_alone(chat_tokenizer):
    (prompt,) = load_prompts(["ab"], tokenizer=ByteTokenizer())
    rollout = rollout_of([prompt], [torch.tensor([97, 98, 99])], texts=["abc"])
    assert as_reward(lambda completion_ids, **columns: [len(ids) for ids in completion_ids])(rollout).tolist() == [3.0]


def test_a_response_of_a_sentencepiece_model_keeps_its_space(make_palm, trainer):
    class Pieces:
        """Token 0 is " sat", 1 "the", others "x"; a text drops its first space, as SentencePiece does."""

        vocab_size, eos_id, pad_id = 13, None, 0

        def encode(self, text):
            return [1]

        def decode(self, ids):
            return "".join({0: " sat", 1: "the"}.get(int(id_), "x") for id_ in ids).removeprefix(" ")

    def only_sat(logits):
        return logits.masked_fill(torch.arange(logits.shape[1]) != 0, -torch.inf)

    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    ppo = trainer(make_palm(), reward=reward, prompt_token_ids=None, prompts=["the"], tokenizer=Pieces())
    rollout = ppo.rollout(sampling=ppo.sampling(max_new_tokens=3, stop_strings=[" sat sat"], filters=[only_sat]))
    ppo.score(rollout)
    assert seen == [("the", " sat sat")]
    assert int(rollout.lengths[0] - rollout.prompt_lengths[0]) == 2


def test_a_classifier_scores_the_text_of_the_template_and_cuts_it_on_the_left(chat_tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(chat_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, max_position_embeddings=12, pad_token_id=1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    from lm_core.tokenizers import HuggingFaceTokenizer

    long = [{"role": "user", "content": "ab" * 20}]
    prompts = load_prompts([CHAT, long], tokenizer=HuggingFaceTokenizer(chat_tokenizer))
    rollout = rollout_of(prompts, [torch.tensor([10]), torch.tensor([11])], texts=["a", "b"])
    reward = ClassifierReward(model, chat_tokenizer)
    with pytest.warns(UserWarning, match="1 of 2 texts exceed the reward's limit"):
        scores = reward(rollout)
    assert reward.truncated == 1
    plain = rollout_of(
        load_prompts(["b"], tokenizer=HuggingFaceTokenizer(chat_tokenizer)), [torch.tensor([10])], texts=["a"]
    )
    mixed = rollout_of(
        [*load_prompts(["b"], tokenizer=HuggingFaceTokenizer(chat_tokenizer)), prompts[0]],
        [torch.tensor([10]), torch.tensor([10])],
        texts=["a", "a"],
    )
    torch.testing.assert_close(reward(mixed)[:1], reward(plain))
    assert chat_tokenizer.truncation_side == "right"
    expected = []
    for chat, text in zip((CHAT, long), "ab", strict=True):
        messages = [*chat, {"role": "assistant", "content": text}]
        ids = chat_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][-12:]
        expected.append(model(torch.tensor([ids])).logits[0, 0].item())
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- reward models


def small_pairs(count):
    return [{"prompt": [1, n % 5], "chosen": [2, 3], "rejected": [4, n % 3]} for n in range(count)]


def reward_trainer(palm, pairs, **changes):
    torch.manual_seed(0)
    settings = {"max_steps": 2, "batch_size": 4, "device": "cpu"}
    return RewardModelTrainer(reward_model=RewardModel(palm), pairs=pairs, **{**settings, **changes})


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_reward_model_needs_a_held_out_part_and_says_so(make_palm, tmp_path):
    with pytest.raises(ValueError, match=r"pairs must be at least 10 to hold out 0\.1 of them, got 5; pass validation"):
        reward_trainer(make_palm(), small_pairs(5))
    result = reward_trainer(
        make_palm(), small_pairs(5), validation_fraction=0.2, checkpoint_dir=tmp_path / "run"
    ).train()
    assert 0 <= result.first_accuracy <= 1
    for file in (tmp_path / "run").glob("*.json*"):
        for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
            strict_json(line)


@pytest.mark.parametrize("side", ["pairs", "validation_pairs"])
def test_a_reward_run_with_other_pairs_is_refused(make_palm, tmp_path, side):
    data = {"pairs": small_pairs(20), "validation_pairs": small_pairs(4)}
    reward_trainer(make_palm(), **data, checkpoint_dir=tmp_path).train()
    other = {**data, side: [{**row, "chosen": [3, 3]} for row in data[side]]}
    with pytest.raises(CheckpointError, match="examples is" if side == "pairs" else "held_out is"):
        reward_trainer(make_palm(), **other, checkpoint_dir=tmp_path, max_steps=4).train()


def test_a_policys_run_with_other_prompts_is_refused(make_palm, trainer, tmp_path):
    trainer(make_palm(), checkpoint_dir=tmp_path).train(num_episodes=8, update_timesteps=8, max_new_tokens=3)
    other = [torch.tensor([1, 2, 3, n]) for n in range(8)]
    with pytest.raises(CheckpointError, match="prompts is"):
        trainer(make_palm(), prompt_token_ids=other, checkpoint_dir=tmp_path).train(
            num_episodes=16, update_timesteps=8, max_new_tokens=3
        )


# ----------------------------------------------------------------------------------------------- draws, seeds, logs


def test_a_draw_depends_on_seed_prompt_and_number_of_the_draw_alone(make_palm, trainer):
    ppo = trainer(make_palm())
    sampling = ppo.sampling(max_new_tokens=6, eos_id=3)
    prompts = [torch.tensor([1, 2, 4]), torch.tensor([5, 6]), torch.tensor([1, 2, 4])]

    def responses(prompts, seed=0):
        rollout = ppo.rollout(prompts, sampling=sampling, seed=seed)
        ends = zip(rollout.ids.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
        return [ids[first:last] for ids, first, last in ends]

    whole = responses(prompts)
    assert responses(prompts[:1]) == whole[:1]
    assert responses(prompts[1:]) == [whole[1], whole[0]]
    assert whole[0] != whole[2]
    assert responses(prompts, seed=1) != whole
    sizes = [
        trainer(make_palm()).train(
            num_episodes=16, update_timesteps=16, max_new_tokens=5, max_batch_size=size, eos_id=3
        ).metrics[0]
        for size in (16, 3)
    ]  # fmt: skip
    for name in ("reward", "response_length", "entropy"):
        assert sizes[0][name] == pytest.approx(sizes[1][name], abs=1e-6)


def test_a_penalty_of_repetitions_is_part_of_the_distribution_that_is_trained(make_palm, trainer):
    ppo = trainer(make_palm())
    settings = {"repetition_penalty": 1.7, "temperature": 0.8}
    rollout = ppo.rollout(sampling=ppo.sampling(max_new_tokens=6, top_k=5, **settings), seed=3)
    policy = ppo.actor_critic
    output = policy.score(
        rollout.ids, rollout.mask, rollout.response_mask, temperature=0.8, kept=rollout.kept, repetition_penalty=1.7
    )
    for row in range(len(rollout)):
        for position in range(int(rollout.prompt_lengths[row]), int(rollout.lengths[row])):
            seen = rollout.ids[row, :position]
            logits = policy.palm(seen[None])[0, -1].detach().clone()
            for token in set(seen.tolist()):
                logits[token] = logits[token] * 1.7 if logits[token] < 0 else logits[token] / 1.7
            logits /= 0.8
            logits[logits < logits.topk(5).values[-1]] = -torch.inf
            expected = logits.log_softmax(-1)[rollout.ids[row, position]]
            torch.testing.assert_close(output.log_probs[row, position - 1], expected, atol=1e-4, rtol=1e-4)
    metrics = trainer(make_palm()).train(num_episodes=8, update_timesteps=8, max_new_tokens=4, **settings).metrics[0]
    assert metrics["ratio_deviation_at_start"] == 0.0


def test_samples_are_rows_of_several_prompts_and_times_are_of_one_part_each(make_palm, trainer, tmp_path, monkeypatch):
    import time

    def slow(ids, prompt_lengths):
        time.sleep(0.3)
        return torch.zeros(len(ids))

    grpo = trainer(make_palm(), GRPOTrainer, reward=slow, checkpoint_dir=tmp_path, samples_logged=2)
    grpo.train(num_episodes=8, update_timesteps=8, max_new_tokens=3)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"step", "prompt", "response", "reward"}] * 2
    (metrics,) = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics["reward_seconds"] >= 0.3
    assert metrics["rollout_seconds"] < 0.3
    assert metrics["tokens_per_second"] == pytest.approx(8 * 3 / metrics["rollout_seconds"], rel=0.01)
    assert metrics["score_seconds"] > 0
    assert metrics["update_seconds"] > 0
    texts = trainer(
        make_palm(num_tokens=259), GRPOTrainer, prompt_token_ids=None, prompts=["ab", "cd"], tokenizer=ByteTokenizer(),
        reward=lengths_of, checkpoint_dir=tmp_path / "texts", samples_logged=2,
    )  # fmt: skip
    texts.train(num_episodes=8, update_timesteps=8, max_new_tokens=3)
    lines = (tmp_path / "texts" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == {"ab", "cd"}


# ------------------------------------------------------------------------------------------------- commands on models


@pytest.fixture
def model_folder(chat_tokenizer, chat_model, tmp_path, monkeypatch):
    """A working folder with a Hugging Face model, prompts, and a reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    chat_model().save_pretrained("hf")
    chat_tokenizer.save_pretrained("hf")
    rows = [{"prompt": "ab"}, {"prompt": CHAT}, {"prompt": "ba"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "count_rewards.py").write_text(
        "def count(completions, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [min(len(text), 9) / 9 for text in texts]\n"
    )
    return tmp_path


RUN = [
    *("--model", "hf", "--reward", "count_rewards:count", "--data", "prompts.jsonl", "--device", "cpu"),
    *("--max_steps", "3", "--update_timesteps", "8", "--max_new_tokens", "4", "--minibatch_size", "4"),
]


@pytest.mark.parametrize("command", ["ppo", "grpo", "rloo"])
def test_the_commands_train_a_hugging_face_model_and_its_policy_is_used(model_folder, command, capsys):
    import peft
    import transformers

    more = ["--lora_r", "2", "--lora_targets", "q_proj", "v_proj", "--micro_batch_size", "2"]
    more += ["--gradient_checkpointing"] if command == "ppo" else ["--group_size", "4"]
    assert main([command, *RUN, *more, "--checkpoint_dir", "run", "--actor_lr", "0.1"]) == 0
    assert "(3 rounded up to whole phases)" in capsys.readouterr().out
    newest = latest_checkpoint(model_folder / "run" / "checkpoints")
    adapter = json.loads((newest / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (2, ["q_proj", "v_proj"])
    base = json.loads((newest / "base_model.json").read_text())
    assert base["base_model_name_or_path"] == str((model_folder / "hf").resolve())
    # no copy of the base: it has 300 rows of 16 numbers in its embedding alone
    assert sum(file.stat().st_size for file in newest.glob("*.safetensors")) < (
        (model_folder / "hf" / "model.safetensors").stat().st_size / 2 + 20_000
    )
    ids = torch.tensor([[0, 5, 6, 7]])
    model = transformers.AutoModelForCausalLM.from_pretrained("hf")
    plain = model(ids).logits
    by_peft = peft.PeftModel.from_pretrained(model, newest)(ids).logits
    by_transformers = transformers.AutoModelForCausalLM.from_pretrained(newest)(ids).logits
    torch.testing.assert_close(by_peft, by_transformers)
    assert (by_peft - plain).abs().max() > 1e-3
    # greedy decoding by the command is that of the policy
    capsys.readouterr()
    assert main(["generate", "run", "ab", "--temperature", "0", "--max_new_tokens", "5", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "trained adapter" in err
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    policy = transformers.AutoModelForCausalLM.from_pretrained(newest)
    inputs = tokenizer("ab", return_tensors="pt")
    answer = policy.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False,
        pad_token_id=1, eos_token_id=[1, 2],
    )  # fmt: skip
    assert out.rstrip("\n") == tokenizer.decode(answer[0], skip_special_tokens=True).rstrip("\n")
    assert main(["sample", "run", "ab", "--max_new_tokens", "3", "--reward", "count_rewards:count"]) == 0
    assert main(["eval", "run", "--data", "prompts.jsonl", "--field", "prompt", "--device", "cpu"]) in (0, 1)
    # the same command again: complete; another base: refused
    assert main([command, *RUN, *more, "--checkpoint_dir", "run", "--actor_lr", "0.1"]) == 0
    assert "already complete" in capsys.readouterr().out
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained("hf")
        model.lm_head.weight += 1
    model.save_pretrained("hf")
    assert main([command, *RUN, *more, "--checkpoint_dir", "run", "--actor_lr", "0.1"]) == 1
    assert "frozen is" in capsys.readouterr().err


def test_all_weights_make_a_transformers_folder(model_folder):
    import transformers

    more = ["--actor_lora", "false", "--group_size", "4", "--checkpoint_dir", "run", "--actor_lr", "1e-2"]
    assert main(["grpo", *RUN, *more]) == 0
    newest = latest_checkpoint(model_folder / "run" / "checkpoints")
    trained = transformers.AutoModelForCausalLM.from_pretrained(newest)
    given = transformers.AutoModelForCausalLM.from_pretrained("hf")
    assert (trained.lm_head.weight - given.lm_head.weight).abs().max() > 1e-3
    again = ["--actor_lora", "false", "--group_size", "4", "--checkpoint_dir", "run", "--actor_lr", "1e-2"]
    longer = [*RUN[:-6], "--max_steps", "6", *RUN[-4:]] if "--max_steps" not in RUN[:-6] else RUN
    assert main(["grpo", *longer, *again]) == 0


def test_the_seed_covers_adapters(model_folder):
    from safetensors.torch import load_file

    states = []
    for place in ("one", "two"):
        torch.manual_seed(len(states) + 5)  # other draws before
        assert main(["grpo", *RUN, "--group_size", "4", "--checkpoint_dir", place, "--seed", "3"]) == 0
        newest = latest_checkpoint(model_folder / place / "checkpoints")
        states.append(load_file(newest / "adapter_model.safetensors"))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_trainers_of_one_seed_have_equal_adapters(make_palm, trainer):
    policies = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        palm = make_palm()
        torch.manual_seed(noise)
        policies.append(trainer(palm, seed=4).actor_critic)
    for name, value in policies[0].state_dict().items():
        assert torch.equal(value, policies[1].state_dict()[name]), name


def test_generate_and_eval_of_a_palm_policy_use_the_policy_and_say_so(tmp_path, monkeypatch, capsys):
    from palm_rlhf.pretrain.evaluation import evaluate

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    palm = PaLM(num_tokens=259, dim=16, depth=1, dim_head=8, heads=2)
    palm.add_finetune_params("actor")
    with torch.no_grad():
        for parameter in palm.finetune_parameters("actor"):
            parameter.add_(torch.randn_like(parameter))
    palm.save_pretrained("policy", tokenizer=ByteTokenizer())
    (tmp_path / "text.txt").write_text("some text to score\n" * 3)
    prompt = torch.tensor([list(b"ab")])
    greedy = {"prompt": prompt, "max_new_tokens": 6, "temperature": 0.0, "filter_logits_fn": None, "eos_token": 257}
    for scope, arguments in (("actor", {"finetune_scope": "actor"}), ("null", {})):
        words = ["--max_new_tokens=6", "--temperature=0", "--device=cpu", f"--scope={scope}"]
        assert main(["generate", "policy", "ab", *words]) == 0
        out, err = capsys.readouterr()
        assert out == "ab" + ByteTokenizer().decode(palm.generate(**greedy, **arguments)[0]) + "\n"
        assert ("trained policy (scope 'actor')" in err) == (scope == "actor")
        assert main(["eval", "policy", "--data=text.txt", "--device=cpu", f"--scope={scope}"]) == 0
        out, err = capsys.readouterr()
        from lm_core.data.corpora import held_out_documents

        documents = held_out_documents("text.txt", tokenizer=ByteTokenizer(), field="text")
        expected = evaluate(palm, documents, ByteTokenizer(), **arguments)
        assert out.startswith(f"{expected.bits_per_byte:.4f} bits/byte")


def test_documents_are_scored_alone_by_models_that_cannot_pack_them(make_hugging_face):
    from lm_core.data.documents import tokenise
    from palm_rlhf.pretrain.evaluation import evaluate

    class Digits:
        vocab_size, eos_id, pad_id = 13, 11, 12

        def encode(self, text):
            return [ord(letter) - 48 for letter in text]

        def decode(self, ids):
            return "".join(chr(48 + id_) for id_ in ids)

    texts = ["123", "4567891", "22", "31415926"]
    model = make_hugging_face()
    result = evaluate(model, tokenise(texts, tokenizer=Digits()), Digits(), sequence_length=64, batch_size=2)
    nats, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*Digits().encode(text), 11]])
        log_probs = model(ids).logits.detach().log_softmax(-1)[0, :-1]
        nats -= log_probs.gather(-1, ids[0, 1:, None]).double().sum().item()
        count += ids.shape[1] - 1
    assert result.tokens == count
    assert result.loss == pytest.approx(nats / count, abs=1e-5)


def test_the_command_trains_a_reward_model_of_hugging_face_that_peft_opens_and_ppo_uses(model_folder, capsys):
    import peft
    import transformers

    rows = [{"prompt": "ab", "chosen": "aaaa" + "b" * (n % 3), "rejected": "b" * (2 + n % 4)} for n in range(40)]
    (model_folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["reward", "--model", "hf", "--data", "pairs.jsonl", "--checkpoint_dir", "reward", "--device", "cpu"]
    more = ["--max_steps", "30", "--learning_rate", "1e-2", "--micro_batch_size", "5", "--lora_r", "4"]
    assert main([*words, *more]) == 0
    assert "36 pairs for training, 4 held out" in capsys.readouterr().out
    summary = json.loads((model_folder / "reward" / "summary.json").read_text())
    assert summary["results"][0]["after"] >= 0.75
    newest = latest_checkpoint(model_folder / "reward" / "checkpoints")
    base = transformers.AutoModelForSequenceClassification.from_pretrained("hf", num_labels=1)
    model = peft.PeftModel.from_pretrained(base, newest).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    scores = [model(**tokenizer("ab" + text, return_tensors="pt")).logits.item() for text in ("aaaab", "bbb")]
    assert scores[0] > scores[1]
    again = ["--max_steps", "30", "--learning_rate", "1e-2", "--micro_batch_size", "5", "--lora_r", "4"]
    assert main([*words, *again]) == 0
    assert "already complete" in capsys.readouterr().out
    run = ["ppo", *RUN, "--checkpoint_dir", "run"]
    run[run.index("--reward") + 1] = "reward"
    assert main(run) == 0


@pytest.mark.plain
@pytest.mark.parametrize(
    ("name", "value"), [("lora_r", 10**7), ("finetune_scopes", {"$tuple": [str(n) for n in range(2000)]})]
)
def test_scopes_of_a_hostile_file_are_bounded_before_they_are_built(tmp_path, name, value):
    from lm_core.checkpoints.manifest import write_manifest

    PaLM(dim=16, num_tokens=32, depth=1, dim_head=8, heads=2, finetune_scopes=["a"]).save_pretrained(tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    config["arguments"][name] = value
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    write_manifest(tmp_path / "p")
    with pytest.raises(CheckpointError, match=f"{name} must be at most 1024"):
        PaLM.from_pretrained(tmp_path / "p")


def test_a_classifier_that_lacks_weights_is_no_reward(tmp_path):
    transformers = pytest.importorskip("transformers")
    from palm_rlhf.reward.classifier import load_classifier

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reward .* holds no whole LlamaForSequenceClassification, it lacks score"):
        load_classifier(tmp_path)


def test_a_run_resumes_with_its_own_held_out_text_only(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 2000)
    data, folder = str(tmp_path / "a.txt"), str(tmp_path / "run")
    run = ["train", "--data", data, "--checkpoint_dir", folder, "--sample_tokens", "0"]
    sizes = ["--preset", "quickstart", "--dim", "16", "--depth", "1", "--heads", "1", "--sequence_length", "32"]
    assert main([*run, *sizes, "--validation_data", str(tmp_path / "b.txt"), "--max_steps", "1"]) == 0
    assert main([*run, *sizes, "--validation_data", str(tmp_path / "c.txt"), "--max_steps", "2"]) == 1
    assert "validation_data" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the reward and adapters of a run


def _length(ids, prompt_lengths):
    return prompt_lengths.float()


def _negative_length(ids, prompt_lengths):
    return -prompt_lengths.float()


def test_a_run_resumed_with_another_reward_is_refused_by_name(make_palm, trainer, tmp_path):
    def run(reward, **changes):
        made = trainer(make_palm(), GRPOTrainer, reward=reward, checkpoint_dir=tmp_path / "run", **changes)
        return made.train(num_episodes=8, update_timesteps=8, max_new_tokens=2)

    run(_length)
    run(_length)
    for other in (_negative_length, [(2.0, _length)], RewardModel(make_palm())):
        with pytest.raises(CheckpointError, match=r"is of another run: reward is .*, but was .*:_length \(source"):
            run(other)


def test_rewards_are_told_apart_by_their_weights_source_and_arguments(make_palm, trained):
    def identity(reward):
        return reward_identity(as_reward(reward))

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, ids, prompt_lengths):
            return self.scale * prompt_lengths

    def scaled(ids, prompt_lengths, *, scale):
        return scale * prompt_lengths.float()

    model = RewardModel(make_palm())
    distinct = [
        model,
        trained(RewardModel(make_palm())),
        _length,
        _negative_length,
        partial(scaled, scale=1.0),
        partial(scaled, scale=2.0),
        Scaled(1.0),
        Scaled(2.0),
        [(0.5, _length), _negative_length],
        [_length, (0.5, _negative_length)],
        max,
    ]
    identities = [identity(reward) for reward in distinct]
    assert len(set(identities)) == len(distinct)
    assert identities == [identity(reward) for reward in distinct]
    assert identity(RewardModel.from_config(model.config)) != identity(model)
    assert reward_identity(None) is None


def test_several_active_adapters_are_refused_by_name(make_hugging_face):
    import peft

    def adapted():
        model = peft.get_peft_model(make_hugging_face(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        return model

    model = adapted()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one active adapter, got default, other"):
        ActorCritic(model)
    with pytest.raises(ValueError, match="one active adapter, got default, other"):
        ActorCritic(make_hugging_face(), model)
    assert ActorCritic(adapted()).scopes["actor"] == "default"


def test_an_adapter_of_the_critics_own_network_continues_training(make_hugging_face, moved):
    import peft

    def critic():
        torch.manual_seed(3)
        return peft.get_peft_model(
            make_hugging_face(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "mine"
        )

    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.bool)
    policy = ActorCritic(make_hugging_face(), critic())
    assert policy.scopes["critic"] == "mine"
    names = [n for n, p in policy.named_parameters() if any(p is q for q in policy.critic_parameters())]
    assert all(".mine." in name or name.startswith("value_head") for name in names)
    with torch.no_grad():
        policy.value_head.weight.fill_(1.0)
    # the values are those of the adapted network
    states = critic().base_model.model.model(ids)[0]
    expected = states[:, :-1] @ torch.ones(states.shape[-1])
    torch.testing.assert_close(policy.values(policy.value_logits(ids, mask, mask[:, 1:])), expected)
    with pytest.raises(
        ValueError, match=r"critic_lora=False trains all weights, but critic_palm has adapters \(mine\)"
    ):
        ActorCritic(make_hugging_face(), critic(), critic_lora=False)
    with pytest.raises(ValueError, match=r"critic_lora=False trains all weights, but palm has adapters \(mine\)"):
        ActorCritic(critic(), critic_lora=False)
    shared = critic()
    assert ActorCritic(shared, shared).scopes == {"actor": "mine", "critic": "critic", "reference": "reference"}
