"""Inputs from the field that went wrong once, by kind, with the right outcome of each."""

import io
import sys

import pytest
import torch

from lm_core.cli.corpus import TextCorpus
from lm_core.cli.parser import preset_name
from lm_core.cli.text_generation import SamplingFlags, TextGeneration, read_prompt
from lm_core.generation.generate import generate
from lm_core.generation.sampling import filters_of


def test_a_prompt_is_read_from_the_words_a_file_or_standard_input(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("\N{BYTE ORDER MARK}Zürich\n".encode())
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert read_prompt("words") == "words"
    assert read_prompt("-") == "from a pipe"
    assert read_prompt(f"@{tmp_path / 'prompt.txt'}") == "Zürich\n"
    (tmp_path / "prompt.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match="prompt must be UTF-8 text"):
        read_prompt(f"@{tmp_path / 'prompt.txt'}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be a number in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"min_p must be a number in \[0, 1\], got -0.1"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0, got 0.0"),
    ],
)
def test_sampling_flags_are_checked_before_a_model_is_loaded(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingFlags(**values)
    with pytest.raises(ValueError, match=message):
        TextGeneration(**values)


def test_sampling_keywords_of_generate_are_the_filters_of_the_same_name():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3

    def model(ids):
        return logits.expand(*ids.shape, 50)

    def draw(**keywords):
        generator = torch.Generator().manual_seed(1)
        return generate(model, torch.zeros(8, 1, dtype=torch.long), max_new_tokens=6, generator=generator, **keywords)

    values = {"top_k": 20, "top_p": 0.8, "min_p": 0.05}
    assert torch.equal(draw(**values).tokens, draw(filters=filters_of(**values)).tokens)
    assert not torch.equal(draw(**values).tokens, draw().tokens)
    with pytest.raises(ValueError, match="top_p must be"):
        draw(top_p=2.0)


def test_held_out_text_may_come_from_its_own_source(tmp_path):
    (tmp_path / "train.txt").write_text("training text")
    (tmp_path / "held-out.txt").write_text("held out")
    _, corpus = TextCorpus(data=str(tmp_path / "train.txt"), validation_data=str(tmp_path / "held-out.txt")).load()
    assert bytes(corpus.train[0].tolist()) == b"training text"
    assert bytes(corpus.validation[0].tolist()) == b"held out"


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"preset": None, "data": "stdlib", "model": None}, "quickstart"),
        ({"preset": None, "data": "mine.txt", "model": None}, "small"),
        ({"preset": None, "data": None, "model": "runs/mine"}, "small"),
        ({"preset": "large", "data": None, "model": None}, "large"),
    ],
)
def test_toy_settings_are_for_runs_without_own_data_and_model(chosen, name):
    assert preset_name(chosen, "data", "model") == name
