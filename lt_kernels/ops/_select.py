"""Selection of the largest entries of rows, stable: of equal ones the first column, and NaN is larger than all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Smallest and largest group; smaller ones are slow to reduce.
GROUPS = (64, 1024)
#: At most this many entries are selected from at a time.
_SELECTED = 2**20


def group_size(columns: int, k: int) -> int:
    """Neighbouring columns per group: a power of two, so that as many maxima as members of k groups are visited."""
    best = 2 ** round(math.log2(max(1.0, columns / k)) / 2)
    return min(max(best, GROUPS[0]), GROUPS[1])


def largest_of_all(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, the largest first, and their columns: a selection among all columns."""
    if k == 1:
        values, places = x.max(1, keepdim=True)
        return values, places
    if x.dtype == torch.float64:
        values, places = x.sort(dim=1, descending=True, stable=True)
        return values[:, :k], places[:, :k]
    places = _keys(x.float()).topk(k, 1)[1]
    return x.gather(1, places), places


def _keys(x: Tensor) -> Tensor:
    """Distinct int64 in the order of float32 values, then of decreasing column: a selection that need not be stable."""
    bits = (x + 0.0).view(torch.int32).to(torch.int64)  # -0.0 + 0.0 is 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill_(x.isnan(), 0x7FFFFFFF)
    return (bits << 32) - torch.arange(x.shape[1], device=x.device)


def largest(x: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """The same for wide rows; ``x`` [n, c] with c a multiple of ``group``, and at most c results.

    The k largest are among the k groups of neighbouring columns whose maxima are largest (ties: the first group), so
    that only these groups and the groups' maxima are selected from: a maximum over groups runs at the speed of memory,
    a selection among all columns does not.
    """
    k = min(k, x.shape[1])
    selected = min(x.shape[1], k * group)
    if x.shape[0] * selected > _SELECTED:  # keys of many entries are larger than the entries
        parts = [_largest_of_rows(part, k, group) for part in x.split(max(1, _SELECTED // selected))]
        return torch.cat([values for values, _ in parts]), torch.cat([places for _, places in parts])
    return _largest_of_rows(x, k, group)


def _largest_of_rows(x: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    if x.shape[1] <= k * group:
        return largest_of_all(x, k)
    _, chosen = largest_of_all(x.unflatten(1, (-1, group)).amax(2), k)
    chosen = chosen.sort(1)[0]  # columns in ascending order again
    columns = (chosen[:, :, None] * group + torch.arange(group, device=x.device)).flatten(1)
    values, places = largest_of_all(x.gather(1, columns), k)
    return values, columns.gather(1, places)
