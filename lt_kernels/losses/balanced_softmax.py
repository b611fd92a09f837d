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

        loss = -log[ n_y exp(s z_y) / sum_j n_j exp(s z_j) ]

    with s = 1 there. Sets ``class_bias`` = log n, float32 [C]. It equals
    [`LogitAdjustmentLoss`][lt_kernels.losses.LogitAdjustmentLoss] with tau = 1, because a constant added to every logit
    changes nothing.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        scale: s: multiplies the logits before the prior is added; 1 for the logits of a linear layer. Cosines need one,
            as those of ``LinearHead(..., normalize=True)`` do: 16 to 64 in practice. A 0-dim tensor becomes a buffer;
            an ``nn.Parameter`` stays one and is learned.
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``zero_counts``,
            ``device``, ``dtype``, ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase]
            has them, shapes and errors.

    Example:
        >>> import torch
        >>> loss = BalancedSoftmaxLoss([900, 90, 10])
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(2.3553)
    """

    def __init__(
        self, class_counts: ClassVector, *, scale: float | Tensor = 1.0, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(scale=scale, **options)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"class_bias": prior.log_counts()}
