"""Cases from public reports and from people's files, one kind after another; see also the tests of each part."""

import csv
import io
import json
import math
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from coca import CoCa, ImagePreprocessing, VisionTransformer, retrieval_metrics
from coca.cli import main
from coca.data.captioned_images import CaptionedImages
from coca.data.image_files import ImageFiles, load_images
from coca.data.pair_batches import DistinctBatches
from coca.evaluation.evaluation import decoded, evaluate
from coca.model.image_encoders import load_encoder
from coca.model.text_layout import caption_ids
from coca.training.config import TrainingSettings
from coca.training.trainer import CoCaTrainer
from lm_core.checkpoints.manifest import CheckpointError, write_manifest
from lm_core.tokenizers import ByteTokenizer, HuggingFaceTokenizer

pytestmark = pytest.mark.plain

GREY = ImagePreprocessing(image_size=4, channels=1)
BYTES = ByteTokenizer()


def picture_bytes(shade=0, kind="PNG", mode="L"):
    stream = io.BytesIO()
    Image.new(mode, (4, 4), shade).save(stream, kind)
    return stream.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_orientation_says(kind, orientation):
    array = np.zeros((16, 16, 3), np.uint8)
    array[:8, :8], array[:8, 8:] = 255, 90
    upright = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # a stored picture that Pillow's own exif_transpose shows as ``upright``: every orientation is tried
    for transposition in (None, *Image.Transpose):
        stored = upright if transposition is None else upright.transpose(transposition)
        stream = io.BytesIO()
        stored.save(stream, kind, exif=exif, **({} if kind in ("PNG", "TIFF") else {"quality": 100}))
        with Image.open(stream) as reference:
            expected = np.asarray(ImageOps.exif_transpose(reference).convert("RGB")).astype(int)
        with Image.open(stream) as picture:
            found = ImagePreprocessing(image_size=16).pixels(picture)
        assert np.abs(found.transpose(1, 2, 0) - expected).max() <= 1


def test_damaged_exif_leaves_the_picture_as_it_is_stored():
    stream = io.BytesIO()
    Image.new("L", (4, 4), 77).save(stream, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")

    with Image.open(stream) as picture:
        assert set(GREY.pixels(picture).flatten().tolist()) == {77}


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 60_000)])
def test_the_memory_of_a_long_picture_is_that_of_the_result(size):
    # in a process of its own, since Pillow's memory is not Python's
    program = f"""
import resource
from PIL import Image
from coca import ImagePreprocessing
preprocessing, picture = ImagePreprocessing(image_size=224), Image.new("RGB", {size}, (10, 20, 30))
preprocessing.pixels(Image.new("RGB", (300, 300)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pixels = preprocessing.pixels(picture)
assert pixels.shape == (3, 224, 224) and pixels[:, 5, 5].tolist() == [10, 20, 30]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 10_000  # kB; resized whole, 1 x 4,000 pixels took 814 MB


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (50, 300), (301, 47)])
def test_the_crop_equals_that_of_the_whole_resized_picture(size):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 9, 3)).astype(np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    scale = 64 / min(size)
    whole = picture.resize([max(64, round(side * scale)) for side in size], Image.Resampling.BICUBIC)
    left, top = (whole.width - 64) // 2, (whole.height - 64) // 2
    expected = np.asarray(whole.crop((left, top, left + 64, top + 64))).astype(int)

    found = ImagePreprocessing(image_size=64).pixels(picture)

    assert np.abs(found.transpose(1, 2, 0) - expected).max() <= 2  # Pillow rounds between its two passes


@pytest.mark.parametrize(
    ("values", "dtype", "shades"),
    [
        ([0.0, 0.25, 1.0], np.float32, [0, 64, 255]),
        ([0.0, 100.4, 255.0], np.float32, [0, 100, 255]),
        ([0.0, 32896.0, 65535.0], np.float32, [0, 128, 255]),
        ([0, 32896, 65535], np.uint16, [0, 128, 255]),
        ([0, 257, 25700], np.uint16, [0, 1, 100]),
        ([-1e-7, 0.5, 1.0000001], np.float32, [0, 128, 255]),
        ([0, 1, 1], np.int32, [0, 255, 255]),
        ([0.0, 1.0, 20.0], np.float32, [0, 1, 20]),
        ([0, 100, 255], np.int32, [0, 100, 255]),
        ([0, 32896, 65535], np.int32, [0, 128, 255]),
    ],
)
def test_a_tiff_of_more_than_eight_bits_is_scaled(values, dtype, shades, tmp_path):
    Image.fromarray(np.repeat(np.array([values], dtype), 3, axis=0)).save(tmp_path / "a.tif")
    (tmp_path / "a.txt").write_text("a", "utf-8")

    pixels = load_images(tmp_path, ImagePreprocessing(image_size=3, channels=1)).read(0)

    assert pixels[0].tolist() == [shades] * 3


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([-1.0], np.float32), ([1e6], np.float32), ([3.5], np.float32), ([70_000], np.int32), ([5], np.int32)],
)
@pytest.mark.parametrize("other", [0.5, np.nan])
def test_a_tiff_of_unknown_range_is_named_as_unreadable(values, dtype, other, tmp_path):
    values = [*values, other] if dtype == np.float32 else values
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "bad.tif")
    (tmp_path / "good.png").write_bytes(picture_bytes())
    for name in ("bad", "good"):
        (tmp_path / f"{name}.txt").write_text("a", "utf-8")

    data = load_images(tmp_path, GREY, max_unreadable=0.5)

    assert data.names == ("good.png",)
    assert "values of a known range" in data.unreadable[0]


@pytest.mark.parametrize("tag", [258, 281])  # BitsPerSample, MaxSampleValue
def test_a_tiff_of_twelve_bits_has_the_range_that_it_declares(tag):
    picture = Image.fromarray(np.full((4, 4), 2048, np.uint16))
    picture.tag_v2 = {tag: (12,) if tag == 258 else 4095}

    assert set(GREY.pixels(picture).flatten().tolist()) == {128}


def test_dark_pictures_of_sixteen_bits_are_read_with_a_warning():
    with pytest.warns(UserWarning, match="values below 4,096 only are read as dark"):
        pixels = GREY.pixels(Image.fromarray(np.full((4, 4), 4095, np.uint16)))

    assert set(pixels.flatten().tolist()) == {16}


def test_a_picture_that_needs_another_program_is_not_decoded(tmp_path):
    """Pillow recognises EPS by its content, not by the suffix, and starts Ghostscript for it."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    (tmp_path / "a.txt").write_text("a", "utf-8")

    with pytest.raises(ValueError, match=r"a\.png: not an image in a format that is read"):
        load_images(tmp_path, GREY)


