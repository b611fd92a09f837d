# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disable-error-code="assignment, has-type, misc"
# ruff: noqa: RUF005 (Triton knows no starred tuples)
"""The fusion's kernels. One program per sample and part of its classes, which keeps their u in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_experts import _edge_columns, _lane_max, _lane_min, _of_lanes, _row_of, _rows_of, _tile_columns
from ..margin_cross_entropy.triton_math import (
    _INF,
    _NO_COLUMN,
    _REPEAT_AXIS,
    _affine,
    _class_values,
    _exp,
    _full_scale,
    _joined,
    _reference,
)
from ..margin_cross_entropy.triton_rows import _lane_sum

_NO_KEY = tl.constexpr(-(2**31))
_NAN_KEY = tl.constexpr(2**31 - 1)

# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _plus(u, x_ptrs, begins, e: tl.constexpr, offsets, mask, weights, expert_weight_ptr):
    """u (None: 0) and expert e's share."""
    x = tl.load(x_ptrs[e] + begins[e] + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = weights[e]
    if expert_weight_ptr is not None:
        weight = weight * tl.load(expert_weight_ptr + e)
    return _affine(x, weight, u)


@triton.jit
def _fused(
    x_ptrs, begins, first, offsets, mask, weights, expert_weight_ptr, class_shift_ptr, scale, HAS_SCALE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """u of the columns first + offsets, which expert e has at begins[e] + offsets; -inf outside the mask."""
    u = None
    for e in tl.static_range(len(x_ptrs)):
        u = _plus(u, x_ptrs, begins, e, offsets, mask, weights, expert_weight_ptr)
    shift = None
    if class_shift_ptr is not None:
        shift = _class_values(class_shift_ptr, first, offsets, mask, 0.0, WIDE, False)
    if HAS_SCALE:
        u = _affine(u, scale, shift)
    elif shift is not None:
        u += shift
    return tl.where(mask, u, -_INF)


@triton.jit
def _part(
    x_ptrs, row, weights, expert_weight_ptr, class_shift_ptr, learned_scale_ptr, classes, part_groups, expert_stride,
    row_stride, scale, HAS_SCALE: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """A program's columns, tile by tile, so that registers hold the logits of one at a time, and the edge last: u,
    columns from the body's begin (the edge: from the row's), masks. Columns before the body."""
    part = tl.program_id(1)
    begins, bodies, head, groups = _rows_of(row, expert_stride, row_stride, classes, len(x_ptrs), GROUP)
    scale = _full_scale(scale, learned_scale_ptr)
    end = tl.minimum((part + 1) * part_groups, groups)
    us = ()
    columns = ()
    masks = ()
    for tile in tl.static_range(TILES):
        offsets, mask = _tile_columns(part * part_groups + tile * REPEAT * LANES, end, GROUP, LANES, REPEAT)
        u = _fused(
            x_ptrs, bodies, head, offsets, mask, weights, expert_weight_ptr, class_shift_ptr, scale, HAS_SCALE,
            GROUP >= 4,
        )  # fmt: skip
        us = us + (u,)
        columns = columns + (offsets,)
        masks = masks + (mask,)
    edge, edge_mask = _edge_columns(head, groups, classes, GROUP, LANES)
    edge_mask = edge_mask & (part == 0)
    u = _fused(x_ptrs, begins, 0, edge, edge_mask, weights, expert_weight_ptr, class_shift_ptr, scale, HAS_SCALE, False)
    return us + (u,), columns + (edge,), masks + (edge_mask,), head


@triton.jit
def _write(out_ptr, row, row_stride, values, columns, masks, classes, GROUP: tl.constexpr):
    """A part's values to out_ptr [N, C]."""
    begin, body = _row_of(row, row_stride, classes, GROUP)
    for tile in tl.static_range(len(values)):
        origin = body if tile < len(values) - 1 else begin
        tl.store(out_ptr + origin + columns[tile], values[tile], mask=masks[tile])


@triton.jit
def _log_softmax(us, peak, log_mass):
    values = ()
    for tile in tl.static_range(len(us)):
        values = values + ((us[tile] - peak) - log_mass,)
    return values


@triton.jit
def _keys(u, mask):
    """Integers in the order of u, of which NaN is the largest; _NO_KEY, below all, outside the mask."""
    bits = (u + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    keys = tl.where(u == u, tl.where(bits < 0, bits ^ _NAN_KEY, bits), _NAN_KEY)
    return tl.where(mask, keys, _NO_KEY)


@triton.jit
def _value(key):
    return tl.where(key < 0, key ^ _NAN_KEY, key).to(tl.float32, bitcast=True)


@triton.jit
def _places(tile: tl.constexpr, GROUP: tl.constexpr, REPEAT: tl.constexpr):
    """Of a lane's columns of a body: 0, 1, ... in order, over its tiles."""
    if _REPEAT_AXIS == 0:
        repeat = tl.arange(0, REPEAT)[:, None, None]
    else:
        repeat = tl.arange(0, REPEAT)[None, :, None]
    return (tile * REPEAT + repeat) * GROUP + tl.arange(0, GROUP)[None, None, :]


@triton.jit
def _taken(keys, edge_keys, edge_columns, first, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr):
    """The largest key of the tiles ``keys``, which begin in column ``first``, and of the edge; its first column; the
    keys without it. Places, not columns, are compared: they are constants."""
    best = edge_keys
    for tile in tl.static_range(len(keys)):
        best = tl.maximum(best, _lane_max(keys[tile]))
    key = tl.max(best, 0)
    place = tl.full([LANES], _NO_COLUMN, tl.int32)
    for tile in tl.static_range(len(keys)):
        found = tl.where(keys[tile] == key, _places(tile, GROUP, REPEAT), _NO_COLUMN)
        place = tl.minimum(place, _lane_min(found))
    column = first + (place // GROUP * LANES + tl.arange(0, LANES)) * GROUP + place % GROUP
    column = tl.where(place < _NO_COLUMN, column, _NO_COLUMN)
    taken = tl.min(tl.minimum(column, tl.where(edge_keys == key, edge_columns, _NO_COLUMN)), 0)
    place = _of_lanes(tl.where(column == taken, place, -1))
    rest = ()
    for tile in tl.static_range(len(keys)):
        rest = rest + (tl.where(_places(tile, GROUP, REPEAT) == place, _NO_KEY, keys[tile]),)
    return key, taken, rest, tl.where(edge_columns == taken, _NO_KEY, edge_keys)


@triton.jit
def _known(peak, mass):
    """The sum of exponentials relative to the maximum; NaN where all are -inf, as in log_softmax."""
    return tl.where(peak == -_INF, float("nan"), mass)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["part_groups"])
def _fusion_kernel(
    x_ptrs,  # E of [N, C], unit class stride
    weights,  # E numbers
    expert_weight_ptr,  # [E]
    class_shift_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    values_ptr,  # [N, K]
    classes_ptr,  # [N, K] int64
    mass_ptr,  # [N]
    u_ptr,  # [N, C], unit class stride
    log_probs_ptr,  # [N, C], unit class stride; with one part only
    partial_ptr,  # [2, N, parts], with several: maximum, and sum of exponentials relative to it
    partial_keys_ptr,  # [2, N, parts, K] int32: keys and columns of the largest, instead of values and classes
    classes,
    part_groups,
    expert_stride,
    row_stride,
    u_stride,
    log_probs_stride,
    scale,
    HAS_SCALE: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    TILES: tl.constexpr,
):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = tl.num_programs(0).to(tl.int64) * parts
    us, columns, masks, head = _part(
        x_ptrs, row, weights, expert_weight_ptr, class_shift_ptr, learned_scale_ptr, classes, part_groups,
        expert_stride, row_stride, scale, HAS_SCALE, GROUP, LANES, REPEAT, TILES,
    )  # fmt: skip
    peaks = tl.full([LANES], -_INF, tl.float32)
    for tile in tl.static_range(TILES + 1):
        peaks = tl.maximum(peaks, _lane_max(us[tile]))
    peak = tl.max(peaks, 0)
    masses = tl.zeros([LANES], tl.float32)
    for tile in tl.static_range(TILES + 1):
        masses += _lane_sum(_exp(us[tile] - _reference(peak)))
    mass = tl.sum(masses, 0)
    if partial_ptr is None:
        tl.store(mass_ptr + row, _known(peak, mass))
    else:
        tl.store(partial_ptr + row * parts + part, peak)
        tl.store(partial_ptr + size + row * parts + part, mass)
    if u_ptr is not None:
        _write(u_ptr, row, u_stride, us, columns, masks, classes, GROUP)
    if log_probs_ptr is not None:
        values = _log_softmax(us, peak, tl.log(mass))
        _write(log_probs_ptr, row, log_probs_stride, values, columns, masks, classes, GROUP)
    keys = ()
    for tile in tl.static_range(TILES):
        keys = keys + (_keys(us[tile], masks[tile]),)
    edge_keys = _lane_max(_keys(us[TILES], masks[TILES]))  # one each
    edge_columns = _lane_max(columns[TILES])
    first = head + part * part_groups * GROUP
    for i in tl.static_range(K):
        key, column, keys, edge_keys = _taken(keys, edge_keys, edge_columns, first, GROUP, LANES, REPEAT)
        if partial_keys_ptr is None:
            tl.store(values_ptr + row * K + i, _value(key))
            tl.store(classes_ptr + row * K + i, column.to(tl.int64))
        else:
            out_ptr = partial_keys_ptr + (row * parts + part) * K + i
            tl.store(out_ptr, key)
            tl.store(out_ptr + size * K, column)


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(
    partial_ptr,  # [2, N, parts]
    partial_keys_ptr,  # [2, N, parts, K]
    values_ptr,  # [N, K]
    classes_ptr,  # [N, K] int64
    mass_ptr,  # [N]
    peak_ptr,  # [N]: the largest u
    parts,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """What _fusion_kernel found in the parts of a row, together."""
    row = tl.program_id(0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * parts
    part = tl.arange(0, PARTS)
    peaks = tl.load(partial_ptr + row * parts + part, mask=part < parts, other=-_INF)
    masses = tl.load(partial_ptr + size + row * parts + part, mask=part < parts, other=0.0)
    peak = tl.max(peaks, 0)
    masses, _ = _joined(peaks, masses, 0.0, 0.0, peak)
    tl.store(mass_ptr + row, _known(peak, tl.sum(masses, 0)))
    if peak_ptr is not None:
        tl.store(peak_ptr + row, peak)
    if K > 0:
        candidate = tl.arange(0, CANDIDATES)
        in_ptr = partial_keys_ptr + row * parts * K + candidate
        keys = tl.load(in_ptr, mask=candidate < parts * K, other=_NO_KEY)
        columns = tl.load(in_ptr + size * K, mask=candidate < parts * K, other=_NO_COLUMN)
        for i in tl.static_range(K):
            key = tl.max(keys, 0)
            column = tl.min(tl.where(keys == key, columns, _NO_COLUMN), 0)
            keys = tl.where(columns == column, _NO_KEY, keys)
            tl.store(values_ptr + row * K + i, _value(key))
            tl.store(classes_ptr + row * K + i, column.to(tl.int64))


@triton.jit(do_not_specialize=["part_groups"])
def _log_probs_kernel(
    x_ptrs,  # E of [N, C], unit class stride
    weights,  # E numbers
    expert_weight_ptr,  # [E]
    class_shift_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    peak_ptr,  # [N]
    mass_ptr,  # [N]
    log_probs_ptr,  # [N, C], unit class stride
    classes,
    part_groups,
    expert_stride,
    row_stride,
    log_probs_stride,
    scale,
    HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of one part of a row whose maximum and sum of exponentials are known."""
    row = tl.program_id(0).to(tl.int64)
    us, columns, masks, _ = _part(
        x_ptrs, row, weights, expert_weight_ptr, class_shift_ptr, learned_scale_ptr, classes, part_groups,
        expert_stride, row_stride, scale, HAS_SCALE, GROUP, LANES, REPEAT, TILES,
    )  # fmt: skip
    values = _log_softmax(us, tl.load(peak_ptr + row), tl.log(tl.load(mass_ptr + row)))
    _write(log_probs_ptr, row, log_probs_stride, values, columns, masks, classes, GROUP)
