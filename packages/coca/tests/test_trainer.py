"""Training through its public entry points: resumed bit for bit, on several processes.

This file is also the program that the fixture ``start_run`` starts, for several processes and for kills.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coca import CLIPVisionTransformer, CoCa, ImagePreprocessing, VisionTransformer
from coca.data.captioned_images import CaptionedImages
from coca.data.pair_batches import PairBatches
from coca.evaluation.evaluation import evaluate
from coca.training.config import TrainingSettings
from coca.training.trainer import CoCaTrainer
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.weights import read_weights
from lm_core.tokenizers import ByteTokenizer

NAMES = ("dark", "bright", "left", "right")
TINY = TrainingSettings(
    max_steps=6,
    batch_size=6,
    max_length=12,
    learning_rate=1e-2,
    validate_every=3,
    validation_captions=2,
    checkpoint_every=2,
    keep_checkpoints=None,
    device="cpu",
)
PREPROCESSING = ImagePreprocessing(image_size=4, channels=1)


def four_kinds(count=20):
    """Small pictures that are dark, bright, or bright on one side."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 40, (count, 1, 4, 4)).astype(np.uint8)
    labels = tuple(number % 4 for number in range(count))
    for image, label in zip(pixels, labels, strict=True):
        image[:, :, {0: slice(0, 0), 1: slice(0, 4), 2: slice(0, 2), 3: slice(2, 4)}[label]] += 200
    return CaptionedImages(
        names=tuple(f"picture {number}" for number in range(count)),
        captions=tuple((NAMES[label], f"it is {NAMES[label]}") for label in labels),
        read=lambda index: pixels[index],
        labels=labels,
        class_names=NAMES,
        templates=("{}", "it is {}"),
    )


def tiny_trainer(folder, settings=TINY, resume="auto", trackers=(), **changes):
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    vit = VisionTransformer(image_size=4, patch_size=2, channels=1, dim=8, depth=1, dim_head=4, heads=2)
    if "TINY_HUGGING_FACE" in os.environ:
        # its pooler, not used for the tokens that CoCa takes, never gets a gradient
        import transformers

        vit_sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**vit_sizes, image_size=4, patch_size=2, num_channels=1)
        vit = transformers.ViTModel(config)
    if "TINY_OPEN_CLIP" in os.environ:
        vit_sizes = {"image_size": 4, "patch_size": 2, "channels": 1, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4}
        vit = CLIPVisionTransformer(**vit_sizes)
        changes |= {"block": "sequential", "max_text_length": 13}
    sizes = {"dim": 8, "unimodal_depth": 1, "multimodal_depth": 1, "num_img_queries": 2, "dim_head": 4, "heads": 2}
    ids = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    data, held_out = four_kinds().split(0.2)
    model = CoCa(**{"num_tokens": tokenizer.vocab_size, "img_encoder": vit, **sizes, **ids, **changes})
    if "TINY_DOUBLE" in os.environ:
        model.double()
    return CoCaTrainer(
        model=model,
        data=data,
        validation_data=held_out,
        preprocessing=PREPROCESSING,
        checkpoint_dir=folder,
        settings=settings,
        resume=resume,
        trackers=trackers,
    )


def weights(folder, step):
    return read_weights(Path(folder) / "checkpoints" / f"step-{step}" / "model.safetensors")


