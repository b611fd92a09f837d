"""What every loss made from class counts shares: reduction, class tensors as buffers, online counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .._checks import ClassVector, as_class_vector, check_choice, check_counted, check_int, check_positive
from ..priors import ClassPrior, ZeroCounts

if TYPE_CHECKING:
    from typing_extensions import Self

#: What ``repr`` shows if a loss has it and it differs from this.
_SHOWN = {
    "scale": 1.0,
    "margin": None,
    "ignore_index": -100,
    "reduction": "mean",
    "empty_mean": "nan",
    "label_smoothing": 0.0,
}


class ClassTensorLoss(nn.Module):
    """A loss whose class tensors are buffers, derived from class counts by ``derive``."""

    #: Names of the tensors with one value per class; each is None until it is set.
    _CLASS_TENSORS: tuple[str, ...] = ("class_counts", "class_bias")

    class_counts: Tensor | None
    class_bias: Tensor | None

    def __init__(
        self,
        *,
        scale: float,
        ignore_index: int,
        reduction: Literal["none", "mean", "sum"],
        empty_mean: Literal["nan", "zero"],
        zero_counts: ZeroCounts,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("none", "mean", "sum"), "'none', 'mean' or 'sum'")
        check_choice("empty_mean", empty_mean, ("nan", "zero"))
        self.scale = check_positive("scale", scale)
        self.ignore_index = check_int("ignore_index", ignore_index)
        self.reduction: Literal["none", "mean", "sum"] = reduction
        self.empty_mean: Literal["nan", "zero"] = empty_mean
        self.zero_counts: ZeroCounts = zero_counts
        self._device = device
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, expected a floating-point dtype")
        self._dtype = torch.promote_types(dtype, torch.float32)
        for name in self._CLASS_TENSORS:
            self.register_buffer(name, None)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        """Return the recipe's class tensors for ``prior``, by name."""
        raise NotImplementedError(f"{type(self).__name__} derives nothing from class counts")

    @property
    def class_sizes(self) -> dict[str, int]:
        """The number of classes of each class tensor, by name."""
        named = {name: getattr(self, name) for name in self._CLASS_TENSORS}
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

    def _check_counted(self, classes: int, of: str) -> None:
        """Refuse ``of`` with another number of classes than the counts that the loss was built from, if any."""
        if self.class_counts is not None:
            check_counted(len(self.class_counts), classes, of)

    def extra_repr(self) -> str:
        values = {name: getattr(self, name, default) for name, default in _SHOWN.items()}
        classes = [] if self.class_counts is None else [f"num_classes={len(self.class_counts)}"]
        changed = [f"{k}={v}" for k, v in values.items() if not isinstance(v, Tensor) and v != _SHOWN[k]]
        return ", ".join(classes + changed)

    def _reduce(self, rows: Tensor, counted: Tensor) -> Tensor:
        """Reduce ``rows``, 0 where not ``counted``; the mean is over the counted rows, ``empty_mean`` over none."""
        if self.reduction == "none":
            return rows
        if self.reduction == "sum":
            return rows.sum()
        count = counted.sum()
        mean = rows.sum() / count.clamp_min(1)
        # 0 / 0 would send NaN to the gradients of rows that are left out
        return mean if self.empty_mean == "zero" else torch.where(count > 0, mean, math.nan)

    def _set_counts(self, class_counts: ClassVector) -> None:
        """Derive and register the class tensors: the last line of a recipe's constructor."""
        for name, value in self._derived(class_counts, self._device, self._dtype).items():
            self._set(name, value)

    def _derived(
        self, class_counts: ClassVector, device: torch.device | str | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        prior = ClassPrior(class_counts, zero_counts=self.zero_counts, device=device, dtype=dtype)
        return {"class_counts": prior.class_counts, **self.derive(prior)}

    def _class_tensor(self, name: str, value: ClassVector) -> Tensor:
        """Return ``value`` as a class tensor; a parameter stays the one that the caller holds."""
        vector = as_class_vector(name, value)
        if isinstance(value, nn.Parameter):
            return value
        return vector.to(self._device or getattr(value, "device", "cpu"), self._dtype)

    def _set(self, name: str, value: float | Tensor) -> None:
        """Hold a learnable tensor as a parameter, any other as a buffer, and a number as it is."""
        delattr(self, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
            for unset in [each for each, held in self._buffers.items() if held is None]:
                self._buffers[unset] = self._buffers.pop(unset)  # torch.export expects them behind the others
        else:
            setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(at_least_float32, recurse)
