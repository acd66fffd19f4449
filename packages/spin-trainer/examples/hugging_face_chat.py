"""Self-play of a Hugging Face chat model from a YAML file, with all weights and with LoRA, then its evaluation.

The model is a tiny Llama with a tokenizer and a chat template, created and briefly fine-tuned here, so nothing is
downloaded; its fourteen held-out rows show the mechanism, not a gain. For your own model, set ``model`` in the YAML to
its folder or its name on the hub.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm_core import as_causal_lm, load_tokenizer
from spin_trainer import as_sft_dataset
from spin_trainer.cli import main
from spin_trainer.quickstart.supervised import fine_tune

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RUN = """
model: {folder}/model
data: {folder}/train.jsonl
validation_data: {folder}/held_out.jsonl
checkpoint_dir: {folder}/{name}
max_seq_len: 48
iterations: 2
epochs: 1
batch_size: 16
gradient_accumulation: 1
generation_batch_size: 64
temperature: 1.0
top_p: null
lambdas: [1.0, 1.0]
learning_rate: {rate}
end_learning_rate: {end}
learning_rates: [{rate}, {half}]
{lora}
"""


def conversation(index: int) -> dict[str, object]:
    """A row of a .jsonl file: an addition and its answer."""
    a, b = divmod(index, 10)
    question = {"role": "user", "content": f"what is {a} plus {b}"}
    return {"messages": [question, {"role": "assistant", "content": str(a + b)}]}


def write_model(folder: Path) -> None:
    """Saves a byte-level tokenizer with a chat template, and a fine-tuned two-layer Llama."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["what is 1 plus 2"] * 4, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    data = as_sft_dataset(folder.parent / "train.jsonl", max_seq_len=48, tokenizer=load_tokenizer(str(folder)))
    loss = fine_tune(as_causal_lm(model), data, updates=150, batch_size=32, learning_rate=3e-3)
    print(f"supervised  {loss:.3f} nats/token on the training rows")
    model.save_pretrained(folder)


warnings.filterwarnings("ignore", category=FutureWarning)  # from peft, about a renamed transformers attribute
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for file in ("train", "held_out"):
        rows = [n for n in range(100) if (n % 7 == 3) == (file == "held_out")]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(conversation(n)) + "\n" for n in rows))
    write_model(folder / "model")
    for kind, rate, lora in (("all-weights", 1e-4, ""), ("lora", 1e-3, "lora_r: 8")):
        print(f"\n# {kind}")
        config = folder / f"{kind}.yaml"
        config.write_text(RUN.format(folder=folder, name=kind, rate=rate, end=rate / 10, half=rate / 2, lora=lora))
        if main(["train", "--config", str(config)]) != 0:
            sys.exit(1)
        trained = f"{folder}/{kind}/iterations/iteration-2"
        opponent = ["--opponent_model", f"{folder}/model"]
        main(["eval", trained, "--data", f"{folder}/held_out.jsonl", "--max_seq_len=48", *opponent])
