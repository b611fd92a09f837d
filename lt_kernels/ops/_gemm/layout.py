"""Where the rows of a buffer of logits or similarities start."""

from __future__ import annotations

import torch

#: Bytes that rows of a buffer start at multiples of.
LINE = 64


def line(dtype: torch.dtype) -> int:
    """Return how many elements fill 64 bytes."""
    return LINE // dtype.itemsize


def padded(columns: int, dtype: torch.dtype) -> int:
    """Return the columns of a buffer whose rows start at multiples of 64 bytes. May be symbolic."""
    step = line(dtype)
    return (columns + step - 1) // step * step
