"""Independent references of the tests: naive float64 loops, and small language models that are easy to follow.

Legend: b batch, n sequence, h heads, i queries, j keys, d feature, v vocabulary.
"""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from torch import nn

settings.register_profile("core", deadline=None, derandomize=True)
settings.load_profile("core")


def pytest_collection_modifyitems(items):
    """Skips GPU tests on a machine without a GPU; with REQUIRE_CUDA=1 they run, and fail."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and os.environ.get("REQUIRE_CUDA") != "1" and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(scope="session")
def naive_attention():
    """Attention by its definition, one query of one head at a time, in float64."""

    def attention(q, k, v, visible, scale=None):
        b, h, i, d = q.shape
        groups = h // k.shape[1]
        out = torch.zeros(b, h, i, v.shape[-1], dtype=torch.float64)
        for row in range(b):
            for head in range(h):
                keys, values = k[row, head // groups].double(), v[row, head // groups].double()
                for query in range(i):
                    seen = visible[row, head, query].nonzero().flatten()
                    if len(seen) == 0:
                        continue
                    scores = keys[seen] @ q[row, head, query].double() * (d**-0.5 if scale is None else scale)
                    weights = (scores - scores.max()).exp()
                    out[row, head, query] = (weights / weights.sum()) @ values[seen]
        return out

    return attention


@pytest.fixture(scope="session")
def rotate():
    """Rotary embedding by the paper's formula: pairs of features as complex numbers, rotated by position x theta_c."""

    def rotated(x, positions, base=10000.0):
        half = x.shape[-1] // 2
        frequencies = torch.tensor([base ** (-2 * c / x.shape[-1]) for c in range(half)], dtype=torch.float64)
        angles = positions.double()[:, None] * frequencies
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    return rotated


