"""Gathering parameters: of each rank's parts, and whole for whoever computes with them, bucket by bucket.

What is cut (``zero_stage=3``) is put together for the calls that read it, and nobody keeps it. What is whole on each
rank, but updated in parts (stages 1 and 2), is brought up to date where it lies when a run first reads it after an
update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hetu.backends.comm import World
from hetu.backends.comm.boxes import assemble, unflat
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.gathers import Bucket, Gathered
from hetu.parallel.placement import Box
from hetu.runtime.homes import Source
from hetu.runtime.parameters import ParameterStore


class Started(NamedTuple):
    """A bucket on its way.

    Attributes:
        bucket: What is in it.
        sources: Where each of it comes from; None for what lies here.
        message: What the world gave for it; None if nothing travels.
    """

    bucket: Bucket
    sources: Sequence[Source | None]
    message: Any


class Gathering:
    """What gathers the buckets of one launch, for the calls of its module.

    Args:
        store: Has this rank's parts. Only a launch holds what is gathered.
        world: The ranks.
        buckets: The buckets.
        device: Where the module runs.
    """

    def __init__(self, store: ParameterStore, world: World, buckets: Sequence[Bucket], device: torch.device) -> None:
        self.store, self.world, self.buckets, self.device = store, world, buckets, device

    def start(self, number: int) -> Started:
        """Sends this rank's part of a bucket on its way."""
        bucket = self.buckets[number]
        sources = [self.store.source(item.parameter) for item in bucket]
        wanted = [(item, source) for item, source in zip(bucket, sources, strict=True) if source is not None]
        if not wanted:
            return Started(bucket, sources, None)
        parts = [(item, part) for item, source in wanted for part in self.store.own(item.parameter, source)]
        sent = torch.cat([_bytes(part.to(_dtype(item))) for item, part in parts]) if parts else self._nothing()
        processes = range(len(wanted[0][1].sizes))
        sizes = [sum(source.sizes[i] * item.dtype.itemsize for item, source in wanted) for i in processes]
        return Started(bucket, sources, self.world.start_gather(sent, sizes))

    def finish(self, started: Started) -> list[torch.Tensor]:
        """The whole of each parameter in the bucket."""
        rows = [] if started.message is None else self.world.finish_gather(started.message)
        places = [0] * len(rows)
        found = []
        for item, source in zip(started.bucket, started.sources, strict=True):
            if source is not None:
                ends = [i + n * item.dtype.itemsize for i, n in zip(places, source.sizes, strict=True)]
                parts = [row[i:j].view(_dtype(item)) for row, i, j in zip(rows, places, ends, strict=True)]
                places = ends
                if not source.is_kept:
                    found.append(_joined(source, parts).to(self.device))
                    continue
                self.store.keep(item.parameter, _joined(source, parts, self.store.value(item.parameter)))
            found.append(self.store.value(item.parameter).to(self.device))
        return found

    def serve(self) -> None:
        """Gathers all of it for the others, on a rank that computes nothing."""
        for number in range(len(self.buckets)):
            self.finish(self.start(number))

    def _nothing(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.store.device())


def _dtype(item: Gathered) -> torch.dtype:
    return TORCH_DTYPES[item.dtype]


def _bytes(part: torch.Tensor) -> torch.Tensor:
    return part.reshape(-1).view(torch.uint8)


def _joined(source: Source, parts: Sequence[torch.Tensor], into: torch.Tensor | None = None) -> torch.Tensor:
    """A whole parameter of what each process gives, in memory of its own or in that of another tensor."""
    if source.is_in_order and into is not None:
        torch.cat(list(parts), out=into.view(-1))
        return into
    if source.is_in_order:
        return torch.cat(list(parts)).view(source.shape)
    pairs = zip(source.boxes, parts, strict=True)
    boxes = {box: x for own, part in pairs for box, x in zip(own, unflat(part, own), strict=True)}
    return assemble(Box.whole(source.shape), boxes)
