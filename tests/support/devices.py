"""Where tests run: everywhere on the CPU, and under the marker ``gpu`` on CUDA."""

from __future__ import annotations

import pytest
import torch

ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
"""Marks of a test, or of a parameter, that needs a CUDA device."""

CUDA = pytest.param("cuda", marks=ON_CUDA)

DEVICES = ["cpu", CUDA]

WHERE_KERNELS_RUN = "cuda" if torch.cuda.is_available() else "cpu"
"""Where a test launches Triton's kernels itself: they are interpreted only where there is no GPU."""
