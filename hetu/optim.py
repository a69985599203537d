"""Optimisers: what ``minimize`` adds to a graph. The arithmetic is that of ``torch.optim``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from hetu.arguments import flag, integer, is_torch, items, number_of, real, refuse, shown, text
from hetu.dtypes import bfloat16, float16, float32
from hetu.errors import DTypeError, HetuError, ShapeError, caller
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Role, Tensor, TensorSpec, gradients, register
from hetu.graph.autodiff import reached_by_gradients
from hetu.graph.names import all_or_nothing
from hetu.graph.passes import live_nodes, nodes_of
from hetu.ops import all_reduce, cast
from hetu.parallel.placement import STAGES

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "grad_norm"]

Groups = Sequence[Tensor] | Sequence[Mapping[str, Any]]

_COMMON = ("lr", "weight_decay", "maximize", "foreach", "differentiable", "fused")
_OF_ADAM = (*_COMMON, "betas", "eps", "amsgrad", "capturable")


class Optimizer:
    """An optimiser of ``torch.optim``, by name. Use :class:`SGD`, :class:`Adam` or :class:`AdamW`.

    Its state belongs to the graph in which it minimises, is made at the first update, and lies in the parameters'
    dtypes on the graph's device.

    Attributes:
        kind: The name of the class in ``torch.optim``.
        is_elementwise: True if it updates each element of a parameter from that element's own gradient and state, so
            that any part of a parameter can be updated by itself. Others need whole parameters.
        takes: The names of its options; None where only torch knows them.
        options: Its arguments.
        max_grad_norm: See :class:`SGD`.
        schedule: See :class:`SGD`.
        zero_stage: See :class:`SGD`.
        where: The line of the user's script that made it.
    """

    kind = "Optimizer"
    is_elementwise = False
    takes: tuple[str, ...] | None = None

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        max_grad_norm: float | None = None,
        schedule: Callable[[Any], Any] | None = None,
        zero_stage: int = 0,
        **options: Any,
    ) -> None:
        self.options = self._checked({"lr": lr, **options}, {})
        self.max_grad_norm, self.schedule, self.where = max_grad_norm, schedule, caller()
        if max_grad_norm is not None:
            wanted = "a positive number, or None"
            self.max_grad_norm = real(max_grad_norm, "max_grad_norm", wanted, lambda x: x > 0, op="minimize")
        if schedule is not None and not callable(schedule):
            self._refuse(
                HetuError,
                f"schedule is {shown(schedule)}, expected a function of the optimiser",
                "write schedule=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)",
            )
        self.zero_stage = self._checked_stage(zero_stage)

    def _checked_stage(self, given: Any) -> int:
        stage = integer(given, "zero_stage", least=0, most=len(STAGES) - 1, op="minimize")
        if STAGES[stage].cuts_state and not self.is_elementwise:
            what = f"zero_stage={stage} cuts parameters for their updates, but {self.kind} needs them whole"
            self._refuse(HetuError, what, "use an optimiser that is elementwise, or zero_stage=0")
        return stage

    def _checked(self, options: Mapping[str, Any], of_all: Mapping[str, Any]) -> dict[str, Any]:
        """Options as copies, refused where torch would refuse them later or not at all.

        Args:
            options: Those of the optimiser, or of a group.
            of_all: Those of the optimiser, which a group's take the place of.
        """
        for name in options:
            if self.takes is not None and name not in self.takes:
                known = ", ".join(sorted(self.takes))
                self._refuse(HetuError, f"torch.optim.{self.kind} has no option {name!r}", f"it has {known}")
        checked = checked_options(options)
        together = {**of_all, **checked}
        for rule, broken in _BROKEN.items():
            if broken(together):
                self._refuse(HetuError, f"torch.optim.{self.kind} refuses its options: {rule}", "change one of them")
        return checked

    def minimize(self, loss: Tensor, parameters: Groups | None = None, name: str | None = None) -> Tensor:
        """Adds the gradients of a loss and the update of parameters to the loss's graph.

        A step's loss is the sum of what ``loss`` gives on the pipelines of the strategy and in the micro-batches of the
        run, and its gradients are those of that sum. For the mean over all tokens of the step, make the loss by
        :func:`hetu.token_mean_loss`.

        Args:
            loss: Floating, without dimensions.
            parameters: What to train: made by ``hetu.parameter``, or a list of dicts as ``torch.optim`` takes
                them, ``{"params": [...], "weight_decay": 0.0}``. None: all parameters that a gradient of the loss
                reaches, so none behind ``hetu.stop_gradient``, and that were made with ``requires_grad``.
            name: Of the node, under which a state dict keeps the optimiser's state; made up if None.

        Returns:
            A tensor to fetch. With ``run_level="update"`` (the default) a run that fetches it adds the gradients of its
            micro-batches to those that runs with ``run_level="grad"`` have left, clips and applies them, and
            forgets them; with ``"compute_only"`` no gradient is computed. Its value is always the loss of the
            run: the sum over pipelines and micro-batches, a single tensor without dimensions.

        Raises:
            ShapeError: If the loss has dimensions.
            DTypeError: If the loss is not floating.
            HetuError: If there is nothing to train, or something else than parameters is named.

        Example:
            >>> import hetu
            >>> with hetu.graph("define_and_run") as g:
            ...     w = hetu.parameter(1.0, [2], name="w")
            ...     train = hetu.optim.SGD(lr=0.25).minimize(hetu.sum(w * w))
            >>> g.run(train), g.run(w)
            (tensor(2.), tensor([0.5000, 0.5000]))
        """
        if name is not None:
            name = text(name, "name", op="minimize")
        if not isinstance(loss, Tensor) or not loss.dtype.is_floating:
            self._refuse(DTypeError, f"expected loss to be a floating tensor, got {shown(loss)}")
        if loss.ndim:
            shape = f"[{', '.join(map(str, loss.shape))}]"
            self._refuse(ShapeError, f"the loss has shape {shape}, expected no dimension", "sum it: hetu.sum(loss)")
        groups = self._groups(loss, parameters)
        params = [item for group in groups for item in group["params"]]
        attrs = {
            "optimizer": self,
            "parameters": tuple(item.op.name for item in params),
            "groups": tuple((len(g["params"]), {k: v for k, v in g.items() if k != "params"}) for g in groups),
        }
        with all_or_nothing(loss.graph):
            # The only place that adds up gradients over pipelines. Who keeps the sums is for the parameters' store to
            # say. The sums are in at least float32: small parts would be lost in bfloat16, and large ones overflow in
            # float16.
            pairs = zip(gradients(loss, params), params, strict=True)
            grads = [self._summed(_widened(grad), param) for grad, param in pairs]
            return loss.graph.apply("update", (loss, *grads), attrs, name)[0]

    def _summed(self, grad: Tensor, param: Tensor) -> Tensor:
        """A gradient's sum over the pipelines, or the part of it that each rank keeps."""
        if not STAGES[self.zero_stage].cuts_gradients:
            return all_reduce(grad)
        attrs = {"parameter": param.op.name, "zero_stage": self.zero_stage}
        return grad.graph.apply("reduce_scatter", (grad,), attrs)[0]

    def _groups(self, loss: Tensor, parameters: Groups | None) -> list[dict[str, Any]]:
        """Parameters in groups with options of their own."""
        if parameters is None:
            reached = reached_by_gradients(loss)
            nodes = [node for node in nodes_of(live_nodes([loss]), Role.PARAMETER) if node.attrs["requires_grad"]]
            parameters = [node.outputs[0] for node in nodes if node.outputs[0] in reached]
        given = self._listed(parameters, "parameters")
        is_grouped = bool(given) and all(isinstance(item, Mapping) for item in given)
        groups: list[dict[str, Any]] = []
        for group in given if is_grouped else [{"params": given}]:
            if "params" not in group:
                self._refuse(
                    HetuError, f"a group has no 'params': {shown(group)}", 'write {"params": [...], "lr": 0.1}'
                )
            params, options = group["params"], {key: value for key, value in group.items() if key != "params"}
            listed = [params] if isinstance(params, Tensor) else self._listed(params, "params")
            groups.append({"params": listed, **self._checked(options, self.options)})
        seen: set[Tensor] = set()
        for item in (item for group in groups for item in group["params"]):
            if not isinstance(item, Tensor) or item.op.role is not Role.PARAMETER:
                self._refuse(
                    HetuError,
                    f"can't train {shown(item)} of parameters: it is no parameter",
                    "make it with hetu.parameter",
                )
            if item in seen:
                self._refuse(HetuError, f"parameter {item.name} is named twice", "name it once")
            seen.add(item)
        if not seen:
            self._refuse(HetuError, "there is nothing to train", "make the loss depend on a hetu.parameter(...)")
        return groups

    def _listed(self, given: Any, name: str) -> list[Any]:
        """What is read once, and may be an iterator: ``module.parameters()`` is one in torch."""
        if isinstance(given, (Tensor, Mapping, str, bytes)) or not isinstance(given, Iterable):
            self._refuse(HetuError, f"{name} is {shown(given)}, expected a list of parameters", "write [w] for one")
        try:
            return list(given)
        except Exception as error:  # an iterator of the user's own may fail in any way
            what = f"{name} can't be read: {type(error).__name__}: {error}"
            raise HetuError(what, op="minimize", where=caller(), fix="give a list of parameters") from error

    @staticmethod
    def _refuse(error: type[HetuError], what: str, fix: str | None = None) -> NoReturn:
        raise error(what, op="minimize", where=caller(), fix=fix)

    def __repr__(self) -> str:
        options = {**self.options, **({"zero_stage": self.zero_stage} if self.zero_stage else {})}
        return f"hetu.optim.{self.kind}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


