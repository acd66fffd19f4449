"""The commands other than ``train``: typed functions, whose signatures and docstrings define flags and their help.

Each returns the exit status.
"""

import json
from functools import partial
from typing import Any, Literal

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.cli.text_generation import TextGeneration, open_prompt, print_continuations
from lm_core.data.corpora import held_out_documents
from lm_core.tokenizers import load_tokenizer
from lm_core.training.accelerator import pick_device
from memorizing_transformer.cli.retrieval_report import gain_by_position, retrieved_while_generating, write_page
from memorizing_transformer.model.transformer import MemorizingTransformer
from memorizing_transformer.training.evaluation import evaluate


def generate(checkpoint: str, prompt: str, *, settings: TextGeneration) -> int:
    """Continues a prompt of any length, which is read into the memory, and prints prompt and continuation.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: the text to continue; "-" reads it from standard input, "@FILE" from a file.
        settings: sampling settings.
    """
    print_continuations(checkpoint, prompt, settings, loader=MemorizingTransformer.from_pretrained)
    return 0


def evaluate_checkpoint(
    checkpoint: str,
    *,
    corpus: str = "stdlib",
    field: str = "text",
    tokenizer: str | None = None,
    segment_length: int | None = None,
    batch_size: int = 4,
    max_documents: int | None = None,
    max_knn_memories: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
) -> int:
    """Prints bits per byte on documents with memory and without, and the memory's gain by position.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        corpus: "stdlib" for the held-out part of Python's standard library, or a file or folder, read completely.
        field: name of the text in a .jsonl line.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        segment_length: tokens in a segment; the model's by default.
        batch_size: documents read in parallel.
        max_documents: number of documents; null for all.
        max_knn_memories: capacity of the memory, instead of the model's.
        precision: auto is bf16 on a GPU that has it and fp32 elsewhere.
        device: auto takes CUDA, then MPS, then the CPU.
    """
    folder = checkpoint_folder(checkpoint)
    encoder = load_tokenizer(tokenizer or folder)
    documents = held_out_documents(corpus, tokenizer=encoder, field=field)
    sizes: dict[str, Any] = {} if max_knn_memories is None else {"max_knn_memories": max_knn_memories}
    model = MemorizingTransformer.from_pretrained(folder, **sizes).to(pick_device(device))
    if encoder.eos_id is None:
        raise ValueError(f"tokenizer must have an EOS, which ends documents, got {encoder!r}")
    score = partial(
        evaluate,
        model,
        documents,
        eos_id=encoder.eos_id,
        segment_length=segment_length or model.segment_length,
        batch_size=batch_size,
        max_documents=max_documents,
        precision=precision,
        progress=True,
    )
    on = score()
    print(f"{on.bits_per_byte:.4f} bits/byte, {on.loss:.4f} nats/token over {on.tokens:,} tokens")
    if model.memorizing_layers:
        off = score(use_memory=False)
        print(f"{off.bits_per_byte:.4f} bits/byte without memory")
        print("\n".join(gain_by_position(on, off)))
    return 0


def inspect_checkpoint(
    checkpoint: str,
    *,
    prompt: str | None = None,
    page: str = "retrieved.html",
    max_new_tokens: int = 100,
    layer: int = 0,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "auto",
) -> int:
    """Prints the model of a checkpoint; with a prompt, continues it and writes a page of the retrieved tokens.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: a text longer than a segment; "-" reads it from standard input, "@FILE" from a file.
        page: path of the page.
        max_new_tokens: maximum number of new tokens.
        layer: index among the memorizing layers, counted from 0.
        seed: seed of the draws.
        tokenizer: tokenizer to use instead of the one in the checkpoint.
        device: auto takes CUDA, then MPS, then the CPU.
    """
    folder = checkpoint_folder(checkpoint)
    model = MemorizingTransformer.from_pretrained(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    print(json.dumps(model.config["arguments"], indent=2))
    for layer_number, attention in zip(model.memorizing_layers, model.memory_attentions(), strict=True):
        scales = ", ".join(f"{scale:.1f}" for scale in attention.log_scale.exp().flatten().tolist())
        print(f"layer {layer_number}: temperature of each head {scales}")
    if prompt is None:
        return 0
    load = MemorizingTransformer.from_pretrained
    opened = open_prompt(checkpoint, prompt, tokenizer=tokenizer, device=device, loader=load)
    encoder = opened.tokenizer
    generated = retrieved_while_generating(
        opened.model, opened.ids, max_new_tokens=max_new_tokens, eos_id=encoder.eos_id, layer=layer, seed=seed
    )
    print(f"wrote {write_page(page, opened.ids, generated, encoder)}")
    return 0


def convert(
    old: str, directory: str, *, dim_head: int = 64, tokenizer: str | None = None, overwrite: bool = False
) -> int:
    """Converts a weight file of memorizing-transformers-pytorch to a folder for ``from_pretrained``.

    Args:
        old: file with the state dict.
        directory: folder to write.
        dim_head: features of a head of the original model.
        tokenizer: tokenizer to store with the model: "bytes", a folder, or organisation/name on the hub.
        overwrite: whether the folder may have content, which is replaced.
    """
    from memorizing_transformer.interop import convert_checkpoint

    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    print(f"wrote {convert_checkpoint(old, directory, dim_head=dim_head, overwrite=overwrite, tokenizer=encoder)}")
    return 0
