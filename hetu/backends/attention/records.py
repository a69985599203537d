"""What the programs of the attention kernels are told: records of 16 integers, and lists of them.

The first rows of a list are its *items*, one for each block of rows, in the order in which the GPU starts them. An item
holds all that its program has to know, its first segment included, so that the program reads a single row before it
loads data. An item with several segments continues in rows after all items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetu.parallel.mask.segments import IntArray

Int32Array = NDArray[np.int32]

WIDTH = 16

_SPAN_FIELDS = ("document", "position", "step", "slot", "slot_row")

QUERY_FIELDS = (
    "row", "rows", *_SPAN_FIELDS, "column",
    "k_start", "k_len", "reach", "low", "blocks", "more_begin", "more_end", "role",
)  # fmt: skip
"""A block of query rows: its first row of q and how many it has, fields of its span as of its first row (``position``,
``slot_row``), then a segment: its first key, how many, and the last key that the block's first row sees (the next row
sees one more). Where tables have a lower diagonal, the segment begins with the first key that the block's first row
sees, or with its own first one, and ``low`` is the first key that this row may see, counted from there: 0, or negative
where some rows more see that key too. ``blocks`` is how many blocks of keys the rows see, for kernel families that
want to know it beforehand, and write it. ``more_begin .. more_end`` are the rows with further segments, of which only
the segment counts."""

KEY_FIELDS = (
    "k_row", "rows", "start", "length", *_SPAN_FIELDS,
    "first", "last_key", "diagonal", "lower", "more_begin", "more_end", "role",
)  # fmt: skip
"""A block of keys: its first row of k and how many it has, then a segment that names it: the query span that sees it,
the place of the block's first row among the segment's keys (negative where the segment begins later), its last key, and
its diagonals. Where tables have a lower diagonal, the span ends with the last row that sees a key of the block."""

QUERIES, KEYS, KEYS_ONLY, VALUES_ONLY = 0, 1, 2, 3
"""Roles of programs: for queries (in the forward all are); in the backward also for gradients of keys and values; of
keys alone; of values alone."""

MERGES, CONTINUES = 4, 8
"""Added to the role of a program for queries: whether there is a running result to add to, and whether what it computes
is one; see :class:`hetu.parallel.mask.segments.Turn`."""

MORE = slice(QUERY_FIELDS.index("more_begin"), QUERY_FIELDS.index("more_end") + 1)
ROLE = QUERY_FIELDS.index("role")
BLOCKS = QUERY_FIELDS.index("blocks")
assert len(QUERY_FIELDS) == len(KEY_FIELDS) == WIDTH
assert KEY_FIELDS.index("more_begin") == MORE.start and KEY_FIELDS.index("role") == ROLE

NO_FURTHER = np.zeros((0, WIDTH), np.int32)


@dataclass(slots=True)  # not frozen: making a frozen one takes three times as long
class WorkList:
    """Records of work.

    Attributes:
        items: int32 ``(items, 16)``; ``more_begin`` and ``more_end`` count rows of ``further``.
        further: int32 ``(rows, 16)``, the segments of items after their first.
        documents: ``(items,)``, the rank of each item's document.
    """

    items: Int32Array
    further: Int32Array
    documents: IntArray

    @property
    def has_more(self) -> bool:
        """Whether an item has several segments."""
        return len(self.further) > 0

    def records(self) -> Int32Array:
        """What kernels read: the items, then the further rows and one that is read as the last one's next."""
        if len(self.further) == 0:
            return self.items
        items = self.items.copy()
        items[:, MORE] += len(items)
        return np.concatenate([items, self.further, np.zeros((1, WIDTH), np.int32)])

    def with_roles(self, *roles: int) -> WorkList:
        """The list with as many programs an item as there are roles."""
        items = np.repeat(self.items, len(roles), axis=0)
        items[:, ROLE] = np.tile(roles, len(self.items))
        return WorkList(items, self.further, np.repeat(self.documents, len(roles)))

    def joined(self, other: WorkList) -> WorkList:
        """Both lists as one: of each document this one's items, then the other's."""
        moved, further = other.items, self.further
        if self.has_more or other.has_more:
            moved, further = moved.copy(), np.concatenate([further, other.further])
            moved[:, MORE] += len(self.further)
        documents = np.concatenate([self.documents, other.documents])
        order = documents.argsort(kind="stable")
        items = np.concatenate([self.items, moved]).take(order, axis=0)
        return WorkList(items, further, documents[order])
