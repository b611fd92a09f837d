"""Pixels as rows of a contrastive loss, drawn by class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_embeddings, check_int, check_tensor
from ._contrastive_base import check_labels, count_classes


class PixelSample(NamedTuple):
    """Pixels drawn by ``sample_pixels``; R = num_classes * per_class rows, class by class."""

    features: Tensor  #: [R, D]; 0 in the rows of no pixel
    labels: Tensor  #: int64 [R]; -1 in the rows of no pixel
    position: Tensor  #: int64 [R]: where in [N, H, W], flattened; -1 in the rows of no pixel

    def take(self, values: Tensor) -> Tensor:
        """Return ``values``, integers [N, H, W], at the pixels: [R], -1 in the rows of no pixel."""
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

    Up to ``per_class`` pixels of each class in the batch are drawn at random, without replacement; a class with fewer
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
    check_int("per_class", per_class, 1)
    check_int("num_classes", num_classes, 1)
    check_int("ignore_index", ignore_index)
    check_tensor("target", target, "a Tensor of integers")
    images, _, height, width = features.shape
    if target.dim() != 3 or target.shape[0] != images:
        raise ValueError(f"target: got shape {tuple(target.shape)}, expected ({images}, {height}, {width})")
    _, label, is_class = check_labels("target", target, tuple(target.shape), num_classes, features, ignore_index)
    label = label.masked_fill(~is_class, num_classes)
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
