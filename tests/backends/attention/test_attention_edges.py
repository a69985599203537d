"""Attention where tiles end: what lies beside a document, a head or a view is neither read into a result nor written.

Kernels work in tiles that are larger than documents, heads and groups. Everything around them holds NaN here.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from support.devices import CUDA, DEVICES, ON_CUDA
from support.packs import (
    GRADIENT_TOLERANCE,
    GRADIENTS,
    GROUPS,
    OPERANDS,
    Pack,
    Tensors,
    assert_right,
    by_kernels,
    heads_of,
)
from support.table_checks import check_backward
from support.tables_by_definition import buffers, dense, random_case, rows_of, run

from hetu.backends.attention.contract import Dropout, dropout_key

# Triton's interpreter computes by numpy, which tells of every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DROPOUT = Dropout(0.3, dropout_key(5, 1, 0))


def poisoned_data(pack: Pack, data: Tensors, documents: list[int], value: float) -> Tensors:
    """The same with another value in all that these documents hold, and in the rows of nobody."""
    data = {name: x.clone() for name, x in data.items()}
    for name in OPERANDS:
        for document in documents:
            data[name][pack.rows(name, document)] = value
        data[name][len(data[name]) - pack.tail :] = value
    data["dlse"][documents] = value
    return data


def check_neighbours(
    pack: Pack, device: str, backend: str = "triton", value: float = torch.nan, turns: tuple[int, ...] = (0, 1)
) -> None:
    """Each document comes out the same, bit for bit, whatever every second one, from ``turns`` on, holds."""
    data = pack.data()
    clean = by_kernels(pack, data, backend, device)
    assert_right(pack, data, clean)
    count = len(pack.lens_q)
    for first in turns:
        ill = list(range(first, count, 2))
        got = by_kernels(pack, poisoned_data(pack, data, ill, value), backend, device)
        for document in sorted(set(range(count)) - set(ill)):
            for name in ("out", *GRADIENTS):
                rows = pack.rows(name, document)
                assert torch.equal(got[name][rows], clean[name][rows]), f"{name} of document {document}"
            assert torch.equal(got["lse"][document], clean["lse"][document]), f"lse of document {document}"
        for name in ("out", *GRADIENTS):
            assert (got[name][pack.shape(name)[0] - pack.tail :] == 0).all(), f"{name} of rows of nobody"


HALF = torch.bfloat16
AROUND = {
    "tiny": ([0, 1, 2, 1, 0, 5, 3, 1], [0, 1, 2, 3, 4, 5, 2, 0]),
    "16": ([15, 16, 17, 16, 1], [15, 16, 17, 15, 33]),
    "32": ([31, 32, 33, 1, 32], [31, 32, 33, 64, 31]),
    "64": ([63, 64, 65, 0, 64], [63, 64, 65, 3, 66]),
    "128": ([127, 129, 1, 128], [127, 129, 130, 126]),
}
"""Lengths of queries and keys beside multiples of tiles' sides, no query and no key among them."""


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("around", "device"),
    [*((around, "cpu") for around in ("tiny", "64", "128")), *(pytest.param(a, "cuda", marks=ON_CUDA) for a in AROUND)],
)
def test_documents_never_mix(around: str, is_causal: bool, device: str) -> None:
    check_neighbours(Pack(*AROUND[around], is_causal=is_causal, tail=5), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinities_never_mix(value: float, device: str) -> None:
    check_neighbours(Pack([17, 5, 40, 1], [17, 9, 40, 3], (3, 1), 24, HALF, tail=70), device, value=value, turns=(0,))


@pytest.mark.parametrize("device", DEVICES)
def test_documents_never_mix_under_dropout(device: str) -> None:
    check_neighbours(Pack([33, 70, 0, 9], [33, 70, 4, 9], (3, 1), 16, dropout=DROPOUT, tail=3), device, turns=(0,))


@pytest.mark.parametrize("device", DEVICES)
def test_documents_never_mix_on_torch(device: str) -> None:
    check_neighbours(Pack([17, 0, 65, 1, 33], [17, 2, 65, 3, 30], (6, 2), tail=3), device, "torch")


@pytest.mark.parametrize(
    ("heads", "device"),
    [
        *((heads, "cpu") for heads in ((3, 1), (7, 1), (6, 2))),
        *(pytest.param(h, "cuda", marks=ON_CUDA) for h in GROUPS),
    ],
    ids=str,
)
def test_any_group(heads: tuple[int, int], device: str) -> None:
    """Query heads that share a key head may share a program, whether or not there is a power of two of them."""
    check_neighbours(Pack([1, 0, 19, 6], [1, 5, 19, 23], heads, 8, tail=2), device, turns=(1,))


@pytest.mark.parametrize("heads", [(16, 1), (33, 3), (128, 1), (40, 8), (28, 4), (132, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_large_groups(heads: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_neighbours(Pack([1, 65, 0, 130, 17], [1, 65, 5, 129, 40], heads, 64, dtype, tail=2), device)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=[*ON_CUDA, pytest.mark.slow])])
def test_documents_never_mix_at_any_head_dim(head_dim: int, dtype: torch.dtype, device: str) -> None:
    lens_q, lens_k = [63, 129, 1, 257, 16, 128, 31], [64, 130, 3, 255, 16, 200, 33]
    check_neighbours(Pack(lens_q, lens_k, heads_of(head_dim), head_dim, dtype, tail=130), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("lens_q", "lens_k"),
    [([5, 3], [0, 0]), ([0, 0], [4, 3]), ([0], [0]), ([], []), ([7, 70], [2, 1]), ([1], [1])],
    ids=["no keys", "no queries", "nothing", "no documents", "few see", "one"],
)
@pytest.mark.parametrize("tail", [0, 2])
def test_next_to_nothing(lens_q: list[int], lens_k: list[int], tail: int, device: str) -> None:
    """Tensors without rows have no memory either, and rows that see nothing stand beside some that do."""
    pack = Pack(lens_q, lens_k, (3, 1), tail=tail)
    data = pack.data()
    assert_right(pack, data, by_kernels(pack, data, "triton", device))


def test_every_document_has_one_token() -> None:
    pack = Pack([1] * 12, [1] * 12, (3, 1), 8)
    data = pack.data()
    got = by_kernels(pack, data, "triton", "cpu")
    assert_right(pack, data, got)
    assert torch.equal(got["out"], data["v"].expand(12, 3, 8)), "one key has all the weight"


# Views


def layouts(rows: int, heads: int, head_dim: int) -> dict[str, tuple[int, int, int]]:
    """Ways to lie in a buffer: (first element, stride of rows, stride of heads)."""
    width = heads * head_dim
    return {
        "whole": (0, width, head_dim),
        "unaligned": (1, width, head_dim),
        "odd rows": (3, width + 1, head_dim),
        "odd heads": (5, heads * (head_dim + 3) + 2, head_dim + 3),
        "amid columns": (2 * head_dim, width + 3 * head_dim, head_dim),
        "heads first": (head_dim, head_dim, (rows + 2) * head_dim),
        "rows apart": (8, 3 * width, head_dim),
        "columns apart": (8, width * 16, head_dim * 16),
    }


LAYOUTS = tuple(layouts(1, 1, 8))
GUARD = 128
"""Elements of a buffer before and after what a view covers."""


def placed(
    shape: tuple[int, int, int], layout: str, fill: float, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer full of one value, and a view of it."""
    offset, row, head = layouts(*shape)[layout]
    size = offset + max(shape[0] - 1, 0) * row + (shape[1] - 1) * head + shape[2]
    buffer = torch.full((size + 2 * GUARD,), fill, dtype=dtype, device=device)
    return buffer, buffer.as_strided(shape, (row, head, 1), GUARD + offset)


def check_views(pack: Pack, first: int, device: str, backend: str = "triton") -> None:
    """Every tensor lies in its own way, from the ``first`` on: NaN around operands is not read, 7 not overwritten."""
    data = pack.data()
    kinds = cycle(LAYOUTS[first:] + LAYOUTS[:first])
    views, into, guards = dict(data), {}, {}
    for name in OPERANDS:
        _, views[name] = placed(pack.shape(name), next(kinds), torch.nan, pack.dtype, device)
        views[name].copy_(data[name])
    for name in GRADIENTS:
        kind = next(kinds)
        guards[name], into[name] = placed(pack.shape(name), kind, 7.0, pack.dtype, device)
        _, covered = outside = placed(pack.shape(name), kind, 0.0, torch.float32, device)
        covered.fill_(1.0)
        guards[name] = guards[name], outside[0] == 0
        into[name].fill_(torch.nan)
    got = by_kernels(pack, views, backend, device, into)
    assert_right(pack, data, got)
    for name, (buffer, outside) in guards.items():
        assert (buffer[outside] == 7.0).all(), f"something beside {name} was written"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 24), (torch.bfloat16, 16)], ids=str)
def test_any_view(dtype: torch.dtype, head_dim: int, first: int, device: str) -> None:
    check_views(Pack([3, 20, 0, 1], [3, 22, 1, 4], (4, 2), head_dim, dtype, tail=1), first, device)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256)])
def test_any_view_of_usual_width(dtype: torch.dtype, head_dim: int, first: int, device: str) -> None:
    """Widths whose whole tensors could be loaded by descriptors of blocks, which take few of these views."""
    check_views(Pack([63, 200, 0, 129], [63, 222, 1, 130], (6, 2), head_dim, dtype, tail=1), first, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_dimensions_of_one_have_any_stride(heads: tuple[int, int], device: str) -> None:
    """Whatever stride a dimension of size 1 was given is kept by torch, 0 and 1 too."""
    pack = Pack([1], [1], heads, 16) if heads != (1, 1) else Pack([9, 4], [9, 4], heads, 16)
    data = pack.data()
    for name, (row, head) in zip(OPERANDS, [(1, 1), (0, 0), (3, 5), (1, 0)], strict=True):
        x = data[name].to(device)
        strides = (row, x.stride(1), 1) if len(x) == 1 else (x.stride(0), head, 1)
        data[name] = x.as_strided(x.shape, strides)
    got = by_kernels(pack, data, "triton", device)
    assert_right(pack, {name: x.cpu() for name, x in data.items()}, got)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", ["heads", "rows", "both"])
def test_operands_may_be_broadcast(shared: str, device: str) -> None:
    """Strides of 0: one row, or one head, that stands for all."""
    pack = Pack([20, 3], [20, 3], (6, 3), 16)
    data = pack.data()
    for name in OPERANDS:
        x = data[name].to(device)
        x = x if shared == "heads" else x[:1]
        data[name] = (x if shared == "rows" else x[:, :1]).expand(pack.shape(name))
    got = by_kernels(pack, data, "triton", device)
    assert_right(pack, {name: x.cpu() for name, x in data.items()}, got)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_and_values_may_be_the_same_memory(device: str) -> None:
    pack = Pack([20, 3], [20, 3], (2, 2), 16)
    data = pack.data()
    data["q"] = data["k"] = data["v"] = data["q"].to(device)
    got = by_kernels(pack, data, "triton", device)
    assert_right(pack, {name: x.cpu() for name, x in data.items()}, got)


# Several steps, over keys among which others lie that nobody may see


def check_steps(
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    **options: Any,
) -> None:
    """Random tables over several buffers, forward and backward; every key that nobody sees is NaN."""
    case = random_case(seed, lengths, is_causal=True, num_steps=3, tail=3)
    q, pairs = buffers(case, *heads, head_dim, dtype, seed)
    scale, dropout = head_dim**-0.5, options.get("dropout")
    there = [(k.to(device), v.to(device)) for k, v in pairs]
    state = run("triton", case, q.to(device), there, scale=scale, dropout=dropout)
    want = dense(case, q, pairs, scale=scale, dropout=dropout)
    atol = GRADIENT_TOLERANCE[dtype] * max(1.0, float(want.out.abs().max()))
    torch.testing.assert_close(state.out.cpu().double(), want.out, atol=atol, rtol=0)
    torch.testing.assert_close(rows_of(case, state.lse.cpu()).double(), want.lse, atol=1e-4, rtol=1e-5)
    p = dropout.p if dropout else 0.0
    check_backward(case, "triton", dtype, head_dim, scale, p, seed, heads, device)


def test_steps() -> None:
    check_steps(3, [21, 0, 1], (3, 1), 8, torch.float32, "cpu")


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["kept", "dropped"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "heads"), [(8, (3, 1)), (40, (7, 1)), (64, (8, 2)), (128, (12, 4)), (128, (5, 5)), (256, (6, 2))]
)
@pytest.mark.parametrize("device", [CUDA])
def test_steps_in_any_type(
    head_dim: int, heads: tuple[int, int], dtype: torch.dtype, dropout: Dropout | None, device: str
) -> None:
    check_steps(head_dim, [150, 1, 290, 0, 64], heads, head_dim, dtype, device, dropout=dropout)
