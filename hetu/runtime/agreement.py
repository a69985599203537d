"""Agreement before traffic: what the ranks of a distributed run tell each other before anything is computed or sent.

Each rank says what it was asked for, and the shapes of its feeds with the contents of those that planning reads.
What must be equal is compared. The rest makes the feeds of all pipelines, so that every rank binds and plans the whole
run as one process would: it comes to the same plan, or to the same error, as all others. What is agreed on for the
first time is confirmed once more after planning, by the hash of the plans; a rank that can't go on says so instead.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from hetu import rng
from hetu.arguments import is_torch
from hetu.backends import default_backend
from hetu.backends.comm.distributed import DistributedWorld
from hetu.config import settings
from hetu.errors import CommunicationError, HetuError, StrategyError, caller
from hetu.graph import Graph
from hetu.parallel import AttnPlan
from hetu.planning.feeds import FeedReader, Feeds, shard_count
from hetu.planning.planner import Prepared
from hetu.runtime.rank_feeds import OwnFeeds, merge
from hetu.runtime.request import RunRequest
from hetu.runtime.whole_rows import refuse_whole_rows, tell_rows

_Made = TypeVar("_Made")

MOST_AGREED = 100_000
"""Agreements that are remembered; all ranks forget them at the same time."""


class Agreement:
    """One run's agreement between all ranks."""

    def __init__(self, world: DistributedWorld) -> None:
        world.runs += 1
        self.world, self.name = world, f"run {world.runs}"
        self.key = b""
        self.request: RunRequest | None = None

    def hear(self, open_request: Callable[[], RunRequest]) -> tuple[RunRequest, list[FeedReader]]:
        """Tells the others what this rank is asked for, and hears what they are.

        Args:
            open_request: Gives this rank's request; may raise.

        Returns:
            The request, and for each micro-batch what gives the feeds of all pipelines.

        Raises:
            CommunicationError: If something differs that must not, or a rank can't be reached or refused the run.
            HetuError: If this rank refuses it.
        """
        failure: BaseException | None = None
        own: list[OwnFeeds] = []
        try:
            request = open_request()
            own = [OwnFeeds.read(self.world, request, *batch) for batch in request.batches]
            said = {"same": _what_is_same(request), "batches": [batch.said for batch in own]}
        except Exception as error:  # whatever it is, the others must not wait for this rank
            failure, said = error, {"error": _in_words(error)}
        stable = pickle.dumps(said)
        heard = [
            pickle.loads(body)
            for body in self.world.control.exchange(pickle.dumps((stable, rng.get_state())), self.name)
        ]
        everything = [pickle.loads(body) for body, _ in heard]
        if failure is not None:
            raise failure
        self._refuse_errors(everything)
        self._compare(
            [{**one["same"], "the generator's state": state} for one, (_, state) in zip(everything, heard, strict=True)]
        )
        self.request, self.key = request, hashlib.blake2b(b"".join(body for body, _ in heard), digest_size=16).digest()
        batches = zip(*(one["batches"] for one in everything), strict=True)
        return request, [
            partial(merge, self.world, request.subgraph, mine, list(said))
            for mine, said in zip(own, batches, strict=True)
        ]

    def confirm(self, make: Callable[[], _Made], prepared: Callable[[_Made], Sequence[Prepared]]) -> _Made:
        """Binds, plans and lowers; for the first time also compares the outcome with the others'.

        Args:
            make: Does it; may raise.
            prepared: Gives the prepared runs of what it made.

        Raises:
            CommunicationError: If the outcome differs, or another rank couldn't.
            HetuError: What ``make`` raised here.
        """
        if self.key in self.world.agreed:
            with self.world.hanging_up():
                return make()
        assert self.request is not None
        failure, made, said = None, None, dict[str, Any]()
        try:
            made = make()
            said = {"same": {"the plans": [_plan_hash(item) for item in prepared(made)]}}
            said["feeds"] = self._common_feeds(prepared(made))
            said["rows"] = tell_rows(self.world, self.request, prepared(made), _digest)
        except Exception as error:
            if isinstance(error, HetuError):  # it tells of pipelines; whose feeds were they?
                error.add_bound(f"pipeline r is fed by rank r % {self.world.size}")
            failure, said = error, {"error": _in_words(error)}
        everything = [pickle.loads(body) for body in self.world.control.exchange(pickle.dumps(said), self.name)]
        if failure is not None:
            raise failure
        self._refuse_errors(everything)
        self._compare([one["same"] for one in everything])
        self._refuse_lost_feeds([one["feeds"] for one in everything])
        assert made is not None
        refuse_whole_rows([one["rows"] for one in everything], prepared(made))
        for item in prepared(made):
            plans = [plan for group in item.plans.values() for plan in group if isinstance(plan, AttnPlan)]
            self.world.prepare(item.num_pipelines, plans)
        if len(self.world.agreed) >= MOST_AGREED:
            self.world.agreed.clear()
        self.world.agreed.add(self.key)
        return made

    def _refuse_errors(self, said: Sequence[Mapping[str, Any]]) -> None:
        errors = {rank: one["error"] for rank, one in enumerate(said) if "error" in one}
        if errors:
            names = ", ".join(map(str, errors))
            raise CommunicationError(
                f"{self.name} was refused by rank{'s' * (len(errors) > 1)} {names}, so nothing was computed",
                op="run",
                where=caller(),
                bound=[f"rank {rank}: {text}" for rank, text in errors.items()],
                fix="mend what these ranks say; the others are ready to run again",
            )

    def _compare(self, said: Sequence[Mapping[str, Any]]) -> None:
        """Refuses what is not the same on all ranks, showing all sides."""
        for name in said[0]:
            values = [one.get(name) for one in said]
            if any(value != values[0] for value in values):
                sides: dict[str, list[int]] = {}
                for rank, value in enumerate(values):
                    sides.setdefault(_shown(value, values), []).append(rank)
                raise CommunicationError(
                    f"{name} must be the same on all ranks, but the ranks differ in {self.name}",
                    op="run",
                    where=caller(),
                    bound=[f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {text}" for text, r in sides.items()],
                    fix="run the same script with the same arguments and hetu.manual_seed(n) on all ranks",
                )

    def _common_feeds(self, prepared: Sequence[Prepared]) -> list[str | None]:
        """A digest of the plain arrays of each micro-batch, where ranks without pipelines may have been fed as well."""
        assert self.request is not None
        digests: list[str | None] = []
        for item, (feeds, _) in zip(prepared, self.request.batches, strict=True):
            is_asked = self.world.size > item.num_pipelines and feeds and shard_count(feeds) is None
            digests.append(_digest(feeds) if is_asked and self.world.rank in (0, *_idle(self.world, item)) else None)
        return digests

    def _refuse_lost_feeds(self, digests: Sequence[Sequence[str | None]]) -> None:
        """Tokens that a rank without a pipeline was fed would be lost, unless rank 0 was fed the very same."""
        lost = [
            r
            for r, own in enumerate(digests)
            if any(d and d != first for d, first in zip(own, digests[0], strict=True))
        ]
        if lost:
            names = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
            raise StrategyError(
                f"what was fed on {names} would be lost: the strategy has no pipeline for it",
                op="run",
                where=caller(),
                fix="feed hetu.Shards of the strategy's pipelines, or nothing on ranks past the last",
            )


def _idle(world: DistributedWorld, prepared: Prepared) -> range:
    return range(prepared.num_pipelines, world.size)


def _what_is_same(request: RunRequest) -> dict[str, Any]:
    """By the names that an error gives them."""
    same: dict[str, Any] = {
        "the graph": graph_digest(request.graph),
        "the strategy": request.strategy,
        "what is fetched": tuple(tensor.name for tensor in request.subgraph.fetches),
        "run_level": request.fetches.run_level,
        "the kind of device": request.device.type,
        "the backend": default_backend(request.device),
        "hetu.config(deterministic=...)": settings().deterministic,
        "the number of micro-batches": len(request.batches),
    }
    for i, (_, symbols) in enumerate(request.batches):
        of = f" of micro-batch {i}" if len(request.batches) > 1 else ""
        same[f"int_symbol_dict{of}"] = sorted((str(symbol), repr(value)) for symbol, value in symbols.items())
    return same


_digests: WeakKeyDictionary[Graph, tuple[tuple[int, int], str]] = WeakKeyDictionary()
"""The digest of each graph, and the version of the graph that it is of."""


def graph_digest(graph: Graph) -> str:
    """A short name of all that a graph says; equal for graphs that the same script built."""
    version, digest = _digests.get(graph, (None, ""))
    if version != graph.version:
        text = re.sub(r" at 0x[0-9a-f]+", "", str(graph))  # of initialisers and schedules, say: not the same anywhere
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        _digests[graph] = graph.version, digest
    return digest


def _plan_hash(prepared: Prepared) -> tuple[int, int, str]:
    digest = hashlib.blake2b(digest_size=8)
    for plans in prepared.plans.values():
        for plan in plans:
            digest.update(plan.hash().encode() if hasattr(plan, "hash") else b"-")
    return prepared.strategy, prepared.num_pipelines, digest.hexdigest()


def _digest(feeds: Feeds) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in _named(feeds):
        digest.update(f"{name} {tuple(np.shape(value))}".encode())
        whole = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if is_torch(value) else value
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()


def _named(feeds: Feeds) -> Iterator[tuple[str, Any]]:
    """Every array that is fed, with a name: of a dict by context groups each group's."""
    for tensor, value in sorted(feeds.items(), key=lambda item: item[0].name):
        if isinstance(value, Mapping):
            yield from ((f"{tensor.name} of group {group}", value[group]) for group in sorted(value))
        else:
            yield tensor.name, value


def _shown(value: Any, values: Sequence[Any]) -> str:
    """A side of a difference; of lists only what is not the same in all."""
    if all(isinstance(item, list) for item in values):
        common = [item for item in value if all(item in other for other in values)]
        value = [item for item in value if item not in common]
    return repr(value)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error.what if isinstance(error, HetuError) else error}"
