"""Mixup and CutMix: one mixed batch, and the two classes and the share that the losses take.

    mixed = mixup(images, target, alpha=0.4)
    loss = criterion(model(mixed.input), *mixed[1:])  # target, mixed_target, mix_lambda

The share and the permutation are drawn on the CPU, so that nothing waits for a GPU and a seed means the same on every
device.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, check_floating, check_integers, check_number, check_shape, check_tensor


class MixedBatch(NamedTuple):
    """A batch of mixtures of two samples each."""

    input: Tensor
    target: Tensor  #: [N], the classes given
    mixed_target: Tensor  #: [N], the classes of the samples mixed in
    mix_lambda: float  #: the share of ``target``


def mixup(x: Tensor, y: Tensor, alpha: float, *, generator: torch.Generator | None = None) -> MixedBatch:
    """Combine pairs of samples convexly.

    Zhang, Cisse, Dauphin, Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018: with one lambda ~
    Beta(alpha, alpha) for the batch and a random permutation,

        input = lambda x + (1 - lambda) x[permutation]

    Args:
        x: [N, ...], floating; it is not changed.
        y: class indices [N].
        alpha: of the Beta distribution; 0 mixes nothing (lambda 1).
        generator: a generator of the CPU; default torch's.

    Returns:
        ``MixedBatch(input, target, mixed_target, mix_lambda)``; ``mix_lambda`` is a Python number.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> mixed = mixup(x, y, 0.4, generator=torch.Generator().manual_seed(0))
        >>> mixed.input.shape, mixed.mixed_target.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4]))
    """
    _check(x, y)
    check_floating("x", x, kind="a floating-point dtype")
    share, order = _draw(x, alpha, generator)
    return MixedBatch(torch.lerp(x[order], x, share), y, y[order], share)


def cutmix(x: Tensor, y: Tensor, alpha: float, *, generator: torch.Generator | None = None) -> MixedBatch:
    """Paste a rectangle from another image into each image.

    Yun, Han, Oh, Chun, Choe, Yoo, *CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features*, ICCV 2019: with one lambda ~ Beta(alpha, alpha) for the batch and a random permutation, a rectangle with
    the share 1 - lambda of the image, centred anywhere and cut off at the border, comes from ``x[permutation]``.
    ``mix_lambda`` is the exact share of the pixels that stay.

    Args:
        x: images [N, channels, H, W] of any dtype; they are not changed.
        y: class indices [N].
        alpha: of the Beta distribution; 0 mixes nothing (lambda 1).
        generator: a generator of the CPU; default torch's.

    Returns:
        ``MixedBatch(input, target, mixed_target, mix_lambda)``; ``mix_lambda`` is a Python number.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> mixed = cutmix(x, y, 1.0, generator=torch.Generator().manual_seed(0))
        >>> stays = (mixed.input == x).all(1).double().mean((1, 2))
        >>> bool((stays >= mixed.mix_lambda).all())
        True
    """
    _check(x, y)
    if x.dim() != 4 or 0 in x.shape[2:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected images [N, channels, H, W]")
    share, order = _draw(x, alpha, generator)
    height, width = x.shape[2:]
    side = math.sqrt(1.0 - share)
    (top, bottom), (left, right) = (_span(size, int(size * side), generator) for size in (height, width))
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
    stays = 1.0 - (bottom - top) * (right - left) / (height * width)
    return MixedBatch(mixed, y, y[order], stays)


def _check(x: Tensor, y: Tensor) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: got shape (), expected [N, ...]")
    check_integers("y", y, "a Tensor", "class indices of an integer dtype")
    check_shape("y", y, x.shape[:1], ", one class for each sample of x")
    check_device("y", y, x, " as x")


def _draw(x: Tensor, alpha: float, generator: torch.Generator | None) -> tuple[float, Tensor]:
    """Draw lambda, and the order of the samples that are mixed in, on x's device."""
    alpha = check_number("alpha", alpha, 0.0, expected="a number >= 0")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator or None")
        if generator.device.type != "cpu":
            raise ValueError(f"generator: got device {generator.device}, expected a generator of the CPU")
    # torch draws a Beta only from its global generator; its numbers seed one of Python's that can
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    share = random.Random(seed).betavariate(alpha, alpha) if alpha > 0 else 1.0
    return share, torch.randperm(len(x), generator=generator).to(x.device, non_blocking=True)


def _span(size: int, length: int, generator: torch.Generator | None) -> tuple[int, int]:
    """Draw a stretch of ``length`` with its centre anywhere in [0, size), cut off at both ends."""
    start = int(torch.randint(size, (), generator=generator)) - length // 2
    return max(start, 0), min(start + length, size)
