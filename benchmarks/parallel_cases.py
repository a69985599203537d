"""What the benchmark of several GPUs runs on: cases, the processes, and how far a result is from what is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attention_cases import Case, Results, sampled

HEADS = "32:8:128"
TOKENS = (8_192, 32_768, 131_072)
PACKS = ("one", "mix")
"""One document evenly spread, and real document lengths unevenly spread."""

FORWARD, BOTH = DIRECTIONS = ("forward", "forward+backward")

ALONE = "one GPU"
"""Who attends to all tokens on each GPU; the ideal is its time over the number of GPUs."""


@dataclass(frozen=True)
class Spread(Case):
    """One line of inputs, and how it lies over pipelines.

    Attributes:
        shares: The pipelines' shares of the tokens, as ``"3:2"``.
        split: How documents lie over the pipelines; see ``docs/layouts.md``.
    """

    shares: str
    split: str

    @property
    def seq_lens(self) -> list[int]:
        """Tokens of each pipeline.

        Example:
            >>> Spread("32:8:128", 8192, "mix", True, "3:2", "sym").seq_lens
            [4915, 3277]
        """
        ends = np.cumsum([0, *map(int, self.shares.split(":"))])
        return np.diff(self.tokens * ends // ends[-1]).tolist()

    def __str__(self) -> str:
        return f"{self.heads} {self.tokens:>7} {self.lengths:<4} {self.shares:<4} {self.split:<6}"


def spread_cases(
    heads: str,
    tokens: Sequence[int],
    packs: Sequence[str],
    shares: str,
    split: str,
    size: int,
    window: int | None = None,
) -> Iterator[Spread]:
    """Each number of tokens and each pack over ``size`` pipelines: ``one`` evenly, ``mix`` by shares, which repeat.

    Example:
        >>> [case.shares for case in spread_cases("4:2:16", [100], ["one", "mix"], "3:2", "sym", size=3)]
        ['1:1:1', '3:2:3']
    """
    uneven = shares.split(":")
    for total, pack in product(tokens, packs):
        own = [uneven[r % len(uneven)] if pack == "mix" else "1" for r in range(size)]
        yield Spread(heads, total, pack, True, ":".join(own), split, window=window)


class Ranks:
    """The processes that torchrun started: what they tell each other beside what is measured.

    Args:
        world: What ``hetu.init_distributed`` gave.
    """

    def __init__(self, world: Any) -> None:
        self.rank, self.size, self.device = world.rank, world.size, world.device
        self._group = dist.new_group(backend="gloo")
        self._byte = torch.zeros(1, device=self.device)

    def exchange(self, value: Any) -> list[Any]:
        """What every rank says here, in their order."""
        said = [None] * self.size
        dist.all_gather_object(said, value, group=self._group)
        return said

    def meet(self) -> None:
        """Hosts wait for each other."""
        dist.barrier(group=self._group)

    def meet_on_device(self) -> None:
        """Devices wait for each other, once they have done what was queued before."""
        dist.all_reduce(self._byte)


def check_rows(rows: torch.Tensor, tokens: int, ranks: Ranks) -> int:
    """How many ranks hold each token: one, or all of them.

    Args:
        rows: Numbers of the tokens that this rank holds.
        tokens: How many there are.
        ranks: Those that hold them.

    Raises:
        ValueError: If some are held by more ranks than others.
    """
    said = np.frombuffer(b"".join(ranks.exchange(_bytes(rows))), np.int64)
    held = np.bincount(said, minlength=tokens)
    copies = int(held[0])
    if len(held) != tokens or copies < 1 or (held != copies).any():
        raise ValueError(f"not all of {tokens} tokens lie on as many ranks")
    return copies


def _bytes(rows: torch.Tensor) -> bytes:
    return rows.cpu().to(torch.int64).numpy().tobytes()


def squares(case: Case, results: Results, right: Results, rows: torch.Tensor) -> dict[str, tuple[float, float]]:
    """By name, the squared norms of how far a rank's results are from what is right, and of all that is right."""
    found = {}
    for name, x in sampled(case, results).items():
        away = x.detach().double() - right[name][rows]
        found[name] = float(away.square().sum()), float(right[name].square().sum())
    return found


def joint_error(said: Sequence[dict[str, tuple[float, float]]], copies: int) -> float:
    """The largest ``norm(x - right) / norm(right)`` of what all ranks hold together; NaN is infinite.

    Example:
        >>> joint_error([{"out": (9.0, 100.0)}, {"out": (16.0, 100.0)}], copies=1)
        0.5
    """
    errors = []
    for name in said[0]:
        away, whole = sum(one[name][0] for one in said), said[0][name][1]
        errors.append((away / copies / whole) ** 0.5 if away == away else float("inf"))
    return max(errors)
