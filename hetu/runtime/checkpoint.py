"""A graph's state as a nested dict, and that dict as a safetensors file.

The file's tensors are those of the dict under made-up keys; its metadata has the dict itself as JSON, in which
``{"tensor": key}`` stands for a tensor. So names may hold anything, and numbers come back exactly.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from hetu import rng
from hetu.errors import HetuError, caller
from hetu.graph import Node
from hetu.runtime.optimizers import BoundOptimizer
from hetu.runtime.parameters import ByBox
from hetu.runtime.state import GraphState

FORMAT = 1
PATH = str | os.PathLike[str]

# The dict


def state_dict(state: GraphState, copy: bool = False) -> dict[str, Any]:
    """See :meth:`hetu.Graph.state_dict`; without ``copy`` its tensors are the graph's own."""

    def mine(x: Any) -> Any:
        return x.clone() if copy and isinstance(x, torch.Tensor) else x

    def of_optimizer(bound: BoundOptimizer) -> dict[str, Any]:
        named = bound.named_state(store)
        return {
            "kind": bound.spec.kind,
            "state": {name: {key: mine(value) for key, value in own.items()} for name, own in named.items()},
            "groups": bound.named_groups(),
            "schedule": None if bound.schedule is None else bound.schedule.state_dict(),
        }

    store = state.parameters
    seed, offset = rng.get_state()
    return {
        "format": FORMAT,
        "parameters": {node.name: mine(store.whole(node)) for node in store.nodes},
        "gradients": {
            update.name: {
                node.name: mine(store.gather(node, {box: grads[node, box] for box in store.boxes(node)}))
                for node in state.parameters_of(update)
            }
            for update, grads in state.gradients.items()
        },
        "optimizers": {update.name: of_optimizer(bound) for update, bound in state.optimizers.items()},
        "rng": {"seed": seed, "offset": offset},
    }


def load_state_dict(state: GraphState, given: Mapping[str, Any]) -> None:
    """See :meth:`hetu.Graph.load_state_dict`: everything is checked and made first, then put in place."""
    try:
        fresh, (seed, offset) = _checked(state, given)
    except (KeyError, TypeError, AttributeError) as error:
        raise HetuError(f"this is no whole state of a graph: {error!r}", op="load", where=caller()) from error
    state.become(fresh)
    rng.set_state(seed, offset)


def _checked(state: GraphState, given: Mapping[str, Any]) -> tuple[GraphState, tuple[int, int]]:
    """The given state as a new one of the same graph, and that of the generator."""
    for part in ("format", "parameters", "gradients", "optimizers", "rng"):
        if not isinstance(given, Mapping) or part not in given:
            what = f"this is no state of a graph: it has no {part!r}"
            _refuse(what, "pass what g.state_dict() or hetu.load(...) gave")
    if given["format"] != FORMAT:
        _refuse(f"the state has format {given['format']}, expected {FORMAT}", "use the hetu that wrote it")
    fresh = state.blank()
    store, device = fresh.parameters, fresh.parameters.device()
    updates = {node.name: node for node in state.updates}
    _check_names("parameters", given["parameters"], [node.name for node in store.nodes])
    for node in store.nodes:
        whole = _like(given["parameters"][node.name], node, f"parameter {node.name}")
        store.set_whole(node, whole.to(device, copy=True))
    for name, grads in given["gradients"].items():
        update = _find_update(state, updates, name, grads)
        fresh.gradients[update] = waiting = ByBox()
        for node in state.parameters_of(update):
            whole = _like(grads[node.name], node, f"the gradient of {node.name}", any_dtype=True)
            waiting |= store.cut(node, whole.to(device, copy=True))
    seed, offset = int(given["rng"]["seed"]), int(given["rng"]["offset"])
    for name, saved in given["optimizers"].items():
        update = _find_update(state, updates, name, {p for group in saved["groups"] for p in group["params"]})
        _load_optimizer(fresh, update, saved)
    return fresh, (seed, offset)


