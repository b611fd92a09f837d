"""Logit adjustment: cross-entropy of the logits shifted by tau times the log prior."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import ClassVector, check_counted, check_floating, check_number
from ..priors import ClassPrior, ZeroCounts
from ._base import LossOptions, MarginCrossEntropyBase

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LogitAdjustmentLoss(MarginCrossEntropyBase):
    """Logit-adjusted softmax cross-entropy.

    Menon, Jayasumana, Rawat, Jain, Veit, Kumar, *Long-tail learning via logit adjustment*, ICLR 2021:

        loss = -log[ exp(s z_y + tau log pi_y) / sum_j exp(s z_j + tau log pi_j) ],    pi = n / sum(n)

    with s = 1 there. Sets ``class_bias`` = tau log pi, float32 [C]. At test time use the plain logits.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        tau: strength; 1 is consistent for the balanced error, 0 is cross-entropy.
        eps: the paper's published code uses log(pi^tau + 1e-12): ``eps=1e-12``. 0 (default) is the formula above.
        scale: s: multiplies the logits before the prior is added; 1 for the logits of a linear layer. Cosines need one,
            as those of ``LinearHead(..., normalize=True)`` do: 16 to 64 in practice. A 0-dim tensor becomes a buffer;
            an ``nn.Parameter`` stays one and is learned.
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``zero_counts``,
            ``device``, ``dtype``, ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase]
            has them, shapes and errors.

    Example:
        >>> import torch
        >>> loss = LogitAdjustmentLoss([900, 90, 10], tau=1.0)
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 2]))  # -(log .9 + log .01) / 2
        tensor(2.3553)
    """

    def __init__(
        self,
        class_counts: ClassVector,
        tau: float = 1.0,
        *,
        eps: float = 0.0,
        scale: float | Tensor = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.tau, self.eps = check_number("tau", tau), check_number("eps", eps, 0.0)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"class_bias": prior.log_prior(self.tau, eps=self.eps, form="power")}


def post_hoc_logit_adjustment(
    logits: Tensor, class_counts: ClassVector, tau: float = 1.0, *, zero_counts: ZeroCounts = "error"
) -> Tensor:
    """Return z - tau log pi: balanced predictions of a model trained with plain cross-entropy (Menon et al., 2021).

    Args:
        logits: [C], [N, C] or [N, C, d1, ..., dk], floating.
        class_counts: training samples per class: [C], or a mapping or Series by class.
        tau: strength; 1 is the balanced-error rule for calibrated logits.
        zero_counts: what a class without samples means; under ``"mask"`` its logit becomes -inf.

    Returns:
        The adjusted logits, shaped like ``logits``; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: logits that are not floating or do not have one column per class; counts as in
            [`ClassPrior`][lt_kernels.priors.ClassPrior].

    Example:
        >>> import torch
        >>> post_hoc_logit_adjustment(torch.tensor([[2.0, 1.0, 0.0]]), [900, 90, 10]).argmax(1)
        tensor([2])
    """
    check_floating("logits", logits, "a floating-point tensor", "a floating-point tensor")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_prior = ClassPrior(class_counts, zero_counts=zero_counts, device=logits.device, dtype=dtype).log_prior(tau)
    class_dim = min(1, logits.dim() - 1)
    if logits.dim() == 0:
        raise ValueError(f"logits: got shape (), expected [N, {len(log_prior)}], a column per class")
    check_counted(len(log_prior), logits.shape[class_dim], "logits")
    shift = (-log_prior).masked_fill(log_prior == -math.inf, -math.inf)
    return logits + shift.reshape(-1, *[1] * (logits.dim() - class_dim - 1))
