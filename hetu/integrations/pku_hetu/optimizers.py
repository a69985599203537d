"""Hetu's optimisers: their constructors' forms, ``minimize``, and the schedules that they take as arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from torch.optim.lr_scheduler import LambdaLR

import hetu
from hetu.arguments import choice, integer, is_finite, real, shown
from hetu.errors import HetuError, caller

_RATES = ("init_lr", "max_lr", "min_lr")
_SCHEDULE = (*_RATES, "lr_warmup_steps", "lr_decay_steps", "lr_decay_style")
_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
_NO_DECAY = {"start_wd": 0, "end_wd": 0, "wd_incr_steps": -1, "wd_incr_style": "constant"}


def _refuse(what: str, fix: str, op: str) -> NoReturn:
    raise HetuError(what, op=op, where=caller(), fix=fix)


@dataclasses.dataclass(frozen=True)
class Rate:
    """Hetu's learning rate by the number of the update, as a factor of its maximum.

    Example:
        >>> rate = Rate(init_lr=0.0, max_lr=0.5, min_lr=0.1, warmup=2, decay=4, style="linear")
        >>> [round(0.5 * rate(done), 2) for done in range(5)]
        [0.25, 0.5, 0.3, 0.1, 0.1]
    """

    init_lr: float
    max_lr: float
    min_lr: float
    warmup: int
    decay: int
    style: str

    def __call__(self, done: int) -> float:
        """The factor of the update after ``done`` others."""
        return self._rate(done + 1) / self.max_lr

    def _rate(self, step: int) -> float:
        if self.warmup > 0 and step <= self.warmup:
            return self.init_lr + (self.max_lr - self.init_lr) * step / self.warmup
        if self.style == "constant":
            return self.max_lr
        if step > self.decay:
            return self.min_lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.max_lr * math.sqrt(max(self.warmup, 1) / step))
        part = (step - self.warmup) / (self.decay - self.warmup)
        left = 1 - part if self.style == "linear" else (math.cos(math.pi * part) + 1) / 2
        return self.min_lr + left * (self.max_lr - self.min_lr)


def _as_rate(given: dict[str, Any], op: str) -> Rate:
    """What a schedule's arguments say, if Hetu takes them."""
    missing = [name for name in _SCHEDULE if name not in given]
    if missing:
        _refuse(f"a schedule needs {', '.join(_SCHEDULE)}, and has no {', '.join(missing)}", "give all, or lr", op)
    positive = "a positive number"
    rates = {name: real(given[name], name, op=op) for name in _RATES}
    real(given["max_lr"], "max_lr", positive, lambda x: is_finite(x) and x > 0, op=op)
    rate = Rate(
        **rates,
        warmup=integer(given["lr_warmup_steps"], "lr_warmup_steps", least=0, op=op),
        decay=integer(given["lr_decay_steps"], "lr_decay_steps", least=1, op=op),
        style=choice(given["lr_decay_style"], "lr_decay_style", _STYLES, op=op),
    )
    if not (0 <= rate.min_lr <= rate.max_lr and 0 <= rate.init_lr <= rate.max_lr):
        _refuse(f"min_lr or init_lr does not lie between 0 and max_lr: {rates}", "order the rates", op)
    if rate.warmup >= rate.decay:
        _refuse(f"lr_warmup_steps={rate.warmup} is not below lr_decay_steps={rate.decay}", "warm up for less", op)
    return rate


def _options(args: tuple[Any, ...], options: dict[str, Any], names: tuple[str, ...], op: str) -> dict[str, Any]:
    """What a constructor was given, by name; a learning rate of any form as ``lr`` and ``schedule``."""
    takes = ("vars", *names) if args and isinstance(args[0], (list, tuple)) else names
    if len(args) > len(takes):
        _refuse(f"{op} takes {', '.join(takes)} by place, got {len(args)} values", "name the others", op)
    by_place = dict(zip(takes, args, strict=False))
    twice, known = by_place.keys() & options.keys(), {"vars", *names, *_SCHEDULE, *_NO_DECAY}
    if twice or not options.keys() <= known:
        wrong = ", ".join(sorted(twice or options.keys() - known))
        what = "given twice" if twice else "no argument of Hetu's"
        _refuse(f"{wrong}: {what}", f"give {', '.join((*names, *_SCHEDULE))}", op)
    given = by_place | options
    decay = [name for name, none in _NO_DECAY.items() if given.pop(name, none) != none]
    if decay:
        _refuse(f"{decay[0]} asks for weight decay", "use hetu.optim.AdamW or SGD, with weight_decay=", op)
    scheduled = {name: given.pop(name) for name in _SCHEDULE if name in given}
    if bool(scheduled) == ("lr" in given):
        _refuse("expected either lr or the arguments of a schedule", f"give lr, or {', '.join(_SCHEDULE)}", op)
    if scheduled:
        rate = _as_rate(scheduled, op)
        is_fixed = rate.style == "constant" and not rate.warmup
        given |= {"lr": rate.max_lr, "schedule": None if is_fixed else functools.partial(LambdaLR, lr_lambda=rate)}
    return given


