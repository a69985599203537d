"""Optimisers of ``torch.optim``, bound to the parts of parameters that a rank holds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from hetu.backends.comm.boxes import within
from hetu.backends.dtypes import TORCH_DTYPES
from hetu.errors import HetuError, caller
from hetu.graph import Node
from hetu.optim import Optimizer
from hetu.parallel.placement import Box
from hetu.runtime.before import Before
from hetu.runtime.copies import copied
from hetu.runtime.homes import stage_of
from hetu.runtime.modes import on_cpu_by_default
from hetu.runtime.parameters import ByBox, ParameterBox, ParameterStore, new_number

NamedState = Mapping[str, Mapping[str, Any]]
"""An optimiser's state by the name of the parameter and the name of the state: of whole parameters, on all ranks."""

FUSED_ON = {"cuda"}
"""The types of devices on which parameters are updated by torch's fused kernels, if the user chooses no others.

They read and write each value once, and not once for each operation. On a CPU the last bit would depend on where a
tensor ends.
"""


@dataclass(slots=True)
class BoundOptimizer:
    """An optimiser of a graph, once its parameters have values.

    Attributes:
        spec: What the user made.
        groups: The parameters, in groups with options of their own.
        params: What of them is updated in this process, by box, in the order of the groups.
        optimizer: That of torch, of the same tensors in the same order.
        schedule: That of torch, or None.
        version: That of :class:`~hetu.runtime.homes.Homes` for which it is bound.
        are_fused: Of each group whether it is updated by fused kernels that the user did not ask for.
        number: See :func:`~hetu.runtime.parameters.new_number`.
    """

    spec: Optimizer
    groups: Sequence[Sequence[Node]]
    params: ByBox
    optimizer: torch.optim.Optimizer
    schedule: Any
    version: int
    are_fused: list[bool]
    number: int = field(default_factory=new_number)

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
        rest, groups, options, params, are_fused = iter(parameters), [], [], ByBox(), []
        for count, own in update.attrs["groups"]:
            groups.append([next(rest) for _ in range(count)])
            own_params = store.updated(groups[-1], stage_of(update))
            params |= own_params
            are_fused.append(_is_fused(spec, {**spec.options, **own}, store.device()))
            fused = {"fused": True} if are_fused[-1] else {}
            options.append({"params": list(own_params.values()), **copied(own), **fused})
        if not spec.is_elementwise:
            _refuse_parts(spec, params)
        with _told("minimize", spec):
            for _, own in update.attrs["groups"]:  # torch itself looks at those of the optimiser only
                _try_options(spec, {**spec.options, **own}, store.device())
            optimizer = _kind(spec)(options, **copied(spec.options))
            schedule = spec.schedule(optimizer) if spec.schedule is not None else None
            for name in ("step", "state_dict", "load_state_dict") if schedule is not None else ():
                if not callable(getattr(schedule, name, None)):
                    raise TypeError(f"schedule gave a {type(schedule).__name__}, which has no {name}()")
        return cls(spec, groups, params, optimizer, schedule, store.homes.version, are_fused)

    def check_places(self, update: Node, store: ParameterStore) -> None:
        """Refuses to go on where a later update has cut what this one trains.

        Args:
            update: The node that ``minimize`` made.
            store: Says where parameters lie.
        """
        version = store.homes.version
        if self.version == version:
            return
        now = store.updated([node for nodes in self.groups for node in nodes], stage_of(update))
        if now.keys() != self.params.keys() or not all(_is_same(now[key], x) for key, x in self.params.items()):
            raise HetuError(
                f"{update.name} has trained parameters that an update with a zero_stage, added since, cuts",
                op="run",
                where=caller(),
                fix="add all updates before the first run, or go on from a state that was saved: "
                "g.load_state_dict(hetu.load(path))",
            )
        self.version = version

    def check(self, options: Mapping[str, Any], device: torch.device) -> None:
        """Refuses loaded options of a group that torch would refuse of an optimiser on the device."""
        own = {key: value for key, value in options.items() if key in _arguments(self.spec)}
        with _told("load", self.spec):
            _try_options(self.spec, own, device)

    def blank_state(
        self, options: Sequence[Mapping[str, Any]], is_widest: bool = False
    ) -> dict[str, dict[str, torch.Tensor]]:
        """What a first step makes for each whole parameter, by name.

        It is made on the meta device, so it costs no memory. What torch keeps on the host, such as a number of steps,
        lies on the CPU.

        Args:
            options: The options of each group.
            is_widest: True for all that the optimiser may keep, if options that decide it had other values earlier.
        """
        names, params, groups = [], [], []
        takes = _arguments(self.spec)
        plain = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
        wide = {"momentum": 0.9, "amsgrad": True} if is_widest else {}
        for nodes, own in zip(self.groups, options, strict=True):
            like = [(tuple(node.attrs["shape"]), TORCH_DTYPES[node.attrs["dtype"]]) for node in nodes]
            group = [torch.zeros(shape, dtype=dtype, device="meta") for shape, dtype in like]
            names += [node.name for node in nodes]
            params += group
            chosen = {key: value for key, value in {**own, **plain, **wide}.items() if key in takes}
            groups.append({**chosen, "params": group})
        for param in params:
            param.grad = torch.zeros_like(param)
        with _told("load", self.spec), torch.no_grad():
            optimizer = _kind(self.spec)(groups)
            with on_cpu_by_default():
                optimizer.step()
        return {name: dict(optimizer.state.get(param, {})) for name, param in zip(names, params, strict=True)}

    def before(self) -> Before:
        """All that :meth:`step` may change, as it is now."""
        return Before(self.optimizer, self.schedule)

    def step(self, grads: ByBox, norm: torch.Tensor, loss: torch.Tensor) -> None:
        """Clips and applies gradients.

        They are in at least float32 and are narrowed to the parameters' dtypes only when nothing is left but to apply
        them: squares of large ones have no place in float16.

        Args:
            grads: They are changed.
            norm: That of the gradients of all ranks.
            loss: What a schedule may look at.
        """
        params, by_node = list(self.params.values()), dict[Node, dict[Box, torch.Tensor]]()
        for (node, box), grad in grads.items():
            by_node.setdefault(node, {})[box] = grad
        own = [within(by_node[node], box).to(param.device) for (node, box), param in self.params.items()]
        try:
            if self.spec.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(_holders(params, own), self.spec.max_grad_norm, norm)
            for param, grad in zip(params, own, strict=True):
                param.grad = grad.to(param.dtype)
            with on_cpu_by_default():
                self.optimizer.step()
        finally:
            for param in params:
                param.grad = None
        self.step_schedule(loss)

    def step_schedule(self, loss: torch.Tensor) -> None:
        """Steps the schedule, if there is one; it may look at the loss."""
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(float(loss))
        elif self.schedule is not None:
            self.schedule.step()

    def named_groups(self) -> list[dict[str, Any]]:
        """The options of each group, the same on all devices, with the names of its parameters."""
        named = []
        for group, nodes, is_fused in zip(self.optimizer.param_groups, self.groups, self.are_fused, strict=True):
            chosen = {"fused": None} if is_fused else {}
            named.append({**group, **chosen, "params": [node.name for node in nodes]})
        return named

    def load(self, state: NamedState, options: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Goes on from a state.

        Args:
            state: Of whole parameters. Nothing of it is kept: what this process needs of it is copied.
            options: The options of each group.
            device: Where the parameters lie.
        """
        self.are_fused = [_is_fused(self.spec, own, device) for own in options]
        own: dict[ParameterBox, dict[str, Any]] = {
            (node, box): {name: _part(value, box) for name, value in state.get(node.name, {}).items()}
            for node, box in self.params
        }
        # torch numbers the parameters of an optimiser, and only its own loading converts and completes a state.
        number = {key: i for i, key in enumerate(self.params)}
        groups = [
            {**group, "params": [number[key] for key in self.params if key[0] in set(nodes)]}
            | ({"fused": True} if is_fused else {})
            for group, nodes, is_fused in zip(options, self.groups, self.are_fused, strict=True)
        ]
        states = {number[key]: values for key, values in own.items() if values}
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are one in memory."""
    return one.data_ptr() == other.data_ptr()


def _kind(spec: Optimizer) -> Any:
    return getattr(torch.optim, spec.kind)


def _arguments(spec: Optimizer) -> Mapping[str, Any]:
    """What the optimiser of torch takes."""
    return inspect.signature(_kind(spec)).parameters


def _is_fused(spec: Optimizer, options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a group with these options is updated by fused kernels, because the user chooses no others."""
    is_left_open = all(options.get(name) is None for name in ("fused", "foreach")) and not options.get("differentiable")
    return is_left_open and spec.takes is not None and "fused" in spec.takes and device.type in FUSED_ON


def _try_options(spec: Optimizer, options: Mapping[str, Any], device: torch.device) -> None:
    _kind(spec)([torch.zeros(1, device="cpu")], **options)
    if options.get("capturable") and device.type == "cpu":
        raise ValueError("capturable is for parameters on a GPU, and these lie on the CPU")


class _told:  # noqa: N801 - a block of its own; a generator would hide the user's line
    """Tells what torch, or a user's schedule, refuses in a block as an error of the line that gave the options."""

    def __init__(self, op: str, spec: Optimizer) -> None:
        self._op, self._spec = op, spec

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, HetuError):
            what = f"torch.optim.{self._spec.kind} refuses its options: {error}"
            where = self._spec.where if self._op == "minimize" else caller()
            raise HetuError(what, op=self._op, where=where, fix="see torch's documentation of it") from error


def _holders(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that have these gradients, which is what torch clips; a tensor can only have one of its own dtype."""
    holders = []
    for param, grad in zip(params, grads, strict=True):
        holder = param if param.dtype == grad.dtype else grad.new_empty(()).expand_as(grad)  # of one element
        holder.grad = grad
        holders.append(holder)
    return holders


def _part(value: Any, box: Box) -> Any:
    """What belongs to a box of a value of a whole parameter's state, copied: each box counts its own steps in place."""
    if not isinstance(value, torch.Tensor):
        return value
    part = value[box.slices_in(Box.whole(value.shape))] if value.ndim else value
    return part.clone(memory_format=torch.contiguous_format)


def _refuse_parts(spec: Optimizer, params: ByBox) -> None:
    for node, box in params:
        if box != Box.whole(node.attrs["shape"]):
            raise HetuError(
                f"torch.optim.{spec.kind} updates whole parameters, but a rank holds a part of {node.name}",
                op="minimize",
                where=spec.where,
                fix="use an optimiser that is elementwise, or keep the parameter whole",
            )
