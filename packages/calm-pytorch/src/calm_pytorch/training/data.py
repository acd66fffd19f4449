"""Examples as arguments of ``CALM.forward``: batches of any data set, and pieces of texts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calm_pytorch.training.state_cache import StateCache
from lm_core.data.documents import read_texts


class Batches:
    """Makes batches of examples.

    Args:
        names: names of the entries of an example that is a tuple.
        collate_fn: makes a batch of examples; torch's default stacks tensors.
        device: device that the tensors are moved to.
    """

    def __init__(
        self, names: Sequence[str], collate_fn: Callable[[list[Any]], Any] | None, device: torch.device
    ) -> None:
        self.names = tuple(names)
        self.collate_fn = collate_fn
        self.device = device

    def of(self, dataset: Any, indices: Sequence[int], cache: StateCache | None = None) -> dict[str, Any]:
        """The examples of these indices, as arguments.

        Args:
            dataset: with ``dataset[i]``.
            indices: indices of the examples.
            cache: whose states take the place of prompts.

        Raises:
            ValueError: an example holds another number of things than there are names.
        """
        from accelerate.utils import send_to_device
        from torch.utils.data import default_collate

        batch = (self.collate_fn or default_collate)([dataset[index] for index in indices])
        if not isinstance(batch, dict):
            if len(batch) != len(self.names):
                raise ValueError(f"data_kwarg_names must name what an example holds, got {self.names} for {len(batch)}")
            batch = dict(zip(self.names, batch, strict=True))
        batch = send_to_device(batch, self.device)
        if cache is not None:
            prompt, mask = batch.pop("prompt", None), batch.pop("prompt_mask", None)
            batch["augment_states"] = cache.states(indices, prompt, mask)
        return batch


class TextExamples:
    """Pieces of texts in the anchor's ids; with static prompts each augment reads the piece before.

    Args:
        source: texts, as ``lm_core.data.documents.read_texts`` takes them.
        tokenizer: Hugging Face tokenizer of the anchor.
        length: tokens of a piece.
        prompts: whether each example begins with a prompt, the piece before it.

    Raises:
        FileNotFoundError, ValueError: as ``read_texts``; also if no text is long enough, or a document is no text.
    """

    def __init__(self, source: Any, tokenizer: Any, length: int, *, prompts: bool) -> None:
        self.length = length
        self.prompts = prompts
        self.pieces: list[list[int]] = []
        needed = 2 * length if prompts else length
        for document in read_texts(source):
            if not isinstance(document, str | bytes):
                raise ValueError(f"{source} must hold texts, got {type(document).__name__}")
            text = document if isinstance(document, str) else document.decode(errors="replace")
            ids = tokenizer(text)["input_ids"]
            self.pieces += [ids[start : start + needed] for start in range(0, len(ids) - needed + 1, length)]
        if not self.pieces:
            raise ValueError(f"{source} must hold a text of at least {needed} tokens")

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = torch.tensor(self.pieces[index])
        return {"prompt": piece[: self.length], "seq": piece[self.length :]} if self.prompts else {"seq": piece}
