"""A composition in words: its models, its wiring, and what was added."""

from typing import Any


def describe(calm: Any) -> str:
    """The wiring and the share of added parameters, as text."""
    added = sum(parameter.numel() for parameter in calm.trainable_parameters())
    anchor = sum(parameter.numel() for parameter in calm.anchor_llm.parameters())
    lines = [f"anchor: {type(calm.anchor_llm).__name__}, {len(calm.anchor_blocks)} layers, {anchor:,} parameters"]
    for augment, attentions in zip(calm.augments, calm.cross_attns, strict=True):
        count = sum(parameter.numel() for parameter in augment.model.parameters())
        reads = "the anchor's sequence" if augment.shared_sequence else "a prompt"
        lines.append(f"{augment.name}: {augment.depth} layers, {count:,} parameters, reads {reads}")
        for (augment_layer, anchor_layer), attention in zip(augment.connections, attentions, strict=True):
            position = calm.anchor_positions[anchor_layer - 1]
            lines.append(
                f"  layer {augment_layer:>3} ({attention.dim_context}) -> anchor layer {anchor_layer:>3} "
                f"({attention.dim}, {position})"
            )
    lines.append(f"added: {added:,} parameters, {added / max(anchor, 1):.1%} of the anchor's")
    lines.append(f"generation: {'cached' if calm.can_decode else 'uncached'}")
    return "\n".join(lines)
