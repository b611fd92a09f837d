"""How the divergences' kernels are launched: pure functions of sizes."""

from __future__ import annotations

import functools

import triton

from ..._device import MOST_GRID_Y, MULTIPROCESSORS
from ..._rows.triton_launch import RowsLaunch

#: Logits of all experts that a thread holds at once.
PER_THREAD = 64
#: Warps that keep the device busy that sizes are weighed for, whatever runs: 12 on each multiprocessor.
_BUSY_WARPS = 12 * MULTIPROCESSORS


def power_of_two(limit: int) -> int:
    """Return the largest power of two up to ``limit``, at least 1."""
    return 1 << (max(limit, 1).bit_length() - 1)


@functools.cache
def split_tile(experts: int, group: int) -> tuple[int, int]:
    """Return the columns of a group, at most ``group``, and the groups of a thread: at most 16 columns."""
    group = min(group, power_of_two(PER_THREAD // experts))
    return group, min(power_of_two(PER_THREAD // (experts * group)), max(16 // group, 1))


@functools.cache
def forward_launch(experts: int, rows: int, classes: int, group: int) -> RowsLaunch:
    """Return few warps for each row, as their sums are brought together at its end; more if there are few rows."""
    group, repeat = split_tile(experts, group)
    warps = min(power_of_two(classes // 4096), 8)
    while warps < 8 and rows * warps < _BUSY_WARPS and classes >= 1024 * warps:
        warps *= 2
    return RowsLaunch("loop", group, repeat, warps)


@functools.cache
def backward_launch(experts: int, classes: int, group: int) -> RowsLaunch:
    group, repeat = split_tile(experts, group)
    warps = min(power_of_two(triton.cdiv(classes, 32 * repeat * group)), 4)
    while triton.cdiv(classes, 32 * warps * repeat * group) > MOST_GRID_Y:
        warps, repeat = (2 * warps, repeat) if warps < 32 else (warps, 2 * repeat)
    return RowsLaunch("parts", group, repeat, warps)
