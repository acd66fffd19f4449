"""Twelve architectures with their tokenizers' habits: ids as in transformers, every end respected, every trainer.

Models are built from configurations and tokenizers from a handful of words, so nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_core import generate
from lm_core.adapters import as_causal_lm
from lm_core.tokenizers import as_tokenizer, end_ids, prompt_ids

transformers = pytest.importorskip("transformers")

TEXT = "system user assistant model Be brief . What is the capital of France ? Paris Name a colour Red"
WORDS = [*TEXT.split(), "\n"]
MESSAGES = [{"role": "user", "content": "What is the capital of France ?"}]
BOTH = [{"role": "system", "content": "Be brief ."}, *MESSAGES]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|head|>\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|head|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Architecture:
    """A model's class, what its configuration needs, and the habits of its tokenizer."""

    model: str
    config: dict[str, Any] = field(default_factory=lambda: dict(SIZES))
    template: str | None = None
    bos: str | None = None
    eos: str = "<|endoftext|>"
    turn: str | None = None
    adds_bos: bool = False
    refuses_system: bool = False

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        special = [self.eos, *filter(None, (self.bos, self.turn))]
        special = list(dict.fromkeys([*special, *(word for word in MARKS if word in (self.template or ""))]))
        vocabulary = {word: index for index, word in enumerate(["<unk>", *special, *WORDS])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        splits = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
        backend.add_special_tokens(special)
        if self.adds_bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, vocabulary[self.bos or ""])]
            )
        names = {"unk_token": "<unk>", "eos_token": self.eos}
        if self.bos is not None:
            names["bos_token"] = self.bos
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        made.chat_template = self.template
        return made

    def build(self, tokenizer: Any) -> Any:
        cls = getattr(transformers, self.model)
        torch.manual_seed(0)
        size = {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": tokenizer.bos_token_id}
        settings = {**self.config, **size, "eos_token_id": tokenizer.eos_token_id}
        if "text_config" in self.config:
            ids = {name: settings[name] for name in (*size, "eos_token_id")}
            settings = {"text_config": {**self.config["text_config"], **ids}, "vision_config": VISION}
        model = cls(cls.config_class(**settings)).eval()
        if self.turn is not None:
            ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(self.turn)]
            model.generation_config.eos_token_id = ends
        return model


MARKS = ["<|im_start|>", "<|start|>", "<|head|>", "<start_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"]
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
KV = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64}
ARCHITECTURES = {
    "Llama 3": Architecture("LlamaForCausalLM", KV, LLAMA, "<|begin|>", "<|endoftext|>", "<|eot_id|>", adds_bos=True),
    "Gemma 3": Architecture(
        "Gemma3ForCausalLM",
        {**KV, "head_dim": 8, "sliding_window": 4},
        GEMMA,
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        adds_bos=True,
        refuses_system=True,
    ),
    "Qwen 3": Architecture("Qwen3ForCausalLM", {**KV, "head_dim": 8}, CHATML, turn="<|im_end|>"),
    "Mistral": Architecture("MistralForCausalLM", KV, MISTRAL, "<s>", "</s>", adds_bos=True),
    "Phi 3": Architecture("Phi3ForCausalLM", {**KV, "original_max_position_embeddings": 64}, PHI, turn="<|end|>"),
    "GPT-2": Architecture(
        "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}, bos="<|endoftext|>"
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", {**SIZES, "max_position_embeddings": 64}),
    "OLMo 2": Architecture("Olmo2ForCausalLM", KV, LLAMA, "<|endoftext|>", "<|endoftext|>", "<|eot_id|>"),
    "Falcon": Architecture(
        "FalconForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": False}
    ),
    "Mamba": Architecture("MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "LFM 2 (hybrid)": Architecture(
        "Lfm2ForCausalLM", {**KV, "layer_types": ["conv", "full_attention"]}, CHATML, "<|begin|>", turn="<|im_end|>"
    ),
    "Llava (text)": Architecture(
        "LlavaForConditionalGeneration",
        {"text_config": {**KV, "model_type": "llama"}, "image_token_index": 0},
        LLAMA,
        "<|begin|>",
        turn="<|eot_id|>",
        adds_bos=True,
    ),
}


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture
def tokenizer(architecture: Architecture) -> Any:
    return architecture.tokenizer()


@pytest.fixture
def model(architecture: Architecture, tokenizer: Any) -> Any:
    return architecture.build(tokenizer)


def test_ids_of_a_prompt_are_those_of_transformers(architecture: Architecture, tokenizer: Any) -> None:
    ours = as_tokenizer(tokenizer)
    text = "What is the capital of France ?"
    assert prompt_ids(ours, text) == tokenizer(text)["input_ids"]
    assert (prompt_ids(ours, text)[0] == tokenizer.bos_token_id) == architecture.adds_bos
    if architecture.template is not None:
        rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert ours.apply_chat_template(MESSAGES) == prompt_ids(ours, rendered) == ids


