"""Runs with hetu.recompute: the bits of runs without it, in less memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import llama
import pytest
import torch
from support.jobs import train
from support.random_runs import Program, Request, requests
from support.same import assert_same
from support.scopes import LiveBytes
from support.states import is_same
from support.training import SMALL, learnable_packs, steps
from torch.utils._python_dispatch import TorchDispatchMode

import hetu
from hetu import rng


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_trains_to_the_same_bits(dtype: str) -> None:
    """Under every strategy, with micro-batches, waiting gradients and clipping."""
    plain, recomputed = (train(partial(llama.build, SMALL, dtype, "cpu", again), steps()) for again in (False, True))
    assert_same(recomputed, plain)


@pytest.mark.parametrize("part", range(4))
def test_random_programs_give_the_same_bits(part: int) -> None:
    """With dropout, ops over pipelines, and scopes that overlap anyhow."""
    clones = 0
    for seed in range(1000 * part + 500, 1000 * part + 506):
        hetu.manual_seed(seed)
        plain, scoped = Program(seed), Program(seed, is_scoped=True)
        scoped.graph.verify()
        clones += sum(node.original is not None for node in scoped.graph.nodes)
        for request, _ in requests(seed, 4):
            start, given = rng.get_state(), []
            for program in (plain, scoped):
                rng.set_state(*start)
                values = program.graph.run(**Request(program, request, breaks=False).arguments)
                given.append((as_lists(values), rng.get_state(), as_lists(program.state())))
            assert is_same(given[1], given[0]), f"program {seed}, request {request}"
    assert clones > 20


def as_lists(given: Any) -> Any:
    """Tensors in nested lists and dicts, with a number in place of NaN, which equals nothing."""
    if isinstance(given, dict):
        return {key: as_lists(item) for key, item in given.items()}
    if isinstance(given, (list, tuple, hetu.Shards)):
        return [as_lists(item) for item in given]
    return torch.nan_to_num(given, nan=0.125) if isinstance(given, torch.Tensor) else given


# Memory


@contextmanager
def measured(g: hetu.Graph, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Gives the peaks of what the modules that a graph has lowered so far hold while they run."""
    peaks: list[int] = []
    with monkeypatch.context() as patch:
        for launcher in list(g.executor._executables.launchers._items.values()):
            module = launcher.executable.module

            def forward(*values: Any, module: Any = module) -> Any:
                live = LiveBytes(module)
                result = live.run(*values)
                peaks.append(live.peak)
                return result

            patch.setattr(module, "forward", forward)
        yield peaks


@pytest.mark.parametrize("index", [0, 1])
def test_memory_grows_by_the_inputs_of_layers(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by attention's output and lse: nothing else of a layer is there when the next one runs."""

    def peak(layers: int, again: bool) -> tuple[int, int]:
        model = llama.build(replace(SMALL, layers=layers), "float32", "cpu", again)
        first = next(node for node in model.graph.nodes if node.name == "embedding")
        fetches = [model.loss, hetu.gradients(model.loss, first.outputs[0])]
        (pack,) = learnable_packs(1, 128)
        feeds, symbols = model.feeds(index, pack)
        for _ in range(2):  # the first run lowers
            with measured(model.graph, monkeypatch) as peaks:
                model.graph.run(fetches, feeds, int_symbol_dict=symbols, strategy=index)
        return max(peaks), sum(map(len, pack))

    (two, rows), (four, _), (eight, _) = (peak(layers, again=True) for layers in (2, 4, 8))
    of_layer = 4 * rows * (SMALL.width + SMALL.heads * SMALL.head_dim + SMALL.heads)  # float32
    growth = [(four - two) / 2, (eight - four) / 4]
    assert growth[0] == growth[1]
    assert of_layer <= growth[0] <= of_layer + 32 * (index + 1)  # rng_state is kept as well
    kept = (peak(4, again=False)[0] - peak(2, again=False)[0]) / 2
    assert kept > 3 * growth[0]


class Watching(TorchDispatchMode):
    """Notes what hyperbolic tangents give, and how many of these there are when something else is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "tanh":
            self.made.append(weakref.ref(result))
        elif name in ("exp", "tanh_backward"):
            self.alive.append(sum(made() is not None for made in self.made))
        return result


def test_what_the_forward_made_is_gone_when_the_backward_starts() -> None:
    def alive(scope: Any, outer: Any = None) -> list[int]:
        with hetu.graph("define_and_run", device="cpu") as g:
            x = hetu.placeholder("float32", [4], name="x")
            h = x
            with outer or nullcontext():
                for _ in range(2):
                    with scope:
                        h = hetu.tanh(hetu.tanh(hetu.tanh(h)))
            dx = hetu.gradients(hetu.sum(hetu.exp(h)), x)
        feed = {x: torch.ones(4)}
        g.run(dx, feed)
        with Watching() as watching:
            g.run(dx, feed)
        return watching.alive

    # First what is there between forward and backward, then before each step back.
    assert alive(nullcontext()) == [6, 6, 5, 4, 3, 2, 1]
    # The outputs of two layers; then those with a layer's own, which lasts until it is differentiated.
    assert alive(hetu.recompute()) == [2, 4, 3, 2, 3, 2, 1]
    # The output of both; the first layer's comes back with the backward of the outer block.
    assert alive(hetu.recompute(), hetu.recompute()) == [1, 4, 3, 2, 3, 2, 1]
