"""Real data: shards of tars, compressed ones, class folders, image data sets, and worker processes."""

import bz2
import gzip
import io
import lzma
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coca import CoCa, ImagePreprocessing, VisionTransformer
from coca.cli import main
from coca.data.image_files import ImageFiles, load_images
from coca.data.pair_batches import PairBatches
from coca.training.config import TrainingSettings
from coca.training.trainer import CoCaTrainer
from lm_core.checkpoints.weights import read_weights
from lm_core.tokenizers import ByteTokenizer

GREY = ImagePreprocessing(image_size=4, channels=1)
TOKENIZER = ByteTokenizer()


def png(value):
    stream = io.BytesIO()
    Image.new("L", (4, 4), value).save(stream, format="PNG")
    return stream.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def shard(first, count):
    members = {}
    for index in range(first, first + count):
        members |= {f"{index:03}.png": png(index), f"{index:03}.txt": f"picture {index}".encode()}
    return members


@pytest.fixture
def shards(tmp_path):
    """Three tars of five images each; image k has the brightness k."""
    for number in range(3):
        write_tar(tmp_path / f"shard-{number:02}.tar", shard(5 * number, 5))
    return f"{tmp_path}/shard-{{00..02}}.tar"


def brightness(data):
    return [int(data.read(index).mean()) for index in range(len(data))]


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("suffix", "module"), [(".tar.gz", gzip), (".tgz", gzip), (".tar.bz2", bz2), (".tar.xz", lzma)]
)
def test_a_compressed_tar_is_read_as_the_tar(tmp_path, suffix, module):
    plain = write_tar(tmp_path / "a.tar", shard(0, 5))
    (tmp_path / f"b{suffix}").write_bytes(module.compress(plain.read_bytes()))

    first, second = load_images(plain, GREY), load_images(tmp_path / f"b{suffix}", GREY)

    assert second.captions == first.captions
    assert brightness(second) == brightness(first) == [0, 1, 2, 3, 4]


def test_a_folder_of_classes_has_captions_by_the_templates(tmp_path):
    for name, value in (("big_dog", 10), ("cat", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(value))

    data = load_images(tmp_path, GREY)
    own = load_images(tmp_path, GREY, templates=["one {}", "my {}"])

    assert data.captions == (("a photo of a big dog",), ("a photo of a cat",))
    assert (data.labels, data.class_names, data.templates) == ((0, 1), ("big_dog", "cat"), ("a photo of a {}",))
    assert own.captions[1] == ("one cat", "my cat")


@pytest.mark.parametrize("form", ["parquet", "saved", "arrow"])
def test_an_image_data_set_is_read_on_access(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": png(value), "path": None} for value in (7, 9)],
        "text": ["seven", "nine"],
        "label": [1, 0],
    }
    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=["b", "a"])
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    source = tmp_path / f"rows.{form}"
    if form == "parquet":
        table.to_parquet(source)
    else:
        table.save_to_disk(tmp_path / "saved")
        source = tmp_path / "saved" if form == "saved" else next((tmp_path / "saved").glob("*.arrow"))

    data = load_images(source, GREY)

    assert brightness(data) == [7, 9]
    assert data.captions == (("seven",), ("nine",))
    assert [data.class_names[label] for label in data.labels] == ["a", "b"]


def test_images_of_tars_and_patterns_are_read_a_batch_at_a_time(shards, tmp_path):
    files = ImageFiles([shards], GREY)

    batches = list(files.batches(4))

    assert [len(names) for names, _ in batches] == [4, 4, 4, 3]
    assert batches[0][0][0] == f"{tmp_path}/shard-00.tar/000.png"
    values = torch.cat([images for _, images in batches])
    expected = torch.from_numpy(np.stack([np.full((1, 4, 4), value, np.uint8) for value in range(15)]))
    torch.testing.assert_close(values, (expected.float() / 255 - 0.5) / 0.5, atol=1e-6, rtol=0)
    assert ImageFiles([tmp_path], GREY).paths == files.paths


# ------------------------------------------------------------------------------------------------------------- workers


def batches(data, workers, **changes):
    settings = {"tokenizer": TOKENIZER, "preprocessing": GREY, "pad_id": TOKENIZER.pad_id, "batch_size": 4, "shift": 1}
    return PairBatches(data=data, seed=3, workers=workers, **{**settings, **changes})


def content(batch):
    return batch.text.tolist(), batch.images.tolist()


