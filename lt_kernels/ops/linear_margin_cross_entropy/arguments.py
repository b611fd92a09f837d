"""The arguments of linear heads: what makes the logits, and the options of a row's loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import compute_dtype
from .._gemm import products
from .._registry import Signature
from .._rows.options import DIFFERENTIABLE as OPTIONS
from .._rows.options import RowOptions


class Arguments(NamedTuple):
    """One call. Logits x [N, C, K] are <input_i, linear_weight_jk> + linear_bias_jk, divided by |linear_weight_jk|
    where ``normalize``. The matrix products run in ``input``'s dtype.

    Class vectors are [C], contiguous, in the compute dtype: float32, or float64 for float64 input.
    """

    input: Tensor  # [N, D]
    linear_weight: Tensor  # [C * K, D], any dtype: the gradient has it too
    weight_copy: Tensor | None  # linear_weight in input's dtype, detached; None where it has that already
    linear_bias: Tensor | None  # [C * K], any dtype; None where normalize
    options: RowOptions
    normalize: bool

    @property
    def factor(self) -> Tensor:
        """The right-hand matrix of the products, [C * K, D] in input's dtype."""
        return self.linear_weight if self.weight_copy is None else self.weight_copy

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.input.dtype)

    @property
    def positions(self) -> int:
        """K: how many losses each sample has (1 for a classifier)."""
        return self.options.target.shape[-1]

    @property
    def classes(self) -> int:
        return self.linear_weight.shape[0] // self.positions

    def inverse_norms(self) -> Tensor | None:
        """Return 1 / |linear_weight_jk| [C * K] in the compute dtype; None unless ``normalize``."""
        return products.inverse_norms(self.factor, self.compute_dtype) if self.normalize else None


#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = ("input", "linear_weight", "linear_bias", *OPTIONS)
SIGNATURE = Signature(Arguments, DIFFERENTIABLE)
