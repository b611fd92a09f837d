"""How the kernels are launched: pure functions of sizes and options, and the layout of a call.

Sizes and options alone decide, so that no bit of a result depends on the device. *Rows*: the classes of a row are
contiguous. *Tiles*: any other layout, and rows of few classes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
from torch import Tensor

from ..._device import BYTES_PER_SECOND, L2_BYTES, LAUNCH_SECONDS, MOST_GRID_Y, MULTIPROCESSORS
from ..._rows.triton_launch import PER_THREAD, RowsLaunch, split_tile

#: Rows of at most this many classes share a program (tiles); above, each row has its own.
_TILED_CLASSES = 128
#: Largest body that one program keeps in registers, by the number of register-hungry options (class_scale, weighted
#: smoothing, class probabilities; predictions, a second target, or any two options count as one if there is none of
#: these), and how many logits a thread then holds: what compiles without spills.
_ONE_TILE = ((32768, 64), (16384, 64), (8192, 32))
#: Columns of a part of a split row, at least; and parts of a row, at most (what one tile of partials merges).
_PART = 8192
_MAX_PARTS = 1024
#: How many programs the class vectors' gradients are split into, about.
PARTIAL_PROGRAMS = 1024


class TilesLaunch(NamedTuple):
    repeat: int
    lanes: int
    block_k: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """Return keyword arguments of the forward kernel's launch."""
        return {"REPEAT": self.repeat, "LANES": self.lanes, "BLOCK_K": self.block_k, "num_warps": self.num_warps}


class SumsLaunch(NamedTuple):
    block_c: int
    block_k: int
    num_warps: int


def group_of(itemsize: int, aligned: bool) -> int:
    return 16 // itemsize if aligned else 1


