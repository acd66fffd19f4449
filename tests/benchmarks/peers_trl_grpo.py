"""A whole GRPO update of a Hugging Face model next to TRL's, at equal settings and in turns in one run.

    nox -s bench_peers -- trl --model FOLDER

Answers to chat questions are rewarded for brevity: LoRA of rank 16 on all linear layers, 2 prompts with groups of 8, 16
new tokens, no KL, one epoch in one minibatch, float32. An update is drawing, scoring and learning. Without ``--model``
(a folder with a causal language model and its tokenizer, such as SmolLM2-135M-Instruct) nothing is measured. TRL is
looked for in $BENCH_PEERS/palm-rlhf.
"""

import os
import re
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import arguments, compared, peer_folder, ratio, report, thread_counts, timed

QUESTIONS = (
    *("Name the capital of Norway.", "Which colour has coal?", "What animal gives wool?", "What do spiders spin?"),
    *("Say the opposite of early.", "Name a red fruit.", "What is melted ice called?", "What do plants drink?"),
)
ANSWERS, GROUP, NEW_TOKENS, RANK, LEARNING_RATE = 16, 8, 16, 16, 1e-4


def rows() -> list[dict[str, Any]]:
    system = {"role": "system", "content": "Be brief."}
    return [{"prompt": [system, {"role": "user", "content": f"{text} Answer with one word."}]} for text in QUESTIONS]


def brevity(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [1 / max(1, len(re.findall(r"\w+", text))) for text in texts]


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


class Ours:
    """One phase of ``GRPOTrainer`` a call."""

    def __init__(self, folder: Path) -> None:
        from palm_rlhf import GRPOTrainer

        model, tokenizer = load(folder)
        self.trainer = GRPOTrainer(
            policy=model,
            prompts=rows(),
            tokenizer=tokenizer,
            reward=brevity,
            group_size=GROUP,
            actor_lora_r=RANK,
            actor_lr=LEARNING_RATE,
            kl_div_loss_weight=0.0,
            minibatch_size=ANSWERS,
            epochs=1,
            device="cpu",
        )

    def update(self) -> None:
        # a run's length is counted from its start: each call asks for one phase more
        phases = self.trainer.phase.number + 1
        self.trainer.train(num_episodes=phases * ANSWERS, update_timesteps=ANSWERS, max_new_tokens=NEW_TOKENS)


def seconds_in_turns(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of updates: after each update of TRL's loop we make one. The first round does not count."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ours = Ours(folder)
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["theirs"].append(time.perf_counter() - self.started)
            seconds["ours"].append(timed(ours.update))

    model, tokenizer = load(folder)
    with tempfile.TemporaryDirectory() as output:
        GRPOTrainer(
            model=model,
            reward_funcs=brevity,
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
            callbacks=[Turns()],
            args=GRPOConfig(
                output_dir=output,
                per_device_train_batch_size=ANSWERS,
                num_generations=GROUP,
                max_completion_length=NEW_TOKENS,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                beta=0.0,
                loss_type="grpo",
                gradient_checkpointing=False,
                max_steps=rounds + 1,
                logging_steps=rounds + 1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
        ).train()
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    options = arguments(__doc__.splitlines()[0], model={"type": Path, "help": "folder of a model and its tokenizer"})
    if options.model is None:
        print("nothing measured: give --model FOLDER with a causal language model and its tokenizer")
        return
    if os.environ.get("BENCH_PEERS"):
        peer_folder("palm-rlhf")
    warnings.simplefilter("ignore")
    table = []
    what = f"GRPO update, {options.model.name}, {ANSWERS} answers of {NEW_TOKENS} tokens, LoRA r {RANK}"
    for _ in thread_counts(options):
        seconds = seconds_in_turns(options.model, min(options.rounds, 5))
        share = ratio(seconds["ours"], seconds["theirs"])
        table.append(compared(what, "TRL", seconds, **{"share of TRL's time": share}))
    report("GRPO next to TRL", table, options.json)


if __name__ == "__main__":
    main()
