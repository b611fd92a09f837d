"""The arguments every backend of the rows kernel takes: written once, here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """One call. Class vectors are [C], contiguous, in the compute dtype: float32, or float64 for float64 input.

    Which backend may assume what: ``functional`` validates; an out-of-range target is the backend's to catch.
    """

    input: Tensor  # [N, C, K] logits, any strides
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

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32


#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = ("input", "target", "class_bias", "class_scale", "class_margin", "learned_scale")

#: The same list in the schema language of torch.library.
SCHEMA = ", ".join(
    f"{Arguments.__annotations__[name].__forward_arg__.replace('Tensor | None', 'Tensor?')} {name}"
    for name in Arguments._fields
)
N_TENSORS = Arguments._fields.index("scale")
