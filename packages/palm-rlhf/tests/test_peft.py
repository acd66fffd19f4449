"""LoRA scopes against peft: the same layer, and adapters that travel both ways."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lm_core.checkpoints.manifest import CheckpointError
from palm_rlhf import LoRA, PaLM
from palm_rlhf.interop.cohere import to_cohere
from palm_rlhf.interop.peft_adapters import export_lora, import_lora

# Warnings of peft when it saves an adapter of a model without a folder, and of deprecated uses of transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

SIZES = {"dim": 24, "num_tokens": 40, "depth": 2, "heads": 4, "dim_head": 6, "ff_mult": 2, "use_xpos": False}
ALL_TARGETS = ("q", "k", "v", "o", "ff_in", "ff_out")


@pytest.fixture
def palm(trained):
    return trained(PaLM(**SIZES))


@pytest.fixture
def ids():
    return torch.randint(0, SIZES["num_tokens"], (2, 13), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def with_scope(trained):
    def add(palm, **settings):
        palm.add_finetune_params("actor", 3, **settings)
        trained(palm.finetune_modules["actor"])
        return palm

    return add


# ------------------------------------------------------------------ the layer


def peft_linear(lora, dropout=0.0, rank_stabilized=False):
    """peft's layer around a zero weight, with the factors of our layer."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Sequential(nn.Linear(lora.A.shape[1], lora.B.shape[0], bias=False))
    nn.init.zeros_(base[0].weight)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=dropout,
        use_rslora=rank_stabilized,
        target_modules=["0"],
    )
    layer = inject_adapter_in_model(config, base)[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(lora.A)
        layer.lora_B["default"].weight.copy_(lora.B)
    return layer


@pytest.mark.parametrize(("alpha", "rank_stabilized"), [(None, False), (3.0, False), (3.0, True), (None, True)])
def test_output_and_gradients_equal_those_of_peft(trained, alpha, rank_stabilized):
    lora = trained(LoRA(10, 7, r=4, alpha=alpha, rank_stabilized=rank_stabilized))
    theirs = peft_linear(lora, rank_stabilized=rank_stabilized)
    x = torch.randn(2, 5, 10, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    weights = torch.randn(2, 5, 7)
    ours_out, theirs_out = lora(x), theirs(x_theirs)
    (ours_out * weights).sum().backward()
    (theirs_out * weights).sum().backward()
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-6, rtol=0)
    torch.testing.assert_close(lora.A.grad, theirs.lora_A["default"].weight.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(lora.B.grad, theirs.lora_B["default"].weight.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad, x_theirs.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(lora.delta(), theirs.get_delta_weight("default"), atol=1e-6, rtol=0)


def test_dropout_is_that_of_peft_and_acts_in_training_only(trained):
    lora = trained(LoRA(64, 7, r=4, dropout=0.4))
    theirs = peft_linear(lora, dropout=0.4)
    x = torch.randn(3, 64)
    torch.manual_seed(0)
    ours_out = lora.train()(x)
    torch.manual_seed(0)
    theirs_out = theirs.train()(x)
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-6, rtol=0)
    assert not torch.allclose(ours_out, lora.eval()(x))
    torch.testing.assert_close(lora(x), theirs.eval()(x), atol=1e-6, rtol=0)


def test_weights_start_as_those_of_peft():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    lora = LoRA(512, 32, r=64)
    torch.manual_seed(0)
    assert torch.equal(lora.A, nn.Linear(512, 64, bias=False).weight)  # Kaiming-uniform with a = sqrt(5)
    assert not lora.B.any()
    config = LoraConfig(r=64, target_modules=["0"])
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(512, 32)))[0]
    assert not theirs.lora_B["default"].weight.any()
    for first in (lora.A, theirs.lora_A["default"].weight):
        assert first.abs().max() <= math.sqrt(1 / 512)
        assert first.std().item() == pytest.approx(math.sqrt(1 / 512 / 3), rel=0.02)


# ------------------------------------------------------------------ adapters


