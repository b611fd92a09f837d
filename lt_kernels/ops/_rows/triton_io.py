"""How Triton kernels visit the columns of rows: groups, tiles and edges, class vectors, and what is done per column.

Groups. A row of 8142 bf16 logits starts on a 4-byte boundary, so 16-byte accesses must ignore where rows begin. The
body of a row is cut into aligned groups of GROUP columns (16 bytes); each is read and written whole or not at all. The
irregular columns form the *edge*: the head before the first whole group, the tail after the last, and the groups that
hold a target. One comparison per group leaves them out of the body, and a tile of 4 * GROUP columns does them. So the
body needs no comparison per column, no element of a neighbouring row is touched, and no sum contains a target's column.

Tiles of a body are [REPEAT, LANES, GROUP] with LANES the threads of the program: each thread has REPEAT groups. Sums
over tiles are kept per lane, so that a loop over tiles has no exchange between threads and its loads need not wait for
one another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_math import (
    INF,
    NO_COLUMN,
    affine,
    fast_exp,
    finite_reference,
    largest,
    place_targets,
    rescale_sums,
    same_number,
    target_gradient,
    times_weight,
)

#: Position of the axis REPEAT in tiles [REPEAT, LANES, contiguous] (or [LANES, REPEAT, contiguous]): Triton spreads
#: threads over the later of the first two axes, until 3.6 over the earlier; REPEAT must be the other one.
REPEAT_AXIS = tl.constexpr(0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 1)


class Place(NamedTuple):
    """Where a row of contiguous logits is, how it is cut, and what shifts its logits."""

    x_ptr: Any  # its first logit
    head: Any  # columns before the body
    groups: Any  # of the body
    group_a: Any  # the group that holds a target, -1 for none
    group_b: Any
    scale: Any
    smooth_share: Any  # label smoothing of one class


class Edge(NamedTuple):
    """The irregular columns of a row, [4 * GROUP], and their logits."""

    columns: Any
    mask: Any  # which exist
    rest: Any  # which exist and are no target
    x: Any
    u: Any


# --- where columns are -----------------------------------------------------------------------------------------------


@triton.jit
def split_groups(offset, classes, GROUP: tl.constexpr):
    """Return the first aligned element of a row that starts at ``offset``, the columns before it, and the number of
    whole groups."""
    aligned = (offset + (GROUP - 1)) // GROUP * GROUP
    head = tl.minimum((aligned - offset).to(tl.int32), classes)
    return aligned, head, (classes - head) // GROUP


@triton.jit
def find_group(column, head, groups, GROUP: tl.constexpr):
    """Return the whole group that holds the column, -1 if none does."""
    group = (column - head) // GROUP
    return tl.where((column >= head) & (group < groups), group, -1)


@triton.jit
def target_groups(column_a, column_b, head, groups, MIXED: tl.constexpr, GROUP: tl.constexpr):
    """Return the groups of both targets, -1 for none; the second is also -1 if it is the first."""
    group_a, group_b = find_group(column_a, head, groups, GROUP), -1
    if MIXED:
        group_b = find_group(column_b, head, groups, GROUP)
        group_b = tl.where(group_b == group_a, -1, group_b)
    return group_a, group_b


@triton.jit
def edge_columns(head, groups, group_a, group_b, classes, GROUP: tl.constexpr):
    """Return the columns outside the body, [4 * GROUP]: head, tail, the groups of the two targets; and which exist."""
    lane = tl.arange(0, 4 * GROUP)
    part = lane // GROUP
    tail = head + groups * GROUP
    first = tl.where(part == 0, 0, tail)
    stop = tl.where(part == 0, head, classes)
    group = tl.where(part == 2, group_a, group_b)
    first = tl.where(part >= 2, head + group * GROUP, first)
    stop = tl.where(part >= 2, tl.where(group >= 0, tail, first), stop)
    columns = first + lane % GROUP
    return columns, columns < stop


@triton.jit
def split_row(n, k, stride_n, stride_k, classes, GROUP: tl.constexpr):
    """Return where the row and its first whole group begin, the columns before it, and the number of whole groups."""
    offset = n * stride_n + k * stride_k
    aligned, head, groups = split_groups(offset, classes, GROUP)
    return offset, aligned, head, groups


@triton.jit
def repeat_lanes(begin, REPEAT: tl.constexpr, LANES: tl.constexpr):
    """Return begin, begin + 1, ...: [REPEAT, LANES]."""
    if REPEAT_AXIS == 0:
        return begin + tl.arange(0, REPEAT)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    else:
        return begin + tl.arange(0, REPEAT)[None, :] * LANES + tl.arange(0, LANES)[:, None]


@triton.jit
def body_tile(begin, end, group_a, group_b, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr):
    """Return the tile from group ``begin`` on: its groups [REPEAT, LANES], which of them are in the body, all offsets
    and their mask."""
    group = repeat_lanes(begin, REPEAT, LANES)
    inside = (group < end) & (group != group_a) & (group != group_b)
    offsets = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    mask = tl.broadcast_to(inside[:, :, None], offsets.shape)
    return group, inside, offsets, mask


@triton.jit
def block_rows(block, positions, BLOCK_K: tl.constexpr):
    """Return the sample and positions of a block of rows, which exist, and row numbers (past the end: the last)."""
    blocks = (positions + (BLOCK_K - 1)) // BLOCK_K
    n = (block // blocks).to(tl.int64)
    k = (block % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    return n, k, k < positions, n * positions + tl.minimum(k, positions - 1)


# --- what lanes have -------------------------------------------------------------------------------------------------


@triton.jit
def lane_sum(x):
    return tl.sum(tl.sum(x, 2), REPEAT_AXIS)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, 2), REPEAT_AXIS)


@triton.jit
def lane_min(x):
    return tl.min(tl.min(x, 2), REPEAT_AXIS)


@triton.jit
def expand_lanes(x):
    """Return [LANES] against tiles."""
    return tl.expand_dims(x, REPEAT_AXIS)[:, :, None]


@triton.jit
def merge_online_lse(u, peaks, masses, weighteds, visiteds):
    """Add a tile to the lanes' maxima and sums; also return the tile relative to the maxima. ``weighteds`` lacks the
    tile's share."""
    before = peaks
    peaks = tl.maximum(peaks, lane_max(u))
    masses, weighteds = rescale_sums(before, masses, weighteds, visiteds, peaks)
    z = u - expand_lanes(finite_reference(peaks))
    masses += lane_sum(fast_exp(z))
    return peaks, masses, weighteds, z