class SGD(Optimizer):
    """``torch.optim.SGD``.

    Args:
        lr: Learning rate.
        max_grad_norm: The gradients of a step are scaled down to this Euclidean norm if theirs is larger.
        schedule: A function from the torch optimiser to one of ``torch.optim.lr_scheduler``, such as
            ``functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=100)``; it steps after every update.
        zero_stage: What is cut over all ranks instead of being whole on each: 0 for nothing, 1 for the optimiser's
            state, 2 for gradients too, 3 for parameters too. Losses and parameters are those of stage 0.
            ``g.state_dict()`` is then called on all ranks. It needs an optimiser that is elementwise. See
            docs/training.md.
        **options: What the torch class takes: ``momentum``, ``weight_decay``, ...
    """

    kind = "SGD"
    is_elementwise = True
    takes = (*_COMMON, "momentum", "dampening", "nesterov")


class Adam(Optimizer):
    """``torch.optim.Adam``. It takes the arguments of :class:`SGD`, and ``betas``, ``eps``, ``amsgrad``, ..."""

    kind = "Adam"
    is_elementwise = True
    takes = (*_OF_ADAM, "decoupled_weight_decay")


class AdamW(Optimizer):
    """``torch.optim.AdamW``. It takes the arguments of :class:`SGD`, and ``betas``, ``eps``, ``weight_decay``, ..."""

    kind = "AdamW"
    is_elementwise = True
    takes = _OF_ADAM


