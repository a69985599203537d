"""Optimisers: what ``minimize`` adds to a graph. The arithmetic is that of ``torch.optim``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from hetu.dtypes import float32
from hetu.errors import DTypeError, HetuError, ShapeError, caller
from hetu.graph import BadSample, Call, GoodSample, Node, OpDef, Role, Tensor, TensorSpec, gradients, register
from hetu.graph.autodiff import reached_by_gradients
from hetu.graph.passes import live_nodes, nodes_of
from hetu.ops import all_reduce

Groups = Sequence[Tensor] | Sequence[Mapping[str, Any]]


class Optimizer:
    """An optimiser of ``torch.optim``, by name. Use :class:`SGD`, :class:`Adam` or :class:`AdamW`.

    Its state belongs to the graph in which it minimises, is made at the first update, and lies in the parameters'
    dtypes on the graph's device.

    Attributes:
        kind: The name of the class in ``torch.optim``.
        is_elementwise: True if it updates each element of a parameter from that element's own gradient and state, so
            that any part of a parameter can be updated by itself. Others need whole parameters.
        options: Its arguments.
        max_grad_norm: See :class:`SGD`.
        schedule: See :class:`SGD`.
        where: The line of the user's script that made it.
    """

    kind = "Optimizer"
    is_elementwise = False

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        max_grad_norm: float | None = None,
        schedule: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.options = {"lr": lr, **options}
        self.max_grad_norm, self.schedule, self.where = max_grad_norm, schedule, caller()
        if max_grad_norm is not None and not max_grad_norm > 0:
            self._refuse(HetuError, f"max_grad_norm is {max_grad_norm!r}", "give a positive number, or None")

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
        if not isinstance(loss, Tensor) or not loss.dtype.is_floating:
            self._refuse(DTypeError, f"expected loss to be a floating tensor, got {loss!r}")
        if loss.ndim:
            shape = f"[{', '.join(map(str, loss.shape))}]"
            self._refuse(ShapeError, f"the loss has shape {shape}, expected no dimension", "sum it: hetu.sum(loss)")
        groups = self._groups(loss, parameters)
        params = [item for group in groups for item in group["params"]]
        # The only place that adds up gradients over pipelines. Who keeps the sums is for the parameters' store to say.
        grads = [all_reduce(grad) for grad in gradients(loss, params)]
        attrs = {
            "optimizer": self,
            "parameters": tuple(item.op.name for item in params),
            "groups": tuple((len(g["params"]), {k: v for k, v in g.items() if k != "params"}) for g in groups),
        }
        return loss.graph.apply("update", (loss, *grads), attrs, name)[0]

    def _groups(self, loss: Tensor, parameters: Groups | None) -> list[dict[str, Any]]:
        """Parameters in groups with options of their own."""
        if parameters is None:
            reached = reached_by_gradients(loss)
            nodes = [node for node in nodes_of(live_nodes([loss]), Role.PARAMETER) if node.attrs["requires_grad"]]
            parameters = [node.outputs[0] for node in nodes if node.outputs[0] in reached]
        items = list(parameters)
        is_grouped = bool(items) and all(isinstance(item, Mapping) for item in items)
        groups: list[dict[str, Any]] = [dict(item) for item in items] if is_grouped else [{"params": items}]  # type: ignore[call-overload]
        seen: set[Tensor] = set()
        for group in groups:
            group["params"] = list(group.get("params", ()))
            for item in group["params"]:
                if not isinstance(item, Tensor) or item.op.role is not Role.PARAMETER:
                    self._refuse(HetuError, f"can't train {item!r}: it is no parameter", "make it with hetu.parameter")
                if item in seen:
                    self._refuse(HetuError, f"parameter {item.name} is named twice", "name it once")
                seen.add(item)
        if not seen:
            self._refuse(HetuError, "there is nothing to train", "make the loss depend on a hetu.parameter(...)")
        return groups

    @staticmethod
    def _refuse(error: type[HetuError], what: str, fix: str | None = None) -> NoReturn:
        raise error(what, op="minimize", where=caller(), fix=fix)

    def __repr__(self) -> str:
        return f"hetu.optim.{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class SGD(Optimizer):
    """``torch.optim.SGD``.

    Args:
        lr: Learning rate.
        max_grad_norm: The gradients of a step are scaled down to this Euclidean norm if theirs is larger.
        schedule: A function from the torch optimiser to one of ``torch.optim.lr_scheduler``, such as
            ``functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=100)``; it steps after every update.
        **options: What the torch class takes: ``momentum``, ``weight_decay``, ...
    """

    kind = "SGD"
    is_elementwise = True


class Adam(Optimizer):
    """``torch.optim.Adam``. It takes the arguments of :class:`SGD`, and ``betas``, ``eps``, ``amsgrad``, ..."""

    kind = "Adam"
    is_elementwise = True


class AdamW(Optimizer):
    """``torch.optim.AdamW``. It takes the arguments of :class:`SGD`, and ``betas``, ``eps``, ``weight_decay``, ..."""

    kind = "AdamW"
    is_elementwise = True


def grad_norm(train: Tensor) -> Tensor:
    """The Euclidean norm of a step's gradients before they are clipped, as a tensor to fetch.

    Args:
        train: The tensor that :meth:`Optimizer.minimize` gave.

    Returns:
        A float32 tensor without dimensions; NaN in runs that compute no gradient.

    Raises:
        HetuError: If it is something else.
    """
    if not isinstance(train, Tensor) or train.op.role is not Role.UPDATE:
        raise HetuError(
            f"{train!r} is nothing that minimize gave", op="grad_norm", where=caller(), fix="pass minimize's result"
        )
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
