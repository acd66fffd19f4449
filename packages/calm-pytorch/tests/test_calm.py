"""A composition begins as the anchor, trains only its cross-attentions, and leaves no trace outside its calls."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from calm_pytorch import (
    CALM,
    AugmentParams,
    CrossAttentionBlock,
    ExtractHiddensWrapper,
    freeze_all_layers_,
    x_transformer_blocks,
)

KINDS = ["x-transformers", "gpt2", "llama", "neox", "bloom", "plain"]


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits_of(output):
    return getattr(output, "logits", output)


# --------------------------------------------------------------------------------------------------- the first step


@pytest.mark.parametrize("shared", [False, True], ids=["prompt", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_composed_logits_are_those_of_the_anchor_bit_for_bit(model_of, compose, ids, kind, shared):
    anchor, augment = model_of(kind), model_of("x-transformers" if kind == "gpt2" else kind, seed=1)
    freeze_all_layers_(anchor)  # products round differently for weights that want a gradient
    expected = logits_of(anchor(ids(2, 9)))
    calm = compose(anchor, augment, shared=shared)
    logits = calm(ids(2, 9), prompt=None if shared else ids(2, 5, seed=1), return_loss=False)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_cross_attention_changes_the_logits(model_of, compose, ids, kind):
    anchor = model_of(kind)
    expected = logits_of(anchor(ids(2, 9)))
    calm = compose(anchor, model_of(kind, seed=1), trained=True)
    assert (calm(ids(2, 9), prompt=ids(2, 5, seed=1), return_loss=False) - expected).abs().max() > 1e-3


def test_the_loss_is_the_mean_cross_entropy_of_next_tokens(model_of, compose, ids):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True)
    seq, prompt = ids(2, 9), ids(2, 5, seed=1)
    logits = calm(seq[:, :-1], prompt=prompt, return_loss=False)
    assert torch.allclose(calm(seq, prompt=prompt), F.cross_entropy(logits.flatten(0, 1), seq[:, 1:].flatten()))

    counted = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    per_token = F.cross_entropy(logits.transpose(1, 2), seq[:, 1:], reduction="none")
    expected = (per_token * counted[:, 1:]).sum() / counted[:, 1:].sum()
    assert torch.allclose(calm(seq, prompt=prompt, mask=counted), expected)
    assert torch.allclose(calm(seq, prompt=prompt, mask=counted, reduction="sum"), expected * counted[:, 1:].sum())


def test_hidden_states_after_a_block_are_the_naive_cross_attention_of_them(model_of, compose, ids):
    """The paper's formula in float64, one row and one head at a time."""
    anchor, augment = model_of("plain").double(), model_of("plain", seed=1, dim=16).double()
    calm = compose(
        anchor,
        AugmentParams(augment, transformer_blocks="layers", connections=[(2, 3)]),
        trained=True,
        attn_kwargs={"heads": 2, "dim_head": 8},
    ).double()
    seq, prompt = ids(1, 6), ids(1, 4, seed=1)
    (stream,) = ExtractHiddensWrapper(anchor, [anchor.layers[2]])(seq)
    (read,) = ExtractHiddensWrapper(augment, [augment.layers[1]])(prompt)
    block = calm.cross_attns[0][0]
    weights = dict(block.named_parameters())
    context = read[0] @ weights["context_proj.weight"].T + weights["context_proj.bias"]
    expected = []
    for x in stream[0]:
        normed = x / x.norm() * x.shape[0] ** 0.5 * weights["pre_rmsnorm.g"]
        gates = (weights["attn.to_v_head_gate.weight"] @ normed + weights["attn.to_v_head_gate.bias"]).sigmoid()
        heads = []
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            query = weights["attn.to_q.weight"][rows] @ normed
            keys, values = (context @ weights[f"attn.to_{part}.weight"][rows].T for part in "kv")
            heads.append(((keys @ query) * 8**-0.5).softmax(0) @ values * gates[head])
        expected.append(x + weights["attn.to_out.weight"] @ torch.cat(heads))
    logits = anchor.head(torch.stack(expected))
    assert torch.allclose(calm(seq, prompt=prompt, return_loss=False)[0], logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 1}, {"gate_value_heads": False}, {"pre_rmsnorm": False}])
