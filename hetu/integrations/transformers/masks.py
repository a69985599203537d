"""The mask that hetu's attention is given: made once per forward, read once, and shared by all layers.

transformers asks a mask interface for what the layers of a model are given as ``attention_mask``. Here that is a
:class:`HetuMask`, which says what a mask of the usual kinds says in cumulative lengths, or by a ``ContextParallel``.
It goes with the arguments of each layer, so that a layer that checkpointing computes again finds the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils

from hetu.arguments import refuse as refuse_argument
from hetu.errors import HetuError, ShapeError
from hetu.functional import ContextParallel
from hetu.functional.dispatch import version_of
from hetu.functional.masking import NO_WINDOW
from hetu.integrations.transformers.lengths import (
    ALL,
    OP,
    Lengths,
    MaskFunction,
    dense,
    fail,
    find_starts,
    read,
    refuse,
)
from hetu.integrations.transformers.losses import guard_losses

_CAUSAL = masking_utils.causal_mask_function
_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)
_OTHER = "a mask of the model's own"


class HetuMask:
    """What a forward's layers need to know of its mask.

    Args:
        batch: Rows of the batch.
        q_length: Queries per row.
        kv_length: Keys per row.
        q_offset: The place of the first query among the keys.
        is_causal: Whether queries see the keys up to their own place, or all.
        keep: bool ``(batch, kv_length)``, False for pads; None for no pads.
        starts: As :func:`~hetu.integrations.transformers.lengths.find_starts` gives it; None for one sequence per row.
        other: What the mask is if ``starts`` says that it is none of the usual kinds.
        cp: How the rows lie on the ranks of a group; what is said of rows says nothing then.
        window: How many keys before its own a query sees, and how many after it; -1 for all. None if no window is said.
        chunk: How many tokens the chunks have that queries see keys of; None for no chunks.

    Attributes:
        shape: That of the mask that this stands for. transformers takes what has four dimensions for a mask that is
            made already, and hands it on.
    """

    ndim = 4

    def __init__(
        self,
        batch: int,
        q_length: int,
        kv_length: int,
        q_offset: int | torch.Tensor = 0,
        is_causal: bool = True,
        keep: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        other: str = _OTHER,
        cp: ContextParallel | None = None,
        window: tuple[int, int] | None = None,
        chunk: int | None = None,
    ) -> None:
        self.batch, self.q_length, self.kv_length, self.q_offset = batch, q_length, kv_length, q_offset
        self.is_causal, self.keep, self.starts, self.other, self.cp = is_causal, keep, starts, other, cp
        self.window, self.chunk, self.has_right_positions = window, chunk, False
        self._lengths: Lengths | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 1, self.q_length, self.kv_length

    def lengths(self) -> Lengths:
        """The cumulative lengths; read at the first call."""
        if self._lengths is None:
            sizes = self.batch, self.q_length, self.kv_length
            if self.keep is None and self.starts is None and self._ends_with_keys():
                self._lengths = dense(*sizes)
            else:
                # Under a window queries of both directions stand at places too.
                left, right = self.window or NO_WINDOW
                is_placed, reach = self.is_causal or right != ALL, left if left == ALL else left + 1
                self._lengths = read(self.keep, self.starts, *sizes, self.q_offset, is_placed, reach, self.other)
        return self._lengths

    def _ends_with_keys(self) -> bool:
        """Whether all keys may be seen: the last query stands at the last key."""
        if not self.is_causal or self.q_length == self.kv_length:
            return True
        return not isinstance(self.q_offset, torch.Tensor) and self.q_offset + self.q_length == self.kv_length


def make_mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = _CAUSAL,
    attention_mask: Any = None,
    local_size: int | None = None,
    cache_position: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: Any = None,
    **options: Any,
) -> HetuMask:
    """Makes the mask of a forward: see ``transformers.AttentionMaskInterface``, whose arguments these are.

    Raises:
        HetuError: If the mask is of a kind that hetu's attention doesn't have; it is named.
    """
    if isinstance(attention_mask, HetuMask):
        return attention_mask
    if cache_position is None and isinstance(q_length, torch.Tensor):  # before transformers 5 it is the second one
        cache_position = q_length
    if cache_position is not None:
        q_length = cache_position.shape[0]
        q_offset = 0 if q_length == kv_length else cache_position[0]
    if isinstance(q_offset, torch.Tensor) and not torch.compiler.is_compiling():
        q_offset = int(q_offset)  # now: a static cache counts in this very tensor
    if use_vmap:
        refuse("or_mask_function or and_mask_function, a mask of the model's own,")
    q_offset = 0 if q_length == kv_length else q_offset - kv_offset
    # Only what makes a mask of both directions gives this option.
    is_causal = "allow_is_bidirectional_skip" not in options
    if device is None:
        device = next((x.device for x in (cache_position, attention_mask) if x is not None), torch.device("cpu"))
    is_usual = mask_function is (_CAUSAL if is_causal else _BIDIRECTIONAL)
    window = chunk = None
    if local_size is not None and not is_usual:
        window = (local_size - 1, 0) if is_causal else (local_size, local_size)
        chunk = local_size if getattr(options.get("config"), "attention_chunk_size", None) == local_size else None
    cp = current()
    if cp is not None:
        _check_parallel(cp, batch_size, q_length, kv_length, attention_mask)
        if not is_usual and not (is_causal or window):
            refuse(_OTHER)
        if not is_usual and is_causal and not torch.compiler.is_compiling():
            _check_rows(mask_function, q_length, device)
        if chunk is not None and longest_of(cp) > chunk:
            refuse(f"attention_chunk_size={chunk} that hides keys, under context_parallel,")
        return HetuMask(1, q_length, kv_length, is_causal=is_causal, cp=cp, window=window)
    starts = None
    if not is_usual and not _is_step(q_length, window, options.get("config")):
        if not is_causal and (window is None or q_length != kv_length):
            refuse(_OTHER)
        seen = window or (ALL, 0)
        starts = find_starts(mask_function, batch_size, kv_length, kv_offset, seen, torch.device(device))
    if attention_mask is not None:
        attention_mask = _fitted(attention_mask, kv_length, kv_offset)
    sizes = batch_size, q_length, kv_length
    mask = HetuMask(*sizes, q_offset, is_causal, attention_mask, starts, window=window, chunk=chunk)
    if torch.compiler.is_compiling():
        mask.lengths()  # here, once for all layers: a layer that is checkpointed may not change what it is given
    return mask


def _is_step(q_length: Any, window: tuple[int, int] | None, config: Any) -> bool:
    """Whether one token is decoded under a window that the configuration names: its mask can be nothing else."""
    return q_length == 1 and window is not None and getattr(config, "sliding_window", None) == window[0] + 1


def of_padding(attention_mask: torch.Tensor, q_length: int, kv_length: int, is_causal: bool) -> HetuMask:
    """What stands for a 2-D mask that a model hands to its layers as it came; kept for as long as the tensor lives."""
    if attention_mask.ndim != 2:
        refuse(f"attention_mask of {attention_mask.ndim} dimensions, a mask of your own,")
    counted = _version(attention_mask)
    key = counted, q_length, kv_length, is_causal
    kept = _kept.get(attention_mask) if counted is not None else None
    if kept is not None and kept[0] == key:
        return cast(HetuMask, kept[1])
    sizes = len(attention_mask), q_length, kv_length, kv_length - q_length
    mask = HetuMask(*sizes, is_causal=is_causal, keep=_fitted(attention_mask, kv_length))
    if counted is not None:
        _kept[attention_mask] = key, mask
    return mask


_kept = WeakTensorKeyDictionary()


def _version(x: torch.Tensor) -> int | None:
    """How often a tensor was changed; None where nobody counts."""
    return None if torch.compiler.is_compiling() or x.is_inference() else version_of(x)


def _fitted(attention_mask: torch.Tensor, kv_length: int, kv_offset: int = 0) -> torch.Tensor:
    """A 2-D mask as bools, one per key from ``kv_offset`` on; keys that it doesn't reach are not seen."""
    if attention_mask.ndim != 2:
        refuse(f"attention_mask of {attention_mask.ndim} dimensions, a mask of your own,")
    missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
    kept = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(kept, (0, missing))


