"""LoRA scopes: what they add, what they leave alone, and how they come and go."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from palm_rlhf import LoRA, PaLM
from palm_rlhf.model.lora import target_weights

SIZES = {"dim": 16, "num_tokens": 30, "depth": 2, "heads": 4, "dim_head": 6, "ff_mult": 2, "lora_r": 3}
ALL_TARGETS = ("q", "k", "v", "o", "ff_in", "ff_out")
VARIANTS = [{}, {"kv_heads": 2}, {"qk_rmsnorm": True}, {"causal": False}, {"use_xpos": False}]


def trained(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture
def palm():
    return trained(PaLM(**SIZES)).eval()


@pytest.fixture
def ids():
    return torch.randint(0, SIZES["num_tokens"], (2, 11), generator=torch.Generator().manual_seed(2))


def add_scope(palm, scope="actor", **changes):
    palm.add_finetune_params(scope, **{"lora_targets": ALL_TARGETS, "lora_alpha": 2.0, **changes})
    trained(palm.finetune_modules[scope])


# ------------------------------------------------------------------ what a scope computes


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_scope_changes_nothing(ids, variant):
    palm = trained(PaLM(**SIZES, **variant)).eval()
    expected = palm(ids)
    palm.add_finetune_params("actor", lora_targets=ALL_TARGETS)
    assert torch.equal(palm(ids), expected)
    assert torch.equal(palm(ids, finetune_scope="actor"), expected)


@torch.no_grad()
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    variant=st.sampled_from(VARIANTS),
    targets=st.lists(st.sampled_from(ALL_TARGETS), min_size=1, unique=True),
    rank=st.integers(1, 9),
    alpha=st.sampled_from([None, 0.5, 4.0]),
    rank_stabilized=st.booleans(),
)
def test_merging_equals_the_forward_with_the_scope(variant, targets, rank, alpha, rank_stabilized):
    palm = trained(PaLM(**SIZES, **variant)).eval()
    ids = torch.arange(12).reshape(2, 6)
    add_scope(palm, lora_r=rank, lora_alpha=alpha, lora_rank_stabilized=rank_stabilized, lora_targets=targets)
    expected = palm(ids, finetune_scope="actor")
    assert not torch.equal(expected, palm(ids))
    palm.double().merge_finetune_params("actor")
    torch.testing.assert_close(palm(ids).float(), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_scale_is_alpha_over_the_rank_or_its_root():
    x = torch.randn(5, 8)
    for rank_stabilized, scale in ((False, 6.0 / 4.0), (True, 6.0 / 2.0)):
        lora = trained(LoRA(8, 3, r=4, alpha=6.0, rank_stabilized=rank_stabilized))
        torch.testing.assert_close(lora(x), scale * (x @ lora.A.t() @ lora.B.t()), atol=1e-5, rtol=0)
        torch.testing.assert_close(lora.delta(), scale * (lora.B @ lora.A), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_disabled_scope_is_the_base(palm, ids):
    expected = palm(ids)
    add_scope(palm)
    assert not torch.equal(palm(ids, finetune_scope="actor"), expected)
    assert torch.equal(palm(ids, finetune_scope="actor", disable_lora=True), expected)
    assert torch.equal(palm(ids), expected)


@torch.no_grad()
def test_scopes_are_independent_of_each_other(palm, ids):
    add_scope(palm, "actor")
    actor = palm(ids, finetune_scope="actor")
    add_scope(palm, "critic", lora_r=5, lora_targets=("q", "ff_in"))
    palm.finetune_modules["critic"][0]["q"].B.mul_(3)
    critic = palm(ids, finetune_scope="critic")
    assert not torch.allclose(actor, critic, atol=1e-2)
    assert torch.equal(palm(ids, finetune_scope="actor"), actor)
    palm.remove_finetune_params("actor")
    assert torch.equal(palm(ids, finetune_scope="critic"), critic)


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_scope_takes_a_gradient(ids, variant):
    palm = trained(PaLM(**SIZES, **variant))
    add_scope(palm, "actor")
    add_scope(palm, "critic")
    palm(ids, finetune_scope="actor").logsumexp(-1).sum().backward()
    assert all(parameter.grad is None for parameter in palm.palm_parameters())
    assert all(parameter.grad is None for parameter in palm.finetune_parameters("critic"))
    assert all(parameter.grad.abs().sum() > 0 for parameter in palm.finetune_parameters("actor"))


def test_only_the_scope_takes_a_gradient_from_the_loss_and_with_checkpointing(ids):
    for checkpointing in (False, True):
        palm = trained(PaLM(**SIZES, gradient_checkpointing=checkpointing)).train()
        add_scope(palm)
        palm(ids, return_loss=True, finetune_scope="actor").backward()
        assert all(parameter.grad is None for parameter in palm.palm_parameters())
        assert all(parameter.grad.abs().sum() > 0 for parameter in palm.finetune_parameters("actor"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_both_factors_equal_those_through_merged_weights(ids, variant):
    palm = trained(PaLM(**SIZES, **variant)).double().eval()
    add_scope(palm)
    weights = torch.randn(2, 11, SIZES["num_tokens"], dtype=torch.float64)
    (palm(ids, finetune_scope="actor") * weights).sum().backward()

    leaves, merged = {}, {}
    for layer, (block, adapters) in enumerate(zip(palm.layers, palm.finetune_modules["actor"], strict=True)):
        parts = {}
        for target, weight in target_weights(block).items():
            a, b = (getattr(adapters[target], name).detach().clone().requires_grad_() for name in "AB")
            leaves[layer, target] = (a, b)
            parts[target] = weight + 2.0 / 3.0 * (b @ a)
        merged[f"layers.{layer}.proj_in.weight"] = torch.cat([parts[name] for name in ("q", "k", "v", "ff_in")])
        merged[f"layers.{layer}.proj_out.weight"] = torch.cat([parts["o"], parts["ff_out"]], dim=1)
    (functional_call(palm, merged, (ids,)) * weights).sum().backward()

    for (layer, target), (a, b) in leaves.items():
        adapter = palm.finetune_modules["actor"][layer][target]
        torch.testing.assert_close(adapter.A.grad, a.grad, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(adapter.B.grad, b.grad, atol=1e-9, rtol=1e-9)


def test_training_without_a_scope_leaves_scopes_without_gradient(palm, ids):
    add_scope(palm)
    palm(ids, return_loss=True).backward()
    assert all(parameter.grad is None for parameter in palm.finetune_parameters("actor"))
    assert all(parameter.grad is not None for parameter in palm.palm_parameters())


# ------------------------------------------------------------------ merging, removing


@torch.no_grad()
def test_a_merged_scope_cannot_be_forwarded_and_unmerging_restores_it(palm, ids):
    add_scope(palm)
    base, scoped = palm(ids), palm(ids, finetune_scope="actor")
    modules = palm.scope_modules("actor")
    merged = palm.merge_finetune_params("actor")
    torch.testing.assert_close(palm(ids), scoped, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="finetune scope 'actor' not found"):
        palm(ids, finetune_scope="actor")
    palm.unmerge_finetune_params(merged)
    assert palm.scope_modules("actor") is modules
    torch.testing.assert_close(palm(ids), base, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(palm(ids, finetune_scope="actor"), scoped, atol=1e-5, rtol=1e-5)


@pytest.mark.plain
def test_unmerging_does_not_overwrite_a_scope_of_the_same_name(palm, ids):
    add_scope(palm)
    merged = palm.merge_finetune_params("actor")
    palm.add_finetune_params("actor")
    before = palm(ids)
    with pytest.raises(ValueError, match="finetune scope 'actor' exists already"):
        palm.unmerge_finetune_params(merged)
    assert torch.equal(palm(ids), before)


def test_merging_keeps_the_base_parameters_themselves(palm):
    add_scope(palm)
    parameters = palm.palm_parameters()
    strides = [parameter.stride() for parameter in parameters]
    palm.merge_finetune_params("actor")
    assert all(new is old for new, old in zip(palm.palm_parameters(), parameters, strict=True))
    assert [parameter.stride() for parameter in palm.palm_parameters()] == strides
    assert all(parameter.requires_grad for parameter in parameters)


def test_removing_returns_the_modules(palm, ids):
    add_scope(palm)
    modules = palm.scope_modules("actor")
    expected = palm(ids)
    assert palm.remove_finetune_params("actor") is modules
    assert "actor" not in palm.finetune_modules
    assert torch.equal(palm(ids), expected)


# ------------------------------------------------------------------ parameters and keys


def test_finetune_parameters_are_those_of_the_default_scope_unless_named(palm):
    add_scope(palm, "default")
    add_scope(palm, "actor")
    assert [id(p) for p in palm.finetune_parameters()] == [id(p) for p in palm.finetune_modules["default"].parameters()]
    assert len(list(palm.finetune_parameters("actor"))) == 2 * len(ALL_TARGETS) * SIZES["depth"]


def test_palm_parameters_are_the_base_in_a_fixed_order():
    first, second = PaLM(**SIZES), PaLM(**SIZES, finetune_scopes=("actor", "critic"))
    names = {id(parameter): name for name, parameter in second.named_parameters()}
    assert [names[id(parameter)] for parameter in second.palm_parameters()] == list(dict(first.named_parameters()))
    shapes = [parameter.shape for parameter in first.palm_parameters()]
    assert [parameter.shape for parameter in second.palm_parameters()] == shapes


def test_state_dict_keys_name_scope_layer_target_and_factor():
    palm = PaLM(**SIZES, finetune_scopes=("actor",))
    keys = [name for name in palm.state_dict() if name.startswith("finetune_modules.")]
    expected = [
        f"finetune_modules.actor.{layer}.{target}.{factor}"
        for layer in range(2)
        for target in ("q", "k", "v", "o")
        for factor in ("A", "B")
    ]
    assert keys == expected
    shapes = {name.split(".", 3)[3]: tuple(palm.state_dict()[name].shape) for name in keys[:8]}
    assert shapes == {
        "q.A": (3, 16),
        "q.B": (24, 3),
        "k.A": (3, 16),
        "k.B": (6, 3),
        "v.A": (3, 16),
        "v.B": (6, 3),
        "o.A": (3, 24),
        "o.B": (16, 3),
    }


def test_a_scope_takes_the_dtype_of_the_model():
    palm = PaLM(**SIZES).bfloat16()
    palm.add_finetune_params("actor")
    assert {parameter.dtype for parameter in palm.finetune_parameters("actor")} == {torch.bfloat16}


@torch.no_grad()
def test_scopes_with_their_settings_survive_saving(palm, ids, tmp_path):
    add_scope(palm, "first", lora_r=2, lora_alpha=7.0, lora_dropout=0.25, lora_rank_stabilized=True)
    add_scope(palm, "second", lora_targets=("v",))
    expected = palm(ids, finetune_scope="first")
    before = torch.get_rng_state()
    again = PaLM.from_pretrained(palm.save_pretrained(tmp_path / "palm")).eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert list(again.finetune_modules) == ["first", "second"]
    for scope in again.finetune_modules:
        assert again.scope_modules(scope).settings == palm.scope_modules(scope).settings
    assert torch.equal(again(ids, finetune_scope="first"), expected)


def test_a_scope_of_the_constructor_that_was_removed_stays_removed_when_saved(tmp_path):
    palm = PaLM(**SIZES, finetune_scopes=("actor", "critic"))
    palm.remove_finetune_params("actor")
    again = PaLM.from_pretrained(palm.save_pretrained(tmp_path / "palm"))
    assert list(again.finetune_modules) == ["critic"]


# ------------------------------------------------------------------ generation, dropout


@torch.no_grad()
@pytest.mark.parametrize("variant", [{}, {"kv_heads": 2, "qk_rmsnorm": True}, {"use_xpos": False}])
def test_cached_generation_with_a_scope_equals_uncached(variant):
    palm = trained(PaLM(**SIZES, **variant)).eval()
    add_scope(palm)
    prompts = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([7, 8]), torch.tensor([9, 9, 9])]
    arguments = {"max_new_tokens": 10, "prompt": prompts, "temperature": 0.0, "finetune_scope": "actor"}
    cached = palm.generate(**arguments)
    assert torch.equal(cached, palm.generate(**arguments, use_cache=False))
    # the scope counts, though both may find the same tokens most likely
    assert not torch.allclose(palm(prompts[0][None], finetune_scope="actor"), palm(prompts[0][None]))
    palm.merge_finetune_params("actor")
    assert torch.equal(cached, palm.generate(**{**arguments, "finetune_scope": None}))


@torch.no_grad()
def test_a_cache_remembers_the_scope_it_was_filled_with(palm, ids):
    add_scope(palm)
    expected = palm(ids, finetune_scope="actor")
    cache = palm.init_cache(2, 11)
    pieces = [palm(ids[:, :6], cache=cache, finetune_scope="actor")]
    pieces += [palm(ids[:, i : i + 1], cache=cache) for i in range(6, 11)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_set_dropout_reaches_attention_and_returns_the_model(palm, ids, monkeypatch):
    seen = []
    original = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        seen.append(dropout_p)
        return original(q, k, v, attn_mask, dropout_p, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    assert palm.set_dropout(0.3) is palm
    palm.train()(ids)
    assert seen == [0.3, 0.3]
    seen.clear()
    expected = palm.eval()(ids)
    assert seen == [0.0, 0.0]
    assert torch.equal(palm.set_dropout(0.0).train()(ids), expected)


@torch.no_grad()
def test_lora_dropout_acts_in_training_only(palm, ids):
    add_scope(palm, lora_dropout=0.5)  # added in evaluation mode
    expected = palm(ids, finetune_scope="actor")
    assert torch.equal(palm(ids, finetune_scope="actor"), expected)
    assert not torch.allclose(palm.train()(ids, finetune_scope="actor"), expected, atol=1e-3)


@torch.no_grad()
def test_an_unmerged_scope_takes_the_mode_of_the_model(palm, ids):
    add_scope(palm, lora_dropout=0.5)
    expected = palm(ids, finetune_scope="actor")
    merged = palm.train().merge_finetune_params("actor")
    palm.eval().unmerge_finetune_params(merged)
    torch.testing.assert_close(palm(ids, finetune_scope="actor"), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ bad input


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"scope": "actor"}, ValueError, r"'actor' exists already; there are \['actor'\]"),
        ({"scope": ""}, ValueError, "scope must be a non-empty name without dots"),
        ({"scope": "a.b"}, ValueError, "scope must be a non-empty name without dots.*'a.b'"),
        ({"scope": "train"}, ValueError, "no attribute of modules, got 'train'"),
        ({"scope": "new", "lora_r": 0}, ValueError, "lora_r must be at least 1, got 0"),
        ({"scope": "new", "lora_alpha": -1}, ValueError, "lora_alpha must be a positive number, got -1"),
        ({"scope": "new", "lora_alpha": float("nan")}, ValueError, "lora_alpha must be a positive number, got nan"),
        ({"scope": "new", "lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"scope": "new", "lora_targets": ("q", "w")}, ValueError, r"lora_targets must be distinct names.*'w'"),
        ({"scope": "new", "lora_targets": ("q", "q")}, ValueError, "lora_targets must be distinct names"),
        ({"scope": "new", "lora_targets": ()}, ValueError, "lora_targets must be distinct names"),
        ({"scope": 3}, TypeError, "scope"),
        ({"scope": "new", "lora_r": 2.5}, TypeError, "lora_r"),
    ],
)
def test_bad_scopes_are_refused_and_change_nothing(palm, arguments, error, match):
    palm.add_finetune_params("actor")
    before = list(palm.state_dict())
    with pytest.raises(error, match=match):
        palm.add_finetune_params(**arguments)
    assert list(palm.state_dict()) == before


@pytest.mark.plain
def test_an_unknown_scope_is_refused_by_every_method(palm, ids):
    palm.add_finetune_params("actor")
    calls = [
        lambda: palm(ids, finetune_scope="critic"),
        lambda: palm(ids, finetune_scope="critic", return_loss=True),
        lambda: palm.generate(max_new_tokens=2, prompt=ids, finetune_scope="critic"),
        lambda: palm.remove_finetune_params("critic"),
        lambda: palm.merge_finetune_params("critic"),
        lambda: palm.finetune_parameters("critic"),
        lambda: palm.scope_modules("critic"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"finetune scope 'critic' not found; there are \['actor'\]"):
            call()
    with pytest.raises(ValueError, match="finetune scope 'default' not found"):
        palm.finetune_parameters()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_lora_settings_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        LoRA(4, 4, **arguments)


@pytest.mark.plain
def test_dropout_out_of_range_is_refused_and_changes_nothing(palm):
    palm.set_dropout(0.2)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        palm.set_dropout(1.0)
    assert next(palm.blocks()).attention.dropout == 0.2
