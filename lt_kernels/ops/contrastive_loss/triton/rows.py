"""Rows' losses from the sums over keys, their terms of backward, and the result: one launch, or two for many rows.

With D_i = log(sum of exp(u_ij) + exp(extra_i)), w_i = beta + alpha P_i, and S_i the sum of positives' a z_ij,

    one softmax    loss_i = D_i + constant_i - (pulled_i + alpha S_i) / w_i
    two            loss_i = softplus(neg_i - pos_i) + log P_i + constant_i, the logarithms of both sides' sums

0 where w_i = 0 (two: P_i = 0) and where the row does not count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..._rows.triton_math import INF, fast_exp, finite_reference, load_scale, log1p_exp
from ...partitioned_logsumexp.triton.keys import LOG2E, fast_exp2, reference_error, to_base2
from .keys import (
    FACTOR,
    MASS,
    NUM_POS,
    OF_EXTRA,
    OF_PULLED,
    OF_SCALE,
    PEAK,
    POS_FACTOR,
    POS_MASS,
    POS_PEAK,
    POS_REFERENCE,
    POS_SLOPE,
    POS_SUM,
    PULL,
    REFERENCE,
    SLOPE,
)


class RowInputs(NamedTuple):
    """What a row's loss has beside its sums over keys: one argument of a kernel. None where an option is absent."""

    extra_ptr: Any  # [N]
    pulled_ptr: Any  # [N]
    constant_ptr: Any  # [N]
    counted_ptr: Any  # [N] bool: rows that count
    alpha: Any
    beta: Any


class Result(NamedTuple):
    """Where a mean or sum of the rows' losses goes: one argument of a kernel."""

    loss_ptr: Any  # 0-dim
    share_ptr: Any  # 0-dim, what each row's loss was multiplied by
    count_ptr: Any  # 0-dim, how many rows a mean is over; None: ``count``
    count: Any
    over: Any  # constexpr: "sum", "count", "counted" or "positives": what the loss is divided by
    at_least_one: Any  # constexpr: whether the mean of no row is 0, not NaN


@triton.jit
def load_option(ptr, row, inside, other):
    """Load the rows' values; ``other`` without the option."""
    value = row * 0.0 + other
    if ptr is not None:
        value = tl.load(ptr + row, mask=inside, other=other).to(tl.float32)
    return value


@triton.jit
def merge_splits(
    from_ptr, size, mask, PEAK_ROW: tl.constexpr, MASS_ROW: tl.constexpr, SLOPE_ROW: tl.constexpr, SLOPES: tl.constexpr
):
    """Return one softmax's sums from the splits' ones, [SPLITS, BLOCK]: peak (-inf if empty), mass and slope."""
    mass = tl.load(from_ptr + MASS_ROW * size, mask=mask, other=0.0)
    peak = tl.where(mass == 0.0, -INF, tl.load(from_ptr + PEAK_ROW * size, mask=mask, other=0.0))
    high = tl.max(peak, 0)
    kept = fast_exp2(tl.minimum(finite_reference(peak) - finite_reference(high)[None, :], 0.0) * LOG2E)
    slope = tl.zeros_like(high)
    if SLOPES:
        slope = tl.sum(kept * tl.load(from_ptr + SLOPE_ROW * size, mask=mask, other=0.0), 0)
    return high, tl.sum(kept * mass, 0), slope


@triton.jit
def log_sum(peak, mass):
    """Return the logarithm of a softmax's sum, -inf of an empty one."""
    return tl.where(mass == 0.0, -INF, finite_reference(peak) + tl.log(tl.where(mass == 0.0, 1.0, mass)))


@triton.jit
def over_mass(x, mass):
    """Return x / mass, 0 where there is no mass."""
    return tl.where(mass == 0.0, 0.0, x / tl.where(mass == 0.0, 1.0, mass))


