"""The oracle, sample inputs and check of ``margin_cross_entropy``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import assert_within_budget

#: Arguments of ``margin_cross_entropy`` that a sample can draw; plain keyword options are passed on as they are.
TENSOR_OPTIONS = ("weight", "class_bias", "class_scale", "margin", "scale", "mixed_target", "mix_lambda")


def converted(value: Any, dtype: torch.dtype, device: torch.device | str | None = None) -> Any:
    """Return a detached copy of a tensor, in ``dtype`` if it is floating; return anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().to(device or value.device)
    if copy.is_floating_point():
        copy = copy.to(dtype).requires_grad_(value.requires_grad)
    return copy


def require_gradients(tensors: dict[str, Any], names: Iterable[str]) -> None:
    """Make the floating tensors among ``names`` require gradients."""
    for name in names:
        value = tensors.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()


class Draw:
    """Random float64 tensors from a seed of their own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


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
    """Compute ``margin_cross_entropy`` with dense masks and ``F.cross_entropy``.

    Every dtype is the input's, as in eager code; float64 inputs give the truth. Autograd differentiates it.
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


@dataclass
class Sample:
    """One call of a loss over rows of logits: positional tensors and keyword options."""

    input: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def converted(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Sample:
        """Return a copy with detached floating tensors in ``dtype``, which require gradients where these do."""
        options = {name: converted(value, dtype, device) for name, value in self.options.items()}
        return Sample(converted(self.input, dtype, device), converted(self.target, dtype, device), options)

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by name."""
        return {"input": self.input, "target": self.target, **self.options}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments, by name."""
        return {name: value for name, value in self.named.items() if isinstance(value, Tensor)}

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that require gradients, by argument name."""
        return {name: value for name, value in self.tensors.items() if value.requires_grad}


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
    """Draw inputs ``[rows, classes, *positions]`` for ``margin_cross_entropy``.

    Args:
        options: names from ``TENSOR_OPTIONS``. ``"mixed_target"`` draws ``mix_lambda`` too: a number, or a tensor
            shaped like the target if ``"mix_lambda"`` is named.
        requires_grad: which arguments require gradients.
        soft: class probabilities instead of class indices.
        ignored: share of class-index targets set to ``ignore_index`` (-100 unless in ``keywords``).
        spread: standard deviation of the logits; with ``margin_type="angular"`` they are cosines instead.
        keywords: passed on to the loss.
    """
    draw = Draw(seed)
    uniform, normal = draw.uniform, draw.normal

    def labels() -> Tensor:
        index = draw.integers(0, classes, (rows, *positions))
        skip = uniform(rows, *positions) < ignored
        return index.masked_fill(skip, keywords.get("ignore_index", -100))

    options = tuple(options)
    unknown = set(options) - set(TENSOR_OPTIONS)
    if unknown:
        raise ValueError(f"options: got {sorted(unknown)}, expected some of {TENSOR_OPTIONS}")
    angular = keywords.get("margin_type") == "angular"
    logits = normal(rows, classes, *positions) * spread
    if angular:
        logits = (logits / spread).tanh() * 0.95
    target = normal(rows, classes, *positions).softmax(1)
    target = target if soft else labels()
    drawn = {
        "weight": uniform(classes, low=0.2, high=2.0),
        "class_bias": uniform(classes, low=1e-4, high=1.0).log(),
        "class_scale": uniform(classes, low=0.5, high=1.0 if angular else 1.5),
        "margin": uniform(classes, low=0.0, high=0.5),
        "scale": torch.tensor(1.7, dtype=torch.float64),
        "mixed_target": labels(),
        "mix_lambda": uniform(rows, *positions),
    }
    chosen: dict[str, Any] = {name: drawn[name] for name in options}
    if "mixed_target" in options and "mix_lambda" not in options:
        chosen["mix_lambda"] = 0.3
    sample = Sample(logits, target, {**chosen, **keywords}).converted(dtype, device)
    require_gradients(sample.named, requires_grad)
    return sample


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
        dense: the definition; called like ``function``, once in float64 and once in the sample's dtype.
    """
    truth_loss, truth_grads = _run(dense, sample.converted(torch.float64), upstream)
    eager_loss, eager_grads = _run(dense, sample.converted(sample.input.dtype), upstream)
    loss, grads = _run(function, sample, upstream)
    expected = torch.float64 if sample.input.dtype == torch.float64 else torch.float32
    assert loss.dtype == expected, f"loss: dtype {loss.dtype}, expected {expected}"
    assert_within_budget(loss, eager_loss, truth_loss, "loss", factor, roundings)
    for name, grad in grads.items():
        assert_within_budget(grad, eager_grads[name], truth_grads[name], f"gradient of {name}", factor, roundings)
