"""Weights of PaLM-rlhf-pytorch, and weight files."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lm_core.checkpoints.manifest import CheckpointError
from palm_rlhf import PaLM
from palm_rlhf.interop.original import from_palm_rlhf_pytorch, palm_state_from_original
from palm_rlhf.interop.weight_files import convert_checkpoint, load_weights_file

RELEASES = {"0.2.3": "plain", "0.8.0": "offset"}


# ------------------------------------------------------------------ the original's models


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "named", "output"),
    [
        ("causal", {}, "logits"),
        ("causal", {"finetune_scope": "actor"}, "logits-actor"),
        ("causal", {"finetune_scope": "actor", "disable_lora": True}, "logits"),
        ("encoder", {}, "logits"),
        ("reward", {"finetune_scope": "reward", "return_only_embedding": True}, "features"),
    ],
)
def test_outputs_of_both_eras_equal_those_of_the_original(assert_same, golden, case, named, output):
    state, values = golden[case]
    palm = from_palm_rlhf_pytorch(state, causal=case != "encoder").eval().double()
    assert palm.rotary.use_xpos or not palm.causal
    real = values["ids"] >= 0
    assert real.all() == palm.causal
    assert_same(palm(values["ids"], **named)[real], values[output][real])


@torch.no_grad()
@pytest.mark.parametrize("qk_scale", [8.0, 2.5])
def test_qk_rmsnorm_keeps_the_scale_the_original_really_used(assert_same, golden, qk_scale):
    state, values = golden["qk_rmsnorm"]
    palm = from_palm_rlhf_pytorch(state, qk_scale=qk_scale).eval().double()
    assert_same(palm(values["ids"]), values["logits"])


@pytest.mark.parametrize(("actor", "critic"), [("actor_palm", "critic_palm"), ("actor_palm", "critic")])
def test_either_palm_of_an_actor_critic_can_be_taken(golden, actor, critic):
    state, _ = golden["causal"]
    other = {name: value * 2 if "attn_out" in name else value for name, value in state.items()}
    both = {f"{actor}.{name}": value for name, value in state.items()}
    both |= {f"{critic}.{name}": value for name, value in other.items()}
    both["value_head.0.weight"] = torch.ones(1, 12)
    with pytest.raises(ValueError, match=f"prefix must name one of the 2 PaLMs.*{actor}.*{critic}"):
        palm_state_from_original(both)
    taken = palm_state_from_original(both, prefix=critic)
    alone = palm_state_from_original(other)
    assert taken.arguments == alone.arguments
    assert taken.scopes == {"actor": 3}
    assert taken.state.keys() == alone.state.keys()
    assert all(torch.equal(taken.state[name], alone.state[name]) for name in alone.state)
    assert "value_head.0.weight" in taken.rest


def test_names_left_by_ddp_and_compile_are_understood(golden):
    state, _ = golden["causal"]
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    expected = from_palm_rlhf_pytorch(state).state_dict()
    actual = from_palm_rlhf_pytorch(wrapped).state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# ----------------------------------------------------------- what a state dict does not contain


def test_sizes_are_read_off_the_shapes(golden):
    palm = from_palm_rlhf_pytorch(golden["causal"][0], ff_dropout=0.1, cross_entropy_ignore_index=0)
    sizes = (palm.dim, palm.num_tokens, palm.depth, palm.heads, palm.dim_head, palm.kv_heads)
    assert sizes == (12, 20, 2, 3, 4, 1)
    assert palm.cross_entropy_ignore_index == 0
    assert next(palm.blocks()).ff_dropout == 0.1


@torch.no_grad()
def test_auto_finds_the_era_and_the_wrong_one_would_change_the_logits(assert_same, golden, release):
    state, values = golden["causal"]
    right = RELEASES[release]
    wrong = "offset" if right == "plain" else "plain"
    assert_same(from_palm_rlhf_pytorch(state, right).eval().double()(values["ids"]), values["logits"])
    mistaken = from_palm_rlhf_pytorch(state, wrong).eval()(values["ids"])
    assert (mistaken - values["logits"]).abs().max() > 0.5


@pytest.mark.plain
def test_gains_between_the_eras_must_be_explained(golden, release):
    state = dict(golden["causal"][0])
    shift = -0.5 if release == "0.2.3" else 0.5
    state = {name: value + shift if name.endswith("gamma") else value for name, value in state.items()}
    with pytest.raises(ValueError, match=r"norm_gain must be given: the mean stored gain is 0\.\d\d"):
        from_palm_rlhf_pytorch(state)
    explained = from_palm_rlhf_pytorch(state, norm_gain="plain")
    assert torch.equal(explained.norm.gamma, state["norm.gamma"])


def test_converting_leaves_the_random_state_and_the_given_tensors_alone(golden):
    state = {name: value.clone() for name, value in golden["causal"][0].items()}
    before = torch.get_rng_state()
    palm = from_palm_rlhf_pytorch(state, finetune_scopes=())
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for parameter in palm.parameters():
            parameter.zero_()
    assert all(torch.equal(state[name], value) for name, value in golden["causal"][0].items())


@pytest.mark.plain
def test_models_of_releases_without_the_final_norm_are_refused(golden):
    state = dict(golden["causal"][0])
    gains = {name: value % 1 + 0.5 for name, value in state.items() if name.endswith("norm.gamma")}
    state |= {**gains, "norm.gamma": torch.ones(12)}
    with pytest.raises(CheckpointError, match=r"releases up to 0\.2\.0 left that norm out"):
        from_palm_rlhf_pytorch(state, norm_gain="plain")
    reward = {f"palm.{name}": value for name, value in state.items()}
    assert torch.equal(from_palm_rlhf_pytorch(reward, norm_gain="plain").norm.gamma, torch.ones(12))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.fn.attn_out.weight": None}, "missing matrices: layers.0.fn.attn_out.weight"),
        ({"layers.1.fn.attn_out.weight": None}, "missing keys: layers.1.fn.attn_out.weight"),
        ({"layers.1.fn.extra": torch.ones(2)}, "unexpected keys: layers.1.fn.extra"),
        ({"layers.1.fn.attn_out.weight": torch.ones(12, 8)}, r"attn_out.weight \(stored \(12, 8\), expected \(12, 12"),
        ({"to_logits.weight": torch.ones(20, 12)}, "to_logits.weight differs from token_emb.weight"),
        ({"norm.beta": torch.ones(12)}, "norms have no bias, got values in norm.beta"),
        ({"finetune_modules.actor.1.2.B": None}, "missing keys: finetune_modules.actor.1.2.B"),
        ({"step": 3}, r"a state dict holds tensors by name, got step \(int\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_key(golden, change, message):
    state = {name: value for name, value in (golden["causal"][0] | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        from_palm_rlhf_pytorch(state)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda golden: from_palm_rlhf_pytorch({"weight": torch.ones(2)}), "no PaLM .* found; the keys begin weight"),
        (lambda golden: from_palm_rlhf_pytorch(golden["causal"][0], heads=4), "heads is 3 in the stored .*, got 4"),
        (
            lambda golden: palm_state_from_original(golden["reward"][0], prefix="actor_palm"),
            r"prefix must be one of \['palm'\], got 'actor_palm'",
        ),
    ],
)
def test_something_else_than_is_stored_is_refused(golden, call, message):
    with pytest.raises(ValueError, match=message):
        call(golden)


# ------------------------------------------------------------------ weight files


def fitting_palm(**changes):
    sizes = {"dim": 12, "num_tokens": 20, "depth": 2, "heads": 3, "dim_head": 4, "ff_mult": 2, "lora_r": 3}
    return PaLM(**{**sizes, "finetune_scopes": ("actor",), **changes})


@pytest.mark.archives
@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_file_of_the_original_loads_into_a_palm_where_it_is(assert_same, golden, tmp_path, suffix, device):
    state, values = golden["causal"]
    path = tmp_path / f"palm.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file({name: value.clone() for name, value in state.items()}, path)
    palm = fitting_palm().eval().double().to(device)
    palm.load(path)
    assert palm.device.type == device
    logits = palm(values["ids"].to(device), finetune_scope="actor")
    assert_same(logits.cpu(), values["logits-actor"])


@pytest.mark.archives
@torch.no_grad()
def test_loading_folds_the_scale_of_the_model_that_loads(assert_same, golden, tmp_path):
    state, values = golden["qk_rmsnorm"]
    torch.save(state, tmp_path / "palm.pt")
    palm = fitting_palm(depth=1, finetune_scopes=(), qk_rmsnorm=True, qk_scale=3.0).eval().double()
    load_weights_file(palm, str(tmp_path / "palm.pt"))
    assert_same(palm(values["ids"]), values["logits"])


@pytest.mark.archives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_state_dict_loads_in_the_dtype_of_the_model(tmp_path, dtype):
    source, target = fitting_palm(), fitting_palm().to(dtype)
    strides = next(target.blocks()).proj_in.weight.stride()
    torch.save(source.state_dict(), tmp_path / "palm.pt")
    target.load(tmp_path / "palm.pt")
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name].to(dtype))
    assert next(target.blocks()).proj_in.weight.stride() == strides


@pytest.mark.plain
def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fitting_palm().load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"is a folder; open it with PaLM\.from_pretrained"):
        fitting_palm().load(tmp_path)


class Bomb:
    """Unpickled without care, it creates the folder it is given."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.plain
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_bomb_is_refused_and_not_run(tmp_path, write):
    path, mark = tmp_path / "bomb.pt", tmp_path / "it-ran"
    write({"token_emb.weight": Bomb(mark)}, path)
    palm = fitting_palm()
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        palm.load(path)
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        convert_checkpoint(path, tmp_path / "converted")
    assert not mark.exists()
    assert not (tmp_path / "converted").exists()


