"""``hetu doctor``: what is installed, which kernels will run and why no faster ones, and a test of both ops."""

from __future__ import annotations

import platform
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import torch

import hetu
from hetu.backends.attention.family import AttendSignature
from hetu.backends.families import choose, default_backend
from hetu.cli.answer import Answer, Exit, steps, table
from hetu.config import BACKENDS, settings
from hetu.parallel.views.report import as_time

LIBRARIES = ("torch", "triton", "numpy", "sympy", "networkx", "safetensors", "matplotlib", "transformers")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_DIMS = (64, 128, 256)

LENGTHS = (37, 0, 1, 90)
"""Documents of the test: odd, empty, of one token, longer than a tile."""

TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Largest error that passes, relative to the largest number of what is compared."""


def add_options(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--no-test", action="store_true", help="leaves the test of both ops out")


def run(args: Namespace) -> Answer:
    """Looks, and tests."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    installed, kernels = _installed(), _kernels(device)
    data: dict[str, Any] = {"installed": installed, "gpus": _gpus(), "device": device.type, "kernels": kernels}
    names = [[name, value or "not installed"] for name, value in installed.items()]
    gpus = [[g["name"], g["capability"], f"{g['memory_bytes'] / 2**30:.0f} GiB"] for g in data["gpus"]]
    rows = [[k["dtype"], k["head_dims"], k["direction"], k["family"], k["why"] or "it is the fastest"] for k in kernels]
    shown = [table("installed", ("what", "version"), names, left=2)]
    shown.append(table("GPUs", ("name", "compute capability", "memory"), gpus)) if gpus else None
    columns = ("dtype", "head_dim", "direction", "kernels", "why no faster ones")
    shown.append(table(f"attention on {device.type}", columns, rows, left=5))
    if args.no_test:
        return Answer(data, shown)
    tests = [{"op": op, "quantity": name, **found} for op, name, found in _tests(device)]
    data["tests"], data["are_right"] = tests, all(item["is_right"] for item in tests)
    verdicts = [
        [t["op"], t["quantity"], "right" if t["is_right"] else "WRONG", f"{t['error']:.1e}", as_time(t["seconds"])]
        for t in tests
    ]
    titles = ("op", "what", "against float64", "error", "took")
    return Answer(
        data,
        [*shown, table("test of both ops", titles, verdicts, left=3)],
        Exit.DONE if data["are_right"] else Exit.FAILED,
    )


def _installed() -> dict[str, str | None]:
    """Versions, by name; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "hetu": hetu.__version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    distributed = torch.distributed.is_available()
    nccl = (
        ".".join(map(str, torch.cuda.nccl.version())) if distributed and torch.distributed.is_nccl_available() else None
    )
    gloo = "with torch" if distributed and torch.distributed.is_gloo_available() else None
    dot = shutil.which("dot")
    return {**found, "CUDA of torch": torch.version.cuda, "NCCL": nccl, "gloo": gloo, "graphviz (dot)": dot}


def _gpus() -> list[dict[str, Any]]:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in found
    ]


def _kernels(device: torch.device) -> list[dict[str, Any]]:
    """Which family runs what, and why none before it in the list; sizes of heads that fare alike share an entry."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for dtype, backward, head_dim in product(DTYPES, (False, True), HEAD_DIMS):
        family, why = _choice(AttendSignature(dtype, device, head_dim, 32, 8, is_backward=backward))
        name = str(dtype).removeprefix("torch.")
        found.setdefault((name, "backward" if backward else "forward", family, why), []).append(head_dim)
    keys = ("dtype", "direction", "family", "why")
    return [dict(zip(keys, key, strict=True)) | {"head_dims": ", ".join(map(str, n))} for key, n in found.items()]