def rows_of(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


class StopAt:
    """A tracker that presses Ctrl-C when an update's metrics arrive."""

    def __init__(self, step):
        self.step = step

    def log(self, values, step):
        if step == self.step and "loss" in values:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, tiny_trainer(folder).train()


def test_a_run_writes_metrics_checkpoints_and_a_grid(whole_run):
    folder, result = whole_run

    assert (result.outcome, result.step, result.first_step) == ("finished", 6, 0)
    assert {"zero_shot_accuracy", "caption_accuracy", "caption_loss"} <= result.metrics.keys()
    assert result.grid.is_file()
    assert result.curves.is_file()
    step = folder / "checkpoints" / "step-6"
    assert {"preprocess.json", "tokenizer", "config.json", "trainer.safetensors", "rng-0.safetensors"} <= set(
        os.listdir(step)
    )
    model = CoCa.from_pretrained(step)
    assert model.preprocessing == PREPROCESSING
    rows = rows_of(folder)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    validations = [row for row in rows if "validation_zero_shot_accuracy" in row]
    assert [row["step"] for row in validations] == [0, 3, 6]
    assert all(isinstance(row["sample_caption"], str) for row in validations)
    assert result.first_metrics["caption_loss"] == pytest.approx(validations[0]["validation_caption_loss"])
    assert result.metrics["caption_loss"] == pytest.approx(validations[-1]["validation_caption_loss"])


@pytest.mark.plain
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a process itself there")
@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_run_resumes_bit_for_bit(whole_run, tmp_path, step):
    stopped = tiny_trainer(tmp_path, trackers=[StopAt(step)]).train()
    resumed = tiny_trainer(tmp_path).train()

    assert (stopped.outcome, stopped.step, resumed.first_step) == ("interrupted", step, step)
    for name, value in weights(whole_run[0], 6).items():
        assert torch.equal(weights(tmp_path, 6)[name], value), name
    assert rows_of(tmp_path) == rows_of(whole_run[0])
    assert resumed.first_metrics == whole_run[1].first_metrics


@pytest.mark.plain
def test_a_run_does_not_resume_with_another_architecture(whole_run, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "run")
    trainer = tiny_trainer(tmp_path / "run", dim=16)

    with pytest.raises(CheckpointError, match="another architecture: dim is 16, but was 8"):
        trainer.train()


@pytest.mark.plain
def test_a_run_does_not_resume_with_other_pictures_captions_or_preprocessing(whole_run, tmp_path, monkeypatch):
    """Same names and numbers of them: only what is in them differs."""
    shutil.copytree(whole_run[0], tmp_path / "run")

    here, data = sys.modules[__name__], four_kinds()
    with monkeypatch.context() as patch:
        patch.setattr(here, "PREPROCESSING", replace(PREPROCESSING, mean=(0.1,)))
        trainer = tiny_trainer(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run: preprocessing is"):
        trainer.train()

    other = replace(data, captions=tuple((f"{first}!", second) for first, second in data.captions))
    monkeypatch.setattr(here, "four_kinds", lambda: other)
    trainer = tiny_trainer(tmp_path / "run")
    with pytest.raises(ValueError, match="image_fingerprint"):
        trainer.train()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 23, "pad_id": 0, "bos_id": 1, "eos_id": 2}, "model must have num_tokens >= 259, .* got 23"),
        ({"eos_id": 3}, "the tokenizer's eos_id, 257, got 3"),
        ({"img_encoder": None}, "model must have an img_encoder to be trained on images"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pad_id", [258, 257])  # an id of its own, or EOS
def test_a_held_out_caption_loss_does_not_depend_on_the_size_of_its_batches(tmp_path, pad_id):
    model = tiny_trainer(tmp_path).model
    model.pad_id = pad_id

    losses = [
        evaluate(model, four_kinds(), ByteTokenizer(), PREPROCESSING, batch_size=size, captions=0)["caption_loss"]
        for size in (20, 3, 1)
    ]

    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_batches_do_not_depend_on_the_number_of_processes():
    data, _ = four_kinds().split(0.2)
    settings = {"tokenizer": ByteTokenizer(), "preprocessing": PREPROCESSING, "pad_id": 258, "shift": 1, "seed": 3}

    def seen(world):
        parts = [PairBatches(data=data, batch_size=7, rank=rank, world_size=world, **settings) for rank in range(world)]
        pairs = []
        for _ in range(5):
            for part in parts:
                batch = next(part)
                texts = [ByteTokenizer().decode(row) for row in batch.text]
                pairs += list(zip(texts, batch.images.flatten(1).tolist(), strict=True))
        return pairs

    assert seen(1) == seen(2) == seen(3)


@pytest.mark.distributed
@pytest.mark.plain
@pytest.mark.parametrize(
    ("both", "two_processes"),
    [
        ({}, {}),
        ({"TINY_HUGGING_FACE": "1"}, {}),
        ({}, {"TINY_FSDP": "1", "TINY_RECOMPUTE": "1"}),
        ({"TINY_HUGGING_FACE": "1"}, {"TINY_FSDP": "1"}),
        ({"TINY_OPEN_CLIP": "1"}, {"TINY_FSDP": "1"}),
        ({}, {"TINY_MICRO": "3"}),
        ({}, {"TINY_MICRO": "2", "TINY_FSDP": "1"}),
    ],
    ids=[
        "ours",
        "Hugging Face's",
        "FSDP",
        "FSDP, Hugging Face's",
        "FSDP, open_clip's",
        "accumulated",
        "FSDP, accumulated",
    ],
)
def test_two_processes_train_as_one_does(start_run, launcher, tmp_path, both, two_processes):
    # In float64: where a gradient is nearly 0, Adam turns its float32 rounding into a whole step.
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"TINY_DOUBLE": "1", **both}
    runs = [
        start_run(one, **settings),
        start_run(two, *launcher(), EXPECTED_WORLD_SIZE="2", **settings, **two_processes),
    ]
    for process in runs:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors

    for name, value in weights(one, 6).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(weights(two, 6)[name], value, atol=1e-9, rtol=1e-9)
    losses = [[row["loss"] for row in rows_of(folder) if "loss" in row] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.distributed
@pytest.mark.plain
def test_a_sharded_run_that_was_interrupted_resumes_bit_for_bit(start_run, launcher, tmp_path):
    settings = {"TINY_FSDP": "1", "EXPECTED_WORLD_SIZE": "2"}
    runs = [(tmp_path / "whole", {}), (tmp_path / "parts", {"TINY_STOP": "3"}), (tmp_path / "parts", {})]
    for folder, stop in runs:
        process = start_run(folder, *launcher(), **settings, **stop)
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors

    assert (tmp_path / "parts" / "checkpoints" / "step-3").is_dir()
    for name, value in weights(tmp_path / "whole", 6).items():
        assert torch.equal(weights(tmp_path / "parts", 6)[name], value), name
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert CoCa.from_pretrained(tmp_path / "parts" / "checkpoints" / "step-6").preprocessing == PREPROCESSING


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, loss, micro_batches, monkeypatch):
    found = {}
    for parts in (1, micro_batches):
        trainer = tiny_trainer(tmp_path / str(parts), replace(TINY, max_steps=1, micro_batches=parts), loss=loss)
        trainer.model.double()
        before = trainer.session.optimizer_step

        def keep(before=before, trainer=trainer, parts=parts):
            found[parts] = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
            return before()

        monkeypatch.setattr(trainer.session, "optimizer_step", keep)
        trainer.train()

    assert found[1].keys() == found[micro_batches].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(
            found[micro_batches][name], gradient, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    losses = [next(row for row in rows_of(tmp_path / str(parts)) if "loss" in row) for parts in (1, micro_batches)]
    for name in ("loss", "caption_loss", "contrastive_loss", "grad_norm"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-9)


@pytest.mark.plain
def test_more_parts_than_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="micro_batches must be at most the pairs of a process, 6, got 7"):
        tiny_trainer(tmp_path / "run", replace(TINY, micro_batches=7))
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        replace(TINY, micro_batches=0)