def test_cross_attention_computes_what_x_transformers_own_attention_does(options, n):
    from x_transformers.x_transformers import Attention

    torch.manual_seed(0)
    settings = {
        "heads": 2,
        "dim_head": 8,
        "flash": True,
        "zero_init_output": False,
        "gate_value_heads": True,
        **options,
    }
    block = CrossAttentionBlock(dim=12, dim_context=10, **settings)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    settings.pop("pre_rmsnorm", None)
    library = Attention(dim=12, dim_context=12, **settings)
    library.load_state_dict(block.attn.state_dict())
    x, hidden = torch.randn(2, n, 12), torch.randn(2, 7, 10)
    mask = torch.rand(2, 7) > 0.4
    mask[:, 0] = True
    expected = x + library(block.pre_rmsnorm(x), block.context_proj(hidden), context_mask=mask)
    assert torch.allclose(block(x, hidden, mask=mask), expected, atol=1e-5)
    assert torch.equal(block(x, context=block.context(hidden), mask=mask), block(x, hidden, mask=mask))


# ------------------------------------------------------------------------------------------------- nothing else learns


@pytest.mark.parametrize("kind", ["x-transformers", "llama", "plain"])
def test_after_training_anchor_and_augment_are_bit_identical(model_of, compose, snapshot, ids, kind):
    anchor, augment = model_of(kind), model_of("plain", seed=1)
    before = snapshot(anchor), snapshot(augment)
    calm = compose(anchor, augment).train()
    optimizer = torch.optim.AdamW(calm.parameters(), lr=1e-2)
    learned = snapshot(calm.cross_attns)
    for step in range(200):
        optimizer.zero_grad()
        calm(ids(2, 6, seed=step), prompt=ids(2, 4, seed=step + 1)).backward()
        optimizer.step()
    for model, old in zip((anchor, augment), before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in snapshot(model).items())
    changed = [name for name, tensor in snapshot(calm.cross_attns).items() if not torch.equal(tensor, learned[name])]
    assert len(changed) == len(learned)


