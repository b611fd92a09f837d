"""The arguments of the partitioned log-sum-exp, written once; what kernels see of a block of similarities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._registry import Signature, Size


class Arguments(NamedTuple):
    """One call. ``functional`` validates. Per-key vectors are contiguous, in the compute dtype: float32, or float64 for
    float64 queries. Labels and columns are int32."""

    query: Tensor  # [N, D]
    key: Tensor | None  # [M, D] in query's dtype; None: the queries are the keys too
    query_label: Tensor  # [N] int32
    key_label: Tensor  # [M] int32
    exclude: Tensor | None  # [N] int32, the column that row i leaves out; -1: none
    key_bias: Tensor | None  # [M]
    key_scale: Tensor | None  # [M]
    learned_scale: Tensor | None  # 0-dim, multiplies `scale`
    scale: float
    key_grad_begin: Size  # rows of key from here ...
    key_grad_end: Size  # ... to here receive a gradient
    normalized: bool  # |<q_i, k_j>| <= 1 but for rounding

    @property
    def keys(self) -> Tensor:
        """[M, D]."""
        return self.query if self.key is None else self.key

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = ("query", "key", "key_bias", "key_scale", "learned_scale")

SIGNATURE = Signature(Arguments, DIFFERENTIABLE)


class Block(NamedTuple):
    """Products of n queries and m keys in memory, and what belongs to them: the argument of ``forward`` and
    ``backward`` of each backend's module.

    With a = scale * learned_scale, the logits are u_ij = (a key_scale_j) z_ij + key_bias_j. A column is *positive* for
    a row of the same label and *negative* for the others; row i leaves out column ``exclude_i - first``.

    ``forward(block, with_slopes)`` returns [6, n], or [8, n] ``with_slopes``, in the compute dtype:

        NEG_PEAK, NEG_MASS   over the negative columns the largest u and the sum of exp(u - largest); 0, 0 if all are
                             -inf or there are none
        POS_PEAK, POS_MASS   the same of the positive ones
        POS_SUM, NUM_POS     the sum of z over the positive columns, and their number
        NEG_SLOPE, POS_SLOPE sums of exp(u - largest) key_scale_j z_ij

    ``backward(block, terms, needs, out)`` takes terms [5, n], see below, and writes for each element

        G_ij  = POS_SLOPE_i exp(u_ij - POS_PEAK_i) if positive, NEG_SLOPE_i exp(u_ij - NEG_PEAK_i) if negative, or 0
        dz_ij = a (key_scale_j G_ij + POS_SUM_i if positive)

    to ``out`` [n, m] (any row stride, unit stride along m; not the memory of z) where needs[0]. It returns, where
    needs[1] and needs[2], the sums over rows of G_ij and of G_ij a z_ij, each [m] in the compute dtype; else [0].
    """

    z: Tensor  # [n, m] <q_i, k_j> in the queries' dtype, unit stride along m
    query_label: Tensor  # [n] int32
    key_label: Tensor  # [m] int32
    exclude: Tensor | None  # [n] int32
    first: int  # which column of the whole the first one is
    key_bias: Tensor | None  # [m]
    key_scale: Tensor | None  # [m]
    learned_scale: Tensor | None  # 0-dim
    scale: float

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.z.dtype == torch.float64 else torch.float32


#: Rows of what ``forward`` returns; those of ``backward``'s terms are the first five, with the upstream gradient of NEG
#: over its mass in place of NEG_MASS, likewise for POS_MASS, and the upstream gradient of a POS_SUM in its place.
NEG_PEAK, NEG_MASS, POS_PEAK, POS_MASS, POS_SUM, NUM_POS, NEG_SLOPE, POS_SLOPE = range(8)
N_STATISTICS, N_SLOPES, N_TERMS = 6, 2, 5
