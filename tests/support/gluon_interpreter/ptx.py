"""Inline assembly: a table of PTX instructions, run for all threads of a warp group at a time.

With ``pack`` 1 each element is by itself. Else a tile has 64 rows, as four warps hold what tensor cores gave them:
``(64, 8)``, or ``(64, columns / 8, 8)``, of which a thread has two neighbouring columns in eight, of a row and of the
eighth below it, ordered by columns, rows, eights. Branches lead forward; threads that take one wait at its label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from support.gluon_interpreter.values import KernelError, float32, int32

Array = np.ndarray[Any, Any]
_NUMPY = {float32: np.float32, int32: np.int32}


def elementwise(
    asm: str, constraints: str, args: Sequence[tuple[Array, Any]], dtypes: Sequence[Any], pack: int
) -> list[Array]:
    """The results of instructions, one array for each of the dtypes.

    Args:
        asm: The instructions.
        constraints: Of outputs, then of inputs, as LLVM writes them.
        args: Arrays of one shape and their dtypes, 32 bits wide.
        dtypes: Of the results.
        pack: How many elements of a thread the instructions take at a time.
    """
    if any(dtype not in _NUMPY for dtype in (*dtypes, *(dtype for _, dtype in args))):
        raise KernelError("the interpreter knows assembly of 32 bits")
    shape = args[0][0].shape
    held = [_by_thread(data.astype(_NUMPY[dtype]).view(np.uint32), pack) for data, dtype in args]
    count = held[0].shape[-1]
    if count % pack:
        raise KernelError(f"a thread has {count} elements, which are no packs of {pack}")
    program = _read(asm)
    results = [np.empty_like(held[0]) for _ in dtypes]
    for first in range(0, count, pack):
        inputs = [data[..., first + at] for data in held for at in range(pack)]
        outputs = _run(program, _operands(constraints), inputs, len(dtypes) * pack)
        for number, data in enumerate(outputs):
            results[number // pack][..., first + number % pack] = data
    return [_by_place(data, shape, pack).view(_NUMPY[dtype]) for data, dtype in zip(results, dtypes, strict=True)]


def _by_thread(x: Array, pack: int) -> Array:
    """``(warps, lanes, elements)``."""
    if pack == 1:
        return np.ascontiguousarray(x).reshape(1, -1, 1)
    if x.shape[0] != 64 or x.shape[-1] != 8 or x.ndim not in (2, 3):
        raise KernelError(f"who has which element of {x.shape}?")
    tiles = x.reshape(4, 2, 8, -1, 4, 2)  # warps, halves of rows, rows, eights, pairs of columns, columns
    return np.ascontiguousarray(tiles.transpose(0, 2, 4, 3, 1, 5)).reshape(4, 32, -1)


def _by_place(x: Array, shape: tuple[int, ...], pack: int) -> Array:
    """The inverse."""
    if pack == 1:
        return x.reshape(shape)
    tiles = x.reshape(4, 8, 4, -1, 2, 2)
    return np.ascontiguousarray(tiles.transpose(0, 4, 1, 3, 2, 5)).reshape(shape)


@dataclass(frozen=True)
class _Instruction:
    """One, or a label.

    Attributes:
        label: If it is one.
        guard: The predicate under which it is done, with "!" where that has to be false.
        name: Of it.
        operands: Its operands, the result first.
    """

    label: str
    guard: str
    name: str
    operands: tuple[str, ...]


@lru_cache(maxsize=256)
def _read(asm: str) -> tuple[_Instruction, ...]:
    return tuple(_instructions(asm))


def _instructions(asm: str) -> Iterator[_Instruction]:
    for part in asm.strip().removeprefix("{").removesuffix("}").split(";"):
        text = part.strip()
        while found := re.match(r"(\w+):\s*", text):
            yield _Instruction(found.group(1), "", "", ())
            text = text[found.end() :]
        if not text or text.startswith(".reg "):
            continue
        found = re.fullmatch(r"(?:@(!?\w+)\s+)?([\w.]+)\s+(.+)", text)
        if found is None:
            raise KernelError(f"what is {text!r}?")
        guard, name, operands = found.groups()
        if name != "bra" and name not in _TABLE:
            raise KernelError(f"the interpreter does not know {name}")
        yield _Instruction("", guard or "", name, tuple(x.strip() for x in operands.split(",")))


@lru_cache(maxsize=256)
def _operands(constraints: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The register of each operand, and which outputs may share one with an input that is still to be read."""
    parts = constraints.split(",")
    outputs = [part for part in parts if part.startswith("=")]
    if parts[: len(outputs)] != outputs or any(part.strip("=&") not in ("f", "r") for part in outputs):
        raise KernelError(f"what is {constraints!r}?")
    places = list(range(len(outputs)))
    for at, part in enumerate(parts[len(outputs) :], len(outputs)):
        if part not in ("f", "r") and not part.isdigit():
            raise KernelError(f"what is {constraints!r}?")
        places.append(int(part) if part.isdigit() else at)
    tied = set(places[len(outputs) :])
    late = tuple(at for at, part in enumerate(outputs) if "&" not in part and at not in tied)
    return tuple(places), late


