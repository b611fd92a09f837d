"""The arguments that every backend of the rows kernel takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import compute_dtype
from .._registry import Signature
from .._rows.options import DIFFERENTIABLE as OPTIONS
from .._rows.options import RowOptions


class Arguments(NamedTuple):
    """One call."""

    input: Tensor  # [N, C, K] logits, any strides
    options: RowOptions

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.input.dtype)


#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = ("input", *OPTIONS)
SIGNATURE = Signature(Arguments, DIFFERENTIABLE)
