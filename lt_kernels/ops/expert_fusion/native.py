"""The compiled backend (csrc/expert_fusion)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .arguments import Arguments

_native.load()


def forward(a: Arguments, k: int, with_log_probs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``op.py``."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.lt_kernels_native.expert_fusion(*a, k, with_log_probs)
    return result
