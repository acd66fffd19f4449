"""Reading pictures, and encoders of every kind as tokens."""

import io
import json
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from coca import CoCa, ImagePreprocessing, VisionTransformer
from coca.data.digits import CLASS_NAMES, handwritten_digits
from coca.data.image_files import load_images
from coca.evaluation import fonts, grid
from coca.evaluation.grid import save_grid
from coca.model.image_encoders import token_width, tokens_of
from coca.model.vit import waves
from lm_core.tokenizers import ByteTokenizer

GREY = ImagePreprocessing(image_size=4, channels=1)
SIZES = {"dim": 16, "num_tokens": 23, "unimodal_depth": 1, "multimodal_depth": 1, "dim_head": 8, "heads": 2}


# --------------------------------------------------------------------------------------------------- preparation


def test_a_picture_is_cut_to_its_centre_and_scaled():
    array = np.zeros((4, 8, 3), np.uint8)
    array[:, 2:6] = 255

    pixels = ImagePreprocessing(image_size=4).pixels(Image.fromarray(array))

    assert pixels.shape == (3, 4, 4)
    assert bool((pixels == 255).all())


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation():
    preprocessing = ImagePreprocessing(image_size=1, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))

    found = preprocessing(Image.new("RGB", (1, 1), (255, 0, 51)))

    torch.testing.assert_close(found.flatten(), torch.tensor([1.8, -0.2, -0.05]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_pictures_of_every_mode_are_read(mode):
    pixels = ImagePreprocessing(image_size=4).pixels(Image.new(mode, (5, 7)))

    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == np.uint8


def test_pictures_of_sixteen_bits_are_scaled():
    picture = Image.fromarray(np.full((4, 4), 32896, np.uint16))

    assert picture.mode.startswith("I")
    assert set(GREY.pixels(picture).flatten().tolist()) == {128}


def test_transparent_parts_are_white():
    assert int(GREY.pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).min()) == 255


# ------------------------------------------------------------------------------------------------------- sources


def picture_bytes(shade):
    stream = io.BytesIO()
    Image.new("L", (4, 4), shade).save(stream, "PNG")
    return stream.getvalue()


ROWS = [{"image": f"{n}.png", "caption": [f"shade {n}", f"grey {n}"], "label": "ab"[n % 2]} for n in range(3)]


def written_folder(folder):
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(ROWS):
        (folder / f"{number}.png").write_bytes(picture_bytes(number * 10))
        (folder / f"{number}.txt").write_text("\n".join(row["caption"]) + "\n", "utf-8")
    return folder


def written_csv(folder):
    lines = [f"{row['image']},{caption},{row['label']}" for row in ROWS for caption in row["caption"]]
    (written_folder(folder) / "captions.csv").write_text("\n".join(["image,caption,label", *lines]) + "\n", "utf-8")
    return folder


def written_jsonl(folder):
    (written_folder(folder) / "x.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", "utf-8")
    return folder / "x.jsonl"


def written_tar(folder):
    written_folder(folder)
    with tarfile.open(folder / "x.tar", "w") as archive:
        for number, row in enumerate(ROWS):
            (folder / f"{number}.json").write_text(json.dumps(row), "utf-8")
            archive.add(folder / f"{number}.png", f"{number}.png")
            archive.add(folder / f"{number}.json", f"{number}.json")
    return folder / "x.tar"


@pytest.mark.parametrize("write", [written_folder, written_csv, written_jsonl, written_tar])
def test_images_are_read_with_all_their_captions(write, tmp_path):
    data = load_images(write(tmp_path), GREY)

    assert data.names == ("0.png", "1.png", "2.png")
    assert data.captions == tuple(tuple(row["caption"]) for row in ROWS)
    assert [int(data.read(number).mean()) for number in range(3)] == [0, 10, 20]
    if write is not written_folder:
        assert data.class_names == ("a", "b")
        assert data.labels == (0, 1, 0)
    assert data.unreadable == ()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("nowhere", None, FileNotFoundError, "there is no"),
        (".", None, ValueError, "at least one image with a caption, got none"),
        ("a.zip", "x", ValueError, "got .*a.zip"),
        ("a.csv", "image,words\n0.png,hi\n", ValueError, r"a.csv, line 2, must have 'caption' or .*'image', 'words'"),
        ("a.csv", "image,caption\ngone.png,hello\n", FileNotFoundError, "line 2, names the image .*gone.png, which is"),
        ("a.jsonl", '{"image": 1}\n', ValueError, "a.jsonl, line 1, must have 'caption'"),
        ("a.jsonl", "{oops\n", ValueError, "a.jsonl, line 1, is not JSON"),
        ("a.tar", "x" * 2000, ValueError, "cannot be read as a tar"),
        ("0.png", "x", ValueError, r"must have a .txt next to it, .*0\.png has none"),
    ],
)
def test_a_source_without_usable_images_is_refused(name, content, kind, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(kind, match=message):
        load_images(tmp_path if name == "0.png" else tmp_path / name, GREY)


@pytest.mark.plain
@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_unreadable_image_is_named_and_counted(tmp_path, damage):
    folder = written_folder(tmp_path)
    (folder / "1.png").write_bytes(picture_bytes(10)[:40] if damage is None else damage)

    data = load_images(folder, GREY, max_unreadable=0.4)

    assert data.names == ("0.png", "2.png")
    assert len(data.unreadable) == 1
    assert data.unreadable[0].startswith("1.png: ")
    assert " object at " not in data.unreadable[0]
    with pytest.raises(
        ValueError, match=r"1 of 3 images in .* cannot be read, more than max_unreadable = 0.1 .*1\.png"
    ):
        load_images(folder, GREY, max_unreadable=0.1)
    (folder / "0.png").unlink()
    with pytest.raises(FileNotFoundError):
        data.read(0)


def test_a_split_keeps_every_image_once(tmp_path, monkeypatch):
    written_csv(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    data = load_images("digits", GREY)
    train, held_out = data.split(0.34, seed=1)

    assert sorted(train.names + held_out.names) == ["0.png", "1.png", "2.png"]
    for part in (train, held_out):
        for number, name in enumerate(part.names):
            assert int(part.read(number).mean()) == 10 * int(name[0])


def test_a_grid_is_a_picture_of_all_images(tmp_path):
    images = [np.full((1, 8, 8), 40 * number, np.uint8) for number in range(5)]
    captions = ["a caption that is much too long for the room next to its image, and then some", "", "b", "c", "d"]

    path = save_grid(tmp_path / "grid.png", images, captions, [[("near", 0.5)]] * 5, title="five", columns=2)

    with Image.open(path) as picture:
        assert picture.width > 2 * 132
        assert picture.height > 3 * 132


def test_a_grid_has_a_font_with_the_scripts_of_its_captions(tmp_path):
    pytest.importorskip("matplotlib")  # brings DejaVu Sans
    image = [np.zeros((1, 8, 8), np.uint8)]

    def drawn(caption):
        return Image.open(save_grid(tmp_path / "grid.png", image, [caption], [[]])).tobytes()

    # a letter that the font lacks is drawn as the same sign as every other one that it lacks
    assert drawn("собака") != drawn("кошка!")
    assert drawn("σκύλος") != drawn("γάτα!!")


def test_characters_that_no_font_has_are_named(monkeypatch):
    monkeypatch.setattr(fonts, "_files", lambda: ())

    with pytest.warns(UserWarning, match="no font of this machine has 2 of the characters: д ж"):
        fonts.fonts_for("abc дж", (12,))


def test_a_grid_shows_a_true_caption_and_the_runner_up_class(tmp_path, monkeypatch):
    """The nearest texts are the best wording of different classes."""
    shown = {}
    monkeypatch.setattr(grid, "save_grid", lambda *parts, **named: shown.update(named, nearest=parts[3]) or parts[0])
    data = handwritten_digits().select(range(12))
    vit = VisionTransformer(image_size=8, patch_size=4, channels=1, dim=8, depth=1, dim_head=4, heads=2)
    sizes = {"dim": 8, "unimodal_depth": 1, "multimodal_depth": 1, "num_img_queries": 2, "dim_head": 4, "heads": 2}
    tokenizer = ByteTokenizer()
    ids = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    model = CoCa(num_tokens=tokenizer.vocab_size, img_encoder=vit, **sizes, **ids)

    grid.draw_grid(
        tmp_path, model, data, tokenizer, ImagePreprocessing(image_size=8, channels=1), max_length=6, count=3
    )

    assert shown["truths"] == [data.captions[index][0] for index in range(3)]
    for texts in shown["nearest"]:
        classes = [next(name for name in CLASS_NAMES if text.endswith(name)) for text, _ in texts]
        assert len(set(classes)) == len(classes) == 4
        assert [value for _, value in texts] == sorted((value for _, value in texts), reverse=True)


# ------------------------------------------------------------------------------------------------------ encoders


class Extractor(nn.Module):
    """As vit-pytorch's: returns (prediction, embeddings), detached unless asked otherwise."""

    dim = 12

    def __init__(self, detach=True):
        super().__init__()
        self.vit, self.detach = nn.Conv2d(1, 12, 4, 4), detach

    def forward(self, images):
        tokens = self.vit(images).flatten(2).transpose(1, 2)
        return torch.zeros(len(images), 5), tokens.detach() if self.detach else tokens


class Timm(nn.Module):
    """As timm's models: ``forward`` classifies, ``forward_features`` does not; a Swin has several widths."""

    embed_dim, num_features = 6, 12
    vit = "swin"  # not an Extractor's module

    def __init__(self, channels_last=False):
        super().__init__()
        self.stem, self.channels_last = nn.Conv2d(1, 12, 4, 4), channels_last

    def forward_features(self, images):
        features = self.stem(images)
        return features.permute(0, 2, 3, 1) if self.channels_last else features

    def forward(self, images):
        return self.forward_features(images).mean(dim=(1, 2))


def hugging_face_vit():
    import transformers

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
    return transformers.ViTModel(transformers.ViTConfig(hidden_size=12, patch_size=4, num_channels=1, **sizes))


def hugging_face_resnet():
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetModel(transformers.ResNetConfig(num_channels=1, **sizes))


def vit_pytorch_extractor(detach=False):
    vit_pytorch = pytest.importorskip("vit_pytorch", reason="vit-pytorch is not installed")
    from vit_pytorch.extractor import Extractor as Wrapped

    sizes = {"dim": 12, "depth": 1, "heads": 2, "mlp_dim": 16, "dim_head": 4, "channels": 1, "num_classes": 3}
    vit = vit_pytorch.ViT(image_size=8, patch_size=4, **sizes)
    return Wrapped(vit, return_embeddings_only=True, detach=detach)


def timm_model(name, **settings):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name, pretrained=False, num_classes=0, in_chans=1, **settings)


SMALL_VIT = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2}
SMALL_SWIN = {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
# How to make one, the size of its images, and the shape of its tokens.
ENCODERS = {
    "our ViT": (lambda: VisionTransformer(image_size=8, patch_size=4, channels=1, dim=12, depth=1), 8, (4, 12)),
    "Extractor": (lambda: Extractor(detach=False), 8, (4, 12)),
    "timm map": (Timm, 8, (4, 12)),
    "timm map, channels last": (lambda: Timm(channels_last=True), 8, (4, 12)),
    "Hugging Face ViT": (hugging_face_vit, 8, (5, 12)),
    "Hugging Face ResNet": (hugging_face_resnet, 8, (1, 12)),
    "CNN": (lambda: nn.Sequential(nn.Conv2d(1, 12, 4, 4), nn.ReLU()), 8, (4, 12)),
    "vit-pytorch's Extractor": (vit_pytorch_extractor, 8, (5, 12)),
    "timm's ViT": (lambda: timm_model("vit_tiny_patch16_224", **SMALL_VIT), 32, (5, 12)),
    "timm's ResNet": (lambda: timm_model("resnet10t"), 32, (1, 512)),
    "timm's Swin": (lambda: timm_model("swin_tiny_patch4_window7_224", **SMALL_SWIN), 32, (16, 24)),
}
TEXT = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_gives_tokens_and_is_trained(name):
    make, size, shape = ENCODERS[name]
    encoder = make()
    width = token_width(encoder)
    model = CoCa(**SIZES, image_dim=shape[1] if width is None else None, img_encoder=encoder)
    images = torch.randn(2, 1, size, size)

    tokens = model.img_encoder(images)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="img_encoder")
        model(TEXT, images, return_loss=True).backward()

    assert tokens.shape == (2, *shape)
    assert width == (None if name == "CNN" else shape[1])
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


