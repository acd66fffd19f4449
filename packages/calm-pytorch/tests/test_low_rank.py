"""LoRA is W + B A on every linear layer that is not left out, begins as the model, and trains nothing else."""

import pytest
import torch

from calm_pytorch.quickstart.low_rank import add_low_rank_, rank_for


def test_it_begins_as_the_model_and_is_the_sum_of_both_products(model_of, ids):
    model = model_of("x-transformers").double()
    expected = model(ids(2, 5))
    weight = model.attn_layers.layers[0][1].to_q.weight.detach().clone()
    added = add_low_rank_(model, rank=3, leave=("to_logits",))
    assert torch.allclose(model(ids(2, 5)), expected, atol=1e-12)
    with torch.no_grad():
        for parameter in added:
            parameter.copy_(torch.randn_like(parameter))
    layer = model.attn_layers.layers[0][1].to_q
    product = layer.parametrizations.weight[0]
    x = torch.randn(4, 32, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ weight.T + (x @ product.A.T) @ product.B.T, atol=1e-12)
    assert not hasattr(model.to_logits, "parametrizations")


def test_only_the_products_learn(model_of, ids, snapshot):
    model = model_of("llama")
    before = snapshot(model)
    added = add_low_rank_(model, rank=2, leave=("lm_head",))
    assert {id(p) for p in added} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(added, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids(2, 5)).logits.logsumexp(dim=-1).sum().backward()
        optimizer.step()
    after = {name.replace("parametrizations.weight.original", "weight"): t for name, t in snapshot(model).items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_rank_gives_about_as_many_parameters(model_of):
    for wanted in (2_000, 20_000):
        model = model_of("x-transformers")
        added = add_low_rank_(model, rank=rank_for(model, wanted))
        one_rank_more = sum(sum(p.shape) for p in model.parameters() if p.ndim == 2)
        assert abs(sum(p.numel() for p in added) - wanted) <= one_rank_more


@pytest.mark.plain
def test_a_rank_below_one_and_a_model_without_linear_layers_are_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_low_rank_(torch.nn.Linear(2, 2), rank=0)
    with pytest.raises(ValueError, match="model must have a linear layer, got Embedding"):
        add_low_rank_(torch.nn.Embedding(2, 2), rank=1)
