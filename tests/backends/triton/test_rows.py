"""The kernels of rows against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.devices import WHERE_KERNELS_RUN as DEVICE

from hetu.backends.attention import contract
from hetu.backends.triton.rows import gather, row_dot


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 9),
    picked=st.integers(0, 40),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    width=st.sampled_from([1, 8, 40, 300, 9000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    is_strided=st.booleans(),
)
def test_rows_are_packed(
    seed: int, rows: int, picked: int, heads: list[int], width: int, dtype: torch.dtype, is_strided: bool
) -> None:
    """Of up to two tensors by a kernel, else by torch: bit for bit, NaN too, and nothing is read past the rows."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(rows, (picked,), generator=generator, dtype=torch.int32).to(DEVICE)
    parts = []
    for count in heads:
        whole = torch.full((rows + 2, 2 * count, width + 1), torch.nan, dtype=dtype, device=DEVICE)
        part = whole[1:-1, 1 : count + 1, :width]
        part.copy_(torch.randn(rows, count, width, generator=generator).to(dtype))
        part[0, 0, 0] = torch.nan
        parts.append(part if is_strided else part.contiguous())
    packed = gather(parts, index)
    assert packed.is_contiguous() and packed.dtype == dtype
    expected = torch.cat([part[index.long()] for part in parts], 1)
    torch.testing.assert_close(contract.gather(parts, index), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(packed, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (1, 1, 8), (300, 3, 40)])
def test_dot_products(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(2, *shape, device=DEVICE)
    expected = (a.double() * b.double()).sum(-1).float()
    torch.testing.assert_close(row_dot(a.transpose(0, 1).contiguous().transpose(0, 1), b), expected)
