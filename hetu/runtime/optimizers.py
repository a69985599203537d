"""Optimisers of ``torch.optim``, bound to the parts of parameters that a rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetu.errors import HetuError
from hetu.graph import Node
from hetu.optim import Optimizer
from hetu.runtime.parameters import ByBox, ParameterBox, ParameterStore
from hetu.runtime.placement import Box

NamedState = Mapping[str, Mapping[str, Any]]
"""An optimiser's state by the name of the parameter and the name of the state: of whole parameters, on all ranks."""


@dataclass(slots=True)
class BoundOptimizer:
    """An optimiser of a graph, once its parameters have values.

    Attributes:
        spec: What the user made.
        groups: The parameters, in groups with options of their own.
        params: Their storages on this rank, by box, in the order of the groups.
        optimizer: That of torch, of the same storages in the same order.
        schedule: That of torch, or None.
    """

    spec: Optimizer
    groups: Sequence[Sequence[Node]]
    params: ByBox
    optimizer: torch.optim.Optimizer
    schedule: Any

    @classmethod
    def of(cls, update: Node, parameters: Sequence[Node], store: ParameterStore) -> BoundOptimizer:
        """An optimiser without a past.

        Args:
            update: The node that ``minimize`` made.
            parameters: What it updates, in the order of its gradients.
            store: Gives their storages.

        Raises:
            HetuError: If torch refuses its options, or it needs whole parameters and this rank holds parts.
        """
        spec: Optimizer = update.attrs["optimizer"]
        rest, groups, options = iter(parameters), [], []
        for count, own in update.attrs["groups"]:
            groups.append([next(rest) for _ in range(count)])
            options.append({"params": list(store.storages(groups[-1]).values()), **own})
        params = store.storages(parameters)
        if not spec.is_elementwise:
            _refuse_parts(spec, params)
        try:
            optimizer = getattr(torch.optim, spec.kind)(options, **spec.options)
            schedule = spec.schedule(optimizer) if spec.schedule is not None else None
        except (TypeError, ValueError) as error:
            what = f"torch.optim.{spec.kind} refuses its options: {error}"
            raise HetuError(what, op="minimize", where=spec.where, fix="see torch's documentation of it") from error
        return cls(spec, groups, params, optimizer, schedule)

    def step(self, grads: ByBox, loss: torch.Tensor) -> torch.Tensor:
        """Clips and applies gradients; gives their norm before that. They are changed."""
        params = list(self.params.values())
        own = [grads[key].to(param) for key, param in self.params.items()]
        norm = torch.nn.utils.get_total_norm(own)
        if self.spec.max_grad_norm is not None:
            for param, grad in zip(params, own, strict=True):
                param.grad = grad
            torch.nn.utils.clip_grads_with_norm_(params, self.spec.max_grad_norm, norm)
        try:
            for param, grad in zip(params, own, strict=True):
                param.grad = grad
            self.optimizer.step()
        finally:
            for param in params:
                param.grad = None
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(float(loss))
        elif self.schedule is not None:
            self.schedule.step()
        return norm

    def named_state(self, store: ParameterStore) -> dict[str, dict[str, Any]]:
        """The state of whole parameters, by names. Parameters that never were updated have none."""
        by_node: dict[Node, dict[Box, Mapping[str, Any]]] = {}
        for (node, box), param in self.params.items():
            if param in self.optimizer.state:
                by_node.setdefault(node, {})[box] = self.optimizer.state[param]
        return {node.name: _gathered(node, boxes, store) for node, boxes in by_node.items()}

    def named_groups(self) -> list[dict[str, Any]]:
        """The options of each group, with the names of its parameters."""
        return [
            {**{key: value for key, value in group.items() if key != "params"}, "params": [node.name for node in nodes]}
            for group, nodes in zip(self.optimizer.param_groups, self.groups, strict=True)
        ]

    def load(self, state: NamedState, options: Sequence[Mapping[str, Any]], store: ParameterStore) -> None:
        """Goes on from a state.

        Args:
            state: What :meth:`named_state` gave, on however many ranks. Nothing of it is kept: tensors are copied.
            options: The options of each group.
            store: Says which part of each tensor this rank keeps.
        """
        own: dict[ParameterBox, dict[str, Any]] = {key: {} for key in self.params}
        for node in dict.fromkeys(node for node, _ in self.params):
            for name, value in state.get(node.name, {}).items():
                for key, part in _cut(node, value, store).items():
                    own[key][name] = part
        # torch numbers the parameters of an optimiser, and only its own loading converts and completes a state.
        number = {key: i for i, key in enumerate(self.params)}
        groups = [
            {**group, "params": [number[key] for key in store.storages(nodes)]}
            for group, nodes in zip(options, self.groups, strict=True)
        ]
        states = {number[key]: values for key, values in own.items() if values}
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _gathered(node: Node, boxes: Mapping[Box, Mapping[str, Any]], store: ParameterStore) -> dict[str, Any]:
    """A parameter's state: what has an element for each of the parameter's is gathered, the rest is the same in all."""
    first = next(iter(boxes.values()))
    return {
        name: store.gather(node, {box: own[name] for box, own in boxes.items()}) if _is_elementwise(value) else value
        for name, value in first.items()
    }


def _cut(node: Node, value: Any, store: ParameterStore) -> dict[ParameterBox, Any]:
    """The inverse of :func:`_gathered`, of one value."""
    if _is_elementwise(value):
        return dict(store.cut(node, value.clone()))
    # Each box counts its own steps, in place.
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key in store.storages([node])}


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _refuse_parts(spec: Optimizer, params: ByBox) -> None:
    for node, box in params:
        if box != Box.whole(node.attrs["shape"]):
            raise HetuError(
                f"torch.optim.{spec.kind} updates whole parameters, but a rank holds a part of {node.name}",
                op="minimize",
                where=spec.where,
                fix="use an optimiser that is elementwise, or keep the parameter whole",
            )
