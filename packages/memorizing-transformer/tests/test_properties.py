"""The checks that must hold, over random configurations."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memorizing_transformer import KNNAttention, KNNMemory
from memorizing_transformer.memory.exact_search import CPU_CHUNK, CPU_TILE, SCREENED_CHUNK

PROPERTY = settings(deadline=None, derandomize=True, max_examples=25)


def naive(layer, x, memory, window, bias):
    """Attention of one row in loops: x (i, dim), memory (g, n, 2, d), window (g, m, 2, d), bias (h, i, j)."""
    weights, heads, d = layer.projections, layer.projections.heads, layer.projections.dim_head
    groups = layer.projections.key_heads
    q = (x @ weights.to_q.weight.T).view(len(x), heads, d)
    k, v = (x @ weights.to_kv.weight.T).view(len(x), 2, groups, d).unbind(1)
    out = torch.zeros(len(x), heads, d, dtype=x.dtype)
    for h in range(heads):
        g = h if groups > 1 else 0
        keys, values = torch.cat((window[g, :, 0], k[:, g])), torch.cat((window[g, :, 1], v[:, g]))
        scale, past = layer.log_scale[h, 0, 0].exp(), window.shape[1]
        for i in range(len(x)):
            query, seen = normalize(q[i, h], dim=0), past + i + 1
            near = normalize(keys[:seen], dim=1) @ query * scale + bias[h, i, :seen]
            far = memory[g, :, 0] @ query * scale
            if layer.gate is None:
                p = torch.cat((far, near)).softmax(0)
                out[i, h] = p @ torch.cat((memory[g, :, 1], values[:seen]))
                continue
            gate = torch.sigmoid(layer.gate[h, 0, 0]) if len(far) else 0.0
            out[i, h] = (1 - gate) * near.softmax(0) @ values[:seen]
            if len(far):
                out[i, h] += gate * far.softmax(0) @ memory[g, :, 1]
    return out.flatten(1) @ weights.to_out.weight.T


@PROPERTY
@given(
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
    st.integers(0, 12),
    st.integers(0, 5),
    st.integers(1, 6),
    st.integers(0, 2**16),
)
def test_with_room_for_all_memories_attention_is_dense_over_memory_and_local_keys(gate, own_keys, n, m, i, seed):
    torch.manual_seed(seed)
    layer = KNNAttention(
        dim=12, heads=2, dim_head=4, num_retrieved_memories=12, gate=gate, multi_head_keys=own_keys
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    groups = 2 if own_keys else 1
    memory = KNNMemory(4, 20, 2, heads=groups)
    past = torch.randn(2, groups, n, 2, 4)
    past[..., 0, :] = normalize(past[..., 0, :], dim=-1)
    memory.add(past if own_keys else past[:, 0])
    window, x = torch.randn(2, groups, m, 2, 4).double(), torch.randn(2, i, 12).double()
    bias = torch.randn(1, 2, i, m + i).double()
    out, _ = layer(
        x,
        knn_memory=memory,
        xl_memory=window if own_keys else window[:, 0],
        add_knn_memory=False,
        rel_pos_bias=bias,
    )
    expected = torch.stack([naive(layer, x[row], past[row].double(), window[row], bias[0]) for row in range(2)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@PROPERTY
@given(st.sets(st.integers(0, 3), max_size=3), st.integers(0, 6), st.integers(0, 2**16))
def test_clearing_rows_leaves_the_outputs_of_other_rows_bit_identical(tiny_model, rows, window, seed):
    model = tiny_model(seed=seed, xl_max_memories=window)
    ids = torch.randint(0, 20, (4, 24))
    kept, cleared = (model.create_knn_memories(batch_size=4) for _ in range(2))
    outputs = []
    for memories in (kept, cleared):
        xl = None
        for number, segment in enumerate(ids.split(8, dim=1)):
            if number == 2 and memories is cleared:
                memories.clear_memory(sorted(rows))
            out = model(segment, knn_memories=memories, xl_memories=xl)
            out, xl = out if window else (out, None)
        outputs.append(out)
    others = [row for row in range(4) if row not in rows]
    assert torch.equal(outputs[0][others], outputs[1][others])
    assert all(not torch.equal(outputs[0][row], outputs[1][row]) for row in rows)


class MadeTensors(TorchDispatchMode):
    """Shapes and sizes of all tensors that operations made (a view is not made)."""

    def __init__(self):
        super().__init__()
        self.shapes, self.nbytes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # below autograd `_is_view` knows nothing of views; a sparse tensor is as large as those it is made of
        given = {one.untyped_storage().data_ptr() for one in strided((args, kwargs))}
        made = [one for one in strided(result) if one.untyped_storage().data_ptr() not in given]
        self.shapes += [tuple(one.shape) for one in made]
        self.nbytes += [one.nbytes for one in made]
        return result


def strided(tree):
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor) and one.layout == torch.strided]


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("screens", "chunk"), [(False, CPU_CHUNK), (True, SCREENED_CHUNK)])
def test_neither_the_score_matrix_nor_the_widened_keys_are_ever_made_whole(storage, screens, chunk, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: screens)
    keys, queries, d = 4 * SCREENED_CHUNK, 4 * CPU_TILE, 8
    memory = KNNMemory(d, keys, 1, storage=storage)
    memory.add(torch.randn(1, keys, 2, d))

    def in_a_thread_of_its_own():  # which has no buffer for products yet
        with MadeTensors() as made:
            memory.retrieve(torch.randn(1, queries, d), 4)
        return made

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(in_a_thread_of_its_own).result()
    assert max(made.nbytes) == CPU_TILE * chunk * (2 if screens else 4)
    widened = [shape[0] for shape in made.shapes if shape[1:] == (d,) and shape[0] != queries]
    assert max(widened, default=0) <= chunk
