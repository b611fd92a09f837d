"""Balanced contrastive learning: classes weigh the same in the denominator, and every class has a centre."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .. import functional as LF
from .._checks import (
    ClassVector,
    check_choice,
    check_counted,
    check_device,
    check_embeddings,
    check_positive,
    check_shape,
)
from ..priors import ClassPrior
from ._contrastive_base import check_labels, count_classes


class BalancedContrastiveLoss(nn.Module):
    """The contrastive part of balanced contrastive learning (BCL): class averaging and class complement.

    Zhu, Wang, Chen, Chen, Jiang, *Balanced Contrastive Learning for Long-Tailed Visual Recognition*, CVPR 2022. Keys
    are all views of the batch and one learnable centre of each class, so that every class is present. With s_ij =
    <z_i, k_j> / T and cnt_c keys of class c,

        denominator_i = sum over classes c of the mean of exp(s_ij) over keys j of class c, without view i itself
        loss_i        = log denominator_i - 1/(cnt_y - 1) sum over positives p of s_ip

    Sets a bias -log cnt of each key and, on the positives, the offset log(cnt_y / (cnt_y - 1)) that is the mean without
    the view itself. The published method adds it to a cross-entropy with adjusted logits, such as
    [`LogitAdjustmentLoss`][lt_kernels.losses.LogitAdjustmentLoss] or
    [`BalancedSoftmaxLoss`][lt_kernels.losses.BalancedSoftmaxLoss], of a third view; the centres there are an MLP of the
    classifier's weights.

    Args:
        class_counts: training samples per class, [C]. Only the number of classes matters: the balance is that of the
            batch.
        temperature: T; the published code's default is 0.1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        IndexError: a label out of range, on the CPU or with checks on; on a GPU without checks its loss is NaN.

    Example:
        >>> import torch.nn.functional as F
        >>> loss = BalancedContrastiveLoss([900, 90, 10])
        >>> features = F.normalize(torch.randn(4, 2, 16), dim=-1).requires_grad_()
        >>> centers = F.normalize(torch.randn(3, 16), dim=-1).requires_grad_()
        >>> loss(features, torch.tensor([0, 1, 0, 2]), centers).backward()
        >>> loss
        BalancedContrastiveLoss(num_classes=3, temperature=0.07)
    """

    def __init__(
        self,
        class_counts: ClassVector,
        temperature: float = 0.07,
        *,
        reduction: Literal["none", "mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.num_classes = len(ClassPrior(class_counts, zero_counts="mask"))
        self.temperature = check_positive("temperature", temperature)
        check_choice("reduction", reduction, ("none", "mean", "sum"), "'none', 'mean' or 'sum'")
        self.reduction = reduction

    def forward(self, features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        """Return the loss of ``features``, float16, bfloat16, float32 or float64.

        Args:
            features: [N, V, D], V views of N samples (two in the paper); unit vectors.
            labels: [N], any integer dtype.
            centers: [C, D], one of each class; unit vectors.

        Returns:
            0-dim; or [N, V] with ``reduction="none"``. float32 (float64 for float64 features).
        """
        samples, views, dim = check_embeddings("features", features, "[N, V, D]").shape
        check_embeddings("centers", centers, "[C, D]")
        check_counted(self.num_classes, len(centers), "centers")
        check_shape("centers", centers, (self.num_classes, dim))
        check_device("centers", centers, features, " as features")
        # no label means "none": -1 is as much out of range as any other
        index, is_class = check_labels("labels", labels, (samples,), self.num_classes, features, none=None)
        query = features.flatten(0, 1)
        label = index[:, None].expand(samples, views).flatten()
        dtype = torch.promote_types(features.dtype, torch.float32)
        # a class out of range, on a GPU, is no key of any class
        of_views = torch.where(is_class, index, -1)[:, None].expand(samples, views).flatten()
        key_label = torch.cat([of_views, torch.arange(self.num_classes, device=label.device)])
        counts = (views * count_classes(index, is_class, self.num_classes) + 1).to(dtype)
        bias = torch.where(key_label >= 0, -counts.log()[key_label.clamp_min(0)], -math.inf)
        sums = LF.partitioned_logsumexp(
            query, torch.cat([query, centers]), label, key_label,
            scale=1 / self.temperature, key_bias=bias, exclude="self",
        )  # fmt: skip
        count = counts[label]
        others = (count - 1).clamp_min(1)
        rows = torch.logaddexp(sums.neg, sums.pos + (count / others).log()) - sums.pos_sum / others
        rows = torch.where(is_class[:, None], rows.view(samples, views), math.nan)
        if self.reduction == "none":
            return rows
        return rows.mean() if self.reduction == "mean" else rows.sum()

    def extra_repr(self) -> str:
        reduction = "" if self.reduction == "mean" else f", reduction={self.reduction}"
        return f"num_classes={self.num_classes}, temperature={self.temperature}{reduction}"
