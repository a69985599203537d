"""Jobs for ranks that run a model of transformers under ``context_parallel``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from support.compiling import with_constant_floats
from support.hf_models import WINDOWED, documents, exact_softmax, make, results, results_of_each, tokens

import hetu


def difference(
    family: str,
    lengths: list[int],
    split: str = "balanced",
    method: str = "auto",
    checkpointing: str | None = None,
    compiled: bool = False,
) -> float:
    """The largest difference between ranks together and one process, which has an attention of transformers' own.

    It is a part of the largest number.

    Args:
        family: Which model.
        lengths: Of the documents.
        split: Of the tokens.
        method: Of the attention.
        checkpointing: ``"reentrant"``, ``"non-reentrant"`` or None.
        compiled: Whether the model is compiled, and runs three batches that nothing is compiled again for.
    """
    from hetu.integrations.transformers import context_parallel

    sizes = {"num_hidden_layers": 1} if compiled else {}
    model, worst = make(family, **sizes), 0.0
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.train()
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else model
    context = torch._dynamo.config.patch(error_on_recompile=True) if compiled else nullcontext()
    for step in range(3 if compiled else 1):
        lengths = [n + step for n in lengths]
        ids, position_ids = tokens(1, sum(lengths)), documents(lengths)["position_ids"]
        weights = torch.linspace(0.5, 1.5, sum(lengths), dtype=torch.float64)[None]
        if family in WINDOWED:
            with exact_softmax():
                logits, grads = results_of_each(make(family, "eager", **sizes), weights, ids, lengths)
        else:
            other = make(family, "sdpa", **sizes)
            logits, grads = results(other, weights, ids, position_ids=position_ids, use_cache=False)

        cp = hetu.functional.ContextParallel(torch.tensor([0, *lengths]).cumsum(0), split=split, method=method)
        model.zero_grad()
        with context_parallel(cp), with_constant_floats(), context if step else nullcontext():
            own = run(cp.dispatch(ids, dim=1), position_ids=cp.position_ids[None], use_cache=False).logits
        scale = torch.linspace(-1, 1, own.shape[-1], dtype=own.dtype)
        (own * scale * cp.dispatch(weights, dim=1)[..., None]).sum().backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        total = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(total)
        whole = cp.undispatch(own.detach(), dim=1)
        for found, wanted in ((whole, logits), (total, grads)):
            assert found.shape == wanted.shape
            worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    return worst


def two_threads() -> list[bool]:
    """Whether a thread sees the context of the other one, or its own after it has left it."""
    from threading import Thread

    from hetu.integrations.transformers import context_parallel
    from hetu.integrations.transformers.masks import current

    cp = hetu.functional.ContextParallel(torch.tensor([0, 4]))
    seen = []
    with context_parallel(cp):
        thread = Thread(target=lambda: seen.append(current() is not None))
        thread.start()
        thread.join()
        try:
            with context_parallel(cp):
                raise KeyError
        except KeyError:
            seen.append(current() is not cp)
    return [*seen, current() is not None]


def refusal(cu_seqlens: list[int], inputs: dict[str, Any]) -> str:
    """What is said of a model that is given something else than this rank's rows.

    Args:
        cu_seqlens: Of the documents.
        inputs: Of the model instead of the right ones; None leaves one out. ``family`` is another one than Llama.
    """
    from hetu.integrations.transformers import context_parallel

    inputs = dict(inputs)
    family = inputs.pop("family", "Llama")
    cp = hetu.functional.ContextParallel(torch.tensor(cu_seqlens), split="sym")
    given = {
        "input_ids": cp.dispatch(tokens(1, cu_seqlens[-1]), dim=1),
        "position_ids": cp.position_ids[None],
        "use_cache": False,
    }
    model = make(family)
    given = {name: value for name, value in (given | inputs).items() if value is not None}
    try:
        with context_parallel(cp):
            model(**given)
    except hetu.HetuError as error:
        return str(error)
    return "nothing"
