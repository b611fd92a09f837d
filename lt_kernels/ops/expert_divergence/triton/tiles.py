"""Pieces that the divergences' kernels share: exponents of all experts, and arithmetic on them."""
# ruff: noqa: RUF005 (Triton knows no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from ..._rows.triton_io import load_class_values
from ..._rows.triton_math import INF


@triton.jit
def load_inverse(temperature_ptr, first, offsets, mask, WIDE: tl.constexpr, AGAIN: tl.constexpr):
    """Return 1 / t of the columns first + offsets, rounded, and what rounding took from it."""
    temperature = load_class_values(temperature_ptr, first, offsets, mask, 1.0, WIDE, AGAIN)
    inverse = tl.div_rn(1.0, temperature)
    return inverse, tl.fma(-inverse, temperature, 1.0) * inverse


@triton.jit
def divide(x, inverse, rest):
    """Return x / t rounded as a division is; infinite where x is. All experts share one division."""
    return tl.fma(x, inverse, tl.clamp(x, -1e20, 1e20) * rest)


@triton.jit
def load_exponents(x_ptrs, begins, first, offsets, mask, temperature_ptr, WIDE: tl.constexpr):
    """Return every expert's u of the columns first + offsets, read at begins[e] + offsets; -inf outside the mask."""
    us = ()
    if temperature_ptr is not None:
        inverse, rest = load_inverse(temperature_ptr, first, offsets, mask, WIDE, False)
    for e in tl.static_range(len(x_ptrs)):
        u = tl.load(x_ptrs[e] + begins[e] + offsets, mask=mask, other=-INF).to(tl.float32)
        if temperature_ptr is not None:
            u = divide(u, inverse, rest)
        us = us + (u,)
    return us


@triton.jit
def add_up(xs):
    total = xs[0]
    for e in tl.static_range(1, len(xs)):
        total += xs[e]
    return total


@triton.jit
def multiply(p, difference):
    """Return p * difference; 0 where p is 0."""
    return tl.where(p == 0.0, 0.0, p * difference)
