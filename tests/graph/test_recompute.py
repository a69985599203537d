"""hetu.recompute: which nodes a backward computes again, and how they are told from their originals."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.scopes import RandomScopes

import hetu
from hetu.graph import Node
from hetu.runtime.ranks.digests import graph_digest

X = np.array([0.5, -1.0, 2.0])


def started() -> tuple[hetu.Graph, hetu.Tensor]:
    g = hetu.graph("define_and_run", device="cpu")
    with g:
        x = hetu.placeholder("float64", [3], name="x")
    return g, x


def again(g: hetu.Graph) -> list[str]:
    """The names of the nodes that are computed again, once for each time."""
    return [node.original.name for node in g.nodes if node.original is not None]


def live(g: hetu.Graph, *fetches: hetu.Tensor) -> list[Node]:
    """What a run of these fetches computes."""
    return list(g.planner.subgraph(fetches).nodes)


def counted(g: hetu.Graph, *fetches: hetu.Tensor) -> Counter[str]:
    return Counter(node.definition.name for node in live(g, *fetches))


def test_a_backward_reads_clones_and_what_is_read_outside() -> None:
    g, x = started()
    with g:
        with hetu.recompute():
            a = hetu.tanh(x, name="a")
            b = hetu.exp(a, name="b")
        y = hetu.sum(hetu.silu(b))
        dx = hetu.gradients(y, x)
    g.verify()
    assert again(g) == ["a"]  # b is what the next layer reads
    (clone,) = [node for node in g.nodes if node.original is not None]
    assert clone.name != "a" and clone.where == a.op.where and clone.attrs == a.op.attrs
    assert (clone.outputs[0].dtype, clone.outputs[0].symbolic_shape) == (a.dtype, a.symbolic_shape)
    readers = {node.definition.name: set(node.tensors) for node in live(g, y, dx)}
    assert clone.outputs[0] in readers["tanh_grad"] and a not in readers["tanh_grad"]
    assert b in readers["silu_grad"]
    assert counted(g, y, dx)["tanh"] == 2 and counted(g, y, dx)["exp"] == 1  # the clone is not merged with its original
    exact = torch.from_numpy(X).requires_grad_()
    torch.nn.functional.silu(exact.tanh().exp()).sum().backward()
    torch.testing.assert_close(g.run(dx, {x: X}), exact.grad, rtol=1e-12, atol=0)


def test_of_several_outputs_those_are_kept_that_are_read_outside() -> None:
    g, x = started()
    with g:
        with hetu.recompute():
            p, q = hetu.split(hetu.tanh(x), [1, 2])
            h = hetu.silu(p) + hetu.silu(q)
            y = hetu.exp(hetu.sum(h), name="y")
        z = hetu.sum(hetu.silu(p))
        dx = hetu.gradients([y, z], x)
    assert again(g) == ["tanh_0", "split_0"]  # y is there for who fetches it
    (clone,) = [node for node in g.nodes if node.original is q.op]
    read = [node.tensors[1] for node in g.nodes if node.definition.name == "silu_grad"]
    assert set(read) == {p, clone.outputs[1]}
    exact = torch.from_numpy(X).requires_grad_()
    a, b = exact.tanh().split([1, 2])
    silu = torch.nn.functional.silu
    ((silu(a) + silu(b)).sum().exp() + silu(a).sum()).backward()
    torch.testing.assert_close(g.run(dx, {x: X}), exact.grad, rtol=1e-12, atol=0)


def test_clones_come_when_the_backward_gets_there() -> None:
    """Nodes are computed in the order of the list: the clones of the first layer come after the second's backward."""
    g, x = started()
    with g:
        h = x
        for layer in range(2):
            with hetu.recompute():
                h = hetu.exp(hetu.tanh(h, name=f"tanh{layer}"))
        hetu.gradients(hetu.sum(h * h), x)
    order = [node.original.name if node.original else node.definition.name for node in g.nodes[g.nodes.index(h.op) :]]
    places = [order.index("tanh1"), order.index("tanh_grad"), order.index("tanh0")]
    assert places == sorted(places)


