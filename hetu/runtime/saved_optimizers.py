"""The optimisers of a given state: matched by name, checked as a whole, and only then taken."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hetu.arguments import number_of, shown
from hetu.errors import HetuError, caller
from hetu.graph import Node
from hetu.optim import checked_options
from hetu.runtime.copies import copied, dense, refuse
from hetu.runtime.optimizers import BoundOptimizer
from hetu.runtime.state import GraphState

ONE_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""Lists in the states of torch's schedules that have an entry for each group of the optimiser, in its order."""

RATES = ("initial_lr", "max_lr", "min_lr", "base_lrs", "_last_lr", "min_lrs", "max_lrs")
"""What is a learning rate, or a list of them."""

MADE_LATE = frozenset({"momentum_buffer"})
"""What torch makes at the first step that needs it, not at the first of all."""

_MOST_STEPS = 2**53

NOT_OF_GROUPS = ("_milestones", "_schedule_phases")
"""Lists that have nothing to do with groups, however long they are."""


def load_optimizer(state: GraphState, update: Node, saved: Mapping[str, Any]) -> None:
    """Makes the optimiser of an update node, with the given past, in a state that has none yet.

    Args:
        state: The state that is put together.
        update: The update.
        saved: What a state dict says of it. Nothing of it is kept: all is copied.

    Raises:
        HetuError: If a run could not go on from it.
    """
    bound = state.optimizer(update)
    if saved["kind"] != bound.spec.kind:
        refuse(f"the state of {update.name} is that of {saved['kind']}, but it is {bound.spec.kind} here")
    if (saved["schedule"] is None) != (bound.schedule is None):
        refuse(f"{update.name} has a schedule in the state or in the graph, but not in both")
    order = _order_of_groups(bound, update, saved["groups"])
    options = [_checked_group(bound, i, saved["groups"][place], update) for i, place in enumerate(order)]
    for own in options:
        bound.check(own, state.parameters.device())
    averages = _checked_averages(bound, update, options, saved["state"])
    known = [set(group) for group in bound.optimizer.param_groups]
    try:
        bound.load(averages, options, state.parameters.device())
    except (KeyError, TypeError, ValueError) as error:
        refuse(f"torch refuses the state of {update.name}: {error!r}")
    for group, wanted in zip(bound.optimizer.param_groups, known, strict=True):  # torch adds what older ones lack
        if missing := wanted - set(group):
            refuse(f"a group of {update.name} has no {', '.join(sorted(missing))} in the state")
    if bound.schedule is not None:
        _load_schedule(bound, update, saved["schedule"], order)


def check_names(what: str, given: Any, wanted: Any) -> None:
    """Demands the same names, in any order."""
    missing, unknown = sorted(set(wanted) - set(given), key=str), sorted(set(given) - set(wanted), key=str)
    if missing or unknown:
        parts = [f"missing: {', '.join(map(str, missing))}"] * bool(missing)
        parts += [f"unknown: {', '.join(map(str, unknown))}"] * bool(unknown)
        refuse(f"the {what} of the state are not the graph's; {'; '.join(parts)}", "build the graph that it is of")


# Groups


