"""Compiles variants of the Gluon kernels for Hopper, without a GPU, and prints what ptxas says of each, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from hetu.backends.gluon import variants, variants_backward
from hetu.backends.gluon.backward_keys import key_kernel
from hetu.backends.gluon.backward_queries import query_kernel
from hetu.backends.gluon.forward import forward_kernel
from hetu.backends.triton.variants import PackedHeads, Variant
from hetu.backends.triton.variants_backward import BackwardVariant

KINDS: list[tuple[Variant, PackedHeads]] = [
    (Variant(128, torch.bfloat16), PackedHeads(8, 2)),
    (Variant(256, torch.float16, True, True, lower=True, softcap=True, sinks=True), PackedHeads(5, 5)),
    (Variant(64, torch.bfloat16, lower=True), PackedHeads(4, 1)),
]
"""Every width, and every flag."""


BACKWARD_KINDS: list[tuple[BackwardVariant, PackedHeads]] = [
    (BackwardVariant(128, torch.bfloat16, runs_on=True, lower=True, softcap=True), PackedHeads(5, 5)),
    (BackwardVariant(128, torch.float16), PackedHeads(8, 2)),
]
"""Every flag, and none; both kernels of each."""


def compiled(variant: Variant, heads: PackedHeads) -> dict[str, Any]:
    """What is known of a forward's machine code."""
    shape = variants.tile(variant, is_long=True)
    assert shape is not None
    strides = heads.num_q * variant.head_dim, variant.head_dim
    of = variants.constants(variant, heads, shape, strides)
    source = variants.source(forward_kernel, variants.types(variant), of, variant.dtype)
    kernel, known = _built(source, shape.consumers)
    carried = re.search(r"scf.yield .*%tile.* : (.*)", kernel.asm["ttgir"])
    assert carried is not None
    return {"variant": str(variant), **known, "carried": len(re.findall(r"\bi32\b", carried.group(1)))}


def compiled_backward(variant: BackwardVariant, heads: PackedHeads) -> Iterator[dict[str, Any]]:
    """What is known of the machine code of a backward's kernels."""
    tile, has_more = variants_backward.tile(variant), variant.runs_on
    rows, keys = ((count * variant.head_dim, variant.head_dim) for count in (heads.num_q, heads.num_kv))
    for kernel, of in (
        (key_kernel, variants_backward.key_constants(variant, heads, tile, has_more, keys, keys)),
        (query_kernel, variants_backward.query_constants(variant, heads, tile, has_more, rows, rows)),
    ):
        _kernel, known = _built(variants_backward.source(kernel, of, variant), variants_backward.CONSUMERS)
        yield {"variant": f"{kernel.__name__} {variant}", **known}


def _built(source: Any, consumers: int) -> tuple[Any, dict[str, Any]]:
    log = StringIO()
    with redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=variants.options(consumers))
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log.getvalue())
    assert spills is not None, log.getvalue()
    return kernel, {
        "stack": int(spills.group(1)),
        "spills": int(spills.group(2)),
        "serial": re.findall(r"C75\d\d", log.getvalue()),
        "shared": kernel.metadata.shared,
    }


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True  # or ptxas doesn't say that it serialises products
    for kind in KINDS:
        print(json.dumps(compiled(*kind)), flush=True)
    for backward_kind in BACKWARD_KINDS:
        for result in compiled_backward(*backward_kind):
            print(json.dumps(result), flush=True)
