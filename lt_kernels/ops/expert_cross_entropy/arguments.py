"""The arguments every backend of expert_cross_entropy takes: written once, here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._experts import compute_dtype, experts_of
from ..margin_cross_entropy.arguments import Arguments as RowArguments


class Arguments(NamedTuple):
    """One call. Class vectors are contiguous and in the compute dtype: float32, or float64 for float64 logits.

    ``functional`` validates; an out-of-range target is the backend's to catch.
    """

    logits: list[Tensor]  # one [E, N, C], or E of [N, C]; any strides
    target: Tensor  # [N] int64
    mixed_target: Tensor | None  # [N] int64
    mix_lambda: Tensor | None  # 0-dim or [N], the share of `target`
    weight: Tensor | None  # [C]
    class_bias: Tensor | None  # [C], or [E, C]
    class_scale: Tensor | None  # [C]
    class_margin: Tensor | None  # [C], added to `margin`
    learned_scale: Tensor | None  # 0-dim, multiplies `scale`
    log_prior: Tensor | None  # [C], finite
    coefficient: Tensor | None  # [1], or [2] with mixed_target: factor of each target's term
    ensemble_coefficient: Tensor | None  # the same for the ensemble's cross-entropy
    taus: list[float]  # [E]: expert e adds taus[e] * log_prior; zeros without log_prior
    scale: float
    margin: float
    angular: bool
    ignore_index: int
    label_smoothing: float

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.logits)

    @property
    def experts(self) -> list[Tensor]:
        return experts_of(self.logits)

    def bias(self, expert: int) -> Tensor | None:
        """All that the expert adds to its logits, [C]."""
        own = self.class_bias
        if own is not None and own.dim() == 2:
            own = own[expert]
        tau = self.taus[expert]
        if self.log_prior is None or tau == 0.0:
            return own
        prior = tau * self.log_prior
        return prior if own is None else prior + own

    def rows(self) -> list[RowArguments]:
        """The calls of the rows kernel that it stands for, one for each expert."""

        def column(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.reshape(-1, 1) if value.dim() == 1 else value

        return [
            RowArguments(
                x.unsqueeze(2),
                self.target[:, None],
                column(self.mixed_target),
                column(self.mix_lambda),
                self.weight,
                self.bias(expert),
                self.class_scale,
                self.class_margin,
                self.learned_scale,
                self.coefficient,
                self.scale,
                self.margin,
                self.angular,
                self.ignore_index,
                self.label_smoothing,
            )
            for expert, x in enumerate(self.experts)
        ]


#: Inputs that can receive a gradient, in the order of ``needs`` and of what the backward op returns.
DIFFERENTIABLE = ("logits", "class_bias", "class_scale", "class_margin", "learned_scale")

_TYPES = {
    "list[Tensor]": "Tensor[]",
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[float]": "float[]",
    "float": "float",
    "bool": "bool",
    "int": "int",
}
#: The same list in the schema language of torch.library.
SCHEMA = ", ".join(f"{_TYPES[Arguments.__annotations__[name].__forward_arg__]} {name}" for name in Arguments._fields)
N_TENSORS = Arguments._fields.index("taus")
