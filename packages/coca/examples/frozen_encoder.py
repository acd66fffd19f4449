"""A frozen Hugging Face vision model as CoCa's encoder: tokens are computed once, and only the decoder trains.

The encoder here is built from a configuration, so that nothing is downloaded; with a pretrained one, replace it by
``transformers.AutoModel.from_pretrained("google/vit-base-patch16-224-in21k")``. A timm model works the same way:
``timm.create_model("vit_small_patch16_224", pretrained=True, num_classes=0)``.
"""

import sys

import torch

from coca import CoCa

try:
    import transformers
except ImportError:
    sys.exit('this example needs the extra "hf"')

torch.manual_seed(0)
config = transformers.ViTConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8
)
encoder = transformers.ViTModel(config)
coca = CoCa(
    dim=64,
    num_tokens=100,
    unimodal_depth=1,
    multimodal_depth=1,
    num_img_queries=8,
    dim_head=16,
    heads=4,
    img_encoder=encoder,  # its width, 48, is read from its configuration
    freeze_img_encoder=True,
    pooling="cascade",
    bos_id=1,
    eos_id=2,
)
trainable = [parameter for parameter in coca.parameters() if parameter.requires_grad]
print(f"{sum(p.numel() for p in trainable):,} of {sum(p.numel() for p in coca.parameters()):,} parameters train")

images = torch.randn(8, 3, 32, 32)
texts = torch.randint(3, 100, (8, 12))
texts[:, 0], texts[:, -1] = 1, 2  # BOS and EOS
# A frozen encoder returns the same tokens every time: compute them once and pass them instead of the images.
with torch.no_grad():
    tokens = coca.img_encoder(images)
optimizer = torch.optim.AdamW(trainable, lr=3e-3)
for step in range(60):
    loss = coca.loss(texts, image_tokens=tokens)
    loss.total.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"update {step + 1}: caption {loss.caption:.3f}, contrastive {loss.contrastive:.3f}")

captions = coca.eval().generate(images, max_new_tokens=11)
print(f"captions reproduced exactly: {(captions == texts[:, 1:]).all(dim=1).sum()} of 8")
