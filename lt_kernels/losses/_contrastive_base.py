"""What the contrastive recipes share: options, reductions over the rows that count, checked labels."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from .. import _settings
from ..priors import ZeroCounts, as_number
from ._class_tensors import ClassTensorLoss


class ContrastiveOptions(TypedDict, total=False):
    """Keywords of the recipes that join a classifier and a contrastive part; see ``ContrastiveLossBase``."""

    ignore_index: int
    reduction: Literal["none", "mean", "sum"]
    zero_counts: ZeroCounts
    device: torch.device | str | None
    dtype: torch.dtype | None


class ContrastiveLossBase(ClassTensorLoss):
    """A classifier's loss together with [`partitioned_logsumexp`][lt_kernels.functional.partitioned_logsumexp].

    Its recipes take these keywords of [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase], with the
    same meanings: ``ignore_index``, ``reduction``, ``zero_counts``, ``device`` and ``dtype``. Class tensors are
    buffers, at least float32, and ``update_counts`` derives them anew.
    """

    # no weight, margin or label_smoothing: a recipe would have to say what they mean for its contrastive part

    def __init__(
        self,
        *,
        scale: float = 1.0,
        ignore_index: int = -100,
        reduction: Literal["none", "mean", "sum"] = "mean",
        zero_counts: ZeroCounts = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
            zero_counts=zero_counts,
            device=device,
            dtype=dtype,
        )

    @property
    def class_sizes(self) -> dict[str, int]:
        """Refused: only the loss of one classifier joins a head."""
        raise TypeError(
            f"loss: got a {type(self).__name__}, which takes embeddings beside the logits, expected the loss of one "
            "classifier"
        )

    def _reduce(self, rows: Tensor, counted: Tensor) -> Tensor:
        """Reduce ``rows`` [N], 0 where not ``counted``; the mean is over the counted rows, NaN over none."""
        if self.reduction == "none":
            return rows
        if self.reduction == "sum":
            return rows.sum()
        count = counted.sum()
        # 0 / 0 would send NaN to the gradients of rows that are left out
        return torch.where(count > 0, rows.sum() / count.clamp_min(1), math.nan)


def positive(name: str, value: Any) -> float:
    """``value`` as a number > 0."""
    number = as_number(name, value, expected="a number > 0")
    if number <= 0:
        raise ValueError(f"{name}: got {value}, expected a number > 0")
    return number


def at_least_zero(name: str, value: Any) -> float:
    """``value`` as a number >= 0."""
    return as_number(name, value, 0.0, expected="a number >= 0")


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")
    return value


def check_embeddings(name: str, value: Any, shape: str) -> Tensor:
    """``value`` if it is floating and has as many dimensions as ``shape``, such as "[N, D]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor {shape}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
    return value


def check_integers(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """``value`` as int64 if it holds integers in this shape on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor of integers")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected an integer dtype")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected {like.device}")
    return value.to(torch.int64)


def check_classes(
    name: str, value: Any, shape: tuple[int, ...], classes: int, like: Tensor, none: int | None, what: str = "class"
) -> tuple[Tensor, Tensor]:
    """Labels as int64 that index classes safely, 0 where they are none, and which of them are classes (bool).

    IndexError for one that is neither a class nor ``none``: on the CPU and with checks on.
    """
    label = check_integers(name, value, shape, like)
    is_class = (label >= 0) & (label < classes)
    if (label.device.type == "cpu" or _settings.checks) and not torch.compiler.is_compiling():
        bad = (~is_class if none is None else ~is_class & (label != none)).flatten()
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            got = int(label.flatten()[row])
            hint = "" if none is None else f", or {none} for none"
            raise IndexError(f"{name}: row {row} has {what} {got}, expected 0 <= {what} < {classes}{hint}")
    return label.masked_fill(~is_class, 0), is_class


def count_classes(label: Tensor, counted: Tensor, classes: int) -> Tensor:
    """How many of the ``counted`` labels each class has, int64 [classes]; deterministic, and no wait for a GPU."""
    counts = torch.zeros(classes, dtype=torch.int64, device=label.device)
    return counts.scatter_add_(0, label, counted.to(torch.int64))


def last_match(ids: Tensor, among: Tensor) -> Tensor:
    """Where each id [N] last occurs ``among`` others [M]; -1 where it does not, or is negative."""
    if len(among) == 0:
        return torch.full_like(ids, -1)
    ordered, order = among.sort(stable=True)
    at = (torch.searchsorted(ordered, ids, right=True) - 1).clamp_min(0)
    return torch.where((ordered[at] == ids) & (ids >= 0), order[at], -1)