# --------------------------------------------------------------------------------------------------------- folders


def test_hidden_files_are_ignored_and_others_are_counted(tmp_path):
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git", "inside"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "inside/b.png"):
        (tmp_path / name).write_bytes(picture_bytes())
    for name in ("._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", ".git/c.png"):
        (tmp_path / name).write_bytes(b"no picture")
    for name in ("a.txt", "inside/b.txt", "README.md"):
        (tmp_path / name).write_text("caption", "utf-8")
    for name in ("a.psd", "inside/b.mp4"):
        (tmp_path / name).write_bytes(b"?")

    with pytest.warns(UserWarning, match=r"2 file\(s\) passed over: a\.psd, inside/b\.mp4"):
        data = load_images(tmp_path, GREY)
    with pytest.warns(UserWarning, match="passed over"):
        files = ImageFiles([tmp_path], GREY)

    assert data.names == ("a.png", "inside/b.png")
    assert [Path(path).name for path in files.paths] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"), (".pgm", "PPM")],
)
def test_every_suffix_of_a_format_that_is_read_counts_as_an_image(suffix, kind, tmp_path):
    try:
        content = picture_bytes(0, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow has no {kind}")
    (tmp_path / f"a{suffix}").write_bytes(content)
    (tmp_path / "a.txt").write_text("a", "utf-8")

    assert load_images(tmp_path, GREY).names == (f"a{suffix}",)
    assert len(ImageFiles([tmp_path], GREY).paths) == 1


# -------------------------------------------------------------------------------------------- tables and captions


@pytest.fixture
def pictures(tmp_path):
    """Four images without captions."""
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(picture_bytes())
    return tmp_path


QUOTED = ['"Stop" sign', 'a "red" car', '"', 'she said "no"']


def test_captions_of_a_tsv_stand_as_they_are(pictures):
    lines = ["image\tcaption", *(f"{name}.png\t{caption}" for name, caption in zip("abcd", QUOTED, strict=True))]
    (pictures / "x.tsv").write_text("\n".join(lines) + "\n", "utf-8")

    assert load_images(pictures / "x.tsv", GREY).captions == tuple((caption,) for caption in QUOTED)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_captions_that_a_program_quoted_are_read_as_it_wrote_them(pictures, suffix, quoting):
    captions = ['"Stop" sign', "red, green", "one\ttab" if suffix == ".csv" else "plain", 'she said "no"']
    with (pictures / f"x{suffix}").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",", quoting=quoting)
        writer.writerows([("image", "caption"), *((f"{n}.png", c) for n, c in zip("abcd", captions, strict=True))])

    assert load_images(pictures / f"x{suffix}", GREY).captions == tuple((caption,) for caption in captions)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"image,caption\na.png,red\nb.png,a dog, running\n", r"x\.csv, line 3, has 3 fields, the header 2"),
        ("x.csv", b"image,caption\na.png,caf\xe9\n", r"x\.csv is not UTF-8 .*iconv"),
        ("x.jsonl", b'{"image": "a.png", "caption": "caf\xe9"}\n', r"x\.jsonl.*(?:utf|UTF)-8"),
        ("x.csv", b"image,caption\na.png,\n", r"x\.csv, line 2, has an empty caption"),
        ("x.csv", b"image,caption\na.png\n", r"x\.csv, line 2, has an empty caption"),
        ("x.csv", b"image,caption\n,red\n", r"x\.csv, line 2, has an empty image"),
        ("x.jsonl", b'{"image": "a.png", "caption": "  "}\n', r"x\.jsonl, line 1, has an empty caption"),
        ("x.jsonl", b'{"image": "a.png", "caption": "\\ud800"}\n', r"x\.jsonl, line 1, has a lone surrogate"),
        ("x.csv", "image,caption\na.png,red\n".encode("utf-16-le"), r"x\.csv"),
        ("x.jsonl", b'["a.png", "red"]\n', r"x\.jsonl, line 1, must be a row with columns, got list"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_line(pictures, name, content, message):
    (pictures / name).write_bytes(content)

    with pytest.raises(ValueError, match=message):
        load_images(pictures / name, GREY)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_caption(pictures, encoding):
    for name in "abcd":
        (pictures / f"{name}.txt").write_bytes("café\u2028noir\nthé\r\n".encode(encoding))
    (pictures / "x.csv").write_bytes("image,caption\na.png,café\n".encode(encoding))

    assert load_images(pictures, GREY).captions[0] == ("café\u2028noir", "thé")
    assert load_images(pictures / "x.csv", GREY).captions == (("café",),)


@pytest.mark.parametrize(
    ("content", "message"), [(b"caf\xe9", r"a\.txt is not UTF-8"), (b" \n", r"a\.txt has an empty")]
)
def test_a_caption_file_that_cannot_be_read_is_named(pictures, content, message):
    for name in "abcd":
        (pictures / f"{name}.txt").write_bytes(content)

    with pytest.raises(ValueError, match=message):
        load_images(pictures, GREY)


@pytest.mark.parametrize(("image", "caption"), [("file_name", "text"), ("filepath", "title"), ("image", "caption")])
def test_the_common_column_names_need_no_flag(pictures, image, caption):
    (pictures / "metadata.jsonl").write_text(json.dumps({image: "a.png", caption: "red"}), "utf-8")

    assert load_images(pictures, GREY).captions == (("red",),)


def test_other_pixels_under_the_same_names_are_other_data(pictures):
    (pictures / "x.csv").write_text("image,caption\na.png,red\nb.png,green\n", "utf-8")
    before = load_images(pictures / "x.csv", GREY)
    (pictures / "b.png").write_bytes(picture_bytes(200))

    after = load_images(pictures / "x.csv", GREY)

    assert (before.names, before.captions) == (after.names, after.captions)
    assert before.fingerprint != after.fingerprint
    assert before.select([0]).fingerprint == after.select([0]).fingerprint


# ------------------------------------------------------------------------------------------------------------ tars


IMAGE = picture_bytes()
TARS = {
    "dotted names": ({"photo.v2.png": IMAGE, "photo.v2.txt": "a cat"}, {"photo.v2.png": ("a cat",)}),
    "versions of one key": (
        {"p.1.png": IMAGE, "p.1.txt": "one", "p.2.png": IMAGE, "p.2.txt": "two"},
        {"p.1.png": ("one",), "p.2.png": ("two",)},
    ),
    "webdataset's key": ({"p.image.png": IMAGE, "p.txt": "a cat"}, {"p.image.png": ("a cat",)}),
    "metadata": ({"p.png": IMAGE, "p.txt": "a cat", "p.json": '{"width": 4}'}, {"p.png": ("a cat",)}),
    "a list as metadata": ({"p.png": IMAGE, "p.txt": "a cat", "p.json": "[1, 2]"}, {"p.png": ("a cat",)}),
    "img2dataset": (
        {"p.png": IMAGE, "p.txt": "a cat", "p.json": '{"caption": "other", "label": "x"}'},
        {"p.png": ("a cat",)},
    ),
    "json alone": ({"p.png": IMAGE, "p.json": '{"text": ["a", "b"]}'}, {"p.png": ("a", "b")}),
    "folders and hidden members": (
        {"./d/p.png": IMAGE, "./d/p.txt": "a cat", "./d/._p.png": b"?", "__MACOSX/p.png": b"?", "LICENSE": "?"},
        {"./d/p.png": ("a cat",)},
    ),
    "other suffixes": ({"p.JPE": picture_bytes(0, "JPEG"), "p.txt": "a cat"}, {"p.JPE": ("a cat",)}),
}


@pytest.mark.parametrize("kind", TARS)
def test_samples_of_a_tar_are_read(kind, tmp_path):
    members, expected = TARS[kind]
    data = load_images(write_tar(tmp_path / "x.tar", members), GREY)

    assert {name.lower(): captions for name, captions in zip(data.names, data.captions, strict=True)} == {
        name.lower(): captions for name, captions in expected.items()
    }


def test_what_is_not_read_of_tars_is_counted(tmp_path):
    members = {"p.png": IMAGE, "p.txt": "a cat", "p.depth.png": IMAGE, "q.svg": "?", "q.txt": "a dog", "r.json": "{}"}
    write_tar(tmp_path / "x.tar", members)
    (tmp_path / "y.zip").write_bytes(b"?")

    with pytest.warns(UserWarning, match="passed over") as warned:
        data = load_images(tmp_path, GREY)

    assert data.names == ("p.png",)
    texts = [str(warning.message) for warning in warned]
    assert [text.split(": ", 1)[1] for text in texts] == [
        "1 file(s) passed over: y.zip",
        "2 file(s) passed over: p.depth.png, q.svg",
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"p.png": IMAGE, "p.json": "[" * 100_000}, r"x\.tar, member p\.json, is not JSON"),
        ({"p.png": IMAGE, "p.json": "{oops"}, r"x\.tar, member p\.json, is not JSON"),
        ({"p.png": IMAGE, "p.json": "{oops", "p.txt": "a"}, r"x\.tar, member p\.json, is not JSON"),
        ({"p.png": IMAGE, "p.json": '["a"]'}, r"x\.tar, member p\.json, must be a JSON object, got list"),
        ({"p.png": IMAGE, "p.json": '{"width": 4}'}, r"x\.tar, member p\.json, must have 'caption'"),
        ({"p.png": IMAGE, "p.txt": b"caf\xe9"}, r"x\.tar, member p\.txt, is not UTF-8"),
        ({"p.png": IMAGE, "p.txt": "\n"}, r"x\.tar, member p\.txt, has an empty caption"),
        ({"p.png": IMAGE, "q.txt": "a"}, r"x\.tar must have a caption, p\.txt or p\.json, next to p\.png"),
        ({"p.a.png": IMAGE, "p.b.png": IMAGE, "p.txt": "a"}, r"must have a caption, p\.a\.txt"),
    ],
)
def test_a_tar_that_cannot_be_read_is_refused_by_tar_and_member(members, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_images(write_tar(tmp_path / "x.tar", members), GREY)


def test_several_tars_are_one_data_set(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"x-{number:03d}.tar", {"p.png": picture_bytes(number * 20), "p.txt": f"shade {number}"})
    sources = [
        tmp_path,
        f"{tmp_path}/x-{{000..002}}.tar",
        f"{tmp_path}/x-{{000,001,002}}.tar",
        f"{tmp_path}/x-*.tar",
        [tmp_path / f"x-{number:03d}.tar" for number in range(3)],
    ]

    for source in sources:
        data = load_images(source, GREY)
        assert data.names == tuple(f"x-{number:03d}.tar/p.png" for number in range(3))
        assert data.captions == tuple((f"shade {number}",) for number in range(3))
        assert [int(data.read(index).mean()) for index in range(3)] == [0, 20, 40]
    with pytest.raises(FileNotFoundError, match=r"x-003\.tar"):
        load_images(f"{tmp_path}/x-{{000..003}}.tar", GREY)
    with pytest.raises(FileNotFoundError, match=r"no file matches .*y-\*\.tar"):
        load_images(f"{tmp_path}/y-*.tar", GREY)
    with pytest.raises(ValueError, match="at least one path"):
        load_images([], GREY)


# -------------------------------------------------------------------------------------------------------- captions


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(3, 40))
def test_a_caption_cut_by_max_length_is_valid_utf8(caption, max_length):
    ids = caption_ids(caption, BYTES, max_length)

    text = bytes(ids[1:-1]).decode("utf-8")  # raises inside a character
    assert ids[0] == BYTES.bos_id
    assert ids[-1] == BYTES.eos_id
    assert caption.startswith(text)
    # the next character would not fit
    assert text == caption or len((text + caption[len(text)]).encode()) > max_length - 2