@pytest.mark.plain
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_batch_also_after_a_resume_within_a_shard(shards, workers):
    data = load_images(shards, GREY)
    alone = batches(data, 0)
    expected = [content(next(alone)) for _ in range(10)]

    ahead = batches(data, workers)
    found = [content(next(ahead)) for _ in range(3)]
    state = ahead.state_dict()  # workers are further ahead than this
    ahead.close()
    resumed = batches(data, workers)
    resumed.load_state_dict(state)
    found += [content(next(resumed)) for _ in range(7)]
    resumed.close()

    assert found == expected
    assert state["position"] == 12


@pytest.mark.plain
def test_workers_leave_the_global_generator_alone(shards):
    ahead = batches(load_images(shards, GREY), 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    next(ahead)
    ahead.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.plain
def test_what_workers_read_can_be_sent_to_them(shards):
    """Without fork, as on macOS and Windows, the data set is pickled."""
    import pickle

    from coca.data.digits import handwritten_digits

    for data in (load_images(shards, GREY).split(0.2)[0], handwritten_digits().select([3, 1])):
        copy = pickle.loads(pickle.dumps(data))
        assert np.array_equal(copy.read(1), data.read(1))


def trained(folder, data, workers, steps, **changes):
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=4, patch_size=2, channels=1, dim=8, depth=1, dim_head=4, heads=2)
    sizes = {"dim": 8, "unimodal_depth": 1, "multimodal_depth": 1, "num_img_queries": 2, "dim_head": 4, "heads": 2}
    ids = {"pad_id": TOKENIZER.pad_id, "bos_id": TOKENIZER.bos_id, "eos_id": TOKENIZER.eos_id}
    model = CoCa(num_tokens=TOKENIZER.vocab_size, img_encoder=vit, **sizes, **ids)
    settings = TrainingSettings(
        max_steps=6, batch_size=4, max_length=12, shift=1, workers=workers, validate_every=6, checkpoint_every=3,
        keep_checkpoints=None, learning_rate=1e-2, device="cpu", validation_captions=1,
    )  # fmt: skip
    train, held_out = data.split(0.2)
    return CoCaTrainer(
        model=model, data=train, validation_data=held_out, preprocessing=GREY, checkpoint_dir=folder,
        settings=replace(settings, **changes), trackers=[StopAt(steps)] if steps else (),
    ).train()  # fmt: skip


class StopAt:
    """A tracker that presses Ctrl-C when an update's metrics arrive."""

    def __init__(self, step):
        self.step = step

    def log(self, values, step):
        import os
        import signal

        if step == self.step and "loss" in values:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.plain
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a process itself there")
def test_a_run_with_workers_that_was_interrupted_ends_as_one_without_workers(shards, tmp_path):
    data = load_images(shards, GREY)
    trained(tmp_path / "whole", data, 0, None)
    stopped = trained(tmp_path / "parts", data, 2, 2)
    trained(tmp_path / "parts", data, 2, None)

    assert (stopped.outcome, stopped.step) == ("interrupted", 2)
    first, second = (
        read_weights(tmp_path / run / "checkpoints/step-6/model.safetensors") for run in ("whole", "parts")
    )
    for name, value in first.items():
        assert torch.equal(second[name], value), name


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.plain
def test_the_commands_read_tars(shards, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--data", shards, "--max_steps", "1", "--batch_size", "4", "--dim", "8", "--dim_head", "4",
                 "--heads", "2", "--vit_dim", "8", "--vit_heads", "2", "--vit_depth", "1", "--image_size", "8",
                 "--unimodal_depth", "1", "--multimodal_depth", "1", "--num_img_queries", "2", "--workers", "1",
                 "--checkpoint_dir", str(run)]) == 0  # fmt: skip
    capsys.readouterr()

    assert main(["caption", str(run), shards, "--max_new_tokens", "3"]) == 0
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:2] == [f"{tmp_path}/shard-00.tar/000.png", f"{tmp_path}/shard-00.tar/001.png"]
    assert main(["embed", str(run), str(tmp_path / "out.npz"), "--images", shards]) == 0
    assert np.load(tmp_path / "out.npz")["latents"].shape == (15, 8)
    assert main(["zero-shot", str(run), shards, "--classes", "a", "b"]) == 0
    assert main(["retrieve", str(run), shards, "--text", "picture 3", "--top", "2"]) == 0
    capsys.readouterr()
    assert main(["retrieve", str(run), shards, "--captions"]) == 0
    assert "text_to_image_r@1" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- bad input


def truncated(folder):
    path = write_tar(folder / "cut.tar", shard(0, 3))
    path.write_bytes(path.read_bytes()[:2100])
    return path


