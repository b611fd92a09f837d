"""The margin-shifted softmax cross-entropy of logits in memory, and what its other forms share with it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _settings
from .._checks import (
    FLOATING,
    INDEX_DTYPES,
    as_int64,
    check_all,
    check_both,
    check_choice,
    check_class_vector,
    check_classes,
    check_classes_last,
    check_device,
    check_factor,
    check_flag,
    check_floating,
    check_int,
    check_number,
    check_scalar,
    check_tensor,
    checks_on,
    compute_dtype,
    filled,
    has_no_values,
    operand,
    reads_values,
)
from ..ops._backend import plain_call, resolve
from ..ops._rows.options import RowOptions
from ..ops.margin_cross_entropy.arguments import SIGNATURE, Arguments
from ..ops.margin_cross_entropy.op import OP, forward, mean_coefficient

REDUCTIONS = ("none", "mean", "sum")
MARGIN_TYPES = ("additive", "angular")
EMPTY_MEANS = ("nan", "zero")


class MarginCrossEntropyOutput(NamedTuple):
    """What a loss returns when more than it is asked for; fields not asked for are None."""

    loss: Tensor
    lse: Tensor | None = None
    prediction: Tensor | None = None


class RowKeywords(TypedDict, total=False):
    """The options that every cross-entropy shares, for type checkers."""

    class_bias: Tensor | None
    class_scale: Tensor | None
    margin: float | Tensor | None
    scale: float | Tensor
    margin_type: Literal["additive", "angular"]
    reduction: Literal["none", "mean", "sum"]
    empty_mean: Literal["nan", "zero"]
    label_smoothing: float
    masked_classes: bool
    mixed_target: Tensor | None
    mix_lambda: float | Tensor | None


class MarginKeywords(RowKeywords, total=False):
    """The options of ``margin_cross_entropy``, for type checkers."""

    ignore_index: int


@overload
def margin_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *,
    return_lse: Literal[False] = False, return_prediction: Literal[False] = False, **options: Unpack[MarginKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def margin_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *,
    return_lse: Literal[True], return_prediction: bool = False, **options: Unpack[MarginKeywords],
) -> MarginCrossEntropyOutput: ...  # fmt: skip
@overload
def margin_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *,
    return_lse: bool = False, return_prediction: Literal[True], **options: Unpack[MarginKeywords],
) -> MarginCrossEntropyOutput: ...  # fmt: skip
@overload
def margin_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *,
    return_lse: bool = False, return_prediction: bool = False, **options: Unpack[MarginKeywords],
) -> Tensor | MarginCrossEntropyOutput: ...  # fmt: skip
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
    empty_mean: Literal["nan", "zero"] = "nan",
    label_smoothing: float = 0.0,
    masked_classes: bool = True,
    mixed_target: Tensor | None = None,
    mix_lambda: float | Tensor | None = None,
    return_lse: bool = False,
    return_prediction: bool = False,
) -> Tensor | MarginCrossEntropyOutput:
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
        class_bias: ``[C]``, added to the logits of each class, e.g. a log prior (natural logarithm). A class whose bias
            is -inf is masked: it takes no part in the softmax, in ``label_smoothing``, which spreads over the others
            alone, or in the probabilities, whose share of it is left out. A class index of it has an infinite loss.
            With checks on, targets of a masked class, and probability on one, are errors.
        class_scale: ``[C]``, multiplies the logits of each class.
        margin: a number or ``[C]`` (or 0-dim) tensor: the target class's margin, in the units of
            ``class_scale * input`` (additive) or in radians within [0, pi] (angular; values of a tensor are checked
            only with checks on). Needs class-index targets.
        scale: a number or 0-dim tensor: multiplies all logits (the inverse temperature of a cosine head).
        margin_type: ``"additive"`` (CosFace, LDAM) or ``"angular"`` (ArcFace; ``class_scale * input`` are cosines).
        ignore_index: rows with this target contribute nothing. Class-index targets only.
        reduction: ``"none"``, ``"mean"`` (class indices: over the total weight of the targets that are not ignored;
            probabilities: over rows) or ``"sum"``.
        empty_mean: the mean over no weight at all (every target ignored, or no rows): ``"nan"``, as in torch, or
            ``"zero"``, so that a task without targets adds nothing to a sum of losses. The gradient is 0 either way.
        label_smoothing: in [0, 1].
        masked_classes: whether ``class_bias`` may mask classes, which ``label_smoothing`` and probabilities then leave
            out. False is a promise that it is finite: it spares them a vector ``[C]``, which is otherwise made in each
            call and read beside the bias (on a GPU always, on the CPU if a class is masked). A broken promise makes
            losses infinite or NaN; with checks on, it is an error.
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
        NotImplementedError: forward-mode differentiation, ``torch.func`` transforms and second derivatives, except on
            the reference backend.
        BackendUnavailableError: a backend asked for by name cannot run the call.

    Example:
        >>> logits = torch.randn(4, 8142, requires_grad=True)
        >>> target = torch.tensor([3, 14, 15, 92])
        >>> log_prior = torch.full((8142,), 1 / 8142).log()
        >>> margin_cross_entropy(logits, target, class_bias=log_prior).backward()
    """
    if return_lse is False and return_prediction is False and not checks_on():
        plain = plain_call(
            OP, input, target, weight, class_bias, class_scale, margin, scale, margin_type, ignore_index, reduction,
            empty_mean, label_smoothing, masked_classes, mixed_target, mix_lambda,
        )  # fmt: skip
        if plain is not None:
            return plain
    _check_logits(input)
    check_flag("return_lse", return_lse)
    check_flag("return_prediction", return_prediction)
    dtype = compute_dtype(input.dtype)
    layout = logits_layout(tuple(input.shape))
    options = row_options(
        layout,
        input,
        dtype,
        target,
        weight,
        class_bias=class_bias,
        class_scale=class_scale,
        margin=margin,
        scale=scale,
        margin_type=margin_type,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        masked_classes=masked_classes,
        mixed_target=mixed_target,
        mix_lambda=mix_lambda,
    )
    backend = resolve(OP, input)
    one_pass = (
        input.requires_grad
        and not torch.compiler.is_compiling()
        and knows_gradient(options, reduction, return_lse, input.dtype)
    )
    options = with_coefficient(options, layout.flat[1], reduction, empty_mean, dtype, backend)
    loss, lse, prediction, _, _ = forward(
        *SIGNATURE.flatten(Arguments(input.reshape(layout.flat), options)),
        reduction != "none",
        return_prediction,
        one_pass,
        backend,
    )
    return row_output(loss, lse, prediction, reduction, empty_mean, layout.rows, return_lse, return_prediction)