def test_a_system_role_is_rendered_or_refused_as_the_template_does(architecture: Architecture, tokenizer: Any) -> None:
    ours = as_tokenizer(tokenizer)
    if architecture.template is None:
        with pytest.raises(ValueError, match="chat template"):
            ours.apply_chat_template(BOTH)
    elif architecture.refuses_system:
        with pytest.raises(ValueError, match="System role not supported"):
            ours.apply_chat_template(BOTH)
    else:
        expected = tokenizer.apply_chat_template(BOTH, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.apply_chat_template(BOTH) == list(expected)


def test_every_end_of_a_turn_ends_generation(architecture: Architecture, tokenizer: Any, model: Any) -> None:
    ends = end_ids(as_tokenizer(tokenizer), model)
    expected = {tokenizer.convert_tokens_to_ids(word) for word in (architecture.eos, architecture.turn) if word}
    assert set(ends) == expected
    lm = as_causal_lm(model)
    prompt = torch.tensor([prompt_ids(as_tokenizer(tokenizer), "Name a colour")])
    for end in expected:
        # the third new token is forced to be this end
        calls = [0]

        def force(module: Any, inputs: Any, output: Any, end: int = end, calls: list[int] = calls) -> Any:
            calls[0] += 1
            pushed = output.clone()
            pushed[..., list(expected)] = -100.0
            pushed[..., end] = 100.0 if calls[0] == 3 else -100.0
            return pushed

        handle = model.get_output_embeddings().register_forward_hook(force)
        result = generate(lm, prompt, max_new_tokens=6, temperature=0.0, eos_id=ends)
        handle.remove()
        assert (int(result.lengths), bool(result.finished)) == (3, True)
        assert result.tokens[0, -1] == end


def stepped(train: Callable[[], Any], name: str) -> str:
    """ "trained", or "refused" if the model's class or its adapter is refused by name."""
    try:
        train()
    except (TypeError, ValueError) as error:
        if name not in str(error):
            raise
        return "refused"
    return "trained"


def rows(tokenizer: Any, template: str | None) -> list[dict[str, Any]]:
    if template is None:
        return [{"prompt": "Name a colour ", "response": "Red"}, {"prompt": "What is ", "response": "Paris"}]
    return [
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Paris"}]},
        {"messages": [{"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": "Red"}]},
    ]


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_reinforcement_learning_takes_a_step_or_refuses_by_name(
    architecture: Architecture, tokenizer: Any, model: Any, objective: str
) -> None:
    from palm_rlhf import GRPOTrainer, RLHFTrainer

    kinds = {"ppo": (RLHFTrainer, {"palm": model}), "grpo": (GRPOTrainer, {"policy": model, "group_size": 2})}
    kind, arguments = kinds[objective]

    def reward(sequences: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
        return (sequences % 2).float().mean(dim=1)

    def train() -> None:
        trainer = kind(
            reward=reward,
            prompts=["Name a colour", "What is the capital of France ?"],
            tokenizer=tokenizer,
            device="cpu",
            seed=0,
            **arguments,
        )
        result = trainer.train(num_episodes=4, update_timesteps=4, max_new_tokens=3)
        assert result.updates > 0
        assert all(torch.isfinite(torch.tensor(row["reward"])) for row in result.metrics)

    outcome = stepped(train, type(model).__name__)
    assert outcome == "trained"


def test_self_play_takes_a_step_or_refuses_by_name(
    architecture: Architecture, tokenizer: Any, model: Any, tmp_path: Path
) -> None:
    from spin_trainer import SPINTrainer

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def train() -> None:
        SPINTrainer(
            model,
            train_sft_dataset=rows(tokenizer, architecture.template),
            tokenizer=tokenizer,
            max_seq_len=48,
            iterations=1,
            epochs=1,
            batch_size=2,
            learning_rate=1e-2,
            checkpoint_dir=tmp_path,
            device="cpu",
        ).train()
        assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())

    assert stepped(train, type(model).__name__) == "trained"


def test_composition_takes_a_step_or_refuses_by_name(architecture: Architecture, tokenizer: Any, model: Any) -> None:
    from calm_pytorch import CALM, AugmentParams

    def train() -> None:
        calm = CALM(model, AugmentParams(architecture.build(tokenizer), shared_sequence=True))
        ids = torch.tensor([prompt_ids(as_tokenizer(tokenizer), "What is the capital of France ?")])
        calm(ids).backward()
        learned = list(calm.trainable_parameters())
        assert learned
        assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learned)

    assert stepped(train, type(model).__name__) == "trained"
