"""Inputs of people who fine-tune real checkpoints: each case of the field that went wrong, with the right value."""

import math

import pytest
import torch

from spin_trainer import SPIN, as_sft_dataset

# peft uses an attribute that newer transformers have renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


# --------------------------------------------------------------------------------------------- padding and ends


@pytest.mark.parametrize("ends", [11, (10, 11)])
def test_an_answers_end_is_scored_also_where_padding_has_the_same_id(make_model, ends):
    spin = SPIN(make_model().double(), pad_id=11, eos_id=ends, lambda_=1.0)
    by_mask = SPIN(make_model().double(), eos_id=ends, lambda_=1.0)
    # an end token inside the prompt, an answer with its end, one that was cut off
    real = torch.tensor([[1, 11, 5, 11, 11, 11], [3, 4, 6, 7, 8, 11]])
    generated = torch.tensor([[1, 11, 9, 11], [3, 4, 5, 5]])
    lengths = torch.tensor([2, 2])
    real_mask, generated_mask = real != -1, generated != -1
    real_mask[0, 4:] = False
    with torch.no_grad():
        for parameter in (*spin.trainable_parameters(), *by_mask.trainable_parameters()):
            parameter.mul_(1.5)

    found = spin.compare(generated, real, lengths)
    expected = by_mask.compare(generated, real, lengths, generated_mask, real_mask)
    torch.testing.assert_close(found.policy_real, expected.policy_real)
    torch.testing.assert_close(found.policy_generated, expected.policy_generated)
    assert found.losses.mean().item() != pytest.approx(math.log(2), abs=1e-6)


def test_padding_on_the_left_with_an_end_tokens_id_is_refused(make_model):
    ids = torch.tensor([[11, 1, 2, 11]])
    with pytest.raises(ValueError, match=r"real_seq must not begin with pad_id 11.*pass real_seq_mask and pad_id=None"):
        SPIN(make_model(), pad_id=11, eos_id=11)(ids[:, 1:], ids, torch.tensor([1]))


def test_rows_of_ids_keep_their_end_where_padding_has_the_same_id():
    rows = [(torch.tensor([1, 2, 3, 11, 11, 11]), 2), ([1, 11, 5, 11], 2), ([4, 5, 6], 1)]
    dataset = as_sft_dataset(rows, max_seq_len=8, eos_id=(10, 11), pad_id=11)

    assert [(*row.prompt, *row.response) for row in dataset] == [(1, 2, 3, 11), (1, 11, 5, 11), (4, 5, 6)]


# ----------------------------------------------------------------------------------------------------- adapters


def test_the_dropout_of_adapters_is_as_configured_and_the_models_as_asked(train, llama_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama_model(attention_dropout=0.5), config)
    layer = model.base_model.model.model.layers[0].self_attn
    seen = set()

    class Watch:
        def log(self, values, step):
            seen.add((layer.q_proj.lora_dropout["default"].p, layer.attention_dropout))

    train(model=model, trackers=[Watch()], dropout=0.1)
    assert seen == {(0.25, 0.1)}
    assert (layer.q_proj.lora_dropout["default"].p, layer.attention_dropout) == (0.25, 0.5)
