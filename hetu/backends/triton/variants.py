"""The variants that the forward kernel is compiled in, and their tiles: pure functions, no search at a first call."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from hetu.backends.triton.kernels import forward_kernel

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
"""The element types that the kernels take, by Triton's names."""

HEAD_DIMS = range(8, 257, 8)

FLAGGED_HEAD_DIMS = frozenset((64, 128, 256))
"""Widths at which :func:`variants` gives lower diagonals, softcaps and sinks too, each alone."""

FLAGGED_DTYPES = frozenset((torch.bfloat16, torch.float32))
"""Their dtypes: float16 makes no difference to what bfloat16 compiles to, but for the type of products."""

INTERPRETER = 0
"""Stands for Triton's interpreter where a compute capability is asked for."""

MAX_PACK = 4
"""Most heads of a block: more would save little, and the work list grows with them."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        block_m: Query rows of a program: tokens times packed heads.
        block_n: Keys of one iteration.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline of loads.
        max_registers: Of a thread, so that more programs fit on a multiprocessor; None leaves it to the compiler.
        precision: Of dots: ``"tf32"`` for half types; for float32 ``"ieee"``, without tensor cores, or ``"tf32x3"``,
            three products on them that together keep float32's digits.
        masks_all: Whether scores are masked without asking whether anything hides some; see ``forward_kernel``.
        knows_threads: Whether the kernel has instructions for the elements that a thread has of a tile of scores, for
            what few warps need; see ``running_max.py``. In the forward only if a warp has 16 rows.
        skips_rescaling: Of the forward: whether warps rescale nothing where their rows' maxima stay, if threads are
            known; see ``running_max.rescaled``.
        chunk: Of the forward: items that programs take for some heads before they take them for the next ones.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    precision: str = "tf32"
    masks_all: bool = False
    knows_threads: bool = False
    skips_rescaling: bool = False
    chunk: int = 16


@dataclass(frozen=True, slots=True)
class PackedHeads:
    """The heads of a call.

    Attributes:
        num_q: Query heads.
        num_kv: Key heads, which divide them.
    """

    num_q: int
    num_kv: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_q // self.num_kv

    @property
    def pack(self) -> int:
        """Heads that a block of query rows holds: the largest power of two that divides a group, up to MAX_PACK."""
        return min(self.group & -self.group, MAX_PACK)


@dataclass(frozen=True, slots=True)
class Variant:
    """What the forward kernel is specialised for.

    Attributes:
        head_dim: 8 to 256, a multiple of 8.
        dtype: Of q, k, v and out.
        runs_on: Whether there are running results, of earlier steps or for later ones.
        more: Whether a block of rows sees several segments.
        dropout: Whether entries are dropped.
        scores: Whether scores are written.
        lower: Whether segments have a lower diagonal.
        softcap: Whether scores are capped.
        sinks: Whether each head has a sink.
    """

    head_dim: int
    dtype: torch.dtype
    runs_on: bool = False
    more: bool = False
    dropout: bool = False
    scores: bool = False
    lower: bool = False
    softcap: bool = False
    sinks: bool = False

    @property
    def block_d(self) -> int:
        """Columns of a tile."""
        return block_columns(self.head_dim)

    def constants(self, heads: PackedHeads, tile: Tile, strides: dict[str, int]) -> dict[str, Any]:
        """The kernel's compile-time arguments. ``strides``: of q, k, v and out, by :func:`named_strides`."""
        knows = tile.knows_threads and tile.block_m == 16 * tile.num_warps  # a warp then has 16 rows
        return {
            **strides,
            "HEADS": heads.num_q,
            "GROUP": heads.group,
            "PACK": heads.pack,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": self.block_d,
            "CHUNK": tile.chunk,
            "MASKS_ALL": tile.masks_all,
            "LOWER": self.lower,
            "SOFTCAP": self.softcap,
            "SINKS": self.sinks,
            "ELEMENTS": self.block_d // 2 if knows and tile.skips_rescaling else 0,
            "OWN": tile.block_n // 2 if knows else 0,
            "RUNS_ON": self.runs_on,
            "MORE": self.more,
            "DROPOUT": self.dropout,
            "SCORES": self.scores,
            "PRECISION": tile.precision,
        }

    def source(self, heads: PackedHeads, tile: Tile) -> dict[str, Any]:
        """Arguments of ``triton.compiler.ASTSource`` that compile what a launch would, without a GPU.

        Pointers and strides are taken to be multiples of 16, as they are for whole tensors.
        """
        element = "*" + DTYPES[self.dtype]
        types: dict[str, str] = dict.fromkeys(("q", "k", "v", "out"), element)
        types |= {"lse": "*fp32", "records": "*i32", "scale": "fp32", "keep_scale": "fp32", "softcap": "fp32"}
        types |= {"acc_state": "*fp32"} if self.runs_on else {}
        types |= {"scores": "*fp32"} if self.scores else {}
        types |= {"sinks": "*fp32"} if self.sinks else {}
        types |= {"key_position": "*i32"} if self.scores or self.dropout else {}
        q, kv = heads.num_q, heads.num_kv
        strides = whole_strides(self.head_dim, {"Q": q, "K": kv, "V": kv, "O": q})
        return source(forward_kernel, types, self.constants(heads, tile, strides))


