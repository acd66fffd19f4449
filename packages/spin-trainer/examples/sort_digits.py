"""Self-play on one page: a small decoder learns to sort digits, then trains for two iterations of self-play."""

import tempfile

import torch

from spin_trainer import SPINTrainer
from spin_trainer.quickstart.small_decoder import SmallDecoder
from spin_trainer.quickstart.sorting_task import EOS, MAX_SEQ_LEN, VOCABULARY, sorting_examples
from spin_trainer.quickstart.supervised import fine_tune
from spin_trainer.training.evaluation import evaluate

torch.manual_seed(0)
train, held_out = sorting_examples(256, seed=1), sorting_examples(64, seed=2)
model = SmallDecoder(num_tokens=VOCABULARY, dim=32)
loss = fine_tune(model, train, updates=60, learning_rate=5e-3)
print(f"supervised: {loss:.3f} nats/token, {evaluate(model, held_out, max_seq_len=MAX_SEQ_LEN, eos_id=EOS)}")

with tempfile.TemporaryDirectory() as folder:
    trainer = SPINTrainer(
        model,
        train_sft_dataset=train,
        valid_sft_dataset=held_out,
        max_seq_len=MAX_SEQ_LEN,
        eos_id=EOS,
        iterations=2,
        epochs=1,
        batch_size=32,
        gradient_accumulation=1,
        lambda_=1.0,
        learning_rate=1e-4,
        end_learning_rate=1e-5,
        checkpoint_folder=folder,
    )
    for count, metrics in enumerate(trainer().history):
        print(f"after {count} iterations: {metrics['nll']:.3f} nats/answer, win rate {metrics['win_rate']:.3f}")
