"""The time that a chip's data sheet and a plain copy allow any kernel, printed next to measured times.

floor = max(bytes / copy bandwidth, operations / peak FLOP/s, exponentials / special-function rate)
"""

from __future__ import annotations

from ..ops._device import CHIPS


def static_floor_ms(device: str, bytes_moved: int, flops: int, exponentials: int) -> float | None:
    """Milliseconds; None for a device whose rates are not known."""
    chip = next((chip for name, chip in CHIPS.items() if name in device), None)
    if chip is None:
        return None
    return 1e3 * max(bytes_moved / chip.bytes, flops / chip.flops, exponentials / chip.exponentials)
