"""Half-precision training and captions on a GPU, against the CPU's."""

import pytest
import torch

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_autocast_on_a_gpu_is_near_float32_on_the_cpu(make_coca, make_batch, dtype, loss):
    model, (text, _) = make_coca(vit=True, loss=loss), make_batch()
    images = torch.randn(4, 1, 8, 8)
    exact = model.loss(text, images)
    model.cuda()
    with torch.autocast("cuda", dtype=dtype):
        rough = model.loss(text.cuda(), images.cuda())
    # a scale that a scaler settles at: from its first one, 65536, it is meant to skip updates
    scaler = torch.amp.GradScaler("cuda", init_scale=1024, enabled=dtype == torch.float16)
    scaler.scale(rough.total).backward()

    torch.testing.assert_close(rough.caption.cpu(), exact.caption, atol=0.1, rtol=0)
    torch.testing.assert_close(rough.contrastive.cpu(), exact.contrastive, atol=0.3, rtol=0)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_on_a_gpu_equal_the_cpus(make_coca, make_batch, beams):
    model, (_, tokens) = make_coca().double().eval(), make_batch(dtype=torch.float64)
    expected = model.generate(image_tokens=tokens, max_new_tokens=12, beams=beams)

    found = model.cuda().generate(image_tokens=tokens.cuda(), max_new_tokens=12, beams=beams)

    assert torch.equal(found.cpu(), expected)
