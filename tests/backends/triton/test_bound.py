"""Launches that were made once: made again for other memory, they are what Triton would have been asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables_by_definition import Case, random_case

from hetu.backends.attention.contract import BackwardState, new_state
from hetu.backends.attention.dropout import Dropout
from hetu.backends.attention.family import AttendCall
from hetu.backends.triton import bound, launch, launch_backward, launcher
from hetu.backends.triton.bound import BoundLaunch
from hetu.backends.triton.launcher import Launcher

CUDA = torch.device("cuda", 1)


class Compiled:
    """Stands for a compiled kernel: remembers what it is launched with."""

    function, packed_metadata = "function", "metadata"
    metadata = SimpleNamespace(
        tensordesc_meta=[
            {"swizzle": 3, "elem_size": 2, "elem_type": kind, "block_size": [64, 1, 16], "fp4_padded": False}
            for kind in (6, 10)
        ]
    )

    def __init__(self, launched: Callable[..., None]) -> None:
        self._launched = launched

    def run(self, x: int, y: int, z: int, stream: Any, *given: Any) -> None:
        assert (y, z, *given[:5]) == (1, 1, "function", "metadata", None, None, None)
        self._launched(x, stream, *given[5:])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was launched, on the second device."""
    monkeypatch.setattr(bound, "current_device", lambda: 1)
    monkeypatch.setattr(bound, "current_stream", lambda index: f"stream of {index}")
    return []


def test_addresses_numbers_and_constants_come_in_order(launched: list[tuple[Any, ...]]) -> None:
    launch = BoundLaunch(Compiled(lambda *given: launched.append(given)), CUDA, (64, True))
    x, y = torch.zeros(8), torch.zeros(8)
    assert launch(3, (x, None, y), (7, 0.5)) and launch(5, (y, x, y), (8, 0.25))
    assert launched == [
        (3, "stream of 1", x.data_ptr(), None, y.data_ptr(), 7, 0.5, 64, True),
        (5, "stream of 1", y.data_ptr(), x.data_ptr(), y.data_ptr(), 8, 0.25, 64, True),
    ]


def test_what_would_be_compiled_otherwise_is_not_launched(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, x = BoundLaunch(Compiled(lambda *given: launched.append(given)), CUDA, ()), torch.zeros(8)
    assert not launch(1, (x, x[1:]), (1,)), "4 bytes past a multiple of 16"
    assert not launch(1, (x, None), (2**31,)) and launch(1, (x, None), (2**31 - 1,))
    with monkeypatch.context() as patch:
        patch.setattr(bound, "current_device", lambda: 0)
        assert not launch(1, (x,), (1,)), "Triton launches on the current device"
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    assert not launch(1, (x,), (1,)), "a profiler wants to be told"
    assert len(launched) == 1


def test_descriptors_are_made_once_an_address(launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def fill(*given: Any) -> str:
        made.append(given)
        return f"map of {given[0]}"

    compiled = Compiled(lambda *given: launched.append(given))
    active = SimpleNamespace(active=SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor=fill)))
    monkeypatch.setattr(triton.runtime, "driver", active)
    boxes = [SimpleNamespace(shape=torch.Size([9, 2, 16]), strides=(32, 16, 1)) for _ in range(2)]
    assert BoundLaunch.of(compiled, CUDA, (), boxes) is None, "a Triton that is not known"
    below = lambda *given: launched.append((*given[:4], *given[13:]))  # noqa: E731
    monkeypatch.setattr(bound, "_below_descriptors", lambda _: (below, (False, False, None, None)))
    monkeypatch.setattr(bound, "_MAPS", 2)
    launch, tensors = BoundLaunch.of(compiled, CUDA, ("C",), boxes), [torch.zeros(8) for _ in range(3)]
    assert launch is not None
    for x, y in ((0, 1), (1, 0), (0, 1), (2, 1), (0, 1)):
        a, b = tensors[x].data_ptr(), tensors[y].data_ptr()
        assert launch(4, (tensors[x], tensors[y], tensors[2], None), (3,))
        like = (9, 2, 16, 32, 16, 1)
        given = f"map of {a}", *like, f"map of {b}", *like, tensors[2].data_ptr(), None, 3, "C"
        assert launched[-1] == (4, 1, 1, "stream of 1", *given)
    first, second, third = (x.data_ptr() for x in tensors)
    # Of each parameter two are kept: the third address of the first one makes it begin anew.
    assert [one[0] for one in made] == [first, second, second, first, third, first]
    assert made[0][1:] == (3, 2, 6, [64, 1, 16], (9, 2, 16), (32, 16, 1), 0)
    assert made[1][3] == 9, "the host calls types otherwise"


