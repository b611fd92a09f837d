"""Hold a kernel to float64 truth: the oracle, the error budget and sample inputs that our own tests use.

The rule (``assert_within_budget``): a result passes if its error against float64 is at most twice the error that plain
PyTorch makes in the same dtype, plus a few roundings of the result's own dtype. Nothing is compared with a fixed
tolerance.

Example:
    >>> sample = sample_inputs(8, 10, dtype=torch.float32, options=("class_bias", "margin"))
    >>> check_margin_cross_entropy(margin_cross_entropy, sample)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ContrastiveSample",
    "Sample",
    "assert_within_budget",
    "check_expert_cross_entropy",
    "check_linear_margin_cross_entropy",
    "check_margin_cross_entropy",
    "check_partitioned_logsumexp",
    "contrastive_sample_inputs",
    "dense_expert_cross_entropy",
    "dense_expert_divergence",
    "dense_linear_margin_cross_entropy",
    "dense_margin_cross_entropy",
    "dense_partitioned_logsumexp",
    "expert_sample_inputs",
    "linear_sample_inputs",
    "sample_inputs",
]

#: Everything of ``margin_cross_entropy`` that a sample can carry, beside the plain keyword options.
TENSOR_OPTIONS = ("weight", "class_bias", "class_scale", "margin", "scale", "mixed_target", "mix_lambda")
#: The same of ``partitioned_logsumexp``.
CONTRASTIVE_OPTIONS = ("key_bias", "key_scale", "scale", "exclude")


def dense_margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    class_bias: Tensor | None = None,
    class_scale: Tensor | None = None,
    margin: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
    margin_type: str = "additive",
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mixed_target: Tensor | None = None,
    mix_lambda: float | Tensor | None = None,
) -> Tensor:
    """``margin_cross_entropy`` written with dense masks and ``F.cross_entropy``: what a user would write without it.

    Every dtype is the input's, as in eager code; give float64 for the truth. Only autograd differentiates it.
    """

    def per_class(value: Tensor) -> Tensor:
        return value.to(input.dtype).reshape(-1, *[1] * (input.dim() - 2)) if input.dim() > 1 else value.to(input.dtype)

    def one(labels: Tensor, reduction: str) -> Tensor:
        cosine = input if class_scale is None else input * per_class(class_scale)
        shifted = cosine
        if margin is not None:
            m = per_class(margin.expand(classes) if isinstance(margin, Tensor) else input.new_full((classes,), margin))
            if margin_type == "additive":
                moved = cosine - m
            else:
                # the sine's slope at cos = +-1 is infinite; clamping keeps autograd finite there
                sine = (1 - cosine.square()).clamp_min(1e-7).sqrt()
                moved = torch.where(cosine < -m.cos(), cosine - m * m.sin(), cosine * m.cos() - sine * m.sin())
            safe = labels.long().clamp(0, classes - 1)
            is_target = F.one_hot(safe, classes).bool()
            is_target = is_target.movedim(-1, 1) if input.dim() > 2 else is_target
            shifted = torch.where(is_target, moved, cosine)
        logits = scale * shifted
        if class_bias is not None:
            logits = logits + per_class(class_bias)
        if not labels.is_floating_point():
            labels = labels.long()
        return F.cross_entropy(
            logits,
            labels.to(logits.dtype) if labels.is_floating_point() else labels,
            None if weight is None else weight.to(logits.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    if mixed_target is None:
        return one(target, reduction)
    assert mix_lambda is not None
    if isinstance(mix_lambda, Tensor) and mix_lambda.dim() > 0 and reduction != "none":
        parts = []
        for labels, share in ((target, mix_lambda), (mixed_target, 1 - mix_lambda)):
            valid = (labels != ignore_index).to(input.dtype)
            w = valid if weight is None else weight.to(input.dtype)[labels.long().clamp(0, classes - 1)] * valid
            total = w.sum() if reduction == "mean" else 1.0
            parts.append((share * one(labels, "none")).sum() / total)
        return parts[0] + parts[1]
    return mix_lambda * one(target, reduction) + (1 - mix_lambda) * one(mixed_target, reduction)


def dense_linear_margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    normalize: bool = False,
    **options: Any,
) -> Tensor:
    """``linear_margin_cross_entropy`` written with ``F.linear`` (and ``F.normalize``) and all logits in memory."""
    shape = linear_weight.shape
    if normalize:
        input, linear_weight = F.normalize(input, dim=-1), F.normalize(linear_weight, dim=-1)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.reshape(-1, shape[-1]), bias)
    return dense_margin_cross_entropy(logits.reshape(*input.shape[:-1], *shape[:-1]), target, **options)


def dense_expert_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    log_prior: Tensor | None = None,
    taus: Sequence[float] | Tensor | None = None,
    class_bias: Tensor | None = None,
    expert_reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """``expert_cross_entropy`` as a loop over experts, as a user would write it without it; logits ``[E, N, C]``."""
    losses = []
    for e, x in enumerate(logits):
        bias = None if class_bias is None else (class_bias[e] if class_bias.dim() == 2 else class_bias).to(x.dtype)
        if log_prior is not None and taus is not None:
            prior = taus[e] * log_prior.to(x.dtype)
            bias = prior if bias is None else prior + bias
        losses.append(dense_margin_cross_entropy(x, target, class_bias=bias, **options))
    stacked = torch.stack(losses)
    if expert_reduction == "none":
        return stacked
    return stacked.mean(0) if expert_reduction == "mean" else stacked.sum(0)


def dense_expert_divergence(
    logits: Tensor,
    kind: str = "to_mean",
    temperature: float | Tensor = 1.0,
    *,
    detach_mean: bool = True,
    reduction: str = "mean",
    expert_reduction: str = "sum",
) -> Tensor:
    """``expert_divergence`` with ``F.kl_div``, pair by pair; logits ``[E, N, C]``."""
    u = logits / (temperature.to(logits.dtype) if isinstance(temperature, Tensor) else temperature)
    log_p = u.log_softmax(-1)

    def kl(log_q: Tensor, log_r: Tensor) -> Tensor:
        return F.kl_div(log_r, log_q, reduction="none", log_target=True).sum(-1)

    if kind == "to_mean":
        log_mean = u.mean(0).log_softmax(-1)
        log_mean = log_mean.detach() if detach_mean else log_mean
        value = torch.stack([kl(log_mean, each) for each in log_p])
    else:
        value = torch.stack([torch.stack([kl(each, other) for other in log_p]).sum(0) for each in log_p])
    value = value.sum(0) if expert_reduction == "sum" else value
    if reduction == "none":
        return value
    return value.mean(-1) if reduction == "mean" else value.sum(-1)


def dense_partitioned_logsumexp(
    query: Tensor,
    key: Tensor,
    query_label: Tensor,
    key_label: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    key_bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    exclude: Tensor | str | None = None,
    key_grad_rows: tuple[int, int] | None = None,
    normalized: bool = False,
    separate_scale: bool = False,
) -> Any:
    """``partitioned_logsumexp`` with all similarities and two masks in memory.

    ``normalized`` changes nothing here.

    Returns:
        (neg, pos, pos_sum, num_pos), or two such with ``separate_scale``.
    """

    def fixed(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    if separate_scale:
        rest: dict[str, Any] = {"exclude": exclude, "key_grad_rows": key_grad_rows}
        vectors: dict[str, Any] = {"key_bias": key_bias, "key_scale": key_scale}
        without = {name: fixed(value) for name, value in vectors.items()}
        of_scale = [fixed(query), fixed(key), query_label, key_label]
        return (
            dense_partitioned_logsumexp(query, key, query_label, key_label, scale=fixed(scale), **vectors, **rest),
            dense_partitioned_logsumexp(*of_scale, **{"scale": scale, **without, **rest}),
        )
    dtype, m = query.dtype, key.shape[0]
    if key_grad_rows is not None:
        begin, end = key_grad_rows
        key = torch.cat([key[:begin].detach(), key[begin:end], key[end:].detach()])
    similarity = (scale.to(dtype) if isinstance(scale, Tensor) else scale) * (query @ key.t())
    logits = similarity if key_scale is None else key_scale.to(dtype) * similarity
    logits = logits if key_bias is None else logits + key_bias.to(dtype)
    labels_of_keys = query_label if key_label is None else key_label
    same = query_label.long()[:, None] == labels_of_keys.long()[None, :]
    allowed = torch.ones_like(same)
    if exclude is not None:
        columns = torch.arange(m, device=query.device)
        left_out = columns[: len(same)] if isinstance(exclude, str) else exclude
        allowed = left_out.long()[:, None] != columns

    def total(mask: Tensor) -> Tensor:
        masked = logits.masked_fill(~mask, -math.inf)
        none = (masked == -math.inf).all(1)  # these rows have no gradient, where autograd would make NaN
        return masked.masked_fill(none[:, None], 0.0).logsumexp(1).masked_fill(none, -math.inf)

    positive = same & allowed
    count = positive.sum(1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return total(~same & allowed), total(positive), similarity.masked_fill(~positive, 0.0).sum(1), count


def assert_within_budget(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    what: str = "result",
    factor: float = 2.0,
    roundings: float | None = None,
) -> None:
    """Raise AssertionError unless max|actual - truth| <= factor max|eager - truth| + roundings eps max|truth|.

    Args:
        actual: the kernel's result.
        eager: plain PyTorch's result in the same dtype.
        truth: the float64 result.
        what: name used in the message.
        factor: multiple of eager's error that is allowed.
        roundings: how many roundings of ``actual``'s dtype are allowed on top, relative to the largest true value;
            default 1 for float16 and bfloat16, 4 for float32, 32 for float64 (the truth itself is then no more exact).

    Infinite and NaN entries must agree with the truth exactly in kind and place.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    a, e, t = (value.detach().double().cpu() for value in (actual, eager, truth))
    finite = t.isfinite()
    if not torch.equal(a.isnan(), t.isnan()) or not torch.equal(a[~finite & ~t.isnan()], t[~finite & ~t.isnan()]):
        raise AssertionError(f"{what}: non-finite entries differ from the truth")
    if not bool(finite.any()):
        return
    a, e, t = a[finite], e[finite], t[finite]
    if roundings is None:
        roundings = {torch.float32: 4.0, torch.float64: 32.0}.get(actual.dtype, 1.0)
    tiny = torch.finfo(actual.dtype).smallest_normal
    error = float((a - t).abs().max())
    eager_error = float((e - t).abs().nan_to_num(0.0, 0.0, 0.0).max())
    allowed = factor * eager_error + roundings * torch.finfo(actual.dtype).eps * float(t.abs().max()) + tiny
    if not error <= allowed:
        raise AssertionError(
            f"{what}: error {error:.3e} against float64 exceeds the budget {allowed:.3e} (eager: {eager_error:.3e})"
        )


