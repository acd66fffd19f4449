"""What only a GPU shows: memories that live and are searched there, equal to the CPU's."""

import pytest
import torch

from memorizing_transformer import KNNMemory

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_memory_on_a_gpu_finds_what_the_cpus_finds_past_a_wrap(storage):
    generator = torch.Generator().manual_seed(0)
    here, there = (KNNMemory(16, 100, 2, storage=storage, device=device) for device in ("cpu", "cuda"))
    for _ in range(3):
        kv = torch.randn(2, 70, 2, 16, generator=generator)
        here.add(kv)
        there.add(kv.cuda())
    queries = torch.randn(2, 40, 16, generator=generator)
    found, expected = there.retrieve(queries.cuda(), 8), here.retrieve(queries, 8)
    assert found.positions.is_cuda
    assert torch.equal(found.positions.cpu(), expected.positions)
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_adding_and_searching_on_a_gpu_wait_for_nothing(storage):
    memory = KNNMemory(16, 100, 4, storage=storage, device="cuda")
    kv, queries = torch.randn(4, 70, 2, 16).cuda(), torch.randn(4, 40, 16).cuda()
    memory.add(kv)
    memory.retrieve(queries, 8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.add(kv)
        memory.retrieve(queries, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_on_a_gpu_reads_its_memories_and_gives_the_logits_of_the_cpu(tiny_model, read_in_segments):
    settings = {"xl_max_memories": 4}
    here, there = tiny_model(**settings), tiny_model(**settings).cuda()
    ids = torch.randint(0, 20, (2, 40))
    memories = [model.create_knn_memories(batch_size=2) for model in (here, there)]
    expected, _ = read_in_segments(here, ids, memories[0])
    found, _ = read_in_segments(there, ids.cuda(), memories[1])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)  # float64
    assert memories[0].sizes == memories[1].sizes


def test_half_precision_training_on_a_gpu_is_finite_and_near_float32(tiny_model):
    model = tiny_model(xl_max_memories=4).float().cuda()
    ids, window, losses = torch.randint(0, 20, (2, 8)).cuda(), None, {}
    for precision in (torch.float32, torch.bfloat16):
        memories = model.create_knn_memories(batch_size=2)
        window = None
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
                losses[precision], window = model(ids, memories, window, ids)
        losses[precision].backward()
    assert losses[torch.bfloat16].item() == pytest.approx(losses[torch.float32].item(), rel=0.1)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
