"""``python -m tools.machine_code``: the gate of the Triton kernels."""

import sys

from .engine import main

sys.exit(main())
