"""How the fusion's kernels are launched: a pure function of sizes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from ..._device import MOST_GRID_Y

#: Columns of a thread: where a column's logits of all experts are at most 8 bytes, and else. So few that u, and the
#: logits in one of its two tiles, fit into the registers that let 16 warps run together. Warps of a program, at most.
_PER_THREAD, _REGISTERS, _MOST_WARPS = (32, 16), 128, 16
#: Columns of a part of a row that is too wide for one program (more where there would be too many parts).
_PART = 8192
#: Largest number of classes that the kernels select.
SELECTED = 8
#: Most candidates that one program merges.
CANDIDATES = 8192


class FusionLaunch(NamedTuple):
    group: int
    repeat: int
    tiles: int
    num_warps: int
    parts: int

    @property
    def part_groups(self) -> int:
        return 32 * self.num_warps * self.repeat * self.tiles

    @property
    def constants(self) -> dict[str, int]:
        """Return keyword arguments of a launch."""
        named = {"GROUP": self.group, "LANES": 32 * self.num_warps, "REPEAT": self.repeat, "TILES": self.tiles}
        named["num_warps"] = self.num_warps
        return named if torch.version.hip else {**named, "maxnreg": _REGISTERS}


@functools.cache
def fusion_launch(classes: int, column_bytes: int, group: int, k: int) -> FusionLaunch:
    """Return the launch for rows of so many classes. column_bytes: bytes of a column's logits of all experts."""
    groups, per_thread = max(classes // group, 1), _PER_THREAD[column_bytes > 8]
    widest = 32 * _MOST_WARPS * per_thread
    block = max(triton.next_power_of_2(groups), 32) * group
    if block > widest:
        block = _PART
        parts = min(CANDIDATES // k, MOST_GRID_Y) if k else MOST_GRID_Y
        while block < widest and triton.cdiv(groups * group, block) > parts:
            block *= 2
    warps = max(block // (32 * per_thread), 1)
    of_thread = block // (32 * warps * group)  # groups
    tiles = min(of_thread, 2)
    return FusionLaunch(group, of_thread // tiles, tiles, warps, triton.cdiv(groups * group, block))
