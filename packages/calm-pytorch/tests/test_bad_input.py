"""Each case names its argument; nothing is changed by a refused call."""

import pytest
import torch
from torch import nn

from calm_pytorch import (
    CALM,
    AugmentParams,
    CrossAttentionBlock,
    ExtractHiddensWrapper,
    FineTuner,
    FineTunerSettings,
    align_by_offsets,
)
from calm_pytorch import plan_connections as plan
from calm_pytorch.interop import load_original, original_connections
from calm_pytorch.quickstart.kv_arithmetic import KeyValueTask
from lm_core.checkpoints.manifest import CheckpointError

pytestmark = pytest.mark.plain

Bad = (ValueError, TypeError)
SEQ = torch.zeros(2, 5, dtype=torch.long)
PROMPT = torch.zeros(2, 4, dtype=torch.long)
YES = torch.ones(2, 4, dtype=torch.bool)


def shallow():
    """A language model without a list of layers."""
    return nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 40))


def composed(anchor, augment, *, anchor_hidden_position="output", attn_kwargs=None, **params):
    """A composition whose further arguments are those of ``AugmentParams``."""
    read = AugmentParams(augment, **params)
    return CALM(anchor, read, anchor_hidden_position=anchor_hidden_position, attn_kwargs=attn_kwargs)


@pytest.fixture(scope="module")
def parts(model_of):
    return model_of("plain"), model_of("llama", seed=1), model_of("bert", seed=2)


@pytest.fixture(scope="module")
def calm(parts, compose):
    return compose(parts[0], parts[1], trained=True)


CONSTRUCTION = {
    "no augments": (lambda p: CALM(p[1], []), "augment_llms must hold at least one"),
    "no model": (lambda p: CALM("gpt2", AugmentParams(p[1])), "anchor_llm"),
    "encoder as anchor": (lambda p: CALM(p[2], AugmentParams(p[1])), "BertModel"),
    "augment is no params": (lambda p: CALM(p[1], p[2]), "augment_llms"),
    "unknown blocks": (lambda p: CALM(shallow(), AugmentParams(p[1])), "blocks of a Sequential are not known"),
    "unknown augment blocks": (lambda p: CALM(p[1], AugmentParams(shallow())), "augment 0 .*transformer_blocks"),
    "two sources of blocks": (
        lambda p: composed(p[1], p[0], transformer_blocks="layers", extract_blocks_fn=lambda m: []),
        "not both",
    ),
    "foreign block": (lambda p: composed(p[1], p[1], transformer_blocks=[nn.Linear(1, 1)]), "no part of"),
    "unknown name": (lambda p: composed(p[1], p[0], transformer_blocks="blocks"), "named 'blocks'"),
    "unknown name in a list": (lambda p: composed(p[1], p[0], transformer_blocks=["layers.9"]), "layers.9"),
    "no blocks": (lambda p: composed(p[1], p[0], transformer_blocks=[]), "at least one"),
    "repeated block": (lambda p: composed(p[1], p[0], transformer_blocks=["layers.0", "layers.0"]), "must come once"),
    "function gives no modules": (lambda p: composed(p[1], p[0], extract_blocks_fn=lambda m: [3]), "module"),
    "block that does not run": (lambda p: composed(p[1], p[2], transformer_blocks=[p[2].encoder.layer]), "do not run"),
    "augment layer 0": (lambda p: composed(p[1], p[1], connections=[(0, 1)]), r"\[1, 4\], got 0"),
    "augment layer too high": (lambda p: composed(p[1], p[1], connections=[(5, 1)]), r"\[1, 4\], got 5"),
    "anchor layer too high": (lambda p: composed(p[1], p[1], connections=[(1, 9)]), "anchor layers.*got 9"),
    "no connections": (lambda p: composed(p[1], p[1], connections=[]), "at least one"),
    "connection of three": (lambda p: composed(p[1], p[1], connections=[(1, 2, 3)]), "pairs"),
    "repeated connection": (lambda p: composed(p[1], p[1], connections=[(1, 2), (1, 2)]), "once"),
    "connect every 0": (lambda p: composed(p[1], p[1], connect_every_num_layers=0), "connect_every"),
    "position unknown": (lambda p: AugmentParams(p[1], hidden_position="middle"), "hidden_position"),
    "positions too few": (lambda p: composed(p[1], p[1], hidden_position=["input"]), "each of 4, got 1"),
    "anchor positions too few": (
        lambda p: composed(p[1], p[1], anchor_hidden_position=["input"]),
        "anchor_hidden_position",
    ),
    "unknown attention option": (lambda p: composed(p[1], p[1], attn_kwargs={"headz": 2}), "attn_kwargs"),
    "heads 0": (lambda p: composed(p[1], p[1], attn_kwargs={"heads": 0}), "heads"),
    "heads not divisible": (lambda p: composed(p[1], p[1], attn_kwargs={"heads": 3, "kv_heads": 2}), "attn_kwargs"),
    "encoder shares": (lambda p: composed(p[1], p[2], shared_sequence=True), "BertModel"),
    "image shares": (lambda p: composed(p[1], p[0], shared_sequence=True, input_shape=(3,)), "shared_seq"),
    "too many connections": (lambda p: composed(p[1], p[1], num_connections=5), "num_connections must be at most 4"),
    "connections and their number": (
        lambda p: composed(p[1], p[1], num_connections=1, connections=[(4, 4)]),
        "connections or num_connections, not both",
    ),
    "returns no hiddens": (lambda p: composed(p[1], p[0], model_return_hiddens=True), "list of tensors"),
    "block width 0": (lambda p: CrossAttentionBlock(dim=0, dim_context=3), "dim must be at least 1"),
    "nothing to extract": (lambda p: ExtractHiddensWrapper(p[0], []), "at least one"),
    "plan of nothing": (lambda p: plan(0, 3), "augment_depth"),
    "original of nothing": (lambda p: original_connections(3, 0), "anchor_depth"),
    "all keys held out": (lambda p: KeyValueTask(keys=5, held_out=5), "held_out"),
    "offsets reversed": (lambda p: align_by_offsets([[(3, 1)]], [[(0, 1)]]), "end is not before"),
    "offsets of other rows": (lambda p: align_by_offsets([[(0, 1)]], [[(0, 1)], [(0, 1)]]), "equally many rows"),
}

