"""What a run costs the host beyond time: copies, waits and compilations, counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import CUDA, DEVICES
from support.functional_calls import Watching
from torch.utils._python_dispatch import TorchDispatchMode

import hetu
import hetu.functional
from hetu.backends.lower.lowering import FeedInput
from hetu.backends.triton.launcher import Launcher

HEADS, HEAD_DIM = 2, 16


class Copies(TorchDispatchMode):
    """Counts copies between devices, by where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.item.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            target = result.device.type if isinstance(result, torch.Tensor) else "host"
            if source.device.type != target:
                self.seen.append((source.device.type, target))
        return result


@contextmanager
def no_waiting(device: str) -> Iterator[Copies]:
    """Fails on whatever makes the host wait for a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Copies() as copies:
            yield copies
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Varlen:
    """A graph with one ``attn_varlen`` and its gradients, fed with tensors on the device and lengths on the host."""

    def __init__(self, device: str, heads: int = HEADS) -> None:
        self.device, self.width = device, heads * HEAD_DIM
        with hetu.graph("define_and_run", device=device) as self.graph:
            rows, width = hetu.IntSymbol("rows"), self.width
            self.qkv = [hetu.placeholder(hetu.bfloat16, [rows, width], name=name) for name in "qkv"]
            self.cu_seqlens = hetu.placeholder(hetu.int32, [hetu.IntSymbol("docs") + 1], name="cu_seqlens")
            out, lse, *_ = hetu.attn_varlen(*self.qkv, HEAD_DIM, self.cu_seqlens, self.cu_seqlens, is_causal=True)
            self.fetches = [out, *hetu.gradients([out, lse], self.qkv)]

    def feeds(self, lengths: list[int]) -> dict[Any, Any]:
        rows = (sum(lengths), self.width)
        fed: dict[Any, Any] = {x: torch.ones(rows, dtype=torch.bfloat16, device=self.device) for x in self.qkv}
        return fed | {self.cu_seqlens: np.cumsum([0, *lengths]).astype(np.int32)}

    def run(self, lengths: list[int], feeds: dict[Any, Any]) -> Any:
        return self.graph.run(self.fetches, feeds)


class Parallel:
    """The same of a ``parallel_attn`` over three pipelines."""

    def __init__(self, device: str) -> None:
        self.device = device
        with hetu.graph("define_and_run", device=device) as self.graph:
            held = [hetu.IntSymbol(f"held{i}") for i in range(3)]
            self.qkv = hetu.placeholder(hetu.bfloat16, [hetu.IntSymbol("rows"), 3 * HEADS * HEAD_DIM], name="qkv")
            out, lse, *_ = hetu.parallel_attn(self.qkv, HEAD_DIM, 1, [held], [[0, 0, 0]], split="sym")
            self.held, self.fetches = held, [out, *hetu.gradients([out, lse], [self.qkv])]

    def shards(self, lengths: list[int]) -> list[int]:
        total = sum(lengths)
        return [total // 3, total // 3, total - 2 * (total // 3)]

    def feeds(self, lengths: list[int]) -> dict[Any, Any]:
        width = 3 * HEADS * HEAD_DIM
        rows = (torch.ones(n, width, dtype=torch.bfloat16, device=self.device) for n in self.shards(lengths))
        return {self.qkv: hetu.Shards(rows)}

    def run(self, lengths: list[int], feeds: dict[Any, Any]) -> Any:
        symbols = dict(zip(self.held, self.shards(lengths), strict=True))
        return self.graph.run(self.fetches, feeds, int_symbol_dict=symbols)


def test_lengths_that_are_in_the_plan_are_no_input() -> None:
    case = Varlen("cpu")
    case.graph.run(case.fetches, case.feeds([3, 0, 5]))
    (launcher,) = case.graph.executor._executables.launchers._items.values()
    fed = {item.tensor for item in launcher.executable.inputs if isinstance(item, FeedInput)}
    assert fed == set(case.qkv), "cumulative lengths would be copied to the device, and waited for"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Varlen, Parallel])
def test_nothing_waits_for_the_device(kind: type[Varlen] | type[Parallel], device: str) -> None:
    case = kind(device)
    case.run([90, 38], case.feeds([90, 38]))  # compiles
    for lengths in ([200, 1, 0, 7], [200, 1, 0, 7], [5, 64]):  # new, seen, new
        feeds = case.feeds(lengths)
        with no_waiting(device) as copies:
            case.run(lengths, feeds)
        assert all(source == "cpu" for source, _ in copies.seen), copies.seen


def test_a_run_of_seen_lengths_asks_torch_for_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the output and its log-sum-exps: whatever else stood there would be another launch on a GPU."""
    monkeypatch.setattr(Launcher, "__call__", lambda *_: None)
    rows = hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", device="cpu") as g:
        qkv = [hetu.placeholder(hetu.float32, [rows, 2, 16], name=name) for name in "qkv"]
        cu_seqlens = hetu.placeholder(hetu.int32, [hetu.IntSymbol("docs") + 1])
        out, lse, *_ = hetu.attn_varlen(*qkv, 16, cu_seqlens, cu_seqlens, is_causal=True)
    feeds = dict.fromkeys(qkv, torch.ones(8, 2, 16)) | {cu_seqlens: torch.tensor([0, 5, 8], dtype=torch.int32)}
    for fetches, has_lse in ((out, False), ([out, lse], True)):
        for _ in range(2):
            with hetu.config(backend="triton"), Watching() as calls:
                g.run(fetches, feeds)
        made = [str(op) for op in calls.seen if op is not torch.ops.aten.detach.default]  # numpy's view of cu_seqlens
        assert made == [
            "aten.empty.memory_format",
            "aten.new_full.default" if has_lse else "aten.empty.memory_format",
        ], "lse has gaps, which only who fetches it can see"