@pytest.mark.plain
@pytest.mark.parametrize("content", [b"no weights" * 50, [torch.ones(2)], {"weights": {"a": torch.ones(2)}}, {}])
@pytest.mark.parametrize("name", ["palm.pt", "palm.safetensors"])
def test_a_file_that_is_damaged_or_no_state_dict_is_refused_by_name(tmp_path, name, content):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match=name):
        fitting_palm().load(tmp_path / name)


@pytest.mark.archives
@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune_scopes": ()}, "unexpected keys: finetune_modules.actor.0.q.A"),
        ({"finetune_scopes": ("actor", "critic")}, "missing keys: finetune_modules.critic.0.q.A"),
        ({"num_tokens": 21}, r"token_emb.weight \(stored \(20, 12\), model \(21, 12\)\)"),
        # the same shapes, but other heads
        (
            {"heads": 6, "dim_head": 2, "kv_heads": 2},
            r"heads 3 \(model 6\), kv_heads 1 \(model 2\), dim_head 4 \(model 2",
        ),
    ],
)
def test_a_file_of_another_architecture_is_refused_and_changes_nothing(golden, tmp_path, changes, message):
    torch.save(golden["causal"][0], tmp_path / "palm.pt")
    palm = fitting_palm(**changes)
    before = {name: value.clone() for name, value in palm.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        palm.load(tmp_path / "palm.pt")
    assert all(torch.equal(value, before[name]) for name, value in palm.state_dict().items())


@pytest.mark.archives
@torch.no_grad()
def test_a_converted_folder_opens_with_its_scopes(assert_same, golden, tmp_path):
    state, values = golden["causal"]
    torch.save(state, tmp_path / "old.pt")
    folder = convert_checkpoint(tmp_path / "old.pt", tmp_path / "new", ff_dropout=0.1)
    palm = PaLM.from_pretrained(folder).eval().double()
    assert next(palm.blocks()).ff_dropout == 0.1
    assert_same(palm(values["ids"]), values["logits"])
    assert_same(palm(values["ids"], finetune_scope="actor"), values["logits-actor"])


@pytest.mark.archives
@pytest.mark.plain
def test_converting_does_not_write_over_a_folder_unasked(golden, tmp_path):
    torch.save(golden["reward"][0], tmp_path / "old.pt")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert_checkpoint(tmp_path / "old.pt", tmp_path / "new")
    convert_checkpoint(tmp_path / "old.pt", tmp_path / "new", overwrite=True, prefix="palm.")
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "new" / "model.safetensors").is_file()
