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
