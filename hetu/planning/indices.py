"""Indices among what is fed are checked before anything is computed: an error names the op's line and the number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetu.errors import BindingError, Where
from hetu.graph import Node, Role, Tensor
from hetu.graph.passes import source_of_values
from hetu.planning.arrays import host_array, is_on_host
from hetu.symbols import IntSymbol

NONE_UNSEEN: frozenset[str] = frozenset()
"""Most runs see all indices, and are not to make a set for that."""


@dataclass(frozen=True, slots=True)
class IndexCheck:
    """What the values of a placeholder, or of a constant, must be because an op looks something up by them.

    Attributes:
        source: The placeholder or constant.
        name: What the op calls its input.
        size: How many there are to choose from.
        ignored: A value that is no index, and may come; None if there is none.
        op: The name of the op that users call.
        where: The user's line.
        extent: The least and the greatest value of a constant, which are looked for once; None for a placeholder.
    """

    source: Tensor
    name: str
    size: int | IntSymbol
    ignored: int | None
    op: str
    where: Where
    extent: tuple[int, int] | None


def refuse_outside(
    values: NDArray[Any],
    size: int,
    ignored: int | None,
    name: str,
    op: str,
    where: Where,
    of: str = "",
    bound: Sequence[str] = (),
) -> None:
    """Refuses values of which one is no index of so many.

    Args:
        values: Ints of any shape, on the host.
        size: How many there are to choose from.
        ignored: A value that may come; None if there is none.
        name: What the op calls them.
        op: The op.
        where: The user's line.
        of: Says which values these are.
        bound: Lines that say what the size comes from.

    Raises:
        BindingError: If one is out of range; names the first.
    """
    # numpy takes three times as long for min and max, and every run comes here
    if not values.size or (values.item(values.argmin()) >= 0 and values.item(values.argmax()) < size):
        return
    outside = (values < 0) | (values >= size)
    if ignored is not None:
        outside &= values != ignored
    if outside.any():
        place = np.unravel_index(int(outside.argmax()), values.shape)
        at = ", ".join(map(str, place))
        raise BindingError(
            f"{name}{of} holds {values[place]} at [{at}], expected 0 to below {size}",
            op=op,
            where=where,
            bound=bound,
            fix=f"give indices from 0 to below {size}" + ("" if ignored is None else f", or {ignored} to ignore a row"),
        )


def index_checks(nodes: Sequence[Node]) -> tuple[IndexCheck, ...]:
    """The checks of the indices that live nodes read as they were fed, or as constants."""
    found: dict[Any, IndexCheck] = {}
    for node in nodes:
        for item in node.definition.index_ranges(node):
            source = source_of_values(node.input(item.name))
            if source is not None:
                op = node.definition.name.removesuffix("_grad")
                check = IndexCheck(source, item.name, item.size, item.ignored, op, node.where, _extent(source))
                found.setdefault((source, item.size, item.ignored), check)  # gradients look up what the op does
    return tuple(found.values())


def _extent(source: Tensor) -> tuple[int, int] | None:
    """The least and the greatest value of a constant on the host; None of anything else."""
    if source.op.role is not Role.CONSTANT or not is_on_host(source.op.attrs["value"]):
        return None
    values = host_array(source.op.attrs["value"])
    return (int(values.min()), int(values.max())) if values.size else (0, -1)


def check_indices(
    checks: Sequence[IndexCheck],
    arrays: Mapping[int, Mapping[Tensor, Any]],
    size_of: Callable[[int, int | IntSymbol], int | None],
    describe: Callable[[int, int | IntSymbol], Sequence[str]] = lambda *_: (),
    waits: bool = False,
) -> frozenset[str]:
    """Checks those indices that lie on the host; what lies on a device is waited for only if that is wanted.

    Args:
        checks: What to check.
        arrays: Each pipeline's arrays, as far as they are known here.
        size_of: Gives the value of a size on a pipeline, None if it is not known yet.
        describe: Gives lines that say what a size on a pipeline comes from.
        waits: Whether to wait for devices.

    Returns:
        The names of those placeholders and constants that lie on a device and were not waited for.

    Raises:
        BindingError: If one is out of its range; names the node's line and the number.
    """
    seen, unseen = set(), None
    for check in checks:
        is_constant = check.source.op.role is Role.CONSTANT
        for pipeline, own in arrays.items():
            values = check.source.op.attrs["value"] if is_constant else own.get(check.source)
            size = size_of(pipeline, check.size)
            if values is None or size is None or (id(values), size, check.ignored) in seen:
                continue
            if not waits and not is_on_host(values):
                unseen = {check.source.name} if unseen is None else {*unseen, check.source.name}
                continue
            if check.extent is not None and check.extent[0] >= 0 and check.extent[1] < size:
                continue
            seen.add((id(values), size, check.ignored))  # pipelines may share an array
            of = f", {'constant' if is_constant else 'fed as'} {check.source.name}"
            of += f" on pipeline {pipeline}," if len(arrays) > 1 and not is_constant else ","
            bound = describe(pipeline, check.size)
            refuse_outside(host_array(values), size, check.ignored, check.name, check.op, check.where, of, bound)
    return NONE_UNSEEN if unseen is None else frozenset(unseen)