# Context parallelism


class _Current(threading.local):
    """What the models that this thread runs are sharded by; torch.compile can't read a ``ContextVar``."""

    cp: ContextParallel | None = None


_current = _Current()


def current() -> ContextParallel | None:
    """How this thread's models are sharded; None if they are not."""
    return _current.cp


@contextmanager
def context_parallel(cp: ContextParallel) -> Iterator[None]:
    """Runs the attention of models over the ranks of a group: a model's rows are this rank's rows.

    Give the model this rank's tokens as a batch of one, with their positions, and neither a mask nor a cache that holds
    tokens already::

        with hetu.integrations.transformers.context_parallel(cp):
            out = model(cp.dispatch(ids, dim=1), position_ids=cp.position_ids[None], use_cache=False)

    It is for the forward: a backward needs no context, also where activation checkpointing computes layers again. It
    holds for this thread.

    Args:
        cp: How the tokens lie on the ranks.

    Raises:
        HetuError: If a rank of the group holds no tokens, which models of transformers don't take. Within it, if a
            model is given what doesn't fit ``cp``, or labels, or doesn't ask for its mask as models of transformers do.

    Example:
        >>> import hetu.integrations.transformers
        >>> cp = hetu.functional.ContextParallel(torch.tensor([0, 5, 8]))
        >>> with hetu.integrations.transformers.context_parallel(cp):
        ...     pass  # out = model(...)
    """
    if not isinstance(cp, ContextParallel):
        refuse_argument(cp, "cp", "a ContextParallel", op=OP, fix="make one: hetu.functional.ContextParallel(...)")
    if not all(counts := cp.sharding.counts):  # all ranks see it
        what = f"rank {counts.index(0)} of the group holds no tokens, which models of transformers don't take"
        fail(HetuError, what, "add a document of as many pads as there are ranks, or choose tokens=")
    guard_losses(current)
    before, _current.cp = _current.cp, cp
    try:
        yield
    finally:
        _current.cp = before


