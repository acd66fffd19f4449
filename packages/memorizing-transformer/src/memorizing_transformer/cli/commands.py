"""The commands themselves: typed functions, from whose signatures and docstrings flags and their help are made.

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
    """Continues a prompt, which goes into the memory as far as it is long, and prints it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: the text to continue; "-" reads it from standard input, "@FILE" from a file.
        settings: of the generation.
    """
    print_continuations(MemorizingTransformer, checkpoint, prompt, settings)
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
    """Prints how well a checkpoint predicts documents, with memory and without, by position.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        corpus: "stdlib" for the held-out part of Python's library, or a file or folder, read whole.
        field: of a .jsonl line, the text.
        tokenizer: instead of the one in the checkpoint.
        segment_length: tokens a segment; the model's by default.
        batch_size: documents at a time.
        max_documents: only so many; null for all.
        max_knn_memories: another size of the memory.
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
    """Prints what a checkpoint is; with a prompt, writes a page of what the memory gave while continuing it.

    Args:
        checkpoint: folder of a run (its newest checkpoint), of a checkpoint, or of save_pretrained.
        prompt: a text longer than a segment; "-" reads it from standard input, "@FILE" from a file.
        page: the page to write.
        max_new_tokens: how far to continue.
        layer: which of the memorizing layers, counted from 0.
        seed: of the draws.
        tokenizer: instead of the one in the checkpoint.
        device: auto takes CUDA, then MPS, then the CPU.
    """
    folder = checkpoint_folder(checkpoint)
    model = MemorizingTransformer.from_pretrained(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    print(json.dumps(model.config["arguments"], indent=2))
    for number, attention in zip(model.memorizing_layers, model.memory_attentions(), strict=True):
        scales = ", ".join(f"{scale:.1f}" for scale in attention.log_scale.exp().flatten().tolist())
        print(f"layer {number}: temperature of each head {scales}")
    if prompt is None:
        return 0
    opened = open_prompt(MemorizingTransformer, checkpoint, prompt, tokenizer=tokenizer, device=device)
    encoder = opened.tokenizer
    generated = retrieved_while_generating(
        opened.model, opened.ids, max_new_tokens=max_new_tokens, eos_id=encoder.eos_id, layer=layer, seed=seed
    )
    print(f"wrote {write_page(page, opened.ids, generated, encoder)}")
    return 0


def convert(
    old: str, directory: str, *, dim_head: int = 64, tokenizer: str | None = None, overwrite: bool = False
) -> int:
    """Turns a weight file of memorizing-transformers-pytorch into a folder that ``from_pretrained`` opens.

    Args:
        old: file with the state dict.
        directory: where to write.
        dim_head: features of a head, as the original was made with.
        tokenizer: to store with the model: "bytes", a folder, or organisation/name on the hub.
        overwrite: whether a folder with content may be written to.
    """
    from memorizing_transformer.interop import convert_checkpoint

    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    print(f"wrote {convert_checkpoint(old, directory, dim_head=dim_head, overwrite=overwrite, tokenizer=encoder)}")
    return 0
