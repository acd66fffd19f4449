"""The embedded task: sort six digits. Small enough for two CPU cores, and the right answer is known.

A prompt is six digits and a separator, an answer the same digits in ascending order and an EOS.
"""

import torch

from spin_trainer.sft_data import Example, SFTDataset

DIGITS = 6
SEPARATOR, EOS = 10, 11
VOCABULARY = 12
MAX_SEQ_LEN = 2 * DIGITS + 2


def sorting_examples(count: int, *, seed: int = 0) -> SFTDataset:
    """Random rows, drawn by ``seed``.

    Args:
        count: how many.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, 10, (count, DIGITS), generator=generator)
    ordered = digits.sort(dim=-1).values
    return SFTDataset(
        [
            Example((*row, SEPARATOR), (*answer, EOS))
            for row, answer in zip(digits.tolist(), ordered.tolist(), strict=True)
        ]
    )
