"""Commands on trained models: ``generate``, ``eval``, ``sample`` and ``convert``."""

import sys
from typing import Any, Literal

import torch

from lm_core.adapters.loading import DType
from lm_core.checks import check_positive
from lm_core.cli.text_generation import (
    OpenedPrompt,
    SamplingFlags,
    TextGeneration,
    print_texts,
    read_prompt,
    tokenised_prompt,
)
from lm_core.data.corpora import held_out_documents
from lm_core.generation.generate import generate as generate_tokens
from lm_core.tokenizers import continuation_text, end_ids, load_tokenizer
from lm_core.training.accelerator import pick_device
from palm_rlhf.cli.sources import OpenedPolicy, find_reward, open_policy
from palm_rlhf.pretrain.evaluation import evaluate


def generate(
    model: str, prompt: str, *, settings: TextGeneration, scope: str | None = "actor", dtype: DType = "auto"
) -> int:
    """Continues a prompt and prints it; for a run of reinforcement learning with its trained policy.

    Args:
        settings: length and sampling of the continuation.
        scope: LoRA scope of a PaLM, used if it has one of this name; null for the base alone.
        dtype: dtype of a Hugging Face model's weights; auto keeps the stored one.
    """
    policy = _open(model, tokenizer=settings.tokenizer, scope=scope, dtype=dtype)
    text, ids = tokenised_prompt(prompt, policy.tokenizer)
    target = pick_device(settings.device)
    opened = OpenedPrompt(policy.model.to(target).eval(), policy.tokenizer, text, ids.to(target))
    print_texts(opened, settings, **policy.arguments)
    return 0


def evaluate_model(
    model: str,
    *,
    data: str = "stdlib",
    field: str = "text",
    tokenizer: str | None = None,
    sequence_length: int = 256,
    batch_size: int = 8,
    max_tokens: int | None = None,
    scope: str | None = "actor",
    dtype: DType = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
) -> int:
    """Prints the loss of a model, or of a run's trained policy, on text in bits per byte.

    Args:
        data: "stdlib" for the held-out part of Python's library, or any other source of text, scored whole.
        sequence_length: tokens per row; each is predicted from the earlier ones of its row.
        batch_size: rows per forward pass.
        max_tokens: approximate number of tokens to score, taken evenly from the documents; null for all.
        scope: LoRA scope of a PaLM, used if it has one of this name; null for the base alone.
        dtype: dtype of a Hugging Face model's weights; auto keeps the stored one.
    """
    policy = _open(model, tokenizer=tokenizer, scope=scope, dtype=dtype)
    held_out = evaluate(
        policy.model.to(pick_device(device)),
        held_out_documents(data, tokenizer=policy.tokenizer, field=field),
        policy.tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        precision=precision,
        progress=True,
        **policy.arguments,
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
    model: str,
    prompt: str,
    *,
    sampling: SamplingFlags,
    scope: str | None = "actor",
    dtype: DType = "auto",
    reward: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    tokenizer: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Prints responses of a trained policy; with a reward, the best first.

    Args:
        sampling: temperature, filters and repetition penalty.
        scope: LoRA scope of a PaLM, used if it has one of this name; null for the base alone.
        dtype: dtype of a Hugging Face model's weights; auto keeps the stored one.
        reward: folder of a reward model or of its run, or module:function.
    """
    from palm_rlhf.data.prompts import load_prompts
    from palm_rlhf.data.rollouts import rollout_of
    from palm_rlhf.reward.rewards import as_reward, check_scores

    check_positive(num_samples, "num_samples")
    policy = _open(model, tokenizer=tokenizer, scope=scope, dtype=dtype)
    encoder, target = policy.tokenizer, pick_device(device)
    # draw all responses in one batch
    text = read_prompt(prompt)
    (parsed,) = load_prompts([text], tokenizer=encoder)
    result = generate_tokens(
        policy.model.to(target),
        [parsed.ids.to(target)] * num_samples,
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        filters=sampling.filters(),
        repetition_penalty=sampling.repetition_penalty,
        eos_id=end_ids(encoder, policy.model),
        generator=torch.Generator(target).manual_seed(seed),
        **policy.arguments,
    )
    responses = [row[:length].cpu() for row, length in zip(result.tokens, result.lengths.tolist(), strict=True)]
    texts = [continuation_text(encoder, parsed.ids.tolist(), row.tolist()) for row in responses]
    if reward is None:
        for response in texts:
            print(text + response)
        return 0
    # rank them by their rewards
    scorer, _ = find_reward(reward)
    rollout = rollout_of([parsed] * num_samples, responses, finished=result.finished.tolist(), texts=texts)
    scores = rollout.totals(check_scores(as_reward(scorer)(rollout), rollout)).tolist()
    for score, response in sorted(zip(scores, texts, strict=True), reverse=True):
        print(f"--- reward {score:.3f}\n{text + response}")
    return 0


def _open(model: str, **settings: Any) -> OpenedPolicy:
    """``open_policy``, which names a trained policy on standard error."""
    policy = open_policy(model, **settings)
    if policy.arguments or hasattr(policy.model, "peft_config"):
        print(f"model: {policy.description}", file=sys.stderr)
    return policy
