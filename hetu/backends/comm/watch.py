"""Watching NCCL's messages, which come after the run that wants them has returned.

Waiting for such a message makes the GPU's stream wait, not the host, so nobody is there to see that it never comes. And
before it is waited for the host may hang: CUDA waits for all that runs, messages too, to load a kernel or to allocate
memory. So a thread looks whether the host got to the waits, and streams past them. If one doesn't in time, or another
rank has said that it stopped, then whatever was still to come is filled with NaN, the world is broken for all later
runs, and the process groups are aborted, so that the streams go on. torch's own watchdog would abort them too, but
leave in place of the message what was in that memory before, to be taken for numbers.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hetu.backends.torch_private import current_stream

PERIOD = 0.05
"""Seconds between two looks."""

SLOW = 0.5
"""Seconds after which it is time to ask whether another rank has stopped, which costs a message to the store."""


class Device(Protocol):
    """What a watch needs of a device."""

    def enter(self) -> None:
        """The thread that calls this will ask for marks."""

    def queue(self) -> Hashable:
        """The current stream; what one stream waits for comes in order."""

    def mark(self) -> Any:
        """Something whose ``query()`` says whether the current stream got to where it is now."""

    def reached(self, mark: Any) -> None:
        """A mark was reached, and is not asked any more."""

    def fill(self, places: Sequence[tuple[int, int]]) -> None:
        """Fills memory, given by address and bytes, with ones: NaN in every floating point type."""


class Gpu:
    """A CUDA device.

    Filling goes through a copy from the host: to start a kernel for the first time CUDA may have to wait for those that
    run, and those wait for what never comes. All that it takes is made beforehand for the same reason.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._streams: dict[int, torch.cuda.Stream] = {}  # by handle: torch takes long to make one
        self._spare: deque[torch.cuda.Event] = deque()
        self.ones = torch.full((2**20,), 255, dtype=torch.uint8, device="cpu").pin_memory()

    def enter(self) -> None:
        """Else asking would open a context on the first GPU."""
        torch.cuda.set_device(self.device)

    def queue(self) -> int:
        """Its handle."""
        return current_stream(self.device.index)

    def mark(self) -> torch.cuda.Event:
        """An event, perhaps one that was used before: a new one takes CUDA three times as long."""
        handle = current_stream(self.device.index)
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = torch.cuda.current_stream(self.device)
        event = self._spare.popleft() if self._spare else torch.cuda.Event()
        event.record(stream)
        return event

    def reached(self, mark: torch.cuda.Event) -> None:
        """Keeps the event for another mark."""
        self._spare.append(mark)

    def fill(self, places: Sequence[tuple[int, int]]) -> None:
        """On a stream of its own."""
        with torch.cuda.stream(self.stream):
            for address, size in places:
                for piece in torch.as_tensor(_Bytes(address, size), device=self.device).split(len(self.ones)):
                    piece.copy_(self.ones[: len(piece)], non_blocking=True)
        self.stream.synchronize()