CALLS = {
    "no prompt": (lambda c: c(SEQ), "prompt must be given"),
    "prompts for two": (lambda c: c(SEQ, prompt=[PROMPT, PROMPT]), "each of 1, got 2"),
    "masks for two": (lambda c: c(SEQ, prompt=PROMPT, prompt_mask=[YES, YES]), "prompt_mask.*got 2"),
    "prompt is a number": (lambda c: c(SEQ, prompt=[3]), "prompt"),
    "float prompt": (lambda c: c(SEQ, prompt=PROMPT.float()), "input_shape"),
    "prompt 1-D": (lambda c: c(SEQ, prompt=PROMPT[0]), r"\(b, m\)"),
    "empty prompt": (lambda c: c(SEQ, prompt=PROMPT[:, :0]), "m at least 1"),
    "prompt of other rows": (lambda c: c(SEQ, prompt=PROMPT[:1]), "2 rows"),
    "prompt id too high": (lambda c: c(SEQ, prompt=PROMPT + 40), r"prompt must hold token ids in \[0, 40\), got 40"),
    "prompt id negative": (lambda c: c(SEQ, prompt=PROMPT - 2), "got -2"),
    "prompt mask of other shape": (lambda c: c(SEQ, prompt=PROMPT, prompt_mask=YES[:, :2]), "prompt_mask"),
    "prompt mask of integers": (lambda c: c(SEQ, prompt=PROMPT, prompt_mask=YES.long()), "prompt_mask must be bool"),
    "float seq": (lambda c: c(SEQ.float(), prompt=PROMPT), "seq"),
    "one token": (lambda c: c(SEQ[:, :1], prompt=PROMPT), "at least 2 tokens"),
    "mask of other shape": (lambda c: c(SEQ, prompt=PROMPT, mask=YES), "mask must have shape"),
    "mask of integers": (lambda c: c(SEQ, prompt=PROMPT, mask=SEQ), "mask must be boolean"),
    "states and prompt": (lambda c: c(SEQ, prompt=PROMPT, augment_states=c.augment_states(PROMPT)), "not both"),
    "unknown reduction": (lambda c: c(SEQ, prompt=PROMPT, reduction="none"), "reduction"),
    "alignment of other shape": (lambda c: c(SEQ, prompt=PROMPT, alignment=YES), "alignment"),
    "seq_len too short": (lambda c: c.generate(PROMPT, 4), "seq_len must exceed"),
    "temperature below 0": (lambda c: c.generate(PROMPT, 8, temperature=-1.0), "temperature"),
    "unknown input": (lambda c: c.as_causal_lm()(SEQ, prompt_9=PROMPT), "prompt_9"),
    "no such adapter": (lambda c: c.load_adapter("/nowhere"), "adapter.safetensors"),
    "original of other keys": (lambda c: load_original(c, {"x": torch.zeros(1)}), "missing keys"),
}

