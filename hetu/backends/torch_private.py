"""Every private API of torch that hetu uses, each with a public one that does the same where this torch lacks it.

They are here for speed: asking torch by its public ways takes longer than what is asked. ``PRIVATE`` lists them for the
test that names one that a new torch no longer has; hetu then works on, more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import sympy
import torch
from torch.autograd import forward_ad

PRIVATE: dict[str, tuple[Any, Any]] = {}
"""What is used, by its name in torch: what this torch has, or None, and what stands for it then."""

ON_CUDA_ONLY = frozenset(
    {"_C._cuda_getCurrentRawStream", "_C._cuda_getDevice", "_C._dynamo.guards._empty_strided_cuda"}
)
"""What a torch that is built without CUDA lacks."""


def _find(name: str) -> Any:
    """An attribute of torch by its dotted name; None if there is none."""
    owner: Any = torch
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner


def _private(name: str, fallback: Any) -> Any:
    """What torch has under a name, else what stands for it."""
    found = _find(name)
    PRIVATE[name] = found, fallback
    return fallback if found is None else found


# Copies


def _copy_all(into: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for x, value in zip(into, values, strict=True):
        x.copy_(value)


# On a GPU in few launches, however many tensors there are.
copy_all: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Any] = _private("_foreach_copy_", _copy_all)


# Autocast


def _any_autocast() -> bool:
    return any(torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


_AUTOCAST_DEVICES = ("cpu", "cuda")

is_any_autocast_enabled: Callable[[], bool] = _private("_C._is_any_autocast_enabled", _any_autocast)
"""Whether autocast is on for any kind of device."""

disable_autocast: Callable[[], AbstractContextManager[Any]] = _private("_C._DisableAutocast", _without_autocast)
"""A context in which autocast is off for all kinds of devices."""


# Who watches or transforms what is computed. Without an answer somebody does: that is slower, and never wrong.


def _one_mode() -> int:
    return 1


def _some_transform() -> object:
    return ()


def _tracing_state() -> object | None:
    return () if torch.jit.is_tracing() else None  # type: ignore[attr-defined, no-untyped-call]


def _always() -> bool:
    return True


def _is_anything(x: object) -> bool:
    return True


dispatch_modes: Callable[[], int] = _private("_C._len_torch_dispatch_stack", _one_mode)
"""How many dispatch modes are on."""

functorch_level: Callable[[], object | None] = _private("_C._functorch.peek_interpreter_stack", _some_transform)
"""The innermost of ``torch.func``'s transforms, or None."""

tracing_state: Callable[[], object | None] = _private("_C._get_tracing_state", _tracing_state)
"""What ``torch.jit.trace`` holds while it traces, or None."""

is_legacy_batched: Callable[[object], bool] = _private("_C._functorch.is_legacy_batchedtensor", _is_anything)
"""Whether a tensor is a batch of the older vmap, by which ``torch.autograd.grad(is_grads_batched=True)`` works."""

is_profiling: Callable[[], bool] = _private("_C._autograd._profiler_enabled", _always)
"""Whether torch's profiler is on."""


# Gradients


def _set_grad_enabled(is_enabled: bool) -> None:
    torch.set_grad_enabled(is_enabled)


set_grad_enabled: Callable[[bool], None] = _private("_C._set_grad_enabled", _set_grad_enabled)
"""Switches the recording of gradients on or off in this thread."""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The ``apply`` of an autograd function, for calls without any of ``torch.func``'s transforms around them.

    That in Python first asks for the transforms, which takes 3 µs. The one behind it, in C, doesn't.
    """
    base: Any = super(torch.autograd.Function, function)
    apply: Callable[..., Any] = getattr(base, "apply", function.apply)
    return apply


PRIVATE["autograd.Function.__base__.apply"] = (
    _find("autograd.Function.__base__.apply"),
    _find("autograd.Function.apply"),
)


# Forward mode, and derivatives of ops at each level of torch.func


def dual_level() -> int:
    """The level of forward mode that was entered last; negative if there is none."""
    return getattr(forward_ad, "_current_level", 0)


PRIVATE["autograd.forward_ad._current_level"] = _find("autograd.forward_ad._current_level"), dual_level

set_forward_mode_enabled: Callable[[bool], AbstractContextManager[Any]] = _private(
    "autograd.forward_ad._set_fwd_grad_enabled", nullcontext
)
"""A context in which ops propagate tangents, or don't."""

level_functions: Callable[[], AbstractContextManager[Any]] = _private(
    "_functorch.utils.enable_single_level_autograd_function", nullcontext
)
"""A context in which an autograd function works for one level of ``torch.func`` alone, as the kernel of an op does.

Without it ``torch.func``'s derivatives are refused by torch.
"""

_below_autograd: Callable[[], AbstractContextManager[Any]] | None = _private("_C._AutoDispatchBelowAutograd", None)
_keys_after_autograd: Any = _private("_C._after_autograd_keyset", None)


