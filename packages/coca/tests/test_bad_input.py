"""Wrong input is refused at the door, by name, and nothing is changed."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from coca import (
    CoCa,
    ImagePreprocessing,
    VisionTransformer,
    encode_captions,
    retrieval_metrics,
    sigmoid_contrastive_loss,
    zero_shot_classifier,
)
from coca.data.captioned_images import CaptionedImages
from coca.data.image_files import load_images
from coca.data.pair_batches import PairBatches
from coca.evaluation.grid import save_grid
from coca.interop import from_coca_pytorch, load_coca_pytorch
from coca.training.config import TrainingSettings
from coca.training.trainer import CoCaTrainer
from lm_core.tokenizers import ByteTokenizer

pytestmark = pytest.mark.plain

SIZES = {"dim": 16, "num_tokens": 23, "unimodal_depth": 1, "multimodal_depth": 1, "dim_head": 8, "heads": 2}


class Encoder(nn.Module):
    """Says that its tokens have 12 features and returns others."""

    dim = 12

    def __init__(self, shape=(2, 5, 12)):
        super().__init__()
        self.shape = shape

    def forward(self, images):
        return torch.zeros(self.shape)


CONSTRUCTION = {
    "dim of 0": ({"dim": 0}, "dim must be at least 1, got 0"),
    "no tokens": ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
    "no unimodal layer": ({"unimodal_depth": 0}, "unimodal_depth must be at least 1, got 0"),
    "no multimodal layer": ({"multimodal_depth": -1}, "multimodal_depth must be at least 1, got -1"),
    "odd dim_head": ({"dim_head": 7}, "dim_head must be even for rotary embeddings, got 7"),
    "no image query": ({"num_img_queries": 0}, "num_img_queries must be at least 1, got 0"),
    "no latents": ({"dim_latents": 0}, "dim_latents must be at least 1, got 0"),
    "no image width": ({"image_dim": 0}, "image_dim must be at least 1, got 0"),
    "pad_id out of range": ({"pad_id": 23}, r"pad_id must be a token id in \[0, 23\), got 23"),
    "eos_id negative": ({"eos_id": -1}, r"eos_id must be a token id in \[0, 23\), got -1"),
    "weight not finite": ({"caption_loss_weight": math.inf}, "caption_loss_weight must be a finite number"),
    "weight negative": ({"contrastive_loss_weight": -1.0}, "contrastive_loss_weight must be a finite number"),
    "scale above its bound": ({"init_logit_scale": 101.0}, r"init_logit_scale must be in \(0, max_logit_scale = 100"),
    "scale of 0": ({"init_logit_scale": 0.0}, "init_logit_scale must be in"),
    "encoder of another width": (
        {"img_encoder": Encoder(), "image_dim": 20},
        "image_dim must be the width of img_encoder's tokens, 12, got 20",
    ),
}


@pytest.mark.parametrize("case", list(CONSTRUCTION))
def test_a_wrong_size_is_refused_at_construction(case):
    changes, message = CONSTRUCTION[case]
    with pytest.raises(ValueError, match=message):
        CoCa(**{**SIZES, **changes})


@pytest.mark.parametrize("changes", [{"pooling": "sum"}, {"loss": "hinge"}, {"dim": 16.0}, {"img_encoder": "vit"}])
def test_a_wrong_type_is_refused_at_construction(changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        CoCa(**{**SIZES, **changes})


TEXT, TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.zeros(2, 5, 12)
FORWARD = {
    "no image": (lambda m: m(TEXT), ValueError, "give images or image_tokens, got neither"),
    "two images": (lambda m: m.embed_image(TOKENS, TOKENS), ValueError, "got both"),
    "no encoder": (lambda m: m(TEXT, torch.zeros(2, 3, 8, 8)), ValueError, "images need an img_encoder"),
    "wrong token width": (lambda m: m(TEXT, image_tokens=torch.zeros(2, 5, 13)), ValueError, "image_dim = 12"),
    "no image tokens": (lambda m: m(TEXT, image_tokens=torch.zeros(2, 0, 12)), ValueError, "at least one token"),
    "other rows": (lambda m: m(TEXT, image_tokens=TOKENS[:1]), ValueError, "as many rows, got 2 and 1"),
    "id too large": (lambda m: m(TEXT + 20, image_tokens=TOKENS), ValueError, r"text must hold token ids in \[0, 23\)"),
    "id negative": (lambda m: m.encode_text(TEXT - 9), ValueError, r"text must hold token ids in \[0, 23\), got -6"),
    "float text": (lambda m: m.encode_text(TEXT.float()), TypeError, "text must hold integer token ids"),
    "text of one dimension": (lambda m: m.encode_text(TEXT[0]), ValueError, r"text must have shape \(b, n\)"),
    "empty text": (lambda m: m.encode_text(TEXT[:, :0]), ValueError, "at least one row and token"),
    "only padding": (lambda m: m.encode_text(TEXT * 0), ValueError, r"only padding in rows \[0, 1\]"),
    "mask of integers": (lambda m: m.encode_text(TEXT, mask=torch.ones_like(TEXT)), TypeError, "mask must be boolean"),
    "mask of another shape": (
        lambda m: m.encode_text(TEXT, mask=TEXT[:, :2] > 0),
        ValueError,
        "mask must have the shape",
    ),
    "mask of nothing": (lambda m: m.encode_text(TEXT, mask=TEXT < 0), ValueError, r"only padding in rows \[0, 1\]"),
    "one token and a loss": (lambda m: m.loss(TEXT[:, :1], image_tokens=TOKENS), ValueError, "at least two tokens"),
    "labels of another shape": (
        lambda m: m.loss(TEXT, image_tokens=TOKENS, labels=TEXT[:, 1:]),
        ValueError,
        r"labels must have the shape of text \(2, 3\) \(they are shifted inside\), got \(2, 2\)",
    ),
    "label out of range": (
        lambda m: m.loss(TEXT, image_tokens=TOKENS, labels=TEXT + 20),
        ValueError,
        r"labels must hold token ids in \[0, 23\), got",
    ),
    "float labels": (lambda m: m.loss(TEXT, image_tokens=TOKENS, labels=TEXT.float()), TypeError, "labels must hold"),
    "no beginning": (lambda m: m.generate(image_tokens=TOKENS), ValueError, "prefix must be given"),
    "beams and sampling": (
        lambda m: m.generate(image_tokens=TOKENS, prefix=TEXT, beams=2, temperature=1.0),
        ValueError,
        "beams = 2 searches",
    ),
    "top_k without sampling": (
        lambda m: m.generate(image_tokens=TOKENS, prefix=TEXT, top_k=3),
        ValueError,
        "need a temperature above 0",
    ),
    "no beams": (
        lambda m: m.generate(image_tokens=TOKENS, prefix=TEXT, beams=0),
        ValueError,
        "beams must be at least 1",
    ),
    "prefix of other rows": (
        lambda m: m.generate(image_tokens=TOKENS, prefix=TEXT[:1]),
        ValueError,
        "a row for each of the 2 images, got 1",
    ),
    "prefix out of range": (
        lambda m: m.generate(image_tokens=TOKENS, prefix=TEXT + 20),
        ValueError,
        r"prefix must hold token ids in \[0, 23\)",
    ),
    "no new tokens": (
        lambda m: m.generate(image_tokens=TOKENS, prefix=TEXT, max_new_tokens=0),
        ValueError,
        "max_new_tokens must be at least 1",
    ),
    "unknown setting": (lambda m: m.generate(image_tokens=TOKENS, prefix=TEXT, num_beams=2), TypeError, "num_beams"),
    "hidden without an image": (lambda m: m.hidden(TEXT), ValueError, "pooled image tokens are needed"),
    "cache of other rows": (
        lambda m: m.hidden(TEXT, cache=m.init_cache(3, 4), pooled=m.embed_image(image_tokens=TOKENS)[1]),
        ValueError,
        "cache holds 3 rows, got a batch of 2",
    ),
}


@pytest.mark.parametrize("case", list(FORWARD))
def test_a_wrong_input_is_refused_and_changes_nothing(case):
    call, kind, message = FORWARD[case]
    torch.manual_seed(0)
    model = CoCa(**SIZES, image_dim=12)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(kind, match=message):
        call(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Encoder((2, 5, 13)), "must return tokens of image_dim = 12 features, got 13"),
        (Encoder((2, 12)), r"must return tokens \(b, m, d\) or a map \(b, c, h, w\), got shape \(2, 12\)"),
    ],
)
def test_an_encoder_that_returns_something_else_is_refused(encoder, message):
    with pytest.raises(ValueError, match=message):
        CoCa(**SIZES, img_encoder=encoder)(TEXT, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 9, 8), (2, 8, 8)])
def test_an_image_of_another_size_is_refused(shape):
    vit = VisionTransformer(image_size=8, patch_size=4, channels=1, dim=12, depth=1)
    with pytest.raises(ValueError, match=r"images must be \(b, 1, 8, 8\), got shape"):
        vit(torch.zeros(shape))


BYTES = ByteTokenizer()
GREY = ImagePreprocessing(image_size=4, channels=1)


def two_pictures(**changes):
    settings = {"names": ("a", "b"), "captions": (("x",), ("y",)), "read": lambda _: np.zeros((1, 4, 4), np.uint8)}
    return CaptionedImages(**{**settings, **changes})


def byte_model(**changes):
    vit = VisionTransformer(image_size=4, patch_size=2, channels=1, dim=8, depth=1, dim_head=4, heads=2)
    ids = {"pad_id": BYTES.pad_id, "bos_id": BYTES.bos_id, "eos_id": BYTES.eos_id, "img_encoder": vit}
    return CoCa(**{**SIZES, "num_tokens": 259, **ids, **changes})


def trainer(folder, model=None, **changes):
    settings = {"batch_size": 2, "max_steps": 1, "device": "cpu", **changes}
    return CoCaTrainer(
        model=model or byte_model(),
        data=two_pictures(),
        held_out=two_pictures(),
        preprocessing=GREY,
        checkpoint_dir=folder,
        settings=TrainingSettings(**settings),
    )


PARTS = {
    "patch that does not fit": (
        lambda _: VisionTransformer(image_size=8, patch_size=3, dim=12, depth=1),
        "patch_size must divide image_size = 8, got 3",
    ),
    "three latents of one": (
        lambda _: sigmoid_contrastive_loss(torch.zeros(3), torch.zeros(3), torch.tensor(1.0), torch.tensor(0.0)),
        r"must both be \(b, d\)",
    ),
    "recall of nothing": (lambda _: retrieval_metrics(torch.zeros(0, 3), torch.zeros(0, 3)), "at least one image"),
    "recall without owners": (
        lambda _: retrieval_metrics(torch.zeros(2, 3), torch.zeros(3, 3)),
        "image_of_text must be",
    ),
    "recall of NaN": (lambda _: retrieval_metrics(torch.full((2, 3), math.nan), torch.zeros(2, 3)), "must be finite"),
    "owner out of range": (
        lambda _: retrieval_metrics(torch.eye(2), torch.eye(2), torch.tensor([0, 2])),
        r"image_of_text must be in \[0, 2\)",
    ),
    "recall at 0": (lambda _: retrieval_metrics(torch.eye(2), torch.eye(2), ks=(0,)), "ks must be at least 1"),
    "no classes": (lambda _: zero_shot_classifier(byte_model(), [], tokenizer=BYTES), "must not be empty"),
    "class twice": (
        lambda _: zero_shot_classifier(byte_model(), ["a", "a"], tokenizer=BYTES),
        r"must differ, got \['a'\]",
    ),
    "template without a place": (
        lambda _: zero_shot_classifier(byte_model(), ["a"], ["a photo"], tokenizer=BYTES),
        "exactly one {}, got 'a photo'",
    ),
    "no room for text": (lambda _: encode_captions(["abc"], BYTES, 258, 2), "max_length must leave room"),
    "no images": (lambda _: two_pictures(names=(), captions=()), "at least one image, got none"),
    "no caption": (lambda _: two_pictures(captions=(("x",), ())), r"captions that are not empty, got \[\] for b"),
    "label without a class": (
        lambda _: two_pictures(labels=(0, 1), class_names=("one",)),
        r"labels must be in \[0, 1\)",
    ),
    "split of everything": (lambda _: two_pictures().split(1.0), r"held_out must be in \(0, 1\), got 1.0"),
    "batch above the data": (
        lambda _: PairBatches(data=two_pictures(), tokenizer=BYTES, preprocessing=GREY, batch_size=3, pad_id=258),
        "batch_size must be at most the number of images, 2, got 3",
    ),
    "grid of nothing": (lambda folder: save_grid(folder / "grid.png", [], [], []), "at least one, got 0, 0 and 0"),
    "two channels": (lambda _: ImagePreprocessing(image_size=8, channels=2), "channels must be 1 or 3, got 2"),
    "std of 0": (lambda _: ImagePreprocessing(image_size=8, std=(0.0,)), "std must be positive"),
    "no updates": (lambda _: TrainingSettings(max_steps=0), "max_steps must be at least 1, got 0"),
    "rate not finite": (lambda _: TrainingSettings(learning_rate=math.nan), "learning_rate must be a finite number"),
    "unknown device": (lambda folder: trainer(folder, device="tpu"), "device must be auto, cpu, cuda"),
    "too few tokens": (
        lambda folder: trainer(folder, CoCa(**SIZES)),
        "model must have num_tokens >= 259, the tokenizer's vocab_size, got 23",
    ),
    "other end": (lambda folder: trainer(folder, byte_model(eos_id=3)), "the tokenizer's eos_id, 257, got 3"),
    "model without eyes": (
        lambda folder: trainer(folder, byte_model(img_encoder=None)),
        "model must have an img_encoder to be trained on images",
    ),
    "not the original's weights": (lambda _: from_coca_pytorch({}), "without token_emb.weight, text_cls_token"),
}


@pytest.mark.parametrize("case", list(PARTS))
def test_the_parts_refuse_what_they_cannot_do(case, tmp_path):
    call, message = PARTS[case]
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_runs_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Trap()}, tmp_path / "old.pt")

    with pytest.raises(ValueError, match="cannot be read as weights, nothing was executed"):
        load_coca_pytorch(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------- image files


def write_pictures(folder, count=4, suffix=".png"):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (6, 8), (40 * number, 0, 0)).save(folder / f"{number}{suffix}")
        (folder / f"{number}.txt").write_text(f"shade {number}\nred {number}\n", "utf-8")
    return folder


FILES = {
    "nowhere": (lambda folder: folder / "nowhere", FileNotFoundError, "there is no"),
    "an empty folder": (lambda folder: folder, ValueError, "at least one image with a caption, got none"),
    "another kind of file": (lambda folder: written(folder / "a.zip", "x"), ValueError, "got .*a.zip"),
    "a table without captions": (
        lambda folder: written(folder / "a.csv", "image,text\n0.png,hello\n"),
        ValueError,
        r"a.csv, line 2, must have 'caption', got the columns \['image', 'text'\]",
    ),
    "a table with a missing image": (
        lambda folder: written(folder / "a.csv", "image,caption\ngone.png,hello\n"),
        FileNotFoundError,
        "line 2, names the image .*gone.png, which is not there",
    ),
    "lines that are not JSON": (
        lambda folder: written(folder / "a.jsonl", '{"image": 1}\n{oops\n'),
        ValueError,
        "a.jsonl, line 1, must have 'caption'|a.jsonl, line 2, is not JSON",
    ),
    "a tar that is none": (
        lambda folder: written(folder / "a.tar", "x" * 2000),
        ValueError,
        "cannot be read as an uncom",
    ),
}


def written(path, text):
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("case", list(FILES))
def test_a_source_without_usable_images_is_refused(case, tmp_path):
    make, kind, message = FILES[case]
    with pytest.raises(kind, match=message):
        load_images(make(tmp_path), GREY)


def test_an_image_without_a_caption_is_named(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "2.txt").unlink()

    with pytest.raises(ValueError, match=r"must have a .txt next to it, .*2\.png has none"):
        load_images(folder, GREY)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_unreadable_image_is_named_and_counted(tmp_path, damage):
    folder = write_pictures(tmp_path / "pictures", count=5)
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2] if damage is None else damage)

    data = load_images(folder, GREY, max_unreadable=0.2)

    assert data.names == ("0.png", "1.png", "2.png", "4.png")
    assert len(data.unreadable) == 1
    assert data.unreadable[0].startswith("3.png: ")
    assert " object at " not in data.unreadable[0]
    with pytest.raises(
        ValueError, match=r"1 of 5 images in .* cannot be read, more than max_unreadable = 0.1 .*3\.png"
    ):
        load_images(folder, GREY, max_unreadable=0.1)


def test_a_damaged_preparation_is_refused(tmp_path):
    model = byte_model()
    model.preprocessing = GREY
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocess.json").write_text(json.dumps({"format_version": 9}), "utf-8")

    with pytest.raises((ValueError, RuntimeError), match=r"preprocess\.json"):
        CoCa.from_pretrained(tmp_path / "model")
