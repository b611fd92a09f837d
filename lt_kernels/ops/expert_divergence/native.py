"""The compiled backend (csrc/expert_divergence)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

_native.load()


def forward(logits: list[Tensor], temperature: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """See ``op.py``."""
    result: tuple[Tensor, Tensor] = torch.ops.lt_kernels_native.expert_divergence_fwd(
        logits, temperature, kind == "pairwise"
    )
    return result


def backward(
    grad: Tensor, saved: Tensor, logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool
) -> Tensor:
    """Gradient of the logits [E, N, C]; see ``op.py``."""
    result: Tensor = torch.ops.lt_kernels_native.expert_divergence_bwd(
        grad, saved, logits, temperature, kind == "pairwise", detach
    )
    return result
