"""What layouts and plans refuse: pipelines that they have not, lists that are none, shards that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetu
from hetu import Layout
from hetu.parallel import Heads, build_pipeline_plan, build_plan

LAYOUT = ["rows", "positions", "columns", "documents", "place", "group_index", "query_spans"]
PLAN = ["pairs", "head_pairs", "rows_sent", "rows_received", "grad_rows_sent", "grad_rows_received", "peak_bytes"]
HEADS = Heads(num_q=1, num_kv=1, head_dim=8, itemsize=4)
NONE = [2, -1, 2**63, "0", None, 0.0, True, [0], np.array([0])]


@pytest.mark.parametrize("number", NONE, ids=repr)
def test_pipelines_that_are_not_there(number: Any) -> None:
    layout = Layout.build([2, 3], [0, 0])
    plan = build_plan(layout, heads=HEADS)
    calls = [getattr(layout, name) for name in LAYOUT]
    calls += [getattr(some, name) for some in (plan, plan.backward()) for name in PLAN]
    calls += [lambda number: build_pipeline_plan(layout, number, heads=HEADS)]
    for call in calls:
        with pytest.raises(hetu.StrategyError, match="expected pipeline to be an int from 0 to 1"):
            call(number)
    for name in ("query_spans", "rows_of"):
        with pytest.raises(hetu.StrategyError, match="expected member to be an int from 0 to 1"):
            getattr(layout.groups[0], name)(number)


def test_pipelines_may_be_counted_by_numpy_and_torch() -> None:
    layout = Layout.build([2, 3], [0, 0])
    assert [layout.rows(r) for r in (np.int8(1), np.array(1), torch.tensor(1))] == [3, 3, 3]


@pytest.mark.parametrize(
    "changed",
    [
        {"batch": 1.5},
        {"batch": float("nan")},
        {"batch": True},
        {"batch": None},
        {"batch": 2**25},
        {"seq_lens": [0, 0], "batch": 2**63},
        {"seq_lens": b"ab"},
        {"seq_lens": "23"},
        {"seq_lens": 5},
        {"seq_lens": None},
        {"seq_lens": [2, None]},
        {"seq_lens": [2, 3.0]},
        {"seq_lens": [True, 2]},
        {"seq_lens": [1.9, 2.9]},
        {"seq_lens": {2: 0, 3: 0}},
        {"seq_lens": {2, 3}},
        {"seq_lens": [2**62, 2**62]},
        {"seq_lens": [2**63, 1]},
        {"seq_lens": [np.int64(-1), 2]},
        {"seq_lens": np.array([-1, 2])},
        {"cp_groups": [0, None]},
        {"cp_groups": [0, 0.0]},
        {"cp_groups": [False, False]},
        {"split": ["sym"]},
        {"split": None},
        {"cu_seqlens": [0.0, 5.0]},
        {"cu_seqlens": [False, True]},
        {"cu_seqlens": np.ma.masked_array([0, 5], [0, 1])},
        {"cu_seqlens": torch.tensor([0, 5], device="meta")},
        {"cu_seqlens": "05"},
        {"cu_seqlens": [[0, 2], [0]]},
    ],
    ids=str,
)
def test_layouts_are_built_of_lists_of_ints(changed: dict[str, Any]) -> None:
    with pytest.raises(hetu.HetuError, match=r"\n  where:  test_refusals.py"):
        Layout.build(**{"seq_lens": [2, 3], "cp_groups": [0, 0], **changed})


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_lists_of_ints_may_be_arrays(kind: Any) -> None:
    plain = Layout.build([2, 3], [0, 0], cu_seqlens=[0, 1, 5])
    same = Layout.build(kind([2, 3]), kind([0, 0]), cu_seqlens=kind([0, 1, 5]), batch=np.int32(1))
    assert same.digest() == plain.digest()


def test_what_a_layout_is_made_of_stays_the_callers() -> None:
    spans, lengths, cu = np.array([(0, 0, 2, 2, 1), (3, 0, 0, 2, 1)]), np.array([4]), np.array([0, 4])
    copies = [array.copy() for array in (spans, lengths, cu)]
    Layout.from_spans([1, 0, 0, 1], [[0], lengths], [np.zeros((0, 5), np.int64), spans])
    Layout.build([2, 2], [0, 0], cu_seqlens=cu)
    for array, copy in zip((spans, lengths, cu), copies, strict=True):
        assert np.array_equal(array, copy)


def test_rows_of_a_whole_batch_name_the_batch() -> None:
    layout = Layout.build([2, 3], [0, 0])
    with pytest.raises(hetu.ShapeError, match=r"group 0 has 5 tokens, but 15 rows came in x\n(.|\n)*batch="):
        layout.scatter(np.zeros((15, 2)))
    with pytest.raises(hetu.ShapeError) as caught:
        layout.scatter(np.zeros((14, 2)))
    assert "batch=" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(1, np.int32), np.full(1, 1.9)),
        (np.full(1, 1.9), np.zeros(1, np.int32)),
        (np.zeros((1, 2)), np.zeros((1, 1))),
        (np.zeros((1, 1)), np.zeros((1, 2))),
        (np.zeros((1, 2)), np.zeros(1)),
        (np.zeros((1, 2)), torch.zeros((1, 2), dtype=torch.float64)),
        (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float16)),
        (torch.zeros(1, 2), torch.zeros(1, 1)),
        (np.zeros(1), np.ma.masked_array([1.0], [1])),
        (torch.zeros(1), torch.zeros(1).to_sparse()),
        (torch.zeros(1), torch.zeros(1, device="meta")),
        (np.zeros(1), [0.0]),
        (np.zeros(1), None),
        (np.zeros(1), 0.0),
    ],
)
def test_gather_neither_casts_nor_broadcasts(one: Any, other: Any) -> None:
    layout = Layout.build([1, 1], [0, 0])
    for shards in ([one, other], (other, one)):
        with pytest.raises(hetu.ShapeError):
            layout.gather(shards)


def test_groups_may_differ_where_shards_of_one_may_not() -> None:
    layout = Layout.build([1, 1], [0, 1])
    ints, floats = layout.gather([np.zeros(1, np.int32), np.ones((1, 2))])
    assert (ints.dtype, floats.shape) == (np.int32, (1, 2))
    stacked = Layout.build([2, 2], [0, 0]).gather(np.arange(4).reshape(2, 2))
    assert stacked.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("field", ["flops", "link_bytes", "latency", "memory_bytes"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), None, "fast", True, 1j, [1.0], np.ones(2)], ids=repr)
def test_hardware_has_positive_numbers(field: str, value: Any) -> None:
    good = {"flops": 1e12, "link_bytes": 1e9, "latency": 1e-6, "memory_bytes": 10**12}
    if field == "latency" and type(value) is int:  # 0: an ideal link
        assert hetu.Hardware(**{**good, field: value}).latency == 0
        return
    with pytest.raises(hetu.HetuError, match=f"expected {field} to be "):
        hetu.Hardware(**{**good, field: value})
    made = hetu.Hardware(**{**good, field: np.float32(2.0)})
    assert type(getattr(made, field)) is float
