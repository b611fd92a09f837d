# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disable-error-code="assignment, has-type, misc"
# ruff: noqa: RUF005 (Triton knows no starred tuples)
"""How Triton kernels see the logits of several experts: a tuple of pointers, read side by side.

Rows are cut into groups, a body and an edge as in ``margin_cross_entropy/triton_rows.py``. All tensors of a sample must
begin at the same place within a group, which is 16 bytes if the strides allow it, else as many as they do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .margin_cross_entropy.triton_math import _REPEAT_AXIS, _groups, _repeated


class Layout(NamedTuple):
    """E experts' rows with contiguous classes: expert e's row n begins at tensors[e] + e * expert_stride
    + n * row_stride."""

    tensors: tuple[Tensor, ...]
    expert_stride: int
    row_stride: int
    group: int  # columns that are read and written together


def row_stride(x: Tensor) -> int:
    """Of [..., N, C]: elements between rows; 0 if there is one alone."""
    return 0 if x.shape[-2] == 1 else x.stride(-2)


def contiguous_rows(x: Tensor) -> bool:
    return x.shape[-1] == 1 or x.stride(-1) == 1


def layout_of(logits: list[Tensor], *outputs: Tensor) -> Layout:
    """Of logits that are one [E, N, C], or E of [N, C]; copied where classes are not contiguous or the experts' strides
    differ. outputs: what is written beside them, [..., N, C] with contiguous classes."""
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
def _rows_of(row, expert_stride, row_stride, classes, EXPERTS: tl.constexpr, GROUP: tl.constexpr):
    """Of each expert's tensor: where the row begins and where its first whole group does. Of all of them: columns
    before that, and whole groups."""
    begins = ()
    bodies = ()
    for e in tl.static_range(EXPERTS):
        begin = tl.cast(expert_stride, tl.int64) * e + row * row_stride
        body, head, groups = _groups(begin, classes, GROUP)
        begins = begins + (begin,)
        bodies = bodies + (body,)
    return begins, bodies, head, groups


@triton.jit
def _row_of(row, row_stride, classes, GROUP: tl.constexpr):
    """The same of one tensor [N, C]."""
    body, _, _ = _groups(row * row_stride, classes, GROUP)
    return row * row_stride, body


@triton.jit
def _edge_columns(head, groups, classes, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Columns outside the body, at most one a lane: a tile [REPEAT, LANES, GROUP] of one each, and which exist."""
    lane = _repeated(0, 1, LANES)[:, :, None]
    columns = tl.where(lane < GROUP, lane, head + groups * GROUP + lane - GROUP)
    return columns, tl.where(lane < GROUP, lane < head, columns < classes)


@triton.jit
def _tile_columns(begin, end, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr):
    """Offsets from the body's begin of groups ``begin`` on, [REPEAT, LANES, GROUP], and which are before ``end``."""
    group = _repeated(begin, REPEAT, LANES)
    offsets = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    return offsets, tl.broadcast_to((group < end)[:, :, None], offsets.shape)


@triton.jit
def _lane_max(x):
    return tl.max(tl.max(x, 2), _REPEAT_AXIS)


@triton.jit
def _lane_min(x):
    return tl.min(tl.min(x, 2), _REPEAT_AXIS)


@triton.jit
def _of_lanes(x):
    """[LANES] against tiles."""
    return tl.expand_dims(x, _REPEAT_AXIS)[:, :, None]