class _Bytes:
    """Memory of a GPU, as the protocol that torch understands."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "strides": None,
            "typestr": "|u1",
            "version": 2,
        }


class _Never:
    """The mark of what no stream waits for yet."""

    def query(self) -> bool:
        return False


_NEVER = _Never()

Places = tuple[tuple[int, int], ...]
"""Memory, by address and bytes."""


@dataclass(slots=True, eq=False)  # not frozen: every message makes one, and the wait for it changes it
class Awaited:
    """A message that the host will wait for, or that a stream waits for.

    It holds no tensor: that would keep the memory until the host looks, many layers later. Its address is enough, for
    as long as the stream has not got past the wait nothing else was written there.

    Attributes:
        places: Where it lands; nothing for what is sent.
        doing: For the error: ``"receiving rows"``.
        peers: Whom it depends on; none for all.
        since: When it was started, and then when the host asked for it.
        mark: Reached by the stream right after the wait.
    """

    places: Places
    doing: str
    peers: tuple[int, ...]
    since: float
    mark: Any = _NEVER


class Watch:
    """The messages that streams wait for, and the thread that looks after them.

    Args:
        device: Where.
        patience: Seconds until a message counts as lost.
        has_stopped: Whether a rank has said that it stopped.
        lost: Called with what is lost, if anything is: breaks the world, fills what won't come, and ends messages.
    """

    def __init__(
        self, device: Device, patience: float, has_stopped: Callable[[], bool], lost: Callable[[Awaited], None]
    ) -> None:
        self.device, self.patience, self.has_stopped, self.lost = device, patience, has_stopped, lost
        self._awaited: defaultdict[Hashable, deque[Awaited]] = defaultdict(deque)
        self._started: dict[int, Awaited] = {}
        self._some, self._end = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def started(self, into: Sequence[torch.Tensor], doing: str, peers: tuple[int, ...] = ()) -> Awaited:
        """Notes that a message was started, which the host will wait for.

        Args:
            into: Where it lands.
            doing: See :class:`Awaited`.
            peers: See :class:`Awaited`.
        """
        item = Awaited(_places(into), doing, peers, time.monotonic())
        self._started[id(item)] = item
        self._wake()
        return item

    def waited(self, item: Awaited) -> None:
        """Notes that the current stream was just made to wait for a message that was started."""
        item.mark, item.since = self.device.mark(), time.monotonic()
        self._awaited[self.device.queue()].append(item)
        self._started.pop(id(item), None)
        self._wake()

    def expect(self, into: Sequence[torch.Tensor], doing: str, peers: Sequence[int] = ()) -> None:
        """Both at once: the current stream was just made to wait for a message.

        Args:
            into: Where it lands.
            doing: See :class:`Awaited`.
            peers: See :class:`Awaited`.
        """
        self.waited(Awaited(_places(into), doing, tuple(peers), time.monotonic()))

    def _wake(self) -> None:
        if not self._some.is_set():
            self._some.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hetu-watch", daemon=True)
            self._thread.start()

    def fill(self) -> None:
        """Fills what streams wait for with NaN; before messages are ended, for then they go on.

        What the host is still to wait for is left alone: it will be told that the world is broken.
        """
        late = [x for items in list(self._awaited.values()) for x in list(items) if not x.mark.query()]
        if places := [place for x in late for place in x.places]:
            self.device.fill(places)

    def end(self) -> None:
        """No more looks; doesn't wait for one that is under way."""
        self._end.set()
        self._some.set()

    def _run(self) -> None:
        self.device.enter()
        while not self._end.is_set():
            self._some.wait()
            self._some.clear()  # before looking: what is noted from now on is seen by the next look
            while (first := self._oldest()) is not None and not self._end.wait(PERIOD):
                late = time.monotonic() - first.since
                if late > self.patience or (late > SLOW and self.has_stopped() and self._oldest() is first):
                    return self.lost(first)

    def _oldest(self) -> Awaited | None:
        """What is waited for longest, after dropping what has come."""
        for items in list(self._awaited.values()):
            for _ in range(self._reached(items)):
                self.device.reached(items.popleft().mark)
        first = [items[0] for items in list(self._awaited.values()) if items]
        return min([*first, *list(self._started.values())], key=lambda x: x.since, default=None)

    def _reached(self, items: deque[Awaited]) -> int:
        """How many of a stream's messages have come: the first ones.

        They are found by halves. Each question lets another thread go on, and takes it back again: as many as there are
        messages would hold up whoever computes.
        """
        low, high = 0, len(items)
        look = high - 1  # mostly all have come
        while low < high:
            # Once it ends, marks stay: what fills memory asks them at the same time.
            if self._end.is_set():
                return 0
            if items[look].mark.query():
                low = look + 1
            else:
                high = look
            look = (low + high) // 2
        return low


def _places(into: Sequence[torch.Tensor]) -> Places:
    return tuple([(x.data_ptr(), x.nbytes) for x in into if x.nbytes])
