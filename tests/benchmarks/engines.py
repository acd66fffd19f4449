"""GRPO with responses drawn by vLLM and by lm_core: rewards, mismatch of log-probs, and seconds of drawing.

    nox -s engines -- --model FOLDER --seeds 0 1 2

A chat model learns to answer with one word, which any function can check: LoRA of rank 16, groups of 8, 16 answers of
up to 16 tokens an update, learning rate 3e-4, no KL. ``FOLDER`` has a causal language model with its tokenizer and chat
template, such as SmolLM2-135M-Instruct. Without one a tiny model of random weights is trained, which shows that the
engines run, and that they draw from the same policy.
"""

import argparse
import re
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lm_core.adapters.loading import load_causal_lm
from lm_core.tokenizers import ByteTokenizer, load_tokenizer
from palm_rlhf import GRPOTrainer
from palm_rlhf.rl.evaluation import evaluate_policy

ASKED = (
    *("Name the capital of Sweden.", "Which colour has grass?", "What animal gives milk?", "What do bees make?"),
    *("Say the opposite of hot.", "Which planet has rings?", "What is frozen water called?", "What do cars need?"),
    *("Name the capital of Italy.", "What do lungs breathe in?", "Say the opposite of up.", "Which animal barks?"),
    *("Which colour has snow?", "Name a yellow fruit.", "What shines at noon?", "Name the capital of Chile."),
)
HELD_OUT = (
    *("Name the capital of Spain.", "Which colour has blood?", "Say the opposite of fast.", "Which animal meows?"),
    *("What do you cut with?", "Name the capital of Egypt.", "Which colour has a frog?", "What do rabbits eat?"),
)


def chats(questions: Sequence[str]) -> list[dict[str, Any]]:
    system = {"role": "system", "content": "Be brief."}
    return [
        {"prompt": [system, {"role": "user", "content": f"{question} Answer with exactly one word."}]}
        for question in questions
    ]


def one_word(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 / number of words; 0 without a word."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    counts = [len(re.findall(r"[A-Za-z0-9']+", text)) for text in texts]
    return [1 / count if count else 0.0 for count in counts]


def tiny_model() -> Any:
    """A Llama of random weights over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=512, eos_token_id=257, **sizes))


def run(engine: str, seed: int, model: Path | None, updates: int) -> dict[str, float]:
    """Held-out reward before and after, the largest mismatch, and seconds of an update's parts after the first."""
    trainer = GRPOTrainer(
        tiny_model() if model is None else load_causal_lm(model),
        prompts=chats(ASKED),
        tokenizer=ByteTokenizer() if model is None else load_tokenizer(model),
        reward=one_word,
        engine=engine,
        engine_arguments={"max_model_len": 256, "gpu_memory_utilization": 0.2} if engine == "vllm" else None,
        group_size=8,
        actor_lora_r=16,
        actor_lr=3e-4,
        kl_div_loss_weight=0.0,
        minibatch_size=16,
        seed=seed,
    )
    sampling = {"max_new_tokens": 16}
    rows = trainer.train(max_steps=updates, update_timesteps=16, **sampling).metrics
    held_out = evaluate_policy(trainer, trainer.load_prompts(chats(HELD_OUT)), trainer.sampling(**sampling))
    if engine == "vllm":
        trainer.engine.close()
    later = rows[1:] or rows  # kernels warm up in the first
    return {
        "before": held_out.reward_before,
        "after": held_out.reward_after,
        "mismatch": max(row.get("engine_mismatch_max", 0.0) for row in rows),
        "rollout": statistics.median(row["rollout_seconds"] for row in later),
        "sending": statistics.median(row.get("engine_update_seconds", 0.0) for row in later),
        "update": statistics.median(row["update_seconds"] for row in later),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a chat model; by default a tiny one of random weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=16)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("engine   seed  reward: before  after  mismatch  seconds an update: rollout  sending  learning", flush=True)
    for seed in options.seeds:
        for engine in ("vllm", "lm_core"):
            row = run(engine, seed, options.model, options.updates)
            print(
                f"{engine:8} {seed:4}  {row['before']:14.3f}  {row['after']:5.3f}  {row['mismatch']:8.1e}"
                f"  {row['rollout']:26.2f}  {row['sending']:7.2f}  {row['update']:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