def test_clones_that_nothing_reads_are_taken_back() -> None:
    g, x = started()
    with g:
        with hetu.recompute():
            y = hetu.sum((hetu.tanh(x, name="t") + 1) * 2)
        before = len(g.nodes)
        dx = hetu.gradients(y, x)
        assert again(g) == ["t"]
        assert [node.id for node in g.nodes] == list(range(len(g.nodes)))
        hetu.tanh(dx, name="add_0.again_0")  # the name of what was taken back is free
        hetu.gradients(y, x)
    assert again(g) == ["t", "t"] and len(g.nodes) - before < 14
    g.verify()


def test_an_error_names_no_clones() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [6, 24], name="x")
        with hetu.recompute(attention=True):
            h = hetu.parallel_attn(x, 8, 1, [[6]], [[0]], name="one")[0]
            h = hetu.parallel_attn(hetu.concat([h, h, h], 1), 8, 1, [[6]], [[1]], name="other")[0]
            hetu.gradients(hetu.sum(hetu.tanh(h)), x)
    assert again(g)
    with pytest.raises(hetu.StrategyError, match=r"have different layouts: one, other\n"):
        g.layout(0)


def test_without_scopes_a_graph_is_as_it_was() -> None:
    g, x = started()
    with g:
        y = hetu.sum(hetu.exp(hetu.tanh(x)))
        with hetu.recompute():
            pass
        hetu.gradients(y, x)
    assert not again(g)
    assert not any(node.scopes or node.backward is not None for node in g.nodes)


def test_a_policy_names_what_is_computed_again() -> None:
    for policy in ({"tanh"}, ["tanh"], ("tanh", "tanh"), frozenset({"tanh", "linear"}), {"tanh": 1}.keys()):
        g, x = started()
        with g, hetu.recompute(policy):
            y = hetu.sum(hetu.exp(hetu.tanh(x, name="t")))
        hetu.gradients(y, x)
        assert again(g) == ["t"]
    g, x = started()
    with g, hetu.recompute(set()):
        y = hetu.sum(hetu.exp(hetu.tanh(x)))
    hetu.gradients(y, x)
    assert again(g) == []


@pytest.mark.parametrize(
    ("policy", "attention", "message"),
    [
        ("tanh", False, "expected policy to be a set of names of ops, got 'tanh'"),
        (b"tanh", False, "expected policy to be a set of names of ops"),
        (3, False, "expected policy to be a set of names of ops, got 3"),
        (True, False, "expected policy to be a set of names of ops, got True"),
        (lambda node: True, False, "expected policy to be a set of names of ops"),
        ({"tanh": True}, False, "expected policy to be a set of names of ops"),
        ({"tahn", "exp"}, False, "policy names 'tahn', and there is no such op(.|\n)*did you mean tanh"),
        ({"tanh_grad"}, False, "no such op"),
        ({"zzzzzz"}, False, r"print\(g\) shows the names"),
        ([["tanh"]], False, "no such op"),
        ({"all_reduce"}, False, "all_reduce, whose output is always kept"),
        ({"parameter"}, False, "always kept"),
        ({"step_sum"}, False, "always kept"),
        ({"layout_tokens"}, False, "always kept"),
        ({"attn_varlen", "tanh"}, False, "attn_varlen, which is kept without attention=True"),
        ({"tanh"}, True, "attention is True, but policy names no attention"),
        (None, 1, "expected attention to be a bool, got 1"),
    ],
)
def test_refused(policy: Any, attention: Any, message: str) -> None:
    with pytest.raises(hetu.HetuError, match=message) as caught:
        hetu.recompute(policy, attention=attention)
    assert "test_recompute.py" in str(caught.value)


def scopes_of(tensor: hetu.Tensor) -> int:
    return len(tensor.op.scopes)


