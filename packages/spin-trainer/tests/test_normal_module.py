"""The small decoder is a normal module: every submodule is called, so hooks and wrapped layers take effect."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lm_core.generation.generate import generate
from spin_trainer import SPIN
from spin_trainer.model.response_scores import ResponseScores, collate
from spin_trainer.training.evaluation import evaluate

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4])]


@contextmanager
def calls_of(model):
    """Forwards of each submodule that has a forward of its own."""
    counts, hooks = {}, []
    for name, module in model.named_modules():
        if name and type(module).forward is not nn.Module.forward:
            counts[name] = 0
            count = lambda *_, name=name: counts.update({name: counts[name] + 1})  # noqa: E731
            hooks.append(module.register_forward_hook(count))
    yield counts
    for hook in hooks:
        hook.remove()


def assert_each_called(counts, times):
    assert {name.split(".")[0] for name in counts} == {"embedding", "rotary", "blocks", "norm"}
    assert counts == dict.fromkeys(counts, times)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_submodule_is_called_once_by_scores_and_twice_by_the_live_loss(make_model, mode):
    model = getattr(make_model(dropout=0.1), mode)()
    rows = collate([(1, 2, 10), (3, 10)], [(1, 2, 11), (3, 11)])
    with calls_of(model) as counts:
        ResponseScores(model)(*rows).sum().backward()
    assert_each_called(counts, 1)

    spin = SPIN(model)
    with calls_of(model) as counts:
        spin(torch.tensor([[1, 2, 3, 11]]), torch.tensor([[1, 2, 4, 11]]), torch.tensor([2])).backward()
    assert_each_called(counts, 2)  # by the reference and by the policy


def test_every_submodule_is_called_once_a_batch_of_evaluation(make_model, make_rows):
    model = make_model()
    with calls_of(model) as counts:
        evaluate(model, make_rows(4), max_seq_len=10, eos_id=11, exact_match=False)

    assert_each_called(counts, 1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_submodule_is_called_once_for_every_generated_token(make_model, use_cache):
    model = make_model()
    with calls_of(model) as counts:
        generate(model, PROMPTS, max_new_tokens=7, temperature=0.0, use_cache=use_cache)

    assert_each_called(counts, 7)


@pytest.mark.parametrize("name", [None, "embedding", "blocks.0", "blocks.1.attention", "blocks.0.proj_in", "norm"])
def test_decoding_with_a_cache_equals_decoding_without_also_under_a_hook_that_changes_an_output(make_model, name):
    model = make_model().double()
    greedy = {"max_new_tokens": 7, "temperature": 0.0}
    before = generate(model, PROMPTS, **greedy)
    if name is not None:
        model.get_submodule(name).register_forward_hook(lambda _, __, output: output.roll(1, -1) * 0.7)
    cached = generate(model, PROMPTS, **greedy)
    whole = generate(model, PROMPTS, **greedy, use_cache=False)

    assert name is None or (cached.log_probs - before.log_probs).abs().max().item() > 1e-3
    assert cached.tokens.equal(whole.tokens)
    torch.testing.assert_close(cached.log_probs, whole.log_probs, rtol=0, atol=1e-6)


# peft asks transformers for a name that newer transformers call otherwise
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_on_all_linear_layers_train_merge_and_save(train, make_model):
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[1, 2, 3, 4]])
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(make_model(), config)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    assert (adapted(ids) - make_model()(ids)).abs().max().item() > 1e-3

    _, result = train(model=adapted, iterations=2)
    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 2 * 2 * 2  # two factors, of two layers, in two blocks

    after = adapted(ids).detach()
    opened = peft.PeftModel.from_pretrained(make_model(), result.iterations_folder / "iteration-2")
    torch.testing.assert_close(opened(ids), after)
    torch.testing.assert_close(adapted.merge_and_unload()(ids), after)
