"""Balanced contrastive learning: classes weigh the same in the denominator, and every class has a centre."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as LF
from .._checks import (
    ClassVector,
    check_choice,
    check_counted,
    check_device,
    check_embeddings,
    check_int,
    check_shape,
)
from .._smooth import quick_logaddexp
from ..functional.rows import EMPTY_MEANS, REDUCTIONS, mean_over
from ..priors import ClassPrior
from ._contrastive_base import TemperatureLoss, check_labels, count_classes, shown_temperature, zero_rows


class BalancedContrastiveLoss(TemperatureLoss):
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
        class_counts: training samples per class: [C], or a mapping or Series by class. Only the number of classes
            matters: the balance is that of the batch.
        temperature: T; the published code's default is 0.1. A number, or a 0-dim tensor: an ``nn.Parameter`` is a
            parameter of the loss and is trained, another tensor is a buffer.
        ignore_index: samples of this label are neither anchors nor keys, as if they were not in the batch. -1 is a
            label out of range like any other, unless it is this one.
        reduction: ``"mean"`` over the views that are not ignored, ``"sum"`` or ``"none"``.
        empty_mean: the ``"mean"`` over no view: ``"nan"``, or ``"zero"``.

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
        temperature: float | Tensor = 0.07,
        *,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        empty_mean: Literal["nan", "zero"] = "nan",
    ) -> None:
        super().__init__(temperature)
        self.num_classes = len(ClassPrior(class_counts, zero_counts="mask"))
        self.ignore_index = check_int("ignore_index", ignore_index)
        check_choice("reduction", reduction, REDUCTIONS, "'none', 'mean' or 'sum'")
        check_choice("empty_mean", empty_mean, EMPTY_MEANS)
        self.reduction, self.empty_mean = reduction, empty_mean

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
        given, index, is_class = check_labels(
            "labels", labels, (samples,), self.num_classes, features, self.ignore_index
        )
        ignored, absent = given == self.ignore_index, ~is_class
        query = zero_rows(features, ignored).flatten(0, 1)
        compared = index.to(torch.int32)
        label = compared[:, None].expand(samples, views).flatten()
        dtype = torch.promote_types(features.dtype, torch.float32)
        # an ignored view is no key, nor, on a GPU, is one of a class out of range
        of_views = compared.masked_fill(absent, -1)[:, None].expand(samples, views).flatten()
        key_label = torch.cat([of_views, torch.arange(self.num_classes, dtype=torch.int32, device=label.device)])
        counts = (views * count_classes(index, is_class, self.num_classes) + 1).to(dtype)
        bias = F.pad(-counts.log(), (0, 1), value=-math.inf)[key_label]  # -1, of no key, is the last one
        sums = LF.partitioned_logsumexp(
            query, torch.cat([query, centers]), label, key_label,
            scale=1 / self.temperature, key_bias=bias, exclude="self",
        )  # fmt: skip
        others = sums.num_pos.clamp_min(1)  # of its class, without the view itself: cnt - 1
        rows = quick_logaddexp(sums.neg, sums.pos + others.reciprocal().log1p()) - sums.pos_sum / others
        rows = rows.view(samples, views).masked_fill(absent[:, None], math.nan)  # a class out of range, on a GPU
        rows = rows.masked_fill(ignored[:, None], 0.0)
        if self.reduction == "none":
            return rows
        if self.reduction == "sum":
            return rows.sum()
        return mean_over(rows, views * (~ignored).sum(), self.empty_mean)

    def extra_repr(self) -> str:
        ignored = "" if self.ignore_index == -100 else f", ignore_index={self.ignore_index}"
        reduction = "" if self.reduction == "mean" else f", reduction={self.reduction}"
        reduction += "" if self.empty_mean == "nan" else f", empty_mean={self.empty_mean}"
        return f"num_classes={self.num_classes}, temperature={shown_temperature(self.temperature)}{ignored}{reduction}"
