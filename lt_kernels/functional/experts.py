"""Losses and predictions of several experts; public in ``lt_kernels.functional``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from .._checks import (
    check_all,
    check_both,
    check_choice,
    check_class_vector,
    check_device,
    check_factor,
    check_flag,
    check_floating,
    check_int,
    check_number,
    check_positive,
    check_shape,
    check_tensor,
    checks_on,
    compute_dtype,
    filled,
    operand,
    product_dtype,
    reads_values,
)
from ..ops._backend import plain_call, resolve
from ..ops._experts import shape_of
from ..ops._rows.options import RowOptions
from ..ops.expert_cross_entropy.arguments import SIGNATURE, Arguments, bias_of
from ..ops.expert_cross_entropy.op import OP as CROSS_ENTROPY
from ..ops.expert_cross_entropy.op import forward as cross_entropy_forward
from ..ops.expert_divergence.op import KINDS
from ..ops.expert_divergence.op import OP as DIVERGENCE
from ..ops.expert_divergence.op import forward as divergence_forward
from ..ops.expert_fusion.arguments import SIGNATURE as FUSION_SIGNATURE
from ..ops.expert_fusion.arguments import Arguments as FusionArguments
from ..ops.expert_fusion.op import OP as FUSION
from ..ops.expert_fusion.op import forward as fusion_forward
from ..ops.margin_cross_entropy.op import row_weights
from .linear import linear_topk
from .rows import (
    REDUCTIONS,
    MarginKeywords,
    check_unmasked,
    knows_gradient,
    logits_layout,
    margin_cross_entropy,
    row_options,
    with_coefficient,
)

#: Logits of E experts: one tensor [E, N, C] or [E, N, C, d1, ..., dk], or E tensors of that shape without E.
ExpertLogits: TypeAlias = "Tensor | Sequence[Tensor]"


class ExpertCrossEntropyOutput(NamedTuple):
    """What ``expert_cross_entropy`` returns with ``return_ensemble=True``."""

    loss: Tensor
    ensemble_loss: Tensor  #: cross-entropy of the mean of the experts' scaled logits; not differentiable
    ensemble_prediction: Tensor  #: [N] int64, the argmax of that mean


class ExpertFusion(NamedTuple):
    """Predictions of a product of experts."""

    prediction: Tensor  #: [N] int64, the most likely class; [N, d1, ..., dk] for maps, and so on
    confidence: Tensor  #: [N], its probability
    topk_values: Tensor  #: [N, k], probabilities of the k most likely classes, the largest first
    topk_indices: Tensor  #: [N, k] int64, these classes
    log_probs: Tensor | None  #: [N, C], if asked for


class ExpertKeywords(MarginKeywords, total=False):
    """The options of ``expert_cross_entropy``, for type checkers."""

    log_prior: Tensor | None
    taus: Sequence[float] | Tensor | None
    expert_reduction: Literal["none", "mean", "sum"]


@overload
def expert_cross_entropy(
    logits: ExpertLogits, target: Tensor, weight: Tensor | None = None, *,
    return_ensemble: Literal[False] = False, **options: Unpack[ExpertKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def expert_cross_entropy(
    logits: ExpertLogits, target: Tensor, weight: Tensor | None = None, *,
    return_ensemble: Literal[True], **options: Unpack[ExpertKeywords],
) -> ExpertCrossEntropyOutput: ...  # fmt: skip
@overload
def expert_cross_entropy(
    logits: ExpertLogits, target: Tensor, weight: Tensor | None = None, *,
    return_ensemble: bool, **options: Unpack[ExpertKeywords],
) -> Tensor | ExpertCrossEntropyOutput: ...  # fmt: skip
def expert_cross_entropy(
    logits: ExpertLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    log_prior: Tensor | None = None,
    taus: Sequence[float] | Tensor | None = None,
    class_bias: Tensor | None = None,
    class_scale: Tensor | None = None,
    margin: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
    margin_type: Literal["additive", "angular"] = "additive",
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
    empty_mean: Literal["nan", "zero"] = "nan",
    expert_reduction: Literal["none", "mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
    masked_classes: bool = True,
    mixed_target: Tensor | None = None,
    mix_lambda: float | Tensor | None = None,
    return_ensemble: bool = False,
) -> Tensor | ExpertCrossEntropyOutput:
    """Cross-entropy of E experts, each with its own share of the log prior, in one call and one pass over their logits.

    Expert e's loss is [`margin_cross_entropy`][lt_kernels.functional.margin_cross_entropy] of its logits with the class
    bias ``taus[e] * log_prior + class_bias``; target and all other options are shared. With the published
    ``taus`` of BalPoE (Aimar et al., CVPR 2023) the mean over experts is its training loss.

    Args:
        logits: ``[E, N, C]`` with any strides (e.g. a ``[N, E, C]`` stack, transposed), or a list or tuple of E tensors
            ``[N, C]``, which are not stacked; float16, bfloat16, float32 or float64. Maps ``[E, N, C, d1, ..., dk]``,
            or a list of ``[N, C, d1, ..., dk]``, likewise.
        target: class indices ``[N]`` or ``[N, d1, ..., dk]`` of any integer dtype, or class probabilities shaped like
            the logits of one expert, in any floating dtype.
        weight: ``[C]``, class weights as in ``F.cross_entropy``; not differentiable.
        log_prior: ``[C]``, finite (natural logarithm). To mask a class, give it -inf in ``class_bias``.
        taus: E numbers, or a tensor ``[E]``, or ``[E, C]`` (an exponent per expert and class); together with
            ``log_prior``. With numbers, and a prior that does not learn, the Triton kernels read the prior once for all
            experts of a sample; other backends add it up per class and expert, once per call.
        class_bias: ``[C]``, or ``[E, C]``: added to the logits of each class (and expert).
        expert_reduction: ``"mean"`` over experts, ``"sum"``, or ``"none"`` for one loss per expert.
        return_ensemble: also return the cross-entropy and the prediction of zbar = scale * mean over experts of their
            logits, without prior, margin, class vectors or smoothing: what the product of experts would say.

    ``class_scale``, ``margin``, ``scale``, ``margin_type``, ``ignore_index``, ``reduction``, ``empty_mean``,
    ``label_smoothing``, ``masked_classes``, ``mixed_target`` and ``mix_lambda`` are those of ``margin_cross_entropy``.

    Class indices for ``[N, C]`` are one pass over all experts; maps and probabilities are one call of
    ``margin_cross_entropy`` for each expert, which reads its logits where they are.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-dim, ``[E]`` with ``expert_reduction="none"``, shaped like
        class indices with ``reduction="none"``, ``[E, ...]`` with both. Or an ``ExpertCrossEntropyOutput`` if
        ``return_ensemble``, whose ``ensemble_loss`` is 0-dim (like class indices with ``reduction="none"``; the mean is
        over targets that are not ignored, whatever their class weights) and not differentiable.

    Gradients flow to ``logits``, ``log_prior``, ``taus`` (tensors), ``class_bias``, ``class_scale``, ``margin``,
    ``scale`` and probability targets.

    Raises:
        TypeError, ValueError, NotImplementedError, BackendUnavailableError: as ``margin_cross_entropy``.
        IndexError: a class index out of range, on the CPU or with ``set_checks(True)``; on a GPU without checks that
            row's losses and gradients are NaN.

    Example:
        >>> logits = torch.randn(3, 4, 8142, requires_grad=True)
        >>> target = torch.tensor([3, 14, 15, 92])
        >>> log_prior = torch.full((8142,), 1 / 8142).log()
        >>> expert_cross_entropy(logits, target, log_prior=log_prior, taus=(0.0, 1.0, 2.0)).backward()
    """
    if return_ensemble is False and not checks_on():
        plain = plain_call(
            CROSS_ENTROPY, logits, log_prior, taus, expert_reduction, target, weight, class_bias, class_scale, margin,
            scale, margin_type, ignore_index, reduction, empty_mean, label_smoothing, masked_classes, mixed_target,
            mix_lambda,
        )  # fmt: skip
        if plain is not None:
            return plain
    given, experts = _check_experts(logits)
    first, count = experts[0], len(experts)
    dtype = compute_dtype(first.dtype)
    check_choice("expert_reduction", expert_reduction, REDUCTIONS)
    check_flag("return_ensemble", return_ensemble)
    shared: dict[str, Any] = {
        "class_scale": class_scale,
        "margin": margin,
        "scale": scale,
        "margin_type": margin_type,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        # a prior is finite
        "masked_classes": check_flag("masked_classes", masked_classes) and class_bias is not None,
        "mixed_target": mixed_target,
        "mix_lambda": mix_lambda,
    }
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if first.dim() > 2 or soft or _has_own_masks(class_bias, label_smoothing, masked_classes):
        shared["empty_mean"] = empty_mean
        return _by_rows(experts, target, weight, log_prior, taus, class_bias, expert_reduction, return_ensemble, shared)
    _, n, classes = shape_of(given)
    shared_bias = class_bias
    if isinstance(class_bias, Tensor) and class_bias.dim() == 2:
        shared_bias = None
        class_bias = _check_tensor_of("class_bias", class_bias, [(classes,), (count, classes)], first)
        class_bias = class_bias.to(dtype).contiguous()
    options = row_options(logits_layout((n, classes)), first, dtype, target, weight, class_bias=shared_bias, **shared)
    bias = options.class_bias if shared_bias is not None else class_bias
    prior, numbers, bias = _prior(log_prior, taus, bias, count, classes, first, dtype)
    backend = resolve(CROSS_ENTROPY, first)

    options = options._replace(class_bias=bias)
    experts_mean = 1.0 / count if expert_reduction == "mean" else 1.0
    prior_learns = prior is not None and prior.requires_grad
    unweighted = options._replace(weight=None)
    options = with_coefficient(options, classes, reduction, empty_mean, dtype, backend, experts_mean)
    ensemble_coefficient = options.coefficient if return_ensemble else None
    if ensemble_coefficient is not None and (options.weight is not None or experts_mean != 1.0):
        ensemble_coefficient = with_coefficient(unweighted, classes, reduction, empty_mean, dtype, backend).coefficient
    reduce = "none" if reduction == "none" else "rows" if expert_reduction == "none" else "all"
    arguments = Arguments(given, options, prior, ensemble_coefficient, numbers)
    one_pass = (
        any(x.requires_grad for x in given)
        and not torch.compiler.is_compiling()
        and not prior_learns
        and knows_gradient(options, reduction, False, first.dtype)
    )
    loss, _, ensemble_loss, prediction, _ = cross_entropy_forward(
        *SIGNATURE.flatten(arguments), reduce, return_ensemble, one_pass, backend
    )
    if reduction == "none" and expert_reduction != "none":
        loss = loss.sum(0)
    if reduction == "mean" and empty_mean == "nan" and n == 0:
        loss, ensemble_loss = loss * math.nan, ensemble_loss * math.nan  # the mean of no rows, as torch has it
    return ExpertCrossEntropyOutput(loss, ensemble_loss, prediction) if return_ensemble else loss


def _has_own_masks(class_bias: Tensor | None, label_smoothing: float, masked_classes: bool) -> bool:
    """Return whether smoothing is over the classes that are not masked, where these may differ between experts."""
    if not isinstance(class_bias, Tensor) or class_bias.dim() != 2 or not label_smoothing > 0:
        return False
    if masked_classes:
        masked = class_bias.detach() == -math.inf
        return not reads_values(masked) or bool(masked.any())
    if checks_on():
        check_unmasked(class_bias)
    return False


def _by_rows(
    experts: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    log_prior: Tensor | None,
    taus: Sequence[float] | Tensor | None,
    class_bias: Tensor | None,
    expert_reduction: str,
    return_ensemble: bool,
    shared: dict[str, Any],
) -> Tensor | ExpertCrossEntropyOutput:
    """Compute ``expert_cross_entropy`` as one call of ``margin_cross_entropy`` for each expert."""
    first, count = experts[0], len(experts)
    classes, dtype = first.shape[1], compute_dtype(first.dtype)
    if class_bias is not None:
        class_bias = _check_tensor_of("class_bias", class_bias, [(classes,), (count, classes)], first).to(dtype)
    prior, numbers, bias = _prior(log_prior, taus, class_bias, count, classes, first, dtype)
    each = [
        margin_cross_entropy(x, target, weight, class_bias=bias_of(e, bias, prior, numbers), **shared)
        for e, x in enumerate(experts)
    ]
    loss = torch.stack(each)
    if expert_reduction != "none":
        loss = loss.mean(0) if expert_reduction == "mean" else loss.sum(0)
    if not return_ensemble:
        return loss
    plain = ("ignore_index", "reduction", "empty_mean", "mixed_target", "mix_lambda")
    with torch.no_grad():
        mean = sum((x.to(dtype) for x in experts[1:]), first.to(dtype)) / count * shared["scale"]
        of_mean = margin_cross_entropy(mean, target, return_prediction=True, **{name: shared[name] for name in plain})
    assert of_mean.prediction is not None
    return ExpertCrossEntropyOutput(loss, of_mean.loss, of_mean.prediction)


def expert_fusion(
    logits: ExpertLogits,
    *,
    expert_weight: Sequence[float] | Tensor | None = None,
    log_prior_shift: Tensor | None = None,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    topk: int = 1,
    return_log_probs: bool = False,
) -> ExpertFusion:
    """The prediction of a product of experts: one read of their logits.

    With x_e the logits of expert e and w its weight,

        u_j = (scale / temperature) * sum over e of w_e * x_ej + log_prior_shift_j
        p   = softmax(u)

    so the product of the experts' distributions, each to the power w_e, renormalised. Of experts trained with
    ``taus`` of mean 1 (BalPoE), the plain mean is unbiased: predictions for a uniform test prior.

    Args:
        logits: ``[E, N, C]`` with any strides, or a list or tuple of E tensors ``[N, C]``; or maps
            ``[E, N, C, d1, ..., dk]``, read in place if their classes are innermost (``torch.channels_last``) or N is
            1, and copied otherwise.
        expert_weight: E numbers or a tensor ``[E]``; default 1 / E each. They need not add up to 1.
        log_prior_shift: ``[C]``, added last: log pi_test for a known test prior, ``-inf`` to mask a class.
        scale: a number or 0-dim tensor: multiplies all logits (the inverse temperature of cosine heads).
        temperature: a number > 0 that all logits are divided by (calibration; Guo et al., 2017).
        topk: how many classes, 1 to C.
        return_log_probs: also return log p, which costs a write of ``[N, C]``.

    Returns:
        ``ExpertFusion(prediction, confidence, topk_values, topk_indices, log_probs)``: float32 (float64 for float64
        logits) and int64. Of equal logits the lowest class comes first. NaN counts as the largest: a row with one has
        NaN for its probabilities. ``prediction`` and ``confidence`` are the first of the top k.

    Nothing is differentiable, and nothing waits for a GPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        BackendUnavailableError: a backend asked for by name cannot run the call.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0, 1.0]], [[0.0, 3.0, 1.0]]])
        >>> expert_fusion(logits, topk=2).topk_indices
        tensor([[1, 0]])
        >>> expert_fusion(logits, expert_weight=(1.0, 0.0)).prediction
        tensor([0])
    """
    given, experts = _check_experts(logits)
    given, shape = _rows_of(given, experts[0])
    first = experts[0]
    classes = first.shape[1]
    dtype = compute_dtype(first.dtype)
    weights, tensor = _expert_weights(expert_weight, len(experts), first, dtype)
    check_int("topk", topk, 1, classes, expected=lambda: f"1 to {classes}, the number of classes")
    check_flag("return_log_probs", return_log_probs)
    shift = check_class_vector("log_prior_shift", log_prior_shift, classes, first, dtype)
    fixed, learned = _scale(scale, temperature, first, dtype)
    with torch.no_grad():
        values, found, _, log_probs = fusion_forward(
            *FUSION_SIGNATURE.flatten(FusionArguments(given, tensor, shift, learned, weights, fixed, True)),
            topk,
            return_log_probs,
            resolve(FUSION, first),
        )
    values, found = _to_map(values, shape), _to_map(found, shape)
    return ExpertFusion(
        found[:, 0], values[:, 0], values, found, _to_map(log_probs, shape) if return_log_probs else None
    )


def linear_expert_fusion(
    input: ExpertLogits,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    expert_weight: Sequence[float] | Tensor | None = None,
    log_prior_shift: Tensor | None = None,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    topk: int = 1,
) -> ExpertFusion:
    """``expert_fusion`` of E linear heads without their logits: the fusion of linear layers is one linear layer.

    sum over e of w_e (W_e f_e + b_e) is one matrix product of the concatenated features and weights, so this is
    [`linear_topk`][lt_kernels.functional.linear_topk] of them: no more logits than fit its buffer exist at a time.

    Args:
        input: features ``[E, N, D]`` or a list of E ``[N, D]``, one for each expert; or ``[N, D]``, shared by all (then
            the weights are added up instead, which is E times less work).
        linear_weight: ``[E, C, D]``. It is copied once per call (normalised, weighted, concatenated); for repeated
            calls on few samples hand a fused weight to ``linear_topk``.
        linear_bias: ``[E, C]``; not with ``normalize``.
        normalize: cosine heads: each expert's logits are cosines.

    Everything else as in [`expert_fusion`][lt_kernels.functional.expert_fusion], whose result this returns, without
    ``log_probs``.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as ``expert_fusion``.
    """
    check_tensor("linear_weight", linear_weight, "a Tensor [E, C, D]")
    check_flag("normalize", normalize)
    if linear_weight.dim() != 3 or 0 in linear_weight.shape[:2]:
        raise ValueError(f"linear_weight: got shape {tuple(linear_weight.shape)}, expected [E, C, D]")
    check_floating("linear_weight", linear_weight)
    count, classes, width = linear_weight.shape
    features = _check_features(input, count, width, linear_weight)
    if linear_bias is not None:
        check_floating("linear_bias", linear_bias, "a Tensor [E, C]")
        product_dtype(linear_weight, linear_bias, "linear_bias", "linear_weight")
        check_shape("linear_bias", linear_bias, (count, classes), expected=lambda: f"[{count}, {classes}]")
        if normalize:
            raise ValueError("linear_bias: got a tensor with normalize=True, expected None (cosines have no bias)")
    dtype = compute_dtype(linear_weight.dtype)
    check_int("topk", topk, 1, classes, expected=lambda: f"1 to {classes}, the number of classes")
    weights, tensor = _expert_weights(expert_weight, count, linear_weight, dtype)
    shift = check_class_vector("log_prior_shift", log_prior_shift, classes, linear_weight, dtype)
    fixed, learned = _scale(scale, temperature, linear_weight, dtype)
    factor = fixed if learned is None else learned * fixed
    with torch.no_grad():
        heads = list(linear_weight.unbind(0))
        if normalize:
            features = [F.normalize(f.to(dtype), dim=1).to(f.dtype) for f in features]
            heads = [F.normalize(w.to(dtype), dim=1) for w in heads]
        shares = weights if tensor is None else [w * t for w, t in zip(weights, tensor, strict=True)]
        heads = [(w.to(dtype) * share).to(linear_weight.dtype) for w, share in zip(heads, shares, strict=True)]
        bias = None
        if linear_bias is not None:
            each = [b.to(dtype) * share for b, share in zip(linear_bias, shares, strict=True)]
            bias = torch.stack(each).sum(0).to(linear_bias.dtype)
        if len(features) == 1:
            joined, matrix = features[0], torch.stack(heads).sum(0)
        else:
            joined, matrix = torch.cat(features, 1), torch.cat(heads, 1)
        result = linear_topk(
            joined,
            matrix,
            topk,
            linear_bias=bias,
            class_shift=shift,
            scale=factor.to(linear_weight.device, dtype) if isinstance(factor, Tensor) else factor,
        )
    return ExpertFusion(result.classes[:, 0], result.confidence[:, 0], result.confidence, result.classes, None)


def expert_divergence(
    logits: ExpertLogits,
    kind: Literal["to_mean", "pairwise"] = "to_mean",
    temperature: float | Tensor = 1.0,
    *,
    detach_mean: bool = True,
    reduction: Literal["none", "mean", "sum"] = "mean",
    expert_reduction: Literal["none", "sum"] = "sum",
) -> Tensor:
    """Kullback-Leibler divergences between the predictions of E experts, forward and backward in one read each.

    With u_e = logits_e / temperature (per class, where that is a vector), p_e = softmax(u_e) and pbar the softmax of
    the mean of the u_e,

        to_mean    D_e = KL(pbar || p_e)                        the diversity term of RIDE (Wang et al., ICLR 2021)
        pairwise   D_e = sum over the other experts f of KL(p_e || p_f)     NCL (Li et al., CVPR 2022)

    so that the sum over experts of ``"pairwise"`` is over all ordered pairs; it takes O(E) work per logit, not O(E^2).
    Published weights (RIDE: -0.2 * temperature^2; NCL: 0.6 / (E - 1)) are for the caller to multiply.

    Args:
        logits: ``[E, N, C]`` with any strides, or a list or tuple of E tensors ``[N, C]``; or maps, as in
            [`expert_fusion`][lt_kernels.functional.expert_fusion].
        temperature: a number > 0, or ``[C]`` of such numbers (checked only with checks on): RIDE's per-class
            temperature. Not differentiable.
        detach_mean: whether pbar is a constant to the gradient (``"to_mean"`` only). For the sum over experts it makes
            no difference: the gradients through pbar cancel, d(sum of D)/du_e = p_e - pbar either way.
        reduction: over rows: ``"mean"`` (``F.kl_div``'s "batchmean"), ``"sum"`` or ``"none"``.
        expert_reduction: ``"sum"`` over experts, or ``"none"`` for one value per expert.

    A class of probability 0 adds nothing, so classes masked by -inf in every expert take no part.

    Returns:
        float32 (float64 for float64 logits): 0-dim, ``[E]``, ``[N]`` or ``[E, N]`` (``[N, d1, ..., dk]`` for maps).

    Gradients flow to ``logits`` alone.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        NotImplementedError: forward-mode differentiation, ``torch.func`` transforms and second derivatives, except on
            the reference backend.
        BackendUnavailableError: a backend asked for by name cannot run the call.

    Example:
        >>> logits = torch.randn(3, 4, 8142, requires_grad=True)
        >>> (-0.2 * expert_divergence(logits)).backward()
    """
    given, experts = _check_experts(logits)
    first = experts[0]
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("expert_reduction", expert_reduction, ("none", "sum"))
    check_flag("detach_mean", detach_mean)
    vector = _temperatures(temperature, first)
    given, shape = _rows_of(given, first)
    value, _ = divergence_forward(given, vector, None, kind, detach_mean, False, resolve(DIVERGENCE, first))
    if expert_reduction == "sum":
        value = value.sum(0)
    if reduction == "sum":
        return value.sum(-1)
    return value.mean(-1) if reduction == "mean" else value.unflatten(-1, shape)


def divergence_over_rows(
    logits: ExpertLogits,
    kind: str,
    temperature: float | Tensor,
    target: Tensor,
    mixed_target: Tensor | None,
    mix_lambda: float | Tensor | None,
    ignore_index: int,
    reduction: str,
    factor: float = 1.0,
) -> Tensor:
    """Return ``factor`` times the experts' divergences, reduced over the rows whose targets are not ignored.

    Each of mixed targets has its share of a row's term, and its own mean; a mean over no row is 0. The caller has had
    ``expert_cross_entropy`` check the targets.
    """
    given, experts = _check_experts(logits)
    first = experts[0]
    backend, dtype = resolve(DIVERGENCE, first), compute_dtype(first.dtype)
    share = None
    if mixed_target is not None and mix_lambda is not None:
        mixed_target = mixed_target.to(torch.int64)
        if isinstance(mix_lambda, Tensor):
            share = mix_lambda.to(dtype)
        else:
            share = filled((), operand(mix_lambda), dtype, first.device)
    options = RowOptions(target.to(torch.int64), mixed_target, share, ignore_index=ignore_index)
    weight = row_weights(options, reduction, factor, dtype, backend)
    vector = _temperatures(temperature, first)
    given, shape = _rows_of(given, first)
    value, _ = divergence_forward(given, vector, weight, kind, True, reduction != "none", backend)
    return value if reduction != "none" else value.sum(0).unflatten(-1, shape)


def _temperatures(temperature: float | Tensor, first: Tensor) -> Tensor | None:
    """Check the temperature of ``expert_divergence``; return it as a vector [C], None for 1."""
    dtype = compute_dtype(first.dtype)
    vector = None
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature: got a tensor that requires grad, expected one that does not")
        if temperature.dim() == 0:
            temperature = temperature.expand(first.shape[1])
        vector = check_class_vector("temperature", temperature, first.shape[1], first, dtype)
        assert vector is not None
        if checks_on():
            check_all("temperature", vector > 0, "values that are not positive, expected numbers > 0")
    elif (number := check_positive("temperature", check_number("temperature", temperature))) != 1.0:
        vector = filled((first.shape[1],), operand(number), dtype, first.device)
    return vector


# ------------------------------------------------------------------------------------------------------------ arguments


def _rows_of(given: list[Tensor], first: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return the operators' argument with one row for each position of a map, and the shape of the positions."""
    shape = (first.shape[0], *first.shape[2:])
    if first.dim() == 2:
        return given, shape
    classes = given[0].dim() - first.dim() + 1  # one more where the experts are one tensor
    return [x.movedim(classes, -1).flatten(classes - 1, -2) for x in given], shape


def _to_map(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return values of rows [n, k] as those of positions, [N, k, d1, ..., dk]."""
    return rows if len(shape) == 1 else rows.unflatten(0, shape).movedim(-1, 1)


def _check_experts(logits: ExpertLogits) -> tuple[list[Tensor], list[Tensor]]:
    """Check the logits; return the operators' argument, and each expert's [N, C] or [N, C, d1, ..., dk]."""
    if isinstance(logits, Tensor):
        check_floating("logits", logits)
        if logits.dim() < 3 or logits.shape[0] == 0 or logits.shape[2] == 0:
            raise ValueError(
                f"logits: got shape {tuple(logits.shape)}, expected [E, N, C] or [E, N, C, d1, ..., dk] with at least "
                "one expert and one class, or a list of E tensors [N, C]"
            )
        return [logits], list(logits.unbind(0))
    if not isinstance(logits, (list, tuple)):
        raise TypeError(f"logits: got {type(logits).__name__}, expected a Tensor [E, N, C] or a list of E [N, C]")
    if not logits:
        raise ValueError("logits: got no tensors, expected one [N, C] for each expert")
    for e, each in enumerate(logits):
        name = f"logits[{e}]"
        check_floating(name, each, "a Tensor [N, C]")
        if each.dim() < 2 or each.shape[1] == 0:
            raise ValueError(f"{name}: got shape {tuple(each.shape)}, expected [N, C] with at least one class")
        for what in ("shape", "dtype", "device"):
            here, there = getattr(each, what), getattr(logits[0], what)
            if here != there:
                raise ValueError(f"{name}: got {what} {_shown(here)}, expected {_shown(there)} as logits[0]")
    return list(logits), list(logits)


def _shown(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _check_numbers(name: str, values: Any, experts: int, expected: str) -> list[float]:
    """Return the numbers of a sequence of one for each expert."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}: got {type(values).__name__}, expected {expected}")
    if len(values) != experts:
        raise ValueError(f"{name}: got {len(values)} values, expected {experts}, one for each expert")
    return [check_number(f"{name}[{e}]", value) for e, value in enumerate(values)]


def _check_tensor_of(name: str, value: Tensor, shapes: Sequence[tuple[int, ...]], logits: Tensor) -> Tensor:
    """Return ``value``: floating, of one of the shapes, on the device of ``logits``."""
    check_floating(name, value, kind="a floating dtype")
    if not any(tuple(value.shape) == shape for shape in shapes):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")
    check_device(name, value, logits, " as logits")
    return value


def _prior(
    log_prior: Tensor | None,
    taus: Sequence[float] | Tensor | None,
    bias: Tensor | None,
    experts: int,
    classes: int,
    input: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[float], Tensor | None]:
    """Return log_prior and taus as the kernels take them, and the class bias, which has both where they are no
    numbers."""
    check_both("log_prior", log_prior, "taus", taus)
    if log_prior is None or taus is None:
        return None, [0.0] * experts, bias
    prior = check_class_vector("log_prior", log_prior, classes, input, dtype)
    assert prior is not None
    if checks_on():
        problem = "values that are not finite, expected finite ones (mask with class_bias=-inf)"
        check_all("log_prior", prior.isfinite(), problem)
    if isinstance(taus, Tensor):
        exponents = _check_tensor_of("taus", taus, [(experts,), (experts, classes)], input).to(dtype)
        own = (exponents[:, None] if taus.dim() == 1 else exponents) * prior
    else:
        numbers = _check_numbers("taus", taus, experts, f"a sequence of {experts} numbers or a Tensor")
        if not prior.requires_grad:
            # the kernels' gradients of a class_bias that learns go to what they are given: [C] or [E, C]
            return prior, numbers, bias
        own = torch.stack(
            [tau * prior for tau in map(operand, numbers)]
        )  # a tensor of the numbers would wait for a GPU
    return None, [0.0] * experts, (own if bias is None else own + bias).contiguous()


def _expert_weights(
    expert_weight: Sequence[float] | Tensor | None, experts: int, input: Tensor, dtype: torch.dtype
) -> tuple[list[float], Tensor | None]:
    """Return the experts' factors as numbers, and a tensor [E] that multiplies them."""
    if expert_weight is None:
        return [1.0 / experts] * experts, None
    if isinstance(expert_weight, Tensor):
        _check_tensor_of("expert_weight", expert_weight, [(experts,)], input)
        return [1.0] * experts, expert_weight.detach().to(dtype).contiguous()
    return _check_numbers("expert_weight", expert_weight, experts, f"{experts} numbers or a Tensor"), None


def _scale(scale: float | Tensor, temperature: float, input: Tensor, dtype: torch.dtype) -> tuple[Any, Tensor | None]:
    """Return scale / temperature as a number and a tensor that multiplies it."""
    inverse = 1.0 / operand(check_positive("temperature", check_number("temperature", temperature)))
    fixed, learned = check_factor("scale", scale, input, dtype)
    return operand(fixed) * inverse, None if learned is None else learned.detach()


def _check_features(input: ExpertLogits, experts: int, width: int, linear_weight: Tensor) -> list[Tensor]:
    """Return one [N, D] for each expert, or one that all share."""
    if isinstance(input, Tensor):
        check_tensor("input", input)
        if input.dim() not in (2, 3):
            raise ValueError(f"input: got shape {tuple(input.shape)}, expected [E, N, D], [N, D] or a list of E [N, D]")
        features = list(input.unbind(0)) if input.dim() == 3 else [input]
        shared = input.dim() == 2
    elif isinstance(input, (list, tuple)):
        features, shared = list(input), False
    else:
        raise TypeError(f"input: got {type(input).__name__}, expected a Tensor [E, N, D] or a list of E [N, D]")
    if not shared and len(features) != experts:
        raise ValueError(f"input: got {len(features)} experts, expected {experts} as linear_weight")
    for e, each in enumerate(features):
        name = "input" if isinstance(input, Tensor) else f"input[{e}]"
        check_floating(name, each, "a Tensor [N, D]")
        if each.dtype != features[0].dtype:
            raise TypeError(f"{name}: got dtype {each.dtype}, expected {features[0].dtype} as input[0]")
        if each.dim() != 2 or each.shape != features[0].shape:
            raise ValueError(f"{name}: got shape {tuple(each.shape)}, expected [N, D], the same for every expert")
        if each.shape[1] != width:
            raise ValueError(f"{name}: got {each.shape[1]} features, expected {width} as linear_weight")
        check_device(name, each, linear_weight, " as linear_weight")
    return features
