"""Limits of instructions per logit that the operators' ``configs.py`` share.

An H200 executes 3.35e13 instructions a second and moves 4.3e12 bytes a second.
"""

from __future__ import annotations

#: Rows that one program keeps.
ONE_TILE_BUDGET = 20.0
#: What an H200 executes while its memory moves the 4 bytes of a bfloat16 logit and its gradient.
MEMORY_BUDGET = 31.0
#: What it executes while its memory reads the 2 bytes of a bfloat16 logit.
READ_BUDGET = 15.6
#: Experts with their ensemble: the second sweep reads logits from L2, so a little more than memory's time.
ENSEMBLE_BUDGET = 33.0