class _Minimizer(hetu.optim.Optimizer):
    """``minimize`` in Hetu's form."""

    vars: Sequence[hetu.Tensor] | None

    def minimize(  # type: ignore[override]  # Hetu's names
        self,
        loss: hetu.Tensor,
        var_list: Sequence[hetu.Tensor] | None = None,
        grad_loss: hetu.Tensor | None = None,
        name: str | None = None,
    ) -> hetu.Tensor:
        """:meth:`hetu.optim.Optimizer.minimize`, with Hetu's names.

        Args:
            loss: Floating, without dimensions.
            var_list: What to train; None for what the optimiser was made with, or for all parameters behind the loss.
            grad_loss: Only None: a factor of the loss says the same.
            name: Of the node.

        Returns:
            The tensor to fetch, whose value is the loss of the run.

        Raises:
            HetuError: What :meth:`hetu.optim.Optimizer.minimize` refuses, and a ``grad_loss``.

        Example:
            >>> from hetu.integrations import pku_hetu as ht
            >>> with ht.graph("define_and_run", create_new=True, prefix="minimized") as g:
            ...     w = ht.parameter(1.0, [2], name="w")
            ...     step = ht.SGDOptimizer(lr=0.25).minimize(ht.sum(w * w), var_list=[w])
            >>> g.run(step)
            [tensor(2.)]
        """
        if grad_loss is not None:
            _refuse(f"grad_loss is {shown(grad_loss)}", "multiply the loss by it", "minimize")
        return super().minimize(loss, self.vars if var_list is None else var_list, name or None)


class SGDOptimizer(_Minimizer, hetu.optim.SGD):
    """:class:`hetu.optim.SGD` in Hetu's forms.

    Args:
        *args: ``lr``, ``momentum`` and ``nesterov``; before them, where it is a list, the parameters to train.
        **options: The same by name, the list as ``vars``. In place of ``lr`` a schedule: ``init_lr``, ``max_lr``,
            ``min_lr``, ``lr_warmup_steps``, ``lr_decay_steps`` and ``lr_decay_style``, which is ``"constant"``,
            ``"linear"``, ``"cosine"`` or ``"inverse-square-root"``.

    Attributes:
        vars: The parameters to train, or None for all behind the loss.

    Raises:
        HetuError: If an argument is missing, unknown or out of range, or asks for weight decay.

    Example:
        >>> SGDOptimizer(0.1, momentum=0.9).options["momentum"]
        0.9
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        given = _options(args, options, ("lr", "momentum", "nesterov"), "SGDOptimizer")
        self.vars = given.pop("vars", None)
        super().__init__(**{"momentum": 0.0, "nesterov": False, **given})


class AdamOptimizer(_Minimizer, hetu.optim.Adam):
    """:class:`hetu.optim.Adam` in Hetu's forms.

    Args:
        *args: ``lr``, ``beta1``, ``beta2`` and ``eps``; before them, where it is a list, the parameters to train.
        **options: The same by name, or a schedule in place of ``lr``; see :class:`SGDOptimizer`.

    Attributes:
        vars: The parameters to train, or None for all behind the loss.

    Raises:
        HetuError: If an argument is missing, unknown or out of range, or asks for weight decay.

    Example:
        >>> AdamOptimizer(0.1, beta1=0.8).options["betas"]
        (0.8, 0.999)
        >>> rates = {"init_lr": 0.0, "max_lr": 0.1, "min_lr": 0.01}
        >>> AdamOptimizer(**rates, lr_warmup_steps=10, lr_decay_steps=1000, lr_decay_style="cosine").options["lr"]
        0.1
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        given = _options(args, options, ("lr", "beta1", "beta2", "eps"), "AdamOptimizer")
        self.vars = given.pop("vars", None)
        betas = given.pop("beta1", 0.9), given.pop("beta2", 0.999)
        super().__init__(**{"eps": 1e-8, **given, "betas": betas})
