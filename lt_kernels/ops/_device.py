"""The chip that sizes are weighed for, whatever device runs: no result depends on the device through a launch.

Every number that a launch table, a plan or a gate takes from a GPU stands here, once. The chip is an H200; an H100 has
its processors and less bandwidth.
"""

from __future__ import annotations

MULTIPROCESSORS = 132
#: What a working set may count on of 50 MB of L2: half, as both halves may hold what both read.
L2_BYTES = 25_000_000
#: Bytes per second that a copy reads and writes.
BYTES_PER_SECOND = 4.3e12
#: Instructions per second and thread that all multiprocessors issue.
INSTRUCTIONS_PER_SECOND = 3.35e13
#: Operations per second of the library's matrix products, by bytes of an element (float32 without tf32).
PRODUCT_FLOPS = {8: 6e13, 4: 5e13, 2: 7.9e14}
#: Seconds of the stream that one more launch costs.
LAUNCH_SECONDS = 2e-6
#: The largest second and third dimension of a grid; the first may have 2**31 - 1.
MOST_GRID_Y = 65535
