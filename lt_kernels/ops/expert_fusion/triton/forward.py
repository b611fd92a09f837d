"""The fusion's kernels: one program per sample and part of its classes, which keeps their u in registers.

Bytes per sample (b = itemsize), without class vectors: E C b read once, and 4 C written if log-probabilities are asked
for. Rows of up to 16,384 classes (8192 where E b > 8) are one program's. Wider ones are split into parts, each a
program's, whose results a small kernel merges (E C b read again for log-probabilities). Up to 8 largest classes are
found in registers; for more, u is written (4 C) and torch selects. The code is unrolled over the experts, whose number
has no limit but costs compile time.
"""
# ruff: noqa: RUF005 (Triton knows no starred tuples)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._rows.triton_experts import expert_edge, expert_tile, layout_of, locate_row, locate_rows, row_stride
from ..._rows.triton_io import REPEAT_AXIS, expand_lanes, lane_max, lane_min, lane_sum, load_class_values
from ..._rows.triton_math import INF, NO_COLUMN, affine, fast_exp, finite_reference, load_scale, rescale_sums
from ..._select import group_size, largest
from ..arguments import Arguments
from ..fused import normalized
from . import launch as table
from .launch import CANDIDATES, SELECTED

NO_KEY = tl.constexpr(-(2**31))
NAN_KEY = tl.constexpr(2**31 - 1)

# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def add_expert(u, x_ptrs, begins, e: tl.constexpr, offsets, mask, weights, expert_weight_ptr):
    """Return u (None: 0) plus expert e's share."""
    x = tl.load(x_ptrs[e] + begins[e] + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = weights[e]
    if expert_weight_ptr is not None:
        weight = weight * tl.load(expert_weight_ptr + e)
    return affine(x, weight, u)


@triton.jit
def fuse_columns(
    x_ptrs, begins, first, offsets, mask, weights, expert_weight_ptr, class_shift_ptr, scale, HAS_SCALE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Return u of the columns first + offsets, which expert e has at begins[e] + offsets; -inf outside the mask."""
    u = None
    for e in tl.static_range(len(x_ptrs)):
        u = add_expert(u, x_ptrs, begins, e, offsets, mask, weights, expert_weight_ptr)
    shift = None
    if class_shift_ptr is not None:
        shift = load_class_values(class_shift_ptr, first, offsets, mask, 0.0, WIDE, False)
    if HAS_SCALE:
        u = affine(u, scale, shift)
    elif shift is not None:
        u += shift
    return tl.where(mask, u, -INF)


@triton.jit
def fuse_part(
    x_ptrs, row, weights, expert_weight_ptr, class_shift_ptr, learned_scale_ptr, classes, part_groups, expert_stride,
    row_stride, scale, HAS_SCALE: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Return u, columns and masks of a program's tiles and edge, and the number of columns before the body.

    Tiles come one by one, so that registers hold the logits of one at a time; the edge comes last. Columns count from
    the body's begin, those of the edge from the row's.
    """
    part = tl.program_id(1)
    begins, bodies, head, groups = locate_rows(row, expert_stride, row_stride, classes, len(x_ptrs), GROUP)
    scale = load_scale(scale, learned_scale_ptr)
    end = tl.minimum((part + 1) * part_groups, groups)
    us = ()
    columns = ()
    masks = ()
    for tile in tl.static_range(TILES):
        offsets, mask = expert_tile(part * part_groups + tile * REPEAT * LANES, end, GROUP, LANES, REPEAT)
        u = fuse_columns(
            x_ptrs, bodies, head, offsets, mask, weights, expert_weight_ptr, class_shift_ptr, scale, HAS_SCALE,
            GROUP >= 4,
        )  # fmt: skip
        us = us + (u,)
        columns = columns + (offsets,)
        masks = masks + (mask,)
    edge, edge_mask = expert_edge(head, groups, classes, GROUP, LANES)
    edge_mask = edge_mask & (part == 0)
    u = fuse_columns(
        x_ptrs, begins, 0, edge, edge_mask, weights, expert_weight_ptr, class_shift_ptr, scale, HAS_SCALE, False
    )
    return us + (u,), columns + (edge,), masks + (edge_mask,), head


@triton.jit
def write_part(out_ptr, row, row_stride, values, columns, masks, classes, GROUP: tl.constexpr):
    """Write a part's values to out_ptr [N, C]."""
    begin, body = locate_row(row, row_stride, classes, GROUP)
    for tile in tl.static_range(len(values)):
        origin = body if tile < len(values) - 1 else begin
        tl.store(out_ptr + origin + columns[tile], values[tile], mask=masks[tile])


@triton.jit
def log_softmax(us, peak, log_mass):
    values = ()
    for tile in tl.static_range(len(us)):
        values = values + ((us[tile] - peak) - log_mass,)
    return values


@triton.jit
def sort_keys(u, mask):
    """Integers in the order of u, of which NaN is the largest; NO_KEY, below all, outside the mask."""
    bits = (u + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    keys = tl.where(u == u, tl.where(bits < 0, bits ^ NAN_KEY, bits), NAN_KEY)
    return tl.where(mask, keys, NO_KEY)


@triton.jit
def key_value(key):
    return tl.where(key < 0, key ^ NAN_KEY, key).to(tl.float32, bitcast=True)


@triton.jit
def lane_places(tile: tl.constexpr, GROUP: tl.constexpr, REPEAT: tl.constexpr):
    """Return the places 0, 1, ... of a lane's columns of a body, in order over its tiles."""
    if REPEAT_AXIS == 0:
        repeat = tl.arange(0, REPEAT)[:, None, None]
    else:
        repeat = tl.arange(0, REPEAT)[None, :, None]
    return (tile * REPEAT + repeat) * GROUP + tl.arange(0, GROUP)[None, None, :]


@triton.jit
def take_largest(keys, edge_keys, edge_columns, first, GROUP: tl.constexpr, LANES: tl.constexpr, REPEAT: tl.constexpr):
    """Return the largest key of the edge and of the tiles ``keys``, which begin in column ``first``; its first column;
    and the keys without it. Places, not columns, are compared: they are constants."""
    best = edge_keys
    for tile in tl.static_range(len(keys)):
        best = tl.maximum(best, lane_max(keys[tile]))
    key = tl.max(best, 0)
    place = tl.full([LANES], NO_COLUMN, tl.int32)
    for tile in tl.static_range(len(keys)):
        found = tl.where(keys[tile] == key, lane_places(tile, GROUP, REPEAT), NO_COLUMN)
        place = tl.minimum(place, lane_min(found))
    column = first + (place // GROUP * LANES + tl.arange(0, LANES)) * GROUP + place % GROUP
    column = tl.where(place < NO_COLUMN, column, NO_COLUMN)
    taken = tl.min(tl.minimum(column, tl.where(edge_keys == key, edge_columns, NO_COLUMN)), 0)
    place = expand_lanes(tl.where(column == taken, place, -1))
    rest = ()
    for tile in tl.static_range(len(keys)):
        rest = rest + (tl.where(lane_places(tile, GROUP, REPEAT) == place, NO_KEY, keys[tile]),)
    return key, taken, rest, tl.where(edge_columns == taken, NO_KEY, edge_keys)


@triton.jit
def known_mass(peak, mass):
    """Return the sum of exponentials relative to the maximum; NaN where all are -inf, as in log_softmax."""
    return tl.where(peak == -INF, float("nan"), mass)


@triton.jit
def store_sum(mass_ptr, peak, mass, NORMALIZE: tl.constexpr):
    """Write the row's sum of exponentials, or its log-sum-exp."""
    if NORMALIZE:
        mass = tl.where(peak == -INF, -INF, peak + tl.log(mass))
    else:
        mass = known_mass(peak, mass)
    tl.store(mass_ptr, mass)


@triton.jit
def store_largest(values_ptr, classes_ptr, key, column, peak, mass, NORMALIZE: tl.constexpr):
    """Write one of a row's largest u, or its probability; and its class."""
    value = key_value(key)
    if NORMALIZE:
        value = tl.exp(value - peak) / mass
    tl.store(values_ptr, value)
    tl.store(classes_ptr, column.to(tl.int64))


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["part_groups"])
def expert_fusion_forward_kernel(
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
    NORMALIZE: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
    TILES: tl.constexpr,
):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    size = tl.num_programs(0).to(tl.int64) * parts
    us, columns, masks, head = fuse_part(
        x_ptrs, row, weights, expert_weight_ptr, class_shift_ptr, learned_scale_ptr, classes, part_groups,
        expert_stride, row_stride, scale, HAS_SCALE, GROUP, LANES, REPEAT, TILES,
    )  # fmt: skip
    peaks = tl.full([LANES], -INF, tl.float32)
    for tile in tl.static_range(TILES + 1):
        peaks = tl.maximum(peaks, lane_max(us[tile]))
    peak = tl.max(peaks, 0)
    masses = tl.zeros([LANES], tl.float32)
    for tile in tl.static_range(TILES + 1):
        masses += lane_sum(fast_exp(us[tile] - finite_reference(peak)))
    mass = tl.sum(masses, 0)
    if partial_ptr is None:
        store_sum(mass_ptr + row, peak, mass, NORMALIZE)
    else:
        tl.store(partial_ptr + row * parts + part, peak)
        tl.store(partial_ptr + size + row * parts + part, mass)
    if u_ptr is not None:
        write_part(u_ptr, row, u_stride, us, columns, masks, classes, GROUP)
    if log_probs_ptr is not None:
        values = log_softmax(us, peak, tl.log(mass))
        write_part(log_probs_ptr, row, log_probs_stride, values, columns, masks, classes, GROUP)
    keys = ()
    for tile in tl.static_range(TILES):
        keys = keys + (sort_keys(us[tile], masks[tile]),)
    edge_keys = lane_max(sort_keys(us[TILES], masks[TILES]))  # one each
    edge_columns = lane_max(columns[TILES])
    first = head + part * part_groups * GROUP
    for i in tl.static_range(K):
        key, column, keys, edge_keys = take_largest(keys, edge_keys, edge_columns, first, GROUP, LANES, REPEAT)
        if partial_keys_ptr is None:
            place = row * K + i
            store_largest(values_ptr + place, classes_ptr + place, key, column, peak, mass, NORMALIZE)
        else:
            out_ptr = partial_keys_ptr + (row * parts + part) * K + i
            tl.store(out_ptr, key)
            tl.store(out_ptr + size * K, column)


@triton.jit(do_not_specialize=["parts"])
def expert_fusion_merge_kernel(
    partial_ptr,  # [2, N, parts]
    partial_keys_ptr,  # [2, N, parts, K]
    values_ptr,  # [N, K]
    classes_ptr,  # [N, K] int64
    mass_ptr,  # [N]
    statistics_ptr,  # [2, N]: the largest u, and the sum of exponentials
    parts,
    NORMALIZE: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Merge the results of expert_fusion_forward_kernel for the parts of a row."""
    row = tl.program_id(0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * parts
    part = tl.arange(0, PARTS)
    peaks = tl.load(partial_ptr + row * parts + part, mask=part < parts, other=-INF)
    masses = tl.load(partial_ptr + size + row * parts + part, mask=part < parts, other=0.0)
    peak = tl.max(peaks, 0)
    masses, _ = rescale_sums(peaks, masses, 0.0, 0.0, peak)
    mass = tl.sum(masses, 0)
    store_sum(mass_ptr + row, peak, mass, NORMALIZE)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + row, peak)
        tl.store(statistics_ptr + tl.num_programs(0) + row, known_mass(peak, mass))
    if K > 0:
        candidate = tl.arange(0, CANDIDATES)
        in_ptr = partial_keys_ptr + row * parts * K + candidate
        keys = tl.load(in_ptr, mask=candidate < parts * K, other=NO_KEY)
        columns = tl.load(in_ptr + size * K, mask=candidate < parts * K, other=NO_COLUMN)
        for i in tl.static_range(K):
            key = tl.max(keys, 0)
            column = tl.min(tl.where(keys == key, columns, NO_COLUMN), 0)
            keys = tl.where(columns == column, NO_KEY, keys)
            place = row * K + i
            store_largest(values_ptr + place, classes_ptr + place, key, column, peak, mass, NORMALIZE)


@triton.jit(do_not_specialize=["part_groups"])
def expert_fusion_log_probs_kernel(
    x_ptrs,  # E of [N, C], unit class stride
    weights,  # E numbers
    expert_weight_ptr,  # [E]
    class_shift_ptr,  # [C]
    learned_scale_ptr,  # 0-dim
    statistics_ptr,  # [2, N]: maximum and sum of exponentials
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
    """Write the log-probabilities of one part of a row whose maximum and sum of exponentials are known."""
    row = tl.program_id(0).to(tl.int64)
    us, columns, masks, _ = fuse_part(
        x_ptrs, row, weights, expert_weight_ptr, class_shift_ptr, learned_scale_ptr, classes, part_groups,
        expert_stride, row_stride, scale, HAS_SCALE, GROUP, LANES, REPEAT, TILES,
    )  # fmt: skip
    log_mass = tl.log(tl.load(statistics_ptr + tl.num_programs(0) + row))
    values = log_softmax(us, tl.load(statistics_ptr + row), log_mass)
    write_part(log_probs_ptr, row, log_probs_stride, values, columns, masks, classes, GROUP)


# --- launcher --------------------------------------------------------------------------------------------------------


def forward(a: Arguments, k: int, with_log_probs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of ``op.py``."""
    first = a.logits[0]
    n, classes = first.shape[-2:]
    values = first.new_empty((n, k), dtype=torch.float32)
    indices = first.new_empty((n, k), dtype=torch.int64)
    mass = values.new_empty((n,))
    log_probs = values.new_empty((n, classes) if with_log_probs else (0,))
    if n == 0:
        return values, indices, mass, log_probs
    experts = layout_of(a.logits, *([log_probs] if with_log_probs else []))
    launch = table.fusion_launch(classes, len(experts.tensors) * first.element_size(), experts.group, k)
    selected = k if k * launch.parts <= CANDIDATES and k <= SELECTED else 0
    u, columns = None, group_size(classes, k)
    if not selected:
        padded = triton.cdiv(classes, columns) * columns
        # rows of a multiple of that many columns, which begin where groups of the logits do
        step = padded + (experts.row_stride - padded) % experts.group
        u = values.new_empty((n, step))[:, :padded]
        u[:, classes:].fill_(-torch.inf)
    several = launch.parts > 1
    partial = values.new_empty((2, n, launch.parts)) if several else None
    partial_keys = values.new_empty((2, n, launch.parts, selected), dtype=torch.int32) if several and selected else None
    inputs: dict[str, Any] = {
        "x_ptrs": experts.tensors,
        "weights": tuple(map(float, a.weights)),
        "expert_weight_ptr": a.expert_weight,
        "class_shift_ptr": a.class_shift,
        "learned_scale_ptr": a.learned_scale,
        "classes": classes,
        "part_groups": launch.part_groups,
        "expert_stride": experts.expert_stride,
        "row_stride": experts.row_stride,
        "log_probs_stride": row_stride(log_probs) if with_log_probs else 0,
        "scale": a.scale,
        "HAS_SCALE": a.learned_scale is not None or a.scale != 1.0,
        **launch.constants,
    }
    with torch.cuda.device_of(first):
        expert_fusion_forward_kernel[(n, launch.parts)](
            **inputs,
            values_ptr=values,
            classes_ptr=indices,
            mass_ptr=mass,
            u_ptr=u,
            log_probs_ptr=log_probs if with_log_probs and not several else None,
            partial_ptr=partial,
            partial_keys_ptr=partial_keys,
            u_stride=0 if u is None else row_stride(u),
            NORMALIZE=a.normalize and u is None,
            K=selected,
        )
        if several:
            statistics = values.new_empty((2, n)) if with_log_probs else None
            expert_fusion_merge_kernel[(n,)](
                partial,
                partial_keys,
                values,
                indices,
                mass,
                statistics,
                launch.parts,
                NORMALIZE=a.normalize and u is None,
                K=selected,
                PARTS=triton.next_power_of_2(launch.parts),
                CANDIDATES=triton.next_power_of_2(max(launch.parts * selected, 32)),
                num_warps=1 if launch.parts * max(selected, 1) <= 512 else 8,
            )
            if with_log_probs:
                expert_fusion_log_probs_kernel[(n, launch.parts)](
                    **inputs, statistics_ptr=statistics, log_probs_ptr=log_probs
                )
        if u is not None:
            values, indices = largest(u, k, columns)
            if a.normalize:
                values, mass = normalized(values, mass)
    return values, indices, mass, log_probs
