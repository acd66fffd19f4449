"""Wrong input is refused at the API boundary, by name, and nothing is changed; see also the files of each part."""

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
    softmax_contrastive_loss,
    zero_shot_classifier,
)
from coca.data.captioned_images import CaptionedImages
from coca.data.image_files import load_images
from coca.data.pair_batches import PairBatches
from coca.evaluation.grid import save_grid
from coca.interop import from_coca_pytorch, load_coca_pytorch
from lm_core.tokenizers import ByteTokenizer

pytestmark = pytest.mark.plain

SIZES = {"dim": 16, "num_tokens": 23, "unimodal_depth": 1, "multimodal_depth": 1, "dim_head": 8, "heads": 2}


class Encoder(nn.Module):
    """Declares tokens of 12 features and returns something else."""

    dim = 12

    def __init__(self, result=None):
        super().__init__()
        self.result = result

    def forward(self, images):
        return self.result


@pytest.mark.parametrize("name", [*SIZES, "ff_mult", "num_img_queries", "dim_latents", "image_dim"])
def test_a_size_below_one_is_refused_at_construction(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        CoCa(**{**SIZES, name: 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim_head": 7}, "dim_head must be even for rotary embeddings, got 7"),
        ({"pad_id": 23}, r"pad_id must be a token id in \[0, 23\), got 23"),
        ({"eos_id": -1}, r"eos_id must be a token id in \[0, 23\), got -1"),
        ({"caption_loss_weight": math.inf}, "caption_loss_weight must be a finite number"),
        ({"contrastive_loss_weight": -1.0}, "contrastive_loss_weight must be a finite number"),
        ({"init_logit_scale": 101.0}, r"init_logit_scale must be in \(0, max_logit_scale = 100"),
        ({"init_logit_scale": 0.0}, "init_logit_scale must be in"),
        (
            {"img_encoder": Encoder(), "image_dim": 20},
            "image_dim must be the width of img_encoder's tokens, 12, got 20",
        ),
    ],
)
def test_a_wrong_value_is_refused_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        CoCa(**{**SIZES, **changes})


@pytest.mark.parametrize("changes", [{"pooling": "sum"}, {"loss": "hinge"}, {"dim": 16.0}, {"img_encoder": "vit"}])
def test_a_wrong_type_is_refused_at_construction(changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        CoCa(**{**SIZES, **changes})


TEXT, TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.zeros(2, 5, 12)


def caption(model, **settings):
    return model.generate(image_tokens=TOKENS, **{"prefix": TEXT, **settings})


def hidden_with_cache_of(model, rows):
    return model.hidden(TEXT, cache=model.init_cache(rows, 4), pooled=model.embed_image(image_tokens=TOKENS)[1])


WRONG_VALUES = [
    (lambda m: m.embed_image(TOKENS, TOKENS), "got both"),
    (lambda m: m(TEXT, torch.zeros(2, 3, 8, 8)), "images need an img_encoder"),
    (lambda m: m(TEXT, image_tokens=torch.zeros(2, 5, 13)), "image_dim = 12"),
    (lambda m: m(TEXT, image_tokens=torch.zeros(2, 0, 12)), "at least one token"),
    (lambda m: m(TEXT, image_tokens=TOKENS[:1]), "as many rows, got 2 and 1"),
    (lambda m: m(TEXT + 20, image_tokens=TOKENS), r"text must hold token ids in \[0, 23\)"),
    (lambda m: m.encode_text(TEXT - 9), r"text must hold token ids in \[0, 23\), got -6"),
    (lambda m: m.encode_text(TEXT[0]), r"text must have shape \(b, n\)"),
    (lambda m: m.encode_text(TEXT[:, :0]), "at least one row and token"),
    (lambda m: m.encode_text(TEXT, mask=TEXT[:, :2] > 0), r"mask must have shape \(2, 3\)"),
    (lambda m: m.encode_text(TEXT, mask=TEXT < 0), r"only padding in rows \[0, 1\]"),
    (lambda m: m.loss(TEXT[:, :1], image_tokens=TOKENS), "at least two tokens"),
    (lambda m: m.loss(TEXT, None, TOKENS, TEXT[:, 1:]), r"labels must have text's shape \(2, 3\) .*, got \(2, 2\)"),
    (lambda m: m.loss(TEXT, None, TOKENS, TEXT + 20), r"labels must hold token ids in \[0, 23\), got"),
    (lambda m: caption(m, prefix=None), "prefix must be given"),
    (lambda m: caption(m, prefix=TEXT[:1]), "a row for each of the 2 images, got 1"),
    (lambda m: caption(m, prefix=TEXT + 20), r"prefix must hold token ids in \[0, 23\)"),
    (lambda m: caption(m, beams=2, temperature=1.0), "beams = 2 searches"),
    (lambda m: caption(m, beams=0), "beams must be at least 1"),
    (lambda m: caption(m, top_k=3), "need a temperature above 0"),
    (lambda m: caption(m, max_new_tokens=0), "max_new_tokens must be at least 1"),
    (lambda m: m.hidden(TEXT), "pooled image tokens are needed"),
    (lambda m: hidden_with_cache_of(m, 3), "cache holds 3 rows, got a batch of 2"),
]
WRONG_TYPES = [
    (lambda m: m.encode_text(TEXT.float()), "text must hold integer token ids"),
    (lambda m: m.encode_text(TEXT, mask=torch.ones_like(TEXT)), "mask must be boolean"),
    (lambda m: m.loss(TEXT, None, TOKENS, TEXT.float()), "labels must hold integer token ids"),
    (lambda m: caption(m, num_beams=2), "num_beams"),
    (lambda m: load_images("photos", GREY, templates="a {}"), "templates must be a list .* 'a {}'"),
]


@pytest.mark.parametrize(
    ("call", "message", "kind"),
    [*((*case, ValueError) for case in WRONG_VALUES), *((*case, TypeError) for case in WRONG_TYPES)],
)
def test_a_wrong_input_is_refused_and_changes_nothing(call, message, kind):
    torch.manual_seed(0)
    model = CoCa(**SIZES, image_dim=12)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(kind, match=message):
        call(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        (torch.zeros(2, 5, 13), ValueError, "must return tokens of image_dim = 12 features, got 13"),
        (
            torch.zeros(2, 12),
            ValueError,
            r"must return tokens \(b, m, d\) or a map \(b, c, h, w\), got shape \(2, 12\)",
        ),
        ({"a": 1}, TypeError, "must return a tensor of tokens"),
    ],
)
def test_an_encoder_that_returns_something_else_is_refused(result, kind, message):
    with pytest.raises(kind, match=message):
        CoCa(**SIZES, img_encoder=Encoder(result))(TEXT, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 9, 8), (2, 8, 8)])
