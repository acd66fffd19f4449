"""Key/value cache of ``PaLM``, with the LoRA scope and the extra embedding it was filled with.

Generation passes both with the prompt only; later steps take them from the cache.
"""

from jaxtyping import Float, Int
from torch import Tensor

from lm_core.nn.kv_cache import KVCache, selected_rows
from palm_rlhf.model.inputs import is_same_everywhere


class PaLMCache(KVCache):
    """Keys and values, their LoRA scope, and the extra embedding if it is the same at all positions."""

    finetune_scope: str | None = None
    extra_embed: Tensor | None = None

    def remember(self, scope: str | None, extra_embed: Float[Tensor, "..."] | None) -> None:
        """Stores the settings of the forward that filled the cache."""
        self.finetune_scope = scope
        self.extra_embed = extra_embed if is_same_everywhere(extra_embed) else None

    def recalled(
        self, scope: str | None, disable_lora: bool, extra_embed: Float[Tensor, "..."] | None
    ) -> tuple[str | None, Float[Tensor, "..."] | None]:
        """Scope and extra embedding of a later forward, which may omit them.

        Raises:
            ValueError: the forward asks for another scope than the cache was filled with.
        """
        wanted = "disable_lora=True" if disable_lora else f"finetune_scope {scope!r}"
        if (disable_lora and self.finetune_scope is not None) or (scope is not None and scope != self.finetune_scope):
            raise ValueError(f"cache was filled with finetune_scope {self.finetune_scope!r}, got {wanted}")
        return self.finetune_scope, self.extra_embed if extra_embed is None else extra_embed

    def begin_steps(self) -> None:
        """Makes every later forward a static step; the extra embedding is copied, since rows change in place."""
        super().begin_steps()
        self.extra_embed = None if self.extra_embed is None else self.extra_embed.clone()

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Row ``r`` becomes what row ``index[r]`` was; the batch size may change."""
        super().reorder(index)
        if self.extra_embed is not None and self.extra_embed.ndim == 3 and self.extra_embed.shape[0] > 1:
            self.extra_embed = selected_rows(self.extra_embed, index, in_place=self.position is not None)