@dataclass
class Sample:
    """One call of ``margin_cross_entropy``: positional tensors and keyword options."""

    input: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def converted(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Sample:
        """A fresh copy with detached floating tensors in ``dtype`` (requiring gradients where this one's do)."""

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            copy = value.detach().to(device or value.device)
            if copy.is_floating_point():
                copy = copy.to(dtype).requires_grad_(value.requires_grad)
            return copy

        return Sample(convert(self.input), convert(self.target), {k: convert(v) for k, v in self.options.items()})

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that require gradients, by argument name."""
        named = {"input": self.input, "target": self.target, **self.options}
        return {name: value for name, value in named.items() if isinstance(value, Tensor) and value.requires_grad}


def sample_inputs(
    rows: int,
    classes: int,
    positions: tuple[int, ...] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    options: Iterable[str] = (),
    requires_grad: Iterable[str] = ("input",),
    soft: bool = False,
    ignored: float = 0.0,
    spread: float = 3.0,
    seed: int = 0,
    **keywords: Any,
) -> Sample:
    """Random inputs ``[rows, classes, *positions]`` for ``margin_cross_entropy``.

    Args:
        options: which of ``TENSOR_OPTIONS`` to draw (``"mixed_target"`` draws ``mix_lambda`` too, as a number, unless
            ``"mix_lambda"`` is named: then a tensor shaped like the target).
        requires_grad: which arguments require gradients.
        soft: class probabilities instead of class indices.
        ignored: share of class-index targets set to ``ignore_index`` (-100 unless in ``keywords``).
        spread: standard deviation of the logits; with ``margin_type="angular"`` they are cosines instead.
        keywords: passed on to the loss as they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low

    def labels() -> Tensor:
        index = torch.randint(0, classes, (rows, *positions), generator=generator)
        skip = uniform(rows, *positions) < ignored
        return index.masked_fill(skip, keywords.get("ignore_index", -100))

    options = tuple(options)
    unknown = set(options) - set(TENSOR_OPTIONS)
    if unknown:
        raise ValueError(f"options: got {sorted(unknown)}, expected some of {TENSOR_OPTIONS}")
    angular = keywords.get("margin_type") == "angular"
    logits = torch.randn(rows, classes, *positions, generator=generator, dtype=torch.float64) * spread
    if angular:
        logits = (logits / spread).tanh() * 0.95
    target: Tensor = torch.randn(rows, classes, *positions, generator=generator, dtype=torch.float64).softmax(1)
    target = target if soft else labels()
    drawn: dict[str, Any] = {
        "weight": uniform(classes, low=0.2, high=2.0),
        "class_bias": uniform(classes, low=1e-4, high=1.0).log(),
        "class_scale": uniform(classes, low=0.5, high=1.0 if angular else 1.5),
        "margin": uniform(classes, low=0.0, high=0.5),
        "scale": torch.tensor(1.7, dtype=torch.float64),
        "mixed_target": labels(),
        "mix_lambda": uniform(rows, *positions),
    }
    chosen = {name: drawn[name] for name in options}
    if "mixed_target" in options and "mix_lambda" not in options:
        chosen["mix_lambda"] = 0.3
    sample = Sample(logits, target, {**chosen, **keywords}).converted(dtype, device)
    requires = set(requires_grad)
    for name, value in {"input": sample.input, "target": sample.target, **sample.options}.items():
        if name in requires and isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    return sample


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
    """Random inputs for ``linear_margin_cross_entropy``: features ``[rows, width]``; ``linear_weight`` and
    ``linear_bias`` (None with ``normalize``) are among the options. ``keywords``: those of ``sample_inputs``.
    """
    requires = tuple(requires_grad)
    sample = sample_inputs(
        rows, classes, positions, dtype=torch.float64, requires_grad=requires, spread=spread, seed=seed, **keywords
    )
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

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


def expert_sample_inputs(
    experts: int,
    rows: int,
    classes: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    options: Iterable[str] = (),
    requires_grad: Iterable[str] = ("input",),
    spread: float = 3.0,
    seed: int = 0,
    **keywords: Any,
) -> Sample:
    """Random inputs for ``expert_cross_entropy``: logits ``[experts, rows, classes]`` as ``input``.

    ``options``: those of ``sample_inputs`` (one value for all experts), ``"log_prior"`` (with ``taus`` 0, 1, 2, ...
    unless ``"taus"`` or ``"class taus"`` is named: tensors ``[E]``, ``[E, C]``) and ``"expert_bias"``, a ``class_bias``
    ``[E, C]``. ``keywords``: those of ``sample_inputs``, or of the loss.
    """
    options, requires = tuple(options), tuple(requires_grad)
    own = ("log_prior", "taus", "class taus", "expert_bias")
    sample = sample_inputs(
        rows,
        classes,
        dtype=torch.float64,
        options=[name for name in options if name not in own],
        requires_grad=requires,
        spread=spread,
        seed=seed,
        **keywords,
    )
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(experts, rows, classes) * spread
    if keywords.get("margin_type") == "angular":
        logits = (logits / spread).tanh() * 0.95
    drawn: dict[str, Any] = {}
    if "log_prior" in options:
        # multiples of 1/64, so that products with small whole taus are exact: float64 is then a truth for float64 too
        drawn["log_prior"] = ((normal(classes) * 2).log_softmax(0) * 64).round() / 64
        drawn["taus"] = [float(e) for e in range(experts)]
        if "taus" in options:
            drawn["taus"] = normal(experts)
        if "class taus" in options:
            drawn["taus"] = normal(experts, classes)
    if "expert_bias" in options:
        drawn["class_bias"] = normal(experts, classes)
    for name, value in drawn.items():
        if isinstance(value, Tensor):
            value.requires_grad_(name in requires)
    logits.requires_grad_("input" in requires)
    return Sample(logits, sample.target, {**sample.options, **drawn}).converted(dtype, device)


def _run(function: Callable[..., Tensor], sample: Sample, upstream: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
    loss = function(sample.input, sample.target, **sample.options)
    leaves = sample.differentiable
    total = (loss * torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device)).sum()
    grads = torch.autograd.grad(total, list(leaves.values())) if leaves else ()
    return loss, dict(zip(leaves, grads, strict=True))


def check_margin_cross_entropy(
    function: Callable[..., Tensor],
    sample: Sample,
    *,
    upstream: Tensor | float = 1.0,
    factor: float = 2.0,
    roundings: float | None = None,
    dense: Callable[..., Tensor] = dense_margin_cross_entropy,
) -> None:
    """Hold ``function``'s value and every gradient of ``sample`` to the error budget.

    Args:
        function: called as ``margin_cross_entropy(input, target, **options)``; returns the loss.
        sample: its tensors that require gradients are the ones checked.
        upstream: gradient of the loss: a number, or a tensor shaped like the loss.
        dense: defines what ``function`` computes; called like it, with float64 tensors and with the sample's own.
    """
    truth_loss, truth_grads = _run(dense, sample.converted(torch.float64), upstream)
    eager_loss, eager_grads = _run(dense, sample.converted(sample.input.dtype), upstream)
    loss, grads = _run(function, sample, upstream)
    expected = torch.float64 if sample.input.dtype == torch.float64 else torch.float32
    assert loss.dtype == expected, f"loss: dtype {loss.dtype}, expected {expected}"
    assert_within_budget(loss, eager_loss, truth_loss, "loss", factor, roundings)
    for name, grad in grads.items():
        assert_within_budget(grad, eager_grads[name], truth_grads[name], f"gradient of {name}", factor, roundings)


def check_linear_margin_cross_entropy(
    function: Callable[..., Tensor], sample: Sample, *, dense: Callable[..., Tensor] | None = None, **budget: Any
) -> None:
    """The same for ``function(input, linear_weight, target, **options)`` and a sample of ``linear_sample_inputs``."""

    def in_order(input: Tensor, target: Tensor, linear_weight: Tensor, **options: Any) -> Tensor:
        return function(input, linear_weight, target, **options)

    check_margin_cross_entropy(in_order, sample, dense=dense or dense_linear_margin_cross_entropy, **budget)


def check_expert_cross_entropy(function: Callable[..., Tensor], sample: Sample, **budget: Any) -> None:
    """The same for ``expert_cross_entropy(logits, target, **options)`` and a sample of ``expert_sample_inputs``."""
    check_margin_cross_entropy(function, sample, dense=dense_expert_cross_entropy, **budget)


@dataclass
class ContrastiveSample:
    """One call of ``partitioned_logsumexp``: positional tensors and keyword options."""

    query: Tensor
    key: Tensor  # may be the same tensor as query
    query_label: Tensor
    key_label: Tensor | None  # None: those of the queries
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The positional ones."""
        return self.query, self.key, self.query_label, self.key_label

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All there are, by argument name; a key that is the query is left out."""
        named = {"query": self.query, "key": self.key, "query_label": self.query_label, "key_label": self.key_label}
        if self.key is self.query:
            del named["key"]
        return {name: value for name, value in {**named, **self.options}.items() if isinstance(value, Tensor)}

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Those that require gradients."""
        return {name: value for name, value in self.tensors.items() if value.requires_grad}

    def converted(self, dtype: torch.dtype, device: torch.device | str | None = None) -> ContrastiveSample:
        """A fresh copy with detached floating tensors in ``dtype`` (requiring gradients where this one's do)."""

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            copy = value.detach().to(device or value.device)
            if copy.is_floating_point():
                copy = copy.to(dtype).requires_grad_(value.requires_grad)
            return copy

        query = convert(self.query)
        key = query if self.key is self.query else convert(self.key)
        options = {name: convert(value) for name, value in self.options.items()}
        return ContrastiveSample(query, key, convert(self.query_label), convert(self.key_label), options)

    def apart(self) -> ContrastiveSample:
        """The same with keys that are a tensor of their own."""
        key = self.key.detach().clone().requires_grad_(self.key.requires_grad)
        labels = self.query_label if self.key_label is None else self.key_label
        return ContrastiveSample(self.query, key, self.query_label, labels, dict(self.options))


def contrastive_sample_inputs(
    rows: int,
    width: int,
    keys: int | None,
    *,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    options: Iterable[str] = (),
    requires_grad: Iterable[str] = ("query", "key"),
    label_dtype: torch.dtype = torch.int64,
    unlabelled: float = 0.0,
    masked: float = 0.0,
    disjoint: bool = False,
    normalized: bool = False,
    spread: float = 3.0,
    seed: int = 0,
    **keywords: Any,
) -> ContrastiveSample:
    """Random inputs for ``partitioned_logsumexp``: queries ``[rows, width]`` and keys ``[keys, width]``.

    Args:
        keys: None: the queries are the keys too, with the queries' labels.
        classes: how many labels there are.
        options: which of ``CONTRASTIVE_OPTIONS`` to draw; ``"scale"`` is a 0-dim tensor, ``"exclude"`` a key for most
            queries.
        requires_grad: which arguments require gradients.
        unlabelled: share of keys with the label -1, which no query has.
        masked: share of keys with the label -1 and a ``key_bias`` of -inf.
        disjoint: no key has a query's label.
        normalized: vectors of norm 1; passed on.
        spread: standard deviation of the similarities, unless ``normalized``.
        keywords: passed on as they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low

    def vectors(count: int) -> Tensor:
        x = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return F.normalize(x, dim=1) if normalized else x * (spread / width**0.5) ** 0.5

    options, requires = tuple(options), set(requires_grad)
    unknown = set(options) - set(CONTRASTIVE_OPTIONS)
    if unknown:
        raise ValueError(f"options: got {sorted(unknown)}, expected some of {CONTRASTIVE_OPTIONS}")
    m = rows if keys is None else keys
    query = vectors(rows)
    key = query if keys is None else vectors(m)
    query_label = torch.randint(0, classes, (rows,), generator=generator)
    key_label = torch.randint(0, classes, (m,), generator=generator) if keys is not None else None
    drawn: dict[str, Any] = {
        "key_bias": uniform(m, low=1e-4, high=1.0).log(),
        "key_scale": uniform(m, low=0.5, high=1.5),
        "scale": torch.tensor(1.7, dtype=torch.float64),
        "exclude": torch.randint(-1, max(m, 1), (rows,), generator=generator) if m > 0 else torch.full((rows,), -1),
    }
    chosen = {name: drawn[name] for name in options}
    if key_label is not None:
        key_label = key_label + classes * disjoint
        none = uniform(m) < unlabelled
        if masked > 0:
            hidden = uniform(m) < masked
            chosen["key_bias"] = chosen.get("key_bias", torch.zeros(m, dtype=torch.float64)).masked_fill(
                hidden, -math.inf
            )
            none = none | hidden
        key_label = key_label.masked_fill(none, -1).to(label_dtype)
    given = {**chosen, **({"normalized": True} if normalized else {}), **keywords}
    sample = ContrastiveSample(query, key, query_label.to(label_dtype), key_label, given).converted(dtype, device)
    for name, value in {"query": sample.query, "key": sample.key, **sample.options}.items():
        if name in requires and isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    return sample


#: Results of ``partitioned_logsumexp`` that have gradients, in order.
_SUMS = ("neg", "pos", "pos_sum")


def check_partitioned_logsumexp(
    function: Callable[..., Any],
    sample: ContrastiveSample,
    *,
    through: Sequence[str] = _SUMS,
    factor: float = 2.0,
    roundings: float | None = None,
    dense: Callable[..., Any] = dense_partitioned_logsumexp,
) -> None:
    """Hold every result of ``function``, and every gradient of ``sample``, to the error budget.

    Args:
        function: called as ``partitioned_logsumexp(query, key, query_label, key_label, **options)``.
        sample: its tensors that require gradients are the ones checked.
        through: the results that have an upstream gradient, different for every query and result; what is -inf has one
            too, which must reach nothing.
        roundings: as in ``assert_within_budget``; default 256 for float64, where exponentials of large logits magnify
            the roundings of the truth as well.
        dense: defines what ``function`` computes; called like it, with float64 tensors and with the sample's own.
    """

    def run(function: Callable[..., Any], sample: ContrastiveSample) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        result = function(*sample.arguments, **sample.options)
        parts = result if isinstance(result[0], tuple) else (result,)
        values, outputs, upstream = {}, [], []
        for position, part in enumerate(parts):
            for name, value, (low, high) in zip(_SUMS, part, ((-1.0, 2.0), (1.5, -0.5), (0.3, -0.2)), strict=False):
                values[f"{name} of part {position}" if len(parts) > 1 else name] = value
                if name in through and value.requires_grad:
                    outputs.append(value)
                    upstream.append(torch.linspace(low, high, len(value), dtype=value.dtype, device=value.device))
        leaves = sample.differentiable if outputs else {}
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True) if leaves else ()
        pairs = zip(leaves.items(), grads, strict=True)
        gradients = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}
        return {**values, "num_pos": parts[0][3]}, gradients

    if roundings is None and sample.query.dtype == torch.float64:
        roundings = 256.0
    truth, true_grads = run(dense, sample.converted(torch.float64))
    eager, eager_grads = run(dense, sample.converted(sample.query.dtype))
    actual, grads = run(function, sample)
    expected = torch.float64 if sample.query.dtype == torch.float64 else torch.float32
    for name, value in actual.items():
        assert value.dtype == expected, f"{name}: dtype {value.dtype}, expected {expected}"
        assert_within_budget(value, eager[name], truth[name], name, factor, roundings)
    assert grads.keys() == true_grads.keys(), f"gradients of {sorted(grads)}, expected {sorted(true_grads)}"
    for name, grad in grads.items():
        assert_within_budget(grad, eager_grads[name], true_grads[name], f"gradient of {name}", factor, roundings)