@triton.jit
def store_side(terms_ptr, size, inside, peak, factor, o, REFERENCE_ROW: tl.constexpr, FACTOR_ROW: tl.constexpr):
    """Store what backward's exponentials are relative to and multiplied by."""
    peak = finite_reference(peak)
    if o.bounded:  # the kernels' exponentials are relative to the bound
        factor = factor * fast_exp2((o.bound - peak) * LOG2E)
    else:
        factor = factor * reference_error(peak)
    tl.store(terms_ptr + REFERENCE_ROW * size, to_base2(peak), mask=inside)
    tl.store(terms_ptr + FACTOR_ROW * size, factor, mask=inside)


@triton.jit
def finish_one(from_ptr, terms_ptr, size, out_size, row, inside, mask, o, r, scale, num_pos, SLOPES: tl.constexpr):
    """Return rows' losses of one softmax, and which have positives; store their terms."""
    peak, mass, slope = merge_splits(from_ptr, size, mask, PEAK, MASS, SLOPE, SLOPES)
    pos_sum = tl.sum(tl.load(from_ptr + POS_SUM * size, mask=mask, other=0.0), 0)
    weight = r.beta + r.alpha * num_pos
    some = inside & (weight != 0.0)
    if r.counted_ptr is not None:
        some = some & (tl.load(r.counted_ptr + row, mask=inside, other=0) != 0)
    inverse = tl.where(some, 1.0 / tl.where(weight != 0.0, weight, 1.0), 0.0)
    of_extra = tl.zeros_like(mass)
    if r.extra_ptr is not None:
        extra = load_option(r.extra_ptr, row, inside, 0.0)
        high = tl.maximum(peak, extra)
        kept = fast_exp(tl.minimum(peak - finite_reference(high), 0.0))
        of_extra = fast_exp(tl.minimum(extra - finite_reference(high), 0.0))
        peak, mass, slope = high, mass * kept + of_extra, slope * kept
    pulled = load_option(r.pulled_ptr, row, inside, 0.0) + r.alpha * (scale * pos_sum)
    loss = log_sum(peak, mass) + load_option(r.constant_ptr, row, inside, 0.0) - pulled * inverse
    store_side(terms_ptr, out_size, inside, peak, tl.where(some, over_mass(1.0, mass), 0.0), o, REFERENCE, FACTOR)
    tl.store(terms_ptr + PULL * out_size, -r.alpha * inverse, mask=inside)
    if r.extra_ptr is not None:
        tl.store(terms_ptr + OF_EXTRA * out_size, tl.where(some, over_mass(of_extra, mass), 0.0), mask=inside)
    if r.pulled_ptr is not None:
        tl.store(terms_ptr + OF_PULLED * out_size, -inverse, mask=inside)
    if SLOPES:
        of_scale = tl.where(some, over_mass(slope, mass), 0.0) - r.alpha * pos_sum * inverse
        tl.store(terms_ptr + OF_SCALE * out_size, of_scale, mask=inside)
    return tl.where(some, loss, 0.0), some


@triton.jit
def finish_two(from_ptr, terms_ptr, size, out_size, row, inside, mask, o, r, num_pos, SLOPES: tl.constexpr):
    """Return rows' losses of two softmaxes, and which have positives; store their terms."""
    peak, mass, slope = merge_splits(from_ptr, size, mask, PEAK, MASS, SLOPE, SLOPES)
    pos_peak, pos_mass, pos_slope = merge_splits(from_ptr, size, mask, POS_PEAK, POS_MASS, POS_SLOPE, SLOPES)
    some = inside & (num_pos != 0.0)
    if r.counted_ptr is not None:
        some = some & (tl.load(r.counted_ptr + row, mask=inside, other=0) != 0)
    apart = log_sum(peak, mass) - log_sum(pos_peak, pos_mass)
    small = fast_exp(-tl.abs(apart))
    loss = tl.maximum(apart, 0.0) + log1p_exp(-tl.abs(apart)) + tl.log(tl.maximum(num_pos, 1.0))
    loss += load_option(r.constant_ptr, row, inside, 0.0)
    # the derivative of the softplus: what the negatives have of the whole softmax
    share = tl.where(some, tl.where(apart >= 0.0, 1.0, small) / (1.0 + small), 0.0)
    store_side(terms_ptr, out_size, inside, peak, over_mass(share, mass), o, REFERENCE, FACTOR)
    store_side(terms_ptr, out_size, inside, pos_peak, over_mass(-share, pos_mass), o, POS_REFERENCE, POS_FACTOR)
    if SLOPES:
        of_scale = over_mass(share * slope, mass) - over_mass(share * pos_slope, pos_mass)
        tl.store(terms_ptr + OF_SCALE * out_size, of_scale, mask=inside)
    return tl.where(some, loss, 0.0), some