@triton.jit
def best_groups(x, group, inside):
    """Return each lane's maximum (a NaN is larger than anything) and the first group that has it, [LANES]."""
    highest = largest(x, 2)
    best = largest(highest, REPEAT_AXIS)
    has_it = inside & same_number(highest, tl.expand_dims(best, REPEAT_AXIS))
    return best, tl.min(tl.where(has_it, group, NO_COLUMN), REPEAT_AXIS)


@triton.jit
def best_of_lanes(body_ptr, head, best, group, GROUP: tl.constexpr):
    """Return the maximum over the lanes and its first column, whose group is read again."""
    highest = largest(best, 0)
    first = tl.min(tl.where(same_number(best, highest), group, NO_COLUMN), 0)
    exists = first < NO_COLUMN
    offsets = tl.where(exists, first, 0) * GROUP + tl.arange(0, GROUP)
    x = tl.load(body_ptr + offsets, mask=exists & (offsets >= 0), other=-INF).to(tl.float32)
    return highest, tl.min(tl.where(exists & same_number(x, highest), head + offsets, NO_COLUMN), 0)


# --- columns ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_class_values(ptr, first, offsets, mask, other, WIDE: tl.constexpr, AGAIN: tl.constexpr):
    """Load ptr[first + offsets] of a [C] float32 vector.

    WIDE: with the widest accesses that ``first`` allows. AGAIN: not for the first time; marked so that the compiler
    loads once more rather than keep a row of values in registers.
    """
    policy: tl.constexpr = "evict_last" if AGAIN else ""
    if WIDE:
        if first % 4 == 0:
            values = tl.load(ptr + first // 4 * 4 + offsets, mask=mask, other=other, eviction_policy=policy)
        elif first % 2 == 0:
            values = tl.load(ptr + first // 2 * 2 + offsets, mask=mask, other=other, eviction_policy=policy)
        else:
            values = tl.load(ptr + first + offsets, mask=mask, other=other, eviction_policy=policy)
    else:
        values = tl.load(ptr + first + offsets, mask=mask, other=other, eviction_policy=policy)
    return values


@triton.jit
def shift_logits(x, first, offsets, mask, o, scale, WIDE: tl.constexpr):
    """Return u = scale * class_scale * x + class_bias; -inf outside the mask, where x is -inf."""
    bias = None
    if o.class_bias_ptr is not None:
        bias = load_class_values(o.class_bias_ptr, first, offsets, mask, 0.0, WIDE, False)
    return shift_logits_by(x, bias, first, offsets, mask, o, scale, WIDE)


@triton.jit
def shift_logits_by(x, bias, first, offsets, mask, o, scale, WIDE: tl.constexpr):
    """Return u for a bias that has been loaded, None for none."""
    if o.class_scale_ptr is not None:
        class_scale = load_class_values(o.class_scale_ptr, first, offsets, mask, 1.0, WIDE, False)
        u = affine(x, scale * class_scale, bias)
        u = tl.where(mask, u, -INF)  # -inf times what is not positive
    elif o.scaled:
        u = tl.where(mask, affine(x, scale, bias), -INF)
    else:
        u = x if bias is None else x + bias
    return u


@triton.jit
def undo_scale(gradient, first, offsets, mask, o, scale, WIDE: tl.constexpr):
    """Return a_j times the gradient of u: the gradient of x."""
    if o.class_scale_ptr is not None:
        class_scale = load_class_values(o.class_scale_ptr, first, offsets, mask, 1.0, WIDE, True)
        gradient = gradient * (scale * class_scale)
    elif o.scaled:
        gradient = gradient * scale
    return gradient


@triton.jit
def load_soft_weights(q_ptr, q_offsets, first, offsets, mask, smooth_share, o, WIDE: tl.constexpr):
    """Return w_j ((1 - smoothing) q_j + smoothing / C), as classes are smoothed; 0 outside the mask."""
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0).to(tl.float32)
    if o.smooth and o.smoothing_ptr is None:
        q = tl.where(mask, (1.0 - o.label_smoothing) * q + smooth_share, 0.0)
    if o.weight_ptr is not None:
        q = q * load_class_values(o.weight_ptr, first, offsets, mask, 0.0, WIDE, False)
    if o.smoothing_ptr is not None:
        smooth = load_class_values(o.smooth_weight_ptr, first, offsets, mask, 0.0, WIDE, False)
        q = (1.0 - o.label_smoothing) * q + smooth
    return q


@triton.jit
def ordinary_gradient(e, slope, smooth, q, first, offsets, mask, o, WIDE: tl.constexpr):
    """Return the gradient of u where no target is, from e = exp(u - peak); q: the soft weights of probabilities."""
    du = slope * e
    if o.soft:
        du -= smooth * q
    elif o.smooth:
        if o.smooth_weight_ptr is not None:
            du -= smooth * load_class_values(o.smooth_weight_ptr, first, offsets, mask, 0.0, WIDE, True)
        else:
            du -= smooth
    return du


@triton.jit
def weigh(z, first, offsets, mask, o, WIDE: tl.constexpr):
    """Return z_j times its smooth weight inside the mask, else 0."""
    if o.smooth_weight_ptr is not None:
        z = times_weight(load_class_values(o.smooth_weight_ptr, first, offsets, mask, 0.0, WIDE, False), z, o)
    return tl.where(mask, z, 0.0)


@triton.jit
def read_edge(at, a, b, classes, o, GROUP: tl.constexpr):
    """Load the edge of a row. a, b: the targets; not used where the options are soft."""
    columns, mask = edge_columns(at.head, at.groups, at.group_a, at.group_b, classes, GROUP)
    x = tl.load(at.x_ptr + columns, mask=mask, other=-INF).to(tl.float32)
    u = shift_logits(x, 0, columns, mask, o, at.scale, False)
    rest = mask
    if not o.soft:
        rest = rest & (columns != a.column)
        if o.mixed_target_ptr is not None:
            rest = rest & (columns != b.column)
    return Edge(columns, mask, rest, x, u)


@triton.jit
def edge_gradient(e, q, a, b, slopes, edge, edge_mask, o, scale):
    """Return the gradient of the edge's logits. a, b: the targets; None where the options are soft."""
    du = ordinary_gradient(e, slopes.slope, slopes.smooth, q, 0, edge, edge_mask, o, False)
    if not o.soft:
        du = place_targets(edge, du, target_gradient(a, b, slopes, o), o)
    return undo_scale(du, 0, edge, edge_mask, o, scale, False)


@triton.jit
def body_gradient(e, q, slopes, head, offsets, mask, o, scale, WIDE: tl.constexpr):
    """Return the gradient of a tile of the body's logits."""
    du = ordinary_gradient(e, slopes.slope, slopes.smooth, q, head, offsets, mask, o, WIDE)
    return undo_scale(du, head, offsets, mask, o, scale, WIDE)
