import importlib
import inspect
import subprocess
import sys

import pytest

import lm_core

PROMISED = {
    "nn.attention": ["Attention", "attend"],
    "adapters": ["as_causal_lm"],
    "nn.kv_cache": ["KVCache"],
    "checkpoints.checkpoint": ["load_checkpoint", "save_checkpoint"],
    "data.corpora": ["stdlib_corpus"],
    "distributed": ["all_gather"],
    "nn.feedforward": ["SwiGLU"],
    "generation.beam_search": ["beam_search"],
    "causal_lm": ["CausalLM", "Generation", "eval_mode"],
    "generation.generate": ["generate", "sample"],
    "losses.losses": ["hidden_log_probs", "linear_cross_entropy", "token_log_probs"],
    "nn.masking": ["masked_mean", "maybe_and_mask", "prompt_mask_from_lengths"],
    "nn.norms": ["LayerNorm", "RMSNorm", "l2norm"],
    "nn.rotary": ["RotaryEmbedding", "apply_rotary", "rotate_half"],
    "generation.sampling": ["gumbel_noise", "gumbel_sample", "min_p", "top_k", "top_p"],
    "tokenizers": ["ByteTokenizer", "load_tokenizer"],
}


@pytest.mark.parametrize("module", PROMISED)
def test_promised_names_come_from_their_module_and_from_the_package(module):
    here = importlib.import_module(f"lm_core.{module}")
    for name in PROMISED[module]:
        assert getattr(lm_core, name) is getattr(here, name)
        assert name in lm_core.__all__


def test_all_is_sorted_complete_and_without_modules():
    assert lm_core.__all__ == sorted(set(lm_core.__all__))
    for name in lm_core.__all__:
        assert not inspect.ismodule(getattr(lm_core, name))
    imported = {
        name for name, value in vars(lm_core).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert imported == set(lm_core.__all__)


def test_every_public_class_and_function_is_documented():
    for name in lm_core.__all__:
        value = getattr(lm_core, name)
        assert value.__doc__, f"{name} has no docstring"
        assert len(value.__doc__.split()) > 3, f"{name} has no docstring of its own"


def test_importing_the_package_and_wrapping_a_plain_model_imports_no_heavy_library():
    heavy = "accelerate datasets einx huggingface_hub jsonargparse matplotlib peft transformers x_transformers"
    code = f"import sys, lm_core; lm_core.as_causal_lm(lambda ids: ids); print({set(heavy.split())} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
