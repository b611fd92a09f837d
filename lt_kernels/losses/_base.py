"""What the classifier recipes share: the options, the call. A recipe chooses the class tensors."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor

from .. import functional as LF
from .._checks import ClassVector, check_angles, check_choice, check_classes_last, check_number, check_tensor
from ..functional.rows import MARGIN_TYPES
from ..priors import ZeroCounts
from ._class_tensors import ClassTensorLoss


class LossOptions(TypedDict, total=False):
    """Keywords that every classifier recipe takes; see ``MarginCrossEntropyBase``."""

    weight: ClassVector | None
    ignore_index: int
    reduction: Literal["none", "mean", "sum"]
    empty_mean: Literal["nan", "zero"]
    label_smoothing: float
    zero_counts: ZeroCounts
    device: torch.device | str | None
    dtype: torch.dtype | None
    persistent: bool


class MarginCrossEntropyBase(ClassTensorLoss):
    """A module over [`margin_cross_entropy`][lt_kernels.functional.margin_cross_entropy] with fixed class tensors.

    Every recipe takes these keywords:

    Args:
        scale: multiplies the logits (before the class biases are added): a number > 0, the inverse temperature of
            cosines; or a 0-dim tensor.
        margin: where the recipe has one: a number, or a 0-dim tensor, or one for each class, [C].
        weight: [C], class weights as in ``nn.CrossEntropyLoss``: ``"mean"`` divides by the sum of the targets' weights.
        ignore_index: targets with this class contribute nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        empty_mean: the mean over no row at all, such as a batch whose targets are all ignored: ``"nan"``, as in torch,
            or ``"zero"``, for a sum of several tasks' losses. The gradient is 0 either way.
        label_smoothing: in [0, 1].
        zero_counts: what a class without samples means: ``"error"``, ``"mask"`` or a positive number such as 1; see
            [`priors`][lt_kernels.priors].
        device: device of the buffers; by default that of ``class_counts``, and torch's default device for lists, arrays
            and mappings.
        dtype: dtype of the buffers; by default ``torch.get_default_dtype()``, at least float32.
        persistent: whether the class tensors are in ``state_dict``. A ``state_dict`` without them loads either way, and
            leaves them as they are; see [class counts](../class_counts.md#checkpoints).

    The attribute ``masked_classes`` tells whether ``class_bias`` may mask classes (-inf), which smoothing and
    probabilities then leave out. It is False where the loss derived or loaded a finite one, unless
    ``zero_counts="mask"``. Code that writes -inf into ``class_bias`` in place sets it to True: ``loss.masked_classes =
    True``; otherwise smoothed losses and those of probabilities are infinite or NaN.

    A ``scale``, or a ``margin``, that is an ``nn.Parameter`` (0-dim; a margin [C] too) is learned: it stays the
    caller's. Another tensor becomes a buffer.

    The class tensors are buffers: they move with ``.to()`` and travel in ``state_dict``. ``.half()`` and
    ``.bfloat16()`` keep them in float32: a log prior rounded to half precision would shift the decision boundaries.
    They are derived on the CPU and never uninitialised: a loss built on the meta device has its values once it is
    moved, by ``to_empty`` too, and ``reset_parameters`` derives them anew, in place.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; the message names it.
    """

    #: Whether the logits are cosines of features and class weights.
    cosine: ClassVar[bool] = False

    _CLASS_TENSORS: tuple[str, ...] = ("class_counts", "class_bias", "class_scale", "margin", "weight")

    class_scale: Tensor | None
    margin: float | Tensor | None
    weight: Tensor | None

    def __init__(
        self,
        *,
        scale: float | Tensor = 1.0,
        margin: float | ClassVector | None = None,
        margin_type: Literal["additive", "angular"] = "additive",
        weight: ClassVector | None = None,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        empty_mean: Literal["nan", "zero"] = "nan",
        label_smoothing: float = 0.0,
        zero_counts: ZeroCounts = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        persistent: bool = True,
    ) -> None:
        super().__init__(
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
            empty_mean=empty_mean,
            zero_counts=zero_counts,
            device=device,
            dtype=dtype,
            persistent=persistent,
        )
        check_choice("margin_type", margin_type, MARGIN_TYPES)
        self.margin_type = margin_type
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        if weight is not None:
            self._set("weight", self._class_tensor("weight", weight))
        if margin is not None:
            is_scalar = isinstance(margin, Real) or (isinstance(margin, Tensor) and margin.dim() == 0)
            hold: Callable[[str, Any], float | Tensor] = self._scalar if is_scalar else self._class_tensor
            self._set("margin", hold("margin", margin))
            if margin_type == "angular":
                check_angles("margin", self._kept_start("margin") if "margin" in self._start else self.margin)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mixed_target: Tensor | None = None,
        mix_lambda: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss of logits ``input``, [N, C], [C] or [N, C, d1, ..., dk].

        Args:
            input: logits (cosines for the losses that say so); float16, bfloat16, float32 or float64.
            target: class indices [N] of any integer dtype, or class probabilities like ``input`` (not with a margin).
            mixed_target: second class indices [N] of mixup or CutMix pairs.
            mix_lambda: share of ``target``: a number in [0, 1], or a tensor, 0-dim or like ``target``.

        Returns:
            0-dim, or [N] with ``reduction="none"``; float32 (float64 for float64 logits).
        """
        if check_tensor("input", input).dim() > 0:
            check_classes_last("target", target, input.shape)
            self._check_counted(input.shape[min(1, input.dim() - 1)], "input")
        loss: Tensor = LF.margin_cross_entropy(
            input, target, mixed_target=mixed_target, mix_lambda=mix_lambda, **self.keywords()
        )
        return loss

    def keywords(self) -> dict[str, Any]:
        """Return class tensors and options as keywords of ``margin_cross_entropy`` and of its linear form."""
        return {
            "weight": self.weight,
            "class_bias": self.class_bias,
            "class_scale": self.class_scale,
            "margin": self.margin,
            "scale": self.scale,
            "margin_type": self.margin_type,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "empty_mean": self.empty_mean,
            "label_smoothing": self.label_smoothing,
            "masked_classes": self.masked_classes,
        }

    def _set_counts(self, class_counts: ClassVector) -> None:
        super()._set_counts(class_counts)
        if self.weight is not None and self.class_counts is not None:
            if len(self.weight) != len(self.class_counts):
                raise ValueError(f"weight: got {len(self.weight)} classes, expected {len(self.class_counts)}")
            if self.weight.device != self.class_counts.device:
                self.weight = self._kept_start("weight", self._dtype).to(self.class_counts.device)
