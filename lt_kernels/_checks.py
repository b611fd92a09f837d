"""Checks of the functional interface: each error names the argument, what was given and what was expected."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import _settings
from .ops._rows.options import RowOptions
from .ops._rows.row_terms import check_classes

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
REDUCTIONS = ("none", "mean", "sum")
MARGIN_TYPES = ("additive", "angular")


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic and of the results."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def logits_layout(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """[N, C, K] of logits [C], [N, C] or [N, C, d1, ..., dk], and the shape of what there is one of per row."""
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
    """Validate the options of the loss of logits of shape ``shape``, on the device of ``input``, and return them as the
    operators take them: class vectors in ``dtype``, no coefficient yet."""
    flat, index_shape = logits_layout(shape)
    classes = flat[1]
    soft = _check_target("target", target, shape, index_shape, input)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("margin_type", margin_type, MARGIN_TYPES)
    label_smoothing = number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1]")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, expected an int")
    weight = class_vector("weight", weight, classes, input, dtype)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight: got a tensor that requires grad, expected one that does not (not differentiable)")
    class_bias = class_vector("class_bias", class_bias, classes, input, dtype)
    class_scale = class_vector("class_scale", class_scale, classes, input, dtype)
    fixed_margin, class_margin = 0.0, None
    if isinstance(margin, Tensor):
        class_margin = class_vector(
            "margin", margin.expand(classes) if margin.dim() == 0 else margin, classes, input, dtype
        )
    elif margin is not None:
        fixed_margin = number("margin", margin)
        if margin_type == "angular" and not 0.0 <= fixed_margin <= math.pi:
            raise ValueError(f"margin: got {fixed_margin}, expected an angle in [0, pi]")
    fixed_scale, learned_scale = 1.0, None
    if isinstance(scale, Tensor):
        learned_scale = scalar_tensor("scale", scale, input).to(dtype)
    else:
        fixed_scale = number("scale", scale)
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


def _check_target(
    name: str, target: Tensor, shape: tuple[int, ...], index_shape: tuple[int, ...], input: Tensor
) -> bool:
    """Whether the target holds class probabilities."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: got {type(target).__name__}, expected a Tensor")
    if target.device != input.device:
        raise ValueError(f"{name}: got device {target.device}, expected {input.device} as input")
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
    """The share of ``target``, 0-dim or shaped like it; None without ``mixed_target``."""
    if (mixed_target is None) != (mix_lambda is None):
        given, missing = ("mix_lambda", "mixed_target") if mixed_target is None else ("mixed_target", "mix_lambda")
        raise ValueError(f"{missing}: got None with {given}, expected both or neither")
    if mixed_target is None or mix_lambda is None:
        return None
    if _check_target("mixed_target", mixed_target, shape, index_shape, input):
        raise TypeError(f"mixed_target: got dtype {mixed_target.dtype}, expected class indices of an integer dtype")
    if not isinstance(mix_lambda, Tensor):
        share = number("mix_lambda", mix_lambda)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"mix_lambda: got {share}, expected a number in [0, 1]")
        return torch.full((), share, dtype=dtype, device=input.device)
    if mix_lambda.device != input.device:
        raise ValueError(f"mix_lambda: got device {mix_lambda.device}, expected {input.device} as input")
    if not mix_lambda.is_floating_point():
        raise TypeError(f"mix_lambda: got dtype {mix_lambda.dtype}, expected a floating dtype")
    if mix_lambda.dim() > 0 and mix_lambda.shape != target.shape:
        raise ValueError(
            f"mix_lambda: got shape {tuple(mix_lambda.shape)}, expected 0-dim or {tuple(target.shape)} as target"
        )
    if mix_lambda.requires_grad:
        raise ValueError("mix_lambda: got a tensor that requires grad, expected one that does not (not differentiable)")
    return mix_lambda.to(dtype)


def check_floating(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {FLOATING}")


def product_dtype(left: Tensor, right: Tensor, name: str, other: str) -> torch.dtype:
    """What matrix products of both run in; ``right`` is the argument ``name``, ``left`` the argument ``other``."""
    kinds = {left.dtype, right.dtype}
    device = left.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in kinds:
        return torch.get_autocast_dtype(device)
    if len(kinds) == 2 and (torch.float32 not in kinds or torch.float64 in kinds):
        raise TypeError(
            f"{name}: got dtype {right.dtype}, expected {left.dtype} as {other}, or float32 beside float16 or bfloat16"
        )
    return min(kinds, key=lambda kind: kind.itemsize)


def class_vector(
    name: str, value: Tensor | None, classes: int, input: Tensor, dtype: torch.dtype, of: str = "class"
) -> Tensor | None:
    """``value`` [classes] in ``dtype``, or [keys] where it is a vector ``of`` another kind."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor of shape [{classes}]")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")
    if value.shape != (classes,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{classes}], one value per {of}")
    if value.device != input.device:
        raise ValueError(f"{name}: got device {value.device}, expected {input.device} as input")
    return value.to(dtype).contiguous()


def scalar_tensor(name: str, value: Tensor, input: Tensor) -> Tensor:
    if value.dim() != 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a number or a 0-dim tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")
    if value.device != input.device:
        raise ValueError(f"{name}: got device {value.device}, expected {input.device} as input")
    return value


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not -math.inf < float(value) < math.inf:  # NaN too; math.isfinite does not trace where the number is symbolic
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return float(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
