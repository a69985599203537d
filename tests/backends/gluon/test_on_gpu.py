"""The Gluon kernels against the definition in float64, and that it is they who run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.devices import CUDA
from support.table_checks import check_backward, check_forward, whole_documents
from support.tables_by_definition import Case, random_case

import hetu
from hetu.backends.gluon import launch, launch_backward, variants, variants_backward
from hetu.functional import attn_varlen

HEADS = {64: [(8, 8), (8, 2)], 128: [(8, 2), (5, 5), (12, 4), (6, 2)], 256: [(4, 1), (6, 2)]}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lower": {},
    "softcap": {"softcap": 4.0},
    "sinks": {"has_sinks": True},
}
LENGTHS = [300, 1, 0, 700, 64, 129]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran; these kernels run for short documents too, though there are faster ones."""
    calls: list[str] = []

    def told(name: str, run: object) -> object:
        return lambda *given: (calls.append(name), run(*given))[1]  # type: ignore[operator]

    # The arguments of launches, of first ones and of those that are made again.
    monkeypatch.setattr(launch, "_given", told("gluon", launch._given))
    monkeypatch.setattr(launch_backward, "_given_keys", told("gluon", launch_backward._given_keys))
    for module, name in ((launch.portable, "attend"), (launch_backward.portable, "attend_backward")):
        monkeypatch.setattr(module, name, told("portable", getattr(module, name)))
    monkeypatch.setattr(variants, "LONG", 0)
    monkeypatch.setattr(variants_backward, "LONG", 0)
    return calls


def cases(extras: str, steps: int) -> list[Case]:
    windows = extras == "lower"
    made = [
        random_case(steps, LENGTHS, is_causal=is_causal, num_steps=steps, tail=5, has_windows=windows)
        for is_causal in (True, False)
    ]
    if extras == "plain" and steps == 1:  # more tiles than multiprocessors, and a single row
        made += [whole_documents([1500, 1, 129, 128, 900], True), whole_documents([2048] * 2, False)]
        made += [whole_documents([1], True)]
    return made


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "heads"), [(d, heads) for d in HEADS for heads in HEADS[d]], ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_forward(
    head_dim: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    steps: int,
    extras: str,
    device: str,
    ran: list[str],
) -> None:
    for case in cases(extras, steps):
        check_forward("gluon", case, heads, head_dim, dtype, device=device, **EXTRAS[extras])
    assert set(ran) == {"gluon"}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS[128], ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_backward(
    heads: tuple[int, int], dtype: torch.dtype, steps: int, extras: str, device: str, ran: list[str]
) -> None:
    """Against float64, and twice the same bits."""
    for case in cases(extras, steps):
        given = {"heads": heads, "device": device, "in_q_dtype": steps == 1, **EXTRAS[extras]}
        check_backward(case, "gluon", dtype, 128, scale=128**-0.5, **given)
    assert set(ran) == {"gluon"}


@pytest.mark.parametrize("device", [CUDA])
def test_who_runs(device: str, ran: list[str]) -> None:
    """Gluon is the first choice; views that TMA doesn't take go to the portable kernels, and so do other requests."""
    wide = torch.randn(41, 8, 128, device=device, dtype=torch.bfloat16)
    q, k, v = wide[:40, :4], wide[:40, 4:6], wide[:40, 6:]
    cu_seqlens = torch.tensor([0, 40])
    expected = attn_varlen(q, k, v, cu_seqlens, cu_seqlens)
    assert ran == ["gluon"]
    odd = torch.empty(40 * 4 * 128 + 1, device=device, dtype=torch.bfloat16)[1:].view(40, 4, 128).copy_(q)
    moved = attn_varlen(odd, k, v, cu_seqlens, cu_seqlens)
    assert ran == ["gluon", "portable"]
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-2)
    with hetu.config(backend="triton"):
        attn_varlen(q, k, v, cu_seqlens, cu_seqlens)
    assert ran == ["gluon", "portable"], "the portable kernels by themselves"
