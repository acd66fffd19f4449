"""Self-play of a Hugging Face chat model with LoRA: here a tiny one made from a configuration, without a download.

With a model of yours, pass its folder or name to ``load_model`` and ``load_tokenizer``.
"""

import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm_core import load_tokenizer
from spin_trainer import SPINTrainer
from spin_trainer.loading import load_model, with_lora

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_model(folder: Path) -> None:
    """A byte-level tokenizer with a chat template, and a two-layer Llama."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|user|>", "<|assistant|>", "<|end|>"]
    backend.train_from_iterator(
        ["what is 1 plus 2"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


chats = [
    {
        "messages": [
            {"role": "user", "content": f"what is {number} plus 2"},
            {"role": "assistant", "content": str(number + 2)},
        ]
    }
    for number in range(8)
]

with tempfile.TemporaryDirectory() as name:
    save_tiny_model(Path(name) / "model")
    policy = with_lora(load_model(f"{name}/model"), r=4)
    trainer = SPINTrainer(
        policy,
        train_sft_dataset=chats[:6],
        valid_sft_dataset=chats[6:],
        tokenizer=load_tokenizer(f"{name}/model"),
        max_seq_len=48,
        iterations=2,
        epochs=1,
        batch_size=3,
        grad_accum_steps=1,
        start_learning_rate=1e-3,
        end_learning_rate=1e-4,
        checkpoint_folder=Path(name) / "run",
    )
    result = trainer()
    print(f"{result.outcome} after {result.iterations} iterations; the adapters are in iterations/iteration-2")
