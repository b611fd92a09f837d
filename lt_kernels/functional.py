"""Stateless losses in the manner of ``torch.nn.functional``: validate, run one registered op, reduce."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _settings
from .ops._backend import resolve
from .ops.margin_cross_entropy.arguments import Arguments
from .ops.margin_cross_entropy.op import OP, forward, mean_coefficient

__all__ = ["MarginCrossEntropyOutput", "margin_cross_entropy"]

_LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDEX_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
_REDUCTIONS = ("none", "mean", "sum")
_MARGIN_TYPES = ("additive", "angular")


class MarginCrossEntropyOutput(NamedTuple):
    """What ``margin_cross_entropy`` returns when more than the loss is asked for; fields not asked for are None."""

    loss: Tensor
    lse: Tensor | None = None
    prediction: Tensor | None = None


def margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    class_bias: Tensor | None = None,
    class_scale: Tensor | None = None,
    margin: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
    margin_type: Literal["additive", "angular"] = "additive",
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
    mixed_target: Tensor | None = None,
    mix_lambda: float | Tensor | None = None,
    return_lse: bool = False,
    return_prediction: bool = False,
) -> Any:
    """Softmax cross-entropy of shifted, scaled logits with a margin on the target, in one pass over the logits.

    With every option at its default this equals ``torch.nn.functional.cross_entropy`` for each input that one takes. In
    general, for a row of logits x with target y,

        u_j  = scale * class_scale_j * x_j + class_bias_j                        every class j
        v_y  = scale * phi(class_scale_y * x_y, margin_y) + class_bias_y         the target
        loss = log[ exp(v_y) + sum over j != y of exp(u_j) ] - v_y

    with phi(c, m) = c - m (additive) or cos(arccos(c) + m) (angular; c - m sin(m) once arccos(c) > pi - m; Deng et al.
    2019). ``weight`` and ``label_smoothing`` act on these shifted logits as they do in ``F.cross_entropy``.

    Args:
        input: logits, ``[C]``, ``[N, C]`` or ``[N, C, d1, ..., dk]``; float16, bfloat16, float32 or float64; any
            strides. They are read in their own dtype; arithmetic and results are float32 (float64 for float64).
        target: class indices ``[]``, ``[N]`` or ``[N, d1, ..., dk]`` of any integer dtype, or class probabilities
            shaped like ``input`` in any floating dtype.
        weight: ``[C]``, class weights as in ``F.cross_entropy``; not differentiable.
        class_bias: ``[C]``, added to the logits of each class, e.g. a log prior (natural logarithm).
        class_scale: ``[C]``, multiplies the logits of each class.
        margin: a number or ``[C]`` (or 0-dim) tensor: the target class's margin, in the units of
            ``class_scale * input`` (additive) or in radians within [0, pi] (angular; values of a tensor are checked
            only with checks on). Needs class-index targets.
        scale: a number or 0-dim tensor: multiplies all logits (the inverse temperature of a cosine head).
        margin_type: ``"additive"`` (CosFace, LDAM) or ``"angular"`` (ArcFace; ``class_scale * input`` are cosines).
        ignore_index: rows with this target contribute nothing. Class-index targets only.
        reduction: ``"none"``, ``"mean"`` (class indices: over the total weight of the targets that are not ignored;
            probabilities: over rows) or ``"sum"``.
        label_smoothing: in [0, 1].
        mixed_target: a second target like ``target`` (class indices): mixup or CutMix pairs in the same pass. The loss
            is ``mix_lambda * loss(target) + (1 - mix_lambda) * loss(mixed_target)``, each with its own mean.
        mix_lambda: a number in [0, 1], or a 0-dim tensor, or a tensor shaped like ``target`` (whose values are checked
            only with checks on): the share of ``target``.
        return_lse: also return the log-sum-exp of each row's shifted logits (those of ``target`` where there are two;
            of the plain shifted logits where the row is ignored), float32, shaped like a class-index target.
            Differentiable.
        return_prediction: also return the argmax of the raw ``input`` per row, int64, from the same read.

    Returns:
        The loss (0-dim, or shaped like a class-index target for ``reduction="none"``), or a
        ``MarginCrossEntropyOutput`` if ``return_lse`` or ``return_prediction``.

    Gradients flow to ``input``, ``class_bias``, ``class_scale``, ``margin``, ``scale`` and probability targets. The
    derivative of the angular margin is the exact one, with sin(theta) kept above 3e-4.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        IndexError: a class index out of range, on the CPU or with ``set_checks(True)``, naming the row in the flattened
            target; on a GPU without checks that row's loss and gradient are NaN.
        NotImplementedError: forward-mode differentiation and ``torch.func`` transforms, and second derivatives.
        BackendUnavailableError: a backend asked for by name cannot run the call.

    Example:
        >>> logits = torch.randn(4, 8142, requires_grad=True)
        >>> target = torch.tensor([3, 14, 15, 92])
        >>> log_prior = torch.full((8142,), 1 / 8142).log()
        >>> margin_cross_entropy(logits, target, class_bias=log_prior).backward()
    """
    classes = _check_logits(input)
    soft = _check_target("target", target, input)
    compute_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    _check_choice("reduction", reduction, _REDUCTIONS)
    _check_choice("margin_type", margin_type, _MARGIN_TYPES)
    label_smoothing = _number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1]")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, expected an int")
    weight = _class_vector("weight", weight, classes, input, compute_dtype)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight: got a tensor that requires grad, expected one that does not (not differentiable)")
    class_bias = _class_vector("class_bias", class_bias, classes, input, compute_dtype)
    class_scale = _class_vector("class_scale", class_scale, classes, input, compute_dtype)
    fixed_margin, class_margin = 0.0, None
    if isinstance(margin, Tensor):
        class_margin = _class_vector(
            "margin", margin.expand(classes) if margin.dim() == 0 else margin, classes, input, compute_dtype
        )
    elif margin is not None:
        fixed_margin = _number("margin", margin)
        if margin_type == "angular" and not 0.0 <= fixed_margin <= math.pi:
            raise ValueError(f"margin: got {fixed_margin}, expected an angle in [0, pi]")
    fixed_scale, learned_scale = 1.0, None
    if isinstance(scale, Tensor):
        learned_scale = _scalar_tensor("scale", scale, input).to(compute_dtype)
    else:
        fixed_scale = _number("scale", scale)
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
    share = _check_mixture(mixed_target, mix_lambda, target, input, compute_dtype)
    checks = _settings.checks and not torch.compiler.is_compiling()  # they read values: traced code does without
    if checks and margin_type == "angular" and class_margin is not None:
        if not bool(((class_margin >= 0) & (class_margin <= math.pi)).all()):
            raise ValueError("margin: got values outside [0, pi], expected angles")
    if checks and isinstance(mix_lambda, Tensor) and not bool(((mix_lambda >= 0) & (mix_lambda <= 1)).all()):
        raise ValueError("mix_lambda: got values outside [0, 1], expected a share")
    if checks and not soft:
        _check_values(target, ignore_index, classes, "target")
        if mixed_target is not None:
            _check_values(mixed_target, ignore_index, classes, "mixed_target")

    backend = resolve(OP, input)
    logits, row_shape = _rows(input)
    index_shape = (logits.shape[0], logits.shape[2])
    if soft:
        target = target.reshape(logits.shape)
    else:
        target = target.to(torch.int64).reshape(index_shape)
        if mixed_target is not None:
            mixed_target = mixed_target.to(torch.int64).reshape(index_shape)
        if share is not None and share.dim() > 0:
            share = share.reshape(index_shape)
    coefficient = None
    if reduction == "mean" and soft:
        share_of_row = 1 / max(1, math.prod(index_shape))
        coefficient = torch.full((1,), share_of_row, dtype=compute_dtype, device=input.device)
    elif reduction == "mean":
        coefficient = mean_coefficient(target, mixed_target, weight, ignore_index, classes, compute_dtype, backend)

    needs_other = any(
        t is not None and t.requires_grad for t in (class_bias, class_scale, class_margin, learned_scale, target)
    )
    reduce = reduction != "none"
    one_pass = (
        torch.is_grad_enabled()
        and input.requires_grad
        and reduce
        and not needs_other
        and not return_lse
        and not torch.compiler.is_compiling()
        and _settings.gradient_policy != "recompute"
        and (input.dtype != torch.float16 or _settings.gradient_policy == "one_pass")
    )
    arguments = Arguments(
        logits,
        target,
        mixed_target,
        share,
        weight,
        class_bias,
        class_scale,
        class_margin,
        learned_scale,
        coefficient,
        fixed_scale,
        fixed_margin,
        margin_type == "angular",
        ignore_index,
        label_smoothing,
    )
    loss, lse, prediction, _, _ = forward(*arguments, reduce, return_prediction, one_pass, backend)
    if not reduce:
        loss = loss.reshape(row_shape)
    elif reduction == "mean" and math.prod(index_shape) == 0:
        loss = loss * math.nan  # the mean of no rows, as torch has it
    if not (return_lse or return_prediction):
        return loss
    return MarginCrossEntropyOutput(
        loss,
        lse.reshape(row_shape) if return_lse else None,
        prediction.reshape(row_shape) if return_prediction else None,
    )


def _rows(input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Logits as [N, C, K] without a copy where strides allow, and the shape of per-row results."""
    if input.dim() == 1:
        return input[None, :, None], ()
    if input.dim() == 2:
        return input[:, :, None], (input.shape[0],)
    positions = input.shape[2:]
    return input.reshape(input.shape[0], input.shape[1], math.prod(positions)), (input.shape[0], *positions)


