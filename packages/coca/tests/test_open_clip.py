"""open_clip's CoCa: equal results (golden values of make_open_clip.py), and everything that works on our own models."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coca import CLIPVisionTransformer, CoCa, from_open_clip, to_open_clip
from coca.interop.clip_tokenizer import clip_tokenizer
from lm_core.tokenizers import load_tokenizer

FOLDER = Path(__file__).with_name("golden") / "open_clip"
BPE = FOLDER.with_name("clip_bpe")
GOLDEN = json.loads(FOLDER.with_suffix(".json").read_text("utf-8"))
TEXT = torch.tensor(GOLDEN["text"])
IMAGES = torch.sin(torch.arange(3 * 3 * 16 * 16) * 0.37).view(3, 3, 16, 16)
LENGTHS = (5, 12, 9)
WEIGHTS = FOLDER / "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def model():
    return from_open_clip(FOLDER).eval()


@pytest.fixture
def make_folder(tmp_path):
    """A copy of the folder with another configuration, and weights in another form."""

    def make(change=None, weights=None, name="open_clip_pytorch_model.bin"):
        folder = tmp_path / "model"
        shutil.copytree(FOLDER, folder)
        if change is not None:
            content = json.loads((folder / "open_clip_config.json").read_text("utf-8"))
            change(content["model_cfg"])
            (folder / "open_clip_config.json").write_text(json.dumps(content), "utf-8")
        if weights is not None:
            (folder / WEIGHTS.name).unlink()
            torch.save(weights, folder / name)
        return folder

    return make


@torch.no_grad()
def equal_to_golden(model):
    torch.testing.assert_close(model.encode_image(IMAGES), torch.tensor(GOLDEN["image_features"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(TEXT), torch.tensor(GOLDEN["text_features"]), atol=1e-5, rtol=0)
    for row, length in enumerate(LENGTHS):
        actual, expected = model(TEXT, IMAGES)[row, : length - 1], torch.tensor(GOLDEN["logits"])[row, : length - 1]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_features_and_logits_equal_open_clips(model):
    equal_to_golden(model)
    assert model.logit_scale.item() == pytest.approx(torch.tensor(2.0).exp().item())
    assert (model.pad_id, model.bos_id, model.eos_id, model.max_length) == (0, 38, 39, 12)


def test_the_corrected_cls_mask_equals_open_clips(make_folder):
    model = from_open_clip(make_folder(lambda config: config["text_cfg"].update(correct_cls_mask=True))).eval()

    expected = torch.tensor(GOLDEN["text_features_correct_cls_mask"])
    torch.testing.assert_close(model.encode_text(TEXT), expected, atol=1e-5, rtol=0)
    assert (expected - torch.tensor(GOLDEN["text_features"])).abs().max() > 1e-3


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("use_cache", [True, False])
def test_captions_equal_open_clips(model, beams, use_cache):
    captions = model.generate(IMAGES, max_new_tokens=10, beams=beams, use_cache=use_cache)

    expected = torch.tensor(GOLDEN["greedy" if beams == 1 else "beams"])[:, 1:]
    assert captions.tolist() == expected.tolist()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_training_checkpoint_of_open_clip_loads(make_folder, prefix, wrapped):
    state = {prefix + name: tensor for name, tensor in load_file(WEIGHTS).items()}
    state[f"{prefix}text.attn_mask"] = torch.zeros(13, 13)  # a buffer that earlier versions stored
    content = {"epoch": 3, "name": "run", "state_dict": state} if wrapped else state

    equal_to_golden(from_open_clip(make_folder(weights=content)).eval())


def test_a_pooling_as_wide_as_the_vision_tower_has_one_matrix(tmp_path):
    torch.manual_seed(0)
    vit = CLIPVisionTransformer(image_size=16, patch_size=8, dim=16, depth=1, heads=2, dim_head=8)
    sizes = {"dim": 16, "num_tokens": 23, "unimodal_depth": 1, "multimodal_depth": 1, "dim_head": 8, "heads": 2}
    model = CoCa(**sizes, img_encoder=vit, block="sequential", max_text_length=9, num_img_queries=3).eval()

    exported = load_file(to_open_clip(model, tmp_path / "back") / WEIGHTS.name)

    assert exported["visual.attn_pool.attn.in_proj_weight"].shape == (48, 16)
    reopened = from_open_clip(tmp_path / "back").eval()
    torch.testing.assert_close(reopened.encode_image(IMAGES), model.encode_image(IMAGES), atol=0, rtol=0)


def test_the_export_is_the_original(model, tmp_path):
    folder = to_open_clip(model, tmp_path / "back")

    original, exported = load_file(WEIGHTS), load_file(folder / WEIGHTS.name)
    assert set(exported) == set(original)
    for name, tensor in original.items():
        torch.testing.assert_close(exported[name], tensor, atol=0, rtol=0)
    equal_to_golden(from_open_clip(folder).eval())
    before = json.loads((FOLDER / "open_clip_config.json").read_text("utf-8"))
    after = json.loads((folder / "open_clip_config.json").read_text("utf-8"))
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        for name, value in before["model_cfg"][part].items():
            assert after["model_cfg"][part].get(name, value) == value
    assert after["preprocess_cfg"] == before["preprocess_cfg"]


def test_a_converted_model_is_a_checkpoint_like_any_other(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", tokenizer=clip_tokenizer(BPE))
    reopened = CoCa.from_pretrained(tmp_path / "saved").eval()

    equal_to_golden(reopened)
    assert reopened.preprocessing.mean == (0.5, 0.4, 0.3)
    assert load_tokenizer(tmp_path / "saved").encode("a dog") == clip_tokenizer(BPE).encode("a dog")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("more", [1, 2, 6])
def test_padding_does_not_change_an_embedding_of_sequential_blocks(make_folder, legacy, more):
    model = from_open_clip(make_folder(lambda config: config["text_cfg"].update(correct_cls_mask=not legacy))).eval()
    short = TEXT[:1, :5]

    expected = model.encode_text(short)

    padded = torch.nn.functional.pad(short, (0, more))
    torch.testing.assert_close(model.encode_text(padded), expected, atol=1e-6, rtol=0)
    mask = torch.arange(5 + more).flip(0) < 5  # real tokens on the right
    left = torch.cat((torch.zeros(1, more, dtype=torch.long), short), dim=1)
    torch.testing.assert_close(model.encode_text(left, mask=mask[None]), expected, atol=1e-6, rtol=0)


def test_captions_with_prefixes_of_different_lengths_equal_each_alone(model):
    prefixes = [torch.tensor([38]), torch.tensor([38, 7, 9, 2]), torch.tensor([38, 5])]

    together = model.generate(IMAGES, prefix=prefixes, max_new_tokens=6)

    for row, prefix in enumerate(prefixes):
        alone = model.generate(IMAGES[row : row + 1], prefix=prefix, max_new_tokens=6)[0]
        length = min(len(alone), together.shape[1])
        assert together[row, :length].tolist() == alone[:length].tolist()


def test_every_parameter_learns_and_recomputation_changes_no_gradient(make_folder):
    folder = make_folder()
    models = [from_open_clip(folder).train() for _ in range(2)]
    models[1].gradient_checkpointing = models[1].img_encoder.encoder.gradient_checkpointing = True
    for model in models:
        model.loss(TEXT, IMAGES).total.backward()

    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert first.grad is not None, name
        assert first.grad.abs().sum() > 0, name
        torch.testing.assert_close(second.grad, first.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.plain
def test_lora_trains_either_tower(make_folder):
    peft = pytest.importorskip("peft")
    for target, other in ((r"img_encoder.*to_qkv", "unimodal"), (r"unimodal_layers.*to_qkv", "img_encoder")):
        model = from_open_clip(FOLDER)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target, init_lora_weights="gaussian"))
        tuned.get_base_model().loss(TEXT, IMAGES).total.backward()
        grads = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
        assert grads
        assert all("lora" in name and other not in name for name in grads)


def test_quick_gelu_is_its_formula():
    from coca.model.sequential_block import QuickGELU

    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    expected = [float(value) / (1 + 2.718281828459045 ** (-1.702 * float(value))) for value in x]
    torch.testing.assert_close(QuickGELU()(x), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_tokens_equal_open_clips():
    tokenizer = clip_tokenizer(BPE)

    for caption, ids in GOLDEN["tokens"].items():
        assert tokenizer.encode(caption) == ids, caption
        assert tokenizer.decode(ids) == GOLDEN["decoded"][caption].rstrip(" ")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)


def test_a_tokenizer_of_vocabulary_and_merges_is_the_same(tmp_path):
    tokenizer = clip_tokenizer(BPE)
    vocabulary = tokenizer.tokenizer.get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    merges = gzip.decompress((BPE / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    (tmp_path / "merges.txt").write_bytes(merges)

    other = clip_tokenizer(tmp_path)

    for caption, ids in GOLDEN["tokens"].items():
        assert other.encode(caption) == ids
    assert clip_tokenizer(WEIGHTS.parent.parent) is None


# --------------------------------------------------------------------------------------------------------- bad input


def change(part, **values):
    return lambda config: config[part].update(values) if part else config.update(values)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda config: config.pop("multimodal_cfg"), "must configure a CoCa of open_clip.*multimodal_cfg, got"),
        (lambda config: config.update(text_cfg=[1]), "text_cfg must be an object, got list"),
        (change("vision_cfg", attentional_pool=False), "attentional_pool and text_cfg.embed_cls must be true"),
        (change("vision_cfg", attentional_pool="parallel"), "attentional_pool.*got 'parallel'"),
        (change("text_cfg", embed_cls=False), "embed_cls must be true"),
        (change("text_cfg", hf_model_name="roberta-base"), "text_cfg has settings.*hf_model_name = 'roberta-base'"),
        (change("vision_cfg", timm_model_name="vit_base"), "vision_cfg has settings.*timm_model_name = 'vit_base'"),
        (change("vision_cfg", ls_init_value=0.1), "ls_init_value = 0.1"),
        (change("vision_cfg", pool_type="avg"), "pool_type = 'avg'"),
        (change("multimodal_cfg", width=32), "must have one width, got 16, 32"),
        (change("multimodal_cfg", heads=2), "must have one heads, got 4, 2"),
        (change("", embed_dim=8), "text_cfg.width must be embed_dim = 8"),
        (change("", embed_dim=None), "model_cfg.embed_dim must be a number above 0, got None"),
        (change("", embed_dim="16"), "model_cfg.embed_dim must be a number above 0, got '16'"),
        (change("vision_cfg", width=True), "vision_cfg.width must be a number above 0, got True"),
        (change("vision_cfg", layers=0), "vision_cfg.layers must be a number above 0, got 0"),
        (change("vision_cfg", layers=10**9), "vision_cfg.layers must be a number above 0, got 1000000000"),
        (change("vision_cfg", image_size=[16, 32]), "vision_cfg.image_size must be a number above 0"),
        (change("vision_cfg", image_size=17), "patch_size must divide image_size = 17, got 8"),
        (change("vision_cfg", mlp_ratio=3.5), "vision_cfg.mlp_ratio must be a whole number, got 3.5"),
        (change("vision_cfg", width=40), "img_encoder.encoder"),
        (change("text_cfg", layers=3), "unimodal_layers.2"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(make_folder, changed, message):
    with pytest.raises(ValueError, match=message):
        from_open_clip(make_folder(changed))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(self.path),)

    def __init__(self, path):
        self.path = str(path)


@pytest.mark.plain
def test_a_pickle_in_a_bin_is_refused_and_not_run(make_folder, tmp_path):
    folder = make_folder(weights={"state_dict": {"text.cls_emb": Bomb(tmp_path / "ran")}})

    with pytest.raises(ValueError, match=r"open_clip_pytorch_model.bin.*(more than tensors|cannot read safely)"):
        from_open_clip(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": torch.zeros(2)}, "weights must be of open_clip's CoCa, got 1 tensors without text.cls_emb"),
        ({"state_dict": {"a": 1}}, "must hold a state dict of tensors"),
        ([torch.zeros(2)], "must hold a state dict of tensors, got list"),
        ("extra", "weights must be of open_clip's CoCa, got the tensor visual.transformer.resblocks.0.lambda"),
        ("missing", "missing.*unimodal_layers.0.norm.weight"),
        ("shape", "token_emb.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(make_folder, weights, message):
    state = load_file(WEIGHTS)
    if weights == "extra":
        weights = {**state, "visual.transformer.resblocks.0.lambda": torch.zeros(2)}
    elif weights == "missing":
        weights = {name: tensor for name, tensor in state.items() if name != "text.transformer.resblocks.0.ln_1.weight"}
    elif weights == "shape":
        weights = {**state, "text.token_embedding.weight": torch.zeros(41, 16)}
    folder = make_folder(weights=weights)

    with pytest.raises(ValueError, match=message):
        from_open_clip(folder)


@pytest.mark.plain
def test_missing_files_are_named(tmp_path, make_folder):
    with pytest.raises(FileNotFoundError, match=r"source must be a folder, a weight file or .*nowhere"):
        from_open_clip(tmp_path / "nowhere")
    folder = make_folder()
    (folder / "open_clip_config.json").rename(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"must have open_clip_config.json; pass config="):
        from_open_clip(folder)
    equal_to_golden(from_open_clip(folder, config=tmp_path / "config.json").eval())
    equal_to_golden(from_open_clip(folder / WEIGHTS.name, config=tmp_path / "config.json").eval())
    (folder / WEIGHTS.name).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must have open_clip_model.safetensors or one file of weights, got none"
    ):
        from_open_clip(folder, config=tmp_path / "config.json")


@pytest.mark.plain
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("interpolation", "bilinear", "preprocess_cfg.interpolation must be 'bicubic', got 'bilinear'; pass preproc"),
        ("resize_mode", "squash", "preprocess_cfg.resize_mode must be 'shortest', got 'squash'"),
        ("mean", ["a"], "preprocess_cfg is no image preprocessing"),
        ("std", [0.0, 1.0, 1.0], "std must be positive"),
    ],
)
def test_another_preprocessing_is_refused_by_name(make_folder, name, value, message):
    folder = make_folder()
    content = json.loads((folder / "open_clip_config.json").read_text("utf-8"))
    content["preprocess_cfg"][name] = value
    (folder / "open_clip_config.json").write_text(json.dumps(content), "utf-8")

    with pytest.raises(ValueError, match=message):
        from_open_clip(folder)


@pytest.mark.plain
def test_arguments_of_sequential_blocks_are_checked(model):
    sizes = {"dim": 16, "num_tokens": 23, "unimodal_depth": 1, "multimodal_depth": 1, "dim_head": 8, "heads": 2}
    with pytest.raises(ValueError, match=r"max_text_length must be given for sequential blocks.*, got None"):
        CoCa(**sizes, block="sequential")
    with pytest.raises(ValueError, match=r"max_text_length must be given for sequential blocks.*, got 8"):
        CoCa(**sizes, max_text_length=8)
    with pytest.raises(ValueError, match="max_text_length must be at least 1, got 0"):
        CoCa(**sizes, block="sequential", max_text_length=0)
    with pytest.raises(ValueError, match="pool_heads must divide dim = 16, got 3"):
        CoCa(**sizes, block="sequential", max_text_length=8, pool_heads=3)
    with pytest.raises(ValueError, match="patch_size must divide image_size = 16, got 5"):
        CLIPVisionTransformer(image_size=16, patch_size=5, dim=8, depth=1, heads=1)
    with pytest.raises(ValueError, match=r"text must have at most max_text_length = 12 tokens a row, got 13"):
        model.encode_text(torch.ones(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="exceed the model's limit of 12"):
        model.generate(IMAGES, max_new_tokens=12)


@pytest.mark.plain
def test_only_models_of_its_layers_are_exported_to_open_clip(make_coca, tmp_path):
    with pytest.raises(ValueError, match="block='sequential' and a CLIPVisionTransformer, got block='parallel'"):
        to_open_clip(make_coca(vit=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.plain
def test_the_command_converts_there_and_back(tmp_path, capsys):
    from coca.cli import main

    assert main(["convert", str(FOLDER), str(tmp_path / "ours")]) == 0
    assert "no tokenizer was found" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    equal_to_golden(from_open_clip(tmp_path / "theirs").eval())
    assert main(["convert", str(FOLDER), str(tmp_path / "no"), "--tokenizer", str(BPE.parent)]) == 1
    capsys.readouterr()
    shutil.copytree(FOLDER, tmp_path / "mixed")
    shutil.copy(BPE / "bpe_simple_vocab_16e6.txt.gz", tmp_path / "mixed")
    assert main(["convert", str(tmp_path / "mixed"), str(tmp_path / "no")]) == 1
    assert "model must have num_tokens >= 1114" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "no")]) == 1
    assert "source must be a folder, a weight file or organisation/name" in capsys.readouterr().err
