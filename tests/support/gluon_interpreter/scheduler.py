"""Partitions of a program as threads, of which one runs at a time, in an order that a seed decides.

Each knows which accesses to shared memory are behind it: *events*, bits of an integer. It hears of those of others
through barriers. An access that has to come after one of which its thread doesn't know is a race, whether or not it
went well this time: what is found does not depend on luck.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support.gluon_interpreter.values import KernelError


@dataclass
class Knowledge:
    """Events that are over for one who knows of them.

    Attributes:
        plain: For its own loads and stores, and its copies and products as to what they overwrite.
        fenced: For copies by TMA and for products, which see stores only after ``fence_async_shared``.
    """

    plain: int = 0
    fenced: int = 0

    def join(self, other: Knowledge) -> None:
        """Hears of what another knows."""
        self.plain |= other.plain
        self.fenced |= other.fenced

    def hear(self, event: int) -> None:
        """Hears of the end of a copy or a product."""
        self.plain |= event
        self.fenced |= event

    def copy(self) -> Knowledge:
        """The same."""
        return Knowledge(self.plain, self.fenced)


@dataclass(eq=False)
class Task:
    """A thread of a program: a partition, or what starts them.

    Attributes:
        name: For errors.
        knows: Of events.
        products: Those of tensor cores under way, oldest first.
        stores: Copies out of shared memory under way, oldest first.
        waits_for: What is waited for, in words, and whether it is there.
    """

    name: str
    knows: Knowledge
    products: list[Any] = field(default_factory=list)
    stores: list[Any] = field(default_factory=list)
    waits_for: tuple[str, Callable[[], bool]] | None = None
    is_done: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def can_run(self) -> bool:
        """Whether it has something to do."""
        return not self.is_done and (self.waits_for is None or self.waits_for[1]())


class _EndedError(BaseException):
    """Ends the threads of a program in which another one failed."""


class Scheduler:
    """Runs the tasks of one program.

    Attributes:
        current: The task that runs.
        copies: Copies by TMA into shared memory that are under way.
        program: Its number.
        programs: How many there are.
    """

    def __init__(self, seed: int, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.copies: list[Any] = []
        self.tasks: list[Task] = []
        self.current = Task("the kernel", Knowledge())
        self._rng = random.Random(seed)
        self._landing = self._rng.choice((0.0, 0.2, 1.0))  # copies as late as can be, now and then, or at once
        self._switching = self._rng.choice((0.05, 0.5))
        self._events = 0
        self._failure: BaseException | None = None
        self._over = threading.Semaphore(0)

    def event(self) -> int:
        """A new event."""
        self._events += 1
        return 1 << self._events

    def run(self, body: Callable[[], None]) -> None:
        """Runs the program's first task, and those that it starts."""
        self.start("the kernel", body, Knowledge())
        self._pass_on(None)
        self._over.acquire()
        if self._failure is not None:
            raise self._failure
        if self.copies:
            raise KernelError("a copy into shared memory is under way when the program ends")

    def start(self, name: str, body: Callable[[], None], knows: Knowledge) -> Task:
        """Adds a task."""
        task = Task(name, knows)

        def work() -> None:
            task.turn.acquire()
            try:
                if self._failure is None:
                    with np.errstate(all="ignore"):
                        body()
                    if task.products or task.stores:
                        raise KernelError(f"{task.name} ends before its products and copies do")
            except _EndedError:
                pass
            except BaseException as failure:
                self._failure = self._failure or failure
            task.is_done = True
            self._pass_on(task)

        self.tasks.append(task)
        threading.Thread(target=work, daemon=True).start()
        return task

    def may_switch(self) -> None:
        """A moment at which others may run, and copies may land."""
        if self._rng.random() < self._switching:
            self._pass_on(self.current)

    def wait(self, what: str, is_there: Callable[[], bool]) -> None:
        """Lets others run until something is there."""
        task = self.current
        task.waits_for = what, is_there
        if not is_there() or self._rng.random() < self._switching:
            self._pass_on(task)
        task.waits_for = None

    def _pass_on(self, task: Task | None) -> None:
        """Lets a task go on; returns when it is the turn of the one that called, if that is not done."""
        following = self._next()
        if following is None:
            self._over.release()
        elif following is not task:
            self.current = following
            following.turn.release()
        if task is None or task.is_done:
            return
        if following is not task:
            task.turn.acquire()
        if self._failure is not None:
            raise _EndedError

    def _next(self) -> Task | None:
        """A task that can run; None when all are done. After a failure all others are ended."""
        alive = [task for task in self.tasks if not task.is_done]
        if self._failure is not None or not alive:
            return alive[0] if alive else None
        for copy in [copy for copy in self.copies if self._rng.random() < self._landing]:
            self._land(copy)
        while not (able := [task for task in alive if task.can_run]):
            if self._failure is not None:
                return alive[0]
            if not self.copies:
                waits = [f"{task.name} waits for {task.waits_for[0]}" for task in alive if task.waits_for]
                self._failure = KernelError("nobody can go on: " + "; ".join(waits))
                return alive[0]
            self._land(self._rng.choice(self.copies))
        return self._rng.choice(able)

    def _land(self, copy: Any) -> None:
        self.copies.remove(copy)
        try:
            copy.land()
        except BaseException as failure:
            self._failure = failure
