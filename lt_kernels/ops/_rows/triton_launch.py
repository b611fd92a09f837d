"""How a kernel that holds rows in tiles of groups is launched."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Logits that a thread holds of a tile where a row has several.
PER_THREAD = 16


class RowsLaunch(NamedTuple):
    """How rows are visited: whole, as one tile; in a loop over tiles; or in parts, several programs for each row."""

    body: str  # "tile", "loop" or "parts"
    group: int
    repeat: int
    num_warps: int
    part_groups: int = 0  # of "parts": groups of a part
    parts: int = 1
    max_registers: int | None = None

    @property
    def lanes(self) -> int:
        return 32 * self.num_warps

    @property
    def block(self) -> int:
        """Return the columns of a tile."""
        return self.group * self.repeat * self.lanes

    @property
    def constants(self) -> dict[str, int]:
        """Return keyword arguments of the launch."""
        named = {"GROUP": self.group, "LANES": self.lanes, "REPEAT": self.repeat, "num_warps": self.num_warps}
        if self.max_registers is not None and torch.version.hip is None:
            named["maxnreg"] = self.max_registers
        return named


def split_tile(block: int, group: int, per_thread: int) -> tuple[int, int]:
    """Return the groups of a thread, and the warps, of a tile of ``block`` columns."""
    warps = max(block // (32 * per_thread), 1)
    return max(block // (32 * warps * group), 1), warps