@pytest.mark.skipif(
    getattr(pytest.importorskip("triton.backends.nvidia.driver"), "_BASE_ARGS_FORMAT", None) != bound._LAYOUT,
    reason="this Triton hands descriptors to C otherwise",
)
def test_triton_itself_makes_the_same_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver

    utils = SimpleNamespace(fill_tma_descriptor=lambda *given: given)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    seen: list[tuple[Any, ...]] = []
    signature = {0: "tensordesc<bf16[64, 1, 16]>", 1: "tensordesc<bf16[64, 1, 16]>", 2: "*bf16", 3: "i32"}
    run = driver.CudaLauncher.__new__(driver.CudaLauncher)
    run.launch = driver.wrap_handle_tensordesc(
        lambda *given: seen.append(given), signature, Compiled.metadata.tensordesc_meta
    )
    run.global_scratch_size = run.profile_scratch_size = run.global_scratch_align = run.profile_scratch_align = 0
    run.launch_cooperative_grid, run.launch_pdl, run.num_ctas = False, True, 1
    compiled: Any = Compiled(seen.append)
    compiled.run, compiled.function, compiled.packed_metadata = run, 5, "m"
    x = torch.zeros(9, 2, 16)
    box = SimpleNamespace(base=x, shape=x.shape, strides=x.stride(), padding="zero")
    launch = BoundLaunch.of(compiled, torch.device("cpu"), ("C",), [box, box])
    assert launch is not None
    monkeypatch.setattr(bound, "current_stream", lambda index: 11)
    assert launch(4, (x, x, x), (3,))
    run(4, 1, 1, 11, 5, "m", None, None, None, box, box, x.data_ptr(), 3, "C")
    assert seen[0] == seen[1]


class Asked:
    """Stands for a kernel of Triton's; notes what is launched of it, by the names of its parameters."""

    def __init__(self, of: Launcher, launches: list[dict[str, Any]]) -> None:
        self.arg_names, self.launches = of.kernel.arg_names, launches
        self.names: dict[int, str] = {}  # of the tensors that there are, by address

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(**given: Any) -> Compiled:
            self._note(grid[0], [given[name] for name in self.arg_names])
            return Compiled(lambda programs, _, *again: self._note(programs, again))

        return launch

    def _note(self, programs: int, given: Sequence[Any]) -> None:
        said: dict[str, Any] = {"programs": programs}
        for name, value in zip(self.arg_names, given, strict=True):
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if name == "records":
                said[name] = ctypes.string_at(address, 64)  # the first one
            elif name in ("q", "key_position") and address not in self.names:
                said[name] = "made anew"
            else:
                said[name] = self.names.get(address, address)
        self.launches.append(said)


@contextmanager
def asked() -> Iterator[tuple[list[dict[str, Any]], dict[int, str]]]:
    """Kernels that only note what they are asked for, as if for sm_90; and names of tensors by their addresses."""
    launches: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        for of in (launch._forward, launch_backward._backward):
            kernel = Asked(of, launches)
            kernel.names = names
            for name, value in (("kernel", kernel), ("check", None), ("_compiled", {})):
                patch.setattr(of, name, value)
        for module in (launch, launch_backward):
            patch.setattr(module, "capability", lambda device: 90)
        for module in (launcher, bound):
            patch.setattr(module, "current_stream", lambda index: 0)
        patch.setattr(launcher.interpreter, "running", nullcontext)
        yield launches, names


