"""Derivatives of the PyTorch function and its op other than by plain backward: forward mode, batches, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.functional_calls import BACKENDS, DTYPES, cumulative
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.utils.checkpoint import checkpoint

import hetu
from hetu.functional import attn_varlen

CU_Q, CU_K = cumulative([2, 3]), cumulative([1, 4])


def by_function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0) -> tuple[torch.Tensor, ...]:
    return attn_varlen(q, k, v, CU_Q, CU_K, is_causal=True, return_lse=True, dropout_p=p, seed=3)


def by_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float = 0.0) -> tuple[torch.Tensor, ...]:
    state = torch.tensor([3, 0]) if p else None
    return torch.ops.hetu.attn_varlen(q, k, v, CU_Q, CU_K, state, None, None, True, p, None)


Attend = Callable[..., tuple[torch.Tensor, ...]]
BOTH = pytest.mark.parametrize("attend", [by_function, by_op])
NO_FALLBACK = pytest.mark.filterwarnings("error:.*performance drop")
"""There is a batching rule; torch's own loop warns."""
ON_EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries of two heads, and keys and values of one that both share."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, heads, 8, generator=generator).to(dtype) for heads in (2, 1, 1))


def like(x: torch.Tensor, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, *x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


# Forward mode


REFUSED = r" has a tangent, but attn_varlen has no forward-mode derivative\s+where:  test_derivatives.*\s+fix: .*vjp"


@BOTH
@ON_EACH_BACKEND
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_dual_numbers_are_refused(which: int, dtype: torch.dtype, backend: str, attend: Attend) -> None:
    for requires_grad in (False, True):
        given = list(operands(dtype))
        with hetu.config(backend=backend), forward_ad.dual_level():
            x = given[which].detach().requires_grad_(requires_grad)
            given[which] = forward_ad.make_dual(x, like(x))
            with pytest.raises(hetu.HetuError, match=f"{'qkv'[which]}{REFUSED}"):
                attend(*given)
            with torch.no_grad(), pytest.raises(hetu.HetuError, match=REFUSED):
                attend(*given)


TRANSFORMS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], Any]] = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,)),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x, t: torch.func.linearize(f, x),
    "jvp of vmap": lambda f, x, t: torch.func.jvp(torch.vmap(f), (x[None],), (t[None],)),
    "vmap of jvp": lambda f, x, t: torch.vmap(lambda x, t: torch.func.jvp(f, (x,), (t,)))(x[None], t[None]),
    "jvp of jvp": lambda f, x, t: torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (t,)), (x,), (t,)),
    "jvp of grad": lambda f, x, t: torch.func.jvp(torch.func.grad(lambda x: f(x).sum()), (x,), (t,)),
    "grad of jvp": lambda f, x, t: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (t,))[1].sum())(x),
    "hessian": lambda f, x, t: torch.func.hessian(lambda x: f(x).sum())(x),
    "checkpoint": lambda f, x, t: torch.func.jvp(lambda x: checkpoint(f, x, use_reentrant=False), (x,), (t,)),
    "forward-mode jacobian": lambda f, x, t: jacobian(f, x, vectorize=True, strategy="forward-mode"),
}


