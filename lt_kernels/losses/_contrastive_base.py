"""What the contrastive recipes share: checked labels, reductions over the rows that count, options, pixels by class."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from .. import _settings
from ..priors import ZeroCounts, as_number
from ._base import MarginCrossEntropyBase


class ContrastiveOptions(TypedDict, total=False):
    """Keywords of the recipes that join a classifier and a contrastive part; see ``ContrastiveLossBase``."""

    ignore_index: int
    reduction: Literal["none", "mean", "sum"]
    zero_counts: ZeroCounts
    device: torch.device | str | None
    dtype: torch.dtype | None


class ContrastiveLossBase(MarginCrossEntropyBase):
    """A module over [`partitioned_logsumexp`][lt_kernels.functional.partitioned_logsumexp] beside a classifier's loss.

    Its recipes take these keywords of [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase], with its
    meanings: ``ignore_index``, ``reduction``, ``zero_counts``, ``device`` and ``dtype``. Class tensors are buffers,
    float32 at least, and ``update_counts`` derives them anew.
    """

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
        # no weight, margin or label_smoothing: a recipe would have to say what they mean for its contrastive part
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
        """Refused: what asks joins the loss to one classifier."""
        raise TypeError(
            f"loss: got a {type(self).__name__}, which takes embeddings beside the logits, expected the loss of one "
            "classifier"
        )

    def _reduced(self, rows: Tensor, counted: Tensor) -> Tensor:
        """``rows`` [N], 0 where not ``counted``, reduced; the mean is over the rows that are counted."""
        if self.reduction == "none":
            return rows
        return rows.sum() / counted.sum().clamp_min(1) if self.reduction == "mean" else rows.sum()


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


class PixelSample(NamedTuple):
    """Pixels drawn by ``sample_pixels``; R = num_classes * per_class rows, class by class."""

    features: Tensor  #: [R, D]; 0 in the rows of no pixel
    labels: Tensor  #: int64 [R]; -1 in the rows of no pixel
    position: Tensor  #: int64 [R]: where in [N, H, W], flattened; -1 in the rows of no pixel

    def take(self, values: Tensor) -> Tensor:
        """What ``values``, integers [N, H, W], has at the pixels: [R], -1 in the rows of no pixel."""
        return values.flatten()[self.position.clamp_min(0)].masked_fill(self.position < 0, -1)


def sample_pixels(
    features: Tensor,
    target: Tensor,
    per_class: int,
    ignore_index: int = -100,
    *,
    num_classes: int,
    generator: torch.Generator | None = None,
) -> PixelSample:
    """Draw pixels of every class, for the contrastive part of a segmentation loss.

    Of each class up to ``per_class`` pixels of the batch are drawn at random, without replacement; a class with fewer
    gives all it has. The result has ``num_classes * per_class`` rows whatever the batch holds, so that nothing waits
    for a GPU; rows of no pixel have label -1, which the losses and queues of this package leave out.

    Args:
        features: [N, D, H, W], floating; gradients flow to the pixels drawn.
        target: classes, [N, H, W] or of another height and width (then the nearest pixel's class counts), any integer
            dtype.
        per_class: how many of each class at most.
        ignore_index: pixels of this class are not drawn.
        num_classes: C.
        generator: draws the order; on the device of ``features``.

    Returns:
        ``PixelSample(features [R, D], labels [R], position [R])``; ``take`` reads other maps at the same pixels.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; the message names it.
        IndexError: a class out of range, on the CPU or with checks on; on a GPU without checks it is not drawn.

    Example:
        >>> target = torch.tensor([[[0, 0], [0, 2]]])
        >>> sample = sample_pixels(torch.randn(1, 8, 2, 2), target, per_class=2, num_classes=3)
        >>> sample.labels
        tensor([ 0,  0, -1, -1,  2, -1])
    """
    check_embeddings("features", features, "[N, D, H, W]")
    for name, value in (("per_class", per_class), ("num_classes", num_classes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected an int >= 1")
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected a Tensor of integers")
    images, _, height, width = features.shape
    if target.dim() != 3 or target.shape[0] != images:
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected ({images}, {height}, {width})")
    _, is_class = check_classes("target", target, tuple(target.shape), num_classes, features, ignore_index)
    label = target.to(torch.int64)
    label = label.masked_fill(~is_class | (label == ignore_index), num_classes)
    if target.shape[1:] != (height, width) and target.numel() > 0:
        down = torch.arange(height, device=target.device) * target.shape[1] // height
        across = torch.arange(width, device=target.device) * target.shape[2] // width
        label = label[:, down][:, :, across]
    label = label.flatten()
    pixels, rows = len(label), num_classes * per_class
    shuffled = torch.rand(pixels, generator=generator, device=label.device).argsort()
    by_class = label[shuffled].argsort(stable=True)
    ordered = label[shuffled][by_class]
    counts = count_classes(label, torch.ones_like(label), num_classes + 1)
    rank = torch.arange(pixels, device=label.device) - (counts.cumsum(0) - counts)[ordered]
    row = torch.where((ordered < num_classes) & (rank < per_class), ordered * per_class + rank, rows)
    index = torch.full((rows + 1,), -1, device=label.device).scatter_(0, row, shuffled[by_class])[:-1]
    labels = torch.arange(rows, device=label.device) // per_class
    labels = labels.masked_fill(index < 0, -1)
    if pixels == 0:
        return PixelSample(features.new_zeros(rows, features.shape[1]), labels, index)
    at = index.clamp_min(0)
    size = height * width
    drawn = features.flatten(2)[at // size, :, at % size]
    return PixelSample(torch.where((index >= 0)[:, None], drawn, 0.0), labels, index)
