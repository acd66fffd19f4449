"""On a GPU: models that are there are composed there, train there, and generate there what the CPU does."""

import pytest
import torch

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("shared", [False, True], ids=["prompt", "shared"])
@pytest.mark.parametrize("kind", ["x-transformers", "llama"])
def test_models_on_a_gpu_are_composed_and_give_the_logits_of_the_cpu(model_of, compose, ids, kind, shared):
    anchor, augment = model_of(kind).cuda(), model_of(kind, seed=1).cuda()
    calm = compose(anchor, augment, trained=True, shared=shared)
    seq, prompt = ids(2, 9), ids(2, 5, seed=1)
    prompt[0, 3:] = -1
    inputs, inputs_there = ({}, {}) if shared else ({"prompt": prompt}, {"prompt": prompt.cuda()})
    there = calm(seq.cuda(), return_loss=False, **inputs_there)
    calm(seq.cuda(), **inputs_there).backward()
    assert all(bool(p.grad.isfinite().all()) for p in calm.trainable_parameters())
    settings = {"temperature": 0.0, "filter_fn": None}
    outs = [calm.generate(seq.cuda(), 16, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*outs)
    here = calm.cpu()(seq, return_loss=False, **inputs)
    assert torch.allclose(there.cpu(), here, atol=1e-3)


@pytest.mark.parametrize("shared", [False, True], ids=["prompt", "shared"])
def test_an_augment_on_the_cpu_is_read_by_an_anchor_on_a_gpu(model_of, compose, ids, shared):
    calm = compose(model_of("llama"), model_of("gpt2", seed=1), trained=True, shared=shared)
    seq, prompt = ids(2, 9), ids(2, 5, seed=1)
    inputs = {} if shared else {"prompt": prompt}
    here = calm(seq, return_loss=False, **inputs)
    settings = {"temperature": 0.0, "filter_fn": None}
    expected = calm.generate(seq, 16, **settings)
    calm.anchor_llm.cuda()
    calm.cross_attns.cuda()
    assert torch.allclose(calm(seq.cuda(), return_loss=False, **inputs).cpu(), here, atol=1e-3)
    calm(seq.cuda(), **inputs).backward()
    for use_cache in (True, False):
        assert torch.equal(calm.generate(seq.cuda(), 16, use_cache=use_cache, **settings).cpu(), expected)
