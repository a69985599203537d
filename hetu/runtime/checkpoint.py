"""A graph's state as a nested dict: given, and taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from hetu import rng
from hetu.arguments import array, int_of, integer, mapping, number_of
from hetu.backends.comm import current_world
from hetu.backends.comm.boxes import cut
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.errors import DTypeError, HetuError, ShapeError, caller
from hetu.graph import Node
from hetu.graph.running import LoadedNames
from hetu.runtime.copies import copied, dense, refuse
from hetu.runtime.homes import stage_of
from hetu.runtime.optimizers import BoundOptimizer
from hetu.runtime.parameters import ByBox, sum_dtype
from hetu.runtime.pieces import Pieces, everyones_pieces, is_elsewhere, own_pieces, whole_tensors
from hetu.runtime.ranks.digests import state_parts
from hetu.runtime.saved_optimizers import check_names, load_optimizer
from hetu.runtime.state import GraphState, Waiting, as_sum

FORMAT = 1


def state_dict(state: GraphState, copy: bool = True, op: str = "state_dict") -> dict[str, Any]:
    """See :meth:`hetu.Graph.state_dict`; without ``copy`` its tensors are the graph's own."""
    with at_rest(state):
        updates = _updates_of(state)
        if is_elsewhere(state, updates):
            pieces = everyones_pieces(state, updates, current_world(), op)
        else:
            pieces = own_pieces(state, updates, lambda _: True)
        parts = parts_of(state, state.parameters.nodes, updates, pieces)
        seed, offset = rng.get_state()
        state.settle()  # it made all parameters, and what was told of them must stay true
        if not state.waiting:
            del parts["waiting_losses"]
        found = {"format": FORMAT, **parts, "rng": {"seed": seed, "offset": offset}}
        return dict(copied(found, with_tensors=copy))


@contextmanager
def at_rest(state: GraphState) -> Iterator[None]:
    """A block in which nobody changes the state. What it locks for messages, it locks first, as runs do."""
    is_cut = is_elsewhere(state, _updates_of(state))
    with current_world().lock if is_cut else nullcontext(), state.lock:
        yield


def _updates_of(state: GraphState) -> list[Node]:
    """The updates for which something is kept."""
    return list(dict.fromkeys([*state.waiting, *state.optimizers]))


def parts_of(state: GraphState, nodes: Sequence[Node], updates: Sequence[Node], pieces: Pieces) -> dict[str, Any]:
    """What a state has of some parameters and of some updates, with its own tensors.

    Args:
        state: The state. Parameters that were never needed before are made.
        nodes: The parameters.
        updates: Nodes that ``minimize`` made.
        pieces: What is told of the updates' gradients and optimisers, and of parameters of which ranks have parts. Of
            these a few words are told where there is no piece.
    """
    parameters = whole_tensors(pieces, "parameters", "")

    def of_parameter(node: Node) -> Any:
        return parameters[node.name][""] if node.name in parameters else state.parameters.told(node)

    def of_optimizer(update: Node, bound: BoundOptimizer) -> dict[str, Any]:
        return {
            "kind": bound.spec.kind,
            "state": whole_tensors(pieces, "optimizers", update.name),
            "groups": bound.named_groups(),
            "schedule": None if bound.schedule is None else bound.schedule.state_dict(),
        }

    def of_gradients(update: Node) -> dict[str, Any]:
        named = whole_tensors(pieces, "gradients", update.name)
        return {name: one for name, (one,) in ((name, values.values()) for name, values in named.items())}

    waiting = {update: state.waiting[update] for update in updates if update in state.waiting}
    optimizers = {update: state.optimizers[update] for update in updates if update in state.optimizers}
    return {
        "parameters": {node.name: of_parameter(node) for node in nodes},
        "gradients": {update.name: of_gradients(update) for update in waiting},
        "waiting_losses": {update.name: one.loss for update, one in waiting.items()},
        "optimizers": {update.name: of_optimizer(update, bound) for update, bound in optimizers.items()},
    }