def _check_parallel(cp: ContextParallel, batch: int, q_length: int, kv_length: int, attention_mask: Any) -> None:
    """Refuses what doesn't fit a context parallelism."""
    rows = cp.position_ids.shape[0]  # a size, which is a symbol in what is compiled
    if batch != 1 or q_length != rows:
        what = f"the model is given {batch} x {q_length} tokens, but this rank holds {rows} in one row"
        fail(ShapeError, what, "give cp.dispatch(ids, dim=1), of a batch of one row")
    if kv_length != q_length:
        what = f"the model's cache holds {kv_length - q_length} keys beside this rank's"
        fail(HetuError, what, "give use_cache=False: context parallelism has no cache")
    if attention_mask is not None:
        fail(HetuError, "an attention_mask is given under context_parallel", "leave it out, and make pads a document")


def _check_rows(mask_function: MaskFunction, length: int, device: Any) -> None:
    """Refuses a mask that is known to be another. Where documents begin tells nothing here: rows lie on all ranks."""
    zero, token = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.arange(length, device=device)[None]
    if mask_function(zero, zero, token[:, :-1], token[:, 1:]).any():
        refuse(_OTHER)


def longest_of(cp: ContextParallel) -> int:
    """Tokens of the longest document."""
    return int(cp.layout.groups[0].lengths.max(initial=0))


def check_positions(mask: HetuMask, position_ids: Any) -> None:
    """Refuses positions that are not those of this rank's rows; compared once per forward, if they are other tensors.

    A model that isn't given any counts its rows, and nothing else would tell.
    """
    cp = mask.cp
    if mask.has_right_positions or cp is None or not isinstance(position_ids, torch.Tensor):
        return
    wanted = cp.position_ids
    if position_ids.numel() == wanted.numel():  # models with several positions per token know what they do
        is_same = position_ids.data_ptr() == wanted.data_ptr() and position_ids.dtype == wanted.dtype
        if not is_same and not torch.equal(position_ids.reshape(-1).to(wanted), wanted):
            fail(HetuError, "position_ids are not those of this rank's rows", "give position_ids=cp.position_ids[None]")
    mask.has_right_positions = True