SETTINGS = {
    "no steps": ({"num_train_steps": 0}, "max_steps must be at least 1"),
    "settings next to config": ({"config": FineTunerSettings()}, "with config, settings must be passed in it"),
    "steps given twice": ({"max_steps": 6}, "max_steps and num_train_steps are one argument"),
    "warmup given twice": ({"warmup": 0.1, "warmup_steps": 3}, "warmup and warmup_steps are one argument"),
    "warmup too long": ({"warmup": 1.5}, r"warmup must be a fraction of the updates in \[0, 1\)"),
    "rate 0": ({"learning_rate": 0.0}, "learning_rate"),
    "decay negative": ({"weight_decay": -1.0}, "weight_decay"),
    "warmup negative": ({"warmup_steps": -1}, "warmup_steps"),
    "norm 0": ({"max_grad_norm": 0.0}, "max_grad_norm"),
    "batch beyond the data": ({"batch_size": 9}, "at least the 9 examples"),
    "no dataset": ({"dataset": 3}, "dataset must have a length"),
    "empty validation": ({"valid_dataset": []}, "valid_dataset"),
    "precision unknown": ({"precision": "fp8"}, "precision"),
    "foreign accelerate argument": ({"accelerate_kwargs": {"cpu": True}}, "cpu"),
    "unknown tracker": ({"accelerate_kwargs": {"log_with": "nobody"}}, "nobody"),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_a_wrong_composition_is_refused_by_name(parts, case):
    make, message = CONSTRUCTION[case]
    needs = [parameter.requires_grad for model in parts for parameter in model.parameters()]
    with pytest.raises(Bad, match=message):
        make(parts)
    assert [parameter.requires_grad for model in parts for parameter in model.parameters()] == needs
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in parts for m in model.modules())


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_refused_by_name_and_changes_nothing(calm, case):
    make, message = CALLS[case]
    before = {name: value.clone() for name, value in calm.state_dict().items()}
    modes = [module.training for module in calm.modules()]
    with pytest.raises((*Bad, CheckpointError, FileNotFoundError), match=message):
        make(calm)
    assert [module.training for module in calm.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in calm.state_dict().items())


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_refused_by_name_and_writes_nothing(calm, tmp_path, case):
    changes, message = SETTINGS[case]
    settings = {"num_train_steps": 1, "learning_rate": 1e-3, "weight_decay": 0.0, "batch_size": 1}
    data = [{"seq": SEQ[0], "prompt": PROMPT[0]}] * 4
    with pytest.raises(Bad, match=message):
        FineTuner(calm, **{**settings, "dataset": data, "checkpoint_path": tmp_path / "run", **changes})
    assert not (tmp_path / "run").exists()