def one_tile(classes: int, group: int, hungry_options: int) -> RowsLaunch | None:
    """Return the launch that keeps a row in registers, None if it does not fit."""
    largest, per_thread = _ONE_TILE[min(hungry_options, 2)]
    block = max(triton.next_power_of_2(max(classes // group, 1)) * group, 512)
    return RowsLaunch("tile", group, *split_tile(block, group, per_thread)) if block <= largest else None


def traffic(working_set: float, with_grad: bool) -> float:
    """Return how often the logits' bytes cross the memory bus: read, written, and read again where L2 lost them."""
    return 2 + max(0.0, 1 - L2_BYTES / working_set) if with_grad else 1


def rows_body(rows: int, row_bytes: int, with_grad: bool) -> str:
    """Return how to visit rows that no program can keep, "loop" (whole) or "parts", by their estimated time.

    "loop": a program for each row, so time is in whole waves of rows, one row per multiprocessor. The second read of a
    wave's rows comes out of L2 as far as they fit there together: 132 rows of 100,000 bfloat16 logits are 26 MB and do;
    132 of 1,000,000 do not, and then hardly matter. "parts": every multiprocessor has work whatever the number of rows,
    but all rows are read before any is read again, and there are two more launches.
    """
    wave = MULTIPROCESSORS * row_bytes
    total = rows * row_bytes
    loop = triton.cdiv(rows, MULTIPROCESSORS) * wave * traffic(wave, with_grad)
    parts = total * traffic(total, with_grad) + 2 * LAUNCH_SECONDS * BYTES_PER_SECOND
    return "parts" if parts < loop else "loop"


def loop_warps(row_bytes: int, options: int) -> tuple[int, int | None]:
    """Return the warps of a looping program, and its registers if the compiler is told them.

    Few warps keep the rows of all programs that run together in L2; more fill a multiprocessor. 32 warps leave each
    thread 64 registers, enough without further options. With one or two options 16 warps fill a multiprocessor; the
    compiler is told, as it would rather spill than have a program run alone. With many options arithmetic takes longer
    than memory.
    """
    if options > 2:
        return 8, 255
    for warps in (8, 16):
        if MULTIPROCESSORS * (32 // warps) * row_bytes <= L2_BYTES:
            return warps, None
    return (32, None) if options == 0 else (16, 128)


@functools.cache
def rows_launch(
    rows: int, classes: int, itemsize: int, aligned: bool, hungry_options: int = 0, options: int = 0,
    with_grad: bool = True, arrays: int = 1,
) -> RowsLaunch:  # fmt: skip
    """Return the launch of the rows kernels.

    options: how many there are besides class_bias, scale and margin; arrays: how many tensors like the logits are read.
    """
    group = group_of(itemsize, aligned)
    launch = one_tile(classes, group, hungry_options)
    if launch is not None:
        return launch
    row_bytes = classes * itemsize * arrays
    repeat = max(PER_THREAD // group, 1)
    if rows_body(rows, row_bytes, with_grad) == "loop":
        warps, registers = loop_warps(row_bytes if with_grad else 0, options)
        return RowsLaunch("loop", group, repeat, warps, max_registers=registers)
    part = max(_PART, triton.next_power_of_2(triton.cdiv(classes, _MAX_PARTS)))
    return RowsLaunch("parts", group, repeat, 8, part // group, triton.cdiv(classes, part))


@functools.cache
def rows_backward_launch(classes: int, itemsize: int, aligned: bool) -> RowsLaunch:
    """Return the launch of the rows' backward kernel: it has no reduction, so that several programs share a row."""
    group = group_of(itemsize, aligned)
    block = min(max(triton.next_power_of_2(max(classes // group, 1)) * group, 512), 4096)
    while triton.cdiv(classes, block) > MOST_GRID_Y:
        block *= 2
    repeat, warps = split_tile(block, group, 32)
    return RowsLaunch(
        "parts", group, repeat, warps, block // group, triton.cdiv(max(classes // group, 1) * group, block)
    )


@functools.cache
def tiles_launch(classes: int, positions: int, classes_contiguous: bool, itemsize: int) -> TilesLaunch:
    """Return the tiles of the forward kernel: a thread reads 16 bytes along the contiguous axis."""
    vector = 16 // itemsize
    if classes_contiguous and classes <= _TILED_CLASSES:  # a row for each thread
        block_k = min(triton.next_power_of_2(positions), 128)
        return TilesLaunch(min(vector, triton.next_power_of_2(classes)), 1, block_k, max(block_k // 32, 1))
    if classes_contiguous:
        return TilesLaunch(1, 256, min(triton.next_power_of_2(positions), 4), 4)
    block_k = min(triton.next_power_of_2(positions), 128)
    vector = min(vector, block_k)
    # The fewer lanes, the less is done twice. But a multiprocessor runs some 16 warps, and the second read should find
    # their rows in L2: with 128 rows of 150 bfloat16 logits for every 4 warps they are 20 MB.
    warps = triton.next_power_of_2(max(16 * MULTIPROCESSORS * block_k * classes * itemsize // L2_BYTES, 1))
    warps = warps if warps <= 8 else 4
    lanes = 32 * warps * vector // block_k
    # Of 32 logits a thread at most, the tile that leaves the fewest lanes without a class.
    repeats = [r for r in (1, 2, 4, 8) if r * vector <= 32]
    repeat = min(reversed(repeats), key=lambda r: triton.cdiv(classes, r * lanes) * (r + 1))
    return TilesLaunch(repeat, lanes, block_k, warps)


@functools.cache
def sums_launch(classes: int, positions: int, classes_contiguous: bool) -> SumsLaunch:
    """Return the tiles of the kernels that add up rows or classes, their long side along the contiguous axis."""
    if classes_contiguous:
        block_c = min(triton.next_power_of_2(classes), 1024)
        block_k = min(triton.next_power_of_2(positions), 2048 // block_c)
    else:
        block_k = min(triton.next_power_of_2(positions), 128)
        block_c = min(triton.next_power_of_2(classes), 2048 // block_k)
    while triton.cdiv(classes, block_c) > MOST_GRID_Y:
        block_c, block_k = 2 * block_c, max(block_k // 2, 1)
    return SumsLaunch(block_c, block_k, 4)


def blocks_per_program(blocks: int, class_tiles: int) -> int:
    """Return how many blocks of rows one program of the class vectors' gradients adds up."""
    return triton.cdiv(blocks, min(blocks, max(1, PARTIAL_PROGRAMS // class_tiles)))


# --- layout ----------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the kernels see one call: its shape, and strides by kernel argument."""

    rows: bool  # the rows kernels, else the tiles kernels
    samples: int
    positions: int
    aligned: bool  # whether the groups of all tensors begin on 16 bytes together
    pointers_aligned: bool  # whether the tensors do
    classes_contiguous: bool
    strides: dict[str, int]

    def common_alignment(self, classes: int, itemsize: int) -> int:
        """Return the elements, at most 16 bytes of them, that all rows' starts and lengths are multiples of."""
        steps = [stride for name, stride in self.strides.items() if not name.endswith("_c")]
        return math.gcd(16 // itemsize, classes, *steps) if self.classes_contiguous and self.pointers_aligned else 1

    def strides_of(self, *absent: str, align: int = 1) -> dict[str, int]:
        """Return the strides in units of ``align`` elements, those of classes in elements.

        absent: names of tensors that a kernel also has strides of, 0 if the call has no such tensor.
        """
        axes = "nk" if self.rows else "nck"
        zeros = {f"{name}_stride_{axis}": 0 for name in absent for axis in axes}
        return zeros | {name: s if name.endswith("_c") else s // align for name, s in self.strides.items()}


def readable(x: Tensor) -> Tensor:
    """Return x [N, C, K] itself if its classes or its rows are contiguous, else a contiguous copy."""
    _, classes, k = x.shape
    row_stride = x.stride(0) if k == 1 else x.stride(2)
    return x if classes == 1 or x.stride(1) == 1 or row_stride == 1 else x.contiguous()


def layout_of(named: dict[str, Tensor], rows: bool = True) -> Layout:
    """Return the layout of the [N, C, K] tensors of a kernel, by name, the logits first.

    rows: whether the rows kernels may be used.
    """
    x = next(iter(named.values()))
    n, classes, k = x.shape
    strides = {name: t.stride() for name, t in named.items()}
    contiguous = classes == 1 or x.stride(1) == 1
    rows = rows and classes > _TILED_CLASSES and all(s[1] == 1 for s in strides.values())
    samples, positions, aligned = n, k, False
    pointers_aligned = all(t.data_ptr() % 16 == 0 for t in named.values())
    if rows:
        if k > 1 and all(s[0] == k * s[2] for s in strides.values()):  # channels last: one row after another
            samples, positions, strides = n * k, 1, {name: (s[2], s[1], 0) for name, s in strides.items()}
        group = 16 // x.element_size()
        starts = {(s[0] % group, s[2] % group if positions > 1 else 0) for s in strides.values()}
        aligned = len(starts) == 1 and pointers_aligned
    elif k == 1:
        samples, positions, strides = 1, n, {name: (0, s[1], s[0]) for name, s in strides.items()}
    by_argument = {
        f"{name}_stride_{axis}": stride
        for name, three in strides.items()
        for axis, stride in zip("nck", three, strict=True)
        if axis != "c" or not rows
    }
    return Layout(rows, samples, positions, aligned, pointers_aligned, contiguous, by_argument)


def in_place(x: Tensor, out: Tensor | None) -> bool:
    """Return whether the gradient takes the place of the logits that the kernels read, which may be a copy."""
    return out is not None and out.data_ptr() == x.data_ptr()
