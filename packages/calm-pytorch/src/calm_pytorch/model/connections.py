"""Connections between layers of an augment and layers of the anchor (arXiv 2401.02412, section 3.1).

The paper connects every few layers of both models. Here the connections are spread evenly over both depths and the
last layers are always among them, because the last hidden states are the result of the whole augment.
"""

from collections.abc import Sequence

from lm_core.checks import check_positive, typed

Connection = tuple[int, int]


@typed
def plan_connections(
    augment_depth: int, anchor_depth: int, every: int = 4, *, num_connections: int | None = None
) -> tuple[Connection, ...]:
    """Connections between two stacks of layers.

    There are ``ceil(max(depths) / every)`` of them, but no more than the shallower stack has layers; connection ``i``
    of ``n`` joins the layers at ``i / n`` of either depth, rounded up.

    Args:
        augment_depth: layers of the augment.
        anchor_depth: layers of the anchor.
        every: layers of the deeper stack per connection.
        num_connections: number of connections, instead of ``every``.

    Returns:
        1-indexed ``(augment_layer, anchor_layer)`` pairs, rising in both; the last joins the last layers.

    Raises:
        ValueError: an argument is below 1, or there are fewer layers than connections.
    """
    check_positive(augment_depth, "augment_depth")
    check_positive(anchor_depth, "anchor_depth")
    check_positive(every, "connect_every_num_layers")
    most = min(augment_depth, anchor_depth)
    count = min(-(-max(augment_depth, anchor_depth) // every), most)
    if num_connections is not None:
        check_positive(num_connections, "num_connections")
        if num_connections > most:
            raise ValueError(f"num_connections must be at most {most}, the layers of one model, got {num_connections}")
        count = num_connections
    return tuple((-(-i * augment_depth // count), -(-i * anchor_depth // count)) for i in range(1, count + 1))


def checked_connections(
    connections: Sequence[Sequence[int]], augment_depth: int, anchor_depth: int, where: str
) -> tuple[Connection, ...]:
    """A user's connections as tuples.

    Raises:
        ValueError: there are none, one comes twice, or a layer is out of range.
    """
    pairs: list[Connection] = []
    for entry in connections:
        if len(entry) != 2:
            raise ValueError(f"{where} must hold (augment_layer, anchor_layer) pairs, got {tuple(entry)}")
        augment_layer, anchor_layer = (int(layer) for layer in entry)
        if not 1 <= augment_layer <= augment_depth:
            raise ValueError(f"{where} must name augment layers in [1, {augment_depth}], got {augment_layer}")
        if not 1 <= anchor_layer <= anchor_depth:
            raise ValueError(f"{where} must name anchor layers in [1, {anchor_depth}], got {anchor_layer}")
        pairs.append((augment_layer, anchor_layer))
    if not pairs:
        raise ValueError(f"{where} must hold at least one (augment_layer, anchor_layer) pair, got none")
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"{where} must name each pair once, got {tuple(pairs)}")
    return tuple(pairs)
