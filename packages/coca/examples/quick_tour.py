"""Training on handwritten digits in half a minute, then captions, zero-shot classification and retrieval."""

import torch

from coca import CoCa, ImagePreprocessing, VisionTransformer, classify, encode_captions
from coca.data.captioned_images import CaptionedImages
from coca.data.digits import MEAN, STD, handwritten_digits
from coca.data.pair_batches import PairBatches
from coca.evaluation.evaluation import caption_images
from lm_core.tokenizers import ByteTokenizer

torch.manual_seed(0)
torch.set_num_threads(1)
tokenizer = ByteTokenizer()
preprocessing = ImagePreprocessing(image_size=8, channels=1, mean=(MEAN,), std=(STD,))
train, held_out = handwritten_digits().split(0.2)

vit = VisionTransformer(image_size=8, patch_size=2, channels=1, dim=48, depth=2, dim_head=12, heads=4)
coca = CoCa(
    dim=48,
    num_tokens=tokenizer.vocab_size,
    unimodal_depth=1,
    multimodal_depth=1,
    num_img_queries=8,
    dim_head=12,
    heads=4,
    img_encoder=vit,
    pad_id=tokenizer.pad_id,
    bos_id=tokenizer.bos_id,
    eos_id=tokenizer.eos_id,
)

batches = PairBatches(
    data=train, tokenizer=tokenizer, preprocessing=preprocessing, batch_size=48, pad_id=coca.pad_id, shift=1
)
optimizer = torch.optim.AdamW(coca.parameters(), lr=3e-3)
for step in range(150):
    batch = next(batches)
    loss = coca.loss(batch.text, batch.images)
    loss.total.backward()
    torch.nn.utils.clip_grad_norm_(coca.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    coca.clamp_logit_scale_()
    if step % 50 == 49:
        print(f"update {step + 1}: caption {loss.caption:.3f}, contrastive {loss.contrastive:.3f}")

few: CaptionedImages = held_out.select(range(6))
for name, caption in zip(few.names, caption_images(coca, few, tokenizer, preprocessing), strict=True):
    print(f"{name}: {caption}")

images = torch.cat([preprocessing.normalised(held_out.read(index)[None]) for index in range(len(held_out))])
classifier = coca.zero_shot_classifier(held_out.class_names, held_out.templates, tokenizer=tokenizer)
accuracy = (classify(coca, classifier, images) == torch.tensor(held_out.labels)).float().mean()
print(f"zero-shot: {accuracy:.2f} of {len(held_out)} held-out digits")

query = coca.encode_text(encode_captions(["the digit seven"], tokenizer, coca.pad_id))
nearest = (coca.encode_image(images) @ query[0]).topk(5).indices.tolist()
print("nearest to 'the digit seven':", [held_out.class_names[held_out.labels[index]] for index in nearest])
