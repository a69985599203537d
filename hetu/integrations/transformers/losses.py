"""Losses that models compute of ``labels`` themselves: refused under context parallelism.

A model shifts labels within the rows that it is given and averages over these. Of one rank's rows that is wrong, and
nothing would tell. The losses are entries of a table of transformers'; each is replaced by one that looks whether this
thread's models are sharded, and else is what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from hetu.errors import HetuError
from hetu.functional import ContextParallel
from hetu.integrations.transformers.lengths import fail

Loss = Callable[..., Any]


def guard_losses(current: Callable[[], ContextParallel | None]) -> None:
    """Makes the losses of models refuse labels of a part of the rows.

    Args:
        current: Says how this thread's models are sharded; None if they are not.
    """
    try:
        from transformers.loss.loss_utils import LOSS_MAPPING
    except ImportError:  # a version without the table: nothing is guarded
        return
    for name, loss in LOSS_MAPPING.items():
        if not hasattr(loss, "guarded_by_hetu"):
            LOSS_MAPPING[name] = _guarded(loss, current)


def _guarded(loss: Loss, current: Callable[[], ContextParallel | None]) -> Loss:
    @wraps(loss)
    def guarded(*args: Any, **options: Any) -> Any:
        if current() is not None:
            what = "the model is given labels under context_parallel: it would shift them within this rank's rows"
            fix = "leave labels out: cross_entropy(logits, cp.dispatch(cp.next_tokens(ids))), and cp.token_mean of it"
            fail(HetuError, what, fix)
        return loss(*args, **options)

    guarded.guarded_by_hetu = True  # type: ignore[attr-defined]
    return guarded
