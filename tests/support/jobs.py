"""What a rank is told to do, and one process without others too: both build the same graphs and run them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from llama import IGNORED, STRATEGIES, Model
from support.attention_cases import Case, cu_seqlens
from support.plans import holding_back
from support.states import is_same

import hetu
from hetu.backends.comm import current_world, reduce
from hetu.backends.lower import index_flags
from hetu.parallel import Rate
from hetu.parallel.choice import setting
from hetu.planning import indices

Own = list[torch.Tensor]
"""The values of the pipelines that run in this process."""


def own(value: Any) -> Own:
    """What a run gave, as a list, where another process can take it."""
    values = list(value) if isinstance(value, hetu.Shards) else [] if value is None else [value]
    return [x.cpu() for x in values]


def in_turn(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Several jobs as one."""
    given = []
    for call in calls:
        try:
            given.append(call())
        except BaseException as error:
            error.add_note(f"in {call}")
            raise
    return given


# Attention


def attention_on_hosts(case: Case, backend: str, own_shard: bool = False) -> Any:
    """The same with ranks on two pretended hosts, by plans that are proven; pipeline r is on that of ``r // 2``."""
    with hetu.config(hosts=(0, 0, 1, 1), verify_plans=True):
        return attention(case, backend, own_shard=own_shard)


def attention(
    case: Case, backend: str, device: str = "cpu", with_grads: bool = True, own_shard: bool = False, repeats: int = 1
) -> Any:
    """Runs parallel_attn and its gradients under a strategy.

    Args:
        case: The strategy and its data.
        backend: ``"torch"`` or ``"triton"``.
        device: Where.
        with_grads: Whether gradients are fetched too.
        own_shard: Whether each rank feeds its own shard alone, and ranks without a pipeline nothing.
        repeats: How many runs follow each other before any of their values is looked at.

    Returns:
        For each fetched tensor of each run the values of the pipelines that run here.
    """
    generator = torch.Generator().manual_seed(case.seed)
    (num_q, num_kv), members = case.heads, case.members
    width = (num_q + 2 * num_kv) * case.head_dim
    lens = [hetu.IntSymbol(f"n{r}") for r in range(len(case.lens))]
    with hetu.graph("define_and_run", device=device) as g:
        qkv = hetu.placeholder(case.dtype, [hetu.IntSymbol("rows"), width], name="qkv")
        shape = [hetu.IntSymbol("pieces"), hetu.IntSymbol("b")][case.packing == "1d" :]
        cu = hetu.placeholder(hetu.int32, shape, name="cu") if case.packing else None
        sinks = hetu.constant(np.linspace(-1, 1, num_q), case.dtype) if case.has_sinks else None
        fetches = hetu.parallel_attn(
            qkv, case.head_dim, num_q // num_kv, [lens], [case.groups], bool(case.packing), cu,
            p_dropout=case.p, is_causal=case.is_causal, return_softmax=case.return_softmax,
            split=case.split, method=case.method, mask=case.mask, softcap=case.softcap, sinks=sinks,
        )  # fmt: skip
        d_out = hetu.placeholder(case.dtype, fetches[0].shape, name="d_out")
        if with_grads:
            fetches += hetu.gradients(fetches[0], [qkv] if sinks is None else [qkv, sinks], d_out)
    symbols = dict(zip(lens, case.lens, strict=True))
    tables = [cu_seqlens(case, m) for m in members.values()] if case.packing else None
    layout = g.layout(0, int_symbol_dict=symbols, cu_seqlens=tables, batch=case.batch)

    def scattered(columns: int) -> hetu.Shards:
        totals = [sum(case.documents(m)) for m in members.values()]
        arrays = [torch.randn(n, columns, generator=generator).to(case.dtype) for n in totals]
        return hetu.Shards(layout.scatter(arrays[0] if len(arrays) == 1 else arrays))

    feeds: dict[Any, Any] = {qkv: scattered(width)}
    if with_grads:
        feeds[d_out] = scattered(num_q * case.head_dim)
    if tables is not None:
        order = list(members)
        feeds[cu] = hetu.Shards([tables[order.index(group)] for group in case.groups])
    if own_shard:
        rank = hetu.init_distributed().rank
        feeds = {key: value[rank] for key, value in feeds.items()} if rank < len(case.lens) else {}
    hetu.manual_seed(case.seed)
    with hetu.config(backend=backend):
        runs = [g.run(fetches, feed_dict=feeds, int_symbol_dict=symbols) for _ in range(repeats)]
    return [own(x) for run in runs for x in run]


def holding(*arguments: Any, **options: Any) -> Any:
    """The same, with backwards that hold back own rows wherever they may."""
    with holding_back(True):
        return attention(*arguments, **options)


# Training


