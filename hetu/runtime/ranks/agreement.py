"""Agreement before traffic: what the ranks of a distributed run tell each other before anything is computed or sent.

Each rank says what it was asked for, and the shapes of its feeds with the contents of those that planning reads.
What must be equal is compared. The rest makes the feeds of all pipelines, so that every rank binds the whole run as one
process would: it comes to the same layouts and masks, or to the same error, as all others. Of the plans that are made
from these it builds its own part. What is agreed on for the first time is confirmed once more after planning, by a hash
of what plans are made from and the values that symbols have by default; a rank that can't go on says so instead. So is
what a run needs of the graph's state, where a rank made or loaded it since it was last compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from hetu import rng
from hetu.arguments import is_torch, shown
from hetu.backends import default_backend
from hetu.backends.comm.compare import refuse_differences, refuse_errors
from hetu.backends.comm.distributed import DistributedWorld
from hetu.backends.comm.wire import from_text, to_text
from hetu.config import settings
from hetu.errors import HetuError, StrategyError, caller, in_words, ranks_in_words
from hetu.parallel import AttnPlan
from hetu.planning.binder import DEFAULT
from hetu.planning.feeds import FeedReader, Feeds, Symbols, shard_count
from hetu.planning.planner import Prepared
from hetu.runtime.ranks.agreed_state import AgreedState
from hetu.runtime.ranks.digests import array_text, digest_of, graph_digest, graph_lines
from hetu.runtime.ranks.feeds import OwnFeeds, is_chosen, merge
from hetu.runtime.ranks.whole_rows import may_be_whole, refuse_whole_rows, tell_rows
from hetu.runtime.request import RunRequest
from hetu.symbols import as_symbol

_Made = TypeVar("_Made")

MOST_AGREED = 100_000
"""Agreements that are remembered; all ranks forget them at the same time."""

_COMPARED = ("same", "symbols", "generator", "options")
DEFAULTS = "the symbols' default values"
STATE = "what the graph keeps from run to run"
OPTIONS = "the optimisers' options"
_FIXES = {
    OPTIONS: "set the same on all ranks, and write schedules that give the same on all of them",
    STATE: "start from the same values on all ranks: hetu.manual_seed(n) before the first run, initialisers that draw "
    "from torch's generator alone, or g.load_state_dict(hetu.load(path)) of one file on all of them",
}


class Agreement:
    """One run's agreement between all ranks.

    Args:
        world: The ranks.
        state: Which parts of the graph's state they have compared.
    """

    def __init__(self, world: DistributedWorld, state: AgreedState) -> None:
        world.runs += 1
        self.world, self.state, self.name = world, state, f"run {world.runs}"
        self.key = b""
        self.request: RunRequest | None = None
        self._is_state_known = False

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
        said: dict[str, Any]
        try:
            request = open_request()
            own = [OwnFeeds.read(self.world, request, *batch) for batch in request.batches]
            said = self._said(request, own)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            failure, said = error, {"error": in_words(error)}
        heard = self.world.control.tell(said, self.name)
        if failure is not None:
            raise failure
        refuse_errors(heard, self.name, "run")
        first = heard[0]
        if any(one[part] != first[part] for one in heard for part in _COMPARED):
            self._refuse_difference(request, heard)
        self._is_state_known = all(one["knows"] for one in heard)
        everything = "\n".join([first["same"], to_text(first["symbols"]), *(one["own"] for one in heard)])
        self.request, self.key = request, hashlib.blake2b(everything.encode(), digest_size=16).digest()
        batches = zip(*(from_text(one["own"])["batches"] for one in heard), strict=True)
        return request, [
            partial(merge, self.world, request.subgraph, mine, list(said))
            for mine, said in zip(own, batches, strict=True)
        ]

    def _said(self, request: RunRequest, own: Sequence[OwnFeeds]) -> dict[str, Any]:
        """What this rank says of a run.

        What the feeds of all pipelines are made of is a text within, for it is looked up among what was agreed on.
        """
        defaults = [
            [i, leaf.default] for i, leaf in enumerate(graph_digest(request.graph).leaves) if leaf.default is not None
        ]
        return {
            "same": self._same(request),
            "symbols": _symbols(request),
            "own": to_text({"batches": [batch.said for batch in own], "defaults": defaults}),
            "generator": "seed {}, offset {}".format(*rng.get_state()),
            "options": self.state.options(request),
            "knows": self.state.knows(request),
        }

    def _same(self, request: RunRequest) -> str:
        """A digest of what must be the same and has no lengths in it, so that most runs find it made."""
        asked = request.fetches, request.graph.version, request.strategy, len(request.batches)
        key = (
            *asked,
            request.device.type,
            default_backend(request.device),
            settings().deterministic,
            settings().compile,
        )
        return self.state.digests.get(key, lambda: digest_of(to_text(_what_is_same(request))))

    def _refuse_difference(self, request: RunRequest, heard: Sequence[Mapping[str, Any]]) -> None:
        """Refuses a run of which something differs; all ranks come here, and tell what their digests are made of."""
        control = self.world.control
        if len({one["same"] for one in heard}) > 1:
            same = control.tell(_what_is_same(request), self.name)
            if len({one["the graph"] for one in same}) > 1:
                refuse_differences(control.tell({"the graph": graph_lines(request.graph)}, self.name), self.name, "run")
            refuse_differences(same, self.name, "run")
        plain = [{**one["symbols"], "the generator's state": one["generator"]} for one in heard]
        refuse_differences(plain, self.name, "run")
        options = [{OPTIONS: one["options"]} for one in heard if one["options"] is not None]
        refuse_differences(options, self.name, "run", _FIXES)

    def confirm(self, make: Callable[[], _Made], prepared: Callable[[_Made], Sequence[Prepared]]) -> _Made:
        """Binds, plans and lowers; for the first time, or if a rank makes something new, compares the outcome too.

        Args:
            make: Does it; may raise.
            prepared: Gives the prepared runs of what it made.

        Raises:
            CommunicationError: If the outcome differs, or another rank couldn't.
            HetuError: What ``make`` raised here.
        """
        assert self.request is not None
        if self._is_state_known and self.key in self.world.agreed:
            with self.world.hanging_up():
                again = make()
            if may_be_whole(prepared(again)):  # it depends on what is fed, whatever was fed before
                rows = tell_rows(self.world, self.request, prepared(again), _digest)
                heard = self.world.control.tell({"rows": rows}, self.name)
                refuse_whole_rows([one["rows"] for one in heard], prepared(again))
            return again
        failure, made, said = None, None, dict[str, Any]()
        try:
            made = make()
            said = {"same": self._outcome(prepared(made)), "feeds": self._common_feeds(prepared(made))}
            said["rows"] = tell_rows(self.world, self.request, prepared(made), _digest)
            if not self._is_state_known:
                said["same"][STATE] = self.state.tell(self.request)
        except Exception as error:
            if isinstance(error, HetuError):  # it tells of pipelines; whose feeds were they?
                error.add_bound(f"pipeline r is fed by rank r % {self.world.size}")
            failure, said = error, {"error": in_words(error)}
        heard = self.world.control.tell(said, self.name)
        if failure is not None:
            raise failure
        refuse_errors(heard, self.name, "run")
        refuse_differences([one["same"] for one in heard], self.name, "run", _FIXES)
        self._refuse_lost_feeds([one["feeds"] for one in heard])
        assert made is not None
        refuse_whole_rows([one["rows"] for one in heard], prepared(made))
        for item in prepared(made):
            self.world.prepare(item.num_pipelines, list(item.attention_plans()))
        if self.state.state.parameters.homes.scattered:
            self.world.prepare_gathers()
        self.state.note(self.request)
        if len(self.world.agreed) >= MOST_AGREED:
            self.world.agreed.clear()
        self.world.agreed.add(self.key)
        return made

    def _outcome(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """What binding and planning came to, where it may differ although all ranks were told the same."""
        assert self.request is not None
        has_any = any(leaf.default is not None for leaf in graph_digest(self.request.graph).leaves)
        pairs = zip(prepared, (symbols for _, symbols in self.request.batches), strict=True)
        used = {text for item, symbols in pairs for text in self._defaults(item, symbols)} if has_any else ()
        return {"the plans": [_plan_text(item) for item in prepared], DEFAULTS: sorted(used)}

    def _defaults(self, prepared: Prepared, symbols: Symbols) -> Iterator[str]:
        """The default values that a micro-batch uses, in words; ``symbols`` is its ``int_symbol_dict``."""
        assert self.request is not None
        for binding in prepared.bindings:
            used = [leaf for leaf in binding if binding.source(leaf).startswith(DEFAULT)]
            yield from (f"{leaf} = {binding[leaf]}" for leaf in used)
        planner = self.request.graph.planner
        groups = planner.pipelines(prepared.subgraph, prepared.strategy).groups or ()  # feeds are chosen by them
        leaves = {leaf for expr in groups for leaf in as_symbol(expr).leaves} - symbols.keys()
        yield from (f"{leaf} = {leaf.default}" for leaf in leaves if leaf.default is not None)

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
            raise StrategyError(
                f"what was fed on {ranks_in_words(lost)} would be lost: the strategy has no pipeline for it",
                op="run",
                where=caller(),
                fix="feed hetu.Shards of the strategy's pipelines, or nothing on ranks past the last",
            )


def _idle(world: DistributedWorld, prepared: Prepared) -> range:
    return range(prepared.num_pipelines, world.size)


def _what_is_same(request: RunRequest) -> dict[str, Any]:
    """By the names that an error gives them."""
    graph, strategy = request.graph, request.strategy
    return {
        "the graph": graph_digest(graph).whole,
        "the strategy": graph.planner.index(strategy) if is_chosen(strategy) else strategy,
        "what is fetched": ", ".join(tensor.name for tensor in request.subgraph.fetches),
        "run_level": request.fetches.run_level,
        "the kind of device": request.device.type,
        "the backend": default_backend(request.device),
        "hetu.config(deterministic=...)": settings().deterministic,
        "hetu.config(compile=...)": settings().compile,
        "the number of micro-batches": len(request.batches),
    }


def _symbols(request: RunRequest) -> dict[str, list[str]]:
    """The ``int_symbol_dict`` of each micro-batch, by the name that an error gives it."""
    found = {}
    for i, (_, symbols) in enumerate(request.batches):
        of = f" of micro-batch {i}" if len(request.batches) > 1 else ""
        found[f"int_symbol_dict{of}"] = sorted([f"{symbol} = {shown(value)}" for symbol, value in symbols.items()])
    return found


def _plan_text(prepared: Prepared) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for plans in prepared.plans.values():
        for plan in plans:
            digest.update(plan.digest().encode() if isinstance(plan, AttnPlan) else b"-")
    return f"strategy {prepared.strategy}, {prepared.num_pipelines} pipelines, {digest.hexdigest()}"


def _digest(feeds: Feeds) -> str:
    arrays = [(name, value if is_torch(value) else np.asarray(value)) for name, value in _named(feeds)]
    return digest_of("\n".join(f"{name} {array_text(array)}" for name, array in arrays))


def _named(feeds: Feeds) -> Iterator[tuple[str, Any]]:
    """Every array that is fed, with a name: of a dict by context groups each group's."""
    for tensor, value in sorted(feeds.items(), key=lambda item: item[0].name):
        if isinstance(value, Mapping):
            yield from ((f"{tensor.name} of group {group}", value[group]) for group in sorted(value))
        else:
            yield tensor.name, value