class _Threads:
    """Registers of all threads, by their names, as bits; predicates as truths."""

    def __init__(self, shape: tuple[int, ...], places: tuple[int, ...], late: tuple[int, ...]) -> None:
        self.registers: dict[str, Array] = {}
        self._shape, self._places, self._late = shape, places, set(late)
        self._is_shared = False

    def _name(self, operand: str) -> str:
        return f"${self._places[int(operand[1:])]}" if operand.startswith("$") else operand

    def read(self, operand: str, kind: str) -> Array:
        """A register or a number as float32, bits or truths."""
        name = self._name(operand)
        if name in self.registers:
            if self._is_shared and name.startswith("$") and int(name[1:]) not in self._late:
                raise KernelError(f"{operand} is read after an output is written, whose register it may have without &")
            bits = self.registers[name]
        elif operand.startswith("0f"):
            bits = np.uint32(int(operand[2:], 16))
        elif re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", operand):
            bits = np.uint32(int(operand, 0) & 0xFFFFFFFF)
        else:
            raise KernelError(f"register {operand} is read before it is written")
        return bits if kind in ("pred", "b32") else np.asarray(bits).view(np.float32 if kind == "f32" else np.uint32)

    def write(self, operand: str, data: Any, active: Array) -> None:
        """Of those threads that are active."""
        name, whole = self._name(operand), np.broadcast_to(np.asarray(data), self._shape)
        bits = whole if whole.dtype == np.bool_ else np.ascontiguousarray(whole).view(np.uint32)
        before = self.registers.get(name)
        self.registers[name] = bits if active.all() or before is None else np.where(active, bits, before)
        self._is_shared |= name.startswith("$") and int(name[1:]) in self._late


def _run(
    program: tuple[_Instruction, ...],
    operands: tuple[tuple[int, ...], tuple[int, ...]],
    inputs: Sequence[Array],
    outputs: int,
) -> list[Array]:
    places, late = operands
    if len(places) != outputs + len(inputs):
        raise KernelError(f"{len(places)} operands of {outputs} outputs and {len(inputs)} inputs")
    threads = _Threads(inputs[0].shape, places, late)
    for at, data in enumerate(inputs, outputs):
        threads.registers[f"${places[at]}"] = data
    active, waiting = np.ones(inputs[0].shape, np.bool_), dict[str, Array]()
    for one in program:
        if one.label:
            active = active | waiting.pop(one.label, np.False_)
        elif active.any():
            who = active
            if one.guard:
                truth = threads.read(one.guard.removeprefix("!"), "pred")
                who = active & (~truth if one.guard.startswith("!") else truth)
            if one.name == "bra":
                waiting[one.operands[0]] = waiting.get(one.operands[0], np.False_) | who
                active = active & ~who
            else:
                _TABLE[one.name](threads, one.operands, who)
    if waiting:
        raise KernelError(f"a branch leads back, or nowhere: {list(waiting)}")
    return [threads.registers[f"${at}"] for at in range(outputs)]