@torch.no_grad()
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({}, {}),
        ({"kv_heads": 2}, {"lora_targets": ALL_TARGETS, "lora_alpha": 5.0}),
        ({"dim_head": 10}, {"lora_targets": ("ff_in", "k"), "lora_alpha": 4.5, "lora_rank_stabilized": True}),
    ],
)
def test_an_exported_scope_gives_our_logits_on_the_twin(trained, with_scope, ids, tmp_path, sizes, settings):
    from peft import PeftModel

    palm = with_scope(trained(PaLM(**{**SIZES, **sizes})), **settings)
    expected = palm(ids, finetune_scope="actor")
    assert (expected - palm(ids)).abs().max() > 0.1
    model = PeftModel.from_pretrained(to_cohere(palm), export_lora(palm, "actor", tmp_path / "adapter")).eval()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, palm(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_targets": ALL_TARGETS, "lora_alpha": 2.5, "lora_dropout": 0.2, "lora_rank_stabilized": True},
        {"lora_targets": ("ff_out", "q")},
    ],
)
@pytest.mark.parametrize("base", [{}, {"use_xpos": True, "qk_rmsnorm": True, "kv_heads": 2}])
def test_export_and_import_give_the_same_scope(with_scope, tmp_path, settings, base):
    palm = with_scope(PaLM(**{**SIZES, **base}), **settings)
    export_lora(palm, "actor", tmp_path / "adapter", base_model="somewhere")
    before = torch.get_rng_state()
    import_lora(palm, "copy", tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), before)
    actor, copy = palm.scope_modules("actor"), palm.scope_modules("copy")
    sorted_settings = [
        replace(scope.settings, targets=tuple(sorted(scope.settings.targets))) for scope in (actor, copy)
    ]
    assert sorted_settings[0] == sorted_settings[1]
    assert copy.state_dict().keys() == actor.state_dict().keys()
    assert all(torch.equal(value, actor.state_dict()[name]) for name, value in copy.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_made_by_peft_becomes_a_scope_with_its_logits(palm, ids, tmp_path, targets):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True)
    model = get_peft_model(to_cohere(palm), config)
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    for name, parameter in weights.items():
        if "gate_proj.lora_A" in name:
            # the two halves of our feed-forward share their first factor
            parameter.copy_(weights[name.replace("gate_proj", "up_proj")])
    model.eval().save_pretrained(tmp_path)
    import_lora(palm, "actor", tmp_path)
    expected = model(ids).logits
    assert (expected - palm(ids)).abs().max() > 0.1
    torch.testing.assert_close(palm(ids, finetune_scope="actor"), expected, atol=1e-4, rtol=0)


@pytest.mark.cuda
@torch.no_grad()
def test_a_scope_and_its_twin_travel_to_and_from_a_gpu(with_scope, palm, ids, tmp_path):
    from peft import PeftModel

    palm, ids = with_scope(palm).cuda(), ids.cuda()
    expected = palm(ids, finetune_scope="actor")
    folder = export_lora(palm, "actor", tmp_path / "adapter")
    model = PeftModel.from_pretrained(to_cohere(palm), folder).cuda().eval()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=0)
    import_lora(palm, "copy", folder)
    assert torch.equal(palm(ids, finetune_scope="copy"), expected)


# ------------------------------------------------------------------ refusals


@pytest.fixture
def adapter(palm, with_scope, tmp_path):
    """Writes an exported adapter with other settings or tensors."""
    with_scope(palm, lora_targets=("q", "ff_in"))

    def write(config, change=None):
        folder = export_lora(palm, "actor", tmp_path / "adapter")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if change is not None:
            state = load_file(folder / "adapter_model.safetensors")
            change(state)
            save_file(state, folder / "adapter_model.safetensors")
        return folder

    return write


def assert_refused(palm, folder, error, match):
    before = list(palm.state_dict())
    with pytest.raises(error, match=match):
        import_lora(palm, "new", folder)
    assert list(palm.state_dict()) == before


FIRST = "base_model.model.model.layers.0."


def without(part):
    return lambda state: [state.pop(name) for name in list(state) if part in name]


@pytest.mark.plain
@pytest.mark.parametrize(
    ("config", "change", "match"),
    [
        ({"use_dora": True}, None, "use_dora = True"),
        ({"bias": "all"}, None, "bias = 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, None, "rank_pattern = "),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save = "),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights = 'pissa'"),
        ({"peft_type": "IA3"}, None, "peft_type 'LORA', got 'IA3'"),
        ({"lora_alpha": 0}, None, "lora_alpha must be a positive number, got 0.0"),
        ({"lora_alpha": None}, None, r"adapter_config\.json is damaged"),
        ({"r": "three"}, None, r"adapter_config\.json is damaged"),
        ({"r": 5}, None, r"shapes that differ: .*q_proj\.lora_A\.weight \(stored \(3, 24\), expected \(5, 24\)\)"),
        ({}, without(f"{FIRST}self_attn.q_proj.lora_B"), "missing keys: .*q_proj.lora_B.weight"),
        ({}, lambda state: state.update(other=torch.ones(1)), "unexpected keys: other"),
        ({}, without("gate_proj"), r"must target mlp\.gate_proj too"),
        (
            {},
            lambda state: state[f"{FIRST}mlp.up_proj.lora_A.weight"].add_(1),
            r"lora_A of mlp\.up_proj and mlp\.gate_proj must be equal, got different ones in layer 0",
        ),
        ({}, lambda state: [without("")(state), state.update(x=torch.ones(1))], r"its keys are"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_or_does_not_fit_is_refused_by_name(palm, adapter, config, change, match):
    assert_refused(palm, adapter(config, change), ValueError, match)


@pytest.mark.plain
def test_missing_and_damaged_adapter_folders_are_refused(palm, adapter, tmp_path):
    assert_refused(palm, tmp_path / "none", FileNotFoundError, "directory must hold adapter_config.json")
    folder = adapter({})
    with pytest.raises(ValueError, match="finetune scope 'actor' exists already"):
        import_lora(palm, "actor", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert_refused(palm, folder, CheckpointError, "adapter_model.safetensors cannot be read")
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        export_lora(palm, "actor", folder)
    with pytest.raises(ValueError, match="finetune scope 'critic' not found"):
        export_lora(palm, "critic", tmp_path / "critic")
    assert not (tmp_path / "critic").exists()