@dataclass(frozen=True)
class Step:
    """One run of a training script: its strategy, and the documents of each micro-batch."""

    strategy: int
    packs: Sequence[list[np.ndarray]]
    run_level: str = "update"


@dataclass(frozen=True)
class Trained:
    """What a rank has at the end."""

    losses: list[torch.Tensor]
    norms: list[torch.Tensor]
    state: dict[str, Any]


def float64_model(p_dropout: float = 0.1, device: str = "cpu") -> Model:
    """One attention with dropout between an embedding and a head."""
    width, head_dim, rows = 16, 8, hetu.IntSymbol("rows")

    def weight(name: str, rows: int, columns: int) -> hetu.Tensor:
        init = functools.partial(torch.nn.init.normal_, std=columns**-0.5)
        return hetu.parameter(init, [rows, columns], hetu.float64, name=name)

    with hetu.graph("define_and_run", num_strategy=len(STRATEGIES), device=device) as g:
        tokens = hetu.placeholder(hetu.int64, [rows], name="tokens")
        labels = hetu.placeholder(hetu.int64, [rows], name="labels")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("documents") + 1], name="cu_seqlens")
        qkv = hetu.linear(hetu.embedding(tokens, weight("embedding", 256, width)), weight("qkv", 4 * head_dim, width))
        lengths, groups = [one.lengths for one in STRATEGIES], [one.groups for one in STRATEGIES]
        attended = hetu.parallel_attn(qkv, head_dim, 2, lengths, groups, True, cu, p_dropout=p_dropout, split="sym")[0]
        logits = hetu.linear(attended, weight("head", 256, width))
        loss = hetu.token_mean_loss(logits, labels, ignore_index=IGNORED)
    return Model(g, tokens, labels, cu, logits, loss)


def recomputed(build: Callable[[], Model]) -> Model:
    """A model of which the backward computes everything again, attention too."""
    with hetu.recompute(attention=True):
        return build()


def train(
    build: Callable[[], Model],
    steps: Sequence[Step],
    begin: Path | None = None,
    end: Path | None = None,
    bucket_bytes: int = reduce.BUCKET_BYTES,
    deterministic: bool = False,
) -> Trained:
    """Trains a model.

    Args:
        build: Makes it.
        steps: What it sees.
        begin: A checkpoint that all ranks start from.
        end: Where rank 0 saves one.
        bucket_bytes: What is reduced together.
        deterministic: Whether torch's kernels have to give the same bits every time; on CPUs they do anyway.
    """
    reduce.BUCKET_BYTES = bucket_bytes
    hetu.manual_seed(3)
    model = build()
    node = hetu.optim.AdamW(lr=1e-2, max_grad_norm=1.0).minimize(model.loss, name="train")
    if begin is not None:
        model.graph.load_state_dict(hetu.load(begin))
    losses, norms = [], []
    for step in steps:
        with hetu.config(deterministic=deterministic):
            loss, norm = train_step(model, [node, hetu.optim.grad_norm(node)], step)
        losses.append(loss.cpu())
        norms.append(norm.cpu().nan_to_num(-1.0))  # there is none where no gradient was computed
    if end is not None and hetu.init_distributed().rank == 0:
        hetu.save(model.graph, end)
    return Trained(losses, norms, _on_cpu(model.graph.state_dict()))


def _on_cpu(value: Any) -> Any:
    """A nest of dicts and lists with all tensors on the CPU."""
    match value:
        case torch.Tensor():
            return value.cpu()
        case dict():
            return {key: _on_cpu(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(_on_cpu, value))
    return value


def train_step(model: Model, fetches: Any, step: Step) -> Any:
    """One run, of one pack or of several micro-batches."""
    feeds, symbols = zip(*[model.feeds(step.strategy, pack) for pack in step.packs], strict=True)
    count = len(feeds)
    fed: Any = {key: [one[key] for one in feeds] for key in feeds[0]} if count > 1 else feeds[0]
    bound: Any = {key: [one[key] for one in symbols] for key in symbols[0]} if count > 1 else symbols[0]
    return model.graph.run(
        fetches,
        fed,
        int_symbol_dict=bound,
        strategy=step.strategy,
        num_micro_batches=count,
        run_level=step.run_level,
    )


# Sums


REDUCED = [
    *((dtype, op) for dtype in ("float64", "float32", "float16", "bfloat16") for op in ("sum", "mean")),
    *((dtype, "sum") for dtype in ("int32", "int64", "uint8")),
]
"""The dtypes and ops of sums over pipelines."""


def reduced(dtype: str, op: str, count: int, bucket_bytes: int = reduce.BUCKET_BYTES, device: str = "cpu") -> Any:
    """Reduces tensors of several shapes over ``count`` pipelines; then counts all of them by step_sum."""
    reduce.BUCKET_BYTES = bucket_bytes
    shapes = [(5,), (), (0, 3), (2, 7), (101,)]
    random = np.random.default_rng(count)
    values = [[(100 * random.standard_normal(shape)).astype(np.int64) for _ in range(count)] for shape in shapes]
    kind = hetu.as_dtype(dtype)
    with hetu.graph("define_and_run", device=device) as g:
        fed = [hetu.placeholder(hetu.int64, shape) for shape in shapes]
        # Thirds have to be rounded, so that sums in another order have other bits.
        cast = [hetu.cast(x, kind) / 3 if kind.is_floating else hetu.cast(x, kind) for x in fed]
        sums = [hetu.all_reduce(x, op) for x in cast]
        total = hetu.step_sum(fed[3])
    feeds = {x: hetu.Shards(rows) for x, rows in zip(fed, values, strict=True)}
    return [own(x) for x in g.run([*sums, total], feeds)]


# What else a script does


def gathered(lens: list[int], device: str = "cpu") -> Any:
    """hetu.gather_shards of an output, of what lies on the CPU, and of a loss that all ranks have."""
    with hetu.graph("define_and_run", device=device) as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="qkv")
        out, _, rng_state = hetu.parallel_attn(x, 8, 1, [lens], [[0] * len(lens)])
    shards = hetu.Shards([torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in lens])
    hetu.manual_seed(0)
    found = [hetu.gather_shards(value) for value in g.run([out, rng_state], {x: shards})]
    return [(value.device.type, value.cpu()) for values in found for value in values]


