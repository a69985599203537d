"""Launches by key: what Triton compiled for one call is reused for just the calls that it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from hetu.backends.triton import launcher
from hetu.backends.triton.launch import _forward
from hetu.backends.triton.launch_backward import _backward
from hetu.backends.triton.launcher import Arguments, Constants, Launcher
from hetu.backends.triton.rows import _gather, _row_dot

CUDA = torch.device("cuda", 1)


class Compiled:
    """Stands for a compiled kernel: remembers how it is launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.watched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.watched.append((grid, *arguments))

    def run(self, x: int, y: int, z: int, stream: str, function: str, metadata: str, *rest: Any) -> None:
        assert (stream, function, metadata, *rest[:3]) == ("stream of 1", "function", "metadata", None, None, None)
        self.calls.append(((x, y, z), *rest[3:]))


@pytest.fixture(autouse=True)
def second_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launches ask CUDA for."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(launcher, "current_stream", lambda index: f"stream of {index}")


class Kernel:
    """Stands for a ``@triton.jit`` function with two tensors, two numbers and two constants."""

    arg_names = ("x", "y", "n", "scale", "WIDTH", "FLAG")

    def __init__(self, interpreted: bool = False) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.compiled: list[Compiled] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled | None]:
        def launch(**given: Any) -> Compiled | None:
            self.launches.append((grid, given))
            if self.interpreted:
                return None
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def constants() -> Constants:
    return {"FLAG": True, "WIDTH": 64}, {"num_warps": 4}


def named(x: Any, y: Any, n: int, scale: float) -> Arguments:
    """The arguments by their names, in no order."""
    return Launcher(Kernel(), "n").arguments(scale=scale, y=y, n=n, x=x)


def test_arguments_are_named() -> None:
    """Of a kernel's parameters none may be forgotten, mistaken, or passed by its place."""
    arguments = Launcher(Kernel(), "n").arguments
    assert arguments(n=3, y=2, scale=4, x=1) == ((1, 2), (3, 4))
    for wrong in ({"n": 3, "y": 2, "x": 1}, {"n": 3, "y": 2, "scale": 4, "x": 1, "z": 5}):
        with pytest.raises(TypeError):
            arguments(**wrong)
    with pytest.raises(TypeError):
        arguments(1, 2, 3, 4)


@pytest.mark.parametrize("launch", [_forward, _backward, _row_dot, _gather])
def test_tensors_come_before_numbers(launch: Launcher) -> None:
    """Constants are written in capitals, and numbers but for scales are not specialised."""
    names = [name for name in launch.kernel.arg_names if not name.isupper()]
    assert launch.kernel.arg_names[: len(names)] == names
    tensors, numbers = launch.arguments(**{name: name for name in names})
    assert [*tensors, *numbers] == names
    options = launch.kernel.kwargs if launch.kernel.__class__.__name__ == "InterpretedFunction" else vars(launch.kernel)
    assert set(numbers) - {"scale", "keep_scale", "softcap"} == set(options["do_not_specialize"])


def test_the_first_call_of_a_key_goes_through_triton() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launch = Launcher(kernel, "n")
    launch(CUDA, "a", 3, named(x, None, 7, 0.5), constants)
    given = {"x": x, "y": None, "n": 7, "scale": 0.5, "FLAG": True, "WIDTH": 64, "num_warps": 4}
    assert kernel.launches == [((3,), given)], "Triton, too, is told by name"
    launch(CUDA, "a", 5, named(x, None, 8, 0.25), lambda: pytest.fail("the constants are known"))
    assert len(kernel.launches) == 1
    # The constants stand in the order of the parameters, as Triton passes them.
    assert kernel.compiled[0].calls == [((5, 1, 1), x, None, 8, 0.25, 64, True)]
    launch(CUDA, "b", 5, named(x, None, 8, 0.25), constants)
    assert len(kernel.launches) == 2


def test_unusual_arguments_go_through_triton_every_time() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launcher(kernel, "n")
    for _ in range(2):
        launch(CUDA, "a", 1, named(x[1:], x, 1, 1.0), constants)  # 4 bytes past a multiple of 16
        launch(CUDA, "a", 1, named(x, x, 2**31, 1.0), constants)
    assert len(kernel.launches) == 4
    launch(CUDA, "a", 1, named(x, x, 2**31 - 1, 1.0), constants)
    launch(CUDA, "a", 1, named(x, x, 1, 1.0), constants)
    assert len(kernel.launches) == 5 and len(kernel.compiled[-1].calls) == 1, "what was compiled for those is not kept"
    launch(CUDA, "a", 1, named(x[1:], x, 1, 1.0), constants)
    assert len(kernel.launches) == 6, "nor is what was compiled for whole tensors used for others"


def test_what_is_compiled_may_be_refused() -> None:
    kernel, x, seen = Kernel(), torch.zeros(64), []

    def check(compiled: Any) -> None:
        seen.append(compiled)
        if len(seen) == 1:
            raise RuntimeError("other layouts")

    launch = Launcher(kernel, "n", check)
    with pytest.raises(RuntimeError, match="other layouts"):
        launch(CUDA, "a", 1, named(x, None, 1, 1.0), constants)
    for _ in range(2):
        launch(CUDA, "a", 1, named(x, None, 1, 1.0), constants)
    assert seen == kernel.compiled and len(seen) == 2, "what was refused is not kept, what was not is asked about once"


def test_it_launches_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current one, whatever the tensors are on."""
    entered: list[torch.device] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "current_device", lambda: wanted.index)
            yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launcher, "current_stream", lambda index: f"stream of {index + 1}")  # what Compiled expects
    kernel, x, first = Kernel(), torch.zeros(8), torch.device("cuda", 0)
    launch = Launcher(kernel, "n")
    for _ in range(2):
        launch(first, "a", 3, named(x, None, 7, 0.5), constants)
    assert len(kernel.launches) == len(kernel.compiled[0].calls) == 1 and entered == [first, first]
    launch(torch.device("cpu"), "b", 3, named(x, None, 7, 0.5), constants)
    assert len(entered) == 2


@pytest.mark.parametrize("when", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("is_chain", [True, False])
def test_hooks_are_called(monkeypatch: pytest.MonkeyPatch, when: str, is_chain: bool) -> None:
    """Those of a profiler: Triton's own way calls them, and says what is launched."""
    compiled, hook = Compiled(), SimpleNamespace(calls=[print]) if is_chain else print
    monkeypatch.setattr(triton.knobs.runtime, when, hook)
    launcher.launch(compiled, CUDA, 3, (1, 2))
    monkeypatch.setattr(triton.knobs.runtime, when, SimpleNamespace(calls=[]) if is_chain else None)
    launcher.launch(compiled, CUDA, 5, (1,))
    assert compiled.watched == [((3, 1, 1), 1, 2)] and compiled.calls == [((5, 1, 1), 1)]


def test_the_interpreter_compiles_nothing() -> None:
    kernel = Kernel(interpreted=True)
    launch = Launcher(kernel, "n")
    for _ in range(2):
        launch(CUDA, "a", 1, named(torch.zeros(4), None, 1, 1.0), constants)
    assert len(kernel.launches) == 2
