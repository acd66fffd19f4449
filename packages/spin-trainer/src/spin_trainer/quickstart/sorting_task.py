"""The quickstart's task, sorting six digits: small enough for two CPU cores, with a known right answer.

A prompt is six digits and a separator; its answer is the same digits in ascending order and an EOS.
"""

import torch

from spin_trainer.data.sft_data import Example, SFTDataset

DIGITS = 6
SEPARATOR, EOS = 10, 11
VOCABULARY = 12
MAX_SEQ_LEN = 2 * DIGITS + 2


def sorting_examples(count: int, *, seed: int = 0, without: SFTDataset | None = None) -> SFTDataset:
    """Random rows drawn with ``seed``, with no prompt of the rows in ``without``."""
    generator = torch.Generator().manual_seed(seed)
    taken = {example.prompt for example in without or ()}
    examples: list[Example] = []
    while len(examples) < count:
        digits = torch.randint(0, 10, (count - len(examples), DIGITS), generator=generator)
        ordered = digits.sort(dim=-1).values
        rows = [
            Example((*row, SEPARATOR), (*answer, EOS))
            for row, answer in zip(digits.tolist(), ordered.tolist(), strict=True)
        ]
        examples += [row for row in rows if row.prompt not in taken]
    return SFTDataset(examples)
