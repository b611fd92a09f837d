"""Log-sum-exps of similarities by label, and the contrastive losses made of them: validate, run one op, reduce."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import _settings
from .._checks import (
    as_int64,
    check_choice,
    check_class_vector,
    check_device,
    check_factor,
    check_flag,
    check_floating,
    check_int,
    check_int32,
    check_integers,
    check_keys,
    check_number,
    check_positive,
    check_shape,
    check_tensor,
    check_values,
    checks_on,
    compute_dtype,
    operand,
    product_dtype,
)
from .._smooth import quick_logaddexp
from ..ops._backend import BackendUnavailableError, plain_call, resolve
from ..ops.contrastive_loss import arguments as contrastive_loss
from ..ops.contrastive_loss.op import forward as contrastive_loss_forward
from ..ops.partitioned_logsumexp import plan
from ..ops.partitioned_logsumexp.arguments import SIGNATURE, Arguments
from ..ops.partitioned_logsumexp.op import OP, forward
from .rows import EMPTY_MEANS, REDUCTIONS, mean_over

#: Of contrastive losses; a query without positives counts in "mean", and does not in "mean_positives".
CONTRASTIVE_REDUCTIONS = (*REDUCTIONS, "mean_positives")
#: How far above 1 a norm may be where vectors are said to be normalised, in roundings of their dtype.
_ROUNDINGS = 8


class PartitionedLogSumExp(NamedTuple):
    """Of each query, float32 [N] (float64 for float64 queries)."""

    neg: Tensor  #: log-sum-exp of the logits of keys of other labels; -inf where there are none
    pos: Tensor  #: log-sum-exp of the logits of keys of the same label; -inf where there are none
    pos_sum: Tensor  #: sum of the similarities (without key_scale and key_bias) to keys of the same label
    num_pos: Tensor  #: how many keys have the same label; not differentiable


class SimilarityKeywords(TypedDict, total=False):
    """The options of ``partitioned_logsumexp`` that its result depends on, for type checkers."""

    scale: float | Tensor
    key_bias: Tensor | None
    key_scale: Tensor | None
    exclude: Tensor | Literal["self"] | None
    key_grad_rows: tuple[int, int] | None
    normalized: bool


class PartitionKeywords(SimilarityKeywords, total=False):
    """The options of ``partitioned_logsumexp``, for type checkers."""

    strategy: Literal["auto", "materialize", "chunked", "tiled"]


@overload
def partitioned_logsumexp(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor | None = None, *,
    separate_scale: Literal[False] = False, **options: Unpack[PartitionKeywords],
) -> PartitionedLogSumExp: ...  # fmt: skip
@overload
def partitioned_logsumexp(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor | None = None, *,
    separate_scale: Literal[True], **options: Unpack[PartitionKeywords],
) -> tuple[PartitionedLogSumExp, PartitionedLogSumExp]: ...  # fmt: skip
@overload
def partitioned_logsumexp(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor | None = None, *,
    separate_scale: bool = False, **options: Unpack[PartitionKeywords],
) -> PartitionedLogSumExp | tuple[PartitionedLogSumExp, PartitionedLogSumExp]: ...  # fmt: skip
def partitioned_logsumexp(
    query: Tensor,
    key: Tensor,
    query_label: Tensor,
    key_label: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    exclude: Tensor | Literal["self"] | None = None,
    key_grad_rows: tuple[int, int] | None = None,
    normalized: bool = False,
    separate_scale: bool = False,
    strategy: Literal["auto", "materialize", "chunked", "tiled"] = "auto",
) -> PartitionedLogSumExp | tuple[PartitionedLogSumExp, PartitionedLogSumExp]:
    """Return the log-sum-exps of scaled similarities to keys of the query's own label, and of the others, in one sweep.

    With similarities s_ij = scale * <query_i, key_j> and logits u_ij = key_scale_j * s_ij + key_bias_j,

        neg_i     = log sum of exp(u_ij) over the keys j of another label than query i
        pos_i     = log sum of exp(u_ij) over the keys j of the same label
        pos_sum_i = sum of s_ij over the keys j of the same label
        num_pos_i = number of those keys

    each without the key that ``exclude`` leaves out. Every contrastive loss of the library is a function of these. No
    N x M mask or one-hot is made, and no N x M similarities beyond a block of bounded size.

    Args:
        query: ``[N, D]``; float16, bfloat16, float32 or float64. Products run in its dtype (in the narrower one where
            ``key`` differs, in autocast's under autocast); sums and results are float32 (float64 for float64).
        key: ``[M, D]``. Where it is the same tensor as ``query``, the gradient takes one sweep for both.
        query_label: ``[N]``, any integer dtype; values of the int32 range.
        key_label: ``[M]``, likewise; None: the queries' labels. A label that no query has (such as -1) marks keys that
            are negative for all; with a ``key_bias`` of -inf they count nowhere.
        scale: a number or 0-dim tensor: the inverse temperature.
        key_bias: ``[M]``, added to the logits of each key; -inf takes a key out of ``neg`` and ``pos`` (out of
            ``pos_sum`` and ``num_pos`` its label does).
        key_scale: ``[M]``, multiplies the similarities of each key in the logits (not in ``pos_sum``).
        exclude: ``[N]``, any integer dtype: the key that each query leaves out, -1 for none; ``"self"``: query i leaves
            out key i (M must be N or more).
        key_grad_rows: ``(begin, end)``: only these rows of ``key`` receive a gradient, the others zero (a queue beside
            a batch). Default all, or none where ``key`` requires no gradient.
        normalized: a promise that rows of ``query`` and ``key`` have norm 1 at most, so that scores need no running
            maximum. Broken promises are found with checks on (``lt_kernels.set_checks(True)``); results are then wrong.
        separate_scale: with a ``scale`` tensor: return two results of the same values from the one sweep; gradients of
            the first reach everything but the scale, those of the second the scale alone. Both belong to one graph.
        strategy: ``"materialize"`` (similarities are kept from forward to backward), ``"chunked"`` (computed again in
            backward, a block at a time), ``"tiled"`` (Triton: they never leave the chip; D up to 256) or ``"auto"``.

    Returns:
        [`PartitionedLogSumExp`][lt_kernels.functional.PartitionedLogSumExp], or two with ``separate_scale``.

    Gradients flow to ``query``, ``key``, ``scale``, ``key_bias`` and ``key_scale``, exact for every upstream gradient;
    work for what requires none is left out.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.
        IndexError: ``exclude`` out of range, on the CPU or with checks on; on a GPU without checks it excludes nothing.
        NotImplementedError: forward-mode differentiation, ``torch.func`` transforms and second derivatives, except on
            the reference backend.
        BackendUnavailableError: a backend or strategy asked for by name cannot run the call.

    Example:
        >>> features = F.normalize(torch.randn(8, 32), dim=1).requires_grad_()
        >>> labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        >>> sums = partitioned_logsumexp(features, features, labels, scale=1 / 0.07, exclude="self")
        >>> sums.num_pos
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
        >>> F.softplus(sums.neg - sums.pos).mean().backward()
    """
    dtype = _check_vectors(query, key)
    arithmetic = compute_dtype(dtype)
    n, m = query.shape[0], key.shape[0]
    if key_label is None:
        if m != n:
            raise ValueError(f"key_label: got None with {m} keys for {n} queries, expected one label per key")
        key_label = query_label
    labels = _labels("query_label", query_label, n, query)
    of_keys = labels if key_label is query_label else _labels("key_label", key_label, m, query)
    fixed_scale, learned_scale = check_factor("scale", scale, query, arithmetic)
    key_bias = check_class_vector("key_bias", key_bias, m, query, arithmetic, of="key")
    key_scale = check_class_vector("key_scale", key_scale, m, query, arithmetic, of="key")
    left_out = _exclude(exclude, n, m, query)
    begin, end = _rows(key_grad_rows, m)
    check_flag("normalized", normalized)
    check_flag("separate_scale", separate_scale)
    if separate_scale and learned_scale is None:
        raise ValueError(f"separate_scale: got True with scale {scale!r}, expected a 0-dim tensor as scale")
    check_choice("strategy", strategy, plan.STRATEGIES)
    if normalized:
        _check_norms("query", query)
        _check_norms("key", key)

    same = key is query
    q = query.to(dtype).contiguous()
    k = None if same and (begin, end) == (0, m) else key.to(dtype).contiguous()
    backend = resolve(OP, q)
    reason = f"it needs the backend 'triton', not {backend!r}" if backend != "triton" else None
    reason = reason or plan.tiled_reason(q.shape[1], dtype)
    if strategy == "tiled" and reason is not None:
        raise BackendUnavailableError(f"strategy 'tiled' cannot run {OP}: {reason}")
    learns = any(t is not None and t.requires_grad for t in (q, k, key_bias, key_scale))
    training = torch.is_grad_enabled() and learns
    chosen = plan.choose(n, m, dtype, training, reason is None, strategy, _settings.memory_budget)
    with_slopes = learned_scale is not None and learned_scale.requires_grad and torch.is_grad_enabled()
    neg, pos, pos_sum, num_pos, _, _, _, of_scale = forward(
        *SIGNATURE.flatten(Arguments(
            q, k, labels, of_keys, left_out, key_bias, key_scale, learned_scale, fixed_scale, begin, end, normalized
        )),
        with_slopes, separate_scale, chosen, _settings.memory_budget, backend,
    )  # fmt: skip
    result = PartitionedLogSumExp(neg, pos, pos_sum, num_pos)
    if not separate_scale:
        return result
    neg, pos, pos_sum = of_scale.unbind(0)
    return result, PartitionedLogSumExp(neg, pos, pos_sum, num_pos)


def supervised_contrastive(
    query: Tensor,
    key: Tensor,
    query_label: Tensor,
    key_label: Tensor | None = None,
    *,
    temperature: float | Tensor,
    form: Literal["out", "in"] = "out",
    key_bias: Tensor | None = None,
    exclude: Tensor | Literal["self"] | None = None,
    key_grad_rows: tuple[int, int] | None = None,
    normalized: bool = False,
    ignore_index: int | None = None,
    reduction: Literal["none", "mean", "sum", "mean_positives"] = "mean",
    empty_mean: Literal["nan", "zero"] = "nan",
) -> Tensor:
    """Supervised contrastive loss of queries against keys (Khosla et al., *Supervised Contrastive Learning*, 2020).

    With u_ij = <query_i, key_j> / temperature + key_bias_j and P_i keys of query i's label,

        out    loss_i = log sum over all j of exp(u_ij) - 1/P_i sum over positives p of <query_i, key_p> / temperature
        in     loss_i = log sum over all j of exp(u_ij) - log[ 1/P_i sum over positives p of exp(u_ip) ]

    (equations 2 and 3 there, without their factor temperature / base temperature). Without positives it is 0.

    Args:
        temperature: a number or 0-dim tensor, > 0 (values of a tensor are not checked).
        form: where the mean over positives is taken: outside or inside the logarithm.
        ignore_index: queries and keys of this label take no part, as if their rows were dropped; None (the default):
            every label is one, -1 and -100 too.
        reduction: ``"none"`` ([N]), ``"mean"`` (over all queries, those without positives too), ``"sum"``, or
            ``"mean_positives"``: the mean over the queries that have positives, 0 where none has.
        empty_mean: the ``"mean"`` over no query: ``"nan"`` as in torch, or ``"zero"``.

    The other arguments are those of [`partitioned_logsumexp`][lt_kernels.functional.partitioned_logsumexp]; in a batch
    against itself, ``exclude="self"``.

    Returns:
        0-dim, or [N]; float32 (float64 for float64 queries).

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError, BackendUnavailableError: as ``partitioned_logsumexp``.

    Example:
        >>> features = F.normalize(torch.randn(8, 32), dim=1).requires_grad_()
        >>> labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        >>> supervised_contrastive(features, features, labels, temperature=0.07, exclude="self").backward()
    """
    if normalized is True and checks_on():
        _check_vectors(query, key)
        _check_norms("query", query)
        _check_norms("key", key)
    plain = plain_call(
        "supervised_contrastive", query, key, query_label, key_label, temperature, form, key_bias, exclude,
        key_grad_rows, normalized, ignore_index, reduction, empty_mean, _settings.memory_budget,
    )  # fmt: skip
    if plain is not None:
        return plain
    check_choice("form", form, ("out", "in"))
    check_choice("reduction", reduction, CONTRASTIVE_REDUCTIONS)
    check_choice("empty_mean", empty_mean, EMPTY_MEANS)
    if not isinstance(temperature, Tensor):
        temperature = operand(check_positive("temperature", check_number("temperature", temperature)))
        if isinstance(temperature, Tensor):
            temperature = temperature.to(check_tensor("query", query).device)
    counted = None
    if ignore_index is not None:
        check_int("ignore_index", ignore_index, kind="an int or None")
        query, key, counted, key_bias = _without(ignore_index, query, key, query_label, key_label, key_bias)
    if _is_one_operator(query, key, key_bias):
        mean = "mean" if counted is None else "mean_counted"
        return _one_operator(
            query, key, query_label, key_label, 1 / temperature, key_bias, exclude, key_grad_rows, normalized,
            counted=counted, two=form == "in", reduction=mean if reduction == "mean" else reduction,
            empty_is_zero=empty_mean == "zero",
        )  # fmt: skip
    sums = partitioned_logsumexp(
        query, key, query_label, key_label, scale=1 / temperature, key_bias=key_bias, exclude=exclude,
        key_grad_rows=key_grad_rows, normalized=normalized,
    )  # fmt: skip
    some = sums.num_pos > 0
    count = sums.num_pos.clamp_min(1)
    if form == "out":
        loss = quick_logaddexp(sums.neg, sums.pos) - sums.pos_sum / count
    else:
        # a softplus, but F.softplus is the identity from 20 on
        loss = quick_logaddexp(sums.neg - sums.pos, torch.zeros_like(sums.pos)) + count.log()
    if counted is not None:
        some = some & counted
    loss = torch.where(some, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean_positives":
        return loss.sum() / some.sum().clamp_min(1)
    if counted is None and empty_mean == "nan":
        return loss.mean()
    count = torch.ones_like(some).sum() if counted is None else counted.sum()
    return mean_over(loss, count, empty_mean)


def _is_one_operator(query: Tensor, key: Tensor, key_bias: Tensor | None) -> bool:
    """Return whether a loss runs as one operator: on GPUs, without a bias that learns. The reference is the composition
    of the general operator's results."""
    dtype = _check_vectors(query, key)
    if isinstance(key_bias, Tensor) and key_bias.requires_grad and torch.is_grad_enabled():
        return False
    return resolve(OP, query if query.dtype == dtype else query.new_empty((0,), dtype=dtype)) == "triton"


def _one_operator(
    query: Tensor, key: Tensor, query_label: Tensor, key_label: Tensor | None, scale: float | Tensor,
    key_bias: Tensor | None, exclude: Tensor | Literal["self"] | None, key_grad_rows: tuple[int, int] | None,
    normalized: bool, *, counted: Tensor | None, two: bool, reduction: str, empty_is_zero: bool,
) -> Tensor:  # fmt: skip
    """Return the loss of one call of ``contrastive_loss``; checks are those of ``partitioned_logsumexp``, in its order.

    Labels are read as they are, and a row that leaves out itself needs no vector.
    """
    dtype = _check_vectors(query, key)
    n, m = query.shape[0], key.shape[0]
    if key_label is None:
        if m != n:
            raise ValueError(f"key_label: got None with {m} keys for {n} queries, expected one label per key")
        key_label = query_label
    labels = _whole_labels("query_label", query_label, n, query)
    of_keys = labels if key_label is query_label else _whole_labels("key_label", key_label, m, query)
    if labels.dtype != of_keys.dtype:
        labels, of_keys = labels.to(torch.int64), of_keys.to(torch.int64)
    fixed_scale, learned_scale = check_factor("scale", scale, query, torch.float32)
    key_bias = check_class_vector("key_bias", key_bias, m, query, torch.float32, of="key")
    left_out = None if exclude is None else _left_out(exclude, n, m, query)
    begin, end = _rows(key_grad_rows, m)
    check_flag("normalized", normalized)
    if normalized:
        _check_norms("query", query)
        _check_norms("key", key)
    q = query.to(dtype).contiguous()
    k = None if key is query and (begin, end) == (0, m) else key.to(dtype).contiguous()
    a = contrastive_loss.Arguments(
        q, k, labels, of_keys, left_out, key_bias, None, None, None, None,
        counted, learned_scale, fixed_scale, 1.0, 0.0, begin, end, isinstance(exclude, str), two, normalized,
        reduction, empty_is_zero,
    )  # fmt: skip
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k))
    tiled = plan.tiled_reason(q.shape[1], dtype) is None
    budget = _settings.memory_budget
    chosen = plan.choose(n, m, dtype, training, tiled, "auto", budget)
    with_slopes = learned_scale is not None and learned_scale.requires_grad and torch.is_grad_enabled()
    return contrastive_loss_forward(
        *contrastive_loss.SIGNATURE.flatten(a), with_slopes, chosen, budget, "triton"
    )[0]  # fmt: skip