def test_scopes_are_entered_and_left_in_any_order() -> None:
    g, x = started()
    one, other = hetu.recompute(), hetu.recompute({"tanh"})
    with g:
        with one:
            a = hetu.tanh(x)
        with one:
            b = hetu.tanh(a)
            with one:
                c = hetu.tanh(b)
        assert a.op.scopes != b.op.scopes == c.op.scopes[:1] and scopes_of(c) == 2
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        d = hetu.tanh(c)
        assert [scope.rule for scope in d.op.scopes] == [other]
        other.__exit__(None, None, None)
        other.__exit__(None, None, None)  # as with hetu.autocast, nothing is there to leave
        with pytest.raises(hetu.HetuError, match="expected x to be"), hetu.recompute():
            hetu.tanh("x")  # type: ignore[arg-type]
        assert scopes_of(hetu.tanh(d)) == 0
        with hetu.recompute():
            found = list[int]()
            thread = threading.Thread(target=lambda: found.append(scopes_of(hetu.tanh(d))))
            thread.start()
            thread.join()
            assert found == [0]
            inside = hetu.gradients(hetu.sum(d), x)
    assert scopes_of(inside) == 0


def test_scopes_may_hold_nodes_of_two_graphs() -> None:
    (g, x), (f, z) = started(), started()
    with hetu.recompute():
        y = hetu.sum(hetu.exp(hetu.tanh(x, name="t")))
        v = hetu.sum(hetu.exp(hetu.exp(z, name="e")))
    dx, dz = hetu.gradients(y, x), hetu.gradients(v, z)
    assert (again(g)[0], again(f)[0]) == ("t", "e")
    np.testing.assert_allclose(g.run(dx, {x: X}), np.exp(np.tanh(X)) * (1 - np.tanh(X) ** 2), rtol=1e-12)
    np.testing.assert_allclose(f.run(dz, {z: X}), np.exp(np.exp(X)) * np.exp(X), rtol=1e-12)


def test_what_communicates_and_attention_are_kept() -> None:
    rows = hetu.IntSymbol("rows")

    def built(**options: Any) -> Counter[str]:
        with hetu.graph("define_and_run", device="cpu") as g:
            x = hetu.placeholder("float32", [rows, 24], name="x")
            cu = hetu.placeholder("int32", [2], name="cu")
            with hetu.recompute(**options):
                offsets = hetu.cast(cu * 1, "int32")
                h = hetu.tanh(x) * hetu.all_reduce(hetu.mean(hetu.tanh(x)))
                h = hetu.tanh(hetu.parallel_attn(h, 8, 1, [[rows]], [[0]])[0])
                q, k, v = h, hetu.tanh(h), hetu.tanh(h)
                h = hetu.tanh(hetu.attn_varlen(q, k, v, 8, offsets, offsets, is_causal=True)[0])
            grads = hetu.gradients(hetu.sum(h * h), x)
        g.verify()
        clones = [node for node in g.nodes if node.original is not None]
        assert all(clone.symbols == clone.original.symbols for clone in clones if clone.original)
        # Planning reads what the forward's offsets are, and does not compute them twice.
        offsets_read = {
            node.input("cu_seqlens_q") for node in live(g, grads) if "cu_seqlens_q" in node.definition.inputs
        }
        assert offsets_read <= {offsets, None}
        g.layout(0, int_symbol_dict={rows: 3})  # clones don't make it ambiguous
        return counted(g, grads)

    found = built()
    assert (found["parallel_attn"], found["attn_varlen"], found["all_reduce"]) == (1, 1, 2)  # one is a gradient's
    assert found["tanh"] == 4 + 3  # those that are equal are computed once; the last one is read outside
    found = built(attention=True)
    assert (found["parallel_attn"], found["attn_varlen"], found["all_reduce"]) == (2, 2, 2)


def test_nested_scopes_compute_again_level_by_level() -> None:
    g, x = started()
    with g:
        with hetu.recompute():
            h = hetu.tanh(x, name="before")
            with hetu.recompute():
                h = hetu.exp(hetu.tanh(h, name="inside"))
            h = hetu.tanh(h, name="after")
            h = hetu.tanh(h)
        y = hetu.sum(h * h)
        dx = hetu.gradients(y, x)
    live_again = Counter(node.original.name for node in live(g, y, dx) if node.original is not None)
    # The outer backward goes once through all to get at "after", the inner one once more through what it gave.
    assert live_again == {"before": 1, "inside": 2, "after": 1, "exp_0": 1}
    assert again(g).index("after") < len(again(g)) - 1 - again(g)[::-1].index("inside")


