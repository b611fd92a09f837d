# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disable-error-code="assignment, has-type, misc"
# ruff: noqa: RUF005 (Triton knows no starred tuples)
"""The divergences' kernels: the experts' logits of a tile side by side, one program per sample (forward) or per sample
and tile (backward).

Forward keeps maxima, and sums relative to them, per lane, of the lane's own columns: one loop, one read, no exchange
between threads. A maximum that grows by m moves v (or vbar) of all columns before by -m:

    A_e = sum of pbar (vbar - v_e) moves by m_e - mbar, sum of p_e (E v_e - V) by (sum over f of m_f) - E m_e
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_experts import _edge_columns, _lane_max, _of_lanes, _rows_of, _tile_columns
from ..margin_cross_entropy.triton_math import _INF, _affine, _class_values, _exp, _reference
from ..margin_cross_entropy.triton_rows import _lane_sum

# --- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _inverse(temperature_ptr, first, offsets, mask, WIDE: tl.constexpr, AGAIN: tl.constexpr):
    """1 / t of the columns first + offsets, rounded, and what rounding took from it."""
    temperature = _class_values(temperature_ptr, first, offsets, mask, 1.0, WIDE, AGAIN)
    inverse = tl.div_rn(1.0, temperature)
    return inverse, tl.fma(-inverse, temperature, 1.0) * inverse


@triton.jit
def _divided(x, inverse, rest):
    """x / t rounded as a division is, which there is one of for all experts; infinite where x is."""
    return tl.fma(x, inverse, tl.clamp(x, -1e20, 1e20) * rest)


@triton.jit
def _exponents(x_ptrs, begins, first, offsets, mask, temperature_ptr, WIDE: tl.constexpr):
    """Every expert's u of the columns first + offsets, which it has at begins[e] + offsets; -inf outside the mask."""
    us = ()
    if temperature_ptr is not None:
        inverse, rest = _inverse(temperature_ptr, first, offsets, mask, WIDE, False)
    for e in tl.static_range(len(x_ptrs)):
        u = tl.load(x_ptrs[e] + begins[e] + offsets, mask=mask, other=-_INF).to(tl.float32)
        if temperature_ptr is not None:
            u = _divided(u, inverse, rest)
        us = us + (u,)
    return us


@triton.jit
def _total(xs):
    total = xs[0]
    for e in tl.static_range(1, len(xs)):
        total += xs[e]
    return total


@triton.jit
def _times(p, difference):
    """p * difference; 0 where p is 0."""
    return tl.where(p == 0.0, 0.0, p * difference)


@triton.jit
def _factor(before, after):
    """Of a sum of exponentials relative to ``before``: relative to ``after``, as large at least where it is not 0."""
    return _exp(tl.minimum(_reference(before) - _reference(after), 0.0))


@triton.jit
def _raised(peaks, masses, sums, mean_peak, mean_mass, to, mean_to, PAIRWISE: tl.constexpr):
    """The sums relative to the maxima ``to`` and ``mean_to``."""
    EXPERTS: tl.constexpr = len(peaks)
    moves = ()
    for e in tl.static_range(EXPERTS):
        moves = moves + (_reference(to[e]) - _reference(peaks[e]),)
    mean_factor = _factor(mean_peak, mean_to)
    mean_move = _reference(mean_to) - _reference(mean_peak)
    new_masses = ()
    new_sums = ()
    for e in tl.static_range(EXPERTS):
        factor = _factor(peaks[e], to[e])
        new_masses = new_masses + (masses[e] * factor,)
        if PAIRWISE:  # a sum may be infinite
            raised = sums[e] + masses[e] * (_total(moves) - EXPERTS * moves[e])
            new_sums = new_sums + (tl.where(factor == 0.0, 0.0, raised * factor),)
        else:
            new_sums = new_sums + ((sums[e] + mean_mass * (moves[e] - mean_move)) * mean_factor,)
    return new_masses, new_sums, mean_mass * mean_factor


