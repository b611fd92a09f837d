"""What is known of GPUs: every number that a launch table, a plan, a gate or a benchmark takes from one stands here.

Sizes are weighed for an H200, whatever device runs: no result depends on the device through a launch.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Rates per second."""

    bytes: float  # what a copy reaches, read + write
    flops: float  # what a product of 8192 x 8192 bfloat16 matrices reaches
    exponentials: float


#: Chips by a part of the device's name. An H100 (SXM5: 3.35e12 bytes and 989e12 operations on its data sheet) copies at
#: 3.0e12; its processors are an H200's.
CHIPS = {
    "H200": Chip(bytes=4.3e12, flops=7.9e14, exponentials=4.18e12),
    "H100 80GB HBM3": Chip(bytes=3.0e12, flops=7.98e14, exponentials=4.18e12),
}

MULTIPROCESSORS = 132
#: What a working set may count on of 50 MB of L2: half, as both halves may hold what both read.
L2_BYTES = 25_000_000
#: Bytes per second that a copy reads and writes.
BYTES_PER_SECOND = CHIPS["H200"].bytes
#: Instructions per second and thread that all multiprocessors issue.
INSTRUCTIONS_PER_SECOND = 3.35e13
#: Operations per second of the library's matrix products, by bytes of an element (float32 without tf32).
PRODUCT_FLOPS = {8: 6e13, 4: 5e13, 2: CHIPS["H200"].flops}
#: Seconds of the stream that one more launch costs.
LAUNCH_SECONDS = 2e-6
#: The largest second and third dimension of a grid; the first may have 2**31 - 1.
MOST_GRID_Y = 65535
