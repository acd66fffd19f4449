"""An independent PaLM: the paper's block in float64, one row and one head at a time, from a state dict alone.

Legend: n sequence, h heads, d head feature, i query, j key.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lm_core.generation.sampling import top_k, top_p
from palm_rlhf import PaLM
from palm_rlhf.rl.trainer import GRPOTrainer, RLHFTrainer


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where there is none; with REQUIRE_CUDA=1 it runs, and fails."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and os.environ.get("REQUIRE_CUDA") != "1" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


def layer_norm(x, gamma):
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * gamma


def complex_pairs(x):
    """Features ``c`` and ``c + d / 2`` of a head as one complex number."""
    return torch.complex(*x.chunk(2, dim=-1))


def naive_attention(q, k, v, *, positions, visible, scale, zeta, scale_base):
    """Attention of one head, ``(n, d)`` each; ``zeta`` is None without xPos. Equation 13 of arXiv 2212.10554."""
    n, d = q.shape
    theta = torch.tensor([10000.0 ** (-2 * c / d) for c in range(d // 2)], dtype=torch.float64)
    q, k = complex_pairs(q), complex_pairs(k)
    out = torch.zeros_like(v)
    for i in range(n):
        keys = [j for j in range(n) if visible[i, j]]
        scores = []
        for j in keys:
            distance = positions[i] - positions[j]
            turned = q[i] * k[j].conj() * torch.polar(torch.ones_like(theta), theta * distance)
            decay = 1.0 if zeta is None else zeta ** (distance / scale_base)
            scores.append((turned.real * decay).sum() * scale)
        if keys:
            out[i] = torch.stack(scores).softmax(0) @ v[keys]
    return out


@pytest.fixture(scope="session")
def naive_logits():
    """Logits of one row ``(n,)`` in float64.

    ``positions`` count the real tokens; ``visible (n, n)`` marks the keys a query may see: by default earlier ones.
    """

    def logits(palm, ids, *, settings, positions=None, visible=None, extra=0.0):
        weights = {name: value.double() for name, value in palm.state_dict().items()}
        n = len(ids)
        positions = list(range(n)) if positions is None else positions
        visible = torch.ones(n, n, dtype=torch.bool).tril() if visible is None else visible
        heads, kv_heads, d = settings["heads"], settings["kv_heads"], settings["dim_head"]
        causal, normalised = settings.get("causal", True), settings.get("qk_rmsnorm", False)
        zeta = None
        if settings.get("use_xpos", True) and causal:
            zeta = torch.tensor([(2 * c + 0.4 * d) / (1.4 * d) for c in range(d // 2)], dtype=torch.float64)
        x = weights["token_emb.weight"][ids] + extra
        for layer in range(settings["depth"]):
            part = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{layer}.")}
            normed = layer_norm(x, part["norm.gamma"])
            inner = settings["dim"] * settings["ff_mult"]
            sizes = (heads * d, kv_heads * d, kv_heads * d, inner, inner)
            q, k, v, up, gate = (normed @ part["proj_in.weight"].T).split(sizes, dim=-1)
            q, k, v = (t.reshape(n, -1, d) for t in (q, k, v))
            if normalised:
                q = q / q.norm(dim=-1, keepdim=True) * part["q_scale"]
                k = k / k.norm(dim=-1, keepdim=True) * part["k_scale"]
            attended = [
                naive_attention(
                    q[:, head],
                    k[:, head * kv_heads // heads],
                    v[:, head * kv_heads // heads],
                    positions=positions,
                    visible=visible,
                    scale=settings.get("qk_scale", 8) if normalised else d**-0.5,
                    zeta=zeta,
                    scale_base=settings.get("rotary_xpos_scale_base", 512),
                )
                for head in range(heads)
            ]
            feed_forward = up * gate * gate.sigmoid()
            x = x + torch.cat((*attended, feed_forward), dim=-1) @ part["proj_out.weight"].T
        return layer_norm(x, weights["norm.gamma"]) @ weights["token_emb.weight"].T

    return logits


SMALL = {"dim": 16, "num_tokens": 13, "depth": 2, "dim_head": 8, "heads": 4, "kv_heads": 2, "ff_mult": 2}


@pytest.fixture(scope="session")
def make_palm():
    """A small PaLM with non-trivial weights, gains and logits, in evaluation mode."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        palm = PaLM(**{**SMALL, **changes})
        with torch.no_grad():
            palm.token_emb.weight.mul_(25)  # std 0.5 instead of 0.02: logits of order one
            for name, parameter in palm.named_parameters():
                if name.endswith(("gamma", "q_scale", "k_scale")):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return palm.eval()

    return make


@pytest.fixture(scope="session")
def trained():
    """``trained(module)``: the module in evaluation mode, with every weight away from its initial value."""

    def move(module):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.2 if name.endswith("gamma") else 0.3) * noise
        return module.eval()

    return move


