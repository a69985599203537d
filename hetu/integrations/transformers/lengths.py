"""From masks to cumulative lengths: which rows of a batch of queries and keys belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

from hetu.errors import HetuError, innermost
from hetu.functional.derivatives import TAGS

OP = "transformers"
FIX = "use attn_implementation='sdpa' or 'eager' for this model"

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
MaskFunction = Callable[..., torch.Tensor]

ALL = -1
"""A bound of a window that is none."""


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """What attention is told of a batch, whose sequences lie one after the other.

    Attributes:
        cu_q: int64, cumulative lengths of the queries, on the host.
        cu_k: Those of the keys.
        order_q: int64, the rows of the queries that they count; None for all, in order.
        order_k: Those of the keys.
        longest: The most keys of a sequence; None where it is not known yet, in what is compiled.
        has_pads: Whether a row is left out.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    order_q: torch.Tensor | None = None
    order_k: torch.Tensor | None = None
    longest: int | None = None
    has_pads: bool = False


def dense(batch: int, q_length: int, kv_length: int) -> Lengths:
    """Those of a batch without pads, of one sequence per row."""
    count = torch.arange(batch + 1, device="cpu")
    return Lengths(count * q_length, count * kv_length, longest=kv_length)


def read(
    keep: torch.Tensor | None,
    starts: torch.Tensor | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    is_placed: bool,
    reach: int,
    other: str,
) -> Lengths:
    """Those of a batch with pads, of several sequences per row, or of a cache that is not full.

    What lies on a device is copied to the host, which waits for it.

    Args:
        keep: bool ``(batch, kv_length)``, False for pads; None for no pads.
        starts: bool ``(2, batch, kv_length)``, as :func:`find_starts` gives it; None for one sequence per row.
        batch: Rows of the batch.
        q_length: Queries per row.
        kv_length: Keys per row.
        q_offset: The place of the first query among the keys.
        is_placed: Whether queries stand at places among the keys, from ``q_offset`` on, behind which no key counts.
        reach: How many keys a query may see up to its own place; :data:`ALL` for all.
        other: What the mask is if ``starts`` says that it is no known one, for the error.

    Raises:
        HetuError: If ``starts`` says that the mask is no known one; if there are pads between the tokens of a sequence
            that is longer than ``reach``; or, in what is compiled, if there are pads between tokens.
    """
    device = next((x.device for x in (keep, starts) if x is not None), None)
    if torch.compiler.is_compiling():
        place = q_offset if isinstance(q_offset, torch.Tensor) else torch.full((), q_offset, device="cpu")
        found = torch.ops.hetu.lengths_of_mask(keep, starts, place, batch, q_length, kv_length, is_placed, other)
        return Lengths(*found)
    runs = _runs(_host(keep), _host(starts), batch, q_length, kv_length, int(q_offset), is_placed, reach, other)
    cu_q, cu_k = (torch.from_numpy(x) for x in _compact(runs.cu_q, runs.cu_k))
    order_q, order_k = (None if x is None else torch.from_numpy(x).to(device) for x in (runs.order_q, runs.order_k))
    return Lengths(cu_q, cu_k, order_q, order_k, int(np.diff(runs.cu_k).max(initial=0)), runs.has_pads)


