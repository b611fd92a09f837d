"""How the kernels are launched: tables by machine and width, and the arguments that forward and backward share."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton.language as tl

from ..._gemm.launch import Launch, architecture_of, factors, tiles_of
from ..arguments import Arguments, Block
from .keys import KeyOptions

#: Where |u| <= bound and 2 bound is at most this, exponentials are taken relative to the bound: none underflows.
CONSTANT_RANGE = 60.0
#: Rows that the block kernels' backward takes at a time, and the most warps that a program of theirs has.
BLOCK_ROWS, _BLOCK_WARPS = 4, 4
#: Programs of the block kernels that run together on a multiprocessor, about.
BLOCK_TOGETHER = 4
#: Splits of the forward pass, at most; and rows of a program that merges them.
MOST_SPLITS, MERGED_ROWS = 128, 16


class Launches(NamedTuple):
    forward: Launch
    forward_bounded: Launch  # where all logits have a bound: fewer registers, larger tiles
    grad_query: Launch
    grad_key: Launch
    grad_both: Launch
    grad_both_bounded: Launch | None = None  # another than grad_both


#: By machine and kind of product, by largest D, as in the linear heads' table: what compiles without spills into the
#: shared memory that there is. Blocks of 128 rows where that is possible: each block of rows reads all keys from L2.
_TABLE = {
    ("hopper", "half"): {
        64: Launches(
            Launch(64, 64, 4, 2, 3), Launch(128, 64, 8, 2, 2), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2),
            Launch(128, 32, 8, 2),
        ),
        128: Launches(
            Launch(64, 64, 4, 2, 3), Launch(128, 64, 8, 2, 2), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2),
            Launch(128, 32, 8, 2), Launch(128, 64, 8, 2),
        ),
        256: Launches(
            Launch(64, 64, 4, 2, 2), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2),
            Launch(64, 64, 8, 2),
        ),
    },
    ("blackwell", "half"): {
        64: Launches(
            Launch(64, 64, 4, 2, 3), Launch(128, 64, 8, 2, 2), Launch(64, 64, 8, 2), Launch(64, 64, 4, 2),
            Launch(64, 32, 8, 2),
        ),
        128: Launches(
            Launch(64, 64, 4, 2, 3), Launch(128, 64, 8, 2, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2),
            Launch(64, 32, 8, 2),
        ),
        256: Launches(
            Launch(64, 64, 4, 2, 2), Launch(128, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2),
            Launch(64, 32, 8, 2),
        ),
    },
    ("ampere", "half"): {
        128: Launches(
            Launch(64, 64, 8, 2, 2), Launch(128, 64, 8, 2, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2),
            Launch(64, 32, 8, 2),
        ),
        256: Launches(
            Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2),
            Launch(64, 32, 8, 2),
        ),
    },
    ("amd", "half"): {
        128: Launches(
            Launch(64, 64, 4, 1), Launch(64, 64, 4, 1), Launch(64, 32, 4, 1), Launch(32, 64, 4, 1),
            Launch(64, 32, 4, 1),
        ),
        256: Launches(
            Launch(64, 32, 4, 1), Launch(64, 32, 4, 1), Launch(64, 16, 4, 1), Launch(16, 64, 4, 1),
            Launch(64, 16, 4, 1),
        ),
    },
    ("nvidia", "tf32"): {
        128: Launches(
            Launch(64, 32, 8, 2), Launch(64, 64, 8, 2), Launch(32, 32, 4, 2, 2), Launch(32, 32, 4, 2, 2),
            Launch(32, 32, 4, 2, 2),
        ),
        256: Launches(
            Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2),
            Launch(32, 32, 4, 2),
        ),
    },
    ("nvidia", "ieee"): {
        128: Launches(
            Launch(32, 32, 8, 2, 2), Launch(32, 32, 8, 2, 2), Launch(32, 32, 8, 2, 2), Launch(32, 32, 8, 2, 2),
            Launch(32, 32, 8, 2, 2),
        ),
        256: Launches(
            Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 16, 8, 2), Launch(16, 32, 8, 2),
            Launch(32, 16, 8, 2),
        ),
    },
    ("amd", "ieee"): {
        128: Launches(
            Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1),
            Launch(32, 32, 4, 1),
        ),
        256: Launches(
            Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1),
            Launch(32, 16, 4, 1),
        ),
    },
}  # fmt: skip


@functools.cache
def launches_of(width: int, itemsize: int, tf32: bool, architecture: int) -> Launches:
    """Return the launches of all kernels of products. architecture: ten times the compute capability, 0 on AMD's."""
    return tiles_of(_TABLE, "query", width, itemsize, tf32, architecture)


def block_launch(columns: int) -> dict[str, int]:
    """Return the launch of a block's tiles: no more warps than fill a row; a lane has 8 columns, 16 or 32 bytes."""
    group = 8
    warps = _BLOCK_WARPS
    while warps > 1 and 16 * warps * group >= columns:
        warps //= 2
    return {"GROUP": group, "LANES": 32 * warps, "num_warps": warps}


def key_options(a: Arguments | Block, bounded: bool = False) -> KeyOptions:
    """Return what kernels read of the labels and the keys."""
    return KeyOptions(
        a.query_label, a.key_label, a.exclude, a.key_bias, a.key_scale, a.learned_scale, a.scale, abs(a.scale),
        tl.constexpr(bounded),
    )  # fmt: skip


def block_arguments(block: Block) -> dict[str, Any]:
    """Return the arguments of the block kernels, by name."""
    return {
        "z_ptr": block.z,
        "o": key_options(block),
        "rows": block.z.shape[0],
        "columns": block.z.shape[1],
        "first_column": block.first,
        "z_stride": block.z.stride(0),
    }


def bounds_exponents(a: Arguments) -> bool:
    """Return whether exponentials are taken relative to a bound of all logits."""
    plain = a.learned_scale is None and a.key_bias is None and a.key_scale is None
    return a.normalized and plain and 2 * abs(a.scale) <= CONSTANT_RANGE


def tile_arguments(a: Arguments) -> tuple[dict[str, Any], Launches]:
    """Return the arguments of the kernels, by name; and how they are launched."""
    f = factors(a.query, a.keys)
    arguments = {
        "f": f,
        "o": key_options(a, bounds_exponents(a)),
        "rows": a.query.shape[0],
        "columns": a.keys.shape[0],
    }
    tf32 = f.precision.value == "tf32"
    return arguments, launches_of(f.width, a.query.element_size(), tf32, architecture_of(a.query.device))


def is_symmetric(a: Arguments) -> bool:
    """Return whether the queries are the keys, in everything that backward sees."""
    whole = a.key_grad_begin == 0 and a.key_grad_end == a.query.shape[0]
    labels = a.query_label.data_ptr() == a.key_label.data_ptr()
    return a.key is None and a.key_bias is None and a.key_scale is None and labels and whole
