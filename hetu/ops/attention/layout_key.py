"""What a layout and the plan of a ``parallel_attn`` depend on, as values; and how they are read off a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from hetu.config import settings
from hetu.graph import Node, RunView, Tensor
from hetu.ops.attention.common import read_cu_seqlens, refuse
from hetu.parallel import Heads, Layout, Mask, Strategy
from hetu.parallel.choice.setting import chosen
from hetu.symbols import IntSymbol


@dataclass(frozen=True, slots=True)
class LayoutKey:
    """Everything that a layout depends on.

    Attributes:
        seq_lens: Tokens of each sequence on each pipeline.
        cp_groups: Each pipeline's context group.
        split: How a sequence lies over its group.
        batches: Sequences in each group's batch, in the order of ``groups_of``; empty with packing.
        cu_seqlens: Each group's (shape, bytes as int64) of its cumulative document lengths; empty without packing.
        mask: What documents are weighed by; None for their lengths.
    """

    seq_lens: tuple[int, ...]
    cp_groups: tuple[int, ...]
    split: str
    batches: tuple[int, ...]
    cu_seqlens: tuple[tuple[tuple[int, ...], bytes], ...]
    mask: Mask | None = None

    @classmethod
    def of(
        cls,
        node: Node,
        lens: tuple[int, ...],
        groups: tuple[int, ...],
        batches: Sequence[int],
        cus: Sequence[NDArray[np.int64]],
        mask: Mask | None = None,
    ) -> LayoutKey:
        """The key of a node for bound lengths and groups, what each group holds, and the strategy's bound mask."""
        packed = tuple((cu.shape, np.ascontiguousarray(cu, np.int64).tobytes()) for cu in cus)
        return cls(lens, groups, node.attrs["split"], tuple(batches), packed, mask)

    def layout(self) -> Layout:
        """Which token lies where."""
        cu = [np.frombuffer(data, np.int64).reshape(shape) for shape, data in self.cu_seqlens]
        batch = list(self.batches) or 1
        return Layout.build(
            self.seq_lens, self.cp_groups, split=self.split, batch=batch, cu_seqlens=cu or None, mask=self.mask
        )


@dataclass(frozen=True, slots=True)
class ParallelKey:
    """Everything that the plan of a ``parallel_attn`` depends on.

    Attributes:
        layout: The key of its layout.
        method: How keys and values move.
        mask: Which keys a query sees.
        heads: Widths of a token's row.
        return_softmax: Whether the probabilities are returned.
        hardware: The number of the hardware that the method is chosen for, if it is; else 0.
        hosts: Those of ``hetu.config(hosts=...)``.
    """

    layout: LayoutKey
    method: str
    mask: Mask
    heads: Heads
    return_softmax: bool
    hardware: int = 0
    hosts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, node: Node, layout: LayoutKey, mask: Mask) -> ParallelKey:
        """The key of a node on a layout, with its mask bound."""
        attrs = node.attrs
        number = chosen().number if attrs["method"] == "auto" else 0
        return cls(layout, attrs["method"], mask, cls.heads_of(node), attrs["return_softmax"], number, settings().hosts)

    @staticmethod
    def heads_of(node: Node) -> Heads:
        """The widths of a token's row that a node attends with."""
        attrs, qkv = node.attrs, node.inputs[0]
        assert isinstance(qkv, Tensor)
        width, ratio, head_dim = qkv.symbolic_shape[1].constant or 0, attrs["group_query_ratio"], attrs["head_dim"]
        num_kv = width // head_dim // (ratio + 2)
        return Heads(num_kv * ratio, num_kv, head_dim, qkv.dtype.itemsize)


def group_cu_seqlens(node: Node, view: RunView, members: Sequence[int], total: int) -> NDArray[np.int64]:
    """The group's cumulative lengths, the same wherever they were fed."""
    names = [name for name in node.definition.host_inputs if node.input(name) is not None]
    fed = [(r, name, view.pipelines[r].host(node.input(name))) for r in members for name in names]
    first = read_cu_seqlens(node, names[0], view.pipelines[members[0]])
    for r, name, values in fed[1:]:
        if values is not fed[0][2] and not np.array_equal(values, first):  # one array fed to all needs no look
            refuse(
                node,
                f"{name} on pipeline {r} differs from {names[0]} on pipeline {members[0]} of the same context group",
                "feed all pipelines of a group the same cu_seqlens, for queries and keys alike",
            )
    end = int(first[..., -1].sum())
    if end != total:
        refuse(
            node,
            f"cu_seqlens_q holds {end} tokens, but pipelines {list(members)} hold {total} together",
            "make the last entry the number of all tokens; count padding as a document of its own",
            view.pipelines[members[0]].describe(*listed_lengths(node, view, members)),
        )
    return first


def batch_of(members: Sequence[int], lens: Sequence[int | None], rows: Sequence[int | None]) -> int:
    """Sequences in a group's batch, from a member that holds tokens of each; 1 where none does."""
    for r in members:
        length, row = lens[r], rows[r]
        if length and row is not None:
            return max(row // length, 1)
    return 1


def refuse_rows(node: Node, view: RunView, pipeline: int, rows: int, seq_len: int, batch: int) -> NoReturn:
    """Refuses a shard that has not ``batch * seq_len`` rows."""
    what = "expected as many" if node.attrs["packing"] else f"and its context group a batch of {batch}"
    refuse(
        node,
        f"{node.definition.inputs[0]} has {rows} rows on pipeline {pipeline}, "
        f"but the strategy gives it {seq_len} tokens of each sequence, " + what,
        "feed batch * seq_len rows: layout.scatter(x) of the same strategy makes the shards",
        view.pipelines[pipeline].describe(node.tensors[0].symbolic_shape[0], *listed_lengths(node, view, [pipeline])),
    )


def listed_lengths(node: Node, view: RunView, members: Sequence[int]) -> list[IntSymbol | int]:
    """What the user's list says of the lengths of some pipelines."""
    strategy: Strategy = node.attrs["strategies"][view.strategy]
    return [strategy.lengths[r] for r in members]