def find_starts(
    mask_function: MaskFunction, batch: int, length: int, first: int, window: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Where the sequences of self-attention begin, by what a mask function says of a few places of each row.

    Args:
        mask_function: ``(batch, head, query, key)``, tensors of indices, to whether the query sees the key.
        batch: Rows of the batch.
        length: Keys per row.
        first: The index of the first key.
        window: How many keys before its own a token sees, and how many after it; -1 for all of its sequence.
        device: Where what it knows lies.

    Returns:
        bool ``(2, batch, length)``: whether a sequence begins at a token; and whether the token sees anything else than
        this window of its sequence, as far as the ends of the window and of this tell.
    """
    rows, one = torch.arange(batch, device=device)[:, None], torch.zeros(1, 1, dtype=torch.int64, device=device)
    token = torch.arange(length, device=device)[None]
    left, right = window

    def sees(key: torch.Tensor) -> torch.Tensor:
        is_there = (key >= 0) & (key < length)
        key = key.clamp(0, length - 1)
        return mask_function(rows, one, token + first, key + first).expand(batch, length) & is_there

    nothing = torch.zeros(batch, length, dtype=torch.bool, device=device)
    is_start = nothing | (token == 0)
    if right == 0:  # only masks of this kind pack several sequences into a row
        is_start = is_start | ~sees(token - 1)
    begin = torch.where(is_start, token, 0).cummax(1).values
    begin = begin if left < 0 else torch.maximum(begin, token - left)
    last = token * 0 + length - 1
    end = last if right < 0 else torch.minimum(token + right, last)
    is_other = ~sees(token) | ~sees(begin) | ~sees(end) | sees(begin - 1) | sees(end + 1)
    is_other = is_other | (sees(token * 0) != (begin == 0)) | (sees(last) != (end == last))
    return torch.stack([is_start, is_other])


@dataclass(frozen=True, slots=True)
class _Runs:
    """As :class:`Lengths`, on the host; cumulative lengths may repeat, of sequences without any rows."""

    cu_q: IntArray
    cu_k: IntArray
    order_q: IntArray | None
    order_k: IntArray | None
    has_pads: bool


def _host(x: torch.Tensor | None) -> BoolArray | None:
    return None if x is None else x.detach().cpu().numpy()


def _runs(
    keep: BoolArray | None,
    starts: BoolArray | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    is_placed: bool,
    reach: int,
    other: str,
) -> _Runs:
    """Nothing is moved where pads stand before and after each sequence only.

    Pads are sequences of their own then: of queries without keys, and of keys without queries, which cost nothing.
    """
    kept = np.ones((batch, kv_length), np.bool_) if keep is None else keep.copy()
    is_start = np.zeros_like(kept)
    if starts is not None:
        if starts[1].any():
            refuse(other)
        is_start |= starts[0]
    is_start[:, :1] = True
    if is_placed:
        kept[:, q_offset + q_length :] = False
        is_query = np.zeros_like(kept)
        is_query[:, q_offset : q_offset + q_length] = True
    else:
        is_query = np.zeros_like(kept)  # queries have no place among the keys
    flat, begins = kept.reshape(-1), np.flatnonzero(is_start)
    if not flat.size:
        return _Runs(np.arange(batch + 1) * q_length, np.zeros(batch + 1, np.int64), None, None, False)
    ends = np.append(begins[1:], flat.size)
    counts = _between(flat, begins, ends)
    places = np.where(flat, np.arange(flat.size), flat.size)
    first = np.where(counts == 0, ends, np.minimum.reduceat(places, begins))  # at its end if it has only pads
    last = first + counts
    if np.array_equal(_between(flat, first, last), counts):
        edges = np.stack([begins, first, last, ends], 1)
        keys, queries = np.diff(edges, axis=1), np.diff(_cumulated(is_query.reshape(-1))[edges], axis=1)
        if not is_placed:
            queries = np.stack([np.zeros(batch, np.int64), np.full(batch, q_length), np.zeros(batch, np.int64)], 1)
        nothing = np.zeros(len(begins), np.int64)
        lengths_k = np.stack([nothing, keys[:, 0], keys[:, 1], nothing, keys[:, 2]], 1)
        lengths_q = np.stack([queries[:, 0], nothing, queries[:, 1], queries[:, 2], nothing], 1)
        return _Runs(_cumulated(lengths_q), _cumulated(lengths_k), None, None, bool(keys[:, [0, 2]].any()))
    order_k = np.flatnonzero(flat)
    if reach != ALL:  # it counts pads too
        after = np.maximum.reduceat(np.where(flat, np.arange(flat.size) + 1, 0), begins)
        if (after - first).max() > reach:
            refuse("a window over pads between tokens")
    if not is_placed:
        return _Runs(np.arange(batch + 1) * q_length, _cumulated(counts), None, order_k, True)
    is_used = kept[:, q_offset : q_offset + q_length].reshape(-1)
    counts_q = _between((kept & is_query).reshape(-1), begins, ends)
    return _Runs(_cumulated(counts_q), _cumulated(counts), np.flatnonzero(is_used), order_k, True)


def _cumulated(x: Any) -> IntArray:
    """The sums of what stands before each item, and of all."""
    result: IntArray = np.zeros(x.size + 1, np.int64)
    np.cumsum(x.reshape(-1), out=result[1:])
    return result


def _between(flags: BoolArray, begins: IntArray, ends: IntArray) -> IntArray:
    """How many are True from each beginning to its end."""
    sums = _cumulated(flags)
    return sums[ends] - sums[begins]


def _compact(cu_q: IntArray, cu_k: IntArray) -> tuple[IntArray, IntArray]:
    """Without the sequences that have no rows."""
    has_rows = np.append(True, (np.diff(cu_q) > 0) | (np.diff(cu_k) > 0))
    return cu_q[has_rows], cu_k[has_rows]


def refuse(what: str, fix: str = FIX) -> NoReturn:
    """Raises the error of what hetu's attention doesn't do, by its name."""
    fail(HetuError, f"{what} is not there in hetu's attention yet", fix)


def fail(error: type[HetuError], what: str, fix: str) -> NoReturn:
    """Raises an error that points at the line of the user's that called the model."""
    raise error(what, op=OP, where=innermost(_is_users), fix=fix)


def _is_users(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] not in ("hetu", "torch", "transformers")


# As an op, for what is compiled: how many sequences there are isn't known then, so their number is the most there may
# be, and those that are not there have no rows.

_library = torch.library.Library("hetu", "FRAGMENT")
_library.define(
    "lengths_of_mask(Tensor? keep, Tensor? starts, Tensor q_offset, SymInt batch, SymInt q_length, SymInt kv_length, "
    "bool is_placed, str other) -> (Tensor cu_q, Tensor cu_k)",
    tags=TAGS,
)


def _most(keep: Any, starts: Any, batch: int, q_length: int, kv_length: int) -> int:
    """The most sequences that there may be; without pads only one of the five of each has rows."""
    count = batch if starts is None else batch * kv_length
    return count if starts is not None and keep is None else 5 * count


@torch.library.impl("hetu::lengths_of_mask", "CompositeExplicitAutograd", lib=_library)
def _lengths_op(
    keep: torch.Tensor | None, starts: torch.Tensor | None, q_offset: torch.Tensor, *sizes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_length, kv_length, is_placed, other = sizes
    runs = _runs(_host(keep), _host(starts), batch, q_length, kv_length, int(q_offset), is_placed, ALL, other)
    if runs.order_k is not None:
        fail(HetuError, "there is a pad between two tokens, in a compiled model", "put pads at the ends of rows")
    most = _most(keep, starts, batch, q_length, kv_length) + 1
    cu_q, cu_k = (np.pad(x, (0, most - len(x)), mode="edge") for x in _compact(runs.cu_q, runs.cu_k))
    return torch.from_numpy(cu_q), torch.from_numpy(cu_k)


@torch.library.register_fake("hetu::lengths_of_mask", lib=_library)
def _lengths_fake(
    keep: torch.Tensor | None, starts: torch.Tensor | None, q_offset: torch.Tensor, *sizes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    most = _most(keep, starts, *sizes[:3]) + 1
    return tuple(torch.empty(most, dtype=torch.int64, device="cpu") for _ in range(2))  # type: ignore[return-value]