@BOTH
@pytest.mark.parametrize("output", [0, 1], ids=["out", "lse"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_by_forward_mode_are_refused(name: str, output: int, attend: Attend) -> None:
    q, k, v = operands(torch.float64)
    with pytest.raises(hetu.HetuError, match=REFUSED):
        TRANSFORMS[name](lambda q: attend(q, k, v)[output], q, like(q))


@BOTH
def test_forward_mode_of_the_backward_is_refused(attend: Attend) -> None:
    q, k, v = operands()
    q.requires_grad_()
    out, _ = attend(q, k, v)
    with forward_ad.dual_level(), pytest.raises(hetu.HetuError, match=f"dout{REFUSED}"):
        torch.autograd.grad(out, q, forward_ad.make_dual(like(out), like(out)))


@BOTH
def test_forward_mode_around_it_may_be(attend: Attend) -> None:
    """What has no tangent is computed, and so is what a function of the user's own differentiates."""
    q, k, v = operands()
    out, tangent = torch.func.jvp(lambda x: attend(q, k, v)[0] * x, (q,), (like(q),))
    assert torch.equal(tangent, attend(q, k, v)[0] * like(q)) and torch.equal(out, attend(q, k, v)[0] * q)

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v)[0]

        @staticmethod
        def jvp(ctx: Any, t: torch.Tensor) -> torch.Tensor:
            return 2 * t

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(Own.apply(forward_ad.make_dual(q, like(q))))
    assert torch.equal(found.primal, attend(q, k, v)[0])
    assert torch.equal(found.tangent, 2 * like(q))


# Batches


def looped(attend: Attend, given: tuple[torch.Tensor, ...], douts: list[torch.Tensor], **options: Any) -> Any:
    """The gradients for a batch of those of out and lse, one after the other."""
    outputs = attend(*given, **options)
    each = [torch.autograd.grad(outputs, given, one, retain_graph=True) for one in zip(*douts, strict=True)]
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


@BOTH
@ON_EACH_BACKEND
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("batch", [1, 3])
def test_batched_gradients(batch: int, p: float, backend: str, attend: Attend) -> None:
    given = tuple(x.requires_grad_() for x in operands())
    with hetu.config(backend=backend):
        outputs = attend(*given, p)
        douts = [like(x, batch) for x in outputs]
        want = looped(attend, given, douts, p=p)
        got = torch.autograd.grad(outputs, given, douts, is_grads_batched=True, retain_graph=True)
        only_lse = torch.autograd.grad(outputs[1], given, douts[1], is_grads_batched=True, create_graph=True)
    assert all(torch.equal(mine, right) for mine, right in zip(got, want, strict=True))
    assert all(x.shape == y.shape for x, y in zip(only_lse, want, strict=True))


@NO_FALLBACK
@BOTH
@ON_EACH_BACKEND
def test_jacobians(backend: str, attend: Attend) -> None:
    q, k, v = operands()
    for output in (0, 1):

        def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: int = output) -> torch.Tensor:
            return attend(q, k, v)[output].flatten()[4:7]  # a whole one takes the interpreter minutes

        with hetu.config(backend=backend):
            want = jacobian(f, (q, k, v))
            vectorized = jacobian(f, (q, k, v), vectorize=True)
            by_func = torch.func.jacrev(f, (0, 1, 2))(q, k, v)
            in_chunks = torch.func.jacrev(f, (0, 1, 2), chunk_size=2)(q, k, v)
        for got in (vectorized, by_func, in_chunks):
            assert all(torch.equal(mine, right) for mine, right in zip(got, want, strict=True))


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_with_batched_gradients(p: float, attend: Attend) -> None:
    given = tuple(x.requires_grad_() for x in operands(torch.float64))
    seen = slice(1, None)  # the lse of the row before the first key is -inf: it has no finite differences

    def f(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse = attend(*given, p)
        return out, lse[:, seen]

    assert torch.autograd.gradcheck(f, given, check_batched_grad=True)


@NO_FALLBACK
@BOTH
@ON_EACH_BACKEND
def test_vmap_of_the_forward_and_of_gradients(backend: str, attend: Attend) -> None:
    _, k, v = operands()
    qs = torch.randn(3, 5, 2, 8, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def loss(q: torch.Tensor) -> torch.Tensor:
        out, lse = attend(q, k, v)
        return out.square().sum() + lse[:, 1:].sin().sum()

    with hetu.config(backend=backend):
        want = torch.stack([attend(q, k, v)[0] for q in qs])
        (want_grad,) = torch.autograd.grad(sum(map(loss, qs)), qs)
        assert torch.equal(torch.vmap(lambda q: attend(q, k, v)[0])(qs), want)
        inner = torch.vmap(lambda q: attend(q, k, v)[0], in_dims=2, out_dims=1)(qs.movedim(0, 2))
        assert torch.equal(inner.movedim(1, 0), want)
        twice = torch.vmap(torch.vmap(lambda q: attend(q, k, v)[0]))(qs[None])
        assert torch.equal(twice[0], want)
        assert torch.vmap(lambda q: attend(q, k, v))(qs[:0])[1].shape == (0, 2, 5)
        plain = torch.autograd.grad(torch.vmap(loss)(qs).sum(), qs)[0]
        for got in (
            plain,
            torch.vmap(torch.func.grad(loss))(qs.detach()),
            torch.func.grad(lambda qs: torch.vmap(loss)(qs).sum())(qs.detach()),
            torch.stack([torch.func.grad(loss)(q) for q in qs.detach()]),
            torch.stack([torch.func.vjp(loss, q)[1](torch.ones(()))[0] for q in qs.detach()]),
        ):
            torch.testing.assert_close(got, want_grad, atol=1e-6, rtol=0)


def test_vmap_over_lengths() -> None:
    q, k, v = operands()
    lengths = torch.tensor([[0, 2, 5], [0, 5, 5], [0, 0, 4]])
    got = torch.vmap(lambda cu: attn_varlen(q, k, v, cu, cu))(lengths)
    assert torch.equal(got, torch.stack([attn_varlen(q, k, v, cu, cu) for cu in lengths]))


def test_vmap_and_dropout() -> None:
    """Which weights are dropped is as vmap's randomness says, or the same for a seed."""
    q, k, v = operands()
    qs = q.expand(4, *q.shape)

    def draw(seed: int | None = None, **options: Any) -> torch.Tensor:
        attend = torch.vmap(lambda q: attn_varlen(q, k, v, CU_Q, CU_K, dropout_p=0.5, seed=seed), **options)
        return attend(qs)

    torch.manual_seed(0)
    same, different = draw(randomness="same"), draw(randomness="different")
    assert (same == same[0]).all() and not (different == different[0]).all()
    assert torch.equal(draw(5)[1], attn_varlen(q, k, v, CU_Q, CU_K, dropout_p=0.5, seed=5))


# Second derivatives


@BOTH
@ON_EACH_BACKEND
def test_second_derivatives_are_refused_at_every_level(backend: str, attend: Attend) -> None:
    """None is ever zero without a word."""
    q, k, v = operands()

    def loss(q: torch.Tensor, v: torch.Tensor = v) -> torch.Tensor:
        return attend(q, k, v)[0].square().sum()

    def gradient(q: torch.Tensor, v: torch.Tensor = v) -> torch.Tensor:
        return torch.func.grad(loss)(q, v).sum()

    with hetu.config(backend=backend):
        for twice in (
            lambda: torch.func.grad(gradient)(q),
            lambda: torch.func.grad(gradient, 1)(q, v),
            lambda: torch.func.jacrev(torch.func.jacrev(loss))(q),
            lambda: hessian(loss, q, vectorize=True),
            lambda: hessian(loss, q),
        ):
            with pytest.raises(hetu.HetuError, match="it can't be differentiated twice"):
                twice()
