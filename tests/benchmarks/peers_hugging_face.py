"""PaLM next to Hugging Face's Cohere model of the same sizes: decoding over new tokens, a training step over length.

    nox -s bench_peers -- hugging_face [--model FOLDER]

With ``--model``, a folder of a causal language model, ``lm_core.generate`` also continues a prompt with that model next
to transformers' own ``generate``: greedy, the same tokens, in the layout of weights that our decoder chooses.

The limits: decoding cannot beat one single-row product for every weight; a training step cannot beat the matrix-product
peak, which is measured beside each step.
"""

import warnings
from pathlib import Path

import bench_generation
import bench_training
import torch
from measure import arguments, in_turns, median, ratio, report
from transformers import AutoModelForCausalLM

from lm_core import as_causal_lm, generate

TWIN = "Hugging Face Cohere"
TRANSFORMERS = "transformers generate"


def decoding(new_tokens: int, threads: int, rounds: int) -> dict[str, object]:
    found = bench_generation.against_twin(new_tokens, threads, rounds)
    ours, twin = found["PaLM tokens/s"], found["twin tokens/s"]
    return {
        "what": f"PaLM decoding, {new_tokens} new tokens after 128",
        "threads": threads,
        TWIN: f"{twin:.0f} tokens/s",
        "ours": f"{ours:.0f} tokens/s",
        "times as fast": found["PaLM / twin"],
        "share of limit": found["share of limit"],
        "axis": "new tokens",
        "size": new_tokens,
        "cost": new_tokens / ours,
        "peer cost": new_tokens / twin,
        "unit": "s",
    }


def training(batch: int, length: int, threads: int, rounds: int) -> dict[str, object]:
    found = bench_training.row(batch, length, threads, rounds)
    ours, twin = found["PaLM tokens/s"], found["twin tokens/s"]
    return {
        "what": f"PaLM training step, {batch} x {length}",
        "threads": threads,
        TWIN: f"{twin:.0f} tokens/s",
        "ours": f"{ours:.0f} tokens/s",
        "times as fast": found["PaLM / twin"],
        "share of limit": found["PaLM of peak"],
        "axis": "sequence length at 2,048 tokens",
        "size": length,
        "cost": batch * length / ours,
        "peer cost": batch * length / twin,
        "unit": "s",
    }


def generation(folder: Path, batch: int, new_tokens: int, threads: int, rounds: int) -> dict[str, object]:
    """One model, ours and transformers' loop over it; the prompts are random ids."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    adapter = as_causal_lm(model)
    prompt = torch.randint(model.config.vocab_size, (batch, 32), generator=torch.Generator().manual_seed(0))
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def ours() -> torch.Tensor:
        return generate(adapter, prompt, max_new_tokens=new_tokens, temperature=0.0).tokens

    def theirs() -> torch.Tensor:
        sequences = model.generate(prompt, attention_mask=torch.ones_like(prompt), **lengths)
        return sequences[:, prompt.shape[1] :]

    same = float((ours() == theirs()).float().mean())
    seconds = in_turns({"ours": ours, "theirs": theirs}, rounds)
    return {
        "what": f"{folder.name}: {new_tokens} new tokens after 32, batch {batch}",
        "threads": threads,
        TRANSFORMERS: f"{batch * new_tokens / median(seconds['theirs']):.1f} tokens/s",
        "ours": f"{batch * new_tokens / median(seconds['ours']):.1f} tokens/s",
        "times as fast": ratio(seconds["theirs"], seconds["ours"]),
        "equal tokens": same,
    }


def main() -> None:
    options = arguments(
        __doc__.splitlines()[0],
        new_tokens={"type": int, "nargs": "+", "default": [16, 64, 256]},
        model={"type": Path, "help": "folder of a causal language model of transformers"},
    )
    warnings.simplefilter("ignore")
    rounds = min(options.rounds, 3)
    rows = [decoding(new, threads, rounds) for threads in options.threads for new in options.new_tokens]
    shapes = [(8, 256), (4, 512), (1, 2048)]
    rows += [training(*shape, threads, rounds) for threads in options.threads for shape in shapes]
    report("PaLM and Hugging Face's Cohere twin, 22.5 M parameters, float32", rows, options.json)

    if options.model is None:
        print("not measured: generation with a model of transformers; give --model FOLDER")
        return
    # The prompt's share of the time is that of both.
    rows = [generation(options.model, batch, 64, threads, rounds) for threads in options.threads for batch in (1, 8)]
    report(f"Generation with {options.model.name}, float32", rows, options.json)


if __name__ == "__main__":
    main()
