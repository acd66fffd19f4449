"""SPIN fine-tunes a PaLM by self-play, and the exported policy is a PaLM again.

python spin_fine_tunes_a_palm.py
"""

import tempfile
from pathlib import Path

import torch

from lm_core import ByteTokenizer, generate
from palm_rlhf import PaLM
from spin_trainer import SPINTrainer
from spin_trainer.data.sft_data import Example, SFTDataset
from spin_trainer.quickstart.supervised import fine_tune

torch.manual_seed(0)
tokenizer = ByteTokenizer()
rows = [
    Example(tuple(tokenizer.encode(f"{first}{second}=")), tuple(tokenizer.encode(second.upper(), add_eos=True)))
    for first in "abcdefghijkl"
    for second in "abcdefghijkl"
]
train, held_out = [row for number, row in enumerate(rows) if number % 7], rows[::7]

palm = PaLM(num_tokens=tokenizer.vocab_size, dim=32, depth=2, dim_head=16, heads=2)
fine_tune(palm, train, updates=150, learning_rate=3e-3, batch_size=16)  # the supervised start of self-play

with tempfile.TemporaryDirectory() as folder:
    trainer = SPINTrainer(
        palm,
        train_sft_dataset=SFTDataset(train),
        valid_sft_dataset=SFTDataset(held_out),
        max_seq_len=16,
        eos_id=tokenizer.eos_id,
        iterations=2,
        epochs=1,
        batch_size=20,
        learning_rate=1e-4,
        end_learning_rate=1e-5,
        checkpoint_dir=folder,
        top_p=None,
        temperature=1.0,
        lambdas=[1.0],
        device="cpu",
    )
    result = trainer()
    print("held-out NLL/answer:", [round(entry["nll"], 3) for entry in result.history])
    policy = PaLM.from_pretrained(Path(result.iterations_folder) / "iteration-2")

prompts = [torch.tensor(row.prompt) for row in held_out[:3]]
answers = generate(policy, prompts, max_new_tokens=4, temperature=0.0, eos_id=tokenizer.eos_id)
for prompt, answer, length in zip(prompts, answers.tokens, answers.lengths, strict=True):
    print(tokenizer.decode(prompt), tokenizer.decode(answer[:length]))