def load_state_dict(state: GraphState, given: Mapping[str, Any]) -> None:
    """See :meth:`hetu.Graph.load_state_dict`: everything is checked and made first, then put in place."""
    try:
        with state.lock:
            fresh, (seed, offset) = _checked(state, given)
            state.become(fresh)
            rng.set_state(seed, offset)
    except (HetuError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what is damaged may fail anywhere
        raise HetuError(f"this is no whole state of a graph: {error!r}", op="load", where=caller()) from error


def load_parameters(state: GraphState, given: Any, strict: bool) -> LoadedNames:
    """See :meth:`hetu.Graph.load_parameters`: the state as it is, but for the given values, takes the state's place."""
    op, nodes = "load_parameters", {node.name: node for node in state.parameters.nodes}
    values = mapping(given, "given", "parameters' names and arrays", op=op)
    missing, unexpected = [name for name in nodes if name not in values], [key for key in values if key not in nodes]
    if strict and (missing or unexpected):
        sides = {"missing": missing, "unknown": unexpected}
        told = "; ".join(f"{side}: {', '.join(map(str, names))}" for side, names in sides.items() if names)
        what, fix = f"given are not the parameters of the graph; {told}", "pass strict=False to load those of both"
        raise HetuError(what, op=op, where=caller(), fix=fix)
    found = {name: _read(values[name], node, op) for name, node in nodes.items() if name in values}
    with at_rest(state):
        now = state_dict(state, copy=False, op=op)
        load_state_dict(state, {**now, "parameters": {**now["parameters"], **found}})
    return LoadedNames(missing, list(map(str, unexpected)))


def _read(value: Any, node: Node, op: str) -> torch.Tensor:
    """An array of any floating dtype as a parameter's value."""
    what, shape = f"the value of {node.name} in given", tuple(node.attrs["shape"])
    read: torch.Tensor = array(value, what, op=op)
    if isinstance(read, np.ndarray):
        read = torch.from_numpy(read.astype(np.float32) if read.dtype.name == "bfloat16" else read)
    if not read.is_floating_point():
        text, fix = f"expected {what} to be floating, got {read.dtype}", "convert it first: .float()"
        raise DTypeError(text, op=op, where=caller(), fix=fix)
    if tuple(read.shape) != shape:
        text, fix = f"expected {what} to have shape {list(shape)}, got {list(read.shape)}", "transpose or cut it first"
        raise ShapeError(text, op=op, where=caller(), fix=fix)
    return read.to(TORCH_DTYPES[node.attrs["dtype"]])


def _checked(state: GraphState, given: Mapping[str, Any]) -> tuple[GraphState, tuple[int, int]]:
    """The given state as a new one of the same graph, which shares nothing with it, and that of the generator."""
    for part in ("format", "parameters", "gradients", "optimizers", "rng"):
        if not isinstance(given, Mapping) or part not in given:
            what = f"this is no state of a graph: it has no {part!r}"
            refuse(what, "pass what g.state_dict() or hetu.load(...) gave")
    if int_of(given["format"]) != FORMAT:
        refuse(f"the state has format {given['format']}, expected {FORMAT}", "use the hetu that wrote it")
    fresh = state.blank()
    updates = {node.name: node for node in state.updates}
    _load_parameters(fresh, given["parameters"])
    losses = given.get("waiting_losses", dict.fromkeys(given["gradients"], 0.0))  # states of earlier versions have none
    check_names("updates with a waiting loss", losses, given["gradients"])
    for name, grads in given["gradients"].items():
        update = _find_update(state, updates, name, grads)
        fresh.waiting[update] = _waiting(fresh, update, grads, losses[name])
        _note_loaded(fresh, update, "gradients", grads)
    for name, saved in given["optimizers"].items():
        names = [parameter for group in saved["groups"] for parameter in group["params"]]
        update = _find_update(state, updates, name, names)
        if len(names) > len(set(names)):
            refuse(f"a parameter of {name} is in two groups of the state")
        load_optimizer(fresh, update, saved)
        _note_loaded(fresh, update, "state", saved["state"])
    most = 2**63 - 1
    seed = integer(given["rng"]["seed"], "the generator's seed", least=0, most=most, op="load")
    offset = integer(given["rng"]["offset"], "the generator's offset", least=0, most=most, op="load")
    return fresh, (seed, offset)


def _note_loaded(fresh: GraphState, update: Node, part: str, whole: Mapping[str, Any]) -> None:
    """Notes what something was cut from, so that ranks can compare it: what they have of it differs."""
    if is_elsewhere(fresh, [update]):
        lines = (line.partition(" = ") for line in state_parts(whole))
        fresh.loaded.setdefault(update.name, {})[part] = {path: text for path, _, text in lines}


def _load_parameters(fresh: GraphState, given: Mapping[str, Any]) -> None:
    store = fresh.parameters
    check_names("parameters", given, [node.name for node in store.nodes])
    for node in store.nodes:
        dtype = TORCH_DTYPES[node.attrs["dtype"]]
        whole = _like(given[node.name], node, f"parameter {node.name}", (dtype,))
        store.set_whole(node, whole)


def _waiting(fresh: GraphState, update: Node, grads: Mapping[str, Any], loss: Any) -> Waiting:
    """Gradients that wait, and the loss of the runs that made them."""
    store, parts = fresh.parameters, ByBox()
    for node in fresh.parameters_of(update):
        dtypes = (sum_dtype(node), TORCH_DTYPES[node.attrs["dtype"]])
        whole = _like(grads[node.name], node, f"the gradient of {node.name}", dtypes)
        whole = whole.to(store.device(), dtypes[0], copy=True, memory_format=torch.contiguous_format)
        parts |= {
            (node, box): cut(whole, box) for box in store.homes.here(store.homes.of(node, stage_of(update)).gradient)
        }
    if isinstance(loss, torch.Tensor):
        loss = dense(loss, f"the waiting loss of {update.name}")
        if loss.ndim or not loss.is_floating_point():
            refuse(f"the waiting loss of {update.name} is {loss.dtype} of shape {list(loss.shape)}, expected a number")
    elif (loss := number_of(loss)) is None or isinstance(loss, bool):
        refuse(f"the waiting loss of {update.name} is no number")
    return Waiting(parts, as_sum(torch.as_tensor(loss, device="cpu")).to(store.device(), copy=True))


def _find_update(state: GraphState, updates: Mapping[str, Node], name: str, parameters: Any) -> Node:
    if name not in updates:
        names = ", ".join(updates) or "none"
        what = f"the state has an optimiser of {name}, which the graph has not; it has {names}"
        refuse(what, "give minimize's node the same name: minimize(loss, name=...)")
    check_names(f"parameters of {name}", parameters, [node.name for node in state.parameters_of(updates[name])])
    return updates[name]


def _like(value: Any, node: Node, what: str, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """Demands a tensor of a parameter's shape and of one of some dtypes."""
    shape = tuple(node.attrs["shape"])
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        refuse(f"{what} has shape {list(getattr(value, 'shape', ()))} in the state, expected {list(shape)}")
    if value.dtype not in dtypes:
        refuse(f"{what} is {value.dtype} in the state, expected {' or '.join(map(str, dict.fromkeys(dtypes)))}")
    return dense(value, what)
