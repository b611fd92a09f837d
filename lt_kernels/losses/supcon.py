"""Supervised contrastive learning: views of a class attract, all others repel."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as LF
from .._checks import (
    check_choice,
    check_device,
    check_embeddings,
    check_flag,
    check_int,
    check_positive,
    check_shape,
    check_tensor,
    check_values,
    check_weights,
)
from ..functional.contrastive import CONTRASTIVE_REDUCTIONS
from ..functional.rows import EMPTY_MEANS
from ._contrastive_base import TemperatureLoss, check_ids, shown_temperature, zero_rows


class SupConLoss(TemperatureLoss):
    """Supervised contrastive loss of a batch against itself, and without labels SimCLR's.

    Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan, *Supervised Contrastive Learning*, NeurIPS
    2020. With s_ij = <z_i, z_j> / T over all views of all samples and P_i other views of the class of view i,

        out    loss_i = T / T_base ( log sum over j != i of exp(s_ij) - 1/P_i sum over positives p of s_ip )
        in     loss_i = T / T_base ( log sum over j != i of exp(s_ij) - log[ 1/P_i sum over positives p of exp(s_ip) ] )

    Sets the scale 1/T and each view's own position as the key to leave out. A view without positives has loss 0 and
    counts in the mean, as in the published code of today (its first versions gave NaN).

    Args:
        temperature: T; a number, or a 0-dim tensor: an ``nn.Parameter`` is a parameter of the loss and is trained,
            another tensor is a buffer.
        base_temperature: T_base; None: T, a factor of 1. The published code has 0.07.
        contrast_mode: ``"all"`` views are anchors, or view ``"one"``, the first, against all views.
        form: where the mean over positives is taken, outside or inside the logarithm; published: ``"out"``.
        normalize: divide features by their norm first. Otherwise they should be unit vectors already.
        ignore_index: samples of this label are neither anchors nor positives nor negatives, as if they were not in the
            batch. None (the default): every label is a class, and so are -1 and -100. On a GPU the gradient of half
            precision then takes one sweep rather than two.
        reduction: ``"mean"`` over all anchors that are not ignored, ``"sum"``, ``"none"``, or
            ``"mean_positives"``: over the anchors that have positives, as pytorch-metric-learning has it; 0 where none
            has.
        empty_mean: the ``"mean"`` over no anchor: ``"nan"``, or ``"zero"``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> loss = SupConLoss(temperature=0.1)
        >>> features = F.normalize(torch.randn(4, 2, 16), dim=-1).requires_grad_()
        >>> loss(features, torch.tensor([0, 1, 0, 2])).backward()
        >>> loss
        SupConLoss(temperature=0.1)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        base_temperature: float | None = None,
        contrast_mode: Literal["all", "one"] = "all",
        *,
        form: Literal["out", "in"] = "out",
        normalize: bool = False,
        ignore_index: int | None = None,
        reduction: Literal["none", "mean", "sum", "mean_positives"] = "mean",
        empty_mean: Literal["nan", "zero"] = "nan",
    ) -> None:
        super().__init__(temperature)
        if base_temperature is not None:
            base_temperature = check_positive("base_temperature", base_temperature)
        self.base_temperature = base_temperature
        check_choice("contrast_mode", contrast_mode, ("all", "one"))
        check_choice("form", form, ("out", "in"))
        check_choice("reduction", reduction, CONTRASTIVE_REDUCTIONS)
        self.contrast_mode, self.form, self.reduction = contrast_mode, form, reduction
        check_choice("empty_mean", empty_mean, EMPTY_MEANS)
        self.empty_mean = empty_mean
        self.normalize = check_flag("normalize", normalize)
        if ignore_index is not None:
            check_int("ignore_index", ignore_index, kind="an int or None")
        self.ignore_index = ignore_index

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the loss of ``features``, float16, bfloat16, float32 or float64.

        Args:
            features: [N, V, D], V views of N samples; or [N, D].
            labels: [N], any integer dtype. None: the views of a sample are its only positives (SimCLR).
            mask: [N, N], in place of labels: how much sample j is a positive of sample i; bool, or weights >= 0 (the
                mean over positives is weighted). Entry (i, i) is for the other views of sample i. Such a mask may be
                anything, so that this is eager PyTorch with [N V, N V] similarities. Two sets of labels that must both
                agree need no mask: one number for each pair of them is a label.

        Returns:
            0-dim; or with ``reduction="none"`` [N, V] ([N] for features [N, D] or ``contrast_mode="one"``). float32
            (float64 for float64 features).
        """
        flat = isinstance(features, Tensor) and features.dim() == 2
        views = check_embeddings("features", features, "[N, D]" if flat else "[N, V, D]")
        views = views[:, None] if flat else views
        samples, count = views.shape[:2]
        if mask is not None:
            mask = self._check_mask(mask, labels, samples, views)
        if labels is None:
            label = torch.arange(samples, device=views.device)
        else:
            label = check_ids("labels", labels, (samples,), views)
        ignore_index = None if labels is None else self.ignore_index
        if self.normalize:
            # a norm that is not finite has no slope
            views = views if ignore_index is None else zero_rows(views, label == ignore_index)
            views = F.normalize(views, dim=-1)
        key = views.flatten(0, 1)
        key_label = label[:, None].expand(samples, count).flatten()
        first_only = self.contrast_mode == "one" and count > 1
        query = views[:, 0] if first_only else key
        query_label = label if first_only else key_label
        if mask is not None:
            own = torch.arange(len(key), device=key.device).view(samples, count)
            loss = self._of_mask(
                query, key, mask[query_label][:, key_label], own[:, 0] if first_only else own.flatten()
            )
        else:
            loss = LF.supervised_contrastive(
                query,
                key,
                query_label,
                key_label,
                temperature=self.temperature,
                form=self.form,
                exclude=torch.arange(samples, device=key.device) * count if first_only else "self",
                normalized=self.normalize,
                ignore_index=ignore_index,
                reduction=self.reduction,
                empty_mean=self.empty_mean,
            )
        if self.reduction == "none" and not flat and not first_only and self.contrast_mode == "all":
            loss = loss.view(samples, count)
        return loss if self.base_temperature is None else loss * (self.temperature / self.base_temperature)

    def _of_mask(self, query: Tensor, key: Tensor, weight: Tensor, own: Tensor) -> Tensor:
        """Return the loss with ``weight`` [queries, keys] of positives; ``own`` is each query's own key."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        s = (query.to(dtype) @ key.to(dtype).T).to(dtype) / self.temperature
        is_own = torch.arange(len(key), device=key.device) == own[:, None]
        weight = weight.to(dtype).masked_fill(is_own, 0.0)
        total = weight.sum(1)
        some = total > 0
        weight = weight / torch.where(some, total, 1.0)[:, None]
        everything = s.masked_fill(is_own, -math.inf)
        # a row without positives might be one without keys: it has no logarithm
        everything = torch.where(some[:, None], everything, 0.0).logsumexp(1)
        if self.form == "out":
            pulled = (weight * s).sum(1)
        else:
            inside = torch.where(weight > 0, weight, 1.0).log() + s.masked_fill(weight == 0, -math.inf)
            pulled = torch.where(some[:, None], inside, 0.0).logsumexp(1)
        rows = torch.where(some, everything - pulled, 0.0)
        if self.reduction == "none":
            return rows
        if self.reduction == "mean":
            return rows.sum() / max(len(rows), 1) if self.empty_mean == "zero" else rows.mean()
        return rows.sum() if self.reduction == "sum" else rows.sum() / some.sum().clamp_min(1)

    def _check_mask(self, mask: Tensor, labels: Tensor | None, samples: int, views: Tensor) -> Tensor:
        if labels is not None:
            raise ValueError("mask: got both labels and mask, expected one of them")
        check_tensor("mask", mask, "a Tensor [N, N]")
        check_shape("mask", mask, (samples, samples))
        check_device("mask", mask, views, " as features")
        if mask.is_complex():
            raise TypeError(f"mask: got dtype {mask.dtype}, expected bool or real numbers")
        return mask if mask.dtype == torch.bool else check_values(check_weights, "mask", mask)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {
            "base_temperature": self.base_temperature,
            "contrast_mode": self.contrast_mode,
            "form": self.form,
        }
        shown |= {"normalize": self.normalize, "ignore_index": self.ignore_index, "reduction": self.reduction}
        shown |= {"empty_mean": self.empty_mean}
        defaults = dict(zip(shown, (None, "all", "out", False, None, "mean", "nan"), strict=True))
        changed = [f"{name}={value}" for name, value in shown.items() if value != defaults[name]]
        return ", ".join([f"temperature={shown_temperature(self.temperature)}", *changed])
