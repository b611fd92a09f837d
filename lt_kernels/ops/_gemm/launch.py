"""Launching tiled matrix products: machines, blocks, splits, and the partial gradients of splits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from .._device import MULTIPROCESSORS

#: What starting and ending a program costs, in tiles.
_PROGRAM_COST = 2
#: Bytes of partial gradients, at most, beyond one split.
_PARTIAL_BYTES = 256 * 2**20
#: Rows that the terms are padded to a multiple of: no kernel has larger blocks of rows.
PADDING = 128

_Tiles = TypeVar("_Tiles")


class Launch(NamedTuple):
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    together: int = 1  # programs that run together on a multiprocessor

    @property
    def constants(self) -> dict[str, int]:
        """Return keyword arguments of the launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def block_d(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def machine_of(architecture: int) -> str:
    if architecture == 0:
        return "amd"
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(architecture // 10, "ampere")


def tiles_of(
    table: Mapping[tuple[str, str], Mapping[int, _Tiles]], name: str, width: int, itemsize: int, tf32: bool,
    architecture: int,
) -> _Tiles:  # fmt: skip
    """Return a launch table's entry for vectors of ``width`` numbers.

    table: by machine and kind of product (of 16-bit numbers; of float32 as tf32; of float32 as such), by largest width.
    name: of the argument that is too wide if there is no entry. architecture: ten times the compute capability, 0 on
    AMD's.
    """
    machine = machine_of(architecture)
    product = "half" if itemsize == 2 else "tf32" if tf32 and machine != "amd" else "ieee"
    if machine != "amd" and product != "half":
        machine = "nvidia"
    by_width = table[machine, product]
    limit = min((d for d in by_width if d >= width), default=None)
    if limit is None:
        raise ValueError(f"{name}: got {width} columns, expected at most {max(by_width)} for the tiled strategy")
    return by_width[limit]


@functools.cache
def tiles_per_split(blocks: int, tiles: int, together: int, most: int = 64) -> int:
    """Return the tiles of a split, if each of ``blocks`` programs would have ``tiles``.

    The number takes the fewest rounds of tiles with ``together`` programs at a time on every multiprocessor.
    """

    def rounds(splits: int) -> int:
        each = triton.cdiv(tiles, splits)
        programs = blocks * triton.cdiv(tiles, each)
        return triton.cdiv(programs, MULTIPROCESSORS * together) * (each + _PROGRAM_COST)

    splits = min(range(1, min(tiles, most) + 1), key=rounds)
    return triton.cdiv(tiles, splits)


def architecture_of(device: torch.device) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def product_precision(dtype: torch.dtype) -> str:
    """Return the precision of matrix products: float32 as torch's own."""
    matmul = torch.backends.cuda.matmul
    if dtype != torch.float32:
        return "ieee"
    # the older flag raises once the newer one has been set
    precision = getattr(matmul, "fp32_precision", None)
    if precision in (None, "none"):
        try:
            precision = "tf32" if matmul.allow_tf32 else "ieee"
        except RuntimeError:  # set by the newer interface, elsewhere
            precision = getattr(torch.backends, "fp32_precision", None)
    return "tf32" if precision == "tf32" else "ieee"


def readable_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def most_splits(elements: int) -> int:
    """Return how many splits partial gradients of so many elements may have."""
    return max(1, min(64, _PARTIAL_BYTES // (4 * elements)))


def partial_gradients(splits: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for the splits of a [N, D] or [C, D] gradient; a single split is the gradient itself."""
    return like.new_empty((splits, *like.shape), dtype=dtype if splits == 1 else torch.float32)


def add_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of the splits, in a fixed order."""
    return (partial[0] if len(partial) == 1 else partial.sum(0)).to(dtype)
