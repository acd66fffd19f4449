"""CoCa's text tower and a PaLM read with one tokenizer file: what one writes the other reads, id for id.

python coca_and_palm_share_a_tokenizer.py
"""

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from coca import CoCa, VisionTransformer
from lm_core import load_tokenizer
from palm_rlhf import PaLM

torch.manual_seed(0)
captions = ["a red square", "a blue circle", "two red circles", "a blue square beside a circle"]

folder = Path(tempfile.mkdtemp())
made = Tokenizer(models.BPE(unk_token="[UNK]"))
made.normalizer = normalizers.Lowercase()
made.pre_tokenizer = pre_tokenizers.Whitespace()
made.train_from_iterator(
    captions, trainers.BpeTrainer(special_tokens=["[PAD]", "[UNK]", "[BOS]", "[EOS]"], vocab_size=80)
)
PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]"
).save_pretrained(folder)

tokenizer = load_tokenizer(folder)  # the one file
special = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
vit = VisionTransformer(image_size=16, patch_size=8, dim=32, depth=1, heads=2)
coca = CoCa(
    dim=32, num_tokens=tokenizer.vocab_size, unimodal_depth=1, multimodal_depth=1, img_encoder=vit, **special
).eval()
palm = PaLM(num_tokens=tokenizer.vocab_size, dim=32, depth=1, dim_head=16, heads=2).eval()

rows = [torch.tensor(tokenizer.encode(text, add_bos=True, add_eos=True)) for text in captions]
text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
mask = torch.arange(text.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
latents = coca.encode_text(text, mask=mask)
logits = palm(text, mask=mask)
print("texts to latents", tuple(latents.shape), "and to logits", tuple(logits.shape))

written = coca.generate(torch.randn(1, 3, 16, 16), max_new_tokens=6, temperature=0.0)  # untrained: some tokens
print("CoCa writes", repr(tokenizer.decode(written[0])), "and PaLM reads on from it:")
prompt = torch.cat((torch.tensor([tokenizer.bos_id]), written[0]))[None]
print(repr(tokenizer.decode(palm.generate(prompt=prompt, max_new_tokens=4, temperature=0.0)[0])))

coca.save_pretrained(folder / "coca")
palm.save_pretrained(folder / "palm")
assert [load_tokenizer(folder).encode(caption) for caption in captions] == [tokenizer.encode(c) for c in captions]
assert torch.allclose(CoCa.from_pretrained(folder / "coca").eval().encode_text(text, mask=mask), latents)
assert torch.equal(PaLM.from_pretrained(folder / "palm").eval()(text, mask=mask), logits)
