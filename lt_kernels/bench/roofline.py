"""The time that a chip's data sheet and a plain copy allow any kernel, printed next to measured times.

floor = max(bytes / copy bandwidth, operations / peak FLOP/s, exponentials / special-function rate)
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Rates a second."""

    bytes: float  # what a copy reaches, read + write
    flops: float  # what a product of 8192 x 8192 bfloat16 matrices reaches
    exponentials: float


#: By a part of the device's name. An H100 (SXM5: 3.35e12 bytes and 989e12 operations on its data sheet) copies at
#: 3.0e12; its processors are an H200's.
CHIPS = {
    "H200": Chip(bytes=4.3e12, flops=790e12, exponentials=4.18e12),
    "H100 80GB HBM3": Chip(bytes=3.0e12, flops=798e12, exponentials=4.18e12),
}


def static_floor_ms(device: str, bytes_moved: int, flops: int, exponentials: int) -> float | None:
    """Milliseconds; None for a device whose rates are not known."""
    chip = next((chip for name, chip in CHIPS.items() if name in device), None)
    if chip is None:
        return None
    return 1e3 * max(bytes_moved / chip.bytes, flops / chip.flops, exponentials / chip.exponentials)