@pytest.fixture(scope="session")
def xpos_score():
    """xPos by its formula: sum over pairs c of ``zeta_c ** ((p_q - p_k) / scale_base) * Re(q_c conj(k_c))``."""

    def score(q, k, p_q, p_k, scale_base=512.0, base=10000.0):
        d = q.shape[-1]
        total = 0.0
        for c in range(d // 2):
            zeta = (2 * c + 0.4 * d) / (1.4 * d)
            q_c = complex(float(q[c]), float(q[c + d // 2]))
            k_c = complex(float(k[c]), float(k[c + d // 2]))
            angle = (p_q - p_k) * base ** (-2 * c / d)
            turned = q_c * k_c.conjugate() * complex(math.cos(angle), math.sin(angle))
            total += zeta ** ((p_q - p_k) / scale_base) * turned.real
        return total

    return score


HUGGING_FACE = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "cohere": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4, "num_hidden_layers": 2},
}
X_TRANSFORMERS = {
    "absolute": {},
    "rotary": {"rotary_pos_emb": True},
    "xpos": {"rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True},
    "t5": {"rel_pos_bias": True},
    "flash alibi": {"alibi_pos_bias": True, "attn_flash": True},
    "window": {"rotary_pos_emb": True, "attn_max_attend_past": 3, "attn_kv_heads": 2},
}


def enlarged(model):
    """Sets weights large enough that a wrong mask or position changes results far more than rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


@pytest.fixture(scope="session")
def hugging_face():
    """A function from the name of an architecture to a tiny model of it, of 48 tokens."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()

    def build(name, model_class=transformers.AutoModelForCausalLM, **options):
        torch.manual_seed(0)
        sizes = {"vocab_size": 48, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        if name != "gpt2":
            sizes["hidden_size"] = 32
        if name not in ("gpt2", "bloom", "mamba"):
            sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            sizes["max_position_embeddings"] = 64
        # What a model caches by itself is not tested here, and fails in some versions.
        sizes["use_cache"] = False
        config = transformers.AutoConfig.for_model(name, **{**sizes, **HUGGING_FACE.get(name, {}), **options})
        return enlarged(getattr(model_class, "from_config", model_class)(config))

    return build


@pytest.fixture(scope="session")
def decoder():
    """A function from a kind of positions and options of x-transformers to a tiny decoder of 48 tokens."""
    x_transformers = pytest.importorskip("x_transformers")

    def build(positions="absolute", layer_options=None, **options):
        torch.manual_seed(0)
        sizes = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
        try:
            layers = x_transformers.Decoder(**sizes | X_TRANSFORMERS[positions] | (layer_options or {}))
            options = {"num_tokens": 48, "max_seq_len": 32, **options}
            return enlarged(x_transformers.TransformerWrapper(attn_layers=layers, **options))
        except (AssertionError, TypeError) as error:  # options come with versions
            if "unrecognized" in str(error) or "unexpected" in str(error):
                pytest.skip(f"this version of x-transformers has no such option: {error}")
            raise

    return build


@pytest.fixture
def build(request):
    """A function from a name in either table above to a tiny model."""
    return lambda kind: request.getfixturevalue("decoder" if kind in X_TRANSFORMERS else "hugging_face")(kind)


class SuccessorModel(nn.Module):
    """Predicts x + 1 after x, independent of earlier tokens; without a cache."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, ids, *, mask=None, cache=None, **kwargs):
        return nn.functional.one_hot((ids + 1) % self.vocabulary, self.vocabulary).float() * 10.0


class SumCache:
    """Cache of ``HistoryModel``: for each row a sum and the number of tokens in it."""

    def __init__(self, batch_size, features):
        self.total = torch.zeros(batch_size, 1, features, dtype=torch.float64)
        self.length = 0
        self.rows_seen = []

    def reorder(self, index):
        self.total = self.total[index]


class HistoryModel(nn.Module):
    """Logits that depend on every earlier real token and on its position among them; float64.

    ``logits_i = W tanh(sum over real j <= i of E[x_j] * cos(position_j * w))``. ``calls`` records what came in.
    """

    def __init__(self, vocabulary, seed, features=6, sharpness=3.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.embedding = nn.Parameter(draw(vocabulary, features))
        self.waves = nn.Parameter(draw(features))
        self.weight = nn.Parameter(draw(vocabulary, features) * sharpness)
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def features(self, ids, mask, cache, kwargs):
        self.calls.append(SimpleNamespace(ids=ids.clone(), mask=mask, cached=cache is not None, kwargs=kwargs))
        past = 0 if cache is None else cache.length
        if mask is None:
            mask = torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.bool)
        assert mask.shape == (ids.shape[0], past + ids.shape[1])
        positions = (mask.cumsum(-1) - 1)[:, past:, None]
        terms = self.embedding[ids] * torch.cos(positions * self.waves) * mask[:, past:, None]
        if "shift" in kwargs:
            terms = terms + kwargs["shift"].reshape(-1, 1, 1)
        sums = terms.cumsum(dim=1)
        if cache is not None:
            sums = sums + cache.total
            cache.total = sums[:, -1:]
            cache.length += ids.shape[1]
        return self.dropout(torch.tanh(sums))

    def forward(self, ids, *, mask=None, cache=None, **kwargs):
        return self.features(ids, mask, cache, kwargs) @ self.weight.T


class CachedHistoryModel(HistoryModel):
    """``HistoryModel`` that decodes incrementally."""

    def init_cache(self, batch_size, max_length):
        return SumCache(batch_size, self.weight.shape[1])


class HiddenHistoryModel(CachedHistoryModel):
    """``CachedHistoryModel`` with hidden states; a call for logits fails."""

    @property
    def output_weight(self):
        return self.weight

    def hidden(self, ids, *, mask=None, cache=None, **kwargs):
        return self.features(ids, mask, cache, kwargs)

    def forward(self, ids, **kwargs):
        raise AssertionError("full logits were asked for")


@pytest.fixture(scope="session")
def models():
    """The models above, by name."""
    return SimpleNamespace(
        successor=SuccessorModel, history=HistoryModel, cached=CachedHistoryModel, hidden=HiddenHistoryModel
    )


@pytest.fixture(scope="session")
def next_logits():
    """Logits of the token after one row of ids, from a ``HistoryModel``, token by token in Python."""

    def logits(model, ids):
        total = torch.zeros(model.weight.shape[1], dtype=torch.float64)
        for position, token in enumerate(ids):
            total = total + model.embedding[token].detach() * torch.cos(position * model.waves.detach())
        return model.weight.detach() @ torch.tanh(total)

    return logits


@pytest.fixture(scope="session")
def next_log_probs(next_logits):
    """Log-probabilities of the token after one row of ids."""

    def log_probs(model, ids, temperature=1.0):
        logits = next_logits(model, ids) / temperature
        return logits - logits.exp().sum().log()

    return log_probs


@pytest.fixture(scope="session")
def naive_greedy(next_log_probs):
    """Greedy decoding of one row: tokens and log-probabilities, ending with an EOS."""

    def greedy(model, prompt, max_new_tokens, eos_id=None, min_new_tokens=0):
        ids, log_probs = [int(token) for token in prompt], []
        start = len(ids)
        for step in range(max_new_tokens):
            scores = next_log_probs(model, ids)
            if step < min_new_tokens and eos_id is not None:
                scores[eos_id] = -math.inf
                scores = scores - scores.exp().sum().log()
            token = int(scores.argmax())
            ids.append(token)
            log_probs.append(float(scores[token]))
            if token == eos_id:
                break
        return ids[start:], log_probs

    return greedy