def test_a_caption_of_a_byte_level_vocabulary_is_not_cut_inside_a_character():
    """As GPT-2's and CLIP's: a character can take several tokens."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({char: n for n, char in enumerate([*alphabet, "<end>"])}, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>"))

    for length in range(2, 12):
        assert "\ufffd" not in tokenizer.decode(caption_ids("a 😀 日本", tokenizer, length))


def test_a_continuation_keeps_its_space_with_a_sentencepiece_tokenizer():
    import tokenizers
    import transformers

    words = {"<end>": 0, "\u2581the": 1, "\u2581cat": 2, "\u2581sat": 3}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.decoder = tokenizers.decoders.Metaspace()
    tokenizer = HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>"))

    assert "the cat" + decoded([3, 0, 2], tokenizer, 0, tokenizer.encode("the cat")) == "the cat sat"


# --------------------------------------------------------------------------------------------------------- batches


@given(st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count), st.integers(0, 9))))
def test_no_batch_holds_an_image_twice_and_every_epoch_holds_each_once(sizes):
    count, batch, seed = sizes
    sequence = DistinctBatches(count, batch_size=batch, seed=seed).take(0, count * 6)

    for start in range(0, len(sequence) - batch + 1, batch):
        assert len(set(sequence[start : start + batch])) == batch
    for start in range(0, len(sequence), count):
        assert sorted(sequence[start : start + count]) == list(range(count))
    # a pure function of the position: a resumed run continues the same sequence
    for start in (count // 2, 3 * count, 5 * count + count // 3):
        assert (
            DistinctBatches(count, batch_size=batch, seed=seed).take(start, count // 2)
            == (sequence[start : start + count // 2])
        )


# ---------------------------------------------------------------------------------------------- bfloat16 and ranks


def test_recall_is_that_of_float32_latents_under_autocast():
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(60, 16, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(images + 0.9 * torch.randn(60, 16, generator=generator), dim=-1)
    expected = retrieval_metrics(images, texts)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(images, texts) == expected
    # float64 by hand: the caption's image is among the first k
    scores = texts.double() @ images.double().t()
    ranks = (scores >= scores.diagonal()[:, None]).sum(dim=1)
    assert expected["text_to_image_r@5"] == pytest.approx(float((ranks <= 5).double().mean()))
    assert retrieval_metrics(images.bfloat16(), texts.bfloat16()).keys() == expected.keys()


def test_latents_under_autocast_keep_float32(make_coca, make_batch):
    model, (text, tokens) = make_coca().eval(), make_batch()

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        latents = model.encode_text(text), model.encode_image(image_tokens=tokens)

    for values in latents:
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())


def test_evaluation_under_autocast_ranks_distinct_captions(make_coca):
    model = make_coca(vit=True, num_tokens=259, pad_id=258, bos_id=256, eos_id=257).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8)).astype(np.uint8)
    data = CaptionedImages(
        names=tuple(map(str, range(6))), captions=tuple((f"picture {n}",) for n in range(6)), read=lambda n: pixels[n]
    )
    preprocessing = ImagePreprocessing(image_size=8, channels=1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = evaluate(model, data, BYTES, preprocessing, captions=0)

    assert {"text_to_image_r@1", "image_to_text_r@1"} <= metrics.keys()


# -------------------------------------------------------------------------------------------------------- commands


QUICK = ["--preset", "quickstart", "--device", "cpu", "--dim", "16", "--dim_head", "8", "--heads", "2"]
QUICK += ["--vit_dim", "16", "--image_size", "8", "--channels", "1", "--batch_size", "8", "--max_length", "12"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 pictures with different captions, under the column names of Hugging Face's imagefolder."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(24):
        name = f"{number:02d}.png"
        Image.fromarray(generator.integers(0, 256, (8, 8)).astype(np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": f"photo {number}", "label": str(number % 3)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run in bfloat16 on those pictures."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    steps = ["--max_steps", "4", "--validate_every", "2", "--precision", "bf16", "--validation_captions", "2"]
    assert main(["train", *QUICK, *steps, "--data", str(photos), "--checkpoint_dir", str(folder)]) == 0
    return folder


def test_a_few_pictures_with_different_captions_train_in_bfloat16(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]

    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all("validation_text_to_image_r@1" in row for row in rows if "validation_caption_loss" in row)


def test_several_images_are_captioned_without_any_flag(run, photos, capsys):
    paths = [str(photos / "00.png"), str(photos / "01.png")]

    assert main(["caption", str(run), *paths]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == paths


def test_class_names_that_look_like_numbers_are_names(run, photos, capsys):
    assert main(["zero-shot", str(run), str(photos / "00.png"), "--classes", "[0, 1, 2]", "--top", "3"]) == 0

    entries = capsys.readouterr().out.strip().split("\t")[1:]
    assert sorted(entry.split()[0] for entry in entries) == ["0", "1", "2"]


def test_recall_is_measured_with_the_column_names_of_train(run, photos, tmp_path, capsys):
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text("utf-8").splitlines()]
    lines = [f"{photos / row['file_name']},{row['text']}" for row in rows]
    (tmp_path / "x.csv").write_text("\n".join(["where,words", *lines]), "utf-8")
    columns = ["--image_column", "where", "--caption_column", "words"]

    assert main(["retrieve", str(run), str(photos), "--captions"]) == 0
    assert "text_to_image_r@1" in capsys.readouterr().out
    assert main(["retrieve", str(run), str(tmp_path / "x.csv"), "--captions", *columns]) == 0
    assert "text_to_image_r@1" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["caption", "embed", "zero-shot", "retrieve"])
def test_images_are_read_a_batch_at_a_time(command, run, tmp_path, monkeypatch, capsys):
    """The memory of 600 pictures is that of a few: no command holds all pixels."""
    for number in range(600):
        (tmp_path / f"{number:03d}.png").write_bytes(picture_bytes(number % 256))
    held, most = [], [0]
    normalised = ImagePreprocessing.normalised

    def counted(self, pixels):
        held.append(len(pixels))
        most[0] = max(most[0], len(pixels))
        return normalised(self, pixels)

    monkeypatch.setattr(ImagePreprocessing, "normalised", counted)
    arguments = {
        "caption": ["caption", str(run), str(tmp_path), "--max_new_tokens", "1"],
        "embed": ["embed", str(run), str(tmp_path / "x.npz"), "--images", str(tmp_path)],
        "zero-shot": ["zero-shot", str(run), str(tmp_path), "--classes", "a", "b"],
        "retrieve": ["retrieve", str(run), str(tmp_path), "--text", "a"],
    }

    assert main(arguments[command]) == 0
    assert sum(held) == 600
    assert most[0] <= 64


# ------------------------------------------------------------------------------------------- files from strangers


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def tampered(tmp_path):
    """A stored CoCa over a Hugging Face ViT, whose encoder in config.json the test replaces."""
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
    model = CoCa(dim=8, num_tokens=9, unimodal_depth=1, multimodal_depth=1, dim_head=4, heads=2, img_encoder=vit)
    folder = model.save_pretrained(tmp_path / "model")

    def replace_encoder(specification):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        encoder = config["arguments"]["img_encoder"]["$module"]
        config["arguments"]["img_encoder"]["$module"] = specification(encoder)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        write_manifest(folder)  # the stranger's folder is consistent
        return folder

    return replace_encoder


STRANGE_ENCODERS = {
    "timm's wrapper with a pickle": lambda folder: {
        "kind": "transformers",
        "class": "TimmWrapperModel",
        "config": {"architecture": "resnet10t", "model_args": {"checkpoint_path": str(folder / "pickle.pth")}},
    },
    "timm's wrapper without one": lambda folder: {
        "kind": "transformers",
        "class": "TimmWrapperModel",
        "config": {"architecture": "hf-hub:someone/something"},
    },
    "a backbone": lambda folder: {
        "kind": "transformers",
        "class": "TimmBackbone",
        "config": {"backbone": "resnet10t", "use_pretrained_backbone": True},
    },
    "timm from the hub": lambda folder: {
        "kind": "timm",
        "architecture": "hf-hub:someone/something",
        "num_classes": 0,
    },
    "timm from the hub, underscore": lambda folder: {
        "kind": "timm",
        "architecture": "hf_hub:someone/something",
        "num_classes": 0,
    },
    "timm from a folder": lambda folder: {"kind": "timm", "architecture": f"local-dir:{folder}", "num_classes": 0},
    "timm with further arguments": lambda folder: {
        "kind": "timm",
        "architecture": f"resnet10t;checkpoint_path={folder}/pickle.pth",
        "num_classes": 0,
    },
    "timm with a mapping of classes": lambda folder: {
        "kind": "timm",
        "architecture": "resnet10t",
        "num_classes": {"checkpoint_path": str(folder / "pickle.pth")},
    },
    "another class of transformers": lambda folder: {"kind": "transformers", "class": "Pipeline", "config": {}},
    "another package": lambda folder: {"kind": "family", "config": {"package": "os", "class": "system"}},
}


@pytest.mark.parametrize("kind", STRANGE_ENCODERS)
def test_an_encoder_that_a_file_names_is_one_of_the_known_ones(kind, tampered, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("looked up the network"))
    torch.save({"weight": Trap(tmp_path / "ran")}, tmp_path / "pickle.pth")
    folder = tampered(lambda _: STRANGE_ENCODERS[kind](tmp_path))

    with pytest.raises(CheckpointError):
        CoCa.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["name_or_path", "_name_or_path", "model_args", "auto_map", "attn_implementation"])
def test_paths_and_code_in_an_encoders_configuration_are_not_read(key, tampered, tmp_path):
    folder = tampered(lambda encoder: {**encoder, "config": {**encoder["config"], key: str(tmp_path / "other")}})

    encoder = CoCa.from_pretrained(folder).img_encoder.encoder

    assert str(tmp_path / "other") not in json.dumps(encoder.config.to_dict(), default=str)


def test_a_huge_encoder_is_refused_before_it_is_built(tampered):
    def huge(encoder):
        sizes = {"hidden_size": 2**17, "intermediate_size": 2**20, "num_hidden_layers": 100}
        return {**encoder, "config": {**encoder["config"], **sizes}}

    with pytest.raises(CheckpointError):
        CoCa.from_pretrained(tampered(huge))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("dim", 2**24),
            ("num_img_queries", 2**40),
            ("unimodal_depth", 10**7),
            ("dim_head", 2**38),
            ("ff_mult", 10**9),
        ),
        *(("dim_latents", 2**40), ("num_tokens", 2**50), ("multimodal_depth", -1), ("heads", "8"), ("pooling", "none")),
        *(("vit image_size", 2**20), ("vit depth", 10**7), ("vit dim", 2**24), ("vit channels", 2**40)),
    ],
)
def test_hostile_sizes_are_refused_before_anything_is_allocated(name, value, tmp_path):
    vit = VisionTransformer(image_size=8, patch_size=4, dim=8, depth=1, dim_head=4, heads=2)
    sizes = {"dim": 8, "num_tokens": 9, "unimodal_depth": 1, "multimodal_depth": 1, "dim_head": 4, "heads": 2}
    folder = CoCa(**sizes, num_img_queries=2, img_encoder=vit).save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    arguments = config["arguments"]
    if name.startswith("vit "):
        arguments, name = arguments["img_encoder"]["$module"]["config"]["arguments"], name.removeprefix("vit ")
    assert name in arguments
    arguments[name] = value
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_manifest(folder)

    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        CoCa.from_pretrained(folder)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "timm_wrapper", "architecture": "resnet10t", "model_args": {"checkpoint_path": "pickle.pth"}},
        {"model_type": "timm_wrapper", "architecture": "local-dir:other"},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:someone/something"},
        {"backbone": "someone/something", "use_pretrained_backbone": True},
        {"vision_config": {"model_type": "timm_wrapper", "model_args": {"pretrained_cfg": {"file": "pickle.pth"}}}},
    ],
)
def test_an_encoder_that_is_built_from_other_files_is_refused(changes, tmp_path):
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text("utf-8"))
    assert load_encoder(str(tmp_path / "vit")).config.hidden_size == 8
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")

    with pytest.raises(ValueError, match="names another source"):
        load_encoder(str(tmp_path / "vit"))


def test_an_encoder_that_lacks_weights_is_refused_unless_they_are_the_poolers(tmp_path):
    import transformers
    from safetensors.torch import load_file, save_file

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    body = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_encoder(str(tmp_path))
    body.popitem()
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="holds no whole ViTModel"):
        load_encoder(str(tmp_path))


def test_an_encoder_larger_than_its_weights_is_refused(tmp_path):
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text("utf-8"))
    huge = {**config, "hidden_size": 2**17, "intermediate_size": 2**20}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(huge), "utf-8")

    with pytest.raises(ValueError, match="holds no vision model"):
        load_encoder(str(tmp_path / "vit"))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_vision_half_of_a_hugging_face_model_is_taken_and_stored(kind, tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision, text = {**sizes, "image_size": 8, "patch_size": 4}, {**sizes, "vocab_size": 20}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    both = getattr(transformers, f"{kind}Model")(config).eval()
    both.save_pretrained(tmp_path / "both")
    images = torch.randn(2, 3, 8, 8)

    encoder = load_encoder(str(tmp_path / "both")).eval()
    model = CoCa(dim=8, num_tokens=9, unimodal_depth=1, multimodal_depth=1, dim_head=4, heads=2, img_encoder=encoder)
    model.save_pretrained(tmp_path / "model")
    again = CoCa.from_pretrained(tmp_path / "model").eval()

    assert torch.equal(encoder(images).last_hidden_state, both.vision_model(images).last_hidden_state)
    assert torch.equal(again.encode_image(images), model.eval().encode_image(images))


def test_a_timm_model_in_transformers_form_is_taken_and_stored(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    import transformers

    config = transformers.TimmWrapperConfig(architecture="resnet10t")
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path / "timm")
    images = torch.randn(2, 3, 32, 32)

    encoder = load_encoder(str(tmp_path / "timm"))
    model = CoCa(dim=8, num_tokens=9, unimodal_depth=1, multimodal_depth=1, dim_head=4, heads=2, img_encoder=encoder)
    model.save_pretrained(tmp_path / "model")
    again = CoCa.from_pretrained(tmp_path / "model").eval()

    assert model.image_dim == 512
    torch.testing.assert_close(again.encode_image(images), model.eval().encode_image(images))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("image_size", size) for size in (10**9, 0, "8", 1.5, True, math.nan)),
        ("channels", True),
        ("mean", [math.nan]),
    ],
)
def test_values_of_preprocess_json_are_checked(name, value, tmp_path):
    GREY.save(tmp_path)
    content = json.loads((tmp_path / "preprocess.json").read_text("utf-8"))
    (tmp_path / "preprocess.json").write_text(json.dumps({**content, name: value}), "utf-8")

    with pytest.raises(ValueError, match=r"preprocess\.json is not an image preprocessing file"):
        ImagePreprocessing.load_if_present(tmp_path)


# ------------------------------------------------------------------------------------------------ stored precision


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_stored_in_bfloat16_is_trained_in_float32(frozen, precision, tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    vit = transformers.ViTModel(config, add_pooling_layer=False).bfloat16()
    stored = {name: value.clone() for name, value in vit.state_dict().items()}
    pixels = np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8)).astype(np.uint8)
    data = CaptionedImages(
        names=tuple(map(str, range(8))), captions=tuple((f"picture {n}",) for n in range(8)), read=lambda n: pixels[n]
    )
    ids = {"num_tokens": 259, "pad_id": 258, "bos_id": 256, "eos_id": 257}
    model = CoCa(
        dim=8,
        unimodal_depth=1,
        multimodal_depth=1,
        dim_head=4,
        heads=2,
        img_encoder=vit,
        freeze_img_encoder=frozen,
        **ids,
    )
    CoCaTrainer(
        model=model,
        data=data,
        validation_data=data,
        preprocessing=ImagePreprocessing(image_size=8, channels=1),
        checkpoint_dir=tmp_path / "run",
        settings=TrainingSettings(max_steps=3, batch_size=4, learning_rate=1e-5, device="cpu", precision=precision),
    ).train()

    changed = [name for name, value in vit.state_dict().items() if not torch.equal(value.float(), stored[name].float())]
    if frozen:
        assert changed == []
        assert {value.dtype for value in vit.state_dict().values()} == {torch.bfloat16}
    else:
        # in bfloat16 an update of 1e-5 is rounded away
        assert set(changed) == set(stored)
