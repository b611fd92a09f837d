"""The arguments that every backend of expert_cross_entropy takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import compute_dtype
from .._experts import experts_of
from .._registry import Signature
from .._rows.options import DIFFERENTIABLE as OPTIONS
from .._rows.options import RowOptions
from ..margin_cross_entropy.arguments import Arguments as RowArguments


class Arguments(NamedTuple):
    """One call. The options are shared by all experts, with one position per row (K = 1)."""

    logits: list[Tensor]  # one [E, N, C], or E of [N, C]; any strides
    options: RowOptions  # class_bias may be [E, C]
    log_prior: Tensor | None  # [C], finite
    ensemble_coefficient: Tensor | None  # `coefficient` of the ensemble's cross-entropy
    taus: list[float]  # [E]: expert e adds taus[e] * log_prior; zeros without log_prior

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.logits[0].dtype)

    @property
    def experts(self) -> list[Tensor]:
        return experts_of(self.logits)

    def bias(self, expert: int) -> Tensor | None:
        """Return all that the expert adds to its logits, [C]."""
        return bias_of(expert, self.options.class_bias, self.log_prior, self.taus)

    def rows(self) -> list[RowArguments]:
        """Return one call of the rows kernel for each expert."""
        return [
            RowArguments(x.unsqueeze(2), self.options._replace(class_bias=self.bias(expert)))
            for expert, x in enumerate(self.experts)
        ]


def bias_of(expert: int, class_bias: Tensor | None, log_prior: Tensor | None, taus: list[float]) -> Tensor | None:
    """Return taus[expert] * log_prior + class_bias, [C], of what is given; ``class_bias`` is [C] or [E, C]."""
    own = class_bias[expert] if class_bias is not None and class_bias.dim() == 2 else class_bias
    if log_prior is None or taus[expert] == 0.0:
        return own
    prior = taus[expert] * log_prior
    return prior if own is None else prior + own


#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = ("logits", *OPTIONS[1:])
SIGNATURE = Signature(Arguments, DIFFERENTIABLE)
