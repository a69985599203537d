"""What the Gluon family takes, and how its work lists are arranged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tables_by_definition import random_case

from hetu.backends.attention.family import AttendSignature
from hetu.backends.attention.work import query_work
from hetu.backends.families import choose
from hetu.backends.gluon import FAMILY
from hetu.backends.gluon.descriptors import is_describable
from hetu.backends.gluon.launch import arranged

HOPPER = torch.device("cuda", 0)


def signature(dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, **options: bool) -> AttendSignature:
    return AttendSignature(dtype, HOPPER, head_dim, 8, 2, **options)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert FAMILY.declines(signature()) is None
    assert FAMILY.declines(signature(torch.float32)) == "float32 has no kernel"
    assert FAMILY.declines(signature(head_dim=96)) == "head_dim 96 has no kernel"
    for option, reason in {
        "has_dropout": "dropout has no kernel",
        "has_scores": "returned probabilities have no kernel",
    }.items():
        assert FAMILY.declines(signature(**{option: True})) == reason
    assert FAMILY.declines(signature(is_backward=True)) is None
    for head_dim in (64, 256):
        reason = f"the backward has no kernel for head_dim {head_dim}"
        assert FAMILY.declines(signature(head_dim=head_dim, is_backward=True)) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert FAMILY.declines(signature()) == "it is written for compute capability 9.0"


def test_without_a_gpu_the_portable_kernels_run() -> None:
    choice = choose("gluon", AttendSignature(torch.bfloat16, torch.device("cpu"), 128, 8, 2))
    assert str(choice) == "triton; gluon declined: it is written for compute capability 9.0"


@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    is_causal=st.booleans(),
    has_windows=st.booleans(),
    steps=st.integers(1, 3),
)
def test_items_know_their_blocks_and_the_heavy_ones_come_first(
    seed: int, lengths: list[int], is_causal: bool, has_windows: bool, steps: int
) -> None:
    case = random_case(seed, lengths, is_causal=is_causal, num_steps=steps, tail=2, has_windows=has_windows)
    for step, turn in zip(case.steps, case.turns, strict=True):
        plain = query_work(case.spans, step.table, 32, turn)
        work = arranged(query_work(case.spans, step.table, 32, turn), 64)
        assert sorted(map(tuple, np.delete(work.items, 12, 1))) == sorted(map(tuple, np.delete(plain.items, 12, 1)))
        for item in work.items.tolist():
            segments = [item, *work.further[item[13] : item[14]].tolist()]
            ends = [min(k_len, reach + item[1]) for *_, k_len, reach in (segment[:11] for segment in segments)]
            assert item[12] == sum(max(-(-end // 64), 1) for end in ends)
        halves = (work.items[:, 12] + 1) // 2
        assert (halves[1:] <= halves[:-1]).all()


def test_what_tma_takes() -> None:
    x = torch.zeros(10, 4, 64, dtype=torch.bfloat16)
    assert is_describable(x) and is_describable(x[:, 1:3]) and is_describable(x.transpose(0, 1))
    assert not is_describable(x[:0])
    assert not is_describable(x[:1, :1].expand(10, 4, 64)), "broadcast"
    odd = torch.zeros(10 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(10, 4, 64)
    assert not is_describable(odd), "begins at an odd address"
    assert not is_describable(torch.zeros(10, 4, 66, dtype=torch.bfloat16)[..., :64]), "odd strides"
    assert is_describable(torch.zeros(10, 66, dtype=torch.bfloat16)[:1, :64].view(1, 1, 64)), "one row has no stride"
