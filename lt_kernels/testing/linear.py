"""The oracle, sample inputs and check of ``linear_margin_cross_entropy``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import Draw, Sample, check_margin_cross_entropy, dense_margin_cross_entropy, sample_inputs


def dense_linear_margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    **options: Any,
) -> Tensor:
    """Compute ``linear_margin_cross_entropy`` with ``F.linear`` (and ``F.normalize``) and all logits in memory."""
    shape = linear_weight.shape
    if normalize:
        input, linear_weight = F.normalize(input, dim=-1), F.normalize(linear_weight, dim=-1)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.reshape(-1, shape[-1]), bias)
    return dense_margin_cross_entropy(logits.reshape(*input.shape[:-1], *shape[:-1]), target, **options)


def linear_sample_inputs(
    rows: int,
    width: int,
    classes: int,
    positions: tuple[int, ...] = (),
    *,
    bias: bool = True,
    normalize: bool = False,
    requires_grad: Iterable[str] = ("input", "linear_weight", "linear_bias"),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    spread: float = 3.0,
    seed: int = 0,
    **keywords: Any,
) -> Sample:
    """Draw inputs for ``linear_margin_cross_entropy``: features ``[rows, width]``.

    ``linear_weight`` and ``linear_bias`` (None with ``normalize``) are among the sample's options; ``keywords`` go to
    ``sample_inputs``.
    """
    requires = tuple(requires_grad)
    sample = sample_inputs(
        rows, classes, positions, dtype=torch.float64, requires_grad=requires, spread=spread, seed=seed, **keywords
    )
    normal = Draw(seed + 1).normal
    drawn = {
        "linear_weight": normal(classes, *positions, width) * (spread / width**0.5),
        "linear_bias": normal(classes, *positions) if bias and not normalize else None,
    }
    options = {**drawn, "normalize": normalize, **sample.options}
    sample = Sample(normal(rows, width).requires_grad_("input" in requires), sample.target, options)
    for name, value in drawn.items():
        if value is not None:
            value.requires_grad_(name in requires)
    return sample.converted(dtype, device)


def check_linear_margin_cross_entropy(
    function: Callable[..., Tensor], sample: Sample, *, dense: Callable[..., Tensor] | None = None, **budget: Any
) -> None:
    """Hold ``function(input, linear_weight, target, **options)`` to the error budget."""

    def in_order(input: Tensor, target: Tensor, linear_weight: Tensor, **options: Any) -> Tensor:
        return function(input, linear_weight, target, **options)

    check_margin_cross_entropy(in_order, sample, dense=dense or dense_linear_margin_cross_entropy, **budget)