LAYER = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "kind": st.sampled_from(["whole", "packed", "odd"]),
        "softcap": st.sampled_from([0.0, 7.0]),
        "sinks": st.booleans(),
        "scale": st.sampled_from([0.5, 2.0, 0.0, -1.0]),
        "seed": st.sampled_from([None, 1, 2]),
    }
)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    layers=st.lists(LAYER, min_size=2, max_size=6),
)
def test_layers_of_one_plan_launch_what_each_would_alone(
    seed: int, lengths: list[int], layers: list[dict[str, Any]]
) -> None:
    """Whatever came before: other types, strides, addresses, scales, caps, sinks and seeds."""
    case = random_case(seed, lengths, is_causal=True, num_steps=2, tail=1)
    with asked() as (launches, names):
        held = [Layer(case, layer, number) for number, layer in enumerate([*layers, layers[0], layers[0]])]
        names |= {x.data_ptr(): name for layer in held for name, x in layer.names.items() if x.numel()}
        sides = []
        for is_alone in (False, True):
            launches.clear()
            for layer in held:
                for number in range(len(case.steps)):
                    if is_alone:
                        forget(case)
                    layer.run(number)
            sides.append([dict(one) for one in launches])
            forget(case)
    kept, alone = sides
    assert len(kept) == len(alone)
    assert not [(a[name], b[name], name) for a, b in zip(kept, alone, strict=True) for name in a if a[name] != b[name]]


def forget(case: Case) -> None:
    """Nothing was launched before."""
    for step, turn in zip(case.steps, case.turns, strict=True):
        (step.table if turn is None else turn).copies.clear()
    for of in (launch._forward, launch_backward._backward):
        of._compiled.clear()


class Layer:
    """The tensors of a layer, all of them alive."""

    def __init__(self, case: Case, given: dict[str, Any], number: int) -> None:
        self.case, self.given, dtype = case, given, given["dtype"]
        self.names: dict[str, torch.Tensor] = {}
        self.q, self.dout, self.dq = (self._new(case.rows, 4, dtype) for _ in range(3))
        self.kv = [[self._new(seen.shape[1], 2, dtype) for _ in range(4)] for seen in case.seen]
        state = new_state(self.q, case.spans, case.slots, case.slot_rows, case.runs_on)
        self.state, delta = state, torch.zeros(case.rows, 4)
        self.grads = BackwardState(self.dout, state.lse, delta, self.dq, state.acc)
        self.sinks = torch.zeros(4) if given["sinks"] else None
        every = [self.q, self.dout, self.dq, state.out, state.lse, delta, state.acc, self.sinks, *chain(*self.kv)]
        self.names = {f"{at} of {number}": x for at, x in enumerate(every) if x is not None}

    def _new(self, rows: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
        if self.given["kind"] == "whole":
            return torch.zeros(rows, heads, 16, dtype=dtype)
        odd = int(self.given["kind"] == "odd")
        return torch.zeros(rows * 8 * 16 + odd, dtype=dtype)[odd:].view(rows, 8, 16)[:, 1 : 1 + heads]

    def run(self, number: int) -> None:
        """A step, forward and backward."""
        given, (k, v, dk, dv) = self.given, self.kv[number]
        step, turn = self.case.steps[number], self.case.turns[number]
        dropout = None if given["seed"] is None else Dropout(0.5, given["seed"])
        call = AttendCall(
            self.q, k, v, self.case.spans, step.table, given["scale"], turn, dropout, step.key_position,
            softcap=given["softcap"], sinks=self.sinks,
        )  # fmt: skip
        launch.attend(call, self.state)
        if given["scale"] > 0:
            launch_backward.attend_backward(call, self.grads, dk, dv)
