"""The arguments of linear heads, written once: those of the rows kernel with what makes its logits in their place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..margin_cross_entropy.arguments import Arguments as RowArguments


class Arguments(NamedTuple):
    """One call. Logits x [N, C, K] are <input_i, linear_weight_jk> + linear_bias_jk, divided by |linear_weight_jk|
    where ``normalize``. The matrix products run in ``input``'s dtype.

    Class vectors are [C], contiguous, in the compute dtype: float32, or float64 for float64 input.
    """

    input: Tensor  # [N, D]
    linear_weight: Tensor  # [C * K, D], any dtype: the gradient has it too
    weight_copy: Tensor | None  # linear_weight in input's dtype, detached; None where it has that already
    linear_bias: Tensor | None  # [C * K], any dtype; None where normalize
    target: Tensor  # [N, K] int64 classes, or [N, C, K] floating class probabilities
    mixed_target: Tensor | None  # [N, K] int64
    mix_lambda: Tensor | None  # 0-dim or [N, K], the share of `target`
    weight: Tensor | None  # [C]
    class_bias: Tensor | None  # [C]
    class_scale: Tensor | None  # [C]
    class_margin: Tensor | None  # [C], added to `margin`
    learned_scale: Tensor | None  # 0-dim, multiplies `scale`
    coefficient: Tensor | None  # [1], or [2] with mixed_target: factor of each target's term
    scale: float
    margin: float
    angular: bool
    ignore_index: int
    label_smoothing: float
    normalize: bool

    @property
    def factor(self) -> Tensor:
        """The right-hand matrix of the products, [C * K, D] in input's dtype."""
        return self.linear_weight if self.weight_copy is None else self.weight_copy

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32

    @property
    def positions(self) -> int:
        """K: how many losses each sample has (1 for a classifier)."""
        return self.target.shape[-1]

    @property
    def classes(self) -> int:
        return self.linear_weight.shape[0] // self.positions

    def of_rows(self, logits: Tensor) -> RowArguments:
        """The arguments of the rows kernel on ``logits`` [N, C, K]."""
        options: tuple[Any, ...] = self[_FIRST_OF_ROWS:-1]
        return RowArguments(logits, *options)


_FIRST_OF_ROWS = Arguments._fields.index("target")
assert Arguments._fields[_FIRST_OF_ROWS:-1] == RowArguments._fields[1:]

#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = (
    *("input", "linear_weight", "linear_bias", "target"),
    *("class_bias", "class_scale", "class_margin", "learned_scale"),
)

#: The same list in the schema language of torch.library.
SCHEMA = ", ".join(
    f"{Arguments.__annotations__[name].__forward_arg__.replace('Tensor | None', 'Tensor?')} {name}"
    for name in Arguments._fields
)
N_TENSORS = Arguments._fields.index("scale")
