"""hetu's element types as torch's."""

from __future__ import annotations

import torch

from hetu.dtypes import ALL, DType

TORCH_DTYPES: dict[DType, torch.dtype] = {dtype: getattr(torch, dtype.name) for dtype in ALL}
