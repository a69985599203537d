"""A training step of the example's model on one GPU, in bfloat16, against the same model under ``torch.compile``.

Each peer has a process of its own, in which it is compiled while the others are too; then they take turns on the GPU,
some steps at a time, one untimed step first. So peaks of memory are each peer's own. A step is feeds, forward,
backward, clipping and AdamW; the host's time is what passes until the step's call returns. All start from the same
parameters and take the same packs; a peer whose first loss is over 1 % from hetu's is left out.

    python benchmarks/step_gpu.py [--models small large] [--peers ...] [--turns 4] [--steps 3] [--budget 150]
        [--out DIR]

To try it out without a GPU: ``--tiny``.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import gettempdir
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import numpy as np
import torch
from corpus import cut, make_packs, read_files
from llama import IGNORED, Config, build, flat
from tables import ROOT, Row, keep, print_table
from timing import first_line
from torch.nn import functional
from torch_llama import Llama, rotate

import hetu
import hetu.functional

Pack = list[np.ndarray]
Step = Callable[[Pack], torch.Tensor]
RATE, NORM, MOST_APART, PACKS = 1e-3, 1.0, 0.01, 8


@dataclass(frozen=True)
class Task:
    """What is trained, on how many tokens per step."""

    config: Config
    tokens: int
    longest: int = 8192


MODELS = {
    "small": Task(Config(layers=4, width=1024, heads=16, kv_heads=4, head_dim=64, hidden=2816), 32_768),
    "large": Task(Config(layers=16, width=2048, heads=16, kv_heads=4, head_dim=128, hidden=5632), 16_384),
    "tiny": Task(Config(layers=2, width=64, heads=2, kv_heads=1, head_dim=32, hidden=96), 256, 64),
}
"""Of 46 and 723 million parameters, and one to try the script out."""


class Packed(torch.nn.Module):
    """The model of ``torch_llama.py`` with one call of attention for all documents of a pack."""

    def __init__(self, config: Config, is_flash: bool) -> None:
        super().__init__()
        self.config, self.model, self.is_flash = config, Llama(config), is_flash

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, cu: torch.Tensor, longest: int, position: torch.Tensor
    ) -> torch.Tensor:
        model, heads, kv_heads = self.model, self.config.heads, self.config.kv_heads
        angle = torch.outer(position.float(), model.rates).unsqueeze(1)
        angles = angle.cos(), angle.sin()
        x = model.embedding(tokens)
        for block in model.blocks:
            qkv = block.qkv(block.norm1(x)).unflatten(-1, (-1, self.config.head_dim))
            q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
            q, k = rotate(q, *angles).to(v.dtype), rotate(k, *angles).to(v.dtype)
            if self.is_flash:
                out = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, True, False)[0]
            else:
                out = hetu.functional.attn_varlen(q, k, v, cu, cu, is_causal=True)
            x = x + block.out(out.flatten(1))
            gate, up = block.gate_up(block.norm2(x)).chunk(2, -1)
            x = x + block.down(functional.silu(gate) * up)
        return functional.cross_entropy(model.head(model.norm(x)).float(), labels, ignore_index=IGNORED)


def by_hetu(task: Task, packs: list[Pack], device: str, compiles: bool) -> Step:
    """Hetu's step. It is lowered, and compiled, for all lengths at once: on few tokens."""
    hetu.manual_seed(0)
    model = build(task.config, "bfloat16", device=device)
    train = hetu.optim.AdamW(lr=RATE, max_grad_norm=NORM).minimize(model.loss)

    def step(pack: Pack, run_level: str = "update") -> torch.Tensor:
        feeds, symbols = model.feeds(0, pack)
        with hetu.config(compile=compiles):
            loss: torch.Tensor = model.graph.run(train, feeds, int_symbol_dict=symbols, strategy=0, run_level=run_level)
        return loss

    step([packs[0][-1][:64]], "grad")
    return step


