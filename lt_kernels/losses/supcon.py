"""Supervised contrastive learning: views of a class attract, all others repel."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as LF
from .._checks import check_choice, check_embeddings, check_flag, check_positive
from ._contrastive_base import check_ids


class SupConLoss(nn.Module):
    """Supervised contrastive loss of a batch against itself, and without labels SimCLR's.

    Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan, *Supervised Contrastive Learning*, NeurIPS
    2020. With s_ij = <z_i, z_j> / T over all views of all samples and P_i other views of the class of view i,

        out    loss_i = T / T_base ( log sum over j != i of exp(s_ij) - 1/P_i sum over positives p of s_ip )
        in     loss_i = T / T_base ( log sum over j != i of exp(s_ij) - log[ 1/P_i sum over positives p of exp(s_ip) ] )

    Sets the scale 1/T and each view's own position as the key to leave out. A view without positives has loss 0 (the
    published code gives NaN) and counts in the mean.

    Args:
        temperature: T.
        base_temperature: T_base; None: T, a factor of 1. The published code has 0.07.
        contrast_mode: ``"all"`` views are anchors, or view ``"one"``, the first, against all views.
        form: where the mean over positives is taken, outside or inside the logarithm; published: ``"out"``.
        normalize: divide features by their norm first. Otherwise they should be unit vectors already.
        reduction: ``"mean"`` over all anchors, ``"sum"`` or ``"none"``.

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
        temperature: float = 0.07,
        base_temperature: float | None = None,
        contrast_mode: Literal["all", "one"] = "all",
        *,
        form: Literal["out", "in"] = "out",
        normalize: bool = False,
        reduction: Literal["none", "mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        if base_temperature is not None:
            base_temperature = check_positive("base_temperature", base_temperature)
        self.base_temperature = base_temperature
        check_choice("contrast_mode", contrast_mode, ("all", "one"))
        check_choice("form", form, ("out", "in"))
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        self.contrast_mode, self.form, self.reduction = contrast_mode, form, reduction
        self.normalize = check_flag("normalize", normalize)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of ``features``, float16, bfloat16, float32 or float64.

        Args:
            features: [N, V, D], V views of N samples; or [N, D].
            labels: [N], any integer dtype. None: the views of a sample are its only positives (SimCLR).

        Returns:
            0-dim; or with ``reduction="none"`` [N, V] ([N] for features [N, D] or ``contrast_mode="one"``). float32
            (float64 for float64 features).
        """
        flat = isinstance(features, Tensor) and features.dim() == 2
        views = check_embeddings("features", features, "[N, D]" if flat else "[N, V, D]")
        views = views[:, None] if flat else views
        samples, count = views.shape[:2]
        if labels is None:
            label = torch.arange(samples, device=views.device)
        else:
            label = check_ids("labels", labels, (samples,), views)
        views = F.normalize(views, dim=-1) if self.normalize else views
        key = views.flatten(0, 1)
        key_label = label[:, None].expand(samples, count).flatten()
        first_only = self.contrast_mode == "one" and count > 1
        loss: Tensor = LF.supervised_contrastive(
            views[:, 0] if first_only else key,
            key,
            label if first_only else key_label,
            key_label,
            temperature=self.temperature,
            form=self.form,
            exclude=torch.arange(samples, device=key.device) * count if first_only else "self",
            normalized=self.normalize,
            reduction=self.reduction,
        )
        if self.reduction == "none" and not flat and not first_only and self.contrast_mode == "all":
            loss = loss.view(samples, count)
        return loss if self.base_temperature is None else loss * (self.temperature / self.base_temperature)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {
            "base_temperature": self.base_temperature,
            "contrast_mode": self.contrast_mode,
            "form": self.form,
        }
        shown |= {"normalize": self.normalize, "reduction": self.reduction}
        defaults = dict(zip(shown, (None, "all", "out", False, "mean"), strict=True))
        changed = [f"{name}={value}" for name, value in shown.items() if value != defaults[name]]
        return ", ".join([f"temperature={self.temperature}", *changed])
