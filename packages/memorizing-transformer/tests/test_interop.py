"""Weights of the original package, against logits that it gave."""

from pathlib import Path

import pytest
import torch

from memorizing_transformer import MemorizingTransformer
from memorizing_transformer.interop import convert_checkpoint, from_memorizing_transformers_pytorch

# Made with memorizing-transformers-pytorch 0.4.1, torch.manual_seed(0):
#   model = MemorizingTransformer(num_tokens=30, dim=16, depth=3, dim_head=8, heads=2, knn_attn_heads=2,
#       memorizing_layers=(2,), num_retrieved_memories=4, max_knn_memories=64, ff_mult=2).eval()
#   ids = torch.randint(0, 30, (2, 20)); with model.knn_memories_context(batch_size=2) as m: logits = model(ids, m)
#   torch.save({"state": model.state_dict(), "ids": ids, "logits": logits}, "original.pt")
GOLDEN = Path(__file__).with_name("fixtures") / "original.pt"


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN, weights_only=True)


def test_a_first_segment_has_the_originals_logits(golden):
    model = from_memorizing_transformers_pytorch(golden["state"], dim_head=8, num_retrieved_memories=4).eval()
    memories = model.create_knn_memories(batch_size=2)
    logits = model(golden["ids"], knn_memories=memories)
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)
    assert memories.sizes == [[20, 20]]


@pytest.mark.archives
def test_a_file_is_converted_to_a_folder(golden, tmp_path):
    torch.save(golden["state"], tmp_path / "old.pt")
    convert_checkpoint(tmp_path / "old.pt", tmp_path / "new", dim_head=8)
    model = MemorizingTransformer.from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(model(golden["ids"]), golden["logits"], atol=1e-5, rtol=0)


@pytest.mark.plain
def test_other_weights_are_refused_by_name(golden):
    with pytest.raises(ValueError, match="dim_head must be 8"):
        from_memorizing_transformers_pytorch(golden["state"])
    with pytest.raises(ValueError, match="surplus"):
        from_memorizing_transformers_pytorch({**golden["state"], "surplus": torch.zeros(1)}, dim_head=8)
    with pytest.raises(ValueError, match="missing keys"):
        from_memorizing_transformers_pytorch({"token_emb.weight": torch.zeros(3, 4)})