@pytest.mark.parametrize("name", list(ENCODERS)[:6])
def test_a_frozen_encoder_does_not_move(name):
    encoder = ENCODERS[name][0]()
    model = CoCa(**SIZES, img_encoder=encoder, freeze_img_encoder=True).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    model(TEXT, torch.randn(2, 1, 8, 8), return_loss=True).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    assert not encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [Extractor, lambda: vit_pytorch_extractor(detach=True)], ids=["ours", "vit-pytorch"])
def test_an_extractor_that_detaches_is_warned_of_once(make):
    model = CoCa(**SIZES, img_encoder=make())
    images = torch.randn(2, 1, 8, 8)

    with pytest.warns(UserWarning, match=r"Extractor returns tokens without gradient .*detach=False"):
        model(TEXT, images, return_loss=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="img_encoder")
        model(TEXT, images, return_loss=True)


def test_maps_become_their_places_row_by_row():
    features = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)

    assert torch.equal(tokens_of(features)[0, 1], features[0, :, 0, 1])
    assert torch.equal(tokens_of(features.permute(0, 2, 3, 1), 3), tokens_of(features))


def test_positions_start_distinct():
    for side, dim in ((2, 8), (4, 64), (14, 30)):
        start = waves(side, dim)
        assert start.shape == (side * side, dim)
        assert len(start.unique(dim=0)) == side * side
