"""``torch.compile`` takes PaLM's training forward whole, without a graph break.

Runs without the run-time shape checker.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.plain

IDS = torch.arange(24).reshape(2, 12) % 13
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
MASK = torch.ones(2, 12, dtype=torch.bool).index_fill(1, torch.tensor([0, 1]), False)


@pytest.fixture(autouse=True)
def no_compiled_code_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(palm, forward, **named):
    palm.zero_grad()
    loss = forward(IDS, return_loss=True, **named)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in palm.named_parameters() if p.grad is not None}


def check_equal(palm, compiled, **named):
    (loss, exact), (compiled_loss, ours) = gradients(palm, palm, **named), gradients(palm, compiled, **named)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=1e-6)
    assert list(ours) == list(exact)
    assert len(ours) > 0
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, {}),
        ({"qk_rmsnorm": True, "kv_heads": 1}, {"mask": MASK}),
        ({"use_xpos": False}, {"document_ids": DOCUMENTS}),
        ({"finetune_scopes": ("actor",)}, {"finetune_scope": "actor", "loss_normalizer": 7.0}),
    ],
)
def test_the_training_forward_compiles_without_graph_breaks(changes, named, make_palm):
    palm = make_palm(depth=1, **changes).train()
    compiled = torch.compile(palm, fullgraph=True, backend="eager")
    check_equal(palm, compiled, **named)


def test_forward_and_backward_trace_together_with_and_without_recomputation(make_palm):
    for gradient_checkpointing in (False, True):
        torch._dynamo.reset()
        palm = make_palm(depth=1, gradient_checkpointing=gradient_checkpointing).train()
        check_equal(palm, torch.compile(palm, fullgraph=True, backend="aot_eager"), mask=MASK)


@pytest.mark.parametrize("use_xpos", [True, False])
def test_equal_shapes_are_compiled_once_and_lengths_become_symbolic(use_xpos, make_palm):
    palm, counter = make_palm(depth=1, use_xpos=use_xpos).train(), CompileCounterWithBackend("eager")
    compiled = torch.compile(palm, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(IDS, return_loss=True)
    assert counter.frame_count == 1
    for length in (9, 10, 7, 8):
        ids = IDS[:, :length].contiguous()
        torch.testing.assert_close(compiled(ids, return_loss=True), palm(ids, return_loss=True), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 2


@torch.no_grad()
@pytest.mark.parametrize(("causal", "named"), [(True, {}), (True, {"return_only_embedding": True}), (False, {})])
def test_logits_and_features_compile(causal, named, make_palm):
    palm = make_palm(depth=1, causal=causal)
    ids = IDS if causal else IDS.masked_fill(~MASK, -1)  # an encoder masks negative ids
    compiled = torch.compile(palm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, **named)[MASK], palm(ids, **named)[MASK], rtol=1e-5, atol=1e-5)


def test_a_compiled_model_still_generates(make_palm):
    palm = make_palm(depth=1)
    expected = palm.generate(9, IDS[:, :3], temperature=0.0)
    compiled = torch.compile(palm, backend="eager")
    compiled(IDS)
    assert torch.equal(compiled.generate(9, IDS[:, :3], temperature=0.0), expected)
