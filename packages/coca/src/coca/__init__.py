"""CoCa, Contrastive Captioners: image-text models that compare, retrieve, classify and caption.

>>> import torch
>>> from coca import CoCa, VisionTransformer
>>> vit = VisionTransformer(image_size=32, patch_size=8, dim=64, depth=2)
>>> coca = CoCa(dim=64, num_tokens=256, unimodal_depth=1, multimodal_depth=1, img_encoder=vit, bos_id=1)
>>> text, images = torch.randint(1, 256, (4, 16)), torch.randn(4, 3, 32, 32)
>>> coca(text, images, return_loss=True).backward()
>>> coca.generate(images, max_new_tokens=8).shape
torch.Size([4, 8])
"""

from coca.evaluation.retrieval import retrieval_metrics
from coca.evaluation.zero_shot import classify, zero_shot_classifier
from coca.interop.open_clip import from_open_clip, to_open_clip
from coca.model.clip_vit import CLIPVisionTransformer
from coca.model.coca import CoCa, CoCaLoss
from coca.model.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss
from coca.model.image_encoders import ImageEncoder
from coca.model.preprocessing import ImagePreprocessing
from coca.model.text_layout import encode_captions
from coca.model.vit import VisionTransformer

__all__ = [
    "CLIPVisionTransformer",
    "CoCa",
    "CoCaLoss",
    "ImageEncoder",
    "ImagePreprocessing",
    "VisionTransformer",
    "classify",
    "encode_captions",
    "from_open_clip",
    "retrieval_metrics",
    "sigmoid_contrastive_loss",
    "softmax_contrastive_loss",
    "to_open_clip",
    "zero_shot_classifier",
]

__version__ = "2.0.0"
