"""Runs that a device has yet to judge: whether indices that only it knows were in range.

A run on a GPU ends for the host long before the device has come to it. What it changes there is protected by the run's
flag, on the device (:mod:`hetu.backends.torch.index_flags`): while the flag is set, every update leaves what it found.
The host looks at the flag when it is there anyway, at the first run that starts after the device has come so far, or
before it gives a state; then what runs changed on the host is taken back, and the error is raised. Later runs that
train take over the flag of those before them, so that none of them goes on from a run that is yet to be refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from hetu import rng
from hetu.backends.torch.index_flags import IndexFlags
from hetu.runtime.before import Before


class UnseenRun:
    """A run that is done for the host, and whose indices nobody has seen.

    Args:
        flags: What notes indices out of range.
        flag: Nonzero if there was one in this run, on any rank.
        draws: The seed, the first offset and the number of offsets that it drew.

    Attributes:
        flag: Whether there was one in this run, or in one before that it goes on from.
        changes_state: Whether it has changed anything but the generator.
    """

    def __init__(self, flags: IndexFlags, flag: torch.Tensor, draws: tuple[int, int, int]) -> None:
        self.flags, self.flag, self._draws = flags, flag != 0, draws
        self.changes_state = False
        self._undo: list[Callable[[], None]] = []
        self._said = self.flag
        self._event: torch.cuda.Event | None = None

    def protect(self, before: Sequence[Before], earlier: UnseenRun | None) -> None:
        """Leaves on the device what was there before the run, if it or an earlier one is flagged."""
        self.changes_state = True
        if earlier is not None:
            self.flag = self.flag | earlier.flag.to(self.flag.device)
        for item in before:
            item.keep_where(self.flag)
            self._undo.append(item.restore)

    def undo_by(self, undo: Callable[[], None]) -> None:
        """Says how something on the host is taken back."""
        self._undo.append(undo)

    def start_telling(self) -> None:
        """Starts to copy the flag to the host."""
        if self.flag.is_cuda:
            self._said = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._said.copy_(self.flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self.flag.device))
        else:
            self._said = self.flag

    def is_told(self) -> bool:
        """Whether the device has come to the end of the run."""
        return self._event is None or self._event.query()

    def is_flagged(self) -> bool:
        """Whether an index was out of range; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._said.item())

    def undo(self) -> None:
        """Takes back what the run changed on the host."""
        for undo in reversed(self._undo):
            undo()
        rng.give_back(*self._draws)


class UnseenRuns:
    """The runs of one graph that the device has yet to judge.

    Attributes:
        runs: The runs in their order.
    """

    def __init__(self) -> None:
        self.runs: deque[UnseenRun] = deque()

    @property
    def last(self) -> UnseenRun | None:
        """The last run that changed the state."""
        return next((run for run in reversed(self.runs) if run.changes_state), None)

    def add(self, run: UnseenRun) -> None:
        """Adds a run, before what it changed is committed."""
        run.start_telling()
        self.runs.append(run)

    def discard(self, run: UnseenRun) -> None:
        """Forgets a run that failed otherwise."""
        if run in self.runs:
            self.runs.remove(run)

    def forget(self) -> None:
        """Forgets all runs: the state that they belong to is gone."""
        self.runs.clear()

    def settle(self, waits: bool) -> tuple[IndexFlags, int] | None:
        """Drops the runs that were right, and takes back what a flagged one and those after it changed on the host.

        Args:
            waits: Whether to wait for the device; else only what it has told is looked at.

        Returns:
            What says which index was out of range, and how many later runs were taken back; None if none is known to
            have been.
        """
        while self.runs and (waits or self.runs[0].is_told()):
            first, is_flagged = self.runs[0], self.runs[0].is_flagged()
            if is_flagged and first.changes_state:  # what came after it goes on from it
                later = len(self.runs) - 1
                while self.runs:
                    self.runs.pop().undo()
                return first.flags, later
            self.runs.popleft()
            if is_flagged:
                first.undo()
                return first.flags, 0
        return None
