"""The Gluon kernels on a CPU, against the definition in float64, and what the interpreter finds in broken ones.

Blocks of keys are smaller than on a GPU, and a launch has three programs, so that each computes several tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.gluon_interpreter import Edit, KernelError, interpreted
from support.gluon_interpreter.ptx import elementwise
from support.gluon_interpreter.values import float32
from support.table_checks import check_forward, documents_before_foreign_keys, whole_documents
from support.tables_by_definition import Case, buffers, dense, random_case, rows_of, run
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hetu.backends.gluon import launch, variants
from hetu.backends.gluon.forward import forward_kernel
from hetu.backends.gluon.variants import Tile

TILES = {
    64: Tile(consumers=3, block_n=32, chunk=1),
    128: Tile(block_n=32),
    256: Tile(block_n=32, q_buffers=1),
}
LENGTHS = [90, 1, 0, 33, 64]
Interpret = Callable[..., None]


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> Interpret:
    """Lets the family run on a CPU, with a seed and edits."""

    def set_up(seed: int, edits: Sequence[Edit] = (), tiles: dict[int, Tile] = TILES, programs: int = 3) -> None:
        launch._kind.cache_clear()
        monkeypatch.setattr(variants, "tile", lambda variant, is_long: tiles[variant.head_dim])
        monkeypatch.setattr(launch, "multiprocessors", lambda device: programs)
        monkeypatch.setattr(launch._forward, "kernel", interpreted(forward_kernel, seed, edits))
        monkeypatch.setattr(launch.portable, "attend", None)  # nothing is left to it

    return set_up


FORWARD: dict[str, tuple[Case, tuple[int, int], int, torch.dtype, dict[str, Any]]] = {
    "causal": (whole_documents(LENGTHS, True), (4, 2), 64, torch.bfloat16, {}),
    "full": (whole_documents(LENGTHS, False), (2, 2), 128, torch.float16, {}),
    "one row": (whole_documents([1], True), (3, 1), 128, torch.bfloat16, {}),
    "many": (whole_documents([3] * 16, True), (2, 2), 64, torch.float16, {}),
    "wide": (whole_documents(LENGTHS, True), (4, 1), 256, torch.bfloat16, {}),
    "steps": (random_case(3, [60, 1, 0, 17], is_causal=True, num_steps=2, tail=3), (2, 1), 128, torch.bfloat16, {}),
    "windows": (random_case(1, [90, 1], is_causal=True, num_steps=1, has_windows=True), (4, 1), 64, torch.float16, {}),
    "all": (
        random_case(2, [60, 1, 0], is_causal=False, num_steps=2, tail=3, has_windows=True),
        (2, 1),
        256,
        torch.float16,
        {"softcap": 4.0, "has_sinks": True},
    ),
    "sinks": (whole_documents([70, 0, 5], True), (4, 2), 128, torch.bfloat16, {"has_sinks": True}),
    "softcap": (whole_documents([70, 0, 5], False), (2, 1), 64, torch.bfloat16, {"softcap": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "seed"), [*((name, 0) for name in FORWARD), ("causal", 1), ("full", 1), ("softcap", 1)]
)
def test_forward(name: str, seed: int, interpret: Interpret) -> None:
    case, heads, head_dim, dtype, extras = FORWARD[name]
    interpret(seed)
    check_forward("gluon", case, heads, head_dim, dtype, **extras)


@pytest.mark.parametrize("size", [2.0**7, 2.0**14])
def test_large_scores(size: float, interpret: Interpret) -> None:
    """Of scores that are whole numbers, however large, the largest keys of a row share its weight."""
    interpret(0)
    case = whole_documents([100, 70], True)
    q, pairs = buffers(case, 2, 1, 64, torch.float16, seed=0)
    q, pairs = torch.sign(q) * size, [(torch.sign(k) * size, v) for k, v in pairs]
    state = run("gluon", case, q, pairs, scale=1.0)
    wanted = dense(case, q, pairs, scale=1.0)
    torch.testing.assert_close(state.out.double(), wanted.out, rtol=0, atol=4e-3)
    torch.testing.assert_close(rows_of(case, state.lse).double(), wanted.lse, rtol=1e-6, atol=0)


BROKEN: dict[str, tuple[str, str, str, str]] = {
    "keys overwritten": ("overwrites|gets more", "load_block", "mbarrier.wait(empty.index(stage), phase)", "pass"),
    "queries overwritten": (
        "overwrites|gets more", "load_queries", "mbarrier.wait(empty.index(at), ((i // C.Q_BUFFERS) & 1) ^ 1)", "pass",
    ),
    "a wrong phase": (
        "nobody can go on.*consume.*waits for parity.*produce.*waits for parity", "load_block", "phase)", "phase ^ 1)",
    ),
    "keys too early": ("a wait for", "first_scores", "mbarrier.wait(k_full.index(stage), phase)", "pass"),
    "values too early": ("a wait for", "consume", "mbarrier.wait(v_full.index(stage), phase)\n            acc", "acc"),
    "bytes": ("nobody can go on", "load_block", "BYTES)\n", "BYTES - 2)\n"),
    "a release too few": (
        "nobody can go on", "consume", "mbarrier.arrive(k_empty.index(k_stage), count=1)\n            fresh", "fresh",
    ),
    "a release too early": (
        "overwrites", "consume",
        "acc = warpgroup_mma_wait(0, [acc])\n            mbarrier.arrive(v_empty.index(stage), count=1)",
        "mbarrier.arrive(v_empty.index(stage), count=1)\n            acc = warpgroup_mma_wait(0, [acc])",
    ),
    "a product in flight": ("needs warpgroup_mma_wait", "consume", "s = warpgroup_mma_wait(1, [s])", "pass"),
    "no fence": ("fence_async_shared", "finish", "fence_async_shared()", "pass"),
    "no fence after cleaning": ("fence_async_shared", "clean_rows", "fence_async_shared()", "pass"),
    "queries before the output is out": (
        "overwrites", "consume", "tma.store_wait(0)\n            mbarrier.arrive(q_empty.index(TURNS",
        "mbarrier.arrive(q_empty.index(TURNS",
    ),
    "the end": (
        "ends before", "consume", "stage, phase = k_stage, k_phase\n    tma.store_wait(0)",
        "stage, phase = k_stage, k_phase",
    ),
    "a diagonal": ("not close", "softmax.is_seen", "<= gl.minimum", "< gl.minimum"),
    "a part of the mask": ("not close", "seen_scores", "reach + first_token + 1", "reach + first_token + 33"),
    "rows of others": ("not close", "finish", "rows >= first_token + TOKENS", "rows >= 0"),
    "values of others": ("not close", "clean_values", "if left < C.BLOCK_N", "if left < 0"),
    "another maximum": ("not close", "weigh", "return gl.convert", "fade = fade * 0.5\n    return gl.convert"),
    "a write too far": ("outside of the tensors", "consume", "gl.where(slot >= 0, rows, 0)", "64 + rows"),
}  # fmt: skip
"""What has to be said of a change, and the change: a function, a piece of its source, and what takes its place."""


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, interpret: Interpret) -> None:
    """Under each seed: it does not depend on an order of the threads."""
    message, *change = BROKEN[name]
    case = whole_documents([3] * 5, True) if name == "queries overwritten" else documents_before_foreign_keys([70, 130])
    for seed in range(2):
        edit = Edit(*change)
        interpret(seed, [edit], {64: Tile(block_n=32)}, programs=1)
        with pytest.raises(AssertionError, match=message):
            check_forward("gluon", case, (1, 1), 64, torch.bfloat16)
        assert edit.is_made


def test_the_interpreter_finds_nothing_in_what_is_whole(interpret: Interpret) -> None:
    interpret(0, [], {64: Tile(block_n=32)}, programs=1)
    check_forward("gluon", documents_before_foreign_keys([70, 130]), (1, 1), 64, torch.bfloat16)


@gluon.jit
def divided(x, out, BLOCK: gl.constexpr):
    at = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK)
    number = gl.load(x + at, mask=at < 3, other=-7)
    gl.store(out + at, number // 2 * 10 + number % 2)


def test_integers_are_those_of_the_device() -> None:
    x, out = torch.tensor([7, -7, -8], dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    interpreted(divided)[(2,)](x=x, out=out, BLOCK=2)
    assert out.tolist() == [31, -31, -40, -31]
    with pytest.raises(KernelError, match="leaves its range"):
        interpreted(divided)[(2,)](x=x + 2**30, out=out, BLOCK=2)
    with pytest.raises(KernelError, match="powers of two"):
        interpreted(divided)[(1,)](x=x, out=out, BLOCK=3)
    with pytest.raises(KernelError, match="outside of the tensors"):
        interpreted(divided)[(3,)](x=x, out=out, BLOCK=2)
    with pytest.raises(KernelError, match="two programs"):
        interpreted(divided, edits=[Edit("divided", "gl.program_id(0) * BLOCK", "0")])[(2,)](x=x, out=out, BLOCK=2)


@pytest.mark.parametrize(
    ("asm", "message"),
    [
        ("fma.rz.f32 $0, $1, $1, $1;", "does not know fma.rz"),
        ("add.f32 $0, $1, t;", "t is read before"),
        ("mov.f32 $0, $1; add.f32 $0, $0, $1;", "without &"),
        ("BACK: mov.f32 $0, $1; bra BACK;", "leads back"),
        ("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, -1;", "whole warp"),
    ],
)
def test_assembly_is_not_guessed(asm: str, message: str) -> None:
    one = np.ones(4, np.float32)
    with pytest.raises(KernelError, match=message):
        elementwise(asm, "=f,f", [(one, float32)], [float32], 1)
