"""Random programs that train, and random requests of them, right and broken: both drawn from seeds.

The same seed gives the same program, so that a twin shows what a run should have given. A request is drawn for a
program, so that the same seed asks the twin for the same.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from support.hostile import HOSTILE
from support.scopes import RandomScopes

import hetu

WIDTH, IDS = 24, 7
"""Numbers of a row, which are three of attention's heads, and entries of the table of embeddings."""

STRATEGIES: list[Callable[[Any], tuple[list[Any], list[int]]]] = [
    lambda s: ([s], [0]),
    lambda s: ([s // 2, s - s // 2], [0, 0]),
    lambda s: ([s // 3, s - s // 3 * 2, s // 3], [0, 0, 0]),
    lambda s: ([s, s // 2 + 1], [1, 0]),
]
"""From a symbol to the lengths and groups of a strategy."""


class BrokenError(Exception):
    """What the user's own code raises."""


class Schedule:
    """A user's schedule, which counts and may raise after it has changed something."""

    raises = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9
        if Schedule.raises:
            raise BrokenError("schedule")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Init:
    """A user's initialiser, which may raise."""

    raises = False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, tensor: torch.Tensor) -> None:
        if Init.raises:
            raise BrokenError("initialiser")
        tensor.normal_(0.0, self.scale)


OPTIMIZERS: list[Callable[..., Any]] = [
    functools.partial(hetu.optim.SGD, lr=0.05, momentum=0.9),
    functools.partial(hetu.optim.Adam, lr=0.01, amsgrad=True),
    functools.partial(hetu.optim.AdamW, lr=0.01, max_grad_norm=1.0),
]


class Program:
    """A graph of random ops around one attention, with what it can be asked for.

    Args:
        seed: Draws it.
        is_scoped: Whether it stands in random scopes of ``hetu.recompute``; all else is the same.

    Attributes:
        graph: The graph.
        fetches: All tensors that may be fetched, by name.
    """

    def __init__(self, seed: int, is_scoped: bool = False) -> None:
        self.draw = random.Random(seed)
        count = self.draw.randint(1, 3)
        self.made = [self.draw.randrange(len(STRATEGIES)) for _ in range(count)]
        self.s, self.rows = hetu.IntSymbol("s", min=1, max=64), hetu.IntSymbol("rows")
        self.packing = self.draw.random() < 0.4
        self.computed = self.draw.random() < 0.3
        self.dtype = self.draw.choice(["float32", "float32", "float64", "bfloat16"])
        with (
            hetu.graph("define_and_run", num_strategy=count, device="cpu") as self.graph,
            RandomScopes(seed) as scopes,
        ):
            self._build(scopes.shift if is_scoped else lambda: None)

    def _build(self, shift: Callable[[], None]) -> None:
        rows = self.rows
        self.x = hetu.placeholder(self.dtype, [rows, WIDTH], name="x")
        self.ids = hetu.placeholder("int64", [rows], name="ids")
        self.labels = hetu.placeholder("int64", [rows], name="labels")
        self.cu = hetu.placeholder("int32", [hetu.IntSymbol("b")], name="cu") if self.packing else None
        self.table = self._parameter("table", [IDS, WIDTH])
        ids = self.ids + 1 - 1 if self.computed else self.ids
        h = hetu.embedding(ids, self.table) + self.x
        for _ in range(self.draw.randint(1, 5)):
            shift()
            h = self._layer(h)
        lists = [STRATEGIES[i](self.s) for i in self.made]
        attended = hetu.parallel_attn(
            h, 8, 1, [item[0] for item in lists], [item[1] for item in lists], self.packing, self.cu,
            p_dropout=self.draw.choice([0.0, 0.0, 0.2]), is_causal=self.draw.random() < 0.7,
            split=self.draw.choice(["normal", "sym", "stripe", "balanced"]),
            method=self.draw.choice(["auto", "ring", "all_gather", "ulysses"]),
        )  # fmt: skip
        out = hetu.linear(attended[0], self._parameter("out", [WIDTH, 8]))
        for _ in range(self.draw.randint(0, 3)):
            shift()
            out = self._layer(out)
        shift()
        logits = hetu.linear(out, self._parameter("head", [IDS, WIDTH]), None)
        if self.draw.random() < 0.5:
            loss = hetu.token_mean_loss(logits, self.labels)
        else:
            loss = hetu.cross_entropy(logits, self.labels, reduction="sum")
        schedule = Schedule if self.draw.random() < 0.5 else None
        update = self.draw.choice(OPTIMIZERS)(schedule=schedule).minimize(loss, name="train")
        grads = hetu.gradients(loss, [self.table, self.x])
        names = ("loss", "train", "logits", "attended", "lse", "table_grad", "x_grad", "table")
        tensors = (loss, update, logits, attended[0], attended[1], *grads, self.table)
        self.fetches = dict(zip(names, tensors, strict=True))

    def _parameter(self, name: str, shape: list[int]) -> Any:
        return hetu.parameter(Init(0.3), shape, dtype=self.dtype, name=f"{name}{len(self.graph.nodes)}")

    def _layer(self, h: Any) -> Any:
        """One of many ops on rows, which leaves their shape as it is."""
        draw, t = self.draw, hetu.tanh

        def weight() -> Any:
            return self._parameter("vector", [WIDTH])

        layers: list[Callable[[], Any]] = [
            lambda: hetu.relu(h),
            lambda: hetu.sigmoid(h),
            lambda: hetu.silu(h),
            lambda: hetu.gelu(h),
            lambda: t(h),
            lambda: hetu.exp(t(h)),
            lambda: hetu.log(h * h + 0.5),
            lambda: hetu.sqrt(h * h + 0.5),
            lambda: hetu.rsqrt(h * h + 0.5),
            lambda: t(h) ** 2,
            lambda: h / (h * h + 1.0),
            lambda: h - hetu.stop_gradient(t(h)),
            lambda: hetu.where(h > 0.0, h, t(h)),
            lambda: hetu.softmax(h),
            lambda: h + hetu.rms_norm(h, weight()),
            lambda: h + hetu.layer_norm(h, weight(), self._parameter("bias", [WIDTH])),
            lambda: h + hetu.linear(h, self._parameter("square", [WIDTH, WIDTH])),
            lambda: h + hetu.matmul(h, self._parameter("square", [WIDTH, WIDTH])),
            lambda: hetu.swiglu(t(h), h),
            lambda: hetu.dropout(h, 0.3),
            lambda: hetu.concat(hetu.split(h, [8, 16], 1)[::-1], 1),
            lambda: hetu.reshape(hetu.reshape(h, [self.rows, 3, 8]), [self.rows, WIDTH]),
            lambda: hetu.transpose(hetu.transpose(h, 0, 1), 0, 1),
            lambda: hetu.concat([hetu.slice(h, 1, 4, WIDTH), hetu.slice(h, 1, 0, 4)], 1),
            lambda: hetu.gather(h, 1, hetu.broadcast_to(hetu.constant([list(range(WIDTH))]), [self.rows, WIDTH])),
            lambda: hetu.cast(hetu.cast(h, "float32"), self.dtype),
            lambda: h - hetu.mean(h, 1, True),
            lambda: h - hetu.max(h, 1, True),
            lambda: h + hetu.broadcast_to(weight(), [self.rows, WIDTH]),
            lambda: hetu.rotary(h, self.labels * 0 + self.ids, 8, 3),
            lambda: h * hetu.cast(hetu.all_reduce(hetu.mean(t(hetu.cast(h, "float32")))), self.dtype),
            lambda: h + self.s,
        ]
        return draw.choice(layers)()

    def state(self) -> dict[str, Any]:
        """The whole state."""
        return self.graph.state_dict()


# Requests


class Request:
    """The arguments of one run of a program, drawn from a seed; the same for each program of one seed.

    Attributes:
        arguments: Of :meth:`hetu.Graph.run`.
        kind: What is wrong with it; ``"right"`` if nothing is.
    """

    def __init__(self, program: Program, seed: int, breaks: bool) -> None:
        self.draw, self.program, self.kind = random.Random(seed), program, "right"
        self.numbers = np.random.default_rng(seed)
        self.raising: Callable[[ExitStack], None] | None = None
        batches = self.draw.choice([1, 1, 2])
        self.strategy = self.draw.randrange(len(program.made))
        parts = [self._batch() for _ in range(batches)]
        first = parts[0][0]
        feeds: dict[Any, Any] = {key: [part[0][key] for part in parts] if batches > 1 else first[key] for key in first}
        values: Any = [part[1] for part in parts] if batches > 1 else parts[0][1]
        names = self.draw.sample(list(program.fetches), self.draw.randint(1, 3))
        fetches: Any = [program.fetches[name] for name in names]
        self.arguments: dict[str, Any] = {
            "fetches": fetches if len(fetches) > 1 or self.draw.random() < 0.5 else fetches[0],
            "feed_dict": feeds,
            "int_symbol_dict": {program.s: values},
            "strategy": self.strategy,
            "num_micro_batches": batches,
            "run_level": self.draw.choice(["update", "update", "grad", "compute_only"]),
        }
        if breaks:
            breakers = [name for name in dir(self) if name.startswith("break_")]
            self.kind = self.draw.choice(breakers)
            getattr(self, self.kind)()

    def _batch(self) -> tuple[dict[Any, Any], int]:
        """The feeds of one micro-batch, and its length."""
        program, s = self.program, self.draw.randint(1, 12)
        lengths, groups = STRATEGIES[program.made[self.strategy]](s)
        batch = 1 if program.packing else self.draw.choice([1, 1, 2])
        rows = [n * batch for n in lengths]
        feeds: dict[Any, Any] = {}
        dtype = getattr(torch, program.dtype)
        feeds[program.x] = self._shards(
            [torch.from_numpy(self.numbers.standard_normal((n, WIDTH))).to(dtype) for n in rows]
        )
        feeds[program.ids] = self._shards([self.numbers.integers(0, IDS, n) for n in rows])
        labels = [np.where(self.numbers.random(n) < 0.2, -100, self.numbers.integers(0, IDS, n)) for n in rows]
        feeds[program.labels] = self._shards(labels)
        if program.cu is not None:
            total = {group: sum(n for n, g in zip(lengths, groups, strict=True) if g == group) for group in groups}
            ends = {group: [0, self.draw.randint(0, n), n] for group, n in total.items()}
            feeds[program.cu] = self._shards([np.array(ends[group], np.int32) for group in groups])
        return feeds, s

    def _shards(self, arrays: list[Any]) -> Any:
        return hetu.Shards(arrays) if len(arrays) > 1 else arrays[0]

    def patches(self, stack: ExitStack) -> None:
        """Makes the user's code, or torch's, raise while the run lasts."""
        if self.raising is not None:
            self.raising(stack)

    # What may be wrong

    def _feed(self) -> tuple[Any, Any]:
        feeds = self.arguments["feed_dict"]
        key = self.draw.choice(list(feeds))
        return feeds, key

    def _hostile(self) -> Any:
        return HOSTILE[self.draw.choice(list(HOSTILE))]()

    def break_a_feed(self) -> None:
        feeds, key = self._feed()
        feeds[key] = self._hostile()

    def break_a_shard(self) -> None:
        feeds, key = self._feed()
        feeds[key] = hetu.Shards([self._hostile() for _ in range(self.draw.randint(1, 3))])

    def break_missing_feed(self) -> None:
        feeds, key = self._feed()
        del feeds[key]

    def break_key(self) -> None:
        feeds, _ = self._feed()
        key = self._hostile()
        if getattr(key, "__hash__", None) is not None:
            try:
                feeds[key] = 1
            except Exception:
                feeds["x"] = 1

    def break_shape(self) -> None:
        feeds, key = self._feed()
        change = self.draw.choice([lambda a: a[:-1], lambda a: a[None], lambda a: a.reshape(-1), lambda a: a[..., :0]])
        feeds[key] = _mapped(feeds[key], change)

    def break_dtype(self) -> None:
        feeds, key = self._feed()
        name = self.draw.choice(["float16", "float64", "int8", "int64", "bool", "complex64", "uint8"])
        feeds[key] = _mapped(feeds[key], lambda a: np.asarray(a.float() if hasattr(a, "float") else a).astype(name))

    def break_ids(self) -> None:
        wrong = self.draw.choice([-1, IDS, 2**31, 2**62, -(2**63), -101])
        key = self.draw.choice([self.program.ids, self.program.labels])

        def change(array: Any) -> Any:
            array = np.array(array)
            if array.size:
                array.flat[self.draw.randrange(array.size)] = wrong
            return array

        self.arguments["feed_dict"][key] = _mapped(self.arguments["feed_dict"][key], change)

    def break_documents(self) -> None:
        if self.program.cu is None:
            return self.break_ids()
        change = self.draw.choice([lambda a: a[::-1], lambda a: a + 1, lambda a: a * 0, lambda a: -a, lambda a: a[:1]])
        feeds = self.arguments["feed_dict"]
        feeds[self.program.cu] = _mapped(feeds[self.program.cu], change)
        return None

    def break_whole_rows(self) -> None:
        feeds, key = self._feed()
        value = feeds[key]
        one = value[0] if isinstance(value, list) else value
        feeds[key] = one[0] if isinstance(one, hetu.Shards) else hetu.Shards([one, one])

    def break_symbol(self) -> None:
        choices = [self._hostile(), -1, 0, 65, 2**40, 2**70, True, 3.0, None]
        self.arguments["int_symbol_dict"][self.program.s] = self.draw.choice(choices)

    def break_missing_symbol(self) -> None:
        self.arguments["int_symbol_dict"] = self.draw.choice(
            [{}, None, {hetu.IntSymbol("s"): 3}, {self.program.rows: 3}]
        )

    def break_contradiction(self) -> None:
        self.arguments["int_symbol_dict"][self.program.rows] = self.draw.choice([0, 1, 63])

    def break_strategy(self) -> None:
        self.arguments["strategy"] = self.draw.choice([-1, 7, 2**70, "ring", True, 0.0, [0], self._hostile()])

    def break_another_strategy(self) -> None:
        self.arguments["strategy"] = self.draw.choice(["auto", None, *range(len(self.program.made))])

    def break_fetches(self) -> None:
        tensor = self.program.fetches["loss"]
        choices = [None, [], [None], [[tensor]], "loss", {tensor}, [tensor, 3], self._hostile(), (t for t in [tensor])]
        self.arguments["fetches"] = self.draw.choice(choices)

    def break_level(self) -> None:
        self.arguments["run_level"] = self.draw.choice(["updates", "", None, 3, self._hostile()])

    def break_batches(self) -> None:
        self.arguments["num_micro_batches"] = self.draw.choice([0, -1, 3, 2**63, "2", None, True, self._hostile()])

    def break_device(self) -> None:
        self.arguments["device"] = self.draw.choice(["cuda:7", "gpu", "meta", 3, self._hostile()])

    def break_dict(self) -> None:
        name = self.draw.choice(["feed_dict", "int_symbol_dict"])
        self.arguments[name] = self.draw.choice([list(self.arguments[name].items()), self._hostile()])

    def break_schedule(self) -> None:
        self.raising = lambda stack: stack.enter_context(mock.patch.object(Schedule, "raises", True))

    def break_init(self) -> None:
        self.raising = lambda stack: stack.enter_context(mock.patch.object(Init, "raises", True))

    def break_optimizer(self) -> None:
        """A step that raises when it has changed a part of the parameters."""
        kind = self.draw.choice([torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])

        def step(optimizer: Any, *_: Any) -> None:
            parameters = optimizer.param_groups[0]["params"]
            with torch.no_grad():
                parameters[0].add_(1.0)
                optimizer.state[parameters[0]]["extra"] = torch.ones(())
            raise BrokenError("optimizer")

        self.raising = lambda stack: stack.enter_context(mock.patch.object(kind, "step", step))

    def break_an_op(self) -> None:
        """Something that torch computes raises, once or from the n-th call on."""
        name = self.draw.choice(["matmul", "tanh", "softmax", "log_softmax", "where", "cat", "clone", "stack"])
        real, left = getattr(torch, name), [self.draw.randint(0, 4)]

        def fails(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0 and getattr(torch, name) is fails:  # what is lowered meanwhile keeps the function for good
                raise BrokenError(name)
            return real(*args, **kwargs)

        self.raising = lambda stack: stack.enter_context(mock.patch.object(torch, name, fails))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A feed with all its arrays changed, whatever holds them."""
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, hetu.Shards):
        return hetu.Shards([_mapped(item, change) for item in value])
    return change(value)


def requests(seed: int, count: int) -> Iterator[tuple[int, bool]]:
    """Seeds of requests, and whether each is broken."""
    draw = random.Random(seed)
    for _ in range(count):
        yield draw.randrange(2**40), draw.random() < 0.6