def by_torch(task: Task, packs: list[Pack], device: str, is_flash: bool) -> Step:
    """The same by ``torch.compile``, with FlashAttention-2 or ``hetu.functional``."""
    hetu.manual_seed(0)
    packed = Packed(task.config, is_flash)
    packed.model.take(build(task.config, device="cpu").graph.state_dict()["parameters"])
    packed.to(device)
    model = torch.compile(packed, dynamic=True)
    optimizer = torch.optim.AdamW(packed.parameters(), lr=RATE)

    def gradients(pack: Pack) -> torch.Tensor:
        kept = [document for document in pack if len(document)]
        lengths = [len(document) for document in kept]
        cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
        tokens = torch.from_numpy(np.concatenate(kept).astype(np.int64)).to(device)
        labels = torch.from_numpy(flat(pack)[1]).to(device)
        position = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss: torch.Tensor = model(tokens, labels, cu.to(device) if is_flash else cu, max(lengths), position)
        loss.backward()
        return loss.detach()

    def step(pack: Pack) -> torch.Tensor:
        loss = gradients(pack)
        torch.nn.utils.clip_grad_norm_(packed.parameters(), NORM)
        optimizer.step()
        return loss

    gradients(packs[0])
    return step


MAKERS: dict[str, Callable[[Task, list[Pack], str], Step]] = {
    "hetu": lambda *given: by_hetu(*given, compiles=False),
    "hetu compiled": lambda *given: by_hetu(*given, compiles=True),
    "torch.compile, FlashAttention-2": lambda *given: by_torch(*given, is_flash=True),
    "torch.compile, hetu.functional": lambda *given: by_torch(*given, is_flash=False),
}


# One peer, in its own process


@contextmanager
def alone(name: str) -> Iterator[None]:
    """What only one of the processes does at a time."""
    with open(name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def choose_kernels_alone(lock: str) -> None:
    """Inductor times kernels to choose among them: not while another process does."""
    try:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        plain = CachingAutotuner.benchmark_all_configs
    except (ImportError, AttributeError):  # another release; it measures beside others then
        return

    def benchmark_all_configs(self: Any, *args: Any, **kwargs: Any) -> Any:
        with alone(lock):
            return plain(self, *args, **kwargs)

    CachingAutotuner.benchmark_all_configs = benchmark_all_configs


def serve(connection: Connection, model: str, peer: str, device: str, lock: str) -> None:
    """Makes a peer's step, says that it is there, and does what it is told until it hears None."""
    try:
        torch.set_num_threads(2)
        choose_kernels_alone(lock)
        task, begin = MODELS[model], perf_counter()
        packs = make_packs(cut(read_files(), longest=task.longest), task.tokens, PACKS)
        step = MAKERS[peer](task, packs, device)
        settle(device)
        connection.send(perf_counter() - begin)
        while (order := connection.recv()) is not None:
            first, count = order
            connection.send(profiled(step, packs[first], device) if not count else turn(step, packs, *order, device))
    except Exception as failure:
        connection.send(f"{type(failure).__name__}: {first_line(failure)}")


def settle(device: str) -> None:
    """Waits for the device, and leaves it the memory that is not used."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def turn(step: Step, packs: list[Pack], first: int, count: int, device: str) -> dict[str, Any]:
    """Steps from number ``first`` on, one untimed and ``count`` timed: times in ms, the peak in GB, losses."""
    is_cuda = device == "cuda"
    losses = [float(step(packs[first % PACKS]))]
    found: dict[str, Any] = {"ms": [], "host ms": []}
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for number in range(first + 1, first + 1 + count):
        begin = perf_counter()
        loss = step(packs[number % PACKS])
        found["host ms"].append((perf_counter() - begin) * 1e3)
        if is_cuda:
            torch.cuda.synchronize()
        found["ms"].append((perf_counter() - begin) * 1e3)
        losses.append(float(loss))
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else 0.0
    settle(device)
    return {**found, "GB": [peak], "losses": losses}


KINDS = {
    "attention": r"^(forward|backward|row_dot)|flash|fmha|attn",
    "products": r"gemm|nvjet|cutlass|xmma|splitK|aten::(mm|addmm|bmm|linear)$",
    "compiled by Inductor": r"^triton_|CompiledFxGraph",
    "optimiser": r"multi_tensor|[Aa]dam",
    "copies": r"copy|Memcpy|Memset|CatArray|Fill|fill",
    "norms and reductions": r"norm|[Rr]educe|[Ss]oft[Mm]ax|nll",
    "elementwise": r"elementwise|Functor",
}
"""Kinds of kernels, as regular expressions that their names fit; the first one counts."""


def profiled(step: Step, pack: Pack, device: str) -> dict[str, Any]:
    """The kernels of a step: how many of each kind, their ms, and those that take longest; on a CPU torch's ops."""
    from torch.profiler import ProfilerActivity, profile

    step(pack)
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as found:
        step(pack)
        if device == "cuda":
            torch.cuda.synchronize()
    settle(device)
    launches, times, kernels = Counter[str](), Counter[str](), []
    for event in found.key_averages():
        ms = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e3
        if ms:
            kind = kind_of(event.key)
            launches[kind] += event.count
            times[kind] += ms
            kernels.append((ms, event.count, event.key[:120]))
    return {"launches": launches, "kernel ms": times, "longest": sorted(kernels, reverse=True)[:25]}


def kind_of(kernel: str) -> str:
    """The kind of a kernel.

    Example:
        >>> kind_of("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>")
        'elementwise'
    """
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


# All of them, in turns


@dataclass
class Peer:
    """A peer's process and what it has told."""

    model: str
    name: str
    process: Any
    connection: Connection
    told: dict[str, list[float]] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, model: str, name: str, device: str, lock: str) -> Peer:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, model, name, device, lock), daemon=True)
        process.start()
        there.close()
        return cls(model, name, process, here)

    def ask(self, first: int, count: int, until: float) -> Any:
        """What it tells of steps; raises RuntimeError if it fails or is late."""
        self.connection.send((first, count))
        if not self.connection.poll(max(0.0, until - perf_counter())):
            raise RuntimeError("it was late")
        if isinstance(answer := self.connection.recv(), str):
            raise RuntimeError(answer)
        return answer

    def take(self, first: int, count: int, until: float) -> None:
        """Lets it make steps."""
        for name, values in self.ask(first, count, until).items():
            self.told.setdefault(name, []).extend(values)

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


