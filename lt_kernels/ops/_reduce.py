"""Sums whose bits do not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1024


def ordered_sum(values: Tensor) -> Tensor:
    """Sum of all elements, 0-dim, always added in the same order.

    On the CPU ``torch.sum`` splits a long vector between its threads; here each chunk is summed by one thread.
    """
    flat = values.reshape(-1)
    if flat.device.type != "cpu" or flat.shape[0] <= _CHUNK:
        return flat.sum()
    whole = flat.shape[0] // _CHUNK * _CHUNK
    chunks = flat[:whole].view(-1, _CHUNK).sum(1)
    return ordered_sum(torch.cat([chunks, flat[whole:].sum(0, keepdim=True)]))