@pytest.mark.plain
def test_one_process_does_not_shard(tmp_path):
    with pytest.raises(ValueError, match="fsdp=True needs several processes, got one"):
        tiny_trainer(tmp_path / "run", replace(TINY, fsdp=True))


def test_the_stored_logit_scale_is_clamped_after_each_update(tmp_path):
    trainer = tiny_trainer(tmp_path, init_logit_scale=5.0, max_logit_scale=5.0)
    torch.nn.init.constant_(trainer.model.log_logit_scale, math.log(50.0))

    trainer.train()

    # What is stored must not stay away from what is used, or it would take many updates to come back.
    assert trainer.model.log_logit_scale.item() <= math.log(5.0) + 1e-6


class Slow:
    """A tracker that leaves time for a kill."""

    def log(self, values, step):
        time.sleep(float(os.environ.get("TINY_PAUSE", "0")))


if __name__ == "__main__":
    assert int(os.environ.get("WORLD_SIZE", "1")) == int(os.environ.get("EXPECTED_WORLD_SIZE", "1"))
    more = {"fsdp": "TINY_FSDP" in os.environ, "micro_batches": int(os.environ.get("TINY_MICRO", "1"))}
    stops = [StopAt(int(os.environ["TINY_STOP"]))] if "TINY_STOP" in os.environ else []
    changes = {"gradient_checkpointing": True} if "TINY_RECOMPUTE" in os.environ else {}
    tiny_trainer(sys.argv[1], replace(TINY, **more), trackers=[Slow(), *stops], **changes).train()
    if torch.distributed.is_initialized():
        assert torch.distributed.get_world_size() == int(os.environ["EXPECTED_WORLD_SIZE"])
