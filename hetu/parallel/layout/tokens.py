"""Which token every row of every pipeline is, as arrays: what ops that look at positions need of a layout."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hetu.parallel.layout.layout import Layout
from hetu.parallel.mask.segments import IntArray


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class TokenTable:
    """The tokens of a layout.

    Attributes:
        pipelines: One array ``(3, rows)`` a pipeline: each row's position in its document, its document's number in
            the context group, and its own number among all tokens of all groups, document after document.
        copies: What backends copied to devices; see :class:`hetu.backends.memory.DeviceCopies`. Not part of the value.
    """

    pipelines: tuple[IntArray, ...]
    copies: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, layout: Layout) -> TokenTable:
        """The table of a layout.

        Example:
            >>> TokenTable.of(Layout.build([2, 3], [0, 0], split="sym")).pipelines[0].tolist()
            [[0, 4], [0, 0], [0, 4]]
        """
        before = np.cumsum([0, *(group.tokens for group in layout.groups)])
        return cls(
            tuple(
                np.stack([layout.positions(r), layout.documents(r), layout.columns(r) + before[layout.group_index(r)]])
                for r in range(layout.num_pipelines)
            )
        )
