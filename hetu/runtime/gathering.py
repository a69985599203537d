"""Gathering parameters: of each rank's parts, and whole for whoever computes with them, bucket by bucket.

What is cut (``zero_stage=3``) is put together for the calls that read it, and nobody keeps it. What is whole on each
rank, but updated in parts (stages 1 and 2), is brought up to date where it lies when a run first reads it after an
update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hetu.backends.comm import World
from hetu.backends.comm.boxes import unflat
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.backends.lower.gathers import Bucket, Gathered
from hetu.parallel.placement import Box
from hetu.runtime.homes import Source
from hetu.runtime.parameters import ParameterStore, whole_of


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
        own = [
            part.to(_dtype(item)).reshape(-1)
            for item, source in wanted
            for part in self.store.own(item.parameter, source)
        ]
        sent = torch.cat([part.view(torch.uint8) for part in own]) if own else self._nothing()
        processes = range(len(wanted[0][1].boxes))
        sizes = [sum(source.numel(i) * item.dtype.itemsize for item, source in wanted) for i in processes]
        return Started(bucket, sources, self.world.start_gather(sent, sizes))

    def finish(self, started: Started) -> list[torch.Tensor]:
        """The whole of each parameter in the bucket."""
        pairs = list(zip(started.bucket, started.sources, strict=True))
        rows = [] if started.message is None else self.world.finish_gather(started.message)
        parts: dict[Gathered, dict[Box, torch.Tensor]] = {}
        for process, row in enumerate(rows):
            place = 0
            for item, source in ((item, source) for item, source in pairs if source is not None):
                size = source.numel(process) * item.dtype.itemsize
                boxes = source.boxes[process]
                own = unflat(row[place : place + size].view(_dtype(item)), boxes)
                parts.setdefault(item, {}).update(zip(boxes, own, strict=True))
                place += size
        return [self._whole(item, source, parts.get(item, {})) for item, source in pairs]

    def serve(self) -> None:
        """Gathers all of it for the others, on a rank that computes nothing."""
        for number in range(len(self.buckets)):
            self.finish(self.start(number))

    def _whole(self, item: Gathered, source: Source | None, parts: Mapping[Box, torch.Tensor]) -> torch.Tensor:
        node = item.parameter
        if source is not None and not source.is_kept:
            whole = whole_of(node, parts)
            return (whole.clone() if len(parts) == 1 else whole).to(self.device)  # it keeps nothing else of its bucket
        if source is not None:
            self.store.keep(node, {box: part for box, part in parts.items() if box not in source.here})
        return self.store.value(node).to(self.device)

    def _nothing(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.store.device())


def _dtype(item: Gathered) -> torch.dtype:
    return TORCH_DTYPES[item.dtype]
