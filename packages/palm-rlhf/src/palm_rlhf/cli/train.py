"""The command ``train``: pretrains a PaLM on text."""

import contextlib
from collections.abc import Mapping
from typing import Any, Literal

from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checkpoints.manifest import read_json
from lm_core.checkpoints.pretrained import CONFIG_FILE, TOKENIZER_FOLDER
from lm_core.cli.corpus import TextCorpus
from lm_core.cli.main import report, report_run
from lm_core.cli.parser import Command, Group, preset_name
from lm_core.cli.text_generation import TextGeneration, print_continuations
from lm_core.distributed import rank, world_size
from lm_core.rng import seed_everything
from lm_core.training.run_directory import Result
from palm_rlhf.cli.sources import QUICKSTART
from palm_rlhf.model.palm import PaLM
from palm_rlhf.pretrain.config import TrainingSettings

# Sizes and learning rates of language models: arXiv 2005.14165, table 2.1 (125M, 350M and 1.3B parameters there), and
# arXiv 2204.02311, table 1 (8B) with the learning rate of GPT-3 6.7B. The quickstart is sized for a minute and a half
# on two CPU cores; normalised queries and keys allow its high learning rate: 4e-3 reached 2.54 bits/byte after 480
# updates, 3e-3 without them 2.62.
PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "dim": 192,
        "depth": 4,
        "heads": 6,
        "dim_head": 32,
        "qk_rmsnorm": True,
        "learning_rate": 4e-3,
        "max_steps": 440,
        "checkpoint_dir": QUICKSTART,
    },
    "small": {"dim": 768, "depth": 12, "heads": 12, "dim_head": 64, "learning_rate": 6e-4},
    "base": {"dim": 1024, "depth": 24, "heads": 16, "dim_head": 64, "learning_rate": 3e-4},
    "large": {"dim": 2048, "depth": 24, "heads": 16, "dim_head": 128, "learning_rate": 2e-4},
    "8b": {"dim": 4096, "depth": 32, "heads": 16, "dim_head": 256, "learning_rate": 1.2e-4},
}
# Arguments of PaLM that the command sets itself.
SETTLED = ("num_tokens", "causal", "lora_r", "finetune_scopes", "flash_attn", "cross_entropy_ignore_index")

TRAIN = """Pretrains a PaLM on text; without arguments, on Python's own library (a minute and a half on two CPU cores).

  palm-rlhf train                                          the quickstart, into runs/palm-quickstart
  palm-rlhf train --data texts.jsonl.gz --preset small --sequence_length 1024 --max_steps 20000
  palm-rlhf train --model runs/palm --data more.jsonl --learning_rate 1e-4 --checkpoint_dir runs/more
  palm-rlhf train --print_config > run.yaml; palm-rlhf train --config run.yaml --seed 1
  torchrun --nproc_per_node 8 -m palm_rlhf train --data texts/ --preset large --fsdp --compile

Flags win over the YAML file, which wins over the preset. Ctrl-C saves a checkpoint; the same command resumes from it,
as it does after a kill."""


def train(
    *,
    text: TextCorpus,
    sizes: dict[str, Any],
    settings: TrainingSettings,
    model: str | None = None,
    preset: Literal["quickstart", "small", "base", "large", "8b"] | None = None,
    checkpoint_dir: str = "runs/palm",
    resume: bool | Literal["auto"] = "auto",
    trackers: list[str] | None = None,
    sample_prompt: str = "def add(a, b):\n",
    sample_tokens: int = 160,
) -> int:
    """Pretrains a PaLM on text.

    Args:
        text: training text.
        sizes: arguments of ``PaLM``.
        settings: optimizer, schedule, logging and checkpoints.
        model: folder of a PaLM or of a run whose weights and sizes training starts from; null for new weights.
        preset: sizes and the learning rate that fits them; a flag next to it wins. By default quickstart without data
            and model, and small otherwise.
        sample_prompt: prompt that the trained model continues at the end.
        sample_tokens: length of the continuation printed at the end, in tokens; 0 for none.
    """
    from palm_rlhf.pretrain.trainer import PretrainTrainer

    # text, model and trainer
    encoder, data = text.load()
    seed_everything(settings.seed)
    if model is None:
        palm = PaLM(num_tokens=encoder.vocab_size, **sizes)
    else:
        palm = PaLM.from_pretrained(checkpoint_folder(model))
        stored = palm.config["arguments"]
        changed = [f"{name} {value} (it has {stored[name]})" for name, value in sizes.items() if value != stored[name]]
        if changed:
            raise ValueError(f"model {model} has its own sizes, got {', '.join(changed)}")
    trainer = PretrainTrainer(
        model=palm,
        corpus=data,
        tokenizer=encoder,
        checkpoint_dir=checkpoint_dir,
        settings=settings,
        resume=resume,
        trackers=trackers or (),
    )
    # train, with a report before and after
    millions = sum(parameter.numel() for parameter in palm.parameters()) / 1e6
    origin = f"preset {preset}" if model is None else f"weights of {model}"
    report("model", f"PaLM, {origin}, {millions:.2f} million parameters, {encoder.vocab_size} tokens")
    report("data", f"{text.data}: {data.train.size} for training, {data.validation.size} held out")
    report("run", f"{checkpoint_dir}, {settings.max_steps} updates, {trainer.device}, {world_size()} process(es)")
    result = trainer.train()
    first, last = result.first_bits_per_byte, result.last_bits_per_byte
    status = report_run(
        "palm-rlhf",
        result,
        checkpoint_dir,
        max_steps=settings.max_steps,
        lines=[
            ("held out", f"{first:.3f} bits/byte before training"),
            ("", f"{last:.3f} bits/byte at the last validation, {result.step} updates done"),
        ],
        results=[Result("held-out bits/byte", last, before=first)],
    )
    # a sample of the trained model
    if result.outcome == "finished" and sample_prompt and sample_tokens and rank() == 0:
        print(f"\nContinuation of {sample_prompt!r}:\n")
        generation = TextGeneration(max_new_tokens=sample_tokens, device=settings.device)
        print_continuations(checkpoint_dir, sample_prompt, generation, loader=PaLM.from_pretrained)
    return status


def _presets(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and settings of the preset, or the sizes of the model that training starts from."""
    name = preset_name(chosen, "data", "model")
    values = {"preset": name, **PRESETS[name]}
    with contextlib.suppress(OSError, ValueError, KeyError, ImportError):  # the command itself raises these
        if chosen["model"] is not None:
            folder = checkpoint_folder(chosen["model"])
            stored = read_json(folder / CONFIG_FILE)["arguments"]
            values |= {argument: stored[argument] for argument in chosen if argument in stored}
            if (folder / TOKENIZER_FOLDER).is_dir():
                values["tokenizer"] = str(folder)
    return values


SIZES = Group(
    PaLM, skip=SETTLED, defaults={name: PRESETS["quickstart"][name] for name in ("dim", "depth")}, as_dict=True
)
GROUPS = {"text": Group(TextCorpus), "sizes": SIZES, "settings": Group(TrainingSettings)}
COMMAND = Command(train, GROUPS, TRAIN, _presets)
