"""Which way similarities are computed, and how large their blocks are.

Of N queries, M keys, D features, b bytes per element of the products:

    strategy     operations   similarities in memory
    materialize  6 N M D      all of them, from forward to backward: N M b
    chunked      8 N M D      a block, twice in backward: blocks of at most ``block_bytes``
    tiled        10 N M D     none (Triton)

"auto" takes "tiled" where a Triton kernel of 16-bit products can run (D <= 256), "materialize" where all similarities
fit ``KEPT_BYTES`` and the memory budget, and "chunked" beyond. Sizes and settings alone decide, never free memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._gemm.layout import line, padded

STRATEGIES = ("auto", "materialize", "chunked", "tiled")
#: Widest features of the tiled kernels.
TILED_WIDTH = 256
#: Similarities of at most this many bytes are kept from forward to backward.
KEPT_BYTES = 64 * 2**20
#: A block is worked on while it is in a cache.
_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 32 * 2**20}
#: Fewest keys of a block: the queries' gradient is added up once for each block of keys.
_FEWEST_KEYS = 512


class Blocks(NamedTuple):
    """Blocks of similarities are at most [rows, keys]."""

    rows: int
    keys: int


def blocks(rows: int, keys: int, dtype: torch.dtype, device: str, memory_budget: int) -> Blocks:
    """All rows and as many keys as fit; fewer rows where even ``_FEWEST_KEYS`` keys of all are too many."""
    step = line(dtype)
    elements = max(1, min(_BLOCK_BYTES.get(device, 2**25), memory_budget) // dtype.itemsize)
    fewest = padded(min(max(keys, 1), _FEWEST_KEYS), dtype)
    n = _even(rows, max(1, elements // fewest), 8)
    return Blocks(n, _even(keys, max(elements // max(n, 1) // step * step, 1), step))


def _even(size: int, most: int, step: int) -> int:
    """The size of even blocks of at most ``most``, a multiple of ``step`` if that fits."""
    if size <= most:
        return max(size, 1)
    count = -(-size // most)
    even = -(-size // count)
    up = -(-even // step) * step
    return up if up <= most else max(most // step * step, min(most, step))


def tiled_reason(width: int, dtype: torch.dtype) -> str | None:
    """Why "tiled" cannot run where Triton does; None where it can."""
    if width > TILED_WIDTH:
        return f"it takes at most {TILED_WIDTH} features, not {width}"
    if dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, not float64"
    return None


def choose(
    rows: int, keys: int, dtype: torch.dtype, training: bool, tiled: bool, strategy: str, memory_budget: int
) -> str:
    """The strategy that runs. tiled: whether that one can run the call."""
    if strategy != "auto":
        return strategy
    if tiled and dtype.itemsize == 2:
        return "tiled"
    fits = rows * keys * dtype.itemsize <= min(memory_budget, KEPT_BYTES)
    return "materialize" if training and fits else "chunked"