# --- options ---------------------------------------------------------------------------------------------------------


class RowLayout(NamedTuple):
    """Where logits have their rows and classes."""

    shape: tuple[int, ...]  #: of the logits
    flat: tuple[int, int, int]  #: [N, C, K], as operators take them
    rows: tuple[int, ...]  #: the shape of class indices


def logits_layout(shape: tuple[int, ...]) -> RowLayout:
    """Return the layout of logits [C], [N, C] or [N, C, d1, ..., dk]."""
    if len(shape) == 1:
        return RowLayout(shape, (1, shape[0], 1), ())
    return RowLayout(shape, (shape[0], shape[1], math.prod(shape[2:])), (shape[0], *shape[2:]))


def classes_last_layout(shape: tuple[int, ...]) -> RowLayout:
    """Return the layout of logits [..., C]."""
    return RowLayout(shape, (math.prod(shape[:-1]), shape[-1], 1), shape[:-1])


def row_options(
    layout: RowLayout,
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
    masked_classes: bool,
    mixed_target: Tensor | None,
    mix_lambda: float | Tensor | None,
) -> RowOptions:
    """Validate the options of a loss of logits, and return them as the operators take them.

    The logits have the device of ``input``. Class vectors are converted to ``dtype``; the
    coefficient is still None.
    """
    shape, flat, index_shape = layout
    classes = flat[1]
    soft = _check_target("target", target, shape, index_shape, input)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("margin_type", margin_type, MARGIN_TYPES)
    label_smoothing = _check_share("label_smoothing", label_smoothing)
    check_int("ignore_index", ignore_index)
    check_flag("masked_classes", masked_classes)
    weight = check_class_vector("weight", weight, classes, input, dtype)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight: got a tensor that requires grad, expected one that does not (not differentiable)")
    class_bias = check_class_vector("class_bias", class_bias, classes, input, dtype)
    class_scale = check_class_vector("class_scale", class_scale, classes, input, dtype)
    fixed_margin, class_margin = 0.0, None
    if isinstance(margin, Tensor):
        if margin.dim() == 0:  # in the dtype of the sum over classes that is its gradient
            margin = check_scalar("margin", margin, input).to(dtype).expand(classes)
        class_margin = check_class_vector("margin", margin, classes, input, dtype)
    elif margin is not None:
        fixed_margin = check_number("margin", margin)
        if margin_type == "angular":
            check_number("margin", fixed_margin, 0.0, math.pi, expected="an angle in [0, pi]")
    fixed_scale, learned_scale = check_factor("scale", scale, input, dtype)
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
    if checks_on():
        if margin_type == "angular" and class_margin is not None:
            holds = (class_margin >= 0) & (class_margin <= math.pi)
            check_all("margin", holds, "values outside [0, pi], expected angles")
        if isinstance(mix_lambda, Tensor):
            holds = (mix_lambda >= 0) & (mix_lambda <= 1)
            check_all("mix_lambda", holds, "values outside [0, 1], expected a share")
        if not soft:
            check_classes("target", target, classes, ignore_index)
            if mixed_target is not None:
                check_classes("mixed_target", mixed_target, classes, ignore_index)
        if class_bias is not None:
            if not masked_classes and (soft or label_smoothing > 0):
                check_unmasked(class_bias)
            _check_not_masked("target", target, layout, class_bias, ignore_index)
            if mixed_target is not None:
                _check_not_masked("mixed_target", mixed_target, layout, class_bias, ignore_index)
    rows = (flat[0], flat[2])
    if soft:
        target = target.reshape(flat)
    else:
        target = as_int64("target", target).reshape(rows)
        if mixed_target is not None:
            mixed_target = as_int64("mixed_target", mixed_target).reshape(rows)
        if share is not None and share.dim() > 0:
            share = share.reshape(rows)
    options = RowOptions(
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
    return _without_masked(options, masked_classes)


def _without_masked(o: RowOptions, masked_classes: bool) -> RowOptions:
    """Return options whose label smoothing and probabilities leave out the classes that class_bias masks (-inf)."""
    if o.class_bias is None or not (o.soft or o.label_smoothing > 0):
        return o
    # there classes of no weight add 0 whatever their bias: a broken promise would be a finite, wrong loss
    blind = o.soft and o.label_smoothing > 0 and o.weight is not None
    if not (masked_classes or blind):
        return o
    masked = o.class_bias.detach() == -math.inf
    if reads_values(masked) and not bool(masked.any()):
        return o
    weight = torch.ones_like(o.class_bias) if o.weight is None else o.weight
    kept = weight.detach().masked_fill(masked, 0.0)
    if o.label_smoothing > 0:
        o = o._replace(smooth_weight=kept * (o.label_smoothing / (~masked).sum()))
    if not o.soft:
        return o
    target = o.target.masked_fill(masked[:, None], 0.0) if o.target.requires_grad else o.target
    return o._replace(weight=kept, target=target)


def check_unmasked(class_bias: Tensor) -> None:
    """Refuse a class_bias that masks a class, of [C] or [E, C]. Reads values: a GPU is waited for."""
    masked = class_bias.detach() == -math.inf
    if not has_no_values(masked) and bool(masked.any()):
        raise ValueError(
            f"class_bias: got -inf for class {int(masked.nonzero()[0, -1])} with masked_classes=False, expected finite "
            "values"
        )


def _check_not_masked(name: str, target: Tensor, layout: RowLayout, class_bias: Tensor, ignore_index: int) -> None:
    """Refuse a target of a class that class_bias masks, and probability on one."""
    masked = class_bias.detach() == -math.inf
    if not bool(masked.any()):
        return
    if target.is_floating_point():
        bad = masked[:, None] & (target.detach().reshape(layout.flat) != 0)
        if bool(bad.any()):
            n, c, k = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: row {n * layout.flat[2] + k} has probability {float(target.reshape(layout.flat)[n, c, k]):g} "
                f"of class {c}, expected 0 where class_bias masks a class (-inf); to smooth over the others alone give "
                "label_smoothing here"
            )
        return
    flat = target.reshape(-1).to(torch.int64)
    bad = (flat != ignore_index) & masked[flat.masked_fill(flat == ignore_index, 0)]
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}: row {row} has class {int(flat[row])}, expected one that class_bias does not mask")


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
        check_classes_last(name, target, shape)
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
    check_both("mixed_target", mixed_target, "mix_lambda", mix_lambda)
    if mixed_target is None or mix_lambda is None:
        return None
    if _check_target("mixed_target", mixed_target, shape, index_shape, input):
        raise TypeError(f"mixed_target: got dtype {mixed_target.dtype}, expected class indices of an integer dtype")
    if not isinstance(mix_lambda, Tensor):
        return filled((), operand(_check_share("mix_lambda", mix_lambda)), dtype, input.device)
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