def damaged_gzip(folder):
    content = bytearray(gzip.compress(write_tar(folder / "a.tar", shard(0, 3)).read_bytes()))
    content[len(content) // 2] ^= 0xFF
    (folder / "a.tar").unlink()
    (folder / "bad.tar.gz").write_bytes(bytes(content))
    return folder / "bad.tar.gz"


def table(folder, text, name="captions.csv"):
    (folder / "a.png").write_bytes(png(1))
    (folder / name).write_text(text, "utf-8")
    return folder / name


def no_tar(folder):
    (folder / "no.tar").write_bytes(b"not a tar at all" * 100)
    return folder / "no.tar"


def parquet(folder, **columns):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.plain
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, r"cut.tar (ends within the member|cannot be read as a tar)"),
        (damaged_gzip, "bad.tar.gz cannot be decompressed"),
        (no_tar, "no.tar cannot be read as a tar"),
        (lambda f: write_tar(f / "e.tar", {}), "source must hold at least one image with a caption, got none"),
        (lambda f: write_tar(f / "e.tar", {"a.png": png(1)}), "must have a caption, a.txt or a.json, next to a.png"),
        (lambda f: write_tar(f / "e.tar", {"a.png": png(1), "a.txt": b" \n"}), "member a.txt, has an empty caption"),
        (lambda f: write_tar(f / "e.tar", {"a.png": png(1), "a.json": b"[1]"}), "must be a JSON object, got list"),
        (lambda f: write_tar(f / "e.tar", {"a.png": png(1), "a.json": b"{"}), "member a.json, is not JSON"),
        (lambda f: write_tar(f / "e.tar", {"a.png": png(1), "a.json": b'{"x": 1}'}), "must have 'caption' or 'text'"),
        (lambda f: f / "shard-{00..03}.tar", r"there is no .*shard-00.tar"),
        (lambda f: f / "shard-*.tar", r"no file matches .*shard-\*.tar"),
        (lambda f: [], "source must hold at least one path, got an empty list"),
        (
            lambda f: table(f, "image,words\na.png,x\n"),
            r"line 2, must have 'caption' or .*got the columns \['image', 'words'\]",
        ),
        (lambda f: table(f, "picture,caption\na.png,x\n"), r"line 2, must have 'image' or 'file_name'"),
        (lambda f: table(f, "image,caption\nb.png,x\n"), "line 2, names the image .*b.png, which is not there"),
        (lambda f: table(f, "image,caption\na.png,\n"), "line 2, has an empty caption"),
        (lambda f: table(f, '{"image": "a.png", "text": [1]}\n', "captions.jsonl"), "a caption or a list of captions"),
        (lambda f: parquet(f, text=["a"]), r"rows.parquet must have 'image' or .*, got \['text'\]"),
        (
            lambda f: parquet(f, image=[{"bytes": png(1), "path": None}], words=["a"]),
            "row 0 of .*rows.parquet, must have",
        ),
        (lambda f: parquet(f, image=[{"bytes": png(1), "path": None}], text=[""]), "row 0 of .*, has an empty text"),
        (lambda f: parquet(f, image=[{"bytes": b"x", "path": None}], text=["a"]), "1 of 1 images in .* cannot be read"),
        (lambda f: parquet(f, image=[None], text=["a"]), "1 of 1 images in .* cannot be read.*an empty image"),
    ],
)
def test_damaged_sources_are_refused_by_name(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_images(make(tmp_path), GREY)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: [f / "nowhere"], "images must be files, folders or tars of images, there is no"),
        (lambda f: [f], "images must be files, folders or tars of images, got .* without any"),
        (lambda f: [write_tar(f / "e.tar", {"a.txt": b"x"})], "got .*e.tar without any"),
        (lambda f: [f / "x-{0..2}.tar"], "there is no .*x-0.tar"),
        (lambda f: [f / "*.tar"], r"no file matches .*\*.tar"),
        (lambda f: [truncated(f)], "cut.tar"),
        (lambda f: [], "images must name at least one file, got none"),
    ],
)
def test_images_that_are_not_there_are_named(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ImageFiles(make(tmp_path), GREY)


@pytest.mark.plain
def test_a_negative_number_of_workers_is_refused(shards):
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        TrainingSettings(workers=-1)
    with pytest.raises(ValueError, match="workers must be at least 0, got -2"):
        batches(load_images(shards, GREY), -2)


@pytest.mark.plain
def test_an_unreadable_image_in_a_tar_is_named_and_left_out(tmp_path):
    members = {**shard(0, 40), "900.png": b"no image", "900.txt": b"broken"}
    data = load_images(write_tar(tmp_path / "a.tar", members), GREY)

    assert len(data) == 40
    assert data.unreadable == ("900.png: not an image in a format that is read",)
    files = ImageFiles([Path(tmp_path) / "a.tar"], GREY)
    assert sum(len(names) for names, _ in files.batches(7)) == 40
    assert files.unreadable == [f"{tmp_path}/a.tar/900.png: not an image in a format that is read"]