def _check_logits(input: Tensor) -> int:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: got {type(input).__name__}, expected a Tensor")
    if input.dtype not in _LOGIT_DTYPES:
        raise TypeError(f"input: got dtype {input.dtype}, expected one of {_LOGIT_DTYPES}")
    if input.dim() == 0:
        raise ValueError("input: got a 0-dim tensor, expected [C], [N, C] or [N, C, d1, ..., dk]")
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if classes == 0:
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected at least one class")
    return classes


def _check_target(name: str, target: Tensor, input: Tensor) -> bool:
    """Whether the target holds class probabilities."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: got {type(target).__name__}, expected a Tensor")
    if target.device != input.device:
        raise ValueError(f"{name}: got device {target.device}, expected {input.device} as input")
    index_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.dtype in _LOGIT_DTYPES:
        if target.shape != input.shape:
            raise ValueError(
                f"{name}: got class probabilities (dtype {target.dtype}) of shape {tuple(target.shape)}, "
                f"expected {tuple(input.shape)} as input, or class indices of shape {tuple(index_shape)}"
            )
        return True
    if target.dtype not in _INDEX_DTYPES:
        raise TypeError(
            f"{name}: got dtype {target.dtype}, expected an integer dtype, or a floating one for probabilities"
        )
    if target.shape != index_shape:
        raise ValueError(
            f"{name}: got class indices of shape {tuple(target.shape)}, expected {tuple(index_shape)} "
            f"for input of shape {tuple(input.shape)}"
        )
    return False


def _check_mixture(
    mixed_target: Tensor | None, mix_lambda: float | Tensor | None, target: Tensor, input: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The share of ``target``, 0-dim or shaped like it; None without ``mixed_target``."""
    if (mixed_target is None) != (mix_lambda is None):
        given, missing = ("mix_lambda", "mixed_target") if mixed_target is None else ("mixed_target", "mix_lambda")
        raise ValueError(f"{missing}: got None with {given}, expected both or neither")
    if mixed_target is None or mix_lambda is None:
        return None
    if _check_target("mixed_target", mixed_target, input):
        raise TypeError(f"mixed_target: got dtype {mixed_target.dtype}, expected class indices of an integer dtype")
    if not isinstance(mix_lambda, Tensor):
        share = _number("mix_lambda", mix_lambda)
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


def _check_values(target: Tensor, ignore_index: int, classes: int, name: str) -> None:
    target = target.to(torch.int64)
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise IndexError(
            f"{name}: row {row} has class {int(target.flatten()[row])}, "
            f"expected 0 <= class < {classes} or ignore_index={ignore_index}"
        )


def _class_vector(name: str, value: Tensor | None, classes: int, input: Tensor, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor of shape [{classes}]")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")
    if value.shape != (classes,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{classes}], one value per class")
    if value.device != input.device:
        raise ValueError(f"{name}: got device {value.device}, expected {input.device} as input")
    return value.to(dtype).contiguous()


def _scalar_tensor(name: str, value: Tensor, input: Tensor) -> Tensor:
    if value.dim() != 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected a number or a 0-dim tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")
    if value.device != input.device:
        raise ValueError(f"{name}: got device {value.device}, expected {input.device} as input")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not -math.inf < float(value) < math.inf:  # NaN too; math.isfinite does not trace where the number is symbolic
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return float(value)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
