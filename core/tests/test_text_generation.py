import io

import pytest
import torch
from torch import nn

from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.cli.text_generation import TextGeneration, open_prompt, print_continuations
from lm_core.generation.sampling import filters_of, min_p, top_k, top_p
from lm_core.tokenizers import ByteTokenizer


class Successor(PretrainedMixin, nn.Module):
    """Predicts the next letter of the alphabet, and EOS after z."""

    def __init__(self, *, num_tokens: int = 259) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.num_tokens = num_tokens

    def forward(self, ids):
        after = torch.where(ids == ord("z"), ByteTokenizer().eos_id, ids + 1)
        return self.scale * nn.functional.one_hot(after, self.num_tokens).float()


@pytest.fixture
def folder(tmp_path):
    Successor().save_pretrained(tmp_path / "model", tokenizer=ByteTokenizer())
    return str(tmp_path / "model")


def test_each_continuation_is_printed_after_its_prompt_and_ends_with_the_document(folder, capsys):
    print_continuations(folder, "ab", TextGeneration(max_new_tokens=3, num_samples=2), loader=Successor.from_pretrained)
    assert capsys.readouterr().out == "--- 1 of 2\nabcde\n--- 2 of 2\nabcde\n"
    print_continuations(folder, "wx", TextGeneration(max_new_tokens=9), loader=Successor.from_pretrained)
    assert capsys.readouterr().out == "wxyz\n"


@pytest.mark.parametrize("prompt", ["ab", "-", "@FILE"])
def test_a_prompt_is_a_text_or_standard_input_or_a_file(folder, prompt, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    (tmp_path / "prompt.txt").write_text("ab")
    opened = open_prompt(folder, prompt.replace("FILE", str(tmp_path / "prompt.txt")), loader=Successor.from_pretrained)
    assert (opened.text, opened.ids.tolist()) == ("ab", [97, 98])
    assert not opened.model.training


@pytest.mark.plain
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"top_k": "many"}, TypeError, "top_k"),
    ],
)
def test_settings_out_of_range_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        TextGeneration(**settings)


@pytest.mark.plain
def test_an_empty_prompt_is_refused(folder):
    with pytest.raises(ValueError, match="prompt must hold at least one token, got ''"):
        open_prompt(folder, "", loader=Successor.from_pretrained)


def test_filters_are_made_of_the_numbers_that_are_given():
    logits = torch.randn(3, 40)
    assert filters_of() == []
    first, second, third = filters_of(min_p=0.1, top_k=5, top_p=0.8)
    assert torch.equal(first(logits), top_k(logits, k=5))
    assert torch.equal(second(logits), top_p(logits, p=0.8))
    assert torch.equal(third(logits), min_p(logits, min_p=0.1))
    assert len(filters_of(top_p=0.0)) == 1
