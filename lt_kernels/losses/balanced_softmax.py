"""Balanced softmax: cross-entropy of the logits shifted by the log counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._checks import ClassVector
from ..priors import ClassPrior
from ._base import LossOptions, MarginCrossEntropyBase

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BalancedSoftmaxLoss(MarginCrossEntropyBase):
    """Balanced softmax cross-entropy.

    Ren, Yu, Sheng, Ma, Zhao, Yi, Li, *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020:

        loss = -log[ n_y exp(z_y) / sum_j n_j exp(z_j) ]

    Sets ``class_bias`` = log n, float32 [C]. It equals
    [`LogitAdjustmentLoss`][lt_kernels.losses.LogitAdjustmentLoss] with tau = 1, because a constant added to every logit
    changes nothing.

    Args:
        class_counts: training samples per class, [C].
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``zero_counts``,
            ``device``, ``dtype``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them, shapes
            and errors.

    Example:
        >>> import torch
        >>> loss = BalancedSoftmaxLoss([900, 90, 10])
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(2.3553)
    """

    def __init__(self, class_counts: ClassVector, **options: Unpack[LossOptions]) -> None:
        super().__init__(**options)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"class_bias": prior.log_counts()}
