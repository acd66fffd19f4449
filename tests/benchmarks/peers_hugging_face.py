"""PaLM next to Hugging Face's Cohere model of the same sizes: decoding over new tokens, a training step over length.

    nox -s bench_peers -- hugging_face [--model FOLDER]

The twin is CohereForCausalLM with one key/value head. The limits: decoding cannot beat one single-row product for every
weight; a training step cannot beat the matrix-product peak, measured in every round. Operations of a step: 6 for each
weight and token, and 12 for each layer, head feature and attended pair. Tokens a second include reading the prompt.

With ``--model``, a folder of a causal language model, ``lm_core.generate`` also continues a prompt with that model next
to transformers' own ``generate``: greedy, the same tokens, in the layout of weights that our decoder chooses, and at
batch 1 also with ``compile=True`` (a minute to compile, which is not counted).
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from measure import (
    arguments,
    bytes_of,
    compared,
    in_turns,
    matmul_flops,
    median,
    read_bandwidth,
    report,
    thread_counts,
    tokens_per_second,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

from lm_core import as_causal_lm, generate
from palm_rlhf import PaLM

TWIN = "Hugging Face Cohere"
TRANSFORMERS = "transformers generate"
PROMPT = 128


def cohere_twin(palm: PaLM) -> CohereForCausalLM:
    """Hugging Face's model of the same sizes."""
    config = CohereConfig(
        vocab_size=palm.num_tokens,
        hidden_size=palm.dim,
        intermediate_size=4 * palm.dim,
        num_hidden_layers=palm.depth,
        num_attention_heads=palm.heads,
        num_key_value_heads=palm.kv_heads,
        logit_scale=1.0,
        use_qk_norm=False,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return CohereForCausalLM(config).eval()


def operations(palm: PaLM, batch: int, length: int) -> float:
    """Of forward and backward; causal attention counts half of its pairs."""
    weights = sum(parameter.numel() for parameter in palm.parameters())
    attention = 12 * palm.depth * palm.heads * palm.dim_head * length / 2
    return batch * length * (6 * weights + attention)


def stepped(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    model.zero_grad()


def palm_and_twin() -> tuple[PaLM, CohereForCausalLM]:
    """22.5 M parameters each."""
    torch.manual_seed(0)
    palm = PaLM(dim=512, depth=6, num_tokens=256).eval()
    return palm, cohere_twin(palm)


def decoding(new_tokens: int, rounds: int) -> dict[str, Any]:
    palm, twin = palm_and_twin()
    prompt, rates = torch.randint(256, (1, PROMPT)), []
    mask = torch.ones_like(prompt)
    weights = [parameter.detach() for parameter in palm.parameters() if parameter.ndim == 2]
    seconds = in_turns(
        {
            "limit": lambda: rates.append(read_bandwidth(weights)),
            "ours": lambda: generate(palm, prompt, max_new_tokens=new_tokens, temperature=0.0),
            "theirs": lambda: twin.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False),
        },
        rounds,
    )
    limit = new_tokens * bytes_of(weights) / median(rates)
    what, series = f"PaLM decoding, {new_tokens} new tokens after {PROMPT}", {"axis": "new tokens", "size": new_tokens}
    return compared(what, TWIN, seconds, tokens_per_second(new_tokens), limit=limit, **series)


def training(batch: int, length: int, rounds: int) -> dict[str, Any]:
    palm, twin = (model.train() for model in palm_and_twin())
    ids = torch.randint(256, (batch, length + 1))
    inputs, peaks = ids[:, :-1], []
    seconds = in_turns(
        {
            "peak": lambda: peaks.append(matmul_flops()),
            "ours": lambda: stepped(palm, palm(ids, return_loss=True)),
            "theirs": lambda: stepped(twin, twin(inputs, labels=inputs).loss),
        },
        rounds,
    )
    return compared(
        f"PaLM training step, {batch} x {length}",
        TWIN,
        seconds,
        tokens_per_second(batch * length),
        limit=operations(palm, batch, length) / median(peaks),
        axis="sequence length at 2,048 tokens",
        size=length,
    )


def generation(folder: Path, batch: int, new_tokens: int, rounds: int, *, compile: bool = False) -> dict[str, Any]:
    """One model, ours and transformers' loop over it; the prompts are random ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    adapter = as_causal_lm(model)
    prompt = torch.randint(model.config.vocab_size, (batch, 64), generator=torch.Generator().manual_seed(0))
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def ours() -> torch.Tensor:
        return generate(adapter, prompt, max_new_tokens=new_tokens, temperature=0.0, compile=compile).tokens

    def theirs() -> torch.Tensor:
        sequences = model.generate(prompt, attention_mask=torch.ones_like(prompt), **lengths)
        return sequences[:, prompt.shape[1] :]

    same = float((ours() == theirs()).float().mean())
    what = f"{folder.name}: {new_tokens} new tokens after 64, batch {batch}{', compiled' if compile else ''}"
    seconds = in_turns({"ours": ours, "theirs": theirs}, rounds)
    return compared(what, TRANSFORMERS, seconds, tokens_per_second(batch * new_tokens), **{"equal tokens": same})


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        new_tokens={"type": int, "nargs": "+", "default": [16, 64, 256]},
        model={"type": Path, "help": "folder of a causal language model of transformers"},
    )
    warnings.simplefilter("ignore")
    rounds, twins, models = min(options.rounds, 3), [], []
    for _ in thread_counts(options):
        twins += [decoding(new_tokens, rounds) for new_tokens in options.new_tokens]
        twins += [training(*shape, rounds) for shape in ((8, 256), (4, 512), (1, 2048))]
        # The prompt's share of the time is that of both.
        if options.model:
            models += [generation(options.model, batch, 48, rounds) for batch in (1, 8)]
            models.append(generation(options.model, 1, 48, rounds, compile=True))
    report("PaLM and Hugging Face's Cohere twin, 22.5 M parameters, float32", twins, options.json)
    if options.model is None:
        print("not measured: generation with a model of transformers; give --model FOLDER")
        return
    report(f"Generation with {options.model.name}, float32", models, options.json)


if __name__ == "__main__":
    main()
