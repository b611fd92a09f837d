"""RIDE: LDAM for several experts, and a reward for being different."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import ClassVector, check_number, check_positive
from ..priors import ClassPrior
from ._base import LossOptions
from ._experts_base import ExpertLossBase, check_indices, stacked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..functional.experts import ExpertLogits


class RIDELoss(ExpertLossBase):
    """The training loss of RIDE's experts: LDAM of each, and minus their divergence from the experts' mean.

    Wang, Lian, Miao, Liu, Yu, *Long-tailed Recognition by Routing Diverse Distribution-Aware Experts*, ICLR 2021:

        loss = sum over e of [ CE(z_e, less s m_y at the target) + diversity Tbar^2 KL(p || p_e) ]
        p    = softmax(zbar / T),    p_e = softmax(z_e / T)
        m_c  = max_margin * n_c^-1/4 / max(n^-1/4)

    with zbar the mean of the experts' logits, constant to the gradient. ``logits`` are 30 cos of normalised heads (such
    as [`ExpertHead`][lt_kernels.losses.ExpertHead]'s), with their scale, which lets the margin be s m. Sets ``margin``
    = s m and ``class_temperature``, float32 [C].

    As published, the temperature follows re-weighting. While class weights do not tell classes apart (none, or all
    equal) T is ``temperature``; with weights that do, such as
    [`DeferredReweighting`][lt_kernels.schedules.DeferredReweighting] sets in ``weight`` from its switch on (published:
    epoch 160 of 200 on CIFAR, beta 0.9999), it is a vector,

        T_c = temperature w_c / max(w),    w = C pi reweight_factor + 1 - reweight_factor,    Tbar = its mean

    Also as published: with ``diversity=0`` the cross-entropy of every expert is that of zbar, the ensemble. The
    distillation and the routing of RIDE are not part of the loss.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        max_margin: margin of the rarest class, in cosines.
        scale: s, which the logits already contain. A 0-dim tensor, such as the learned scale of an
            [`ExpertHead`][lt_kernels.losses.ExpertHead], multiplies the margins in each call; then ``margin`` is m.
        diversity: factor of the divergence; negative rewards it.
        temperature: of the divergence.
        reweight_factor: in [0, 1]: how much T depends on the prior.
        options: ``weight``, ``ignore_index``, ``reduction`` (over rows), ``empty_mean``, ``label_smoothing``,
            ``zero_counts``, ``device``, ``dtype``, ``persistent``;
            [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them, shapes and errors. Weights
            and smoothing act on the cross-entropies alone; ignored rows take no part in the divergence either, whose
            mean is over the other rows. A class without samples (``zero_counts="mask"``) counts as the rarest one.

    Example:
        >>> import torch
        >>> loss = RIDELoss([900, 90, 10])
        >>> loss.margin  # 30 times those of LDAM
        tensor([ 4.8700,  8.6603, 15.0000])
        >>> loss(torch.zeros(3, 2, 3), torch.tensor([0, 2]))  # the experts agree: only margins
        tensor(31.8902)
    """

    expert_reduction = "sum"

    _CLASS_TENSORS = (*ExpertLossBase._CLASS_TENSORS, "class_temperature")

    class_temperature: Tensor

    def __init__(
        self,
        class_counts: ClassVector,
        max_margin: float = 0.5,
        scale: float | Tensor = 30.0,
        diversity: float = -0.2,
        temperature: float = 1.0,
        reweight_factor: float = 0.05,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.max_margin = check_number("max_margin", max_margin, 0.0)
        self.diversity = check_number("diversity", diversity)
        self.temperature = check_positive("temperature", temperature)
        self.reweight_factor = check_number("reweight_factor", reweight_factor, 0.0, 1.0)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        scale = 1.0 if isinstance(self.scale, Tensor) else self.scale
        return {
            "margin": prior.ldam_margins(scale * self.max_margin),
            "class_temperature": prior.ride_temperatures(self.temperature, self.reweight_factor),
        }

    def keywords(self) -> dict[str, Any]:
        """Return class tensors and options as keywords of ``expert_cross_entropy``; the logits contain the scale."""
        margin = self.scale * self.margin if isinstance(self.scale, Tensor) else self.margin  # type: ignore[operator]
        return {**super().keywords(), "scale": 1.0, "margin": margin}

    def loss(self, logits: ExpertLogits, target: Tensor, **mixed: Any) -> Tensor:
        check_indices(target, "RIDE's margin acts on one class")
        if self.diversity == 0:
            logits = stacked("logits", logits, maps=True)
            ensemble = logits.mean(0, dtype=torch.promote_types(logits.dtype, torch.float32))
            return len(logits) * super().loss([ensemble], target, **mixed)
        loss = super().loss(logits, target, **mixed)
        temperature: float | Tensor = self.temperature
        factor, squared = self.diversity * self.temperature**2, None
        if self.weight is not None:
            # decided on the device: the schedule changes the weights in place; a class without samples has weight 0
            largest = self.weight.max()
            reweighted = torch.where(self.weight > 0, self.weight, largest).min() < largest
            temperature = torch.where(reweighted, self.class_temperature, temperature)
            mean = torch.where(reweighted, self.class_temperature.mean(), self.temperature).to(loss.dtype)
            factor, squared = self.diversity, mean.square()
        diversity = self.divergence(logits, "to_mean", temperature, factor, target, **mixed)
        return loss + diversity if squared is None else torch.addcmul(loss, squared, diversity)
