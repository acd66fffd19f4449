"""Makes coca-2.0.0/ and coca-2.0.0.json: a checkpoint as this package's first version wrote it, and its results.

PYTHONPATH=SOURCES_OF_2.0.0 python make_checkpoint.py
"""

import json
from pathlib import Path

import torch

from coca import CoCa, ImagePreprocessing, VisionTransformer

HERE = Path(__file__).parent

torch.manual_seed(0)
vit = VisionTransformer(image_size=4, patch_size=2, channels=1, dim=8, depth=1, dim_head=4, heads=2, ff_mult=1)
sizes = {"dim": 8, "num_tokens": 11, "unimodal_depth": 1, "multimodal_depth": 1, "dim_head": 4, "heads": 2}
model = CoCa(**sizes, img_encoder=vit, num_img_queries=2, ff_mult=1, pooling="cascade", bos_id=1, eos_id=2).eval()
torch.nn.init.normal_(model.token_emb.weight)
model.preprocessing = ImagePreprocessing(image_size=4, channels=1)
model.save_pretrained(HERE / "coca-2.0.0", overwrite=True)
text = (torch.arange(3 * 5).view(3, 5) * 7) % 8 + 3
images = torch.sin(torch.arange(3 * 16) * 0.37).view(3, 1, 4, 4)
loss = model.loss(text, images)
results = {
    "logits": model(text, images).tolist(),
    "losses": [loss.caption.item(), loss.contrastive.item()],
    "captions": model.generate(images, max_new_tokens=6).tolist(),
}
(HERE / "coca-2.0.0.json").write_text(json.dumps(results) + "\n")