_Do = Callable[[_Threads, tuple[str, ...], Array], None]


def _plain(compute: Callable[..., Any], kind: str) -> _Do:
    def do(threads: _Threads, operands: tuple[str, ...], active: Array) -> None:
        threads.write(operands[0], compute(*(threads.read(x, kind) for x in operands[1:])), active)

    return do


def _select(threads: _Threads, operands: tuple[str, ...], active: Array) -> None:
    to, one, other, truth = operands
    picks = np.where(threads.read(truth, "pred"), threads.read(one, "b32"), threads.read(other, "b32"))
    threads.write(to, picks, active)


def _compare(compute: Callable[..., Any], kind: str, joins: bool = False) -> _Do:
    def do(threads: _Threads, operands: tuple[str, ...], active: Array) -> None:
        found = compute(threads.read(operands[1], kind), threads.read(operands[2], kind))
        threads.write(operands[0], found | threads.read(operands[3], "pred") if joins else found, active)

    return do


def _whole_warps(threads: _Threads, operands: tuple[str, ...], active: Array) -> None:
    if operands[-1] != "-1" or active.shape[-1] != 32 or not np.all(active == active[:, :1]):
        raise KernelError("an instruction of a whole warp, for which not all of its threads are there")


def _shuffle(threads: _Threads, operands: tuple[str, ...], active: Array) -> None:
    """Each lane has the number of the lane whose own number differs in these bits."""
    _whole_warps(threads, operands, active)
    to, source, lanes, clamp, _ = operands
    if clamp != "0x1f":
        raise KernelError("a shuffle of parts of a warp")
    threads.write(to, threads.read(source, "b32")[:, np.arange(32) ^ int(lanes)], active)


def _any(threads: _Threads, operands: tuple[str, ...], active: Array) -> None:
    """Whether it is true of any lane of the warp."""
    _whole_warps(threads, operands, active)
    found = threads.read(operands[1], "pred").any(-1, keepdims=True)
    threads.write(operands[0], np.broadcast_to(found, active.shape), active)


def _fused(a: Array, b: Array, c: Array) -> Array:
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


_FLOAT: dict[str, Callable[..., Any]] = {
    "mov.f32": lambda a: a,
    "max.f32": np.fmax,
    "min.NaN.f32": np.minimum,
    "add.f32": np.add,
    "sub.f32": np.subtract,
    "sub.rn.f32": np.subtract,
    "mul.f32": np.multiply,
    "mul.rn.f32": np.multiply,
    "fma.rn.f32": _fused,
    "neg.f32": np.negative,
    "abs.f32": np.abs,
    "ex2.approx.ftz.f32": np.exp2,
    "tanh.approx.f32": np.tanh,
}
_BITS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "or.b32": np.bitwise_or,
    "and.b32": np.bitwise_and,
}
_TABLE: dict[str, _Do] = {
    **{name: _plain(compute, "f32") for name, compute in _FLOAT.items()},
    **{name: _plain(compute, "b32") for name, compute in _BITS.items()},
    "or.pred": _plain(np.logical_or, "pred"),
    "setp.gt.f32": _compare(np.greater, "f32"),
    "setp.ge.f32": _compare(np.greater_equal, "f32"),
    "setp.neu.f32": _compare(np.not_equal, "f32"),
    "setp.gt.or.f32": _compare(np.greater, "f32", joins=True),
    "setp.ne.u32": _compare(np.not_equal, "u32"),
    "selp.f32": _select,
    "shfl.sync.bfly.b32": _shuffle,
    "vote.sync.any.pred": _any,
}
