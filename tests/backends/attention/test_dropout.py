"""The dropout mask: the published generator, the same bits everywhere, the right rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hetu.backends.attention.dropout import Dropout, dropout_key, keep_mask, philox
from hetu.backends.triton.launch import int32_bits
from hetu.backends.triton.tiles import dropout_keeps

# Known answers that the authors of the generator publish: rounds, counter, key, result.
KNOWN = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(rounds: int, counter: str, key: str, expected: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    result = philox((words[0], words[1], words[2], words[3]), (low, high), rounds)
    assert " ".join(f"{int(word):08x}" for word in result) == expected


@triton.jit
def mask_kernel(out, queries, keys, key_low, key_high, threshold, document, head, BLOCK: tl.constexpr):
    i = tl.load(queries + tl.arange(0, BLOCK))
    j = tl.load(keys + tl.arange(0, BLOCK))
    keep = dropout_keeps(key_low, key_high, threshold, document, head, i[:, None], j[None, :])
    tl.store(out + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**63, 2**64 - 1, dropout_key(3, 4, 5)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_triton_has_the_same_mask(key: int, p: float) -> None:
    dropout, rng = Dropout(p, key), np.random.default_rng(key % 97)
    queries, keys = (torch.from_numpy(rng.integers(0, 2**31 - 1, 32)) for _ in range(2))
    out = torch.full((32, 32), -1, dtype=torch.int8)
    bits = [int32_bits(word) for word in (*dropout.key_words, dropout.threshold)]
    mask_kernel[(1,)](out, queries.int(), keys.int(), *bits, 7, 5, BLOCK=32)
    assert torch.equal(out.bool(), keep_mask(dropout, 7, torch.tensor([5]), queries, keys)[0])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_rate(p: float) -> None:
    n = torch.arange(512)
    keep = keep_mask(Dropout(p, dropout_key(1, 0, 0)), 0, torch.arange(4), n, n).double()
    spread = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float(keep.mean()) - (1 - p)) <= 5 * spread
    assert (keep.mean((0, 1)) - (1 - p)).abs().max() <= 6 * (p * (1 - p) / (4 * 512)) ** 0.5


def test_entry_depends_on_document_head_query_and_key_alone() -> None:
    dropout, n = Dropout(0.5, 99), torch.arange(64)
    whole = keep_mask(dropout, 3, torch.arange(4), n, n)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    part = keep_mask(dropout, torch.full((7,), 3), torch.tensor([2]), order[:7], order[20:])
    assert torch.equal(part[0], whole[2][order[:7]][:, order[20:]])
    for other in (keep_mask(dropout, 4, torch.arange(4), n, n), keep_mask(Dropout(0.5, 98), 3, torch.arange(4), n, n)):
        assert 0.4 < float((other == whole).double().mean()) < 0.6
    assert 0.4 < float((whole[0] == whole[1]).double().mean()) < 0.6


def test_no_keys() -> None:
    assert keep_mask(Dropout(0.5, 1), 0, torch.arange(2), torch.arange(3), torch.arange(0)).shape == (2, 3, 0)


def test_key_differs_in_each_of_its_parts() -> None:
    keys = {dropout_key(*parts) for parts in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**62, 0, 0), (-1, 0, 0)]}
    assert len(keys) == 6 and all(0 <= key < 2**64 for key in keys)
