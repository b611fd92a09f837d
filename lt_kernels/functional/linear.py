"""The cross-entropy and the predictions of linear heads, whose logits need not be stored."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from .. import _settings
from .._checks import (
    FLOATING,
    as_device,
    check_choice,
    check_class_vector,
    check_device,
    check_factor,
    check_flag,
    check_floating,
    check_int,
    check_shape,
    compute_dtype,
    product_dtype,
)
from ..ops._backend import BackendUnavailableError, resolve
from ..ops.linear_margin_cross_entropy import plan as plans
from ..ops.linear_margin_cross_entropy.arguments import SIGNATURE, Arguments
from ..ops.linear_margin_cross_entropy.op import OP, forward
from ..ops.linear_margin_cross_entropy.op import sizes as sizes_of
from ..ops.linear_margin_cross_entropy.plan import LinearPlan
from ..ops.linear_margin_cross_entropy.topk import BUFFER as TOPK_BUFFER
from ..ops.linear_margin_cross_entropy.topk import SIGNATURE as TOPK_SIGNATURE
from ..ops.linear_margin_cross_entropy.topk import Arguments as TopKArguments
from ..ops.linear_margin_cross_entropy.topk import linear_topk as topk_forward
from ..ops.margin_cross_entropy.op import OP as ROWS
from .rows import (
    MarginCrossEntropyOutput,
    RowKeywords,
    RowLayout,
    classes_last_layout,
    knows_gradient,
    logits_layout,
    row_options,
    row_output,
    with_coefficient,
)


class LinearKeywords(RowKeywords, total=False):
    """The options of ``linear_margin_cross_entropy``, for type checkers."""

    linear_bias: Tensor | None
    weight: Tensor | None
    normalize: bool
    ignore_index: int | None
    strategy: Literal["auto", "materialize", "chunked", "tiled"]


@overload
def linear_margin_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    return_lse: Literal[False] = False, return_prediction: Literal[False] = False, **options: Unpack[LinearKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def linear_margin_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    return_lse: Literal[True], return_prediction: bool = False, **options: Unpack[LinearKeywords],
) -> MarginCrossEntropyOutput: ...  # fmt: skip
@overload
def linear_margin_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    return_lse: bool = False, return_prediction: Literal[True], **options: Unpack[LinearKeywords],
) -> MarginCrossEntropyOutput: ...  # fmt: skip
@overload
def linear_margin_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    return_lse: bool = False, return_prediction: bool = False, **options: Unpack[LinearKeywords],
) -> Tensor | MarginCrossEntropyOutput: ...  # fmt: skip
def linear_margin_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    class_scale: Tensor | None = None,
    margin: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
    margin_type: Literal["additive", "angular"] = "additive",
    normalize: bool = False,
    ignore_index: int | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    empty_mean: Literal["nan", "zero"] = "nan",
    label_smoothing: float = 0.0,
    masked_classes: bool = True,
    mixed_target: Tensor | None = None,
    mix_lambda: float | Tensor | None = None,
    return_lse: bool = False,
    return_prediction: bool = False,
    strategy: Literal["auto", "materialize", "chunked", "tiled"] = "auto",
) -> Tensor | MarginCrossEntropyOutput:
    """``margin_cross_entropy`` of the logits of a linear layer, which are never handed out and need not be stored.

    With every option at its default this equals ``torch.nn.functional.linear_cross_entropy`` (torch 2.13) for each
    input that one takes. It is ``margin_cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`` with
    the features' and the weight's gradients computed next to the loss: logits of one chunk of rows or classes exist at
    a time where all of them would not fit ``lt_kernels.set_memory_budget``.

    Args:
        input: features ``[..., D]`` of any leading shape; float16, bfloat16, float32 or float64.
        linear_weight: ``[C, D]``, or ``[C, d1, ..., dk, D]`` for a loss at each of d1 x ... x dk positions (then
            ``input`` is ``[N, D]``), as in ``F.linear_cross_entropy``. Where features and weight differ in dtype (mixed
            precision with float32 master weights) the matrix products run in the narrower one; under autocast in
            autocast's, as ``F.linear`` would. The gradient has the weight's own dtype and is not rounded to the
            narrower one where the library can avoid it.
        target: class indices ``[...]``, the leading shape of ``input``, of any integer dtype, or class probabilities
            ``[..., C]`` in any floating dtype. With a loss at each position: ``[N, d1, ..., dk]``, or
            ``[N, C, d1, ..., dk]`` like the logits.
        linear_bias: ``[C]`` or ``[C, d1, ..., dk]``, added to the logits before anything else; not with ``normalize``.
        normalize: a cosine head: logits are the cosines of the features and each class's weight. The normalised
            weight is never stored; a norm below 1e-12 counts as 1e-12, as in ``F.normalize``.
        ignore_index: None is -100 for class indices; not with probabilities.
        strategy: ``"materialize"`` (all logits in one buffer), ``"chunked"`` (by rows or by classes), ``"tiled"``
            (Triton: logits never leave the chip; features up to 512 wide, class-index targets), or ``"auto"``:
            the cheapest by the cost model that [`plan_linear`][lt_kernels.functional.plan_linear] explains.

    ``weight``, ``class_bias``, ``class_scale``, ``margin``, ``scale``, ``margin_type``, ``reduction``, ``empty_mean``,
    ``label_smoothing``, ``masked_classes``, ``mixed_target``, ``mix_lambda``, ``return_lse`` and ``return_prediction``
    are those of [`margin_cross_entropy`][lt_kernels.functional.margin_cross_entropy], of the logits above (cosines with
    ``normalize``).

    Returns:
        The loss (0-dim, or shaped like a class-index target for ``reduction="none"``), or a
        ``MarginCrossEntropyOutput`` if ``return_lse`` or ``return_prediction``. float32 (float64 for float64).

    Gradients flow to ``input``, ``linear_weight``, ``linear_bias`` and to all that ``margin_cross_entropy`` has
    gradients for; products for what does not require one (a frozen head, frozen features) are left out. They are exact
    for every upstream gradient and every pass over a retained graph. Gradients of the weight from several chunks add up
    in float32.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``margin_cross_entropy``.
        IndexError: a class index out of range, on the CPU or with ``set_checks(True)``; on a GPU without checks the
            row's loss and the gradients it is part of are NaN.
        BackendUnavailableError: a backend or strategy asked for by name cannot run the call.

    Example:
        >>> features, weight = torch.randn(4, 64), torch.nn.Parameter(torch.randn(8142, 64))
        >>> target = torch.tensor([3, 14, 15, 92])
        >>> log_prior = torch.full((8142,), 1 / 8142).log()
        >>> linear_margin_cross_entropy(features, weight, target, class_bias=log_prior).backward()
        >>> weight.grad.shape
        torch.Size([8142, 64])
    """
    layout, dtype = _check_linear(input, linear_weight, linear_bias, normalize)
    check_choice("strategy", strategy, plans.STRATEGIES)
    if isinstance(target, Tensor) and target.is_floating_point() and ignore_index is not None:
        raise ValueError(f"ignore_index: got {ignore_index} with class-probability targets, expected None")
    arithmetic = compute_dtype(dtype)
    options = row_options(
        layout,
        input,
        arithmetic,
        target,
        weight,
        class_bias=class_bias,
        class_scale=class_scale,
        margin=margin,
        scale=scale,
        margin_type=margin_type,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        masked_classes=masked_classes,
        mixed_target=mixed_target,
        mix_lambda=mix_lambda,
    )
    flat = layout.flat
    features = input.reshape(flat[0], input.shape[-1])
    if normalize:
        features = F.normalize(features.to(arithmetic), dim=1)
    features = features.to(dtype)
    matrix = linear_weight.reshape(flat[1] * flat[2], linear_weight.shape[-1]).contiguous()
    copy = None if matrix.dtype == dtype else matrix.detach().to(dtype)
    bias = None if linear_bias is None else linear_bias.reshape(-1).contiguous()

    backend = resolve(OP, features)
    needs = [t is not None and t.requires_grad for t in (features, matrix, bias)]
    training = torch.is_grad_enabled() and (any(needs) or options.learns)
    # the mean of no rows is NaN, and so is a gradient of it that is a ready one times a factor
    one_pass = any(needs) and flat[0] * flat[2] > 0 and knows_gradient(options, reduction, return_lse, dtype)
    options = with_coefficient(options, flat[1], reduction, empty_mean, arithmetic, backend)
    a = Arguments(features, matrix, copy, bias, options, normalize)
    sizes = sizes_of(a, training, one_pass, options.learns)
    tiled_reason = _tiled_reason(a, backend) if strategy in ("auto", "tiled") else None
    if strategy == "tiled" and tiled_reason is not None:
        raise BackendUnavailableError(f"strategy 'tiled' cannot run {OP}: {tiled_reason}")
    chosen = plans.choose(sizes, strategy, tiled_reason is None, _settings.memory_budget)
    loss, lse, prediction, *_ = forward(
        *SIGNATURE.flatten(a),
        chosen,
        _settings.memory_budget,
        reduction != "none",
        return_prediction,
        one_pass and chosen != "tiled",
        needs if one_pass else [False] * 3,
        backend,
    )
    return row_output(loss, lse, prediction, reduction, empty_mean, layout.rows, return_lse, return_prediction)


def plan_linear(
    rows: int,
    width: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    *,
    weight_dtype: torch.dtype | None = None,
    strategy: Literal["auto", "materialize", "chunked", "tiled"] = "auto",
    training: bool = True,
    one_pass: bool = True,
    memory_budget: int | None = None,
) -> LinearPlan:
    """How ``linear_margin_cross_entropy`` computes a classifier of these sizes, and what that costs.

    Nothing is run and no such device needs to be there. The cost model (operations, bytes, estimated seconds):
    "tiled" if it can run and is estimated to be faster; else "materialize" if the logits fit the memory budget; else
    "chunked", by rows or by classes, whichever is estimated to be faster.

    Args:
        rows: N, samples of a call.
        width: D, features.
        classes: C.
        dtype: of the matrix products: float16, bfloat16, float32 or float64.
        device: its type decides; "tiled" is considered for "cuda" alone.
        weight_dtype: of the weight and its gradient; default ``dtype``.
        strategy: as asked of ``linear_margin_cross_entropy``.
        training: whether features and weight receive gradients.
        one_pass: whether forward knows the upstream gradient up to a factor: not for ``reduction="none"``,
            ``return_lse``, class vectors that learn, or float16 (see ``set_gradient_policy``).
        memory_budget: bytes of a buffer of logits; default what ``set_memory_budget`` set.

    Returns:
        ``LinearPlan(strategy, by, chunk, flops, bytes_moved, peak_memory, seconds)``: ``peak_memory`` counts bytes
        beside inputs, results and gradients; ``seconds`` is for comparing plans, not a promise.

    Raises:
        TypeError, ValueError: sizes that are not positive, or an unknown dtype, device type or strategy.

    Example:
        >>> plan = plan_linear(8192, 2048, 8142, torch.bfloat16)
        >>> plan.strategy, plan.flops == 6 * 8192 * 2048 * 8142
        ('materialize', True)
    """
    for name, value in (("rows", rows), ("width", width), ("classes", classes)):
        check_int(name, value, 1, expected="at least 1")
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    for name, given in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        if not isinstance(given, torch.dtype) or given not in FLOATING:
            raise TypeError(f"{name}: got {given}, expected one of {FLOATING}")
    check_choice("strategy", strategy, plans.STRATEGIES)
    check_flag("training", training)
    check_flag("one_pass", one_pass)
    kind = as_device("device", device).type
    check_choice("device", kind, ("cpu", "cuda"))
    budget = _settings.memory_budget if memory_budget is None else _settings.checked_budget(memory_budget)
    policy = _settings.gradient_policy
    one_pass = one_pass and (policy == "one_pass" or (policy == "auto" and dtype != torch.float16))
    sizes = plans.Sizes(rows, width, classes, 1, dtype, weight_dtype, kind, training, one_pass, True)
    tiled = kind == "cuda" and plans.tiled_reason(width, 1, dtype, False) is None
    if strategy == "tiled" and not tiled:
        reason = plans.tiled_reason(width, 1, dtype, False) or "its kernels need CUDA tensors"
        raise ValueError(f"strategy: got 'tiled', expected another one: {reason}")
    return plans.make_plan(sizes, plans.choose(sizes, strategy, tiled, budget), budget)


class TopK(NamedTuple):
    """Predictions of ``linear_topk`` for features ``[..., D]``."""

    classes: Tensor  #: [..., k] int64, the most likely first
    confidence: Tensor  #: [..., k], their softmax probabilities among all classes
    lse: Tensor  #: [...], log-sum-exp of all shifted logits


def linear_topk(
    input: Tensor,
    linear_weight: Tensor,
    k: int = 1,
    *,
    linear_bias: Tensor | None = None,
    class_shift: Tensor | None = None,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
) -> TopK:
    """The k most likely classes of a linear layer and their probabilities, for inference with very many classes.

    With x the logits ``F.linear(input, linear_weight, linear_bias)``, or the cosines of features and class weights
    with ``normalize``,

        u_j = scale * x_j + class_shift_j,    confidence_j = exp(u_j) / sum over all classes of exp(u)

    It is ``torch.topk(u.softmax(-1), k)`` computed block by block: no more logits than fit a buffer of 64 MiB, or of
    ``lt_kernels.set_memory_budget`` if that is less, exist at a time, however many rows and classes there are. The
    probabilities are exact: their log-sum-exp is over all classes.

    Args:
        input: features ``[..., D]`` of any leading shape; float16, bfloat16, float32 or float64.
        linear_weight: ``[C, D]``. Its dtype, and autocast, as in
            [`linear_margin_cross_entropy`][lt_kernels.functional.linear_margin_cross_entropy].
        k: how many classes, 1 to C.
        linear_bias: ``[C]``, added to the logits; not with ``normalize``.
        class_shift: ``[C]``, added to the scaled logits in float32. The log ratio of the new and the training prior
            makes predictions for a known test prior, ``-tau * log_prior`` is post-hoc logit adjustment (Menon et al.,
            2021), -inf masks a class.
        scale: a number or 0-dim tensor: multiplies all logits (the inverse temperature of a cosine head).
        normalize: a cosine head, as in ``linear_margin_cross_entropy``.

    Returns:
        ``TopK(classes, confidence, lse)``: int64 and float32 (float64 for float64 features), by decreasing u. Of equal
        logits the lowest class comes first, everywhere. NaN counts as the largest; a row with one has NaN for
        confidence and lse. Masked classes come last, with confidence 0; rows without any other have NaN.

    Nothing is differentiable, and nothing waits for a GPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        BackendUnavailableError: a backend asked for by name cannot run the call.

    Example:
        >>> features, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [2.0, 5.0], [4.0, 0.0]])
        >>> linear_topk(features, weight, k=2)
        TopK(classes=tensor([[2, 0]]), confidence=tensor([[0.6652, 0.2447]]), lse=tensor([4.4076]))
        >>> linear_topk(features, weight, class_shift=torch.tensor([0.0, 0.0, -torch.inf])).classes
        tensor([[0]])
    """
    check_floating("linear_weight", linear_weight)
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight: got shape {tuple(linear_weight.shape)}, expected [C, D]")
    layout, dtype = _check_linear(input, linear_weight, linear_bias, normalize)
    classes = linear_weight.shape[0]
    check_int("k", k, 1, classes, expected=lambda: f"1 to {classes}, the number of classes")
    arithmetic = compute_dtype(dtype)
    shift = check_class_vector("class_shift", class_shift, classes, input, arithmetic)
    fixed_scale, learned_scale = check_factor("scale", scale, input, arithmetic)
    with torch.no_grad():
        features = input.reshape(layout.flat[0], input.shape[-1])
        if normalize:
            features = F.normalize(features.to(arithmetic), dim=1)
        features = features.to(dtype)
        result = TopK(
            *topk_forward(
                *TOPK_SIGNATURE.flatten(
                    TopKArguments(features, linear_weight, linear_bias, shift, learned_scale, fixed_scale, normalize)
                ),
                k,
                min(_settings.memory_budget, TOPK_BUFFER),
                resolve(ROWS, features),
            )
        )
    return result if input.dim() == 2 else TopK(*(value.reshape(layout.rows + value.shape[1:]) for value in result))


def _check_linear(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, normalize: bool
) -> tuple[RowLayout, torch.dtype]:
    """Check what makes the logits; return their layout, and the dtype of the matrix products."""
    check_floating("input", input)
    check_floating("linear_weight", linear_weight)
    check_flag("normalize", normalize)
    if input.dim() == 0:
        raise ValueError("input: got a 0-dim tensor, expected features [..., D]")
    if linear_weight.dim() < 2:
        raise ValueError(
            f"linear_weight: got shape {tuple(linear_weight.shape)}, expected [C, D] or [C, d1, ..., dk, D]"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise ValueError(f"input: got shape {tuple(input.shape)} with a loss at each position, expected [N, D]")
    if linear_weight.shape[0] == 0:
        raise ValueError(f"linear_weight: got shape {tuple(linear_weight.shape)}, expected at least one class")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"linear_weight: got {linear_weight.shape[-1]} features (shape {tuple(linear_weight.shape)}), "
            f"expected {input.shape[-1]} as input of shape {tuple(input.shape)}"
        )
    check_device("linear_weight", linear_weight, input, " as input")
    if linear_bias is not None:
        check_floating("linear_bias", linear_bias)
        product_dtype(linear_weight, linear_bias, "linear_bias", "linear_weight")
        check_shape("linear_bias", linear_bias, linear_weight.shape[:-1])
        check_device("linear_bias", linear_bias, input, " as input")
        if normalize:
            raise ValueError("linear_bias: got a tensor with normalize=True, expected None (cosines have no bias)")
    shape = (*input.shape[:-1], *linear_weight.shape[:-1])
    layout = classes_last_layout(shape) if linear_weight.dim() == 2 else logits_layout(shape)
    return layout, product_dtype(input, linear_weight, "linear_weight", "input")


def _tiled_reason(a: Arguments, backend: str) -> str | None:
    """Return why the strategy "tiled" cannot run the call, None if it can."""
    if backend != "triton":
        return f"it needs the backend 'triton', not {backend!r}"
    return plans.tiled_reason(a.input.shape[1], a.positions, a.input.dtype, a.options.soft)
