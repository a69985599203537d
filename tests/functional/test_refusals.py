"""What hetu.functional.attn_varlen refuses, before anything is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.functional_calls import Watching, cumulative, op_arguments

import hetu
from hetu import functional
from hetu.backends.families import family
from hetu.config import BACKENDS
from hetu.functional import attn_varlen


def call(**changes: Any) -> torch.Tensor:
    q, k, v, cu_q, cu_k, *_ = op_arguments(requires_grad=False)
    given_ = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    return attn_varlen(**{name: changes.pop(name, x) for name, x in given_.items()}, **changes)


X, KV = torch.zeros(10, 4, 16), torch.zeros(12, 2, 16)

BAD: list[tuple[dict[str, Any], type[hetu.HetuError], str]] = [
    ({"q": [1.0]}, hetu.DTypeError, "q must be a tensor, got [1.0]"),
    ({"cu_seqlens_k": [0, 4]}, hetu.DTypeError, "cu_seqlens_k must be a tensor, got [0, 4]"),
    ({"q": X.int()}, hetu.DTypeError, "q is int32, expected float16, bfloat16, float32, float64"),
    ({"k": KV.half()}, hetu.DTypeError, "q, k and v are float32, float16 and float32, expected one dtype"),
    ({"k": KV[None]}, hetu.ShapeError, "k has 4 dimensions [1, 12, 2, 16], expected 3"),
    ({"q": X.flatten(1)}, hetu.ShapeError, "q has 2 dimensions [10, 64], expected 3"),
    ({"v": KV[:, :, :8]}, hetu.ShapeError, "q, k and v have head_dim 16, 16 and 8, expected the same"),
    (
        {"q": X[:, :, :12], "k": KV[:, :, :12], "v": KV[:, :, :12]},
        hetu.ShapeError,
        "head_dim is 12, expected a multiple",
    ),
    ({"q": X[:, :, :0], "k": KV[:, :, :0], "v": KV[:, :, :0]}, hetu.ShapeError, "head_dim is 0, expected a multiple"),
    ({n: torch.zeros(9, 2, 264) for n in "qkv"}, hetu.ShapeError, "head_dim is 264, expected a multiple"),
    ({"v": KV[:11]}, hetu.ShapeError, "k has 12 rows and v has 11 rows, expected as many"),
    ({"q": X[:, :3]}, hetu.ShapeError, "q, k and v have 3, 2 and 2 heads, expected as many"),
    ({"v": KV[:, :1]}, hetu.ShapeError, "q, k and v have 4, 2 and 1 heads, expected as many"),
    ({"k": KV[:, :0], "v": KV[:, :0]}, hetu.ShapeError, "q, k and v have 4, 0 and 0 heads, expected as many"),
    ({"q": X[:, :0]}, hetu.ShapeError, "q, k and v have 0, 2 and 2 heads, expected as many"),
    ({"v": KV.to("meta")}, hetu.HetuError, "q, k and v are on cpu, cpu and meta, expected one device"),
    ({"cu_seqlens_q": torch.zeros(4)}, hetu.DTypeError, "cu_seqlens_q is float32, expected int32 or int64"),
    (
        {"cu_seqlens_q": cumulative([3, 0, 5])[None]},
        hetu.ShapeError,
        "cu_seqlens_q has 2 dimensions [1, 4], expected 1",
    ),
    (
        {"cu_seqlens_q": cumulative([3, 0, 5]).view(torch.float32)},
        hetu.DTypeError,
        "cu_seqlens_q is float32, expected int32 or int64",
    ),
    ({"cu_seqlens_k": cumulative([2, 3])[None]}, hetu.ShapeError, "cu_seqlens_k has 2 dimensions [1, 3], expected 1"),
    ({"cu_seqlens_q": cumulative([])[:0]}, hetu.ShapeError, "cu_seqlens_q is empty, expected at least its first"),
    ({"cu_seqlens_q": cumulative([2])}, hetu.ShapeError, "cu_seqlens_q and cu_seqlens_k have 2 and 4 entries"),
    ({"cu_seqlens_q": cumulative([1, 2, 3]) + 1}, hetu.BindingError, "cu_seqlens_q starts with 1, expected 0"),
    ({"cu_seqlens_k": cumulative([6, -2, 3])}, hetu.BindingError, "cu_seqlens_k decreases from 6 to 4 at sequence 1"),
    ({"cu_seqlens_q": cumulative([3, 4, 5])}, hetu.BindingError, "cu_seqlens_q ends at 12, but q has 10 rows"),
    ({"cu_seqlens_k": cumulative([3, 4, 9])}, hetu.BindingError, "cu_seqlens_k ends at 16, but k has 12 rows"),
    ({"max_seqlen_q": 4}, hetu.BindingError, "max_seqlen_q is 4, but sequence 2 of cu_seqlens_q has 5 tokens"),
    ({"max_seqlen_k": 5}, hetu.BindingError, "max_seqlen_k is 5, but sequence 0 of cu_seqlens_k has 6 tokens"),
    ({"max_seqlen_q": 5.0}, hetu.DTypeError, "expected max_seqlen_q to be an int, got 5.0 (float)"),
    ({"max_seqlen_k": torch.tensor([9])}, hetu.DTypeError, "expected max_seqlen_k to be an int, got tensor([9])"),
    ({"dropout_p": 1.0}, hetu.HetuError, "dropout_p is 1.0, expected a probability in [0, 1)"),
    ({"dropout_p": -0.1}, hetu.HetuError, "dropout_p is -0.1, expected a probability in [0, 1)"),
    ({"dropout_p": "0.1"}, hetu.HetuError, "expected dropout_p to be a probability in [0, 1), got '0.1'"),
    ({"softmax_scale": float("nan")}, hetu.HetuError, "softmax_scale is nan, expected a finite number"),
    ({"softmax_scale": "1"}, hetu.HetuError, "expected softmax_scale to be a finite number, got '1' (str)"),
]


@pytest.fixture(params=[False, True], ids=["first", "after one like it"])
def is_after_another(request: pytest.FixtureRequest) -> None:
    """What was checked for one call must not be taken for checked in another."""
    if request.param:
        call()
        call(max_seqlen_q=5)


@pytest.fixture
def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any) -> Callable[..., None]:
        raise AssertionError("something was computed")

    for name in BACKENDS:
        monkeypatch.setattr(family(name), "attend", computed)


@pytest.mark.usefixtures("is_after_another", "computes_nothing")
@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_errors(changes: dict[str, Any], kind: type[hetu.HetuError], message: str) -> None:
    with pytest.raises(hetu.HetuError) as caught:
        call(**changes)
    text = str(caught.value)
    assert type(caught.value) is kind
    assert text.startswith(f"[attn_varlen] {message}")
    assert "\n  where:  test_refusals.py:" in text and "\n  fix:    " in text


@pytest.mark.usefixtures("computes_nothing")
def test_errors_point_at_the_user_also_through_the_dispatcher() -> None:
    with Watching(), pytest.raises(hetu.BindingError, match=r"where:  functional_calls.py:\d+ +return func\("):
        call(max_seqlen_q=4)
    q, *rest = op_arguments(p=0.5)
    with pytest.raises(hetu.HetuError, match=r"dropout has no rng_state"):
        torch.ops.hetu.attn_varlen(q, *rest[:4], None, *rest[5:])


def test_max_seqlen_of_the_longest_or_more_is_fine() -> None:
    assert torch.equal(call(max_seqlen_q=5, max_seqlen_k=6), call(max_seqlen_q=np.iinfo(np.int32).max))


def test_import_hetu_finds_it() -> None:
    assert hetu.functional is functional
    with pytest.raises(AttributeError, match="functionals"):
        _ = hetu.functionals


@pytest.mark.parametrize(
    "options",
    [
        {"max_seqlen_q": torch.tensor(5), "max_seqlen_k": np.int64(7)},
        {"softmax_scale": np.float32(0.25), "dropout_p": 0},
        {"softmax_scale": torch.tensor(0.25), "dropout_p": np.float16(0.5), "seed": np.int64(3)},
        {"is_causal": np.True_, "seed": torch.tensor(3), "dropout_p": torch.tensor(0.5, dtype=torch.float64)},
        {"return_lse": np.False_, "softmax_scale": 2},
    ],
    ids=str,
)
def test_scalars_of_numpy_and_torch_are_numbers(options: dict[str, Any]) -> None:
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in options.items()}
    assert torch.equal(call(**options), call(**plain))


@pytest.mark.parametrize("name", ["is_causal", "return_lse", "max_seqlen_q", "max_seqlen_k", "seed"])
@pytest.mark.parametrize("value", ["no", [], 1.5, np.float32(2), torch.ones(1), 2j], ids=repr)
def test_flags_and_ints_are_nothing_else(name: str, value: Any) -> None:
    for _ in range(2):
        with pytest.raises(hetu.HetuError, match=f"expected {name} to be an? (bool|int), got"):
            call(**{"dropout_p": 0.5, name: value})
        call(is_causal=True)  # equal to 1, under which a checked call would be found again
        with pytest.raises(hetu.HetuError, match="expected is_causal to be a bool"):
            call(is_causal=1)


# Tensors that have no rows in memory, or no values

STORED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nested": lambda x: torch.nested.nested_tensor([x[:1], x[1:]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged),
    "sparse_coo": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.usefixtures("is_after_another", "computes_nothing")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, "requires_grad"])
@pytest.mark.parametrize("name", ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("kind", STORED)
def test_nested_sparse_and_meta_tensors(kind: str, name: str, mode: Any) -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments(requires_grad=False)
    given_ = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    given_[name] = STORED[kind](given_[name])
    if mode == "requires_grad":
        mode = contextlib.nullcontext
        given_ = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in given_.items()}
    word = {"nested": "nested tensor", "jagged": "nested tensor", "sparse_coo": "the layout sparse_coo"}.get(kind, kind)
    with mode():
        for call_it in (attn_varlen, by_op):
            if call_it is by_op and mode is torch.inference_mode and word == "nested tensor":
                continue  # torch refuses that before anything of an op is asked
            with pytest.raises(
                hetu.HetuError, match=rf"{'' if kind == 'meta' else name}.*{word}[^$]*where:  test_refusals"
            ):
                call_it(**given_)


def by_op(**given_: torch.Tensor) -> Any:
    return torch.ops.hetu.attn_varlen(*given_.values(), None, None, None, False, 0.0, None)


def test_lengths_without_values_are_refused_by_the_backward_too() -> None:
    q, k, v, cu_q, cu_k, *rest = op_arguments(requires_grad=False)
    out, lse = torch.ops.hetu.attn_varlen(q, k, v, cu_q, cu_k, *rest)
    with pytest.raises(hetu.HetuError, match="cu_seqlens_k is a meta tensor, which has no values"):
        torch.ops.hetu.attn_varlen_backward(out, None, q, k, v, out, lse, cu_q, cu_k.to("meta"), *rest)