def by_strategy(own_shard: bool, parts: int = 2) -> list[Own]:
    """Runs under a strategy of so many pipelines, in groups of their own, of what needs attention and of what doesn't.

    Args:
        own_shard: Whether each rank feeds its own rows alone, and ranks without a pipeline nothing.
        parts: How many pipelines the strategy has.
    """
    groups = [7 - r for r in range(parts)]
    strategies = [hetu.Strategy([6], [0]), hetu.Strategy([3] * parts, groups, name="parts")]
    with hetu.graph("define_and_run", strategies=strategies, device="cpu") as g:
        x = hetu.placeholder(hetu.float64, [hetu.IntSymbol("rows"), 24], name="x")
        cu = hetu.placeholder(hetu.int32, [hetu.IntSymbol("documents") + 1], name="cu")
        out = hetu.parallel_attn(x, 8, 1, packing=True, cu_seqlens_q=cu)[0]
        total = hetu.all_reduce(hetu.sum(x))
    data = {group: torch.full((3, 24), 1.0 + group, dtype=torch.float64) for group in groups}
    lists = {group: np.array([0, group % 3, 3], np.int32) for group in groups}
    shards: Any = hetu.Shards(g.layout("parts", cu_seqlens=lists).scatter(data))
    if own_shard:
        rank = hetu.init_distributed().rank
        shards, lists = (shards[rank], lists) if rank < parts else (None, {})
    fed = {} if shards is None else {x: shards, cu: lists}
    alone = {} if shards is None else {x: shards}
    return [
        own(g.run(out, fed, strategy="parts")),
        own(g.run(total, alone, strategy="parts")),
        own(g.run(total, alone, strategy=1)),
    ]


def shared_by_pipelines(parts: int) -> str:
    """What a run says that is fed one array for the rows of all pipelines that run here."""
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([3] * parts, [0] * parts)], device="cpu") as g:
        x = hetu.placeholder(hetu.float64, [hetu.IntSymbol("rows"), 24], name="x")
        out = hetu.parallel_attn(x, 8, 1)[0]
    try:
        g.run(out, {x: torch.ones(6, 24, dtype=torch.float64)})
    except hetu.HetuError as error:
        return str(error)
    return ""


def whole_rows(kind: str, size: int, batch: int = 1) -> list[Any]:
    """What runs give, or say, where each rank of several is fed the same rows, and then where each has its own."""
    s, tokens = hetu.IntSymbol("s"), 3
    with hetu.graph("define_and_run", strategies=[hetu.Strategy([s] * size, [0] * size)], device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 24], name="x")
        scale = hetu.placeholder(hetu.float32, [24], name="scale")
        out = hetu.parallel_attn(x * scale, 8, 1)[0]
    whole = torch.randn(size * tokens * batch, 24, generator=torch.Generator().manual_seed(0))
    fed: dict[str, Any] = {
        "numpy": whole.numpy(),
        "equal rows": torch.ones_like(whole),
        "shards": hetu.Shards([whole] * size),
        "own rows": whole + current_world().rank,
    }
    feeds, symbols = {x: fed.get(kind, whole), scale: torch.ones(24)}, {s: tokens}
    given: list[Any] = []
    for _ in range(2):  # a refused run leaves nothing behind
        try:
            given.append(own(g.run(out, feeds, int_symbol_dict=symbols)))
        except hetu.HetuError as error:
            given.append(str(error))
    right = hetu.Shards(g.layout(0, int_symbol_dict=symbols, batch=batch).scatter(whole))
    return [*given, own(g.run(out, {**feeds, x: right}, int_symbol_dict=symbols))]


