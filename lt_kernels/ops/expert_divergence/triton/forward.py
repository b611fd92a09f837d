"""Forward of the divergences: the experts' logits of a tile side by side, one program per sample.

Bytes per sample (b = itemsize), without class vectors and scalars: E C b. A thread holds the same columns of all
experts at once, at most 64 logits: more than 8 experts of 16-bit logits leave it fewer than 16 bytes of each. The code
is unrolled over the experts, whose number has no limit but costs compile time.

Maxima, and sums relative to them, are kept per lane for the lane's own columns: one loop, one read, no exchange between
threads. A maximum that grows by m moves v (or vbar) of all columns before by -m:

    A_e = sum of pbar (vbar - v_e) moves by m_e - mbar, sum of p_e (E v_e - V) by (sum over f of m_f) - E m_e
"""
# ruff: noqa: RUF005 (Triton knows no starred tuples)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._experts import shape_of
from ..._rows.triton_experts import expert_edge, expert_tile, layout_of, locate_rows
from ..._rows.triton_io import expand_lanes, lane_max, lane_sum
from ..._rows.triton_math import INF, affine, fast_exp, finite_reference
from .launch import forward_launch
from .tiles import add_up, load_exponents, multiply


@triton.jit
def rescale_factor(before, after):
    """Return the factor that makes a sum of exponentials relative to ``before`` relative to the larger ``after``."""
    return fast_exp(tl.minimum(finite_reference(before) - finite_reference(after), 0.0))


@triton.jit
def raise_peaks(peaks, masses, sums, mean_peak, mean_mass, to, mean_to, PAIRWISE: tl.constexpr):
    """Return the sums relative to the maxima ``to`` and ``mean_to``."""
    EXPERTS: tl.constexpr = len(peaks)
    moves = ()
    for e in tl.static_range(EXPERTS):
        moves = moves + (finite_reference(to[e]) - finite_reference(peaks[e]),)
    mean_factor = rescale_factor(mean_peak, mean_to)
    mean_move = finite_reference(mean_to) - finite_reference(mean_peak)
    new_masses = ()
    new_sums = ()
    for e in tl.static_range(EXPERTS):
        factor = rescale_factor(peaks[e], to[e])
        new_masses = new_masses + (masses[e] * factor,)
        if PAIRWISE:  # a sum may be infinite
            raised = sums[e] + masses[e] * (add_up(moves) - EXPERTS * moves[e])
            new_sums = new_sums + (tl.where(factor == 0.0, 0.0, raised * factor),)
        else:
            new_sums = new_sums + ((sums[e] + mean_mass * (moves[e] - mean_move)) * mean_factor,)
    return new_masses, new_sums, mean_mass * mean_factor


@triton.jit
def add_tile(us, peaks, masses, sums, mean_peak, mean_mass, PAIRWISE: tl.constexpr):
    """Return maxima and sums with one tile more."""
    EXPERTS: tl.constexpr = len(us)
    new_peaks = ()
    for e in tl.static_range(EXPERTS):
        new_peaks = new_peaks + (tl.maximum(peaks[e], lane_max(us[e])),)
    new_mean_peak = mean_peak
    if not PAIRWISE:
        mean = affine(add_up(us), 1.0 / EXPERTS, None)
        new_mean_peak = tl.maximum(mean_peak, lane_max(mean))
    masses, sums, mean_mass = raise_peaks(peaks, masses, sums, mean_peak, mean_mass, new_peaks, new_mean_peak, PAIRWISE)
    vs = ()
    for e in tl.static_range(EXPERTS):
        vs = vs + (us[e] - expand_lanes(finite_reference(new_peaks[e])),)
    if PAIRWISE:
        total = add_up(vs)
    else:
        mean = mean - expand_lanes(finite_reference(new_mean_peak))
        mean_p = fast_exp(mean)
        mean_mass += lane_sum(mean_p)
    new_masses = ()
    new_sums = ()
    for e in tl.static_range(EXPERTS):
        p = fast_exp(vs[e])
        if PAIRWISE:
            term = multiply(p, EXPERTS * vs[e] - total)
        else:
            term = multiply(mean_p, mean - vs[e])
        new_masses = new_masses + (masses[e] + lane_sum(p),)
        new_sums = new_sums + (sums[e] + lane_sum(term),)
    return new_peaks, new_masses, new_sums, new_mean_peak, mean_mass