@pytest.fixture(scope="session")
def random_model(make_palm):
    """A model of a random configuration, with that configuration."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)

        def choose(*options):
            return options[int(torch.randint(len(options), (1,), generator=generator))]

        heads = choose(1, 2, 4)
        settings = {
            "dim": choose(8, 12, 20),
            "num_tokens": choose(5, 17),
            "depth": choose(1, 2),
            "heads": heads,
            "kv_heads": choose(*[count for count in (1, 2, 4) if heads % count == 0]),
            "dim_head": choose(2, 4, 10),
            "ff_mult": choose(1, 3),
            "qk_rmsnorm": choose(False, True),
            "qk_scale": choose(8.0, 3.5),
            "use_xpos": choose(False, True),
            "rotary_xpos_scale_base": choose(512.0, 16.0, 2.5),
        }
        return SimpleNamespace(palm=make_palm(seed, **settings), settings=settings, generator=generator, choose=choose)

    return draw


@pytest.fixture(scope="session")
def make_hugging_face():
    """A tiny Hugging Face model of 13 tokens with logits of order one, in evaluation mode."""

    def make(kind="llama"):
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("peft")
        torch.manual_seed(0)
        common = {"vocab_size": 13, "initializer_range": 0.4}
        if kind == "gpt2":
            config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)
            return transformers.GPT2LMHeadModel(config).eval()
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, **common,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def moved():
    """``moved(policy)``: the policy with every trained weight far from its initial value."""

    def move(policy, scale=0.3):
        torch.manual_seed(9)
        with torch.no_grad():
            for parameter in [*policy.actor_parameters(), *policy.critic_parameters()]:
                parameter.add_(torch.randn_like(parameter) * scale)
        return policy

    return move


@pytest.fixture(scope="session")
def prompt_ids():
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(13, (n,), generator=generator) for n in (2, 7, 4, 3, 6, 2)]


@pytest.fixture(params=["none", "top-k", "top-p"])
def filters(request):
    return {"none": (), "top-k": (partial(top_k, k=4),), "top-p": (partial(top_p, p=0.6),)}[request.param]


@pytest.fixture(scope="session")
def fraction_of_fives():
    """A reward of token ids: how much of a response is token 5."""

    def reward(ids, prompt_lengths, lengths):
        position = torch.arange(ids.shape[1])
        response = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
        return ((ids == 5) & response).sum(dim=1) / response.sum(dim=1)

    return reward


@pytest.fixture(scope="session")
def trainer(fraction_of_fives):
    """``trainer(palm, kind)``: an ``RLHFTrainer`` or ``GRPOTrainer`` on eight prompts of 4 and 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(13, (n,), generator=generator) for n in (4, 9) * 4]

    def make(palm, kind=RLHFTrainer, **changes):
        settings = {"palm": palm, "prompt_token_ids": prompts, "reward": fraction_of_fives, "device": "cpu"}
        more = {"group_size": 4} if kind is GRPOTrainer else {}
        return kind(**{**settings, **more, **changes})

    return make


@pytest.fixture(scope="session")
def small_settings():
    """The configuration of ``make_palm`` without changes."""
    return dict(SMALL)


@pytest.fixture(params=["0.2.3", "0.8.0"])
def release(request):
    return request.param


@pytest.fixture
def golden(release):
    """Cases of one release of PaLM-rlhf-pytorch: for each its state dict, and its inputs and outputs.

    Each file was made from the unpacked wheel of its release by

        python fixtures/make_original_golden.py UNPACKED/palm_rlhf_pytorch fixtures/original-0.8.0.safetensors
    """
    cases = {}
    for name, tensor in load_file(Path(__file__).parent / "fixtures" / f"original-{release}.safetensors").items():
        case, rest = name.split("/", 1)
        state, values = cases.setdefault(case, ({}, {}))
        if rest.startswith("state/"):
            state[rest.removeprefix("state/")] = tensor
        else:
            values[rest] = tensor
    return cases


@pytest.fixture(scope="session")
def assert_same():
    """Ours is computed in float64: what differs is what the original rounded, the same on every machine."""

    def check(actual, expected):
        torch.testing.assert_close(actual, expected.double(), atol=1e-5, rtol=0)

    return check


@pytest.fixture(scope="session")
def calls_of():
    """``calls_of(model, run)``: how often ``run()`` calls each submodule that has a forward, by name."""

    def count(model, run):
        modules = {
            name: module
            for name, module in model.named_modules()
            if name and type(module).forward is not nn.Module.forward
        }
        calls = dict.fromkeys(modules, 0)

        def note(name):
            calls[name] += 1

        handles = [module.register_forward_hook(lambda *_, name=name: note(name)) for name, module in modules.items()]
        run()
        for handle in handles:
            handle.remove()
        return calls

    return count


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory):
    """``run_worker(script, *arguments)``: a Python script, completed in two processes of torchrun or in one."""

    def run(script, *arguments, processes=2):
        path = tmp_path_factory.mktemp("worker") / "worker.py"
        path.write_text(script)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), str(path), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )

    return run