@contextmanager
def hidden_ids() -> Iterator[None]:
    """Ids in tensors on the CPU are hidden from the host, as if they lay on a device."""
    hidden = mock.patch.object(indices, "is_on_host", lambda value: not isinstance(value, torch.Tensor))
    with mock.patch.object(index_flags, "DEFERRED", {"cpu"}), hidden:
        yield


def unseen_ids(wrong: int, device: str, stage: int = 0) -> list[Any]:
    """What a rank's runs say, and what is left, where one rank has an id out of range that its device alone knows.

    Args:
        wrong: The rank that is fed one; none if there is no such rank.
        device: Where it runs; on a CPU ids are hidden from the host as if they lay on a device.
        stage: The ``zero_stage``.
    """
    with hidden_ids() if device == "cpu" else nullcontext():
        hetu.manual_seed(3)
        size = current_world().size
        with hetu.graph("define_and_run", strategies=[hetu.Strategy([2] * size, [0] * size)], device=device) as g:
            ids = hetu.placeholder("int64", [2], name="ids")
            rows = hetu.embedding(ids, hetu.parameter(torch.ones(5, 2), [5, 2], name="table"))
            train = hetu.optim.Adam(lr=0.1, zero_stage=stage).minimize(hetu.sum(rows * rows), name="train")
        good = torch.tensor([0, 4], device=device)
        bad = torch.tensor([7, 1], device=device) if current_world().rank == wrong else good
        g.run(train, {ids: good})
        before, said = g.state_dict(), list[str]()
        g.run(train, {ids: bad})
        for _ in range(2):  # one run is refused on all ranks, the next one isn't
            try:
                g.run(train, {ids: good}, run_level="compute_only")
                said.append("")
            except hetu.HetuError as error:
                said.append(str(error))
        is_kept = is_same(g.state_dict(), before)
        return [said, is_kept, own(g.run(train, {ids: good}))]


def chosen(strategy: str | int | None, count: int) -> Any:
    """Which strategy a run takes that may choose, what it gives, and what prepare and plan say of it."""
    s, rows = hetu.IntSymbol("s"), hetu.IntSymbol("rows")
    with hetu.graph("define_and_run", num_strategy=3, device="cpu") as g:
        x = hetu.placeholder(hetu.float64, [rows, 24], name="qkv")
        lengths = [[s], [s // 2, s - s // 2], [s // 5, 0, s - s // 5]]
        out = hetu.parallel_attn(x, 8, 1, lengths, [[0], [0, 0], [0, 0, 0]])[0]
    data, symbols = torch.randn(11, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64), {s: 11}
    feeds = {x: hetu.Shards(g.layout(count - 1, int_symbol_dict=symbols).scatter(data))}
    prepared = g.prepare(out, feeds, int_symbol_dict=symbols, strategy=strategy)
    plan = g.plan(prepared.strategy, int_symbol_dict=symbols)
    plan.verify()
    return prepared.strategy, plan.hash(), own(g.run(out, feeds, int_symbol_dict=symbols, strategy=strategy))


def hardware_of_ranks() -> tuple[float, str, int]:
    """What a rank has after each set other hardware, what it is told where one gives none, and what it then chooses."""
    rank = hetu.init_distributed().rank
    before = setting.chosen().hardware
    one = hetu.use_hardware(dataclasses.replace(before, link_bytes=1e3 if rank == 0 else 1e15, latency=1.0))
    try:
        hetu.use_hardware(one if rank == 0 else None)  # type: ignore[arg-type]
        said = ""
    except hetu.HetuError as error:
        said = str(error)
    found = setting.chosen().hardware.link_bytes
    setting.set_hardware(before)
    return one.link_bytes, said, int(found == one.link_bytes)


def calibrated(folder: Path) -> tuple[str, str, bool]:
    """What a rank is told where one names no path, and what it takes where all do; attention is not measured."""
    rates = [Rate(100, 1e9), Rate(100, 1e9, is_backward=True)]
    rank, before, said = current_world().rank, setting.chosen().hardware, ""
    with mock.patch("hetu.calibration._rates", return_value=(1e-4, rates)):
        try:
            hetu.calibrate(3 if rank else None)  # type: ignore[arg-type]
        except hetu.HetuError as error:
            said = error.what
        found = hetu.calibrate(folder / "hardware.json")
    is_taken = found == setting.chosen().hardware
    if rank == 0:  # which writes it
        is_taken = is_taken and found == hetu.Hardware.load(folder / "hardware.json")
    hetu.use_hardware(before)
    return said, found.to_json(), is_taken
