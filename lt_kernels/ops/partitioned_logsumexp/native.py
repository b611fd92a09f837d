"""The compiled backend of a block (csrc/partitioned_logsumexp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .arguments import Block

_native.load()


def forward(block: Block, with_slopes: bool) -> Tensor:
    """See ``Block``."""
    result: Tensor = torch.ops.lt_kernels_native.partitioned_logsumexp_fwd(*block, with_slopes)
    return result


def backward(block: Block, terms: Tensor, needs: list[bool], out: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``Block``."""
    result: tuple[Tensor, Tensor] = torch.ops.lt_kernels_native.partitioned_logsumexp_bwd(*block, terms, needs, out)
    return result
