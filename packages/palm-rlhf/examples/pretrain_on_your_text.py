"""Pretrain on your own texts from Python: documents in, a resumable run and a continuation out.

The texts here are sums, which a model of 39,000 parameters learns in seconds. For your data use
``load_corpus("texts.jsonl")`` (a file or a folder), and ``load_tokenizer`` for a tokenizer of Hugging Face.
"""

import torch

from lm_core import ByteTokenizer
from lm_core.data.corpora import split_documents
from lm_core.data.documents import tokenise
from palm_rlhf import PaLM, PretrainTrainer, TrainingSettings

tokenizer = ByteTokenizer()
texts = [f"{a} + {b} = {a + b}\n" for a in range(20) for b in range(20)]
corpus = split_documents(tokenise(texts, tokenizer=tokenizer), validation_fraction=0.1)

torch.manual_seed(0)
palm = PaLM(num_tokens=tokenizer.vocab_size, dim=32, depth=2, dim_head=16, heads=2)
trainer = PretrainTrainer(
    model=palm,
    corpus=corpus,
    tokenizer=tokenizer,
    checkpoint_dir="runs/sums",  # run the script again, and it resumes from here
    settings=TrainingSettings(max_steps=600, sequence_length=64, batch_size=8, learning_rate=5e-3, device="cpu"),
)
result = trainer.train()
print(f"{result.first_bits_per_byte:.2f} -> {result.last_bits_per_byte:.2f} bits/byte after {result.step} updates")

prompt = torch.tensor(tokenizer.encode("7 + 5 = "))
answer = palm.generate(max_new_tokens=6, prompt=prompt, temperature=0.0, eos_id=tokenizer.eos_id)
print("7 + 5 =", tokenizer.decode(answer).strip())

# a checkpoint folder is a complete model with its tokenizer
again = PaLM.from_pretrained(result.checkpoints / f"step-{result.step}")
print(f"opened again: {sum(parameter.numel() for parameter in again.parameters()):,} parameters")
