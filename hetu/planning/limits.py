"""Sizes that no machine has: a run that needs one is refused when it is bound."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetu.arguments import MAX_BYTES, MOST_OF_FLOATS, shown
from hetu.errors import BindingError
from hetu.graph import Node, Tensor
from hetu.symbols import IntSymbol, as_symbol, compile_exprs, magnitude_of

if TYPE_CHECKING:
    from hetu.planning.binder import BoundPipeline


@dataclass(frozen=True, slots=True)
class _Limit:
    """The greatest amount that something may come to."""

    amount: IntSymbol
    most: int
    node: Node
    what: str
    symbols: tuple[IntSymbol, ...]


class SizeLimits:
    """What the sizes of some nodes may come to: tensors' bytes, and symbols that are operands of a computation.

    Args:
        nodes: The nodes.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        limits: dict[tuple[IntSymbol, int], _Limit] = {}
        for node in nodes:
            for limit in (*map(_of_tensor, node.outputs), *_of_operands(node)):
                limits.setdefault((limit.amount, limit.most), limit)
        self._limits = list(limits.values())
        self._leaves = tuple(dict.fromkeys(leaf for limit in self._limits for leaf in limit.amount.leaves))
        self._amounts = compile_exprs([limit.amount for limit in self._limits], self._leaves)
        # Nearly always all symbols are so small that nothing can be too large.
        bits = bisect_right(range(65), False, key=lambda k: not self._are_small(2**k)) - 1
        self._harmless = 2**bits if bits >= 0 else -1

    def _are_small(self, most: int) -> bool:
        return all(magnitude_of(limit.amount.expr, most) <= limit.most for limit in self._limits)

    def check(self, pipeline: BoundPipeline) -> None:
        """Demands that nothing is larger than it may be.

        Args:
            pipeline: A pipeline whose symbols are bound.

        Raises:
            BindingError: Naming the node and its symbols' values.
        """
        values = pipeline.values
        if values and -self._harmless <= min(values.values()) and max(values.values()) <= self._harmless:
            return
        amounts = self._amounts(*[values[leaf] for leaf in self._leaves])
        for amount, limit in zip(amounts, self._limits, strict=True):
            if abs(amount) > limit.most:
                sizes = ", ".join(map(str, limit.symbols))
                raise BindingError(
                    f"{limit.what}: {shown(amount)} is more than {shown(limit.most)}",
                    op=limit.node.definition.name,
                    where=limit.node.where,
                    bound=pipeline.describe(*limit.symbols),
                    fix=f"bind {sizes} to smaller values" if sizes else "build it with smaller sizes",
                )


def _of_tensor(tensor: Tensor) -> _Limit:
    amount = as_symbol(math.prod(tensor.symbolic_shape) * tensor.dtype.itemsize)
    shape = f"[{', '.join(map(str, tensor.shape))}]"
    what = f"{tensor.name} of shape {shape} would be too large for any machine, in bytes"
    return _Limit(amount, MAX_BYTES, tensor.op, what, amount.leaves)


def _of_operands(node: Node) -> list[_Limit]:
    """Torch has ints of 64 bits; where floats are computed a larger one is a float."""
    is_floating = any(item.dtype.is_floating for item in (*node.tensors, *node.outputs))
    most = MOST_OF_FLOATS if is_floating else 2**63 - 1
    found = [item for item in node.inputs if isinstance(item, IntSymbol)]
    return [_Limit(item, most, node, f"{item} as an operand does not fit", item.leaves) for item in found]