def _check_logits(input: Tensor) -> None:
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input: got a 0-dim tensor, expected [C], [N, C] or [N, C, d1, ..., dk]")
    if (input.shape[0] if input.dim() == 1 else input.shape[1]) == 0:
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected at least one class")


# --- results ---------------------------------------------------------------------------------------------------------


def knows_gradient(options: RowOptions, reduction: str, return_lse: bool, dtype: torch.dtype) -> bool:
    """Return whether forward knows the gradient of its loss up to a factor."""
    return (
        torch.is_grad_enabled()
        and reduction != "none"
        and not options.learns
        and not return_lse
        and _settings.gradient_policy != "recompute"
        and (dtype != torch.float16 or _settings.gradient_policy == "one_pass")
    )


def with_coefficient(
    o: RowOptions,
    classes: int,
    reduction: str,
    empty_mean: str,
    dtype: torch.dtype,
    backend: str,
    factor: float = 1.0,
) -> RowOptions:
    """Return the options with the factor that makes a sum over rows the reduction asked for, times ``factor``."""
    check_choice("empty_mean", empty_mean, EMPTY_MEANS)
    if reduction != "mean":
        if factor == 1.0:
            return o
        terms = 1 if o.mixed_target is None else 2
        return o._replace(coefficient=torch.full((terms,), factor, dtype=dtype, device=o.target.device))
    if o.soft:
        rows = o.target.shape[0] * o.target.shape[2]
        return o._replace(coefficient=torch.full((1,), factor / max(1, rows), dtype=dtype, device=o.target.device))
    coefficient = mean_coefficient(o.target, o.mixed_target, o.weight, o.ignore_index, classes, dtype, backend, factor)
    if empty_mean == "zero":
        coefficient = coefficient.masked_fill(coefficient.isinf(), 0.0)
    return o._replace(coefficient=coefficient)


def mean_over(rows: Tensor, count: Tensor, empty_mean: str) -> Tensor:
    """Return the sum of ``rows``, 0 where they do not count, over their number ``count``; over none ``empty_mean``."""
    mean = rows.sum() / count.clamp_min(1)
    # 0 / 0 would send NaN to the gradients of rows that are left out
    return mean if empty_mean == "zero" else mean.masked_fill(count == 0, math.nan)


def row_output(
    loss: Tensor,
    lse: Tensor,
    prediction: Tensor,
    reduction: str,
    empty_mean: str,
    row_shape: tuple[int, ...],
    return_lse: bool,
    return_prediction: bool,
) -> Tensor | MarginCrossEntropyOutput:
    """Return the loss as it was asked for, with what was asked for beside it."""
    if reduction == "none":
        loss = loss.reshape(row_shape)
    elif reduction == "mean" and empty_mean == "nan" and math.prod(row_shape) == 0:
        loss = loss * math.nan  # the mean of no rows, as torch has it
    if not (return_lse or return_prediction):
        return loss
    return MarginCrossEntropyOutput(
        loss,
        lse.reshape(row_shape) if return_lse else None,
        prediction.reshape(row_shape) if return_prediction else None,
    )