def ready_ones(peers: list[Peer], until: float) -> list[Peer]:
    """Those that are made in time; says of each how long it took, or why it isn't there."""
    left, ready = {peer.connection: peer for peer in peers}, []
    while left and (found := wait(list(left), max(0.0, until - perf_counter()))):
        for connection in found:
            peer = left.pop(connection)  # type: ignore[call-overload]
            answer = told_by(peer)
            is_ready = isinstance(answer, float)
            print(f"{peer.model}, {peer.name}:", f"ready after {answer:.0f} s" if is_ready else answer, flush=True)
            ready += [peer] * is_ready
    for peer in left.values():
        print(f"{peer.model}, {peer.name}: left out, not ready in time", flush=True)
    for peer in peers:
        if peer not in ready:
            peer.end()
    return [peer for peer in peers if peer in ready]


def told_by(peer: Peer) -> float | str:
    """What it says of itself at first."""
    try:
        answer: float | str = peer.connection.recv()
    except EOFError:
        return "left out, its process has ended"
    return answer if isinstance(answer, float) else f"left out, {answer}"


def measure(peers: list[Peer], turns: int, steps: int, until: float) -> list[Peer]:
    """Turns of all peers of a model; gives those that went through with the right losses."""
    for number in range(turns):
        for peer in list(peers):
            if number and perf_counter() > until:
                break
            try:
                peer.take(number * (steps + 1), steps, until + 20)
            except (RuntimeError, EOFError) as failure:
                print(f"{peer.model}, {peer.name}: left out, {failure}", flush=True)
                peers.remove(peer)
    right = peers[0].told["losses"][0] if peers else 0.0
    for peer in list(peers):
        if not abs(peer.told["losses"][0] - right) <= MOST_APART * abs(right):
            print(f"{peer.model}, {peer.name}: left out, its loss is {peer.told['losses'][0]:.4f}, not {right:.4f}")
            peers.remove(peer)
    for peer in peers:
        if perf_counter() < until + 5:
            try:
                peer.kernels = peer.ask(0, 0, until + 20)
            except (RuntimeError, EOFError) as failure:
                print(f"{peer.model}, {peer.name}: not profiled, {failure}", flush=True)
    return peers