def test_new_lengths_are_read_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the forward and the backward, for queries and keys, in telling and in planning."""
    from hetu.ops.attention import common as _attention

    checked = []

    def counted(name: str, values: Any) -> Any:
        checked.append(name)
        return fault(name, values)

    fault = _attention.cu_seqlens_fault
    case = Varlen("cpu")
    case.run([3, 1], case.feeds([3, 1]))
    monkeypatch.setattr(_attention, "cu_seqlens_fault", counted)
    case.run([2, 5], case.feeds([2, 5]))
    assert checked == ["cu_seqlens_q"]


def test_new_lengths_call_few_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than lengths seen before: each takes two microseconds where a GPU's driver has emptied the caches."""
    package = str(Path(hetu.__file__).parent)
    monkeypatch.setattr(Launcher, "__call__", lambda *_: None)
    case = Varlen("cpu")

    def calls(lengths: list[int]) -> int:
        feeds, called = case.feeds(lengths), 0

        def note(frame: FrameType, event: str, _: Any) -> None:
            nonlocal called
            called += event == "call" and frame.f_code.co_filename.startswith(package)

        sys.setprofile(note)
        try:
            case.graph.run(case.fetches[0], feeds)
        finally:
            sys.setprofile(None)
        return called

    with hetu.config(backend="triton"):
        for lengths in ([3, 1], [2, 6]):
            calls(lengths)
        new = calls([4, 5])
        seen = calls([4, 5])
    assert 20 < new - seen <= 115, (new, seen)


@pytest.mark.parametrize("device", DEVICES)
def test_the_functional_entry_waits_for_nothing(device: str) -> None:
    def rows(count: int) -> torch.Tensor:
        return torch.ones(count, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device, requires_grad=True)

    for turn, lengths in enumerate(([30, 4], [7, 7, 200], [7, 7, 200])):
        q, k, v = (rows(sum(lengths)) for _ in range(3))
        cu_seqlens, dout = torch.tensor(np.cumsum([0, *lengths])), torch.ones_like(q)
        if turn == 0:  # compiles
            hetu.functional.attn_varlen(q, k, v, cu_seqlens, cu_seqlens, is_causal=True).backward(dout)
            continue
        # What a mode watches goes through the dispatcher, which is to wait for nothing either.
        with no_waiting(device) as copies:
            hetu.functional.attn_varlen(q, k, v, cu_seqlens, cu_seqlens, is_causal=True).backward(dout)
        assert all(source == "cpu" for source, _ in copies.seen), copies.seen


@pytest.mark.parametrize("device", [CUDA])
def test_other_lengths_compile_nothing(device: str) -> None:
    from triton import knobs

    compiled: list[str] = []
    case, random = Varlen(device, heads=11), np.random.default_rng(0)  # as no other test has, which would compile them
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(str(about["repr"]))
    try:
        for turn in range(200):
            documents = int(random.integers(1, 40))
            lengths = np.minimum(random.lognormal(4.5, 1.3, documents).astype(int), 4000).tolist()
            if turn == 0:
                lengths = [8000]  # a long one, so that both tiles are seen at once
            case.graph.run(case.fetches, case.feeds([*lengths, 1]))
            if turn == 4:
                known = len(compiled)
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert 0 < known == len(compiled), compiled