def test_parameters_named_parameters_and_state_dict_are_those_of_a_module(model_of, compose):
    anchor, augment = model_of("gpt2"), model_of("plain", seed=1)
    calm = compose(anchor, augment)
    own = {id(p) for part in (anchor, augment, calm.cross_attns) for p in part.parameters()}
    assert {id(p) for p in calm.parameters()} == {id(p) for _, p in calm.named_parameters()} == own
    assert {id(p) for p in calm.trainable_parameters()} == {id(p) for p in calm.parameters() if p.requires_grad}
    state = calm.state_dict(prefix="nested.", keep_vars=True)
    assert all(name.startswith("nested.") for name in state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        calm.load_state_dict({"other": torch.zeros(1)})
    twin = copy.deepcopy(calm)
    twin.load_state_dict(calm.state_dict())
    assert {name.split(".")[0] for name in calm.state_dict()} == {"anchor_llm", "augment_llms", "cross_attns"}


def test_moving_dtype_moves_the_models_that_are_called(model_of, compose, ids):
    calm = compose(model_of("llama"), model_of("plain", seed=1), trained=True).double()
    assert calm(ids(1, 4), prompt=ids(1, 3), return_loss=False).dtype == torch.float64


def test_a_deep_copy_composes_its_own_models(model_of, compose, ids):
    calm = compose(model_of("x-transformers"), model_of("plain", seed=1), trained=True)
    twin = copy.deepcopy(calm)
    inputs = {"prompt": ids(1, 3), "return_loss": False}
    expected = calm(ids(1, 4), **inputs)
    with torch.no_grad():
        for parameter in calm.parameters():
            parameter.zero_()
    assert torch.equal(twin(ids(1, 4), **inputs), expected)


# ------------------------------------------------------------------------------------------------------ no trace left


@pytest.mark.parametrize("kind", ["x-transformers", "gpt2", "plain"])
def test_outside_a_forward_the_models_behave_as_if_never_composed(model_of, compose, ids, kind):
    anchor, augment = model_of(kind), model_of(kind, seed=1)
    for model in (anchor, augment):
        freeze_all_layers_(model)  # products round differently for weights that want a gradient
    expected = logits_of(anchor(ids(2, 5))), logits_of(augment(ids(2, 5)))
    calm = compose(anchor, augment, trained=True)
    composed = calm(ids(2, 5), prompt=ids(2, 4), return_loss=False)
    assert torch.equal(logits_of(anchor(ids(2, 5))), expected[0])
    assert torch.equal(logits_of(augment(ids(2, 5))), expected[1])
    assert torch.allclose(calm(ids(2, 5), prompt=ids(2, 4), return_loss=False), composed, atol=1e-5)
    assert hooks_in(calm) == 0


@pytest.mark.parametrize(("kind", "shared"), [("x-transformers", False), ("x-transformers", True), ("gpt2", False)])
def test_nothing_grows_over_a_hundred_forwards(model_of, compose, ids, kind, shared):
    import gc

    calm = compose(model_of(kind), model_of("gpt2" if shared else "plain", seed=1), trained=True, shared=shared)
    counts = []
    for step in range(101):
        calm(ids(1, 5), prompt=None if shared else ids(1, 4)).item()
        if step in (0, 100):
            gc.collect()
            counts.append(sum(1 for entry in gc.get_objects() if issubclass(type(entry), torch.Tensor)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("where", ["augment", "anchor", "attention"])
def test_an_exception_leaves_nothing_behind(model_of, compose, ids, where):
    anchor, augment = model_of("plain"), model_of("plain", seed=1)
    calm = compose(anchor, augment, trained=True).train()
    expected = anchor.eval()(ids(2, 5))
    anchor.train()
    modes = [module.training for module in calm.modules()]
    place = {"augment": augment.layers[0], "anchor": anchor.layers[2], "attention": calm.cross_attns[0][0].attn.to_q}[
        where
    ]

    def fail(module, args):
        raise ArithmeticError("on purpose")

    handle = place.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="on purpose"):
        calm(ids(2, 5), prompt=ids(2, 4), anchor_llm_in_train_mode=False)
    handle.remove()
    assert [module.training for module in calm.modules()] == modes
    assert hooks_in(calm) == 0
    assert torch.equal(anchor.eval()(ids(2, 5)), expected)


def test_two_compositions_share_an_anchor(model_of, compose, ids):
    anchor = model_of("llama")
    first = compose(anchor, model_of("gpt2", seed=1), trained=True)
    alone = first(ids(1, 5), prompt=ids(1, 4), return_loss=False)
    second = compose(anchor, model_of("gpt2", seed=2), trained=True)
    other = second(ids(1, 5), prompt=ids(1, 4), return_loss=False)
    assert torch.equal(first(ids(1, 5), prompt=ids(1, 4), return_loss=False), alone)
    assert not torch.allclose(alone, other)


def test_construction_leaves_models_and_random_state_as_they_were(model_of, compose, snapshot):
    anchor, augment = model_of("plain").train(), model_of("plain", seed=1).train()
    before = snapshot(anchor), snapshot(augment)
    torch.manual_seed(1)
    random = torch.get_rng_state()
    CALM(
        anchor,
        AugmentParams(augment, transformer_blocks="layers", connections=[(1, 1)]),
        anchor_transformer_blocks="layers",
        attn_kwargs={"heads": 1, "dim_head": 2},
    )
    assert anchor.training
    assert augment.training
    for model, old in zip((anchor, augment), before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in snapshot(model).items())
    torch.set_rng_state(random)


def test_eval_holds_and_train_mode_reaches_the_anchor_only_when_asked(model_of, compose, ids):
    calm = compose(model_of("plain"), model_of("plain", seed=1))
    first, again = (calm(ids(2, 5), prompt=ids(2, 4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not calm.training
    seen = []
    calm.anchor_llm.dropout.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    calm.augment_llms[0].dropout.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    calm.train()
    calm(ids(2, 5), prompt=ids(2, 4))
    calm(ids(2, 5), prompt=ids(2, 4), anchor_llm_in_train_mode=False)
    layers = len(calm.anchor_llm.layers)
    read = 3
    assert seen == [False] * read + [True] * layers + [False] * read + [False] * layers
    assert calm.anchor_llm.training


# ---------------------------------------------------------------------------------------------- blocks and positions


@pytest.mark.parametrize("side", ["anchor", "augment"])
def test_a_position_before_a_block_is_the_one_after_the_block_before_it(model_of, compose, ids, side):
    logits = []
    for layer, position in ((1, "output"), (2, "input")):
        augment, anchor = {}, {}
        if side == "anchor":
            augment, anchor = {"connections": [(2, layer)]}, {"anchor_hidden_position": position}
        else:
            augment = {"connections": [(layer, 2)], "hidden_position": position}
        calm = compose(model_of("llama"), AugmentParams(model_of("gpt2", seed=1), **augment), trained=True, **anchor)
        logits.append(calm(ids(2, 5), prompt=ids(2, 4), return_loss=False))
    assert torch.equal(*logits)


def test_blocks_in_any_order_are_sorted_with_their_positions(model_of, compose, ids):
    logits = []
    for order in ([0, 1, 2], [2, 0, 1]):
        anchor, augment = model_of("plain"), model_of("plain", seed=1)
        positions = ["input", "output", "input"]
        params = AugmentParams(
            augment,
            transformer_blocks=[augment.layers[i] for i in order],
            hidden_position=[positions[i] for i in order],
            connections=[(1, 1), (2, 2), (3, 3)],
        )
        calm = compose(
            anchor,
            params,
            trained=True,
            anchor_transformer_blocks=[f"layers.{i}" for i in order],
            anchor_hidden_position=[positions[i] for i in order],
        )
        logits.append(calm(ids(2, 5), prompt=ids(2, 4), return_loss=False))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({}, [1, 3, 5]),
        ({"cross_attend": True}, [2, 5, 8]),
        ({"macaron": True}, [2, 5, 8]),
        ({"only_cross": True, "cross_attend": True}, [1, 3, 5]),
        ({"custom_layers": ("a", "f", "a", "f", "f")}, [1, 4]),
    ],
)
def test_x_transformer_blocks_are_the_ends_of_layers(options, ends):
    from x_transformers import Decoder, TransformerWrapper

    depth = {} if "custom_layers" in options else {"depth": 3}
    model = TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=Decoder(dim=8, heads=1, **depth, **options))
    layers = model.attn_layers.layers
    assert [id(block) for block in x_transformer_blocks(model)] == [id(layers[end][-1]) for end in ends]


def test_outputs_keep_their_type():
    import collections
    import dataclasses

    from calm_pytorch.model.hooks import with_hidden

    @dataclasses.dataclass
    class Output:
        name: str
        state: torch.Tensor

    Named = collections.namedtuple("Named", ["hidden", "other"])
    old, new = torch.zeros(1), torch.ones(1)
    for value in ((old, 3), [old, 3], Named(old, 3), Output("x", old), {"hidden": old, "n": 3}, (None, old)):
        changed = with_hidden(value, new)
        assert type(changed) is type(value)
        entries = (
            changed.values()
            if isinstance(changed, dict)
            else vars(changed).values()
            if isinstance(changed, Output)
            else changed
        )
        assert sum(entry is new for entry in entries) == 1
        assert not any(entry is old for entry in entries)


def test_several_augments_many_to_one_and_one_to_many(model_of, compose, ids):
    params = [
        AugmentParams(model_of("gpt2", seed=1), connections=[(2, 1), (2, 3), (4, 3)]),
        AugmentParams(model_of("x-transformers", seed=2), shared_sequence=True, connections=[(1, 3)]),
    ]
    calm = compose(model_of("llama"), *params, trained=True)
    one = calm(ids(2, 5), prompt=ids(2, 4), return_loss=False)
    assert torch.equal(one, calm(ids(2, 5), prompt=[ids(2, 4), None], return_loss=False))
    assert calm.connections == [((2, 1), (2, 3), (4, 3)), ((1, 3),)]
    assert "layer   2 (32) -> anchor layer   3 (32, output)" in calm.describe()


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_and_vision_models_are_read(model_of, compose, ids, kind):
    shape = (3, 8, 8) if kind == "vit" else None
    calm = compose(model_of("llama"), AugmentParams(model_of(kind, seed=1), input_shape=shape), trained=True)
    prompt = torch.randn(2, *shape) if shape else ids(2, 6, seed=3)
    changed = prompt + 1 if shape else (prompt + 1) % 40
    first, second = (calm(ids(2, 5), prompt=p, return_loss=False) for p in (prompt, changed))
    assert (first - second).abs().max() > 1e-3


def test_a_model_that_returns_its_hidden_states_needs_no_blocks(compose, model_of, ids):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(40, 12)

        def forward(self, ids):
            x = self.embedding(ids)
            return [x, x + 1]

    calm = compose(model_of("plain"), AugmentParams(Returning(), model_return_hiddens=True), trained=True)
    assert calm.connections == [((2, 3),)]
    assert calm(ids(2, 5), prompt=ids(2, 4), return_loss=False).shape == (2, 5, 40)


# -------------------------------------------------------------------------------------------------- work that is saved


def test_no_gradient_is_computed_below_the_first_connected_layer(model_of, compose, ids):
    calm = compose(
        model_of("plain"), AugmentParams(model_of("plain", seed=1), transformer_blocks="layers", connections=[(1, 3)])
    )
    needs = []
    for layer in calm.anchor_llm.layers:
        layer.register_forward_hook(lambda module, args, output: needs.append(output[0].requires_grad))
    loss = calm.train()(ids(2, 5), prompt=ids(2, 4))
    assert needs == [False, False, False]  # the third is connected after this hook
    assert loss.requires_grad


def test_augment_layers_above_the_last_one_read_are_not_run(model_of, compose, ids):
    augment = model_of("llama", seed=1)
    calm = compose(model_of("plain"), AugmentParams(augment, connections=[(2, 1)]))
    ran = []
    for number, layer in enumerate(augment.model.layers, start=1):
        layer.register_forward_hook(lambda module, args, output, number=number: ran.append(number))
    calm(ids(2, 5), prompt=ids(2, 4))
    assert ran == [1, 2] or ran == [1]


def test_states_read_once_give_the_logits_of_reading_again(model_of, compose, ids):
    calm = compose(model_of("llama"), model_of("bert", seed=1), trained=True)
    prompt = ids(2, 6, seed=2)
    prompt[0, 4:] = -1
    states = calm.augment_states(prompt)
    assert torch.equal(calm(ids(2, 5), augment_states=states), calm(ids(2, 5), prompt=prompt))
    assert not any(hidden.requires_grad for hidden in states.hiddens[0])


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    ("kind", "own"), [("x-transformers", True), ("llama", True), ("plain", True), ("llama", False)]
)
def test_gradients_with_activation_checkpointing_are_the_same(model_of, compose, ids, kind, own):
    anchor = without_dropout(model_of(kind))
    calm = compose(anchor, model_of("gpt2", seed=1), trained=True, shared=True).train()
    gradients = []
    for enabled in (False, True):
        if own:
            calm.gradient_checkpointing = enabled
        elif enabled:
            newer = getattr(anchor, "activation_checkpointing_enable", None)
            (newer or anchor.gradient_checkpointing_enable)({"use_reentrant": False})
        calm.zero_grad()
        calm(ids(2, 6)).backward()
        gradients.append([parameter.grad for parameter in calm.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_gradients_are_the_same_where_a_library_checkpoints_the_whole_call_of_a_block(model_of, compose, ids):
    """As Hugging Face does up to release 5.17: what a hook adds would be missing when the block runs again."""
    anchor, runs = without_dropout(model_of("plain")), []
    calm = compose(anchor, model_of("gpt2", seed=1), trained=True, shared=True).train()
    kind = type(anchor.layers[0])

    class Checkpointed(kind):
        def __call__(self, *args, **kwargs):
            return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)

        def forward(self, *args, **kwargs):
            runs.append(1)
            return super().forward(*args, **kwargs)

    calm(ids(2, 6)).backward()
    expected = [parameter.grad for parameter in calm.trainable_parameters()]
    calm.zero_grad()
    how = partial(checkpoint, use_reentrant=False)
    for layer in anchor.layers:
        layer.__class__, layer._gradient_checkpointing_func = Checkpointed, how
    calm(ids(2, 6)).backward()
    assert len(runs) > len(anchor.layers), "nothing was computed again"
    assert all(layer._gradient_checkpointing_func is how for layer in anchor.layers)
    for one, parameter in zip(expected, calm.trainable_parameters(), strict=True):
        assert torch.equal(one, parameter.grad)


@pytest.mark.parametrize("kind", ["x-transformers", "llama"])
def test_activation_checkpointing_keeps_less_for_the_backward_pass(model_of, compose, ids, kind):
    calm = compose(model_of(kind), AugmentParams(model_of("gpt2", seed=1), connections=[(4, 1)])).train()
    kept = []
    for enabled in (False, True):
        calm.gradient_checkpointing = enabled
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        frozen = {parameter.data_ptr() for parameter in calm.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            calm(ids(4, 33), prompt=ids(4, 5)).backward()
        kept.append(sum(size for place, size in sizes.items() if place not in frozen))
    assert kept[1] < 0.5 * kept[0]