RATIOS = (
    ("hetu compiled", "torch.compile, hetu.functional", 0.95),
    ("hetu compiled", "torch.compile, FlashAttention-2", None),
    ("hetu", "torch.compile, FlashAttention-2", 1.0),
    ("hetu", "torch.compile, hetu.functional", None),
)
"""Whose time over whose, and what it may be at most."""


def rows_of(model: str, peers: Sequence[Peer]) -> list[Row]:
    """What was measured of a model."""
    rows, by_name = [], {peer.name: peer.told for peer in peers}
    for name, told in by_name.items():
        rows.append(Row.of(f"{model}: step, {name}", "ms", told["ms"]))
    for ours, theirs, limit in RATIOS:
        if ours in by_name and theirs in by_name:
            ratios = [a / b for a, b in zip(by_name[ours]["ms"], by_name[theirs]["ms"], strict=False)]
            rows.append(Row.of(f"{model}: {ours} over {theirs}", "times", ratios, limit))
    for name, told in by_name.items():
        shares = [host / ms for host, ms in zip(told["host ms"], told["ms"], strict=True)]
        rows.append(Row.of(f"{model}: host, {name}", "ms", told["host ms"]))
        rows.append(Row.of(f"{model}: host over step, {name}", "times", shares, 0.5 if "hetu" in name[:4] else None))
    for peer in peers:
        rows.append(Row.of(f"{model}: peak memory, {peer.name}", "GB", [max(peer.told["GB"])]))
        for kind, count in peer.kernels.get("launches", {}).items():
            rows.append(Row.of(f"{model}: launches, {peer.name}: {kind}", "", [count]))
            rows.append(Row.of(f"{model}: kernels' time, {peer.name}: {kind}", "ms", [peer.kernels["kernel ms"][kind]]))
    return rows


def print_kernels(peers: Sequence[Peer]) -> None:
    """What takes longest of each."""
    for peer in peers:
        print(f"\n{peer.model}, {peer.name}: losses {[round(x, 4) for x in peer.told['losses'][:4]]}")
        for ms, count, name in peer.kernels.get("longest", ()):
            print(f"  {ms:8.2f} ms {count:5d}  {name}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["small", "large"])
    parser.add_argument("--peers", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds that all of it may take")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    parser.add_argument("--out", type=Path, default=out, help="folder of the results; $OUT if it is set")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.models = ["tiny"]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments, begin = parse(argv), perf_counter()
    device = "cpu" if arguments.tiny else "cuda"
    lock = str(Path(gettempdir()) / f"hetu_step_gpu_{os.getpid()}.lock")
    started = [
        Peer.start(model, name, device, lock)
        for model in reversed(arguments.models)  # large ones take longest to compile
        for name in arguments.peers
    ]
    rows: list[Row] = []
    try:
        ready = ready_ones(started, begin + arguments.budget * 0.75)
        for place, model in enumerate(arguments.models, 1):
            until = perf_counter() + (begin + arguments.budget - perf_counter()) / (len(arguments.models) - place + 1)
            peers = measure([p for p in ready if p.model == model], arguments.turns, arguments.steps, until - 5)
            print_kernels(peers)
            rows += rows_of(model, peers)
            for peer in [p for p in ready if p.model == model]:
                peer.end()
    finally:
        for peer in started:
            peer.end()
        Path(lock).unlink(missing_ok=True)
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    print(f"\n{gpu or 'CPU'}, torch {torch.__version__}, {perf_counter() - begin:.0f} s in all\n")
    print_table(rows)
    keep(f"step_{gpu.split()[-1].lower() if gpu else 'tiny'}", rows, in_docs=False, folder=arguments.out, device=gpu)


if __name__ == "__main__":
    main()
