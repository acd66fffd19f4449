import pytest
import torch

from lm_core.generation.generate import sample
from lm_core.generation.sampling import top_k, top_p

PROMPTS = [torch.tensor([5]), torch.tensor([1, 2, 3]), torch.tensor([7, 7])]


@pytest.fixture
def model(models):
    return models.successor(12)


def test_rows_are_filled_up_to_the_total_length_and_padded(model):
    result = sample(model, PROMPTS, 6, temperature=0.0)
    assert result.tolist() == [[6, 7, 8, 9, 10], [4, 5, 6, -1, -1], [8, 9, 10, 11, -1]]


def test_an_answer_ends_with_its_eos(model):
    result = sample(model, PROMPTS, 6, temperature=0.0, eos_id=8, pad_id=0)
    assert result.tolist() == [[6, 7, 8], [4, 5, 6], [8, 0, 0]]


def test_a_tensor_of_prompts_works_as_a_list_does(model):
    prompts = torch.tensor([[5, 6], [1, 2]])
    assert torch.equal(sample(model, prompts, 5, temperature=0.0), sample(model, list(prompts), 5, temperature=0.0))


def test_rows_may_begin_with_their_prompt_and_arguments_go_by_position_as_in_the_originals(model):
    result = sample(model, PROMPTS, 6, 1.0, top_k, {"k": 1}, 0, 8, True)
    assert result.tolist() == [[5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6], [7, 7, 8, 0, 0, 0]]


@pytest.mark.parametrize("filter_kwargs", [None, {"thres": 0.3}])
def test_the_filter_gets_its_settings(models, filter_kwargs):
    seen = []

    def spy(logits, **settings):
        seen.append(settings)
        return top_p(logits, **settings)

    sample(models.cached(7, 0), [torch.tensor([1])], 4, filter_fn=spy, filter_kwargs=filter_kwargs)
    assert seen == [filter_kwargs or {"thres": 0.9}] * 3


def test_without_a_filter_every_token_can_come(models):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[1, 2]]).expand(300, 2)
    free, cut = (
        sample(models.cached(7, 0, sharpness=0.3), prompts, 3, filter_fn=filter_fn, generator=generator)
        for filter_fn in (None, lambda logits, thres: top_k(logits, k=2))
    )
    assert len(free.unique()) == 7
    assert len(cut.unique()) == 2


@pytest.mark.plain
@pytest.mark.parametrize(
    ("prompts", "seq_len", "error", "message"),
    [
        ([], 4, ValueError, "prompt must hold at least one row, got none"),
        (PROMPTS, 3, ValueError, r"seq_len must exceed the longest prompt \(3 tokens\), got 3"),
        ([[1, 2]], 4, TypeError, "prompt must hold integer token ids, row 0 is <class 'list'>"),
        ([torch.tensor([], dtype=torch.long)], 4, ValueError, "row 0 is empty"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompts, seq_len, error, message):
    with pytest.raises(error, match=message):
        sample(model, prompts, seq_len)
