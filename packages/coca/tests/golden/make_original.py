"""Makes original.json: what ``CoCa-pytorch`` 0.1.0 computes with weights that a formula gives.

pip install --no-deps --target original CoCa-pytorch==0.1.0
PYTHONPATH=original python make_original.py
"""

import json
import math
from pathlib import Path

import torch
from coca_pytorch.coca_pytorch import CoCa

model = CoCa(
    dim=16,
    num_tokens=24,
    unimodal_depth=2,
    multimodal_depth=2,
    dim_latents=12,
    image_dim=20,
    num_img_queries=3,
    dim_head=8,
    heads=2,
    ff_mult=2,
    contrastive_loss_weight=0.0,
)
shapes = {name: list(value.shape) for name, value in model.state_dict().items() if "beta" not in name}
for number, (name, value) in enumerate(model.state_dict().items()):
    if "beta" not in name and "inv_freq" not in name:
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + number).view(value.shape)
        value.copy_(1 + 0.3 * wave if "gamma" in name else wave / math.sqrt(value.shape[-1]))
order = list(model.state_dict())
text = (torch.arange(3 * 7).view(3, 7) * 5) % 23 + 1
image_tokens = torch.sin(torch.arange(3 * 5 * 20) * 0.37).view(3, 5, 20)
padded = text.clone()
padded[1, 5:] = 0
text_embeds, image_embeds = model(text, image_tokens=image_tokens, return_embeddings=True)
golden = {
    "order": order,
    "shapes": shapes,
    "logits": model(text, image_tokens=image_tokens).detach()[:, ::3, ::5].tolist(),
    "caption_loss": model(text, image_tokens=image_tokens, return_loss=True).item(),
    "caption_loss_padded": model(padded, image_tokens=image_tokens, return_loss=True).item(),
    "text_embeds": text_embeds.detach()[:, ::4].tolist(),
    "image_embeds": image_embeds.detach()[:, ::4].tolist(),
}
Path(__file__).with_name("original.json").write_text(json.dumps(golden, indent=1) + "\n")
