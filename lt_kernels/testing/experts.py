"""The oracles, sample inputs and check of the expert operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import (
    Draw,
    Sample,
    check_margin_cross_entropy,
    dense_margin_cross_entropy,
    require_gradients,
    sample_inputs,
)


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
    """Compute ``expert_cross_entropy`` of logits ``[E, N, C]`` as a loop over experts."""
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
    """Compute ``expert_divergence`` of logits ``[E, N, C]`` with ``F.kl_div``, pair by pair."""
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
    """Draw inputs for ``expert_cross_entropy``: logits ``[experts, rows, classes]`` as ``input``.

    Args:
        options: names known to ``sample_inputs`` (one value for all experts), ``"log_prior"`` and ``"expert_bias"``, a
            ``class_bias`` ``[E, C]``. ``"log_prior"`` draws ``taus`` 0, 1, 2, ..., or a tensor ``[E]`` with ``"taus"``,
            ``[E, C]`` with ``"class taus"``.
        keywords: passed on to ``sample_inputs``.
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
    normal = Draw(seed + 1).normal
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
    require_gradients({"input": logits, **drawn}, requires)
    return Sample(logits, sample.target, {**sample.options, **drawn}).converted(dtype, device)


def check_expert_cross_entropy(function: Callable[..., Tensor], sample: Sample, **budget: Any) -> None:
    """Hold ``expert_cross_entropy(logits, target, **options)`` to the error budget."""
    check_margin_cross_entropy(function, sample, dense=dense_expert_cross_entropy, **budget)
