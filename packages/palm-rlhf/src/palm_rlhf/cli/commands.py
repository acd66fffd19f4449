"""Commands on trained models: ``generate``, ``eval``, ``sample`` and ``convert``."""

from typing import Any, Literal

import torch

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.text_generation import TextGeneration, print_continuations
from lm_core.data.corpora import held_out_documents
from lm_core.generation.generate import generate as generate_tokens
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device
from palm_rlhf.cli.sources import find_reward
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.evaluation import evaluate


def generate(checkpoint: str, prompt: str, *, settings: TextGeneration) -> int:
    """Continues a prompt and prints it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: text to continue; "-" reads it from standard input, "@FILE" from a file.
        settings: length and sampling of the continuation.
    """
    print_continuations(checkpoint, prompt, settings, loader=PaLM.from_pretrained)
    return 0


def evaluate_checkpoint(
    checkpoint: str,
    *,
    corpus: str = "stdlib",
    field: str = "text",
    tokenizer: str | None = None,
    sequence_length: int = 256,
    batch_size: int = 8,
    max_tokens: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
) -> int:
    """Prints the loss of a checkpoint on text, in bits per byte.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        corpus: "stdlib" for the held-out part of Python's library, or any other source of text, scored whole.
        field: column that holds the text, where there are columns.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        sequence_length: tokens per row; each is predicted from the earlier ones of its row.
        batch_size: rows per forward pass.
        max_tokens: approximate number of tokens to score, taken evenly from the documents; null for all.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        device: auto takes CUDA, then MPS, then the CPU.
    """
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    held_out = evaluate(
        PaLM.from_pretrained(folder).to(pick_device(device)),
        held_out_documents(corpus, tokenizer=encoder, field=field),
        encoder,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        precision=precision,
        progress=True,
    )
    print(f"{held_out.bits_per_byte:.4f} bits/byte, {held_out.loss:.4f} nats/token over {held_out.tokens:,} tokens")
    return 0


def convert(
    old: str,
    directory: str,
    *,
    norm_gain: Literal["auto", "plain", "offset"] = "auto",
    prefix: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> int:
    """Converts a weight file of PaLM-rlhf-pytorch to a folder that ``PaLM.from_pretrained`` opens.

    Args:
        old: file with the state dict of a PaLM, RewardModel or ActorCritic.
        directory: folder to write.
        norm_gain: form in which norms are stored: plain up to release 0.2.3, offset later; auto decides by the values.
        prefix: key prefix of the PaLM to convert, where the file has several, such as "actor_palm".
        tokenizer: tokenizer to store with the model: "bytes", a folder, or organisation/name on the hub.
        overwrite: allows writing to a folder that has content.
    """
    from palm_rlhf.interop.weight_files import convert_checkpoint

    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    folder = convert_checkpoint(
        old, directory, norm_gain=norm_gain, prefix=prefix, overwrite=overwrite, tokenizer=encoder
    )
    print(f"wrote {folder}")
    return 0


def sample(
    checkpoint: str,
    prompt: str,
    *,
    scope: str | None = "actor",
    reward: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    tokenizer: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Prints responses of a trained policy; with a reward, the best first.

    Args:
        checkpoint: folder of a run of ppo or grpo, or of a PaLM.
        prompt: text to answer.
        scope: LoRA scope of the policy; null for the network as it is.
        reward: folder of a reward model or of its run, or module:function.
        num_samples: number of responses.
        max_new_tokens: maximum length of a response, in tokens.
        temperature: divisor of the logits; above 0.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        seed: seed of the draws.
        device: auto takes CUDA, then MPS, then the CPU.
    """
    from palm_rlhf.data.prompts import load_prompts
    from palm_rlhf.data.rollouts import rollout_of
    from palm_rlhf.reward.rewards import as_reward, check_scores

    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    target = pick_device(device)
    palm = PaLM.from_pretrained(folder).to(target)
    # draw all responses in one batch
    (parsed,) = load_prompts([prompt], tokenizer=encoder)
    arguments: dict[str, Any] = {} if scope is None else {"finetune_scope": scope}
    result = generate_tokens(
        palm,
        [parsed.ids.to(target)] * num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_id=encoder.eos_id,
        generator=torch.Generator(target).manual_seed(seed),
        **arguments,
    )
    responses = [row[:length].cpu() for row, length in zip(result.tokens, result.lengths.tolist(), strict=True)]
    texts = [encoder.decode(row.tolist()) for row in responses]
    if reward is None:
        for text in texts:
            print(prompt + text)
        return 0
    # rank them by their rewards
    scorer, _ = find_reward(reward)
    rollout = rollout_of([parsed] * num_samples, responses, finished=result.finished.tolist(), texts=texts)
    scores = check_scores(as_reward(scorer)(rollout), num_samples).tolist()
    for score, text in sorted(zip(scores, texts, strict=True), reverse=True):
        print(f"--- reward {score:.3f}\n{prompt + text}")
    return 0