def _load_optimizer(state: GraphState, update: Node, saved: Mapping[str, Any]) -> None:
    """Makes the optimiser of an update node in a state that has none yet."""
    nodes = state.parameters_of(update)
    bound = state.optimizer(update)
    if saved["kind"] != bound.spec.kind:
        _refuse(f"the state of {update.name} is that of {saved['kind']}, but it is {bound.spec.kind} here")
    for node in nodes:
        for key, value in saved["state"].get(node.name, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                _like(value, node, f"{key} of {node.name}", any_dtype=True)
    if (saved["schedule"] is None) != (bound.schedule is None):
        _refuse(f"{update.name} has a schedule in the state or in the graph, but not in both")
    if [len(group["params"]) for group in saved["groups"]] != [len(group) for group in bound.groups]:
        _refuse(f"the groups of {update.name} have other sizes in the state")
    try:
        bound.load(saved["state"], [_with_tuples(group) for group in saved["groups"]], state.parameters)
        if bound.schedule is not None:
            bound.schedule.load_state_dict(dict(saved["schedule"]))
    except (KeyError, TypeError, ValueError) as error:
        raise HetuError(f"torch refuses the state of {update.name}: {error}", op="load", where=caller()) from error


def _with_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, which ``betas`` are."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}


def _find_update(state: GraphState, updates: Mapping[str, Node], name: str, parameters: Any) -> Node:
    if name not in updates:
        names = ", ".join(updates) or "none"
        what = f"the state has an optimiser of {name}, which the graph has not; it has {names}"
        _refuse(what, "give minimize's node the same name: minimize(loss, name=...)")
    _check_names(f"parameters of {name}", parameters, [node.name for node in state.parameters_of(updates[name])])
    return updates[name]


def _check_names(what: str, given: Any, wanted: Any) -> None:
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        _refuse(f"the {what} of the state are not the graph's; {'; '.join(parts)}", "build the graph that it is of")


def _like(value: Any, node: Node, what: str, any_dtype: bool = False) -> torch.Tensor:
    """Demands a tensor of a parameter's shape and dtype."""
    shape, dtype = tuple(node.attrs["shape"]), node.attrs["dtype"].name
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        _refuse(f"{what} has shape {list(getattr(value, 'shape', ()))} in the state, expected {list(shape)}")
    if not any_dtype and str(value.dtype) != f"torch.{dtype}":
        _refuse(f"{what} is {value.dtype} in the state, expected torch.{dtype}")
    return value


def _refuse(what: str, fix: str | None = None) -> NoReturn:
    raise HetuError(what, op="load", where=caller(), fix=fix)


# The file


def save(state: Mapping[str, Any], path: PATH) -> None:
    """See :func:`hetu.save`."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_without_tensors(state, tensors))
    target = Path(path)
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    try:
        save_file(tensors, beside, metadata={"hetu": text})
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A JSON value in which keys stand for tensors, which are put aside."""
    if isinstance(value, torch.Tensor):
        key = f"t{len(tensors)}"
        # A file has each tensor whole and by itself, however they lie in memory.
        tensors[key] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": [[key, _without_tensors(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise HetuError(
        f"a state may hold tensors, numbers and strings, not {type(value).__name__}",
        op="save",
        where=caller(),
        fix="use a schedule that torch itself can save",
    )


def load(path: PATH) -> dict[str, Any]:
    """See :func:`hetu.load`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "hetu" not in metadata:
                _refuse(f"{path} is a safetensors file, but not one that hetu.save wrote", "load it with safetensors")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
            found = _with_tensors(json.loads(metadata["hetu"]), tensors)
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise HetuError(
            f"{path} is no whole safetensors file: {error}", op="load", where=caller(), fix="use an earlier checkpoint"
        ) from error
    if not isinstance(found, dict):
        _refuse(f"{path} holds no state of a graph")
    return found


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _with_tensors(item, tensors) for key, item in value["dict"]}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value
