"""Arrays for the ops' samples: values that every floating dtype holds exactly, so references need no rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def eighths(*shape: int, dtype: str = "float32", seed: int = 0) -> NDArray[Any]:
    """Multiples of 1/8 from -4 to 4: exact in bfloat16 too."""
    return (np.random.default_rng(seed).integers(-32, 33, shape) / 8).astype(dtype)


def not_zero(*shape: int, dtype: str = "float32", seed: int = 0) -> NDArray[Any]:
    """Multiples of 1/8 from 1/8 to 4: what can be divided by."""
    return (np.random.default_rng(seed).integers(1, 33, shape) / 8).astype(dtype)


def whole_numbers(*shape: int, dtype: str = "int64", low: int = -5, high: int = 6, seed: int = 0) -> NDArray[Any]:
    """Ints from ``low`` up to but not including ``high``."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
