"""How the experts' kernel is launched: a pure function of sizes, and the launches of a call."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
from torch import Tensor

from ..._experts import shape_of
from ..._rows.triton_experts import Layout, contiguous_rows, layout_of, row_stride
from ..._rows.triton_launch import PER_THREAD, RowsLaunch, split_tile
from ..arguments import Arguments

#: Experts of a launch, at most: the kernel has the code of each.
MOST_EXPERTS = 6
#: Widest rows, and how many logits a thread then holds, without options that need registers of their own and with one.
_ONE_TILE = ((16384, 64), (8192, 32))
#: Widest rows, and experts of a launch at most, of which the next one's row is on its way while one is summed up and
#: written; and how many logits and registers a thread then has. A multiprocessor has 16 warps so, of two programs.
#: With 64 logits a thread has 230 registers and a multiprocessor 8 warps, which wait for memory at every expert.
_AHEAD, MOST_AHEAD = 8192, 3
_AHEAD_PER_THREAD, _AHEAD_REGISTERS = 32, 128


class Shape(NamedTuple):
    launch: RowsLaunch
    keep: bool  # the log prior in registers
    ahead: bool  # whether the next expert's row is loaded ahead


@functools.cache
def experts_launch(classes: int, itemsize: int, group: int, options: int) -> Shape | None:
    """Return the launch for rows that a program keeps in registers, None if it cannot.

    options: how many need registers of their own; with two of them the rows kernel does better.
    """
    block = max(triton.next_power_of_2(max(classes // group, 1)) * group, 512)
    if options >= len(_ONE_TILE) or block > _ONE_TILE[options][0]:
        return None
    keep = options == 0 and itemsize == 2 and group == 8
    if options == 0 and block <= _AHEAD and group * itemsize == 16:
        tile = split_tile(block, group, _AHEAD_PER_THREAD)
        return Shape(RowsLaunch("tile", group, *tile, max_registers=_AHEAD_REGISTERS), keep, True)
    return Shape(RowsLaunch("tile", group, *split_tile(block, group, _ONE_TILE[options][1])), keep, False)


class Part(NamedTuple):
    """Experts of one launch."""

    which: slice
    layout: Layout
    shape: Shape


def count_options(a: Arguments) -> int:
    """Return how many options need registers: those read for every column besides one prior or bias; two others count
    as one."""
    o = a.options
    smooth, mixed = o.label_smoothing > 0, o.mixed_target is not None
    weighted = o.weight is not None or o.smooth_weight is not None
    two_biases = o.class_bias is not None and a.log_prior is not None
    return (o.class_scale is not None) + (smooth and weighted) + two_biases + (o.angular + smooth + mixed) // 2


def parts_of(a: Arguments, outputs: list[Tensor]) -> list[Part] | None:
    """Return the launches of a call, None if the kernel does not take it. outputs: the gradient, if there is one."""
    experts, _, classes = shape_of(a.logits)
    tensors = [*a.logits, *outputs]
    if not all(contiguous_rows(x) for x in tensors) or len({row_stride(x) for x in a.logits}) > 1:
        return None
    group, itemsize, options = layout_of(a.logits, *outputs).group, a.logits[0].element_size(), count_options(a)
    shape = experts_launch(classes, itemsize, group, options)
    most = MOST_AHEAD if shape is not None and shape.ahead else MOST_EXPERTS
    per_launch = triton.cdiv(experts, triton.cdiv(experts, most))
    parts = []
    for first in range(0, experts, per_launch):
        which = slice(first, min(first + per_launch, experts))
        logits = a.logits[which] if len(a.logits) == experts else [a.logits[0][which]]
        layout = layout_of(logits, *(grad[which] for grad in outputs))
        shape = experts_launch(classes, itemsize, layout.group, options)
        if shape is None:
            return None
        parts.append(Part(which, layout, shape))
    return parts


def sweep_groups(launch: RowsLaunch) -> int:
    """Return the groups of a thread in a tile of the ensemble's sweep."""
    return max(PER_THREAD // launch.group, 1)
