"""Layouts against the rules one token at a time; scatter and gather; everything that is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.layout_cases import Case, random_case, random_custom_layout

import hetu
from hetu.errors import BindingError, HetuError, ShapeError, StrategyError
from hetu.parallel import Layout, Strategy, groups_of
from hetu.parallel.layout.splits import SPLITS


@pytest.mark.parametrize("seed", range(10))
def test_any_layout(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(250):
        check(random_case(rng), rng)


def check(case: Case, rng: np.random.Generator) -> None:
    layout, expected = case.layout(), case.expected()
    assert layout.num_pipelines == len(case.lens)
    for r, length in enumerate(case.lens):
        batch = case.batches[layout.group_index(r)]
        assert layout.rows(r) == batch * length == len(expected[r])
        assert list(zip(layout.documents(r), layout.positions(r), strict=True)) == expected[r]
        check_query_spans(case, layout, r)
    for g, members in enumerate(groups_of(case.cp_groups).values()):
        assert all(layout.group_index(r) == g for r in members)
        columns = np.concatenate([layout.columns(r) for r in members])
        assert sorted(columns.tolist()) == list(range(layout.groups[g].tokens))
    whole = [rng.standard_normal((group.tokens, 2)) for group in layout.groups]
    shards = layout.scatter(whole if len(whole) > 1 else whole[0])
    assert [len(shard) for shard in shards] == [layout.rows(r) for r in range(layout.num_pipelines)]
    back = layout.gather(shards)
    for was, now in zip(whole, back if len(whole) > 1 else [back], strict=True):
        assert np.array_equal(was, now)
    for r in range(layout.num_pipelines):
        offsets = layout.groups[layout.group_index(r)].offsets
        rows = [offsets[document] + position for document, position in expected[r]]
        assert np.array_equal(shards[r], whole[layout.group_index(r)][rows])


def check_query_spans(case: Case, layout: Layout, r: int) -> None:
    spans, row = layout.query_spans(r), 0
    offsets = layout.groups[layout.group_index(r)].offsets
    for s in range(len(spans)):
        assert spans.start[s] == row and spans.length[s] > 0 and spans.step[s] > 0
        for i in range(spans.length[s]):
            assert layout.documents(r)[row] == spans.document[s]
            assert layout.positions(r)[row] == spans.position[s] + i * spans.step[s]
            if case.cu_seqlens is None:  # row t of sequence b is softmax_lse[b, :, t]
                place = spans.document[s], row - spans.document[s] * case.lens[r], 0
            else:
                place = 0, row, offsets[spans.document[s]]
            assert (spans.slot[s], spans.slot_row[s] + i, spans.column[s]) == place
            row += 1
    assert row == layout.rows(r)


def test_the_usual_zigzag_and_stripes() -> None:
    assert [Layout.build([4] * 2, [0] * 2, split="sym").positions(r).tolist() for r in (0, 1)] == [
        [0, 1, 6, 7],
        [2, 3, 4, 5],
    ]
    layout = Layout.build([4] * 3, [0] * 3, split="stripe")
    assert all((layout.positions(r) == np.arange(4) * 3 + r).all() for r in range(3))


@pytest.mark.parametrize("split", ["sym", "stripe"])
def test_large_totals_are_dealt_exactly(split: str) -> None:
    """T * n goes beyond float64 and near int64, and every pipeline still ends with exactly its length."""
    lens = [715_827_883, 2, 715_827_881, 715_827_881]
    cu = [0, 1, 1_000_000_007, 2_000_000_000, sum(lens)]
    group = Layout.build(lens, [0] * 4, split=split, cu_seqlens=np.array(cu)).groups[0]
    case = Case(lens, [0] * 4, split, [1], [np.array(cu)])
    assert group.pieces.T.tolist() == case.pieces(0, lens)
    assert group.rows == lens and (group.pieces >= 0).all()


def test_scatter_and_gather_of_torch_tensors() -> None:
    layout = Layout.build([3, 0, 4, 2], [0, 0, 0, 1], split="stripe")
    whole = [torch.arange(14.0).view(7, 2).requires_grad_(), torch.arange(2, dtype=torch.int64)]
    shards = layout.scatter(whole)
    assert [tuple(shard.shape) for shard in shards] == [(3, 2), (0, 2), (4, 2), (2,)]
    back = layout.gather(shards)
    assert all(torch.equal(was, now) and was.dtype == now.dtype for was, now in zip(whole, back, strict=True))
    back[0].sum().backward()
    assert torch.equal(whole[0].grad, torch.ones(7, 2))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("pieces", [[[3, 0, 4]], [[2, 1], [0, 5]], [[0], [3], [2]], [[0, 0]], [[1], [1], [1]]])
def test_shards_have_memory_of_their_own(pieces: list[list[int]], split: str) -> None:
    """Rows that are in order are cut out, and copied all the same."""
    cu = np.concatenate([np.zeros((len(pieces), 1), np.int64), np.cumsum(pieces, 1)], 1)
    layout = Layout.build(cu[:, -1].tolist(), [0] * len(pieces), split=split, cu_seqlens=cu.sum(0))
    for whole in (np.arange(cu[:, -1].sum()), torch.arange(cu[:, -1].sum())):
        shards = layout.scatter(whole)
        for r, shard in enumerate(shards):
            assert shard.tolist() == layout.columns(r).tolist()
            shard[...] = -1
        assert whole.tolist() == list(range(len(whole)))


def test_one_group_takes_one_array_and_gives_one() -> None:
    layout = Layout.build([1, 2], [4, 4])
    assert layout.gather(layout.scatter(np.arange(3))).tolist() == [0, 1, 2]
    assert [shard.tolist() for shard in layout.scatter([np.arange(3)])] == [[0], [1, 2]]


@pytest.mark.parametrize("seed", range(4))
def test_custom_layouts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        layout = random_custom_layout(rng)
        for group in layout.groups:
            tokens = [
                (d, p) for r in group.members for d, p in zip(layout.documents(r), layout.positions(r), strict=True)
            ]
            assert sorted(tokens) == [(d, p) for d, length in enumerate(group.lengths) for p in range(length)]
        whole = [np.arange(group.tokens) for group in layout.groups]
        back = layout.gather(layout.scatter(whole))
        assert all(map(np.array_equal, whole, back if len(whole) > 1 else [back]))


def test_a_custom_layout_of_a_batch() -> None:
    spans = [(0, 0, 0, 2, 2), (0, 1, 1, 2, 1), (1, 0, 1, 1, 1), (1, 1, 0, 1, 1)]
    layout = Layout.from_spans([0, 0], [[3, 3]], [spans], is_packed=False)
    own = layout.query_spans(0)
    assert own.slot.tolist() == [0, 1] and own.slot_row.tolist() == [0, 0] and own.column.tolist() == [0, 0]


def test_digest_tells_layouts_apart() -> None:
    def digest(**changed: Any) -> str:
        given: dict[str, Any] = {"seq_lens": [4, 4], "cp_groups": [0, 0], "split": "sym", **changed}
        return Layout.build(**given).digest()

    others = [{"split": "stripe"}, {"seq_lens": [3, 5]}, {"cp_groups": [0, 1]}, {"batch": 2}, {"cu_seqlens": [0, 8]}]
    assert digest() == digest() and len({digest(), *(digest(**other) for other in others)}) == 6


def test_text() -> None:
    lines = str(Layout.build([9, 9, 1], [0, 0, 7], split="stripe", batch=[7, 1])).splitlines()
    assert lines[0] == "group 0: 7 documents, 126 tokens on 2 pipelines"
    assert lines[1].startswith("  pipeline 0: 63 tokens   0[0:17:2] 1[0:17:2]") and lines[1].endswith("... 1 more")
    assert lines[3:] == ["group 7: 1 document, 1 token on 1 pipeline", "  pipeline 2: 1 token   0[0:1]"]


def build(**changed: Any) -> Layout:
    return Layout.build(**{"seq_lens": [2, 3], "cp_groups": [0, 0], **changed})


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"seq_lens": [2]}, StrategyError, "1 entries and cp_groups 2"),
        ({"seq_lens": [], "cp_groups": []}, StrategyError, "no pipelines"),
        ({"seq_lens": [2, -1]}, StrategyError, "pipeline 1 holds -1 tokens"),
        ({"split": "zigzag"}, StrategyError, "there is no split 'zigzag'"),
        ({"batch": 0}, StrategyError, "batch is 0, expected at least 1"),
        ({"batch": [1, 1]}, StrategyError, "2 batch sizes for 1 context groups"),
        ({"batch": 2, "cu_seqlens": [0, 5]}, StrategyError, "batch is 2, expected 1 with packing"),
        ({"batch": 2**30}, StrategyError, "tokens(.|\n)*, expected at most"),
        ({"cu_seqlens": [np.array([0, 5])] * 2}, ShapeError, "2 cu_seqlens for 1 context groups"),
        ({"cu_seqlens": np.zeros((1, 2, 2), int)}, ShapeError, r"int64\[1, 2, 2\], expected ints of shape"),
        ({"cu_seqlens": np.array([0.0, 5.0])}, ShapeError, r"float64\[2\], expected ints"),
        ({"cu_seqlens": np.empty(0, int)}, ShapeError, r"int64\[0\], expected ints"),
        ({"cu_seqlens": [1, 5]}, BindingError, "expected to start at 0"),
        ({"cu_seqlens": [0, 4, 3, 5]}, BindingError, "never to decrease"),
        ({"cu_seqlens": [0, 4]}, BindingError, r"ends at 4, but pipelines \[0, 1\] hold 5 tokens together"),
        (
            {"cu_seqlens": np.array([[0, 2], [0, 2]])},
            BindingError,
            "gives pipeline 1 2 tokens, but the strategy gives it 3",
        ),
        ({"cu_seqlens": np.array([[0, 5]])}, ShapeError, "has 1 rows, but the group has 2 pipelines"),
        ({"seq_lens": [2**30, 2**30], "cu_seqlens": [0, 2**31]}, StrategyError, "expected at most 2147483647"),
    ],
)
def test_bad_layouts_are_refused(changed: dict[str, Any], error: type[HetuError], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        build(**changed)
    assert "fix:" in str(caught.value) and "where:  test_layout.py" in str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "spans", "error", "text"),
    [
        ([[3]], [[(0, 0, 0, 3)]], ShapeError, r"spans \(n, 5\)"),
        ([[3], [3]], [[(0, 0, 0, 3, 1)]], ShapeError, "2 lists of lengths for 1 context groups"),
        ([[3]], [[(2, 0, 0, 3, 1)]], StrategyError, r"not of pipelines \[0, 1\]"),
        ([[3]], [[(0, 1, 0, 3, 1)]], StrategyError, "documents 0 to 0"),
        ([[3]], [[(0, 0, 0, 3, 0)]], StrategyError, "step below 1"),
        ([[3]], [[(0, 0, 0, 4, 1)]], StrategyError, "has 3 tokens, but a span reaches position 3"),
        ([[3]], [[(0, 0, 0, 2, 1)]], StrategyError, "position 2 of document 0 lies on 0 pipelines"),
        ([[3]], [[(0, 0, 0, 3, 1), (1, 0, 2, 1, 1)]], StrategyError, "position 2 of document 0 lies on 2 pipelines"),
        (
            [[3]],
            [[(0, 0, 1, 2, 1), (0, 0, 0, 1, 1)]],
            StrategyError,
            "document 0 from position 0 follows document 0 up to",
        ),
        (
            [[1, 1]],
            [[(0, 1, 0, 1, 1), (0, 0, 0, 1, 1)]],
            StrategyError,
            "document 0 from position 0 follows document 1",
        ),
    ],
)
def test_bad_custom_layouts_are_refused(lengths: Any, spans: Any, error: type[HetuError], text: str) -> None:
    with pytest.raises(error, match=text):
        Layout.from_spans([0, 0], lengths, spans)


def test_a_custom_batch_must_be_even() -> None:
    with pytest.raises(StrategyError, match="more of one sequence"):
        Layout.from_spans([0], [[1, 2]], [[(0, 0, 0, 1, 1), (0, 1, 0, 2, 1)]], is_packed=False)


def test_wrong_arrays_are_refused() -> None:
    layout = Layout.build([2, 3], [0, 0])
    with pytest.raises(ShapeError, match="2 arrays in x for 1 context groups"):
        layout.scatter([np.zeros(5), np.zeros(5)])
    with pytest.raises(ShapeError, match="group 0 has 5 tokens, but 4 rows came"):
        layout.scatter(np.zeros(4))
    with pytest.raises(ShapeError, match="1 shards for 2 pipelines"):
        layout.gather([np.zeros(2)])
    with pytest.raises(ShapeError, match="pipeline 1 holds 3 rows, but its shard has 2"):
        layout.gather([np.zeros(2), np.zeros(2)])


def test_strategies() -> None:
    strategy = Strategy((1, 2, 3), (5, 0, 5))
    assert strategy.num_pipelines == 3 and strategy.evaluate(lambda _: 0) == ((1, 2, 3), (5, 0, 5))
    assert list(groups_of(strategy.groups).items()) == [(0, (1,)), (5, (0, 2))]
    for lens, groups in (((1,), (0, 0)), ((), ()), ((-1,), (0,))):
        with pytest.raises(StrategyError):
            Strategy(lens, groups)
    s = hetu.IntSymbol("s", min=None)
    assert Strategy((s, 4), (0, 0)).evaluate(lambda symbol: 7) == ((7, 4), (0, 0))
    with pytest.raises(StrategyError, match="pipeline 0 holds -7"):
        Strategy((s, 4), (0, 0)).evaluate(lambda symbol: -7)


def test_strategies_are_values() -> None:
    s = hetu.IntSymbol("s")
    one = Strategy([s, np.int64(4), hetu.IntSymbol.from_expr((s - s).expr)], np.array([0, 1, 0]), "mine")
    assert (
        one == Strategy((s, 4, 0), (0, 1, 0), name="mine") and len({one, Strategy((s, 4, 0), (0, 1, 0), "mine")}) == 1
    )
    assert one != Strategy((s, 4, 0), (0, 1, 0)) and one.says_the_same_as(Strategy((s, 4, 0), (0, 1, 0)))
    assert str(one) == "mine: [s, 4, 0] in groups [0, 1, 0]"
    assert isinstance(one.groups[1], int) and not isinstance(one.groups[1], np.integer)


@pytest.mark.parametrize(
    ("lengths", "groups", "name", "text"),
    [
        (5, [0], None, "expected lengths to be a list of ints or symbols, got 5"),
        ("ab", [0, 0], None, "expected lengths to be a list of ints or symbols, got 'ab'"),
        (iter([2, 3]), [0, 0], None, "expected lengths to be a list"),
        ([2, None], [0, 0], None, r"expected lengths\[1\] to be an int or an IntSymbol, got None"),
        ([2, 1.0], [0, 0], None, r"lengths\[1\] to be an int or an IntSymbol, got 1.0"),
        ([2, True], [0, 0], None, r"lengths\[1\] to be an int or an IntSymbol, got True"),
        ([2, 3], [0, "a"], None, r"groups\[1\] to be an int or an IntSymbol, got 'a'"),
        ([2, 3], [0, False], None, r"groups\[1\] to be an int or an IntSymbol, got False"),
        (np.array([2.0, 3.0]), [0, 0], None, r"lengths\[0\] to be an int or an IntSymbol"),
        (torch.tensor([True, False]), [0, 0], None, r"lengths\[0\] to be an int or an IntSymbol"),
        ({2, 3}, [0, 0], None, "expected lengths to be a list"),
        ([2, 3], [0, 0], 5, "name is 5"),
        ([2, 3], [0, 0], "auto", "name is 'auto'"),
    ],
)
def test_what_is_no_strategy(lengths: Any, groups: Any, name: Any, text: str) -> None:
    with pytest.raises(StrategyError, match=text) as caught:
        hetu.Strategy(lengths, groups, name)
    assert "where:  test_layout.py:" in str(caught.value)


GROUPS = [7, 0, 7]
PACKS = {0: np.array([0, 1, 3]), 7: np.array([0, 3])}


@pytest.mark.parametrize(
    "x", [5, None, "abc", [np.arange(3), None], {7: np.arange(3), 0: 5}, {7: np.arange(3), 0: [1]}]
)
def test_what_is_no_rows_is_not_scattered(x: Any) -> None:
    with pytest.raises(ShapeError):
        Layout.build([2, 3, 1], GROUPS).scatter(x)


@pytest.mark.parametrize("batch", [1.5, None, "ab", {0: 1.5, 7: 2}, [1, True]])
def test_a_batch_is_an_int(batch: Any) -> None:
    with pytest.raises(StrategyError, match="batch"):
        Layout.build([2, 3, 1], GROUPS, batch=batch)


def test_what_is_given_a_group_may_be_named_by_it() -> None:
    whole = {7: np.arange(3), 0: np.arange(10, 13)}
    layout = Layout.build([2, 3, 1], GROUPS)
    assert [group.value for group in layout.groups] == [0, 7]
    for x in (whole, [whole[0], whole[7]]):
        assert [shard.tolist() for shard in layout.scatter(x)] == [[0, 1], [10, 11, 12], [2]]
    for cu in (PACKS, dict(reversed(PACKS.items())), [PACKS[0], PACKS[7]]):
        packed = Layout.build([2, 3, 1], GROUPS, cu_seqlens=cu)
        assert [group.lengths.tolist() for group in packed.groups] == [[1, 2], [3]]
    assert (
        Layout.build([2, 3, 1], GROUPS, batch={7: 2, 0: 5}).digest()
        == Layout.build([2, 3, 1], GROUPS, batch=[5, 2]).digest()
    )
    custom = {0: [(1, 0, 0, 3, 1)], 7: [(0, 0, 0, 2, 1), (2, 0, 2, 1, 1)]}
    by_spans = Layout.from_spans(GROUPS, {7: [3], 0: [3]}, custom, is_packed=False)
    assert str(by_spans) == str(layout)
    assert by_spans.digest() == Layout.from_spans(GROUPS, [[3], [3]], [custom[0], custom[7]], is_packed=False).digest()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: Layout.build([2, 3, 1], GROUPS, batch=x(1)),
        lambda x: Layout.build([2, 3, 1], GROUPS, cu_seqlens=x(np.array([0, 3]))),
        lambda x: Layout.build([2, 3, 1], GROUPS).scatter(x(np.arange(3))),
        lambda x: Layout.from_spans(GROUPS, x([3]), [[], []]),
    ],
    ids=["batch", "cu_seqlens", "scatter", "from_spans"],
)
@pytest.mark.parametrize("keys", [[0], [0, 1], [0, 7, 8], [0, "7"], [False, 7], []], ids=str)
def test_a_dict_names_each_group_once(call: Any, keys: list[Any]) -> None:
    with pytest.raises((StrategyError, ShapeError), match=r"for the context groups .* the strategy's are 0, 7"):
        call(lambda value: dict.fromkeys(keys, value))