def _redispatch(op: Any, keyset: Any, arguments: tuple[Any, ...]) -> Any:
    assert _below_autograd is not None, "else redispatch_below_autograd is None"
    with _below_autograd():
        return op.redispatch(keyset & _keys_after_autograd, *arguments)


redispatch_below_autograd: Callable[[Any, Any, tuple[Any, ...]], Any] | None = (
    _redispatch if _below_autograd and _keys_after_autograd else None
)
"""Calls what an op's Autograd kernel is around; None means that ``torch.library`` makes that kernel.

The kernel that it makes drops the tangents of forward mode, and is refused by ``torch.func``.
"""


def version_of(x: torch.Tensor) -> int | None:
    """How often torch has counted changes of a tensor; None if that can't be known."""
    return getattr(x, "_version", None)


PRIVATE["Tensor._version"] = _find("Tensor._version"), version_of


# Devices


def _stream(device: int) -> int:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


current_stream: Callable[[int], int] = _private("_C._cuda_getCurrentRawStream", _stream)
"""The address of the current stream of a CUDA device."""

current_device: Callable[[], int] = _private("_C._cuda_getDevice", lambda: torch.cuda.current_device())
"""The number of the current CUDA device, in a third of the time; CUDA is there already."""

empty_strided_cuda: Callable[..., torch.Tensor] | None = _private("_C._dynamo.guards._empty_strided_cuda", None)
"""How torch.compile's generated code allocates on the current CUDA device; None means ``torch.empty``."""

flash_attention_cpu: Callable[..., Any] | None = _private("ops.aten._scaled_dot_product_flash_attention_for_cpu", None)
"""torch's flash attention on the CPU, which gives the log-sum-exps too; None means matrix products."""


def _no_store() -> Any:
    raise RuntimeError("this version of torch doesn't tell in which store the processes of its world met")


default_store: Callable[[], Any] = _private("distributed.distributed_c10d._get_default_store", _no_store)
"""The store in which the processes of torch's world met."""

_world: Any = _private("distributed.distributed_c10d._world", None)


def count_process_groups() -> int | None:
    """How many process groups torch has, its world included; None if that can't be known."""
    return None if _world is None else len(_world.pg_map)


# Compiling: without any of these modules run as they were lowered

op_overload: type[Any] = type(torch.ops.aten.add.Tensor)
"""The type of ATen's ops."""

check: Callable[[Any], None] = _private("_check", None)
"""Tells torch what holds of a symbolic size."""


def find_inductor() -> Callable[..., Callable[..., Any]] | None:
    """Inductor's compiler of graphs of ATen's ops with symbolic sizes; None if this torch lacks it.

    Importing it takes seconds, so it is looked for where it is needed.
    """
    found: Callable[..., Callable[..., Any]] | None = _find("_inductor.standalone_compile")
    return found


class SymbolicSizes:
    """Tensors without values, of shapes without values.

    Args:
        typical: Sizes to decide by, each for one symbol, where something depends on one: then what is made holds for
            the sizes that decide alike. Without them nothing may depend on a size, and what is made holds for all.

    Raises:
        ImportError: If this torch has none, or has them elsewhere.
    """

    def __init__(self, typical: Iterator[int] | None = None) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._typical = typical
        self._sizes = ShapeEnv(specialize_zero_one=typical is None, duck_shape=typical is None)
        self._made: list[tuple[Any, int]] = []
        self.tensors: AbstractContextManager[Any] = FakeTensorMode(shape_env=self._sizes)
        """The context in which tensors that are made have no values. It may be entered again."""

    def new(self) -> Any:
        """A size of which nothing is known, as torch takes it for an int."""
        if self._typical is None:
            with self._sizes.ignore_fresh_unbacked_symbols():
                return self._sizes.create_unbacked_symint()
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        value, source = next(self._typical), ConstantSource(f"size_{len(self._made)}")
        symbol = self._sizes.create_symbol(
            value, source, DimDynamic.DYNAMIC, positive=None, do_not_specialize_zero_one=True
        )
        self._made.append((symbol, value))
        return self._sizes.create_symintnode(symbol, hint=value, source=source)

    def conditions(self) -> Callable[..., bool]:
        """Tells of sizes, in the order in which :meth:`new` gave them, whether they decide as the typical ones did.

        Raises:
            RuntimeError: If what was decided can't be told of sizes.
        """
        decided = sympy.And(*(guard.expr for guard in self._sizes.guards))
        decide: Callable[..., bool] = sympy.lambdify([symbol for symbol, _ in self._made], decided, modules="math")
        try:
            is_told = decide(*(value for _, value in self._made)) is True
        except (NameError, TypeError, ValueError):  # a function that only torch's printers know
            is_told = False
        if not is_told:
            raise RuntimeError(f"torch decided by {decided}, which can't be asked of other sizes")
        return decide
