"""The Cohere twin: Hugging Face's implementation as an oracle for the whole model, in both directions."""

import json

import pytest
import torch

from lm_core.checkpoints.manifest import CheckpointError
from lm_core.tokenizers import ByteTokenizer
from palm_rlhf import PaLM
from palm_rlhf.interop.cohere import export_cohere, from_cohere, to_cohere

SIZES = {"dim": 24, "num_tokens": 40, "depth": 2, "heads": 4, "dim_head": 6, "ff_mult": 2, "use_xpos": False}


@pytest.fixture
def palm(trained):
    return trained(PaLM(**SIZES))


@pytest.fixture
def ids():
    return torch.randint(0, SIZES["num_tokens"], (3, 17), generator=torch.Generator().manual_seed(2))


def assert_same(actual, expected, tolerance=1e-4):
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# ------------------------------------------------------------------ the same function


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 4, "heads": 4},
        {"heads": 1, "dim_head": 24, "depth": 1},
        {"dim_head": 10, "heads": 3},  # heads * dim_head differs from dim
        {"ff_mult": 1, "depth": 3},
    ],
)
def test_the_twin_has_our_logits_also_under_left_padding(trained, ids, changes):
    palm = trained(PaLM(**{**SIZES, **changes}))
    twin, mask = to_cohere(palm), torch.ones_like(ids, dtype=torch.bool)
    assert_same(twin(ids).logits, palm(ids))
    mask[0, :5], mask[2, :11] = False, False
    assert_same(twin(ids, attention_mask=mask.long()).logits[mask], palm(ids, mask=mask)[mask])


@torch.no_grad()
def test_a_scope_is_merged_into_the_twin_only(trained, palm, ids):
    palm.add_finetune_params("actor", 3, lora_targets=("q", "k", "v", "o", "ff_in", "ff_out"))
    trained(palm.finetune_modules)
    plain = palm(ids)
    twin = to_cohere(palm, finetune_scope="actor")
    assert_same(twin(ids).logits, palm(ids, finetune_scope="actor"))
    assert (twin(ids).logits - plain).abs().max() > 0.1
    assert torch.equal(palm(ids), plain)


@torch.no_grad()
def test_twin_and_model_share_no_memory_and_making_it_draws_no_random_number(palm, ids):
    before, expected = torch.get_rng_state(), palm(ids)
    twin = to_cohere(palm)
    from_cohere(twin)
    assert torch.equal(torch.get_rng_state(), before)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(palm(ids), expected)


def test_the_twin_keeps_tied_weights_dtype_and_mode(palm):
    twin = to_cohere(palm.bfloat16().train())
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.bfloat16}
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert twin.training


# ------------------------------------------------------------------ export


@torch.no_grad()
def test_an_exported_folder_opens_in_transformers_and_generates_the_same_tokens(palm, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(export_cohere(palm, tmp_path / "twin"))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :6] = False
    theirs = twin.generate(ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    ours = palm.generate(max_new_tokens=12, prompt=ids, mask=mask, temperature=0.0)
    assert torch.equal(theirs[:, ids.shape[1] :], ours)


def test_an_exported_folder_tells_the_special_tokens_and_holds_the_tokenizer(tmp_path):
    from transformers import AutoConfig

    tokenizer = ByteTokenizer()
    palm = PaLM(**{**SIZES, "num_tokens": tokenizer.vocab_size})
    folder = export_cohere(palm, tmp_path / "twin", tokenizer=tokenizer, max_position_embeddings=512)
    config = AutoConfig.from_pretrained(folder)
    special = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert special == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert config.max_position_embeddings == 512
    assert ByteTokenizer.from_pretrained(folder) == tokenizer


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_xpos": True}, "use_xpos=True"),
        ({"qk_rmsnorm": True}, "qk_rmsnorm=True"),
        ({"causal": False}, "causal=False"),
    ],
)
def test_what_cohere_cannot_express_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"cannot express a PaLM with {named}$"):
        export_cohere(PaLM(**{**SIZES, **changes}), tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


@pytest.mark.plain
def test_bad_arguments_of_an_export_are_refused(palm, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        export_cohere(palm, tmp_path)
    with pytest.raises(ValueError, match="finetune scope 'actor' not found"):
        export_cohere(palm, tmp_path / "twin", finetune_scope="actor")
    with pytest.raises(TypeError, match="tokenizer must have save_pretrained"):
        export_cohere(palm, tmp_path / "twin", tokenizer=object())
    with pytest.raises(ValueError, match="tokenizer has bos id 256, but the model has num_tokens = 40"):
        export_cohere(palm, tmp_path / "twin", tokenizer=ByteTokenizer())
    assert not (tmp_path / "twin").exists()


# ------------------------------------------------------------------ import


@pytest.fixture
def cohere_model(trained):
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=40, hidden_size=24, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=10000.0, logit_scale=0.25, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return trained(CohereForCausalLM(config))


@torch.no_grad()
def test_a_cohere_model_and_its_folder_in_several_files_become_a_palm_with_its_logit_scale(cohere_model, ids, tmp_path):
    cohere_model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    for source in (cohere_model, tmp_path):
        assert_same(from_cohere(source).eval()(ids), cohere_model(ids).logits)


@pytest.mark.parametrize("through_folder", [False, True])
def test_export_and_import_give_the_same_weights(trained, tmp_path, through_folder):
    palm = trained(PaLM(**{**SIZES, "kv_heads": 2, "dim_head": 10}, attn_dropout=0.1)).bfloat16()
    back = from_cohere(export_cohere(palm, tmp_path / "twin") if through_folder else to_cohere(palm), ff_dropout=0.2)
    assert back.state_dict().keys() == palm.state_dict().keys()
    for name, value in back.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, palm.state_dict()[name])
    block = next(back.blocks())
    assert (block.attention.dropout, block.ff_dropout) == (0.1, 0.2)
    assert not back.rotary.use_xpos


@pytest.mark.plain
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_qk_norm", True),
        ("attention_bias", True),
        ("tie_word_embeddings", False),
        ("hidden_act", "gelu"),
        ("layer_norm_eps", 1e-6),
        ("rope_theta", 8e6),
        ("intermediate_size", 70),
    ],
)
def test_what_palm_cannot_express_is_refused_by_name(cohere_model, tmp_path, setting, value):
    content = cohere_model.config.to_dict()
    if setting == "rope_theta":
        content["rope_parameters"] = {"rope_theta": value, "rope_type": "default"}
    else:
        content[setting] = value
    cohere_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content, default=str))
    with pytest.raises(ValueError, match=f"{setting}.*{value}"):
        from_cohere(tmp_path)


@pytest.mark.plain
def test_sources_that_are_no_cohere_model_are_refused(cohere_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="source must be the folder of a Cohere model"):
        from_cohere(tmp_path / "none")
    with pytest.raises(TypeError, match="source must be a CohereForCausalLM or a folder, got int"):
        from_cohere(3)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        from_cohere(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors"):
        from_cohere(tmp_path)
    cohere_model.save_pretrained(tmp_path / "cohere")
    (tmp_path / "cohere" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type 'cohere', got 'llama'"):
        from_cohere(tmp_path / "cohere")


@pytest.mark.plain
def test_ill_fitting_cohere_weights_are_refused_by_key(cohere_model):
    with pytest.raises(ValueError, match="use_xpos is False in the stored weights, got True"):
        from_cohere(cohere_model, use_xpos=True)
    cohere_model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(torch.ones(23, 24))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight \(stored \(23, 24\), expected"):
        from_cohere(cohere_model)
