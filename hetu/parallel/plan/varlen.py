"""The plan of one plain variable-length attention: a single attend over the whole of k and v."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hetu.parallel.mask.mask import Mask
from hetu.parallel.mask.segments import IntArray, QuerySpans, SegmentTable
from hetu.parallel.mask.varlen import varlen_tables


@dataclass(eq=False)  # not frozen, like its parts
class VarlenPlan:
    """Segments of one ``attn_varlen``, and what dropout and ``p`` need to know of the keys.

    Attributes:
        spans: The query rows.
        table: What they attend to.
        cu_seqlens_k: ``(B + 1,)`` cumulative key lengths.
        mask: Which keys a query sees.
    """

    spans: QuerySpans
    table: SegmentTable
    cu_seqlens_k: IntArray
    mask: Mask

    @classmethod
    def build(
        cls, cu_seqlens_q: IntArray, cu_seqlens_k: IntArray, rows: int, mask: Mask, packed_lse: bool = False
    ) -> VarlenPlan:
        """The plan for the given lengths; arguments as of :func:`~hetu.parallel.mask.varlen.varlen_tables`."""
        spans, table = varlen_tables(cu_seqlens_q, cu_seqlens_k, rows, mask, packed_lse)
        return cls(spans, table, cu_seqlens_k, mask)

    @cached_property
    def key_position(self) -> IntArray:
        """Position of every key row in its sequence; in the pack, where the mask makes one sequence of all."""
        if self.mask.joins:
            return np.arange(self.cu_seqlens_k[-1])
        starts = np.repeat(self.cu_seqlens_k[:-1], np.diff(self.cu_seqlens_k))
        return np.arange(len(starts)) - starts