def _order_of_groups(bound: BoundOptimizer, update: Node, saved: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each group of the graph the place in the state of the group with the same parameters."""
    places = {frozenset(group["params"]): place for place, group in enumerate(saved)}
    own = [frozenset(node.name for node in nodes) for nodes in bound.groups]
    if len(saved) != len(own) or any(names not in places for names in own):
        sizes = ", ".join(str(len(names)) for names in own)
        refuse(
            f"the groups of {update.name} have other parameters in the state",
            f"give minimize groups with the same parameters, in any order; here they have {sizes} of them",
        )
    return [places[names] for names in own]


def _checked_group(bound: BoundOptimizer, index: int, saved: Mapping[str, Any], update: Node) -> dict[str, Any]:
    """The options of a group in the state, as copies."""
    fresh, spec = bound.named_groups()[index], bound.spec
    given = {key: copied(value) for key, value in saved.items() if key != "params"}
    for key, value in given.items():
        if key not in fresh:
            refuse(f"a group of {update.name} has an option {shown(key)} in the state, which {spec.kind} has not")
        if isinstance(fresh[key], tuple) and isinstance(value, list):  # files of the first version have no tuples
            given[key] = tuple(value)
        if isinstance(value, torch.Tensor):
            dense(value, f"{key} of {update.name}")
    checked = checked_options(given, op="load")
    for key, value in checked.items():
        _check_alike(fresh[key], value, f"{key} of {update.name}", key)
    return checked


# Averages


def _checked_averages(
    bound: BoundOptimizer, update: Node, options: Sequence[Mapping[str, Any]], saved: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What the optimiser has for each parameter, by name: all that its next step needs, and nothing unknown.

    An optimiser of a state has made its first step, so it has all that its options ask for. Only what torch makes at
    any step may be missing, where a schedule turned it on since: then all of a group are without it.
    """
    first, now = bound.blank_state(bound.optimizer.param_groups), bound.blank_state(options)
    possible = bound.blank_state(options, is_widest=True)
    check_names(f"states of {update.name}", saved, set(saved) & set(now))
    found: dict[str, dict[str, Any]] = {}
    for nodes in bound.groups:
        has_some = {key for node in nodes for key in saved.get(node.name, {})}
        for name in (node.name for node in nodes):
            given = saved.get(name, {})
            missing = sorted(set(now[name]) - set(given) - (MADE_LATE - set(first[name]) - has_some))
            unknown = sorted(set(given) - set(possible[name]), key=str)
            if missing or unknown:
                parts = [f"misses {', '.join(missing)}"] * bool(missing)
                parts += [f"has {', '.join(map(str, unknown))}, which {bound.spec.kind} has not"] * bool(unknown)
                refuse(f"the state of {name} in {update.name} {' and '.join(parts)}", "load a state that is whole")
            blank = possible[name]
            found[name] = {key: _average(value, blank[key], f"{key} of {name}") for key, value in given.items()}
    return found


def _average(value: Any, blank: torch.Tensor, what: str) -> torch.Tensor:
    """A value of an optimiser's state, of the shape and dtype that a blank one has."""
    if blank.is_meta:  # as the parameter
        if not isinstance(value, torch.Tensor) or value.shape != blank.shape:
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            refuse(f"{what} has shape {shape} in the state, expected {list(blank.shape)}")
        if value.dtype != blank.dtype:
            refuse(f"{what} is {value.dtype} in the state, expected {blank.dtype}")
        return dense(value, what)
    number = number_of(dense(value, what) if isinstance(value, torch.Tensor) else value)
    if number is None or isinstance(number, bool) or not (0 <= number < _MOST_STEPS and number == int(number)):
        refuse(f"{what} is {shown(value)} in the state, expected a number of steps")
    return torch.tensor(number, dtype=blank.dtype, device="cpu")


# Schedules


def _load_schedule(bound: BoundOptimizer, update: Node, saved: Any, order: Sequence[int]) -> None:
    name, given = f"the schedule of {update.name}", copied(saved)
    if not isinstance(given, Mapping):
        refuse(f"{name} is {type(saved).__name__} in the state, expected a dict")
    if list(order) != sorted(order):
        given = _reordered(given, order, name)
    _check_alike(bound.schedule.state_dict(), given, name)
    try:
        bound.schedule.load_state_dict(dict(given))
        _rehearse(bound)
    except Exception as error:  # it may be the user's own
        raise HetuError(f"torch refuses the state of {update.name}: {error!r}", op="load", where=caller()) from error


def _rehearse(bound: BoundOptimizer) -> None:
    """Makes a step of one of torch's schedules and takes it back: a state may be whole and yet mean nothing to it."""
    if not type(bound.schedule).__module__.startswith("torch."):
        return
    before = bound.before()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses the optimiser's step before it
            bound.step_schedule(torch.zeros((), device="cpu"))
    except ValueError:  # it may have come to its end, and be loaded to be looked at
        pass
    finally:
        before.restore()


def _reordered(given: Mapping[str, Any], order: Sequence[int], name: str) -> dict[str, Any]:
    """A schedule's state with what it has for each group in the order of the graph's groups."""
    found = {}
    for key, value in given.items():
        found[key] = value
        if key == "_schedulers":
            found[key] = [_reordered(one, order, name) for one in value]
        elif isinstance(value, (list, tuple)) and len(value) == len(order) and key not in NOT_OF_GROUPS:
            if key not in ONE_PER_GROUP and any(item != value[0] for item in value):
                refuse(
                    f"{key} of {name} may be of groups, which have another order here",
                    "give minimize the groups in the order that they had",
                )
            found[key] = [value[place] for place in order]
    return found


def _check_alike(fresh: Any, given: Any, what: str, key: Any = "") -> None:
    """Refuses what can't take the place of a value that was just made.

    Args:
        fresh: The value that was made.
        given: The value of the state.
        what: What it is, for the error.
        key: The key that it has, or that the list has that it is in.
    """
    number, wanted = number_of(fresh), ""
    if isinstance(number, bool):
        wanted = "" if isinstance(given, bool) else "a bool"
    elif number is not None:
        wanted = "" if _is_alike(number, number_of(given), key) else "a number, as it can be there"
    elif isinstance(fresh, str):
        wanted = "" if isinstance(given, str) else "a string"
    elif isinstance(fresh, Mapping):
        if not isinstance(given, Mapping):
            wanted = "a dict"
        else:
            for inner, value in fresh.items():
                if inner in given:
                    _check_alike(value, given[inner], f"{inner} of {what}", inner)
                elif isinstance(inner, str) and not inner.startswith("_"):  # private ones come and go with torch
                    refuse(f"{what} has no {inner} in the state")
    elif isinstance(fresh, (list, tuple)):
        if not isinstance(given, (list, tuple)) or (len(given) != len(fresh) and key in ONE_PER_GROUP):
            wanted = f"a list of {len(fresh)}"
        else:
            for i, (one, other) in enumerate(zip(fresh, given, strict=False)):
                _check_alike(one, other, f"entry {i} of {what}", key)
    if wanted:
        refuse(f"{what} is {shown(given)} in the state, expected {wanted}")


def _is_alike(fresh: float, given: float | None, key: Any) -> bool:
    """Whether a number can take the place of another one."""
    if given is None or isinstance(given, bool) or (isinstance(given, int) and abs(given) >= _MOST_STEPS):
        return False
    if key in ("last_epoch", "_step_count"):
        return isinstance(given, int) and given >= -1
    if key in RATES:
        return 0 <= given < math.inf
    return not math.isnan(given) or math.isnan(fresh)
