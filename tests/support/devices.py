"""Where tests run: everywhere on the CPU, and under the marker ``gpu`` on CUDA."""

from __future__ import annotations

import pytest
import torch

ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
"""Marks of a test, or of a parameter, that needs a CUDA device."""

CUDA = pytest.param("cuda", marks=ON_CUDA)

DEVICES = ["cpu", CUDA]