def _choice(signature: AttendSignature) -> tuple[str, str]:
    """The family that runs calls, and why no faster one does."""
    wanted = default_backend(signature.device)
    chosen, best = choose(wanted, signature), choose(BACKENDS[0], signature)
    reasons = [f"{name}: {reason}" for name, reason in best.declined if name != chosen.family.name]
    if best.family is not chosen.family:
        said = f"hetu.config or HETU_BACKEND asks for {wanted}" if settings().backend else "for GPUs"
        reasons.append(f"{best.family.name}: {said}")
    return chosen.family.name, "; ".join(reasons)


def _tests(device: torch.device) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Runs each op, forward and backward, beside its oracle."""
    for op, pipelines in steps([("attn_varlen", 1), ("parallel_attn", 4)], "testing both ops"):
        begin = time.perf_counter()
        got, wanted, tolerance = _both(device, pipelines if op == "parallel_attn" else 0)
        took = time.perf_counter() - begin
        for name, mine, right in zip(("output", "gradient"), got, wanted, strict=True):
            error = float((mine.double() - right).abs().max() / right.abs().max())
            yield op, name, {"error": error, "is_right": error <= tolerance, "seconds": took}


def _both(device: torch.device, pipelines: int) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """Output and gradient of ``qkv``, by an op of a graph and by the oracle; 0 pipelines are ``attn_varlen``."""
    num_q, num_kv, head_dim, tokens = 4, 2, 64, sum(LENGTHS)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, (num_q + 2 * num_kv) * head_dim, generator=draw).to(device, dtype)
    weight = torch.randn(tokens, num_q * head_dim, generator=draw).to(device, dtype)
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    right = qkv.double().requires_grad_()
    q, k, v = right.unflatten(1, (-1, head_dim)).split([num_q, num_kv, num_kv], 1)
    out, _, _ = hetu.testing.attention(q, k, v, cu_seqlens.tolist(), mask=hetu.Mask.causal())
    out = out.flatten(1)
    (out * weight.double()).sum().backward()
    assert right.grad is not None
    mine = _by_graph(qkv, weight, cu_seqlens, max(pipelines, 1), pipelines > 0)
    return mine, [out.detach(), right.grad], TOLERANCES[dtype]


def _by_graph(
    qkv: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, pipelines: int, is_parallel: bool
) -> list[torch.Tensor]:
    """What a graph gives: the output, and the gradient of ``sum(output * weight)`` by ``qkv``."""
    tokens, dtype, lengths = len(qkv), hetu.as_dtype(str(qkv.dtype).removeprefix("torch.")), [5, 40, 0]
    lengths = [*lengths[: pipelines - 1], tokens - sum(lengths[: pipelines - 1])]
    rows = hetu.IntSymbol("rows")
    with hetu.Graph("define_and_run", device=str(qkv.device)) as g:
        x = hetu.placeholder(dtype, [rows, qkv.shape[1]], name="qkv")
        w = hetu.placeholder(dtype, [rows, weight.shape[1]], name="weight")
        cu = hetu.placeholder(hetu.int32, [len(cu_seqlens)], name="cu_seqlens")
        longest = hetu.IntSymbol("longest")
        if is_parallel:
            given: dict[str, Any] = {"packing": True, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "split": "sym"}
            out = hetu.parallel_attn(x, 64, 2, [lengths], [[0] * pipelines], is_causal=True, **given)[0]
        else:
            q, k, v = hetu.split(x, [256, 128, 128], dim=1)
            out = hetu.attn_varlen(q, k, v, 64, cu, cu, longest, longest, is_causal=True)[0]
        loss = hetu.sum(out * w)
        (grad,) = hetu.gradients(loss, [x])
    layout = hetu.Layout.build(lengths, [0] * pipelines, split="sym", cu_seqlens=cu_seqlens.numpy())
    if not is_parallel:
        return list(g.run([out, grad], {x: qkv, w: weight, cu: cu_seqlens}))
    feeds = {x: hetu.Shards(layout.scatter(qkv)), w: hetu.Shards(layout.scatter(weight)), cu: cu_seqlens}
    return [layout.gather(list(shards)) for shards in g.run([out, grad], feeds)]
