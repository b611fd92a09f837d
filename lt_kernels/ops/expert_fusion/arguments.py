"""The arguments every backend of expert_fusion takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import compute_dtype
from .._experts import experts_of
from .._registry import Signature


class Arguments(NamedTuple):
    """One call: u_j = scale * sum over e of weights_e * x_ej + class_shift_j. Vectors in the compute dtype."""

    logits: list[Tensor]  # one [E, N, C], or E of [N, C]; any strides
    expert_weight: Tensor | None  # [E], multiplies `weights`
    class_shift: Tensor | None  # [C]
    learned_scale: Tensor | None  # 0-dim, multiplies `scale`
    weights: list[float]  # [E]
    scale: float
    normalize: bool = False  # probabilities for the values, and the log-sum-exp for the sum

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.logits[0].dtype)

    @property
    def experts(self) -> list[Tensor]:
        return experts_of(self.logits)


SIGNATURE = Signature(Arguments)
