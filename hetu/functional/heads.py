"""Heads as wide as kernels take them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def padded_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v with zeros behind their last dims, up to the wider one's next multiple of 8.

    Zeros change no score, so the scale is that of the unpadded q; of the output as many entries count as v has.

    Example:
        >>> [x.shape[-1] for x in padded_heads(torch.ones(3, 2, 20), torch.ones(3, 2, 20), torch.ones(3, 2, 12))]
        [24, 24, 24]
    """
    width = (max(q.shape[-1], v.shape[-1]) + 7) // 8 * 8
    return _wide(q, width), _wide(k, width), _wide(v, width)


def _wide(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