def checked_options(options: Mapping[str, Any], op: str = "minimize") -> dict[str, Any]:
    """Options of an optimiser or of a group: numbers as Python's own, tensors as copies.

    Args:
        options: Any of those of torch's optimisers. Others are left as they are.
        op: Who asks, for the errors.

    Raises:
        HetuError: If a number is out of its range, or something else than what is wanted.

    Example:
        >>> checked_options({"lr": 0.5, "foreach": None})
        {'lr': 0.5, 'foreach': None}
    """
    return {key: _CONVERTERS[key](value, key, op) if key in _CONVERTERS else value for key, value in options.items()}


def _number(value: Any, name: str, op: str, most: float = math.inf) -> Any:
    """A number from 0 up to, not including, ``most``; a tensor of one element stays one, as in torch."""
    wanted = f"a number in [0, {most:g})" if most < math.inf else "a finite number that is not negative"
    is_kept = (
        is_torch(value) and name != "eps" and not value.is_meta and value.numel() == 1 and value.is_floating_point()
    )
    number = value.item() if is_kept else value
    real(number, name, wanted, lambda x: 0 <= x < most, op=op)
    return value.detach().clone() if is_kept else _plain(value)


def _any_number(value: Any, name: str, op: str) -> Any:
    real(value, name, op=op)
    return _plain(value)


