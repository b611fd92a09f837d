"""How the kernels are launched: a table by machine and width, the arguments that they share, and the grids."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._device import MULTIPROCESSORS
from ..._gemm.launch import Cut, Launch, architecture_of, factors, most_splits, tiles_of
from ...partitioned_logsumexp.triton.launch import CONSTANT_RANGE
from ..arguments import Arguments
from .keys import LossOptions

#: Fewest tiles of a program of gradients: starting one costs about as much as two tiles.
_FEWEST_TILES = 2


class Launches(NamedTuple):
    """In gradients, ``block_n`` vectors of a program and ``block_c`` of a tile, whichever side they are of."""

    forward: Launch
    forward_bounded: Launch  # where all logits have a bound: fewer registers, larger tiles
    gradients: Launch
    gradients_bounded: Launch
    both: Launch


#: By machine and kind of product, by largest D, as in the linear heads' table: what compiles without spills into the
#: shared memory that there is. (The plan makes blocks of float32 similarities; tiles of them are narrow.)
_TABLE = {
    ("hopper", "half"): {
        128: Launches(
            Launch(64, 64, 4, 2, 3), Launch(128, 128, 8, 2), Launch(64, 64, 8, 2), Launch(128, 64, 8, 2),
            Launch(128, 32, 8, 2),
        ),
        256: Launches(
            Launch(64, 64, 4, 2, 2), Launch(128, 64, 8, 2), Launch(64, 32, 8, 2), Launch(64, 64, 8, 2),
            Launch(64, 32, 8, 2),
        ),
    },
    ("blackwell", "half"): {
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
            Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 2),
            Launch(64, 32, 8, 2),
        ),
    },
    ("amd", "half"): {
        128: Launches(
            Launch(64, 64, 4, 1), Launch(64, 64, 4, 1), Launch(64, 32, 4, 1), Launch(64, 32, 4, 1),
            Launch(64, 32, 4, 1),
        ),
        256: Launches(
            Launch(64, 32, 4, 1), Launch(64, 32, 4, 1), Launch(64, 16, 4, 1), Launch(64, 16, 4, 1),
            Launch(64, 16, 4, 1),
        ),
    },
    ("nvidia", "tf32"): {
        128: Launches(
            Launch(64, 32, 8, 2), Launch(64, 64, 8, 2), Launch(32, 32, 4, 2, 2), Launch(32, 32, 4, 2, 2),
            Launch(32, 32, 4, 2, 2),
        ),
    },
    ("nvidia", "ieee"): {
        128: Launches(
            Launch(32, 32, 8, 2, 2), Launch(32, 32, 8, 2, 2), Launch(32, 16, 8, 2, 2), Launch(32, 16, 8, 2, 2),
            Launch(32, 16, 8, 2, 2),
        ),
    },
    ("amd", "ieee"): {
        128: Launches(
            Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1),
            Launch(32, 32, 4, 1),
        ),
    },
}  # fmt: skip


@functools.cache
def _launches_of(width: int, itemsize: int, tf32: bool, architecture: int) -> Launches:
    return tiles_of(_TABLE, "query", width, itemsize, tf32, architecture)


def bounds_exponents(a: Arguments) -> bool:
    """Return whether exponentials are taken relative to a bound of all logits."""
    plain = a.learned_scale is None and a.key_bias is None and a.pos_offset is None
    return a.normalized and plain and 2 * abs(a.scale) <= CONSTANT_RANGE


def loss_options(a: Arguments, bounded: bool) -> LossOptions:
    """Return what kernels read of the labels and the keys."""
    return LossOptions(
        a.query_label, a.key_label, a.exclude, a.key_bias, a.pos_offset, a.learned_scale, a.scale, abs(a.scale),
        tl.constexpr(bounded), tl.constexpr(a.exclude_self), tl.constexpr(a.two),
    )  # fmt: skip


def tile_arguments(a: Arguments) -> tuple[dict[str, Any], Launches]:
    """Return the arguments of the kernels, by name; and how they are launched."""
    f = factors(a.query, a.keys)
    arguments = {
        "f": f,
        "o": loss_options(a, bounds_exponents(a)),
        "rows": a.query.shape[0],
        "columns": a.keys.shape[0],
    }
    tf32 = f.precision.value == "tf32"
    return arguments, _launches_of(f.width, a.query.element_size(), tf32, architecture_of(a.query.device))


class Grid(NamedTuple):
    """Programs of queries and of keys in one grid; splits of each."""

    query: Cut
    key: Cut

    @property
    def query_programs(self) -> int:
        return self.query.programs * self.query.splits

    @property
    def programs(self) -> int:
        return self.query_programs + self.key.programs * self.key.splits


def cut_gradients(a: Arguments, launch: Launch, need_query: bool, need_key: bool) -> Grid:
    """Return how the gradients' work is cut: no program has more tiles than a multiprocessor's share of all."""
    n, m, learning = a.query.shape[0], a.keys.shape[0], a.key_grad_end - a.key_grad_begin
    sides = []
    for need, size, others in ((need_query, n, m), (need_key, learning, n)):
        blocks = triton.cdiv(size, launch.block_n) if need else 0
        sides.append((blocks, triton.cdiv(others, launch.block_c)))
    work = sum(blocks * tiles for blocks, tiles in sides)
    share = max(_FEWEST_TILES, triton.cdiv(work, MULTIPROCESSORS * launch.together))
    cuts = []
    for (blocks, tiles), size in zip(sides, (n, learning), strict=True):
        splits = min(triton.cdiv(tiles, share), most_splits(max(1, size * a.query.shape[1])))
        each = triton.cdiv(tiles, max(splits, 1))
        cuts.append(Cut(blocks, triton.cdiv(tiles, each), each))
    return Grid(*cuts)


def is_symmetric(a: Arguments) -> bool:
    """Return whether the queries are the keys, in everything that backward sees."""
    whole = a.key_grad_begin == 0 and a.key_grad_end == a.query.shape[0]
    labels = a.query_label.data_ptr() == a.key_label.data_ptr()
    return a.key is None and a.key_bias is None and a.exclude is None and labels and whole


def partial(splits: int, like: torch.Tensor) -> torch.Tensor:
    """Return room for the splits of a gradient, in float32."""
    return like.new_empty((splits, *like.shape), dtype=torch.float32)
