"""Damage to plans: any field of any part of one, however deep, becomes something else."""

from __future__ import annotations

import dataclasses
import enum
import random
from typing import Any

import numpy as np

from hetu.parallel import Layout

NUMBERS = (0, 1, 2, 3, -1, -2, -7, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63), 2**70, 10**30)
STRANGERS = (
    None,
    True,
    0,
    1.0,
    0.5,
    float("nan"),
    3,
    -1,
    "text",
    b"ab",
    (),
    [],
    {},
    {1},
    np.int64(1),
    np.zeros(2),
    int,
)
"""What is no value of a plan, or of another field."""

Damage = tuple[Any, str]
"""A damaged value, and what was done to it."""


class Damager:
    """Draws damage.

    Args:
        seed: The seed of all draws.
        spare: Other plans, of which parts may take the place of a plan's own.
    """

    def __init__(self, seed: int, spare: Any = ()) -> None:
        self.draw = random.Random(seed)
        self.parts: dict[type, list[Any]] = {}
        self._collect(spare)

    def _collect(self, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.parts.setdefault(type(value), []).append(value)
            for item in dataclasses.fields(value):
                if item.repr:
                    self._collect(getattr(value, item.name))
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._collect(item)
        elif isinstance(value, Layout):
            self._collect(value.groups)
        elif isinstance(value, np.ndarray):
            self.parts.setdefault(np.ndarray, []).append(value)

    def damage(self, value: Any) -> Damage:
        """A value of which something is something else; the value itself stays as it is."""
        if self.draw.random() < 0.03:
            return self._stranger(value)
        if isinstance(value, Layout):
            groups, what = self.damage(value.groups)
            return Layout(groups), f"layout.groups{what}"
        if isinstance(value, enum.Enum):
            return self.draw.choice(list(type(value))), "another member"
        if isinstance(value, bool):
            return (not value, "flipped") if self.draw.random() < 0.8 else (int(value), "as an int")
        if isinstance(value, int):
            return self._int(value)
        if isinstance(value, str):
            return self.draw.choice(["ring", "direct", "causal", "full", "", "x" * 9]), "another text"
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        if dataclasses.is_dataclass(value):
            return self._dataclass(value)
        return self._stranger(value)

    def _stranger(self, _: Any) -> Damage:
        if self.draw.random() < 0.5:
            other = self.draw.choice(self.draw.choice(list(self.parts.values())))
            return other, f" := {type(other).__name__} from elsewhere"
        other = self.draw.choice(STRANGERS)
        return other, f" := {other!r}"

    def _int(self, value: int) -> Damage:
        kind = self.draw.random()
        if kind < 0.5:
            other: Any = value + self.draw.choice([-2, -1, 1, 2])
        elif kind < 0.9:
            other = self.draw.choice(NUMBERS)
        else:
            other = self.draw.choice([float(value), np.int64(value), np.int8(1), np.array(value), str(value)])
        return other, f" {value!r} -> {other!r}"

    def _array(self, value: Any) -> Damage:
        names = [name for name in dir(self) if name.startswith("array_")]
        name = self.draw.choice(["array_entry"] * 12 + names)
        return getattr(self, name)(value.copy()), f" {name}"

    def array_entry(self, value: Any) -> Any:
        if value.size:
            place = self.draw.randrange(value.size)
            old = int(value.flat[place])
            new = old + self.draw.choice([-2, -1, 1, 2]) if self.draw.random() < 0.5 else self.draw.choice(NUMBERS)
            if -(2**63) <= new < 2**63:
                value.flat[place] = new
        return value

    def array_cut(self, value: Any) -> Any:
        return value[: self.draw.randint(0, max(len(value) - 1, 0))] if value.ndim else value

    def array_longer(self, value: Any) -> Any:
        return np.concatenate([value, value[-1:]]) if len(value) else np.zeros(1, value.dtype)

    def array_of_another_dtype(self, value: Any) -> Any:
        kind = self.draw.choice(["int32", "float64", "uint64", "bool", "object", ">i8", "complex128", "<U5", "int8"])
        with np.errstate(all="ignore"):
            return value.astype(kind)

    def array_reshaped(self, value: Any) -> Any:
        return self.draw.choice([value[None], value[..., None], value.sum(), list(value.flat), value.tolist()])

    def array_turned(self, value: Any) -> Any:
        return value[::-1]

    def array_without_end(self, value: Any) -> Any:
        return np.broadcast_to(np.int64(self.draw.choice([0, 1])), (2**31,))

    def array_of_one_number(self, value: Any) -> Any:
        value[...] = self.draw.choice([0, 1, -1, 2**31, 2**62])
        return value

    def array_of_a_subclass(self, value: Any) -> Any:
        return self.draw.choice([np.ma.masked_array(value), np.asmatrix(value.reshape(len(value), -1))])

    def array_from_elsewhere(self, value: Any) -> Any:
        return self.draw.choice(self.parts[np.ndarray])

    def _tuple(self, value: tuple[Any, ...]) -> Damage:
        items, kind = list(value), self.draw.random()
        if not items or kind < 0.03:
            return self.draw.choice([(items, " as a list"), ((*items, None), " with None"), ((), " emptied")])
        place = self.draw.randrange(len(items))
        if kind < 0.1:
            del items[place]
            return tuple(items), f" without [{place}]"
        if kind < 0.17:
            items.insert(place, items[self.draw.randrange(len(items))])
            return tuple(items), f" with another [{place}]"
        if kind < 0.26:
            other = self.draw.randrange(len(items))
            items[place], items[other] = items[other], items[place]
            return tuple(items), f" with [{place}] and [{other}] changed"
        if kind < 0.3:
            items.insert(place, self._stranger(None)[0])
            return tuple(items), f" with a stranger at [{place}]"
        items[place], what = self.damage(items[place])
        return tuple(items), f"[{place}]{what}"

    def _dataclass(self, value: Any) -> Damage:
        if self.draw.random() < 0.04:
            return self.draw.choice(self.parts[type(value)]), f" := another {type(value).__name__}"
        item = self.draw.choice([field for field in dataclasses.fields(value) if field.init])
        weighty = [field for field in dataclasses.fields(value) if field.name in ("pipelines", "instructions")]
        if weighty and self.draw.random() < 0.6:
            (item,) = weighty
        changed, what = self.damage(getattr(value, item.name))
        return dataclasses.replace(value, **{item.name: changed}), f".{item.name}{what}"


def in_turn(plan: Any, damager: Damager, times: int) -> Damage:
    """Damages a plan several times."""
    done = []
    for _ in range(times):
        damaged, what = damager.damage(plan)
        if type(damaged) is not type(plan):  # a plan in the plan's place is no damage
            continue
        plan = damaged
        done.append(what)
    return plan, ", ".join(done)
