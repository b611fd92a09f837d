"""The options that every cross-entropy shares: validated, and as the operators take them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _settings
from .._checks import (
    FLOATING,
    INDEX_DTYPES,
    check_choice,
    check_class_vector,
    check_classes,
    check_device,
    check_int,
    check_number,
    check_scalar,
    check_tensor,
)
from ..ops._rows.options import RowOptions

REDUCTIONS = ("none", "mean", "sum")
MARGIN_TYPES = ("additive", "angular")


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic and of the results."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def logits_layout(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """Return [N, C, K] of logits [C], [N, C] or [N, C, d1, ..., dk], and the shape of their class indices."""
    if len(shape) == 1:
        return (1, shape[0], 1), ()
    return (shape[0], shape[1], math.prod(shape[2:])), (shape[0], *shape[2:])


def row_options(
    shape: tuple[int, ...],
    input: Tensor,
    dtype: torch.dtype,
    target: Tensor,
    weight: Tensor | None,
    *,
    class_bias: Tensor | None,
    class_scale: Tensor | None,
    margin: float | Tensor | None,
    scale: float | Tensor,
    margin_type: str,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    mixed_target: Tensor | None,
    mix_lambda: float | Tensor | None,
) -> RowOptions:
    """Validate the options of a loss of logits, and return them as the operators take them.

    The logits have the shape ``shape`` and the device of ``input``. Class vectors are converted to ``dtype``; the
    coefficient is still None.
    """
    flat, index_shape = logits_layout(shape)
    classes = flat[1]
    soft = _check_target("target", target, shape, index_shape, input)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("margin_type", margin_type, MARGIN_TYPES)
    label_smoothing = _check_share("label_smoothing", label_smoothing)
    check_int("ignore_index", ignore_index)
    weight = check_class_vector("weight", weight, classes, input, dtype)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight: got a tensor that requires grad, expected one that does not (not differentiable)")
    class_bias = check_class_vector("class_bias", class_bias, classes, input, dtype)
    class_scale = check_class_vector("class_scale", class_scale, classes, input, dtype)
    fixed_margin, class_margin = 0.0, None
    if isinstance(margin, Tensor):
        class_margin = check_class_vector(
            "margin", margin.expand(classes) if margin.dim() == 0 else margin, classes, input, dtype
        )
    elif margin is not None:
        fixed_margin = check_number("margin", margin)
        if margin_type == "angular":
            check_number("margin", fixed_margin, 0.0, math.pi, expected="an angle in [0, pi]")
    fixed_scale, learned_scale = 1.0, None
    if isinstance(scale, Tensor):
        learned_scale = check_scalar("scale", scale, input).to(dtype)
    else:
        fixed_scale = check_number("scale", scale)
    if soft and margin is not None:
        raise ValueError(
            "margin: got a margin with class-probability targets, expected class indices (a margin acts on one class)"
        )
    if soft and ignore_index >= 0:
        raise ValueError(f"ignore_index: got {ignore_index} with class-probability targets, expected class indices")
    if soft and mixed_target is not None:
        raise ValueError(
            "mixed_target: got class-probability targets, expected class indices (mix the probabilities instead)"
        )
    share = _check_mixture(mixed_target, mix_lambda, target, shape, index_shape, input, dtype)
    checks = _settings.checks and not torch.compiler.is_compiling()  # they read values: traced code does without
    if checks and margin_type == "angular" and class_margin is not None:
        if not bool(((class_margin >= 0) & (class_margin <= math.pi)).all()):
            raise ValueError("margin: got values outside [0, pi], expected angles")
    if checks and isinstance(mix_lambda, Tensor) and not bool(((mix_lambda >= 0) & (mix_lambda <= 1)).all()):
        raise ValueError("mix_lambda: got values outside [0, 1], expected a share")
    if checks and not soft:
        check_classes("target", target, classes, ignore_index)
        if mixed_target is not None:
            check_classes("mixed_target", mixed_target, classes, ignore_index)
    rows = (flat[0], flat[2])
    if soft:
        target = target.reshape(flat)
    else:
        target = target.to(torch.int64).reshape(rows)
        if mixed_target is not None:
            mixed_target = mixed_target.to(torch.int64).reshape(rows)
        if share is not None and share.dim() > 0:
            share = share.reshape(rows)
    return RowOptions(
        target=target,
        mixed_target=mixed_target,
        mix_lambda=share,
        weight=weight,
        class_bias=class_bias,
        class_scale=class_scale,
        class_margin=class_margin,
        learned_scale=learned_scale,
        coefficient=None,
        scale=fixed_scale,
        margin=fixed_margin,
        angular=margin_type == "angular",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def _check_share(name: str, value: float) -> float:
    """Return a number in [0, 1]; one that is not finite has a message of its own."""
    return check_number(name, check_number(name, value), 0.0, 1.0)


def _check_target(
    name: str, target: Tensor, shape: tuple[int, ...], index_shape: tuple[int, ...], input: Tensor
) -> bool:
    """Check the target and return whether it holds class probabilities."""
    check_tensor(name, target)
    check_device(name, target, input, " as input")
    if target.dtype in FLOATING:
        if tuple(target.shape) != shape:
            raise ValueError(
                f"{name}: got class probabilities (dtype {target.dtype}) of shape {tuple(target.shape)}, "
                f"expected {shape} as the logits, or class indices of shape {index_shape}"
            )
        return True
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"{name}: got dtype {target.dtype}, expected an integer dtype, or a floating one for probabilities"
        )
    if tuple(target.shape) != index_shape:
        raise ValueError(
            f"{name}: got class indices of shape {tuple(target.shape)}, expected {index_shape} "
            f"for logits of shape {shape}"
        )
    return False


def _check_mixture(
    mixed_target: Tensor | None,
    mix_lambda: float | Tensor | None,
    target: Tensor,
    shape: tuple[int, ...],
    index_shape: tuple[int, ...],
    input: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the share of ``target``, 0-dim or shaped like it; None without ``mixed_target``."""
    if (mixed_target is None) != (mix_lambda is None):
        given, missing = ("mix_lambda", "mixed_target") if mixed_target is None else ("mixed_target", "mix_lambda")
        raise ValueError(f"{missing}: got None with {given}, expected both or neither")
    if mixed_target is None or mix_lambda is None:
        return None
    if _check_target("mixed_target", mixed_target, shape, index_shape, input):
        raise TypeError(f"mixed_target: got dtype {mixed_target.dtype}, expected class indices of an integer dtype")
    if not isinstance(mix_lambda, Tensor):
        share = _check_share("mix_lambda", mix_lambda)
        return torch.full((), share, dtype=dtype, device=input.device)
    check_device("mix_lambda", mix_lambda, input, " as input")
    if not mix_lambda.is_floating_point():
        raise TypeError(f"mix_lambda: got dtype {mix_lambda.dtype}, expected a floating dtype")
    if mix_lambda.dim() > 0 and mix_lambda.shape != target.shape:
        raise ValueError(
            f"mix_lambda: got shape {tuple(mix_lambda.shape)}, expected 0-dim or {tuple(target.shape)} as target"
        )
    if mix_lambda.requires_grad:
        raise ValueError("mix_lambda: got a tensor that requires grad, expected one that does not (not differentiable)")
    return mix_lambda.to(dtype)