def test_what_is_asked_for_twice_is_computed_again_once() -> None:
    g, x = started()
    with g:
        with hetu.recompute():
            h = hetu.dropout(hetu.exp(hetu.tanh(x)), 0.5)
            h = hetu.silu(h)
        y, z = hetu.sum(h), hetu.sum(h * h)
        one, other, third = hetu.gradients(y, x), hetu.gradients(y, x), hetu.gradients(z, x)
    assert len(live(g, y, one, other)) < len(live(g, y, one)) + 8
    assert counted(g, y, one, other)["tanh"] == counted(g, y, one)["tanh"] == 2
    assert counted(g, y, one, third)["tanh"] == 3  # or what is there for one backward would wait for the other


def test_a_backward_does_not_read_the_forward_by_merging() -> None:
    """The gradient of a cube has a square in it, which the forward has as well."""
    g, x = started()
    with g:
        with hetu.recompute():
            y = hetu.sum(hetu.tanh(x**2) + x**3)
        dx = hetu.gradients(y, x)
    (square,) = [node for node in g.nodes if node.definition.name == "pow" and node.inputs[1] == 2 and node.scopes]
    nodes, replaced = live(g, y, dx), g.planner.subgraph([y, dx]).replaced
    readers = [
        node
        for node in nodes
        if square.outputs[0] in [replaced.get(item, item) for item in node.tensors] and not node.scopes
    ]
    assert readers == []


def test_clones_draw_what_their_originals_draw() -> None:
    def built(scope: Any) -> list[Any]:
        hetu.manual_seed(7)
        with hetu.graph("define_and_run", device="cpu") as g:
            x = hetu.placeholder("float64", [64], name="x")
            h = hetu.dropout(x, 0.5)
            with scope:
                h = hetu.dropout(hetu.tanh(hetu.dropout(h, 0.5)), 0.5)
                h = hetu.silu(h)
            h = hetu.dropout(h, 0.5)
            dx = hetu.gradients(hetu.sum(h), x)
        assert g.planner.subgraph([dx]).draws == 4
        return [item.tolist() for _ in range(2) for item in g.run([h, dx], {x: np.linspace(-2, 2, 64)})]

    assert built(hetu.recompute()) == built(nullcontext())


def test_gradients_with_respect_to_and_of_what_stands_inside() -> None:
    def built(scope: Any) -> list[Any]:
        g, x = started()
        with g:
            with scope:
                a = hetu.tanh(x)
                b = hetu.exp(a * 2 - hetu.stop_gradient(hetu.exp(a)))
                y, z = hetu.sum(b * b), hetu.sum(hetu.silu(b))
            c = hetu.sum(hetu.tanh(b))
            grads = [
                *hetu.gradients([y, z, c], [a, x, b]),
                hetu.gradients(b, x, grad_ys=a),
                hetu.gradients(y, b),
                hetu.gradients([a, b], [x, a])[0],
            ]
        assert bool(again(g)) == isinstance(scope, hetu.recompute)
        g.verify()
        return [item.tolist() for item in g.run([a, b, y, *grads], {x: X})]

    assert built(hetu.recompute()) == built(nullcontext())


