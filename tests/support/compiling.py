"""How models are compiled in tests that are not about numbers of Python."""

from __future__ import annotations

from typing import Any

import torch


def with_constant_floats() -> Any:
    """A context, or a decorator, in which ``torch.compile`` takes floats as constants.

    By default it takes those of a module, such as the epsilon of a norm, as inputs, compiles everything, finds that no
    tensor can hold them, and compiles all of it once more with constants. What comes out is the same, after twice the
    time. Some test of each op has to do without this, so that symbolic floats reach the op.
    """
    return torch._dynamo.config.patch(specialize_float=True)
