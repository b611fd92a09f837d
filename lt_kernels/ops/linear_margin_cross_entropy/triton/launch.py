"""How the tiled strategy is launched: tables by machine and width. Pure functions of sizes, dtype and machine."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..._gemm.launch import Launch, block_d, tiles_of


class Launches(NamedTuple):
    forward: Launch
    grad_input: Launch
    grad_factor: Launch


class Tiles(NamedTuple):
    """Launches by the number of options that need registers (predictions, smoothing, mixed targets)."""

    forward: Launch  # without any
    forward_options: Launch
    grad_input: Launch
    grad_factor: Launch
    grad_input_options: Launch | None = None  # with two


#: By machine and kind of product (of 16-bit numbers; of float32 as tf32; of float32 as such), by largest D: what
#: compiles without spills, into the shared memory that there is: 227 KB on sm_90 and sm_100, 99 KB on the smallest of
#: "ampere" (whatever has mma.sync: sm_80, 86, 89, 120), 64 KB on AMD's.
_TABLE = {
    ("hopper", "half"): {
        64: Tiles(
            Launch(128, 128, 8, 3, 2),
            Launch(128, 64, 8, 3),
            Launch(128, 64, 8, 3),
            Launch(64, 128, 8, 3),
            Launch(64, 64, 8, 3),
        ),
        128: Tiles(Launch(128, 128, 8, 2, 2), Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3)),
        256: Tiles(
            Launch(128, 128, 8, 2),
            Launch(128, 64, 8, 2),
            Launch(128, 64, 8, 2),
            Launch(64, 128, 8, 2),
            Launch(128, 32, 8, 2),
        ),
        512: Tiles(Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 16, 8, 2), Launch(32, 64, 8, 2)),
    },
    ("blackwell", "half"): {
        128: Tiles(Launch(128, 64, 8, 3), Launch(64, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
        256: Tiles(Launch(128, 64, 8, 2), Launch(64, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
        512: Tiles(Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2)),
    },
    ("ampere", "half"): {
        128: Tiles(
            Launch(128, 64, 8, 2, 2),
            Launch(64, 64, 8, 2),
            Launch(128, 64, 8, 2),
            Launch(64, 128, 8, 2),
            Launch(64, 64, 8, 2),
        ),
        256: Tiles(Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
        512: Tiles(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 32, 8, 2)),
    },
    ("amd", "half"): {
        128: Tiles(Launch(64, 64, 4, 1), Launch(64, 64, 4, 1), Launch(64, 32, 4, 1), Launch(32, 64, 4, 1)),
        256: Tiles(Launch(64, 64, 4, 1), Launch(64, 64, 4, 1), Launch(64, 16, 4, 1), Launch(16, 64, 4, 1)),
        512: Tiles(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)),
    },
    ("nvidia", "tf32"): {
        128: Tiles(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 32, 4, 2, 2), Launch(32, 32, 4, 2, 2)),
        256: Tiles(Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2)),
        512: Tiles(Launch(16, 16, 4, 2), Launch(16, 16, 4, 2), Launch(16, 16, 4, 2), Launch(16, 16, 4, 2)),
    },
    ("nvidia", "ieee"): {
        128: Tiles(Launch(32, 32, 8, 2, 2), Launch(32, 32, 8, 2, 2), Launch(32, 32, 8, 2, 2), Launch(32, 32, 8, 2, 2)),
        256: Tiles(Launch(32, 32, 8, 2), Launch(32, 32, 8, 2), Launch(32, 16, 8, 2), Launch(16, 32, 8, 2)),
        512: Tiles(Launch(16, 16, 8, 2), Launch(16, 16, 8, 2), Launch(16, 16, 8, 2), Launch(16, 16, 8, 2)),
    },
    ("amd", "ieee"): {
        128: Tiles(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
        256: Tiles(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)),
        512: Tiles(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1)),
    },
}


@functools.cache
def launches_of(width: int, itemsize: int, tf32: bool, options: int, architecture: int) -> Launches:
    """Return the launches of all kernels of products.

    options: how many of predictions, smoothing and mixed targets; architecture: ten times the compute capability, 0 on
    AMD's.
    """
    tiles = tiles_of(_TABLE, "input", width, itemsize, tf32, architecture)
    forward = tiles.forward_options if options > 0 else tiles.forward
    grad_input = (options > 1 and tiles.grad_input_options) or tiles.grad_input
    return Launches(forward, grad_input, tiles.grad_factor)


def block_of_rows(width: int) -> dict[str, int]:
    """Return the launch of the kernels that read the vectors of a row and of its targets."""
    return {"BLOCK": max(min(4096 // block_d(width), 64), 8), "num_warps": 4}
