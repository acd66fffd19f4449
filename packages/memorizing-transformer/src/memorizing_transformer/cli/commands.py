"""The commands other than ``train``: typed functions, whose signatures and docstrings define flags and their help.

Each returns the exit status.
"""

import json
from functools import partial
from typing import Any, Literal

from lm_core.adapters.loading import load_causal_lm
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checks import check_positive
from lm_core.cli.main import print_main
from lm_core.cli.text_generation import TextGeneration, open_prompt, print_continuations
from lm_core.data.corpora import held_out_documents, load_corpus
from lm_core.data.documents import load_documents
from lm_core.distributed import rank
from lm_core.tokenizers import end_ids, load_tokenizer
from lm_core.training.accelerator import pick_device, start_accelerator
from memorizing_transformer.cli.models import open_model
from memorizing_transformer.cli.retrieval_report import (
    gain_by_position,
    neighbours_while_generating,
    retrieved_while_generating,
    write_datastore_page,
    write_page,
)
from memorizing_transformer.memory.datastore import Datastore
from memorizing_transformer.memory.ring_storage import StorageFormat
from memorizing_transformer.model.knn_lm import KNNLM, build_datastore, evaluate_datastore
from memorizing_transformer.model.memory_reader import MemoryReader
from memorizing_transformer.training.evaluation import evaluate


def generate(model: str, prompt: str, *, settings: TextGeneration) -> int:
    """Continues a prompt of any length, which is read into the memory, and prints prompt and continuation.

    Args:
        model: folder of a run (its newest checkpoint), of a checkpoint, of save_pretrained or of a transformers model,
            or a name on the hub.
        prompt: text to continue; "-" reads standard input, "@FILE" a file.
        settings: sampling settings.
    """
    print_continuations(model, prompt, settings, loader=open_model)
    return 0


def evaluate_checkpoint(
    model: str,
    *,
    data: str = "stdlib",
    field: str = "text",
    tokenizer: str | None = None,
    segment_length: int | None = None,
    batch_size: int = 4,
    max_documents: int | None = None,
    max_knn_memories: int | None = None,
    datastore: str | None = None,
    knn_neighbours: int = 64,
    knn_lambda: float | None = None,
    knn_temperature: float | None = None,
    knn_index: str | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
) -> int:
    """Prints bits per byte on documents with memory and without, and the memory's gain by position.

    Args:
        model: folder of a run (its newest checkpoint), of a checkpoint, of save_pretrained or of a transformers model,
            or a name on the hub.
        data: "stdlib" for the held-out part of Python's standard library, or a source of ``train``, read completely.
        segment_length: tokens in a segment; the model's by default.
        batch_size: documents read in parallel.
        max_documents: number of documents; null for all.
        max_knn_memories: capacity of the memory, instead of the model's.
        datastore: folder of the command datastore: prints bits per byte with its neighbours and without instead.
        knn_neighbours: neighbours of each token in the datastore.
        knn_lambda: weight of the neighbours; null chooses it on every other document and reports on the others.
        knn_temperature: divisor of their squared distances; null chooses it in the same way.
        knn_index: factory string of faiss for the datastore, such as IVF256,Flat; null searches exactly.
    """
    if datastore is not None:
        return _evaluate_datastore(
            model,
            datastore,
            data=data,
            field=field,
            tokenizer=tokenizer,
            segment_length=segment_length,
            batch_size=batch_size,
            max_documents=max_documents,
            neighbours=knn_neighbours,
            lambda_=knn_lambda,
            temperature=knn_temperature,
            index=knn_index,
            device=device,
        )
    place = pick_device(device)
    start_accelerator(place)  # connects the processes of torchrun, which share the documents
    folder = checkpoint_folder(model)
    encoder = load_tokenizer(tokenizer or folder)
    documents = held_out_documents(data, tokenizer=encoder, field=field)
    sizes: dict[str, Any] = {} if max_knn_memories is None else {"max_knn_memories": max_knn_memories}
    memorizing = open_model(folder, **sizes).to(place)
    if encoder.eos_id is None:
        raise ValueError(f"tokenizer must have an EOS, which ends documents, got {encoder!r}")
    score = partial(
        evaluate,
        memorizing,
        documents,
        eos_id=encoder.eos_id,
        segment_length=segment_length or memorizing.segment_length,
        batch_size=batch_size,
        max_documents=max_documents,
        precision=precision,
        progress=rank() == 0,
    )
    on = score()
    print_main(f"{on.bits_per_byte:.4f} bits/byte, {on.loss:.4f} nats/token over {on.tokens:,} tokens")
    if memorizing.memorizing_layers:
        off = score(use_memory=False)
        print_main(f"{off.bits_per_byte:.4f} bits/byte without memory")
        print_main("\n".join(gain_by_position(on, off)))
    return 0


def make_datastore(
    model: str,
    directory: str,
    *,
    data: str = "stdlib",
    field: str = "text",
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    storage: StorageFormat = "int8",
    segment_length: int = 512,
    window: int = 0,
    batch_size: int = 8,
    device: str = "auto",
) -> int:
    """Writes the states of a model on training text to a datastore for kNN-LM; an unfinished one is continued.

    Args:
        model: folder of a run (its newest checkpoint), of a checkpoint, of save_pretrained or of a transformers model,
            or a name on the hub.
        directory: new folder, or that of an unfinished datastore.
        data: "stdlib" for the training part of Python's standard library, or a source of ``train``, read completely.
        max_tokens: whole documents are taken up to so many tokens; null for all.
        storage: number format of the states.
        segment_length: new tokens in a forward.
        window: tokens before them in the same forward.
        batch_size: forwards in a batch.
    """
    folder = checkpoint_folder(model)
    encoder = load_tokenizer(tokenizer or folder)
    if data == "stdlib":
        documents = load_corpus(data, tokenizer=encoder).train
    else:
        documents = load_documents(data, tokenizer=encoder, field=field)
    if max_tokens is not None:
        check_positive(max_tokens, "max_tokens")
        documents = documents[: max(1, int((documents.lengths.cumsum() <= max_tokens).sum()))]
    language_model = load_causal_lm(folder).to(pick_device(device))
    made = build_datastore(
        language_model,
        documents,
        directory,
        storage=storage,
        segment_length=segment_length,
        window=window,
        batch_size=batch_size,
        tokenizer=encoder,
        progress=True,
    )
    print(f"{directory}: {len(made):,} entries of {made.dim} features, {made.nbytes / 1e6:.1f} MB in {storage}")
    made.close()
    return 0


