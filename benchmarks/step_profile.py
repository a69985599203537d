"""What a step's time is made of: its kernels by kind, where its host waits for the device, and what takes the host."""

from __future__ import annotations

import cProfile
import io
import pstats
import re
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from step_peers import Pack, Step


def settle(device: str) -> None:
    """Waits for the device, and leaves it the memory that is not used."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


KINDS = {
    "attention": r"^(forward|backward|row_dot|gather_kernel|key_kernel|query_kernel)|flash|fmha|attn",
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
    launches, times, kernels = Counter[str](), Counter[str](), list[tuple[float, int, str]]()
    for event in found.key_averages():
        ms = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e3
        if ms:
            kind = kind_of(event.key)
            launches[kind] += event.count
            times[kind] += ms
            kernels.append((ms, event.count, event.key[:120]))
    told = {"launches": launches, "kernel ms": times, "longest": sorted(kernels, reverse=True)[:25]}
    return {**told, "waits": waits_of(step, pack, device), "host": host_of(step, pack)}


def waits_of(step: Step, pack: Pack, device: str) -> list[str]:
    """The lines at which a step's host waits for the device, the innermost three of each."""
    found = Counter[str]()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack()[:-1] if "warnings" not in frame.filename][-3:]
            found[" > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        step(pack)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    settle(device)
    return [f"{count} times {line}" for line, count in found.most_common(12)]


def host_of(step: Step, pack: Pack) -> list[str]:
    """The functions that take the host longest in two steps under Python's profiler, by their own time."""
    profiler = cProfile.Profile()
    profiler.enable()
    step(pack)
    step(pack)
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(18)
    return [line.strip() for line in text.getvalue().splitlines() if line.strip()][3:]


def kind_of(kernel: str) -> str:
    """The kind of a kernel.

    Example:
        >>> kind_of("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>")
        'elementwise'
    """
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")
