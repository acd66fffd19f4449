"""The command: a small quickstart, every command on its model, and one-line errors."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from coca import CoCa, ImagePreprocessing, VisionTransformer
from coca.cli import main
from coca.data.digits import CLASS_NAMES, handwritten_digits
from coca.data.image_files import load_images
from coca.interop import from_coca_pytorch

pytestmark = pytest.mark.plain

TRAIN = ["train", "--preset", "quickstart", "--device", "cpu", "--max_steps", "3", "--batch_size", "8", "--dim", "16"]
TRAIN += ["--vit_dim", "16", "--dim_head", "8", "--heads", "2", "--validate_every", "3", "--validation_captions", "2"]
TRAIN += ["--max_length", "12"]
ON_FILES = [*TRAIN, "--image_size", "8", "--channels", "1"]


@pytest.fixture
def printed(capsys):
    """Runs a command that succeeds; returns its output."""

    def run_command(*words):
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run_command


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """Forty digits as a user's own data: image files and a table."""
    folder = tmp_path_factory.mktemp("digits")
    data = handwritten_digits().select(range(40))
    rows = ["image,caption,label"]
    for number in range(len(data)):
        Image.fromarray(data.read(number)[0]).save(folder / f"{number}.png")
        name = CLASS_NAMES[data.labels[number]]
        rows.append(f"{number}.png,the digit {name},{name}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, digit_files):
    """A run on those files, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("run")
    source = folder / "images"
    shutil.copytree(digit_files, source)
    (source / "7.png").write_bytes(b"damaged")
    assert main([*ON_FILES, "--data", str(source), "--checkpoint_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_the_quickstart_trains_on_the_digits(printed, tmp_path):
    out = printed(*TRAIN, "--checkpoint_dir", tmp_path / "run")

    assert "digits: 1,438 images for training, 359 held out" in out
    assert "zero_shot_accuracy" in out
    assert (tmp_path / "run" / "grid.png").is_file()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["steps"] == 3
    names = [result["name"] for result in summary["results"]]
    assert names[:2] == ["zero-shot accuracy, held-out digits", "captions that name the class, held-out digits"]
    assert all({"before", "after"} <= result.keys() for result in summary["results"])
    assert "already complete" in printed(*TRAIN, "--checkpoint_dir", tmp_path / "run")


def test_a_run_names_and_counts_unreadable_images(run):
    record = json.loads((run / "run.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]

    assert [name.split(":")[0] for name in record["settings"]["unreadable_images"]] == ["7.png"]
    assert record["settings"]["images"] + record["settings"]["validation_images"] == 39
    assert rows[-1]["unreadable_images"] == 1


def test_captions_are_printed_for_files_and_folders(printed, run, digit_files):
    paths = [str(digit_files / "3.png"), str(digit_files / "4.png")]
    few = printed("caption", run, *paths, "--max_new_tokens", 6, "--prefix", "the").splitlines()
    many = printed("caption", run, digit_files, "--beams", 2, "--max_new_tokens", 3).splitlines()

    assert [line.split("\t")[0] for line in few] == paths
    assert all(line.split("\t")[1].startswith("the") for line in few)
    assert len(many) == 40


def test_images_too_large_to_open_are_unreadable(run, digit_files, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)

    assert main(["caption", str(run), str(digit_files)]) == 1
    assert "none of 40 images could be read" in capsys.readouterr().err


def test_an_unreadable_file_is_named_and_the_others_are_captioned(run, digit_files, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"damaged")
    status = main(["caption", str(run), str(digit_files / "3.png"), str(tmp_path / "bad.png")])
    captured = capsys.readouterr()

    assert status == 1
    assert len(captured.out.splitlines()) == 1
    assert "bad.png" in captured.err
    assert "unreadable  1 of 2 images" in captured.err


def test_latents_are_written(printed, run, digit_files, tmp_path):
    paths = [str(digit_files / f"{number}.png") for number in range(3)]
    printed("embed", run, tmp_path / "images.npz", "--images", *paths)
    printed("embed", run, tmp_path / "texts.npz", "--texts", "the digit one", "two")

    images, texts = np.load(tmp_path / "images.npz"), np.load(tmp_path / "texts.npz")
    assert images["names"].tolist() == paths
    np.testing.assert_allclose(np.linalg.norm(images["latents"], axis=1), 1, rtol=1e-5)
    checkpoint = run / "checkpoints" / "step-3"
    model = CoCa.from_pretrained(checkpoint).eval()
    pixels = load_images(digit_files, model.preprocessing).read(0)
    expected = model.encode_image(model.preprocessing.normalised(pixels[None])).detach().numpy()
    np.testing.assert_allclose(images["latents"][:1], expected, atol=1e-5)
    assert texts["latents"].shape == (2, 16)


def test_classes_and_neighbours_are_printed(printed, run, digit_files):
    classes = printed("zero-shot", run, digit_files / "3.png", "--classes", "one", "two", "--top", 2)
    neighbours = printed("retrieve", run, digit_files, "--text", "the digit one", "--top", 3).splitlines()

    probabilities = {entry.split()[0]: float(entry.split()[1]) for entry in classes.strip().split("\t")[1:]}
    assert probabilities.keys() == {"one", "two"}
    assert sum(probabilities.values()) == pytest.approx(1, abs=2e-3)
    assert neighbours[0] == "the digit one"
    assert len(neighbours) == 4
    assert "zero_shot_accuracy" in printed("retrieve", run, digit_files, "--captions")


def test_training_takes_a_frozen_hugging_face_encoder(printed, digit_files, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    preparation = {"size": {"height": 16, "width": 16}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(preparation), "utf-8")
    source = ["--data", digit_files, "--checkpoint_dir", tmp_path / "run"]
    printed(*TRAIN, *source, "--encoder", tmp_path / "vit", "--freeze_encoder")

    before = transformers.ViTModel.from_pretrained(tmp_path / "vit").state_dict()
    model = CoCa.from_pretrained(tmp_path / "run" / "checkpoints" / "step-3")
    for name, value in model.img_encoder.encoder.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.preprocessing == ImagePreprocessing(image_size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))


def test_training_takes_a_tokenizer_whose_eos_is_its_padding(printed, digit_files, tmp_path):
    """As GPT-2's: one special token as BOS, EOS and padding."""
    import tokenizers
    import transformers

    words = sorted({word for captions in handwritten_digits().captions for text in captions for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<end>", *words])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<end>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>", bos_token="<end>")
    own.save_pretrained(tmp_path / "words")
    places = ["--tokenizer", tmp_path / "words", "--checkpoint_dir", tmp_path / "run"]
    printed(*ON_FILES, "--data", digit_files, *places)

    model = CoCa.from_pretrained(tmp_path / "run" / "checkpoints" / "step-3")
    assert (model.pad_id, model.bos_id, model.eos_id, model.num_tokens) == (0, 0, 0, len(vocabulary))
    caption = printed("caption", tmp_path / "run", digit_files / "3.png", "--max_new_tokens", 4).partition("\t")[2]
    assert set(caption.split()) <= set(words)


@pytest.mark.archives
def test_an_originals_file_is_converted(printed, tmp_path):
    golden = json.loads((Path(__file__).parent / "golden" / "original.json").read_text("utf-8"))
    state = {name: torch.randn(shape) for name, shape in golden["shapes"].items() if "inv_freq" not in name}
    torch.save({"state_dict": state}, tmp_path / "old.pt")
    printed("convert", tmp_path / "old.pt", tmp_path / "new", "--eos_id", 2)

    expected, converted = from_coca_pytorch(state), CoCa.from_pretrained(tmp_path / "new")
    assert converted.eos_id == 2
    for name, value in expected.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--data", "nowhere"], "there is no nowhere"),
        (["train", "--batch_size", "2000"], "batch_size must be at most the number of images, 1438, got 2000"),
        (["train", "--image_size", "9"], "the digits have image_size 8 and channels 1, got 9 and 1"),
        (["train", "--tokenizer", "nowhere"], 'source must be "bytes"'),
        (["caption", "nowhere", "a.png"], "model must be a folder with a model"),
        (["convert", "nowhere.pt", "new"], "there is no file nowhere.pt"),
        (["train", "--model", "nowhere"], "model must be a folder with a model"),
        (["embed", "nowhere", "x.npz"], "pass either images or texts"),
        (["retrieve", "nowhere", "a.png"], "pass either text"),
    ],
)
def test_wrong_input_is_one_line_and_status_1(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"coca {argv[0]}: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_held_out_if_given(printed, run, digit_files, tmp_path):
    sources = ["--data", digit_files, "--validation_data", run.parent / "images"]

    assert "40 images for training, 39 held out" in printed(*ON_FILES, *sources, "--checkpoint_dir", tmp_path / "run")


def settings_of(argv, capsys):
    """The run that ``coca train`` would start."""
    with pytest.raises(SystemExit) as exit_:
        main(["train", *argv, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


# Widths, depths and the learning rate of a preset: arXiv 2205.01917, table 1 and section 4.1.
PAPER = {
    "base": {"dim": 768, "heads": 12, "unimodal_depth": 6, "multimodal_depth": 6, "vit_depth": 12, "vit_dim": 768},
    "large": {"dim": 1024, "heads": 16, "unimodal_depth": 12, "multimodal_depth": 12, "vit_depth": 24, "vit_dim": 1024},
    "2b": {"dim": 1408, "heads": 16, "unimodal_depth": 18, "multimodal_depth": 18, "vit_depth": 40, "vit_dim": 1408},
}


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_the_papers_sizes_and_learning_rate(name, capsys):
    settings = settings_of(["--data", "photos", "--preset", name], capsys)

    optimizer = {"learning_rate": 8e-4, "warmup": 0.02, "weight_decay": 0.01, "image_size": 288, "patch_size": 18}
    assert {**settings, **PAPER[name], **optimizer, "caption_loss_weight": 2.0} == settings
    assert settings["dim"] == settings["heads"] * settings["dim_head"]
    assert settings["image_size"] // settings["patch_size"] == 16  # 256 tokens


def test_the_quickstarts_settings_are_those_of_a_run_without_data_alone(capsys):
    quickstart, own = settings_of([], capsys), settings_of(["--data", "photos"], capsys)

    assert (quickstart["preset"], quickstart["dim"], quickstart["learning_rate"]) == ("quickstart", 64, 3e-3)
    assert (own["preset"], own["dim"], own["vit_dim"], own["learning_rate"]) == ("small", 512, 384, 5e-4)
    assert own["checkpoint_dir"] != quickstart["checkpoint_dir"]
    assert own["shift"] == 0
    # a flag wins, and a pretrained encoder keeps its own image size
    assert settings_of(["--data", "photos", "--preset", "base", "--dim", "12"], capsys)["dim"] == 12
    assert settings_of(["--data", "photos", "--preset", "base", "--encoder", "vit"], capsys)["image_size"] == 0


def test_a_run_starts_from_a_model_with_its_sizes_and_weights(printed, run, digit_files, tmp_path, capsys):
    source = ["--model", run, "--data", digit_files, "--device", "cpu", "--batch_size", "8", "--checkpoint_dir"]
    settings = settings_of(list(map(str, [*source, tmp_path / "next"])), capsys)
    assert (settings["dim"], settings["heads"], settings["image_size"], settings["learning_rate"]) == (16, 2, 8, 1e-5)
    # not the folder of the run that it starts from, which would be resumed
    assert settings_of(["--model", str(run)], capsys)["checkpoint_dir"] == "runs/coca-tuned"

    out = printed("train", *source, tmp_path / "next", "--max_steps", "1", "--warmup", "0", "--learning_rate", "1e-9")

    assert f"from {run / 'checkpoints' / 'step-3'}" in out
    before = CoCa.from_pretrained(run / "checkpoints" / "step-3")
    after = CoCa.from_pretrained(tmp_path / "next" / "checkpoints" / "step-1")
    assert after.preprocessing == before.preprocessing
    assert after.caption_loss_weight == before.caption_loss_weight == 2.0
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dim", "32"], "dim must be that of the model in .*, 16, got 32"),
        (["--image_size", "16"], "image_size must be that of the model in .*, 8, got 16"),
        (["--encoder", "vit"], "encoder must be that of the model in"),
        (["--preset", "base"], "preset must be left out for a run that starts from a model, got base"),
    ],
)
def test_a_run_that_starts_from_a_model_does_not_change_its_sizes(flags, message, run, digit_files, tmp_path, capsys):
    source = ["--model", str(run), "--data", str(digit_files), "--checkpoint_dir", str(tmp_path / "next")]

    assert main(["train", *source, *flags]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_captions_are_sampled_with_all_filters(printed, run, digit_files, tmp_path):
    (tmp_path / "prefix.txt").write_text("the", "utf-8")
    command = ["caption", run, digit_files / "3.png", digit_files / "4.png", "--num_samples", 3, "--max_new_tokens", 5]
    command += ["--temperature", 0.9, "--top_k", 50, "--top_p", 0.9, "--min_p", 0.01, "--repetition_penalty", 1.1]
    command += ["--prefix", f"@{tmp_path / 'prefix.txt'}", "--seed", 3]

    lines = printed(*command).splitlines()

    assert [line.split("\t")[0][-5:] for line in lines] == ["3.png"] * 3 + ["4.png"] * 3
    assert all(line.split("\t")[1].startswith("the") for line in lines)
    assert printed(*command).splitlines() == lines
    assert main(["caption", str(run), str(digit_files / "3.png"), "--num_samples", "2"]) == 1


def test_images_are_encoded_once_for_all_their_captions(printed, run, digit_files, monkeypatch):
    rows = []
    forward = VisionTransformer.forward
    monkeypatch.setattr(VisionTransformer, "forward", lambda self, x: rows.append(len(x)) or forward(self, x))

    printed("caption", run, digit_files / "3.png", digit_files / "4.png", "--num_samples", 5, "--temperature", 1)

    assert rows == [2]
