"""What predictions are made for: how fast a device computes attention, and how fast links are."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, NoReturn

from hetu.arguments import MAX_COUNT, choice, flag, integer, number_of, real, refuse, shown
from hetu.arguments import path as as_path
from hetu.arguments import text as as_text
from hetu.errors import HetuError, caller

VERSION = 1
"""Of the file that :meth:`Hardware.save` writes; another one is refused."""

_FORMAT = "hetu hardware"
_OP = "Hardware"
KINDS = ("causal", "full", "window")
"""Kinds of masks that attend at different rates; masks of all other kinds count as windows."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast attention is on packs of documents that fill a device.

    Attributes:
        keys: Keys that a query sees, the mean over all queries.
        flops: FLOP/s that it reaches, counted on the pairs that the mask lets through.
        head_dim: Of the heads.
        kind: ``"causal"``, ``"full"`` or ``"window"``.
        is_backward: Whether it is the backward.

    Example:
        >>> Rate(keys=4096, flops=5e14)
        Rate(keys=4096, flops=500000000000000.0, head_dim=128, kind='causal', is_backward=False)
    """

    keys: float
    flops: float
    head_dim: int = 128
    kind: str = "causal"
    is_backward: bool = False

    def __post_init__(self) -> None:
        for name in ("keys", "flops"):
            object.__setattr__(self, name, _positive(getattr(self, name), f"a rate's {name}"))
        object.__setattr__(self, "head_dim", integer(self.head_dim, "a rate's head_dim", least=1, op=_OP))
        choice(self.kind, "a rate's kind", KINDS, op=_OP)
        object.__setattr__(self, "is_backward", flag(self.is_backward, "a rate's is_backward", op=_OP))


class Curve:
    """FLOP/s by numbers of keys, between which the logarithm is interpolated.

    Args:
        places: Numbers of keys, ascending.
        flops: The FLOP/s there.
    """

    def __init__(self, places: Sequence[float], flops: Sequence[float]) -> None:
        self._places, self._flops = list(places), list(map(float, flops))
        self._steps = [math.log(after / before) for before, after in pairwise(places)]

    def __call__(self, keys: float) -> float:
        places, flops = self._places, self._flops
        if keys <= places[0] or len(places) == 1:
            return flops[0]
        if keys >= places[-1]:
            return flops[-1]
        after = bisect_left(places, keys)
        before = after - 1
        share = math.log(keys / places[before]) / self._steps[before]
        return flops[before] + share * (flops[after] - flops[before])


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a device can do, and the links between devices. Hardware prints, compares and hashes by value.

    Source: a transfer takes a latency and its bytes over the bandwidth: Hockney, "The communication challenge for
    MPP", 1994.

    Attributes:
        flops: Floating point operations per second that attention reaches.
        link_bytes: Bytes per second that a device can send to another one of its host, and as many that it can receive
            at the same time.
        latency: Seconds from the start of such a transfer to its first byte.
        memory_bytes: Bytes that an attention may take.
        launch: Seconds that an attend takes beside its FLOPs: the launch of its kernels.
        host_link_bytes: As ``link_bytes``, between devices of different hosts; None for the same.
        host_latency: As ``latency``, between hosts; None for the same.
        rates: How fast attention is in some cases; what lies between is interpolated over the logarithm of ``keys``,
            for the nearest head_dim. Where there are none it is ``flops`` in all cases.
        name: What it is, where from and since when.

    Raises:
        HetuError: If one of them is no positive number; a latency or a launch may be 0.

    Example:
        >>> slow = Hardware(flops=1e9, link_bytes=1e8, latency=1e-5, memory_bytes=1e9)
        >>> slow.transfer_time(1000), slow.attend_time(2_000_000, keys=100, head_dim=64)
        (2e-05, 0.002)
    """

    flops: float
    link_bytes: float
    latency: float
    memory_bytes: float
    launch: float = 0.0
    host_link_bytes: float | None = None
    host_latency: float | None = None
    rates: tuple[Rate, ...] = ()
    name: str = ""
    _curves: dict[Any, Curve] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("flops", "link_bytes", "memory_bytes", "host_link_bytes"):
            if name != "host_link_bytes" or self.host_link_bytes is not None:
                object.__setattr__(self, name, _positive(getattr(self, name), name))
        for name in ("latency", "launch", "host_latency"):
            if name != "host_latency" or self.host_latency is not None:
                object.__setattr__(self, name, _seconds(getattr(self, name), name))
        rates = self.rates if isinstance(self.rates, (list, tuple)) else None
        if rates is None or not all(isinstance(rate, Rate) for rate in rates):
            what = f"expected rates to be a list of rates, got {shown(self.rates)}"
            raise HetuError(what, op=_OP, where=caller(), fix="leave them out, or take those of hetu.calibrate()")
        object.__setattr__(self, "rates", tuple(rates))
        if not isinstance(self.name, str):
            what = f"expected name to be a string, got {shown(self.name)}"
            raise HetuError(what, op=_OP, where=caller(), fix="leave it out")

    # What it predicts

    def rate(self, keys: float, head_dim: int, kind: str = "causal", is_backward: bool = False) -> float:
        """FLOP/s of attention in which a query sees so many keys on average."""
        return curve_of(self, head_dim, kind, is_backward)(_amount(keys, "keys"))

    def _curve(self, head_dim: int, kind: str, is_backward: bool) -> tuple[list[float], list[float]]:
        """The rates of the case that is nearest: of the same direction first, then mask, then head_dim."""

        def far(rate: Rate) -> tuple[bool, bool, bool, float]:
            apart = abs(math.log(rate.head_dim / head_dim))
            return rate.is_backward != is_backward, rate.kind != kind, rate.kind != "causal", apart

        nearest = min(map(far, self.rates))
        found = {rate.keys: rate.flops for rate in self.rates if far(rate) == nearest}
        places = sorted(found)
        return places, [found[keys] for keys in places]

    def attend_time(
        self, flops: float, keys: float, head_dim: int, kind: str = "causal", is_backward: bool = False
    ) -> float:
        """Seconds of an attend of so many FLOPs; 0 if there is nothing to do."""
        flops = _amount(flops, "flops")
        return self.launch + flops / self.rate(keys, head_dim, kind, is_backward) if flops else 0.0

    def transfer_time(self, count: float, shares_host: bool = True) -> float:
        """Seconds of a transfer of so many bytes."""
        count = _amount(count, "count")
        if flag(shares_host, "shares_host", op=_OP):
            return self.latency + count / self.link_bytes
        latency = self.latency if self.host_latency is None else self.host_latency
        return latency + count / (self.host_link_bytes or self.link_bytes)

    def link_seconds(self, inside: float, between: float) -> float:
        """Seconds that a device's link carries bytes inside its host and between hosts, without latencies."""
        return inside / self.link_bytes + between / (self.host_link_bytes or self.link_bytes)

    # Presets

    @classmethod
    def cpu(cls) -> Hardware:
        """A thread of a server's CPU, and processes that exchange tensors over gloo; 4 GB.

        Measured by ``hetu.calibrate()`` on two processes of one thread each, on 2 cores of an AMD EPYC that others used
        too, with torch 2.13.0 in float32 on 2026-11-30.
        """
        return _CPU

    @classmethod
    def h100(cls) -> Hardware:
        """An H100 SXM in a node: NVLink 4 at 450 GB/s each way, 80 GB.

        500 TFLOP/s is about half of the peak of dense bfloat16 (989 TFLOP/s), as attention forward reaches. The
        bandwidth is that of NVIDIA's data sheet of 2023-03; the latency is an estimate.
        """
        return cls(flops=500e12, link_bytes=450e9, latency=10e-6, memory_bytes=80e9, name="H100 SXM, NVLink 4")

    @classmethod
    def h200(cls) -> Hardware:
        """An H200 in a node: NVLink 4 at 450 GB/s each way, 141 GB.

        Rates are those of ``docs/performance.md``, measured on an H200 with torch 2.11.0 and triton 3.6.0 in bfloat16:
        forwards (Gluon at head_dim 128 and 256) on 2026-11-30, and portable kernels at head_dim 64 and in backwards.
        The launch is that of an H100 there, of 2026-11-28. Bandwidth and memory are those of NVIDIA's data sheet of
        2023-11; the latency is an estimate.
        """
        return _H200

    @classmethod
    def hosts(cls, device: Hardware | None = None, *, link_bytes: float = 50e9, latency: float = 20e-6) -> Hardware:
        """Devices of several hosts that InfiniBand joins; which share one, a :class:`~hetu.Topology` says.

        Args:
            device: The devices and their links inside a host; None for H100.
            link_bytes: Bytes per second that a device can send to another host. 50 GB/s is one port of NDR InfiniBand
                (400 Gb/s) per device, as NVIDIA's DGX H100 has them by its data sheet of 2023-03.
            latency: Seconds until the first byte of a transfer; an estimate.
        """
        if device is not None and not isinstance(device, Hardware):
            refuse(device, "device", "a hetu.Hardware, or None", op=_OP, fix="pass hetu.Hardware.h200(), say")
        bandwidth, wait = _positive(link_bytes, "link_bytes"), _seconds(latency, "latency")
        return replace(device or cls.h100(), host_link_bytes=bandwidth, host_latency=wait)

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a small JSON file, which :meth:`load` reads."""
        with open(as_path(path, op=_OP), "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Hardware:
        """Reads what :meth:`save` or ``hetu.calibrate(path)`` wrote.

        Raises:
            HetuError: If it is no such file, or one of another version of the format, or a number is not positive.
            FileNotFoundError: If there is none.
        """
        name = as_path(path, op=_OP)
        with open(name, encoding="utf-8", errors="replace") as file:  # what is no text is no JSON either
            return cls.from_json(file.read(), name)

    def to_json(self) -> str:
        """The text that a file holds."""
        said = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        said["rates"] = [asdict(rate) for rate in self.rates]
        return json.dumps({"format": _FORMAT, "version": VERSION, **said}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Hardware:
        """The hardware that a text describes; ``source`` is what an error calls it."""
        source = as_text(source, "source", op=_OP)
        try:
            said = json.loads(as_text(text, "text", op=_OP))
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, Mapping) or said.get("format") != _FORMAT:
            _refuse_file(f"{source} is no hardware file")
        if said.get("version") != VERSION:
            _refuse_file(f"{source} is of version {shown(said.get('version'))} of the format, expected {VERSION}")
        known = {item.name for item in fields(cls) if item.init}
        given = {name: value for name, value in said.items() if name not in ("format", "version")}
        wrong = sorted(given.keys() ^ known)
        if wrong:
            _refuse_file(f"{source} lacks, or has besides: {', '.join(wrong)}")
        rates, names = given.pop("rates"), {item.name for item in fields(Rate)}
        if not isinstance(rates, list) or not all(isinstance(rate, dict) and rate.keys() == names for rate in rates):
            _refuse_file(f"{source} has rates without {', '.join(sorted(names))}")
        return cls(**given, rates=tuple(Rate(**rate) for rate in rates))


def curve_of(hardware: Hardware, head_dim: int, kind: str, is_backward: bool) -> Curve:
    """The rates of one case, found once: :meth:`Hardware.rate` without its checks of ``keys``."""
    key, curves = (head_dim, kind, is_backward), hardware._curves
    curve = curves.get(key) if tuple(map(type, key)) == _CASE else None  # 1 is no flag, and equal to one
    if curve is None:
        key = _case(*key)
        curve = curves[key] = Curve(*(hardware._curve(*key) if hardware.rates else ([1.0], [hardware.flops])))
    return curve


_CASE = (int, str, bool)
"""Types of a case that needs no conversion: rates and times are asked for every step of a plan."""


def _amount(value: Any, name: str) -> float:
    """A number of FLOPs, bytes or keys."""
    if (type(value) is int or type(value) is float) and 0 <= value < 1e300:
        return value
    return _number(value, name, "a number from 0", lambda x: x >= 0)


def _case(head_dim: Any, kind: Any, is_backward: Any) -> tuple[int, str, bool]:
    """A head_dim, a kind of mask and a direction."""
    width = integer(head_dim, "head_dim", least=1, most=MAX_COUNT, op=_OP)
    return width, choice(kind, "kind", KINDS, op=_OP), flag(is_backward, "is_backward", op=_OP)


def _refuse_file(what: str) -> NoReturn:
    raise HetuError(what, op=_OP, where=caller(), fix="measure again: hetu.calibrate(path)")


def _positive(value: Any, name: str) -> float:
    return _number(value, name, "a positive number", lambda x: x > 0)


def _seconds(value: Any, name: str) -> float:
    return _number(value, name, "a number of seconds from 0", lambda x: 0 <= x < math.inf)


def _number(value: Any, name: str, wanted: str, holds: Callable[[float], bool]) -> float:
    real(value, name, wanted, holds, op=_OP)
    return number_of(value)  # type: ignore[return-value]  # numpy's numbers become Python's


def _curve(head_dim: int, kind: str, is_backward: bool, points: Mapping[float, float]) -> tuple[Rate, ...]:
    return tuple(Rate(keys, flops, head_dim, kind, is_backward) for keys, flops in points.items())


_H200 = Hardware(
    flops=600e12,
    link_bytes=450e9,
    latency=10e-6,
    memory_bytes=141e9,
    launch=9.5e-6,
    rates=(
        *_curve(128, "causal", False, {128: 221e12, 1024: 574e12, 2048: 624e12, 16384: 716e12}),
        *_curve(256, "causal", False, {1024: 650e12, 16384: 825e12}),
        *_curve(64, "causal", False, {1024: 438e12, 16384: 495e12}),
        *_curve(128, "full", False, {4096: 687e12, 32768: 703e12}),
        *_curve(128, "window", False, {1024: 415e12, 4096: 515e12}),
        *_curve(128, "causal", True, {1024: 345e12, 4096: 405e12, 16384: 418e12}),
        *_curve(64, "causal", True, {4096: 368e12, 16384: 431e12}),
        *_curve(256, "causal", True, {4096: 327e12, 16384: 343e12}),
        *_curve(128, "window", True, {1024: 363e12, 4096: 408e12}),
    ),
    name="H200, NVLink 4",
)

_CPU = Hardware(
    flops=11.7e9,
    link_bytes=4.1e9,
    latency=90e-6,
    memory_bytes=4e9,
    launch=330e-6,
    rates=(
        *_curve(64, "causal", False, {32.5: 2.9e9, 128.5: 4.5e9, 512.5: 11.5e9}),
        *_curve(64, "causal", True, {32.5: 1.1e9, 128.5: 3.9e9, 512.5: 5.5e9}),
        *_curve(64, "full", False, {64: 4.5e9, 256: 9.4e9, 1024: 11.7e9}),
        *_curve(64, "full", True, {64: 3.4e9, 256: 9.3e9, 1024: 10.5e9}),
        *_curve(64, "window", False, {15: 0.62e9, 57: 1e9, 225: 2.4e9}),
        *_curve(64, "window", True, {15: 0.96e9, 57: 2.3e9, 225: 5.6e9}),
    ),
    name="CPU thread, gloo",
)