def _whole_labels(name: str, value: Any, size: int, query: Tensor) -> Tensor:
    """Return labels in a dtype that kernels compare: int32 or int64."""
    value = _index_vector(name, value, size, query)
    if value.dtype.itemsize >= 4 and value.dtype not in (torch.int32, torch.int64):
        value = as_int64(name, value)
    elif value.dtype.itemsize < 4:
        value = value.to(torch.int32)
    if value.dtype == torch.int64:
        value = check_values(check_int32, name, value)
    return value.detach().contiguous()


def _left_out(exclude: Any, n: int, m: int, query: Tensor) -> Tensor | None:
    """Return the columns that rows leave out; None where these are the rows' own."""
    if isinstance(exclude, str):
        check_choice("exclude", exclude, ("self",))
        if m < n:
            raise ValueError(f"exclude: got 'self' with {m} keys for {n} queries, expected a key for each query")
        return None
    value = as_int64("exclude", _index_vector("exclude", exclude, n, query))
    return check_values(check_keys, "exclude", value, m).contiguous()


def _without(
    ignore_index: int, query: Tensor, key: Tensor, query_label: Any, key_label: Any, key_bias: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries and keys, which queries count [N], and the bias of keys with -inf for those that do not [M].

    Vectors that do not count are zeros: what is not finite in them would reach other rows.
    """
    dtype = compute_dtype(_check_vectors(query, key))
    of_keys, name = (query_label, "query_label") if key_label is None else (key_label, "key_label")
    counted = as_int64("query_label", _index_vector("query_label", query_label, len(query), query)) != ignore_index
    left_out = as_int64(name, _index_vector(name, of_keys, len(key), query)) == ignore_index
    bias = check_class_vector("key_bias", key_bias, len(key), query, dtype, of="key")
    bias = query.new_zeros((len(key),), dtype=dtype) if bias is None else bias
    same = key is query and of_keys is query_label
    query = query.masked_fill(~counted[:, None], 0.0)
    key = query if same else key.masked_fill(left_out[:, None], 0.0)
    return query, key, counted, bias.masked_fill(left_out, -math.inf)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_vectors(query: Tensor, key: Tensor) -> torch.dtype:
    """Check the vectors; return the dtype of their products."""
    for name, value in (("query", query), ("key", key)):
        check_floating(name, value)
        if value.dim() != 2:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected {'[N, D]' if name == 'query' else '[M, D]'}"
            )
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key: got {key.shape[1]} features (shape {tuple(key.shape)}), expected {query.shape[1]} as query"
        )
    if query.shape[1] == 0:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected at least one feature")
    check_device("key", key, query, " as query")
    return product_dtype(query, key, "key", "query")


def _index_vector(name: str, value: Any, size: int, query: Tensor) -> Tensor:
    check_integers(name, value, lambda: f"a Tensor [{size}] of integers")
    check_shape(name, value, (size,), expected=lambda: f"[{size}]")
    check_device(name, value, query, " as query")
    return value


def _labels(name: str, value: Any, size: int, query: Tensor) -> Tensor:
    value = _index_vector(name, value, size, query)
    if value.dtype.itemsize >= 4 and value.dtype != torch.int32:
        value = check_values(check_int32, name, as_int64(name, value))
    return value.detach().to(torch.int32).contiguous()


def _exclude(exclude: Any, n: int, m: int, query: Tensor) -> Tensor | None:
    if exclude is None:
        return None
    value = _left_out(exclude, n, m, query)
    if value is None:
        return torch.arange(n, dtype=torch.int32, device=query.device)
    # one out of range, on a GPU, excludes nothing
    return torch.where((value >= 0) & (value < m), value, -1).to(torch.int32).contiguous()


def _rows(rows: tuple[int, int] | None, m: int) -> tuple[int, int]:
    if rows is None:
        return 0, m
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        raise TypeError(f"key_grad_rows: got {rows!r}, expected (begin, end)")
    begin, end = rows
    for value in (begin, end):
        check_int("key_grad_rows", value, kind="two ints")
    if not 0 <= begin <= end <= m:
        raise ValueError(f"key_grad_rows: got {(begin, end)}, expected 0 <= begin <= end <= {m}")
    return begin, end


def _check_norms(name: str, value: Tensor) -> None:
    if not checks_on() or value.numel() == 0:
        return
    norms = torch.linalg.vector_norm(value.detach(), dim=1, dtype=torch.float64)
    limit = 1 + _ROUNDINGS * torch.finfo(value.dtype).eps * math.sqrt(value.shape[1])
    if not bool((norms <= limit).all()):
        row = int((~(norms <= limit)).nonzero()[0])
        raise ValueError(
            f"{name}: got norm {float(norms[row]):g} in row {row}, expected at most 1 with normalized=True"
        )
