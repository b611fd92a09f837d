"""The arguments of a contrastive loss, written once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._registry import Signature, Size


class Arguments(NamedTuple):
    """One call. ``functional`` validates. Vectors of rows and keys are contiguous, in float32 where they are no labels.

    Labels are int32 or int64, all of one dtype. See ``op.py`` for the formulas.
    """

    query: Tensor  # [N, D]
    key: Tensor | None  # [M, D] in query's dtype; None: the queries are the keys too
    query_label: Tensor  # [N]
    key_label: Tensor  # [M]
    exclude: Tensor | None  # [N] int32 or int64, the column that row i leaves out; -1: none
    key_bias: Tensor | None  # [M]
    pos_offset: Tensor | None  # [N]
    extra: Tensor | None  # [N]
    pulled: Tensor | None  # [N]
    constant: Tensor | None  # [N]
    counted: Tensor | None  # [N] bool: rows that count; None: all
    learned_scale: Tensor | None  # 0-dim, multiplies `scale`
    scale: float
    alpha: float
    beta: float
    key_grad_begin: Size  # rows of key from here ...
    key_grad_end: Size  # ... to here receive a gradient
    exclude_self: bool  # row i leaves out column i
    two: bool  # whether positives and negatives have a softmax each
    normalized: bool  # |<q_i, k_j>| <= 1 but for rounding
    reduction: str  # one of REDUCTIONS
    empty_is_zero: bool  # whether the mean of no row is 0, not NaN

    @property
    def keys(self) -> Tensor:
        """[M, D]."""
        return self.query if self.key is None else self.key


#: Each row's loss; their sum; their mean over all rows, over those that count, or over those with positives.
REDUCTIONS = ("none", "sum", "mean", "mean_counted", "mean_positives")
#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = ("query", "key", "extra", "pulled", "learned_scale")

SIGNATURE = Signature(Arguments, DIFFERENTIABLE)

#: Rows of backward's terms, and what their length is a multiple of.
N_TERMS, TERMS_STEP = 7, 16


def terms_shape(rows: int) -> tuple[int, int]:
    """Return the shape of backward's terms."""
    return N_TERMS, (rows + TERMS_STEP - 1) // TERMS_STEP * TERMS_STEP
