"""layout_tokens: it agrees with the layout, and what is made with it is the same under every strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from support.attention_cases import Case, cases, cu_seqlens

import hetu


def build(case: Case, width: int = 3) -> tuple[hetu.Graph, hetu.Tensor, list[hetu.Tensor], dict[Any, Any]]:
    """A graph with the tokens of a case, and what is fed besides x."""
    lens = [hetu.IntSymbol(f"n{r}") for r in range(len(case.lens))]
    feeds: dict[Any, Any] = {}
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), width], name="x")
        cu = None
        if case.packing:
            shape = [hetu.IntSymbol("pieces"), hetu.IntSymbol("b")][case.packing == "1d" :]
            cu = hetu.placeholder(hetu.int32, shape, name="cu")
            tables = {group: cu_seqlens(case, members) for group, members in case.members.items()}
            feeds[cu] = hetu.Shards([tables[group] for group in case.groups])
        tokens = hetu.layout_tokens(x, [lens], [case.groups], bool(case.packing), cu, split=case.split)
    return g, x, tokens, {"feeds": feeds, "symbols": dict(zip(lens, case.lens, strict=True))}


@given(case=cases())
def test_it_agrees_with_the_layout(case: Case) -> None:
    g, x, tokens, given_ = build(case)
    members = case.members
    tables = [cu_seqlens(case, m) for m in members.values()] if case.packing else None
    layout = hetu.Layout.build(case.lens, case.groups, split=case.split, batch=case.batch, cu_seqlens=tables)
    feeds = {x: hetu.Shards([np.zeros((layout.rows(r), 3), np.float32) for r in range(len(case.lens))])}
    results = g.run(tokens, {**feeds, **given_["feeds"]}, int_symbol_dict=given_["symbols"])
    position, document, token = ([x] if isinstance(x, torch.Tensor) else list(x) for x in results)
    for r in range(len(case.lens)):
        assert position[r].tolist() == layout.positions(r).tolist()
        assert document[r].tolist() == layout.documents(r).tolist()
    # Numbers count through all groups, document after document: gathered, they are 0, 1, 2, ...
    whole = layout.gather(token)
    counted = torch.cat(whole) if isinstance(whole, list) else whole
    assert counted.tolist() == list(range(len(counted)))


@pytest.mark.parametrize(
    ("lens", "groups"), [([12], [0]), ([5, 0, 7], [0, 0, 0]), ([4, 8], [0, 1]), ([3, 1, 8], [1, 0, 0])]
)
def test_rotary_and_dropout_are_the_same_under_every_strategy(lens: list[int], groups: list[int]) -> None:
    """Documents of 4 and 8 tokens, in one group or in two; where they are in two, the first has the lower number."""
    lists = [[4, 8]] if len(set(groups)) == 1 else [[4], [8]]
    if groups == [1, 0, 0]:
        lists, lens = [[4], [8]], [8, 1, 3]
    data = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    cu = [np.cumsum([0, *documents], dtype=np.int32) for documents in lists]
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows"), 16])
        fed = hetu.placeholder(hetu.int32, [hetu.IntSymbol("b")])
        position, _, token = hetu.layout_tokens(x, [lens], [groups], True, fed, split="sym")
        y = hetu.dropout(hetu.rotary(x, position, 8), 0.4, tokens=token)
    layout = hetu.Layout.build(lens, groups, split="sym", cu_seqlens=cu)
    shards = layout.scatter(data if len(cu) == 1 else list(data.split([4, 8])))
    hetu.manual_seed(3)
    got = g.run(y, {x: hetu.Shards(shards), fed: hetu.Shards([cu[sorted(set(groups)).index(v)] for v in groups])})
    whole = layout.gather([got] if isinstance(got, torch.Tensor) else list(got))
    whole = torch.cat(whole) if isinstance(whole, list) else whole

    with hetu.graph("define_and_run", device="cpu") as one:
        x = hetu.placeholder(hetu.float32, [12, 16])
        places = hetu.constant(np.concatenate([np.arange(4), np.arange(8)]))
        y = hetu.dropout(hetu.rotary(x, places, 8), 0.4, tokens=hetu.constant(np.arange(12)))
    hetu.manual_seed(3)
    assert torch.equal(whole, one.run(y, {x: data}))


def test_wrong_rows_are_refused() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder(hetu.float32, [hetu.IntSymbol("rows")])
        position = hetu.layout_tokens(x, [[4, 3]], [[0, 0]])[0]
    with pytest.raises(hetu.BindingError, match="x has 3 rows on pipeline 0, but the strategy gives it 4 tokens"):
        g.run(position, {x: hetu.Shards([np.zeros(3, np.float32), np.zeros(3, np.float32)])})
