"""Launching tiled matrix products: machines, blocks, splits, and the gradients of the product's two sides."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import MULTIPROCESSORS
from .._triton import launch_with
from .triton_tiles import ColumnSums, Factors

#: What starting and ending a program costs, in tiles.
_PROGRAM_COST = 2
#: Bytes of partial gradients, at most, beyond one split.
_PARTIAL_BYTES = 256 * 2**20
#: Rows that the terms are padded to a multiple of: no kernel has larger blocks of rows.
PADDING = 128

_Tiles = TypeVar("_Tiles")


class Cut(NamedTuple):
    """Programs along one side of the product, each with one split of the tiles along the other side."""

    programs: int
    splits: int
    per_split: int  # tiles

    @property
    def grid(self) -> tuple[int, int]:
        return self.programs, self.splits


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

    def along_rows(self, rows: int, columns: int, most: int = 64) -> Cut:
        """Return how blocks of rows visit all columns."""
        return cut(triton.cdiv(rows, self.block_n), triton.cdiv(columns, self.block_c), self.together, most)

    def along_columns(self, rows: int, columns: int, most: int = 64) -> Cut:
        """Return how blocks of columns visit all rows."""
        return cut(triton.cdiv(columns, self.block_c), triton.cdiv(rows, self.block_n), self.together, most)


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


def cut(programs: int, tiles: int, together: int, most: int = 64) -> Cut:
    """Return how ``tiles`` are split if each of ``programs`` would visit all of them."""
    per_split = tiles_per_split(programs, tiles, together, most)
    return Cut(programs, triton.cdiv(tiles, per_split), per_split)


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


def factors(left: Tensor, right: Tensor) -> Factors:
    """Return what kernels read of the matrices [N, D] and [C, D]."""
    rows = readable_rows(left)
    columns = rows if right is left else readable_rows(right)
    width = rows.shape[1]
    block, precision = block_d(width), product_precision(rows.dtype)
    return Factors(
        rows, columns, width, rows.stride(0), columns.stride(0),
        tl.constexpr(block), tl.constexpr(width == block), tl.constexpr(precision),
    )  # fmt: skip


def column_sums(splits: int, first: bool, second: bool, columns: int, like: Tensor) -> ColumnSums:
    """Return room for the sums of the splits."""
    kinds = first + second
    room = like.new_empty((splits, kinds, columns), dtype=torch.float32) if kinds else None
    return ColumnSums(room, tl.constexpr(first), tl.constexpr(second))


def most_splits(elements: int) -> int:
    """Return how many splits partial gradients of so many elements may have."""
    return max(1, min(64, _PARTIAL_BYTES // (4 * elements)))


def partial_gradients(splits: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for the splits of a [N, D] or [C, D] gradient; a single split is the gradient itself."""
    return like.new_empty((splits, *like.shape), dtype=dtype if splits == 1 else torch.float32)


def add_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of the splits, in a fixed order."""
    return (partial[0] if len(partial) == 1 else partial.sum(0)).to(dtype)


def left_gradient(
    kernel: Any, arguments: dict[str, Any], launch: Launch, left: Tensor, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the left matrix, which a kernel computes from all columns."""
    cut = launch.along_rows(left.shape[0], columns, most_splits(left.numel()))
    grad = partial_gradients(cut.splits, left, dtype)
    own = {"grad_ptr": grad, "tiles_per_split": cut.per_split}
    launch_with(kernel, cut.grid, arguments | own, **launch.constants)
    return add_splits(grad, dtype)


def right_gradient(
    kernel: Any, arguments: dict[str, Any], launch: Launch, right: Tensor, rows: int, dtype: torch.dtype | None,
    first: bool, second: bool,
) -> tuple[Tensor, ColumnSums]:  # fmt: skip
    """Return the gradient of the right matrix, [0] if dtype is None, and its columns' sums, both over all rows."""
    columns = right.shape[0]
    cut = launch.along_columns(rows, columns, most_splits(right.numel()))
    grad = None if dtype is None else partial_gradients(cut.splits, right, dtype)
    sums = column_sums(cut.splits, first, second, columns, right)
    own = {"grad_ptr": grad, "sums": sums, "blocks_per_split": cut.per_split}
    launch_with(kernel, cut.grid, arguments | own, **launch.constants)
    return right.new_empty((0,)) if grad is None or dtype is None else add_splits(grad, dtype), sums