@triton.jit
def _visited(us, peaks, masses, sums, mean_peak, mean_mass, PAIRWISE: tl.constexpr):
    """Maxima and sums with one tile more."""
    EXPERTS: tl.constexpr = len(us)
    new_peaks = ()
    for e in tl.static_range(EXPERTS):
        new_peaks = new_peaks + (tl.maximum(peaks[e], _lane_max(us[e])),)
    new_mean_peak = mean_peak
    if not PAIRWISE:
        mean = _affine(_total(us), 1.0 / EXPERTS, None)
        new_mean_peak = tl.maximum(mean_peak, _lane_max(mean))
    masses, sums, mean_mass = _raised(peaks, masses, sums, mean_peak, mean_mass, new_peaks, new_mean_peak, PAIRWISE)
    vs = ()
    for e in tl.static_range(EXPERTS):
        vs = vs + (us[e] - _of_lanes(_reference(new_peaks[e])),)
    if PAIRWISE:
        total = _total(vs)
    else:
        mean = mean - _of_lanes(_reference(new_mean_peak))
        mean_p = _exp(mean)
        mean_mass += _lane_sum(mean_p)
    new_masses = ()
    new_sums = ()
    for e in tl.static_range(EXPERTS):
        p = _exp(vs[e])
        if PAIRWISE:
            term = _times(p, EXPERTS * vs[e] - total)
        else:
            term = _times(mean_p, mean - vs[e])
        new_masses = new_masses + (masses[e] + _lane_sum(p),)
        new_sums = new_sums + (sums[e] + _lane_sum(term),)
    return new_peaks, new_masses, new_sums, new_mean_peak, mean_mass


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _divergence_forward_kernel(
    x_ptrs,  # E of [N, C], unit class stride
    temperature_ptr,  # [C]
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
    begins, bodies, head, groups = _rows_of(row, expert_stride, row_stride, classes, EXPERTS, GROUP)
    peaks = (tl.full([LANES], -_INF, tl.float32),) * EXPERTS
    masses = (tl.zeros([LANES], tl.float32),) * EXPERTS
    sums = (tl.zeros([LANES], tl.float32),) * EXPERTS
    mean_peak = tl.full([LANES], -_INF, tl.float32)
    mean_mass = tl.zeros([LANES], tl.float32)
    edge, edge_mask = _edge_columns(head, groups, classes, GROUP, LANES)
    edge_us = _exponents(x_ptrs, begins, 0, edge, edge_mask, temperature_ptr, False)
    peaks, masses, sums, mean_peak, mean_mass = _visited(edge_us, peaks, masses, sums, mean_peak, mean_mass, PAIRWISE)
    for first in range(0, groups, REPEAT * LANES):
        offsets, mask = _tile_columns(first, groups, GROUP, LANES, REPEAT)
        us = _exponents(x_ptrs, bodies, head, offsets, mask, temperature_ptr, GROUP >= 4)
        peaks, masses, sums, mean_peak, mean_mass = _visited(us, peaks, masses, sums, mean_peak, mean_mass, PAIRWISE)

    # all lanes together
    peak = ()
    for e in tl.static_range(EXPERTS):
        peak = peak + (tl.max(peaks[e], 0),)
    mean_max = peak[0]
    if not PAIRWISE:
        mean_max = tl.max(mean_peak, 0)
    masses, sums, mean_mass = _raised(peaks, masses, sums, mean_peak, mean_mass, peak, mean_max, PAIRWISE)
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
            value = a + (_total(logs) - EXPERTS * logs[e])
        else:
            a = tl.sum(sums[e], 0) / mean_total
            value = a + tl.log(mass[e] / mean_total)
        tl.store(value_ptr + e * rows + row, value)
        tl.store(saved_ptr + e * rows + row, peak[e])
        tl.store(saved_ptr + (EXPERTS + e) * rows + row, mass[e])
        tl.store(saved_ptr + (2 * EXPERTS + e) * rows + row, a)
    tl.store(saved_ptr + 3 * EXPERTS * rows + row, mean_max)
    tl.store(saved_ptr + (3 * EXPERTS + 1) * rows + row, mean_total)


@triton.jit
def _row_terms(
    upstream_ptr, saved_ptr, row, rows, upstream_stride_e, upstream_stride_n, EXPERTS: tl.constexpr,
    PAIRWISE: tl.constexpr,
):  # fmt: skip
    """Of a row: each expert's maximum, 1 / sum of exponentials, A and upstream gradient; maximum of the mean, 1 / its
    sum of exponentials (not used where PAIRWISE)."""
    peaks = ()
    inverses = ()
    averages = ()
    grads = ()
    for e in tl.static_range(EXPERTS):
        peaks = peaks + (tl.load(saved_ptr + e * rows + row),)
        inverses = inverses + (1.0 / tl.load(saved_ptr + (EXPERTS + e) * rows + row),)
        averages = averages + (tl.load(saved_ptr + (2 * EXPERTS + e) * rows + row),)
        grads = grads + (tl.load(upstream_ptr + e * upstream_stride_e + row * upstream_stride_n),)
    mean_peak = tl.load(saved_ptr + 3 * EXPERTS * rows + row)
    mean_inverse = 1.0 / tl.load(saved_ptr + (3 * EXPERTS + 1) * rows + row)
    return peaks, inverses, averages, grads, mean_peak, mean_inverse


@triton.jit
def _gradients(us, terms, PAIRWISE: tl.constexpr, DETACH: tl.constexpr):
    """Of every expert's u."""
    EXPERTS: tl.constexpr = len(us)
    peaks, inverses, averages, grads, mean_peak, mean_inverse = terms
    vs = ()
    for e in tl.static_range(EXPERTS):
        vs = vs + (us[e] - peaks[e],)
    dus = ()
    if PAIRWISE:
        total = _total(vs)
        ps = ()
        shared = ()
        for e in tl.static_range(EXPERTS):
            ps = ps + (_exp(vs[e]) * inverses[e],)
            shared = shared + (grads[e] * ps[e],)
        subtracted = _total(shared)
        for e in tl.static_range(EXPERTS):
            own = _times(ps[e], (EXPERTS * vs[e] - total) - averages[e])
            dus = dus + (grads[e] * own + (ps[e] * _total(grads) - subtracted),)
    else:
        mean = _affine(_total(us), 1.0 / EXPERTS, None) - mean_peak
        mean_p = _exp(mean) * mean_inverse
        through = tl.zeros_like(mean)
        if not DETACH:
            weighted = ()
            for e in tl.static_range(EXPERTS):
                weighted = weighted + (grads[e] * ((mean - vs[e]) - averages[e]),)
            through = _times(mean_p, _total(weighted) * (1.0 / EXPERTS))
        for e in tl.static_range(EXPERTS):
            du = grads[e] * (_exp(vs[e]) * inverses[e] - mean_p)
            dus = dus + (du if DETACH else du + through,)
    return dus


@triton.jit
def _write(dus, grad_ptr, begins, first, offsets, mask, temperature_ptr, WIDE: tl.constexpr):
    if temperature_ptr is not None:
        inverse, rest = _inverse(temperature_ptr, first, offsets, mask, WIDE, True)
    for e in tl.static_range(len(dus)):
        dx = dus[e]
        if temperature_ptr is not None:
            if grad_ptr.dtype.element_ty == tl.float32:
                dx = _divided(dx, inverse, rest)
            else:  # about to be rounded anyway
                dx = dx * inverse
        tl.store(grad_ptr + begins[e] + offsets, dx.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _divergence_backward_kernel(
    x_ptrs,  # E of [N, C], unit class stride
    temperature_ptr,  # [C]
    upstream_ptr,  # [E, N]
    saved_ptr,  # [3 E + 2, N]
    grad_ptr,  # [E, N, C], unit class stride
    classes,
    expert_stride,
    row_stride,
    upstream_stride_e,
    upstream_stride_n,
    grad_stride_e,
    grad_stride_n,
    PAIRWISE: tl.constexpr,
    DETACH: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Programs (row, tile); that of tile 0 also does the edge."""
    EXPERTS: tl.constexpr = len(x_ptrs)
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    tile = tl.program_id(1)
    begins, bodies, head, groups = _rows_of(row, expert_stride, row_stride, classes, EXPERTS, GROUP)
    grad_begins, grad_bodies, _, _ = _rows_of(row, grad_stride_e, grad_stride_n, classes, EXPERTS, GROUP)
    terms = _row_terms(upstream_ptr, saved_ptr, row, rows, upstream_stride_e, upstream_stride_n, EXPERTS, PAIRWISE)
    if tile == 0:
        offsets, mask = _edge_columns(head, groups, classes, GROUP, LANES)
        us = _exponents(x_ptrs, begins, 0, offsets, mask, temperature_ptr, False)
        dus = _gradients(us, terms, PAIRWISE, DETACH)
        _write(dus, grad_ptr, grad_begins, 0, offsets, mask, temperature_ptr, False)
    offsets, mask = _tile_columns(tile * (REPEAT * LANES), groups, GROUP, LANES, REPEAT)
    us = _exponents(x_ptrs, bodies, head, offsets, mask, temperature_ptr, GROUP >= 4)
    dus = _gradients(us, terms, PAIRWISE, DETACH)
    _write(dus, grad_ptr, grad_bodies, head, offsets, mask, temperature_ptr, GROUP >= 4)