def row_strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides of a ``(T, heads, D)`` tensor over rows and heads, for kernels to be compiled for.

    Those of sizes 1 may be anything: they are set to what they are in a whole tensor, so that they make no variant.
    """
    (rows, heads, width), strides = x.shape, x.stride()
    return strides[0] if rows > 1 else heads * width, strides[1] if heads > 1 else width


def named_strides(names: Iterable[str], strides: Iterable[tuple[int, int]]) -> dict[str, int]:
    """The kernels' arguments for the strides of tensors; ``names`` are the prefixes."""
    pairs = list(zip(names, strides, strict=True))
    return {f"STRIDE_{name}T": over[0] for name, over in pairs} | {f"STRIDE_{name}H": over[1] for name, over in pairs}


def whole_strides(head_dim: int, heads: dict[str, int]) -> dict[str, int]:
    """The same of contiguous tensors with these numbers of heads."""
    return named_strides(heads, [(count * head_dim, head_dim) for count in heads.values()])


def block_columns(head_dim: int) -> int:
    """Columns of a tile: a power of two, and at least 16 as tensor cores need."""
    return max(16, 1 << (head_dim - 1).bit_length())


def compiler_options(tile: Tile) -> dict[str, Any]:
    """The compiler's options."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    # Dots without tensor cores are long straight code, for which ptxas would rather spill than take registers.
    registers = 255 if tile.precision == "ieee" else tile.max_registers
    return options if registers is None else {**options, "maxnreg": registers}


OPTIONAL = ("acc_state", "dq_state", "scores", "sinks", "key_position")
"""Arguments of kernels that are None in some variants."""


def source(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``triton.compiler.ASTSource`` that compile what a launch would, without a GPU.

    Pointers and strides are taken to be multiples of 16, as they are for whole tensors.

    Args:
        kernel: The kernel.
        types: Triton's names of its arguments' types; what isn't there is an int32, or None if it is optional.
        constants: Its compile-time arguments.
    """
    signature, values, divisible = {}, dict[str, Any](constants), {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants or (name in OPTIONAL and name not in types):
            signature[name] = "constexpr"
            values.setdefault(name, None)
            continue
        signature[name] = types.get(name, "i32")
        is_pointer_or_size = signature[name].startswith(("*", "i"))  # neither a number nor a tensor's descriptor
        if is_pointer_or_size and not parameter.do_not_specialize:
            divisible[(place,)] = [["tt.divisibility", 16]]
    return {"fn": kernel, "signature": signature, "constexprs": values, "attrs": divisible}


def tile(variant: Variant, capability: int, keys_per_row: float = 0.0, pack: int = 1) -> Tile:
    """The tile of a variant. From sm_90 on the fastest of those measured on an H100; ``docs/kernels.md`` has the times.

    Args:
        variant: What the kernel is specialised for.
        capability: Compute capability, 80 for sm_80; :data:`INTERPRETER` for the interpreter.
        keys_per_row: Keys that a query row sees on average. Few want many small programs, so that some load while
            others compute; many want blocks of many keys.
        pack: Heads that a block of rows holds, :attr:`PackedHeads.pack`: where they are several its rows are fewer
            positions, of which diagonals cut off less.

    Example:
        >>> tile(Variant(128, torch.bfloat16), 90, keys_per_row=200).block_n
        32
        >>> tile(Variant(128, torch.bfloat16), 90, keys_per_row=5000).block_n
        64
    """
    if capability == INTERPRETER:  # a NumPy call an operation: large blocks, of which short sequences waste little
        return Tile(64, 64, 4, 1, precision="ieee" if variant.dtype == torch.float32 else "tf32")
    if variant.dtype == torch.float32:
        return _float32_tile(variant, capability)
    if is_small(capability):
        return _small_tile(variant)
    chosen = _half_tile(variant, keys_per_row, pack)
    # Which rows a thread has is known of the tensor cores of sm_90. Eight warps at head_dim 256 had better not skip.
    knows = capability == 90
    skips = knows and not (variant.block_d == 256 and chosen.num_warps == 8)
    return replace(chosen, knows_threads=knows, skips_rescaling=skips)


def _half_tile(variant: Variant, keys_per_row: float, pack: int) -> Tile:
    """For the tensor cores of sm_90 and later; see :func:`tile`.

    Short documents have programs of all heads side by side (``chunk``): whatever they read fits in the cache.
    """
    width, is_short = variant.block_d, keys_per_row < 512
    if variant.dropout or variant.scores:
        return Tile(128, 64, 8, 2) if width <= 64 else Tile(128, 32, 8, 2)
    if width <= 64:  # four programs a multiprocessor, of which some compute while others load
        return Tile(64, 32, 4, 4) if pack > 1 and keys_per_row < 256 else Tile(64, 64, 4, 3, max_registers=128)
    if width == 128:  # three or two
        return Tile(64, 32, 4, 3, max_registers=168, chunk=1) if is_short else Tile(64, 64, 4, 3)
    return Tile(64, 32, 4, 2, chunk=1) if is_short else Tile(128, 64, 8, 2)


KEYS_PER_ROW = (0, 256, 512, 1536)
"""Where tiles change with the keys that a row sees: between two of these they are the same."""


def rounded_keys(keys_per_row: float) -> int:
    """The least number of keys a row for which all tiles, the backward's too, are those for this one.

    Example:
        >>> rounded_keys(511.5)
        256
    """
    return KEYS_PER_ROW[bisect_right(KEYS_PER_ROW, keys_per_row) - 1]


def is_small(capability: int) -> bool:
    """Whether tiles have to do with 99 KB of shared memory: before sm_90, and on consumers' Blackwell, sm_120.

    Source: the table of compute capabilities in NVIDIA's CUDA C++ Programming Guide.
    """
    return capability < 90 or capability >= 120


def _float32_tile(variant: Variant, capability: int) -> Tile:
    """float32 means float32: one TF32 product would keep 10 bits of the inputs; three keep them all but the last."""
    width, extras = variant.block_d, variant.dropout or variant.scores
    if width > 128:  # the parts of three products would need more shared memory than there is
        return Tile(32, 32, 8, 1, precision="ieee")
    if is_small(capability):
        return Tile(64, 32, 8, 2 if width <= 64 else 1, precision="ieee")
    if width <= 64 and not extras:
        return Tile(64, 64, 4, 2, precision="tf32x3")
    return Tile(128, 32, 8, 2, precision="tf32x3")


def _small_tile(variant: Variant) -> Tile:
    """The largest that keep everything in registers and 99 KB of shared memory; not measured.

    With at least as many rows as columns, Triton gives a warp whole rows of both dots, if it sees that one follows the
    other.
    """
    width, extras = variant.block_d, variant.dropout or variant.scores
    if width <= 64:
        return Tile(128, 32, 8, 2, masks_all=True) if extras else Tile(128, 64, 8, 2, masks_all=True)
    if width == 128:
        return Tile(64, 32, 8, 2) if extras else Tile(128, 32, 8, 2, masks_all=True)
    return Tile(64, 16, 8, 2) if extras else Tile(64, 32, 8, 1)


_FLAGS = ("lower", "softcap", "sinks")


def variants(
    head_dims: Iterable[int] = HEAD_DIMS,
    dtypes: Iterable[torch.dtype] = tuple(DTYPES),
    *,
    extras: bool = True,
) -> Iterator[Variant]:
    """Every variant of the forward kernel that a run may ask for, but of the flags of masks, softcaps and sinks a few.

    Args:
        head_dims: Of the variants.
        dtypes: Of the variants.
        extras: Whether to give those with dropout and scores, and these flags, too.
    """
    head_dims, dtypes, flags = list(head_dims), list(dtypes), (False, True) if extras else (False,)
    for head_dim, dtype, runs_on, more, dropout, scores in product(
        head_dims, dtypes, (False, True), (False, True), flags, flags
    ):
        yield Variant(head_dim, dtype, runs_on, more, dropout, scores)
    for head_dim, dtype, flag in product(
        FLAGGED_HEAD_DIMS.intersection(head_dims), FLAGGED_DTYPES.intersection(dtypes), _FLAGS if extras else ()
    ):
        flagged: dict[str, Any] = {flag: True}
        yield Variant(head_dim, dtype, **flagged)