@triton.jit
def expert_divergence_forward_kernel(
    x_ptrs,  # E of [N, C], unit class stride
    temperature_ptr,  # [C]
    row_weight_ptr,  # [N]
    value_ptr,  # [E, N]
    saved_ptr,  # [3 E + 2, N]: see op.py
    classes,
    expert_stride,
    row_stride,
    PAIRWISE: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    EXPERTS: tl.constexpr = len(x_ptrs)
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    begins, bodies, head, groups = locate_rows(row, expert_stride, row_stride, classes, EXPERTS, GROUP)
    peaks = (tl.full([LANES], -INF, tl.float32),) * EXPERTS
    masses = (tl.zeros([LANES], tl.float32),) * EXPERTS
    sums = (tl.zeros([LANES], tl.float32),) * EXPERTS
    mean_peak = tl.full([LANES], -INF, tl.float32)
    mean_mass = tl.zeros([LANES], tl.float32)
    edge, edge_mask = expert_edge(head, groups, classes, GROUP, LANES)
    edge_us = load_exponents(x_ptrs, begins, 0, edge, edge_mask, temperature_ptr, False)
    peaks, masses, sums, mean_peak, mean_mass = add_tile(edge_us, peaks, masses, sums, mean_peak, mean_mass, PAIRWISE)
    for first in range(0, groups, REPEAT * LANES):
        offsets, mask = expert_tile(first, groups, GROUP, LANES, REPEAT)
        us = load_exponents(x_ptrs, bodies, head, offsets, mask, temperature_ptr, GROUP >= 4)
        peaks, masses, sums, mean_peak, mean_mass = add_tile(us, peaks, masses, sums, mean_peak, mean_mass, PAIRWISE)

    # all lanes together
    peak = ()
    for e in tl.static_range(EXPERTS):
        peak = peak + (tl.max(peaks[e], 0),)
    mean_max = peak[0]
    if not PAIRWISE:
        mean_max = tl.max(mean_peak, 0)
    masses, sums, mean_mass = raise_peaks(peaks, masses, sums, mean_peak, mean_mass, peak, mean_max, PAIRWISE)
    mean_total = peak[0]
    if not PAIRWISE:
        mean_total = tl.sum(mean_mass, 0)
    mass = ()
    logs = ()
    for e in tl.static_range(EXPERTS):
        mass = mass + (tl.sum(masses[e], 0),)
        logs = logs + (tl.log(mass[e] / mass[0]),)
    for e in tl.static_range(EXPERTS):
        if PAIRWISE:
            a = tl.sum(sums[e], 0) / mass[e]
            value = a + (add_up(logs) - EXPERTS * logs[e])
        else:
            a = tl.sum(sums[e], 0) / mean_total
            value = a + tl.log(mass[e] / mean_total)
        if row_weight_ptr is not None:
            weight = tl.load(row_weight_ptr + row)
            value = tl.where(weight == 0.0, 0.0, value * weight)
        tl.store(value_ptr + e * rows + row, value)
        tl.store(saved_ptr + e * rows + row, peak[e])
        tl.store(saved_ptr + (EXPERTS + e) * rows + row, mass[e])
        tl.store(saved_ptr + (2 * EXPERTS + e) * rows + row, a)
    tl.store(saved_ptr + 3 * EXPERTS * rows + row, mean_max)
    tl.store(saved_ptr + (3 * EXPERTS + 1) * rows + row, mean_total)


def forward(
    logits: list[Tensor], temperature: Tensor | None, kind: str, row_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the results of ``op.py``, the values of all rows."""
    e, n, classes = shape_of(logits)
    value = logits[0].new_empty((e, n), dtype=torch.float32)
    saved = value.new_empty((3 * e + 2, n))
    if n == 0:
        return value, saved
    experts = layout_of(logits)
    launch = forward_launch(e, n, classes, experts.group)
    with torch.cuda.device_of(logits[0]):
        expert_divergence_forward_kernel[(n,)](
            experts.tensors,
            temperature,
            row_weight,
            value,
            saved,
            classes,
            experts.expert_stride,
            experts.row_stride,
            PAIRWISE=kind == "pairwise",
            **launch.constants,
        )
    return value, saved