def _plain(value: Any) -> Any:
    """A number as Python's own; torch takes no ints of more than 64 bits."""
    number = number_of(value)
    return float(value) if isinstance(number, int) and abs(number) >= 2**53 else number


def _flag(value: Any, name: str, op: str) -> bool:
    return flag(value, name, op=op)


def _flag_or_none(value: Any, name: str, op: str) -> bool | None:
    return None if value is None else flag(value, name, op=op)


def _betas(value: Any, name: str, op: str) -> tuple[Any, ...]:
    given = items(value, name, "a pair of numbers", op=op, fix="write betas=(0.9, 0.999)")
    if len(given) != 2:
        refuse(value, name, "a pair of numbers", op=op, fix="write betas=(0.9, 0.999)")
    made = [_number(beta, f"betas[{i}]", op, most=1.0) for i, beta in enumerate(given)]
    return tuple(float(beta) if isinstance(beta, int) else beta for beta in made)


_CONVERTERS: Mapping[str, Callable[[Any, str, str], Any]] = {
    **dict.fromkeys(("lr", "weight_decay", "eps", "momentum"), _number),
    **dict.fromkeys(("maximize", "differentiable", "nesterov", "amsgrad", "capturable"), _flag),
    **dict.fromkeys(("foreach", "fused"), _flag_or_none),
    "decoupled_weight_decay": _flag,
    "dampening": _any_number,
    "betas": _betas,
}
"""What takes each option of torch's optimisers."""

_BROKEN: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "nesterov needs a momentum, and no dampening": lambda o: (
        o.get("nesterov", False) and not (o.get("momentum", 0) > 0 and o.get("dampening", 0) == 0)
    ),
    "fused and foreach exclude each other": lambda o: bool(o.get("fused") and o.get("foreach")),
    "fused and differentiable exclude each other": lambda o: bool(o.get("fused") and o.get("differentiable")),
}
"""Options that torch refuses together, and in groups notices too late."""


def _widened(grad: Tensor) -> Tensor:
    return cast(grad, float32) if grad.dtype in (float16, bfloat16) else grad


def grad_norm(train: Tensor) -> Tensor:
    """The Euclidean norm of a step's gradients before they are clipped, as a tensor to fetch.

    Fetching it is fetching what :meth:`Optimizer.minimize` gave: the run updates the parameters, unless its
    ``run_level`` says otherwise.

    Args:
        train: The tensor that :meth:`Optimizer.minimize` gave.

    Returns:
        A float32 tensor without dimensions; NaN in runs that compute no gradient.

    Raises:
        HetuError: If it is something else.
    """
    if not isinstance(train, Tensor) or train.op.role is not Role.UPDATE:
        what = f"train is {shown(train)}, which is nothing that minimize gave"
        raise HetuError(what, op="grad_norm", where=caller(), fix="pass minimize's result")
    return train.op.outputs[1]


@register
class Update(OpDef):
    """The update of parameters by an optimiser. The executor does it, after all micro-batches of a run."""

    name = "update"
    role = Role.UPDATE
    is_public = False
    inputs = ("loss", "*gradients")
    outputs = ("loss", "grad_norm")
    stops_gradient = True

    def infer(self, call: Call) -> Sequence[TensorSpec]:
        return [TensorSpec(call.inputs[0].dtype, ()), TensorSpec(float32, ())]

    def samples(self) -> tuple[Sequence[GoodSample], Sequence[BadSample]]:
        return (), ()


def parameters_of(node: Node) -> list[Node]:
    """The parameters that an update changes, in the order of its gradients."""
    by_name = {item.name: item for item in nodes_of(node.graph.nodes, Role.PARAMETER)}
    return [by_name[name] for name in node.attrs["parameters"]]
