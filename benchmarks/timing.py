"""What the benchmarks on GPUs share: timers, turns, and what was measured where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from tables import environment

Call = Callable[[], Any]

FLUSHED = 128 * 2**20  # bytes; the L2 cache of an H100 or H200 has 50 MB
CYCLES = 2_000_000  # of a sleeping kernel in a millisecond, at the highest clocks of an H100 or H200
BUDGET = 500.0  # milliseconds of samples of a peer on a case, so that long kernels get fewer
FEWEST_SAMPLES = 5


class WaitsForDevice(RuntimeError):  # noqa: N818
    """A call's time on the device cannot be told from the host's."""


class DeviceTimer:
    """Times of a call on the device, without what the host does for it.

    The device sleeps until the host has queued the whole call. A sample for which it didn't sleep long enough is not
    counted, and taken again with a longer sleep.

    Raises:
        WaitsForDevice: If no sleep is long enough, because the call waits for the device.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.flushed = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
        self.host = self._host_time()
        self.sleep = 0.2 + 2 * self.host
        self.cost = self.sample() + self.sleep

    def sample(self) -> float:
        """Milliseconds."""
        for _ in range(4):
            time, is_hidden = self._take()
            if is_hidden:
                return time
            self.sleep *= 2
        raise WaitsForDevice("waits for the device, so that its time cannot be told from the host's")

    def _host_time(self) -> float:
        """Milliseconds until the call returns."""
        torch.cuda.synchronize()
        start = perf_counter()
        self.call()
        time = (perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        return time

    def _take(self) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(int(self.sleep * CYCLES))
        self._meet()
        start.record()
        self.call()
        end.record()
        is_hidden = not start.query()  # the device still sleeps
        end.synchronize()
        return start.elapsed_time(end), is_hidden

    def _meet(self) -> None:
        """Queues what makes devices start together, where there are several."""


class HostTimer:
    """Times of a call on the CPU; has what :class:`DeviceTimer` has."""

    def __init__(self, call: Call) -> None:
        self.call, self.host = call, None
        self.cost = self.sample()

    def sample(self) -> float:
        start = perf_counter()
        self.call()
        return (perf_counter() - start) * 1e3


Timer = DeviceTimer | HostTimer


def take_turns(timers: Mapping[str, Timer], samples: int) -> dict[str, list[float]]:
    """Samples of all, the first of each, then the second of each and so on."""
    counts = {name: max(min(samples, int(BUDGET / timer.cost)), FEWEST_SAMPLES) for name, timer in timers.items()}
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(max(counts.values(), default=0)):
        for name, timer in timers.items():
            if turn < counts[name]:
                taken[name].append(timer.sample())
    return taken


def attempt(made: dict[str, Any], reasons: dict[str, str], name: str, make: Call) -> None:
    """Puts what ``make`` gives into ``made``, or why it failed into ``reasons``: peers fail in all sorts of ways."""
    try:
        made[name] = make()
    except Exception as failure:
        reasons[name] = first_line(failure)


def first_line(failure: BaseException) -> str:
    """Of what it says, and of what caused it, no more than fits into a line.

    Example:
        >>> first_line(ValueError("too large: 7"))
        'too large: 7'
    """
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    first = lines[0][:160] if lines else type(failure).__name__
    return f"{first}: {first_line(failure.__cause__)}"[:240] if failure.__cause__ else first


def about(script: str, device: str, argv: Sequence[str]) -> dict[str, str]:
    """The machine, the versions and the command."""
    versions = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    told = environment([script, *argv]) | versions
    return told | {"device": torch.cuda.get_device_name()} if device == "cuda" else told
