"""The Gluon backward on a CPU, against the definition in float64, and what the interpreter finds in a broken one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.gluon_interpreter import Edit, interpreted
from support.table_checks import check_backward, documents_before_foreign_keys, whole_documents
from support.tables_by_definition import Case, buffers, dense, random_case, run

from hetu.backends.attention.contract import BackwardState, attention_delta
from hetu.backends.attention.family import AttendCall
from hetu.backends.families import family
from hetu.backends.gluon import launch_backward, variants_backward

Interpret = Callable[..., None]


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> Interpret:
    """Lets the backward of the torch family be the one in Gluon, on a CPU, with a seed and edits."""

    def set_up(seed: int, edits: Sequence[Edit] = (), programs: int = 3) -> None:
        tile = variants_backward.BackwardTile(block_n=32, row_stages=2, key_stages=2, chunk=1)
        monkeypatch.setattr(variants_backward, "tile", lambda variant: tile)
        monkeypatch.setattr(variants_backward, "LONG", 0)
        monkeypatch.setattr(launch_backward, "multiprocessors", lambda device: programs)
        for launcher, kernel in KERNELS:
            monkeypatch.setattr(launcher, "kernel", interpreted(kernel, seed, edits))
        monkeypatch.setattr(launch_backward, "portable", None)  # nothing is left to it
        monkeypatch.setattr(type(family("torch")), "attend_backward", staticmethod(launch_backward.attend_backward))

    return set_up


KERNELS = [(launcher, launcher.kernel) for launcher in (launch_backward._keys, launch_backward._queries)]
LENGTHS = [90, 1, 0, 33]
CASES: dict[str, tuple[Case, tuple[int, int], int, torch.dtype, dict[str, Any]]] = {
    "causal": (whole_documents(LENGTHS, True), (4, 2), 64, torch.bfloat16, {}),
    "full": (whole_documents(LENGTHS, False), (2, 2), 128, torch.float16, {"in_q_dtype": True}),
    "long": (whole_documents([200], True), (1, 1), 64, torch.float16, {}),
    "one row": (whole_documents([1], True), (3, 1), 128, torch.bfloat16, {}),
    "steps": (random_case(3, [30, 1, 0], is_causal=True, num_steps=2, tail=3), (2, 1), 128, torch.float16, {}),
    "windows": (
        random_case(1, [40, 1], is_causal=True, num_steps=1, has_windows=True), (4, 1), 64, torch.float16,
        {"softcap": 3.0, "has_sinks": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_backward(name: str, interpret: Interpret) -> None:
    case, heads, head_dim, dtype, extras = CASES[name]
    interpret(0)
    check_backward(case, "torch", dtype, head_dim, scale=head_dim**-0.5, heads=heads, **extras)


@pytest.mark.parametrize("size", [2.0**7, 2.0**11])
def test_large_scores(size: float, interpret: Interpret) -> None:
    """Of scores that are whole numbers, however large, the largest keys of a row share its weight.

    From about 2**24 on a log-sum-exp doesn't hold how many they are; then the portable kernels' gradients are the same.
    """
    interpret(0)
    case = whole_documents([70, 40], True)
    q, pairs = buffers(case, 2, 1, 64, torch.float16, seed=0)
    q, pairs = torch.sign(q) * size, [(torch.sign(k) * size, v) for k, v in pairs]
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).half()
    forward = run("torch", case, q, pairs, scale=1.0)
    delta = attention_delta(forward.out, dout, None, case.spans)
    call = AttendCall(q, *pairs[0], case.spans, case.steps[0].table, 1.0)

    def gradients(attend_backward: Callable[..., None]) -> list[torch.Tensor]:
        dq, dk, dv = (torch.full(x.shape, torch.nan) for x in (q, *pairs[0]))
        attend_backward(call, BackwardState(dout, forward.lse, delta, dq), dk, dv)
        return [dq.double(), dk.double(), dv.double()]

    wanted = _gradients(case, q, pairs, dout) if size < 2**8 else gradients(family("triton").attend_backward)
    for mine, want in zip(gradients(launch_backward.attend_backward), wanted, strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-2 * max(1.0, float(want.abs().max())))


def _gradients(case: Case, q: torch.Tensor, pairs: Any, dout: torch.Tensor) -> list[torch.Tensor]:
    """By the definition, of probabilities that no score overflows."""
    p = dense(case, q, pairs, scale=1.0).p
    q, dout, k, v = (x.double() for x in (q, dout, *pairs[0]))
    dp = torch.einsum("ihd,jgd->hij", dout, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dk, dv = (torch.einsum("hij,ihd->jd", x, y)[:, None] for x, y in ((ds, q), (p, dout)))
    return [torch.einsum("hij,jgd->ihd", ds, k), dk, dv]


BROKEN: dict[str, tuple[str, str, str, str]] = {
    "rows overwritten": ("overwrites|gets more", "load_rows", "mbarrier.wait(rows_empty.index(stage), phase)", "pass"),
    "numbers too early": ("not close", "backward_keys.consume", "mbarrier.wait(known.index(stage), phase)", "pass"),
    "keys too early": ("a wait for", "backward_keys.consume", "mbarrier.wait(kv_full.index(0), turn & 1)", "pass"),
    "a tile too early": (
        "not close|an access|nobody can go on|an int32", "told_tile",
        "mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)", "pass",
    ),
    "queries too early": (
        "a wait for", "backward_queries.consume", "mbarrier.wait(dout_full.index(GROUP), i & 1)", "pass",
    ),
    "a wrong phase": ("nobody can go on|overwrites|gets more", "backward_keys.produce", "(turn & 1) ^ 1", "turn & 1"),
    "a release too early": (
        "overwrites", "backward_keys.consume", "dv_tile, dk_tile = warpgroup_mma_wait(0, [dv_tile, dk_tile])\n"
        + 20 * " " + "mbarrier.arrive(rows_empty.index(stage), count=1)",
        "mbarrier.arrive(rows_empty.index(stage), count=1)\n"
        + 20 * " " + "dv_tile, dk_tile = warpgroup_mma_wait(0, [dv_tile, dk_tile])",
    ),
    "rows of others": ("not close", "cleaned", "if left < LENGTH", "if left < 0"),
    "a diagonal of keys": ("not close", "backward_keys.is_seen", "<= (row + diagonal)", "< (row + diagonal)"),
    "a diagonal of queries": ("not close", "softmax.is_seen", "<= gl.minimum", "< gl.minimum"),
    "delta": ("not close", "score_gradients", "(dp - delta)", "dp"),
    "the scale": ("not close", "backward_queries.consume", "dq_tile * scale", "dq_tile"),
}  # fmt: skip
"""What has to be said of a change, and the change: a function, a piece of its source, and what takes its place."""


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, interpret: Interpret) -> None:
    message, *change = BROKEN[name]
    edit = Edit(*change)
    interpret(0, [edit], programs=1)
    with pytest.raises(AssertionError, match=message):
        check_backward(documents_before_foreign_keys([200, 70]), "torch", torch.float16, 64, scale=0.125, heads=(1, 1))
    assert edit.is_made