def test_gradients_of_gradients() -> None:
    def built(scope: Any) -> Sequence[torch.Tensor]:
        g, x = started()
        with g:
            with scope:
                h = hetu.exp(hetu.tanh(x))
                h = h * hetu.sigmoid(h)
            with hetu.recompute() if isinstance(scope, hetu.recompute) else nullcontext():
                y = hetu.sum(h**3)
            dx = hetu.gradients(y, x)
            ddx = hetu.gradients(hetu.sum(dx * dx), x)
            dddx = hetu.gradients(hetu.sum(ddx), x)
        values: Sequence[torch.Tensor] = g.run([dx, ddx, dddx], {x: X})
        return values

    for got, wanted in zip(built(hetu.recompute()), built(nullcontext()), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_casts_of_autocast_are_computed_again() -> None:
    with hetu.graph("define_and_run", device="cpu") as g:
        x = hetu.placeholder("float32", [2, 4], name="x")
        w = hetu.parameter(0.5, [4, 4], name="w")
        with hetu.autocast(hetu.bfloat16), hetu.recompute():
            y = hetu.sum(hetu.cast(hetu.silu(hetu.linear(x, w)), "float32"))
        hetu.gradients(y, w)
    repeated = [node for node in g.nodes if node.original is not None]
    assert [node.definition.name for node in repeated] == ["cast", "cast", "linear"]
    assert repeated[2].tensors == (repeated[0].outputs[0], repeated[1].outputs[0])
    assert repeated[2].outputs[0].dtype == hetu.bfloat16


def test_the_printout_says_what_is_kept() -> None:
    g, x = started()
    with g, hetu.recompute():
        a = hetu.tanh(x, name="a")
        with hetu.recompute({"tanh"}):
            y = hetu.sum(hetu.exp(a, name="b"), name="y")
        w = hetu.parameter(0.0, [3], name="w")
        c = hetu.exp(a, name="c")

    def marks() -> dict[str, str]:
        lines = [line.split("#") for line in str(g).splitlines() if "#" in line]
        return {left.split(":")[0].strip(" %"): right.partition(", ")[2] for left, right in lines}

    scopes = {"a": "recompute 0", "b": "recompute 0/1", "y": "recompute 0/1", "c": "recompute 0"}
    assert marks() == {"x": "", "w": "", **scopes}
    hetu.gradients(y + hetu.sum(w * c), [x, w])
    found = marks()
    assert found["a"] == "recompute 0: computed again"
    assert found["b"] == "recompute 0/1: computed again"
    assert found["c"] == "recompute 0: kept"
    assert found["y"] == "recompute 0/1"  # no backward reads it
    assert found["a.again_0"] == "a again"
    assert found["tanh_grad_0"] == ""


def test_ranks_digests_know_of_clones() -> None:
    def built(scope: Any) -> str:
        g, x = started()
        with g, scope:
            hetu.gradients(hetu.sum(hetu.exp(hetu.tanh(x))), x)
        return graph_digest(g).whole

    plain, one, other = built(nullcontext()), built(hetu.recompute()), built(hetu.recompute({"exp"}))
    assert len({plain, one, other}) == 3
    assert built(hetu.recompute()) == one


@pytest.mark.parametrize("seed", range(30))
def test_scopes_that_overlap_anyhow(seed: int) -> None:
    """Chains with branches, in scopes that open and close anywhere: the bits are those without any."""

    def built(is_scoped: bool) -> tuple[str, int]:
        rng = np.random.default_rng(seed)
        g, x = started()
        with g, RandomScopes(seed) as scopes:
            made = [x]
            for _ in range(15):
                if is_scoped:
                    scopes.shift()
                made.append(step(made[-1], made[int(rng.integers(len(made)))], int(rng.integers(5))))
            grads = hetu.gradients([made[-1], made[-3]], [x, made[4]])
        g.verify()
        return str([item.tolist() for item in g.run([made[-1], *grads], {x: X})]), len(again(g))

    (found, repeated), (wanted, _) = built(True), built(False)
    assert found == wanted and "nan" not in found
    assert repeated


def step(a: hetu.Tensor, b: hetu.Tensor, kind: int) -> hetu.Tensor:
    """One of some ops whose gradients read what they read or what they gave."""
    makers = (
        hetu.tanh,
        hetu.silu,
        lambda a: a * hetu.sigmoid(b),
        lambda a: a + b,
        lambda a: hetu.exp(hetu.tanh(a) - b),
    )
    return hetu.tanh(makers[kind](a))
