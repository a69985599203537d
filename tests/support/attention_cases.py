"""Strategies with their data for parallel_attn: by hand, or drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from hetu.parallel import METHODS, SPLITS, Mask

METHOD_CHOICES = (*METHODS, "auto")
"""What ``method`` may be."""


@dataclass
class Case:
    """A strategy with its data: what each context group holds."""

    lens: list[int]
    groups: list[int]
    split: str = "normal"
    method: str = "auto"
    packing: str = ""  # "", "1d" or "2d"
    batch: int = 1
    is_causal: bool = True
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    p: float = 0.0
    return_softmax: bool = False
    seed: int = 0
    cut: list[float] = field(default_factory=list)
    mask: Mask | None = None
    softcap: float = 0.0
    has_sinks: bool = False

    @property
    def members(self) -> dict[int, list[int]]:
        return {g: [r for r, own in enumerate(self.groups) if own == g] for g in sorted(set(self.groups))}

    def documents(self, members: list[int]) -> list[int]:
        """Document lengths of a group."""
        total = sum(self.lens[r] for r in members)
        if not self.packing:
            return [total] * self.batch
        cuts = sorted(min(int(c * (total + 1)), total) for c in self.cut)
        return np.diff([0, *cuts, total]).tolist()


def cu_seqlens(case: Case, members: list[int]) -> np.ndarray[Any, Any]:
    """What is fed for a group: 1-D, or 2-D with each document's piece on each pipeline."""
    documents = case.documents(members)
    if case.packing == "1d":
        return np.cumsum([0, *documents], dtype=np.int32)
    pieces, room = [], [case.lens[r] for r in members]
    for length in documents:  # any pieces will do; these fill the last pipeline first
        row = [0] * len(members)
        for i in reversed(range(len(members))):
            row[i] = min(room[i], length - sum(row))
            room[i] -= row[i]
        pieces.append(row)
    table = np.array(pieces).reshape(-1, len(members)).T
    return np.concatenate([np.zeros((len(members), 1)), table.cumsum(1)], 1).astype(np.int32)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Random strategies: any lengths, zero included; any groups, in any order."""
    count = draw(st.integers(1, 6))
    packing = draw(st.sampled_from(["", "1d", "2d"]))
    values: dict[str, Any] = {
        "lens": draw(st.lists(st.integers(0, 13), min_size=count, max_size=count)),
        "groups": draw(st.lists(st.sampled_from([0, 0, 0, 2, 5]), min_size=count, max_size=count)),
        "split": draw(st.sampled_from(list(SPLITS))),
        "method": draw(st.sampled_from(METHOD_CHOICES)),
        "packing": packing,
        "batch": 1 if packing else draw(st.integers(1, 3)),
        "is_causal": draw(st.booleans()),
        "heads": draw(st.sampled_from([(1, 1), (4, 2), (3, 1)])),
        "p": draw(st.sampled_from([0.0, 0.0, 0.4])),
        "return_softmax": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
        "cut": draw(st.lists(st.floats(0, 1), max_size=3)),
    }
    case = Case(**{**values, **fixed})
    if not case.packing and any(not sum(case.lens[r] for r in m) for m in case.members.values()):
        case.batch = 1  # a group without tokens has no batch to speak of
    return case
