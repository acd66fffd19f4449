"""Makes open_clip/ and clip_bpe/: a tiny CoCa with random weights and a tokenizer, and what open_clip does with them.

pip install --no-deps --target peers open_clip_torch==3.3.0 timm ftfy regex wcwidth torchvision
pip install --target peers "transformers==4.55.4"  # later ones lack the beam search that open_clip calls
PYTHONPATH=peers python make_open_clip.py
"""

import gzip
import json
from pathlib import Path

import open_clip
import open_clip.coca_model as coca_model
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from transformers import LogitNormalization, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

FOLDER = Path(__file__).with_name("open_clip")
BPE = FOLDER.with_name("clip_bpe")
TEXT = {"context_length": 12, "vocab_size": 40, "width": 16, "heads": 4, "layers": 2}
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 24,
        "head_width": 8,
        "patch_size": 8,
        "attentional_pool": True,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "layers": 1, "attn_pooler_heads": 4},
    "custom_text": True,
}
BOS, EOS = 38, 39
MERGES = "bpe_simple_vocab_16e6.txt.gz"
CAPTIONS = [
    "A photo of a dog.",
    "two  cats\tsitting\non the BEACH!",
    "it's 2024, isn't it? they'll we've I'd you're I'm",
    "café naïve Ü ÄÖ",
    "狗在海滩上",
    "собака на пляже",
    "🐶 on-the-beach @home #1 $3.50",
    "don't!!! 'stop' \"quotes\" a_b a/b",
    "hello!world",
]

torch.manual_seed(0)
arguments = {name: value for name, value in CONFIG.items() if name != "custom_text"}
model = coca_model.CoCa(**arguments).eval()
with torch.no_grad():
    for name, value in model.named_parameters():  # no tensor at its initial constant
        if value.ndim < 2 or "ln_" in name:
            value += 0.3 * torch.randn_like(value)
        else:
            value *= 3 if "attn" in name else 2  # captions that depend on images and positions
    model.text_decoder.text_projection.normal_(std=1.0)  # it is never initialised
    model.text.token_embedding.weight.normal_(std=0.5)
    model.logit_scale.fill_(2.0)

images = torch.sin(torch.arange(3 * 3 * 16 * 16) * 0.37).view(3, 3, 16, 16)
text = torch.zeros(3, 12, dtype=torch.long)
for row, length in enumerate((5, 12, 9)):
    text[row, :length] = (torch.arange(length) * 7 + 11 * row) % 37 + 1
    text[row, 0], text[row, length - 1] = BOS, EOS
golden = {"text": text.tolist()}
with torch.no_grad():
    out = model(images, text)
    golden["image_features"] = out["image_features"].tolist()
    golden["text_features"] = out["text_features"].tolist()
    golden["logits"] = out["logits"].tolist()
    model.text.correct_cls_mask = True
    golden["text_features_correct_cls_mask"] = model.encode_text(text).tolist()
    model.text.correct_cls_mask = False
    special = {"sot_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    settings = {"seq_len": 11, "min_seq_len": 2, **special}
    golden["greedy"] = model.generate(images, generation_type="top_k", top_k=1, **settings).tolist()
    # open_clip's generate adds logits, not log-probabilities, over the beams; normalised here
    golden["beams"] = model._generate_beamsearch(
        images,
        num_beams=4,
        num_beam_groups=1,
        min_seq_len=2,
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(max_length=11)]),
        logit_processor=LogitsProcessorList([LogitNormalization()]),
        **{name: torch.tensor([value]) if name == "eos_token_id" else value for name, value in special.items()},
    ).tolist()
FOLDER.mkdir(exist_ok=True)
save_file(model.state_dict(), FOLDER / "open_clip_model.safetensors")
preprocess = {"size": 16, "mode": "RGB", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic"}
content = {"model_cfg": CONFIG, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
(FOLDER / "open_clip_config.json").write_text(json.dumps(content, indent=1) + "\n")
# the tokenizer, with the first 600 of CLIP's pairs
lines = gzip.decompress((Path(open_clip.__file__).parent / MERGES).read_bytes()).decode().split("\n")[:601]
BPE.mkdir(exist_ok=True)
(BPE / MERGES).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
tokenizer = SimpleTokenizer(str(BPE / MERGES))
golden["tokens"] = {caption: tokenizer.encode(caption) for caption in CAPTIONS}
golden["decoded"] = {caption: tokenizer.decode(ids) for caption, ids in golden["tokens"].items()}
(FOLDER.parent / "open_clip.json").write_text(json.dumps(golden) + "\n")
