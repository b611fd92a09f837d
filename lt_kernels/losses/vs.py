"""Vector scaling: logits scaled and shifted per class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._checks import ClassVector, check_number
from ..priors import ClassPrior
from ._base import LossOptions, MarginCrossEntropyBase

if TYPE_CHECKING:
    from typing_extensions import Unpack


class VSLoss(MarginCrossEntropyBase):
    """Vector-scaling loss.

    Kini, Paraskevas, Oymak, Thrampoulidis, *Label-Imbalanced and Group-Sensitive Classification under
    Overparameterization*, NeurIPS 2021:

        loss = -log[ exp(s D_y z_y + b_y) / sum_j exp(s D_j z_j + b_j) ]
        D_c  = (n_c / max(n))^gamma,    b_c = tau log pi_c

    with s = 1 there. Sets ``class_scale`` = D and ``class_bias`` = b, float32 [C]. ``tau=0`` is CDT (Ye et al., 2020),
    ``gamma=0`` is logit adjustment. For VS-DRW let
    [`DeferredReweighting`][lt_kernels.schedules.DeferredReweighting] set ``weight``.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        gamma: strength of the multiplicative part.
        tau: strength of the additive part.
        scale: s: multiplies the logits before the prior is added; 1 for the logits of a linear layer. Cosines need one,
            as those of ``LinearHead(..., normalize=True)`` do: 16 to 64 in practice. A 0-dim tensor becomes a buffer;
            an ``nn.Parameter`` stays one and is learned.
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``zero_counts``,
            ``device``, ``dtype``, ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase]
            has them, shapes and errors.

    Example:
        >>> import torch
        >>> loss = VSLoss([900, 90, 10], gamma=0.3, tau=1.0)
        >>> loss.class_scale
        tensor([1.0000, 0.5012, 0.2593])
        >>> loss(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([2]))
        tensor(4.7667)
    """

    def __init__(
        self,
        class_counts: ClassVector,
        gamma: float = 0.3,
        tau: float = 1.0,
        *,
        scale: float | Tensor = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.gamma, self.tau = check_number("gamma", gamma), check_number("tau", tau)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"class_scale": prior.vs_scales(self.gamma), "class_bias": prior.log_prior(self.tau)}
