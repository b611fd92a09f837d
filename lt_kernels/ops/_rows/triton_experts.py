"""How Triton kernels see the logits of several experts: a tuple of pointers, read side by side.

Rows are cut into groups, a body and an edge as in ``triton_io.py``. All tensors of a sample must begin at the same
place within a group, which is 16 bytes if the strides allow it, else as many as they do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .triton_io import repeat_lanes, split_groups


class Layout(NamedTuple):
    """E experts' rows with contiguous classes: expert e's row n begins at tensors[e] + e * expert_stride
    + n * row_stride."""

    tensors: tuple[Tensor, ...]
    expert_stride: int
    row_stride: int
    group: int  # columns that are read and written together


def row_stride(x: Tensor) -> int:
    """Return the elements between rows of [..., N, C]; 0 if there is one row alone."""
    return 0 if x.shape[-2] == 1 else x.stride(-2)


def contiguous_rows(x: Tensor) -> bool:
    """Return whether classes are contiguous."""
    return x.shape[-1] == 1 or x.stride(-1) == 1


def layout_of(logits: list[Tensor], *outputs: Tensor) -> Layout:
    """Return the layout of logits that are one [E, N, C], or E of [N, C].

    They are copied if classes are not contiguous or the experts' strides differ. outputs: tensors that are written with
    them, [..., N, C] with contiguous classes.
    """
    first = logits[0]
    if not all(contiguous_rows(x) for x in logits) or len({row_stride(x) for x in logits}) > 1:
        logits = [x.contiguous() for x in logits]
        first = logits[0]
    tensors, expert_stride = tuple(logits), 0
    if first.dim() == 3:
        tensors = (first,) * first.shape[0]
        expert_stride = 0 if first.shape[0] == 1 else first.stride(0)
    step = row_stride(first)
    group = 1
    if all(x.data_ptr() % 16 == 0 for x in (*logits, *outputs)):
        steps = [
            expert_stride,
            *(step - row_stride(x) for x in outputs),
            *(x.stride(0) for x in outputs if x.dim() > 2),
        ]
        group = math.gcd(16 // first.element_size(), *steps)
    return Layout(tensors, expert_stride, step, group)


@triton.jit
def locate_rows(row, expert_stride, row_stride, classes, EXPERTS: tl.constexpr, GROUP: tl.constexpr):
    """Return where the row and its first whole group begin in each expert's tensor; and, for all of them, the columns
    before that group and the number of whole groups."""
    begins = ()
    bodies = ()
    for e in tl.static_range(EXPERTS):
        begin = tl.cast(expert_stride, tl.int64) * e + row * row_stride
        body, head, groups = split_groups(begin, classes, GROUP)
        begins = begins + (begin,)  # noqa: RUF005 (Triton knows no starred tuples)
        bodies = bodies + (body,)  # noqa: RUF005
    return begins, bodies, head, groups


@triton.jit
def locate_row(row, row_stride, classes, GROUP: tl.constexpr):
    """Return where the row of one tensor [N, C] and its first whole group begin."""
    body, _, _ = split_groups(row * row_stride, classes, GROUP)
    return row * row_stride, body


@triton.jit
def expert_edge(head, groups, classes, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Return the columns outside the body, at most one a lane, as a tile [1, LANES, 1]; and which exist."""
    lane = repeat_lanes(0, 1, LANES)[:, :, None]
    columns = tl.where(lane < GROUP, lane, head + groups * GROUP + lane - GROUP)
    return columns, tl.where(lane < GROUP, lane < head, columns < classes)


@triton.jit
def expert_tile(begin, end, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr):
    """Return the offsets of groups ``begin`` on in the body, [REPEAT, LANES, GROUP]; and which are before ``end``."""
    group = repeat_lanes(begin, REPEAT, LANES)
    offsets = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    return offsets, tl.broadcast_to((group < end)[:, :, None], offsets.shape)
