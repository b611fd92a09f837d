"""What the classifier recipes share: options, class tensors as buffers, online counts. A recipe chooses the tensors."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from .. import functional as LF
from ..priors import ClassPrior, ClassVector, ZeroCounts, as_class_vector, as_number

if TYPE_CHECKING:
    from typing_extensions import Self

_CLASS_TENSORS = ("class_counts", "class_bias", "class_scale", "margin", "weight")


class LossOptions(TypedDict, total=False):
    """Keywords that every classifier recipe takes; see ``MarginCrossEntropyBase``."""

    weight: ClassVector | None
    ignore_index: int
    reduction: Literal["none", "mean", "sum"]
    label_smoothing: float
    zero_counts: ZeroCounts
    device: torch.device | str | None
    dtype: torch.dtype | None


class MarginCrossEntropyBase(nn.Module):
    """A module over [`margin_cross_entropy`][lt_kernels.functional.margin_cross_entropy] with fixed class tensors.

    Every recipe takes these keywords:

    Args:
        weight: [C], class weights as in ``nn.CrossEntropyLoss``: ``"mean"`` divides by the sum of the targets' weights.
        ignore_index: targets with this class contribute nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        zero_counts: what a class without samples means: ``"error"``, ``"mask"`` or a positive number such as 1; see
            [`priors`][lt_kernels.priors].
        device: of the buffers; default that of ``class_counts`` (CPU for lists and arrays).
        dtype: of the buffers; default ``torch.get_default_dtype()``, at least float32.

    The class tensors are buffers: they move with ``.to()`` and travel in ``state_dict``. ``.half()`` and
    ``.bfloat16()`` keep them in float32: a log prior rounded to half precision would shift the decision boundaries.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; the message names it.
    """

    #: Whether the logits are cosines of features and class weights.
    cosine: ClassVar[bool] = False

    class_counts: Tensor | None
    class_bias: Tensor | None
    class_scale: Tensor | None
    margin: float | Tensor | None
    weight: Tensor | None

    def __init__(
        self,
        *,
        scale: float = 1.0,
        margin: float | ClassVector | None = None,
        margin_type: Literal["additive", "angular"] = "additive",
        weight: ClassVector | None = None,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        label_smoothing: float = 0.0,
        zero_counts: ZeroCounts = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction: got {reduction!r}, expected 'none', 'mean' or 'sum'")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, expected an int")
        self.scale = as_number("scale", scale)
        if self.scale <= 0:
            raise ValueError(f"scale: got {scale}, expected a number > 0")
        self.margin_type = margin_type
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = as_number("label_smoothing", label_smoothing, 0.0, 1.0, expected="a number in [0, 1]")
        self.zero_counts = zero_counts
        self._device = device
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, expected a floating-point dtype")
        self._dtype = torch.promote_types(dtype, torch.float32)
        for name in _CLASS_TENSORS:
            self.register_buffer(name, None)
        if weight is not None:
            self._set("weight", self._class_tensor("weight", weight))
        if margin is not None:
            if isinstance(margin, (float, Real)):
                self._set("margin", as_number("margin", margin))
            else:
                self._set("margin", self._class_tensor("margin", margin))

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        """The recipe: the class tensors that ``prior`` gives, by name."""
        raise NotImplementedError(f"{type(self).__name__} derives nothing from class counts")

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        mixed_target: Tensor | None = None,
        mix_lambda: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits ``input``, [N, C], [C] or [N, C, d1, ..., dk], float16, bfloat16, float32 or float64.

        Args:
            input: logits (cosines for the losses that say so).
            target: class indices [N] of any integer dtype, or class probabilities like ``input`` (not with a margin).
            mixed_target: second class indices [N] of mixup or CutMix pairs.
            mix_lambda: share of ``target``: a number in [0, 1], or a tensor, 0-dim or like ``target``.

        Returns:
            0-dim, or [N] with ``reduction="none"``; float32 (float64 for float64 logits).
        """
        loss: Tensor = LF.margin_cross_entropy(
            input, target, mixed_target=mixed_target, mix_lambda=mix_lambda, **self.keywords()
        )
        return loss

    def keywords(self) -> dict[str, Any]:
        """Class tensors and options, as keywords of ``margin_cross_entropy`` and ``linear_margin_cross_entropy``."""
        return {
            "weight": self.weight,
            "class_bias": self.class_bias,
            "class_scale": self.class_scale,
            "margin": self.margin,
            "scale": self.scale,
            "margin_type": self.margin_type,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }

    @property
    def class_sizes(self) -> dict[str, int]:
        """How many classes each class tensor has, by name."""
        named = {name: getattr(self, name) for name in _CLASS_TENSORS}
        return {name: len(value) for name, value in named.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def update_counts(self, class_counts: ClassVector) -> None:
        """Derive the class tensors anew from ``class_counts`` [C], in place (compiled and captured graphs see it).

        Raises:
            TypeError, ValueError: as the constructor, or for another number of classes.
            RuntimeError: the loss was not built from class counts.
        """
        if self.class_counts is None:
            raise RuntimeError(f"update_counts: got a {type(self).__name__} that was built without class counts")
        held = self.class_counts
        derived = self._derived(class_counts, held.device, held.dtype)
        if len(derived["class_counts"]) != len(held):
            raise ValueError(f"class_counts: got {len(derived['class_counts'])} classes, expected {len(held)}")
        for name, value in derived.items():
            getattr(self, name).copy_(value)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"scale": self.scale, "margin": self.margin, "ignore_index": self.ignore_index}
        shown |= {"reduction": self.reduction, "label_smoothing": self.label_smoothing}
        defaults = {"scale": 1.0, "margin": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
        classes = [] if self.class_counts is None else [f"num_classes={len(self.class_counts)}"]
        changed = [f"{k}={v}" for k, v in shown.items() if not isinstance(v, Tensor) and v != defaults[k]]
        return ", ".join(classes + changed)

    def _set_counts(self, class_counts: ClassVector) -> None:
        """Last line of a recipe's constructor: derive and register the class tensors."""
        derived = self._derived(class_counts, self._device, self._dtype)
        if self.weight is not None:
            counts = derived["class_counts"]
            if len(self.weight) != len(counts):
                raise ValueError(f"weight: got {len(self.weight)} classes, expected {len(counts)}")
            self.weight = self.weight.to(counts.device)
        for name, value in derived.items():
            self._set(name, value)

    def _derived(
        self, class_counts: ClassVector, device: torch.device | str | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        prior = ClassPrior(class_counts, zero_counts=self.zero_counts, device=device, dtype=dtype)
        return {"class_counts": prior.class_counts, **self.derive(prior)}

    def _class_tensor(self, name: str, value: ClassVector) -> Tensor:
        vector = as_class_vector(name, value)  # validated also where the tensor itself is kept
        if isinstance(value, nn.Parameter):
            return value
        return vector.to(self._device or getattr(value, "device", "cpu"), self._dtype)

    def _set(self, name: str, value: float | Tensor) -> None:
        """Hold a learnable tensor as a parameter, any other as a buffer, and a number as it is."""
        delattr(self, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(at_least_float32, recurse)