def _evaluate_datastore(
    model: str,
    folder: str,
    *,
    data: str,
    field: str,
    tokenizer: str | None,
    segment_length: int | None,
    batch_size: int,
    max_documents: int | None,
    neighbours: int,
    lambda_: float | None,
    temperature: float | None,
    index: str | None,
    device: str,
) -> int:
    """Prints bits per byte of a model alone and with a datastore."""
    source = checkpoint_folder(model)
    encoder = load_tokenizer(tokenizer or source)
    opened = Datastore(folder, index=index)
    opened.check(tokenizer=getattr(encoder, "fingerprint", None))
    documents = held_out_documents(data, tokenizer=encoder, field=field)
    if max_documents is not None:
        check_positive(max_documents, "max_documents")
        documents = documents[:: max(1, len(documents) // max_documents)][:max_documents]
    result = evaluate_datastore(
        load_causal_lm(source).to(pick_device(device)),
        opened,
        documents,
        lambda_=lambda_,
        temperature=temperature,
        k=neighbours,
        segment_length=segment_length or int(opened.made_from["segment_length"]),
        window=int(opened.made_from["window"]),
        batch_size=batch_size,
        progress=True,
    )
    chosen = "chosen on other documents" if None in (lambda_, temperature) else "given"
    print(f"{result.without:.4f} bits/byte without the datastore, over {result.tokens:,} tokens")
    print(f"{result.with_datastore:.4f} bits/byte with it: {result.without - result.with_datastore:+.4f}")
    print(f"lambda {result.lambda_:g}, temperature {result.temperature:g} ({chosen})")
    opened.close()
    return 0


def inspect_checkpoint(
    model: str,
    *,
    settings: TextGeneration,
    prompt: str | None = None,
    page: str = "retrieved.html",
    layer: int = 0,
    datastore: str | None = None,
    knn_neighbours: int = 64,
    knn_lambda: float = 0.25,
    knn_temperature: float = 100.0,
) -> int:
    """Prints a stored model; with a prompt, continues it and writes a page of the retrieved tokens.

    Args:
        model: folder of a run (its newest checkpoint), of a checkpoint, of save_pretrained or of a transformers model,
            or a name on the hub.
        settings: sampling settings.
        prompt: a text longer than a segment; "-" reads standard input, "@FILE" a file.
        page: path of the page.
        layer: index among the memorizing layers, counted from 0.
        datastore: folder of the command datastore: the page shows the neighbours in it instead.
        knn_neighbours: neighbours of each token in the datastore.
        knn_lambda: weight of the neighbours.
        knn_temperature: divisor of their squared distances.
    """
    if datastore is not None:
        if prompt is None:
            raise ValueError("prompt must be a text for the page of a datastore, got None")
        opened = open_prompt(model, prompt, tokenizer=settings.tokenizer, device=settings.device, loader=load_causal_lm)
        store = Datastore(datastore)
        store.check(tokenizer=getattr(opened.tokenizer, "fingerprint", None))
        mixed = KNNLM(opened.model, store, k=knn_neighbours, temperature=knn_temperature, lambda_=knn_lambda)
        new = neighbours_while_generating(
            mixed,
            opened.ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            filters=settings.filters(),
            repetition_penalty=settings.repetition_penalty,
            eos_id=end_ids(opened.tokenizer, opened.model),
            seed=settings.seed,
        )
        print(f"wrote {write_datastore_page(page, opened.ids, new, store, opened.tokenizer)}")
        store.close()
        return 0
    folder = checkpoint_folder(model)
    memorizing = open_model(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in memorizing.parameters()):,} parameters")
    print(json.dumps(memorizing.config["arguments"], indent=2))
    attentions: list[Any] = [*memorizing.memory_attentions()]
    for layer_number, attention in zip(memorizing.memorizing_layers, attentions, strict=True):
        scales = ", ".join(f"{scale:.1f}" for scale in attention.log_scale.exp().flatten().tolist())
        print(f"layer {layer_number}: temperature of each head {scales}")
        if isinstance(attention, MemoryReader):
            weights = ", ".join(f"{weight:.3f}" for weight in attention.openness.flatten().tolist())
            print(f"layer {layer_number}: weight of the memory in each head {weights}")
    if prompt is None:
        return 0
    opened = open_prompt(model, prompt, tokenizer=settings.tokenizer, device=settings.device, loader=open_model)
    generated = retrieved_while_generating(
        opened.model,
        opened.ids,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        filters=settings.filters(),
        repetition_penalty=settings.repetition_penalty,
        eos_id=end_ids(opened.tokenizer, opened.model),
        layer=layer,
        seed=settings.seed,
    )
    print(f"wrote {write_page(page, opened.ids, generated, opened.tokenizer)}")
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
    """
    from memorizing_transformer.interop import convert_checkpoint

    print(f"wrote {convert_checkpoint(old, directory, dim_head=dim_head, overwrite=overwrite, tokenizer=tokenizer)}")
    return 0