@triton.jit
def store_result(result, loss, positives, counted):
    """Store the sum or mean of all rows' losses, and what one counts in it."""
    share = loss * 0.0 + 1.0
    if result.over != "sum":
        count = result.count * share
        if result.over == "positives":
            count = positives
        elif result.over == "counted":
            count = counted
        elif result.count_ptr is not None:
            count = tl.load(result.count_ptr).to(tl.float32)
        if result.at_least_one:
            count = tl.maximum(count, 1.0)
        share = 1.0 / count
        loss = loss / count
    tl.store(result.loss_ptr, loss)
    tl.store(result.share_ptr, share)


@triton.jit(do_not_specialize=["rows", "splits"])
def contrastive_loss_rows_kernel(
    o,  # LossOptions
    r,  # RowInputs
    result,  # Result
    sums_ptr,  # [kinds, splits, N]
    terms_ptr,  # [N_TERMS, padded N]
    losses_ptr,  # [N]; None where not wanted
    partial_ptr,  # [3, programs]: sums of losses, of rows with positives and of rows that count; None where not wanted
    rows,
    splits,
    padded,
    ALONE: tl.constexpr,  # whether this is the only program, which makes the result
    SLOPES: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, splits at least
    BLOCK: tl.constexpr,
):
    """Join the splits' sums of a block of rows; compute the rows' losses and terms."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)[:, None]
    inside = row < rows
    mask = (split < splits) & inside[None, :]
    size = splits * tl.cast(rows, tl.int64)
    from_ptr = sums_ptr + split * tl.cast(rows, tl.int64) + row[None, :]
    num_pos = tl.sum(tl.load(from_ptr + NUM_POS * size, mask=mask, other=0.0), 0)
    scale = load_scale(o.scale, o.learned_scale_ptr)
    own_ptr, out_size = terms_ptr + row, tl.cast(padded, tl.int64)
    if o.two:
        loss, some = finish_two(from_ptr, own_ptr, size, out_size, row, inside, mask, o, r, num_pos, SLOPES)
    else:
        loss, some = finish_one(from_ptr, own_ptr, size, out_size, row, inside, mask, o, r, scale, num_pos, SLOPES)
    if losses_ptr is not None:
        tl.store(losses_ptr + row, loss, mask=inside)
    if ALONE or partial_ptr is not None:
        total, positives = tl.sum(loss, 0), tl.sum(tl.where(some & (num_pos > 0.0), 1.0, 0.0), 0)
        counted = tl.sum(load_option(r.counted_ptr, row, inside, 1.0) * tl.where(inside, 1.0, 0.0), 0)
        if ALONE:
            store_result(result, total, positives, counted)
        else:
            own_ptr = partial_ptr + tl.program_id(0)
            tl.store(own_ptr, total)
            tl.store(own_ptr + tl.num_programs(0), positives)
            tl.store(own_ptr + 2 * tl.num_programs(0), counted)


@triton.jit(do_not_specialize=["programs"])
def contrastive_loss_result_kernel(
    result,  # Result
    partial_ptr,  # [3, programs], see contrastive_loss_rows_kernel
    programs,
    BLOCK: tl.constexpr,
):
    """Add up the rows' losses, in a fixed order."""
    lane = tl.arange(0, BLOCK)
    loss, positives, counted = (
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )
    for begin in range(0, programs, BLOCK):
        own_ptr, inside = partial_ptr + begin + lane, begin + lane < programs
        loss += tl.load(own_ptr, mask=inside, other=0.0)
        positives += tl.load(own_ptr + programs, mask=inside, other=0.0)
        counted += tl.load(own_ptr + 2 * programs, mask=inside, other=0.0)
    store_result(result, tl.sum(loss, 0), tl.sum(positives, 0), tl.sum(counted, 0))
