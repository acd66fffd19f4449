"""LoRA scopes: what they add, what they leave alone, and how they come and go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from palm_rlhf import LoRA, PaLM
from palm_rlhf.model.lora import target_weights

SIZES = {"dim": 16, "num_tokens": 30, "depth": 2, "heads": 4, "dim_head": 6, "ff_mult": 2, "lora_r": 3}
ALL_TARGETS = ("q", "k", "v", "o", "ff_in", "ff_out")
VARIANTS = [{}, {"kv_heads": 2}, {"qk_rmsnorm": True}, {"causal": False}, {"use_xpos": False}]


@pytest.fixture(scope="session")
def palm_of(trained):
    return lambda **changes: trained(PaLM(**SIZES, **changes))


@pytest.fixture
def palm(palm_of):
    return palm_of()


@pytest.fixture
def ids():
    return torch.randint(0, SIZES["num_tokens"], (2, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def add_scope(trained):
    def add(palm, scope="actor", **changes):
        palm.add_finetune_params(scope, **{"lora_targets": ALL_TARGETS, "lora_alpha": 2.0, **changes})
        trained(palm.finetune_modules[scope])

    return add


# ------------------------------------------------------------------ what a scope computes


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_scope_changes_nothing(palm_of, ids, variant):
    palm = palm_of(**variant)
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
def test_merging_equals_the_forward_with_the_scope(palm_of, add_scope, variant, targets, rank, alpha, rank_stabilized):
    palm = palm_of(**variant)
    ids = torch.arange(12).reshape(2, 6)
    add_scope(palm, lora_r=rank, lora_alpha=alpha, lora_rank_stabilized=rank_stabilized, lora_targets=targets)
    expected = palm(ids, finetune_scope="actor")
    assert not torch.equal(expected, palm(ids))
    palm.double().merge_finetune_params("actor")
    torch.testing.assert_close(palm(ids).float(), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_scopes_are_independent_of_each_other_and_of_the_base(palm, ids, add_scope):
    base = palm(ids)
    add_scope(palm, "actor")
    actor = palm(ids, finetune_scope="actor")
    add_scope(palm, "critic", lora_r=5, lora_targets=("q", "ff_in"))
    palm.finetune_modules["critic"][0]["q"].B.mul_(3)
    critic = palm(ids, finetune_scope="critic")
    assert not torch.allclose(actor, critic, atol=1e-2)
    assert not torch.allclose(actor, base, atol=1e-2)
    assert torch.equal(palm(ids, finetune_scope="actor"), actor)
    assert torch.equal(palm(ids, finetune_scope="actor", disable_lora=True), base)
    modules = palm.scope_modules("actor")
    assert palm.remove_finetune_params("actor") is modules
    assert list(palm.finetune_modules) == ["critic"]
    assert torch.equal(palm(ids, finetune_scope="critic"), critic)
    assert torch.equal(palm(ids), base)


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("variant", [*VARIANTS, {"gradient_checkpointing": True}])
def test_only_the_scope_takes_a_gradient(palm_of, ids, add_scope, variant):
    palm = palm_of(**variant).train()
    add_scope(palm, "actor")
    add_scope(palm, "critic")
    for return_loss in (False, True) if palm.causal else (False,):
        palm.zero_grad()
        palm(ids, return_loss, finetune_scope="actor").logsumexp(-1).sum().backward()
        assert all(parameter.grad is None for parameter in palm.palm_parameters())
        assert all(parameter.grad is None for parameter in palm.finetune_parameters("critic"))
        assert all(parameter.grad.abs().sum() > 0 for parameter in palm.finetune_parameters("actor"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_both_factors_equal_those_through_merged_weights(palm_of, ids, add_scope, variant):
    palm = palm_of(**variant).double()
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


def test_training_without_a_scope_leaves_scopes_without_gradient(palm, ids, add_scope):
    add_scope(palm)
    palm(ids, return_loss=True).backward()
    assert all(parameter.grad is None for parameter in palm.finetune_parameters("actor"))
    assert all(parameter.grad is not None for parameter in palm.palm_parameters())


# ------------------------------------------------------------------ merging, removing


@torch.no_grad()
def test_a_merged_scope_cannot_be_forwarded_and_unmerging_restores_it(palm, ids, add_scope):
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
def test_unmerging_does_not_overwrite_a_scope_of_the_same_name(palm, ids, add_scope):
    add_scope(palm)
    merged = palm.merge_finetune_params("actor")
    palm.add_finetune_params("actor")
    before = palm(ids)
    with pytest.raises(ValueError, match="finetune scope 'actor' exists already"):
        palm.unmerge_finetune_params(merged)
    assert torch.equal(palm(ids), before)


def test_merging_keeps_the_base_parameters_themselves(palm, add_scope):
    add_scope(palm)
    parameters = palm.palm_parameters()
    strides = [parameter.stride() for parameter in parameters]
    palm.merge_finetune_params("actor")
    assert all(new is old for new, old in zip(palm.palm_parameters(), parameters, strict=True))
    assert [parameter.stride() for parameter in palm.palm_parameters()] == strides
    assert all(parameter.requires_grad for parameter in parameters)


# ------------------------------------------------------------------ parameters and keys


def test_finetune_parameters_are_those_of_the_default_scope_unless_named(palm, add_scope):
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
    state = {name: tuple(weight.shape) for name, weight in palm.state_dict().items() if "finetune_modules" in name}
    expected = {}
    for layer in range(2):
        for target, (features_in, features_out) in {"q": (16, 24), "k": (16, 6), "v": (16, 6), "o": (24, 16)}.items():
            expected[f"finetune_modules.actor.{layer}.{target}.A"] = (3, features_in)
            expected[f"finetune_modules.actor.{layer}.{target}.B"] = (features_out, 3)
    assert list(state.items()) == list(expected.items())


def test_a_scope_takes_the_dtype_of_the_model():
    palm = PaLM(**SIZES).bfloat16()
    palm.add_finetune_params("actor")
    assert {parameter.dtype for parameter in palm.finetune_parameters("actor")} == {torch.bfloat16}


@torch.no_grad()
def test_scopes_with_their_settings_survive_saving(palm, ids, add_scope, tmp_path):
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


@torch.no_grad()
def test_an_unmerged_scope_takes_the_mode_of_the_model(palm, ids, add_scope):
    add_scope(palm, lora_dropout=0.5)
    expected = palm(ids, finetune_scope="actor")
    assert not torch.allclose(palm.train()(ids, finetune_scope="actor"), expected, atol=1e-3)
    merged = palm.merge_finetune_params("actor")
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
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda palm: palm(torch.ones(1, 3).long(), finetune_scope="critic"), "finetune scope 'critic' not found"),
        (lambda palm: palm(torch.ones(1, 3).long(), True, finetune_scope="critic"), r"there are \['actor'\]"),
        (lambda palm: palm.remove_finetune_params("critic"), "finetune scope 'critic' not found"),
        (lambda palm: palm.merge_finetune_params("critic"), "finetune scope 'critic' not found"),
        (lambda palm: palm.finetune_parameters("critic"), "finetune scope 'critic' not found"),
        (lambda palm: palm.finetune_parameters(), "finetune scope 'default' not found"),
        (lambda palm: palm.scope_modules("critic"), "finetune scope 'critic' not found"),
        (lambda palm: palm.set_dropout(1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda palm: LoRA(4, 4, r=0), "r must be at least 1, got 0"),
        (lambda palm: LoRA(4, 4, alpha=0), "alpha must be a positive number, got 0"),
        (lambda palm: LoRA(4, 4, dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_unknown_scopes_and_bad_settings_are_refused_and_change_nothing(palm, call, match):
    palm.set_dropout(0.2).add_finetune_params("actor")
    before = list(palm.state_dict())
    with pytest.raises(ValueError, match=match):
        call(palm)
    assert list(palm.state_dict()) == before
    assert next(palm.blocks()).attention.dropout == 0.2
