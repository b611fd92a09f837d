"""What every loss made from class counts shares: reduction, class tensors as buffers, online counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .._checks import (
    ClassVector,
    as_class_vector,
    as_device,
    as_dtype,
    check_choice,
    check_counted,
    check_flag,
    check_floating,
    check_int,
    check_number,
    check_positive,
    device_of,
    with_values,
)
from .._modules import InitializedModule, at_least_float32, is_readable
from ..functional.rows import EMPTY_MEANS, REDUCTIONS, mean_over
from ..priors import ClassPrior, ZeroCounts, check_zero_counts

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


class ClassTensorLoss(InitializedModule):
    """A loss whose class tensors are buffers, derived from class counts by ``derive``.

    The counts and the tensors that the caller gave are kept as numbers besides, those that were last given: by the
    constructor, ``update_counts``, a schedule or ``load_state_dict``. ``reset_parameters`` derives from them.
    """

    #: Names of the tensors with one value per class; each is None until it is set.
    _CLASS_TENSORS: tuple[str, ...] = ("class_counts", "class_bias")

    class_counts: Tensor | None
    class_bias: Tensor | None
    scale: float | Tensor
    #: Whether ``class_bias`` may mask classes: False only where its values were derived or loaded, and are finite.
    masked_classes: bool = True

    def __init__(
        self,
        *,
        scale: float | Tensor,
        ignore_index: int,
        reduction: Literal["none", "mean", "sum"],
        empty_mean: Literal["nan", "zero"],
        zero_counts: ZeroCounts,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        persistent: bool,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS, "'none', 'mean' or 'sum'")
        check_choice("empty_mean", empty_mean, EMPTY_MEANS)
        self.ignore_index = check_int("ignore_index", ignore_index)
        self.reduction: Literal["none", "mean", "sum"] = reduction
        self.empty_mean: Literal["nan", "zero"] = empty_mean
        self.zero_counts: ZeroCounts = check_zero_counts(zero_counts)
        self._device = None if device is None else as_device("device", device)
        self._dtype = torch.promote_types(as_dtype("dtype", dtype), torch.float32)
        self.persistent = check_flag("persistent", persistent)
        self._set("scale", self._scalar("scale", scale, check_positive))
        for name in self._CLASS_TENSORS:
            self.register_buffer(name, None, persistent=self.persistent)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        """Return the recipe's class tensors for ``prior``, by name."""
        raise NotImplementedError(f"{type(self).__name__} derives nothing from class counts")

    @property
    def class_sizes(self) -> dict[str, int]:
        """The number of classes of each class tensor, by name."""
        named = {name: getattr(self, name) for name in self._CLASS_TENSORS}
        return {name: len(value) for name, value in named.items() if isinstance(value, Tensor) and value.dim() > 0}

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
        counts = as_class_vector("class_counts", class_counts, gap=0.0)
        derived = self._derived(counts, held.device, held.dtype)
        if len(counts) != len(held):
            raise ValueError(f"class_counts: got {len(counts)} classes, expected {len(held)}")
        self._keep_start("class_counts", counts)
        for name, value in derived.items():
            getattr(self, name).copy_(value)
        self._find_masks()

    def _check_counted(self, classes: int, of: str) -> None:
        """Refuse ``of`` with another number of classes than the counts that the loss was built from, if any."""
        counts = self.class_counts
        if counts is not None:
            check_counted(counts.shape[0], classes, of)

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
        return mean_over(rows, counted.sum(), self.empty_mean)

    def _set_counts(self, class_counts: ClassVector) -> None:
        """Derive and register the class tensors: the last line of a recipe's constructor."""
        counts = as_class_vector("class_counts", class_counts, gap=0.0)
        for name, value in self._derived(counts, device_of(self._device, class_counts), self._dtype).items():
            self._set(name, value)
        self._keep_start("class_counts", counts)
        self._find_masks()

    def _find_masks(self) -> None:
        """Find out whether ``class_bias`` masks classes, where its values are set: no call needs to read them.

        With ``zero_counts="mask"`` it always may, so that graphs captured before ``update_counts`` stay right.
        """
        bias = self.class_bias
        if bias is not None and bias.is_meta and self.zero_counts != "mask":
            bias = self._initial().get("class_bias")  # what it will hold
        if self.zero_counts == "mask" or bias is None or not is_readable(bias):
            self.masked_classes = True
        else:
            self.masked_classes = bool((bias == -math.inf).any())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "class_bias":  # another tensor than the derived one
            self.masked_classes = True

    def _fill(self, names: Iterable[str]) -> None:
        super()._fill(names)
        self._find_masks()

    def _derived(self, counts: ClassVector, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        prior = ClassPrior(counts, zero_counts=self.zero_counts, device=device, dtype=dtype)
        return {"class_counts": prior.class_counts, **self.derive(prior)}

    def _class_tensor(self, name: str, value: ClassVector) -> Tensor:
        """Return ``value`` as a class tensor; a parameter stays the one that the caller holds."""
        vector = as_class_vector(name, value)
        self._keep_start(name, vector)
        return value if isinstance(value, nn.Parameter) else vector.to(device_of(self._device, value), self._dtype)

    def _scalar(self, name: str, value: Any, check: Callable[[str, Any], float] = check_number) -> float | Tensor:
        """Return a number as a float and a 0-dim tensor as one of the loss; a parameter stays the caller's."""
        if not isinstance(value, Tensor):
            return check(name, value)
        with_values(name, check_floating(name, value, kind="a floating-point dtype"))
        if value.dim() != 0:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a number or a 0-dim tensor")
        check(name, value.item())
        self._keep_start(name, value)
        if isinstance(value, nn.Parameter):
            return value
        if value.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires grad, expected an nn.Parameter, to be learned")
        return value.to(device_of(self._device, value), self._dtype, copy=True)

    def _set(self, name: str, value: float | Tensor) -> None:
        """Hold a learnable tensor as a parameter, any other as a buffer, and a number as it is."""
        if hasattr(self, name):
            delattr(self, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value, persistent=self.persistent)
            for unset in [each for each, held in self._buffers.items() if held is None]:
                self._buffers[unset] = self._buffers.pop(unset)  # torch.export expects them behind the others
        else:
            setattr(self, name, value)

    def _initial(self) -> dict[str, Tensor]:
        given = super()._initial()
        if self.class_counts is None:
            return given
        return {**given, **self._derived(self._kept_start("class_counts"), "cpu", self.class_counts.dtype)}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        """Load; tensors that the checkpoint of another loss lacks stay as they are (see docs/class_counts.md)."""
        loaded = [name for name in self._tensors() if prefix + name in state_dict]
        left_out = self._non_persistent_buffers_set.intersection(loaded)
        missing: list[str] = []
        self._non_persistent_buffers_set.difference_update(left_out)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *args)
        finally:
            self._non_persistent_buffers_set.update(left_out)
        if loaded:  # nothing is missing in the checkpoint of a loss that was built from counts, nor a part of one
            whole = "class_counts" in loaded
            missing_keys += [key for key in missing if whole or key.removeprefix(prefix) in self._parameters]
        if local_metadata.get("assign_to_params_buffers"):  # nothing moves the tensors that are missing later
            given = (state_dict[prefix + name] for name in loaded)
            device = next((value.device for value in given if not value.is_meta), torch.device("cpu"))
            self._apply(lambda held: torch.empty_like(held, device=device) if held.is_meta else held)
        self._find_masks()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(at_least_float32(fn), recurse)