def test_an_image_of_another_size_is_refused(shape):
    vit = VisionTransformer(image_size=8, patch_size=4, channels=1, dim=12, depth=1)
    with pytest.raises(ValueError, match=r"images must be \(b, 1, 8, 8\), got shape"):
        vit(torch.zeros(shape))


BYTES, GREY, ONE = ByteTokenizer(), ImagePreprocessing(image_size=4, channels=1), torch.tensor(1.0)


def two_pictures(**changes):
    settings = {"names": ("a", "b"), "captions": (("x",), ("y",)), "read": lambda _: np.zeros((1, 4, 4), np.uint8)}
    return CaptionedImages(**{**settings, **changes})


def classifier(*arguments):
    return zero_shot_classifier(CoCa(**SIZES), *arguments, tokenizer=BYTES)


def batches(size, **settings):
    return PairBatches(
        data=two_pictures(), tokenizer=BYTES, preprocessing=GREY, batch_size=size, pad_id=258, **settings
    )


def recall(matches, owner=None):
    return retrieval_metrics(torch.eye(2), torch.eye(2), owner, matches=torch.tensor(matches))


PIXELS = np.zeros((1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VisionTransformer(image_size=8, patch_size=3, dim=12, depth=1), "must divide image_size = 8, got 3"),
        (lambda: sigmoid_contrastive_loss(torch.zeros(3), torch.zeros(3), ONE, ONE), r"must both be \(b, d\)"),
        (lambda: softmax_contrastive_loss(TOKENS[0], TOKENS[0, :4], ONE), r"be \(b, d\), got \(5, 12\) and \(4, 12\)"),
        (lambda: retrieval_metrics(torch.zeros(0, 3), torch.zeros(0, 3)), "at least one image"),
        (lambda: retrieval_metrics(torch.zeros(2, 3), torch.zeros(3, 3)), "image_of_text must be"),
        (lambda: retrieval_metrics(torch.full((2, 3), math.nan), torch.zeros(2, 3)), "must be finite"),
        (lambda: retrieval_metrics(torch.eye(2), torch.eye(2), torch.tensor([0, 2])), r"must be in \[0, 2\)"),
        (lambda: retrieval_metrics(torch.eye(2), torch.eye(2), ks=(0,)), "ks must be at least 1"),
        (lambda: retrieval_metrics(torch.eye(2), torch.eye(2), chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda: recall([[0, 0], [1, 2]]), r"matches must be pairs below \(2, 2\), got \[\[0, 0\], \[1, 2\]\]"),
        (lambda: recall([[0, 0], [-1, 1]]), r"matches must be pairs below \(2, 2\)"),
        (lambda: recall([[0, 0], [0, 1]]), r"matches must have an image for each caption, got none for \[1\]"),
        (lambda: recall([0, 1]), r"matches must be integers \(pairs, 2\), got torch.int64 of \(2,\)"),
        (lambda: recall([[0.0, 0.0]]), r"matches must be integers \(pairs, 2\), got torch.float32"),
        (lambda: recall([[0, 0], [1, 1]], torch.tensor([0, 1])), "pass image_of_text or matches, got both"),
        (lambda: classifier([]), "must not be empty"),
        (lambda: classifier(["a", "a"]), r"must differ, got \['a'\]"),
        (lambda: classifier(["a"], ["a photo"]), "exactly one {}, got 'a photo'"),
        (lambda: encode_captions(["abc"], BYTES, 258, 2), "max_length must leave room"),
        (lambda: two_pictures(names=(), captions=()), "at least one image, got none"),
        (lambda: two_pictures(captions=(("x",), ())), r"captions that are not empty, got \[\] for b"),
        (lambda: two_pictures(captions=(("x",),)), "captions must be given for each of 2 images, got 1"),
        (lambda: two_pictures(labels=(0, 1), class_names=("one",)), r"labels must be in \[0, 1\)"),
        (lambda: two_pictures().split(1.0), r"validation_fraction must be in \(0, 1\), got 1.0"),
        (lambda: batches(3), "batch_size must be at most the number of images, 2, got 3"),
        (lambda: batches(2, world_size=3), "batch_size must be at least the number of processes, 3, got 2"),
        (lambda: save_grid("grid.png", [], [], []), "at least one, got 0, 0 and 0"),
        (lambda: save_grid("g.png", [PIXELS], ["a"], [[]], truths=[]), "truths must have one caption for each of 1"),
        (lambda: ImagePreprocessing(image_size=8, channels=2), "channels must be 1 or 3, got 2"),
        (lambda: ImagePreprocessing(image_size=8, std=(0.0,)), "std must be positive"),
        (lambda: from_coca_pytorch({}), "without token_emb.weight, text_cls_token"),
    ],
)
def test_the_parts_refuse_what_they_cannot_do(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.archives
def test_a_file_that_runs_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Trap()}, tmp_path / "old.pt")

    with pytest.raises(ValueError, match="nothing in it was run"):
        load_coca_pytorch(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_preparation_is_refused(tmp_path):
    model = CoCa(**SIZES)
    model.preprocessing = GREY
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocess.json").write_text(json.dumps({"format_version": 9}), "utf-8")

    with pytest.raises((ValueError, RuntimeError), match=r"preprocess\.json"):
        CoCa.from_pretrained(tmp_path / "model")
