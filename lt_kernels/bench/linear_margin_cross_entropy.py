"""Benchmark of ``linear_margin_cross_entropy`` as logit adjustment of a linear head: cross-entropy of
``features @ weight.T`` shifted by a log prior, and the gradients of features [N, D] and weight [C, D].

The least work that the result needs, whatever a provider does:

    fwd      1 product,  2 N D C operations   reads features and weight once
    bwd      2 products, 4 N D C operations   reads them, writes their gradients once
    fwd_bwd  3 products, 6 N D C operations   reads them once, writes their gradients once

and one exponential per logit. Logits are no part of the bytes: they need not exist in memory. What can be reached is
the time of the products alone, by the library that PyTorch calls for them: the provider ``gemms``, measured in turns
with the others, makes logits, gradient of features and gradient of weight by ``torch.mm`` into outputs that exist
already. It computes no loss.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, plan_linear
from ..ops.linear_margin_cross_entropy.plan import LARGEST_TILED_WIDTH
from . import agreement, cases
from .cases import Case, LinearCase, LinearInputs
from .providers import Provider, Step, backend_unavailable, compiled, eager, kernels_unavailable, named, ours, peer
from .records import GEMMS, Cost, Record, Target

OP = "linear_margin_cross_entropy"
CASES = cases.HEADS | cases.SMALL_HEADS
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")  # the last is that of targets, summaries and plots
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
#: What ``lt-kernels bench compare`` measures, and what it divides our time by.
COMPARE_CASES = ("inat18-n512-d2048", "c100k-n256-d128")
REFERENCES = ("eager", "gemms")

FLOOR = GEMMS
PLOTS = ("floor", "memory", "rows")
SHAPE = "N x D x C"
MEMORY = "Peak memory beside the gradients of features and weight"

_CPU_HEAD, _CPU_WIDE, _GPU_HEAD = "inat18-n512-d2048", "c100k-n512-d512", "inat18-n8192-d2048"
TARGETS = (
    Target("cpu", _CPU_HEAD, "float32", "gemms", at_most=1.10),
    Target("cpu", _CPU_HEAD, "bfloat16", "gemms", at_most=1.10),
    Target("cpu", _CPU_WIDE, "float32", "gemms", at_most=1.10),
    Target("cpu", _CPU_HEAD, "float32", "torch-linear-ce-chunked", 1.7),
    Target("cpu", _CPU_HEAD, "bfloat16", "torch-linear-ce-chunked", 7.0),
    Target("cpu", _CPU_WIDE, "float32", "torch-linear-ce-chunked", 12.0),
    Target("cpu", _CPU_HEAD, "float32", "memory", at_most=0.25, ours="lt-chunked"),
    Target("cpu", _CPU_WIDE, "float32", "memory", at_most=0.25, ours="lt-chunked"),
    Target("cuda", _GPU_HEAD, "bfloat16", "gemms", at_most=1.10),
    Target("cuda", _GPU_HEAD, "bfloat16", "fastest other", 1.0),
)

#: Float64 logits are made in blocks of classes of about this many.
BLOCK_LOGITS = 2**22
#: So many rows have their features' gradient compared.
CHECKED_ROWS = 16


def cost(case: LinearCase, dtype: torch.dtype, direction: str) -> Cost:
    """Counted as in the module's docstring."""
    products, passes = {"fwd": (1, 1), "bwd": (2, 2), "fwd_bwd": (3, 2)}[direction]
    operands = (case.rows + case.classes) * case.width * dtype.itemsize
    return Cost(passes * operands, 2 * products * case.logits * case.width, case.logits)


def memory(record: Record) -> float | None:
    """Peak memory of forward and backward, less the gradients' bytes, in multiples of the logits' bytes."""
    if record.peak_bytes is None:
        return None
    n, d, c = (record.sizes[name] for name in "NDC")
    itemsize = getattr(torch, record.dtype).itemsize
    return (record.peak_bytes - (n + c) * d * itemsize) / (n * c * itemsize)


def make_inputs(case: LinearCase, dtype: torch.dtype, device: str) -> LinearInputs:
    return case.inputs(dtype, device)


def make_step(provider: str, inputs: LinearInputs) -> Step:
    """A call without arguments that computes the loss of ``inputs``."""
    return PROVIDERS[provider].make(inputs)


class Agreement(agreement.LossAgreement[LinearInputs]):
    """Compares the loss, the gradients of ``CHECKED_ROWS`` rows of the features, spread evenly, and those of the
    weights of up to twice as many classes: some spread evenly, the others targets of the checked rows. Each of them is
    exact: sums run over everything.
    """

    def __init__(self, inputs: LinearInputs) -> None:
        (rows, classes), device = (len(inputs.features), len(inputs.weight)), inputs.target.device

        def spread(size: int) -> Tensor:
            checked = min(size, CHECKED_ROWS)
            return torch.linspace(0, size - 1, checked, dtype=torch.float64, device=device).long()

        self._rows = spread(rows)
        self._classes = torch.cat([spread(classes), inputs.target[self._rows]]).unique()
        super().__init__(OP, inputs, make_step("eager", inputs))

    def _parts(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "gradient of features": gradients["features"][self._rows],
            "gradient of weight": gradients["weight"][self._classes],
        }

    def _true_values(self) -> dict[str, Tensor]:
        inputs, rows = self._inputs, self._rows
        features, count = inputs.features.double(), len(inputs.features)
        log_prior = inputs.log_prior.double()
        step = max(1, BLOCK_LOGITS // max(count, 1))
        weights = inputs.weight.split(step)

        totals, at_rows = [], []
        for weight, prior in zip(weights, log_prior.split(step), strict=True):
            logits = torch.addmm(prior, features, weight.double().T)
            totals.append(logits.logsumexp(1))
            at_rows.append(logits[rows])
        lse = torch.stack(totals).logsumexp(0)
        towards_rows = -inputs.weight[inputs.target[rows]].double()
        for weight, logits in zip(weights, at_rows, strict=True):
            towards_rows += (logits - lse[rows, None]).exp() @ weight.double()
        at_target = (features * inputs.weight[inputs.target].double()).sum(1) + log_prior[inputs.target]
        some = torch.addmm(log_prior[self._classes], features, inputs.weight[self._classes].double().T)
        shares = (some - lse[:, None]).exp()
        shares -= (inputs.target[:, None] == self._classes).double()
        return {
            "loss": (lse - at_target).mean(),
            "gradient of features": towards_rows / count,
            "gradient of weight": shares.T @ features / count,
        }


def check_agreement(provider: str, inputs: LinearInputs) -> None:
    """AssertionError unless ``provider`` agrees with float64 on ``inputs``; see ``Agreement``."""
    Agreement(inputs).check(provider, make_step(provider, inputs))


# Providers


def eager_loss(features: Tensor, weight: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """What the library replaces; everything in one dtype."""
    return F.cross_entropy(F.linear(features, weight) + log_prior, target)


def _arguments(inputs: LinearInputs) -> tuple[Tensor, ...]:
    return inputs.features, inputs.weight, inputs.target, inputs.log_prior.to(inputs.features.dtype)


class _Products:
    """The three matrix products, in the form of a loss: called for the first, ``backward`` for the other two."""

    def __init__(self, inputs: LinearInputs) -> None:
        self._features, self._weight = inputs.features.detach(), inputs.weight.detach()
        self._logits = self._features.new_empty(len(self._features), len(self._weight))
        self._gradients = torch.empty_like(self._features), torch.empty_like(self._weight)

    def __call__(self) -> _Products:
        torch.mm(self._features, self._weight.T, out=self._logits)
        return self

    def backward(self) -> None:
        torch.mm(self._logits, self._weight, out=self._gradients[0])
        torch.mm(self._logits.T, self._features, out=self._gradients[1])


def _torch_linear(options: Callable[[], dict[str, Any]]) -> Callable[[LinearInputs], Step]:
    def make(inputs: LinearInputs) -> Step:
        features, weight, target, log_prior = _arguments(inputs)
        # not in torch before 2.13
        function: Callable[..., Tensor] = F.linear_cross_entropy  # type: ignore[attr-defined, unused-ignore]
        keywords = options()
        return lambda: function(features, weight, target, linear_bias=log_prior, **keywords)

    return make


def _before_torch_2_13(device: str) -> str | None:
    found = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if found else f"torch {torch.__version__} has no linear_cross_entropy with options (2.13 has)"


def _headlines_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    if device == "cpu" and device not in case.headline:
        return "on a CPU it is measured in headline cases only; its products are those of eager"
    return None


def _slow_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    if device == "cpu" and case.classes >= 100_000 and (case.name, dtype) != (_CPU_WIDE, "float32"):
        return f"with {case.classes:,} classes on a CPU a step takes many seconds"
    return None


def _our_loss(inputs: LinearInputs, **options: Any) -> Tensor:
    loss: Tensor = functional.linear_margin_cross_entropy(
        inputs.features, inputs.weight, inputs.target, class_bias=inputs.log_prior, **options
    )
    return loss


def _strategy(name: str, unavailable: Callable[[str], str | None]) -> Provider:
    """One strategy by name, on the backend that the library chooses."""

    def left_out(case: Case, dtype: str, device: str) -> str | None:
        assert isinstance(case, LinearCase)
        if name == "tiled" and case.width > LARGEST_TILED_WIDTH:
            return f"it takes narrow heads, D <= {LARGEST_TILED_WIDTH}"
        sizes = (case.rows, case.width, case.classes, getattr(torch, dtype), device)
        if plan_linear(*sizes, one_pass=dtype != "float16").strategy == name:
            return "it is what the library chooses here by itself"
        plan = plan_linear(*sizes, one_pass=dtype != "float16", strategy=name)  # type: ignore[arg-type]
        return "one chunk holds all rows" if plan.by == "rows" and plan.chunk >= case.rows else None

    return Provider(
        f"lt-{name}",
        lambda inputs: lambda: _our_loss(inputs, strategy=name),
        unavailable,
        left_out=left_out,
    )


def _ours_unavailable(device: str) -> str | None:
    return kernels_unavailable(OP, device)


def _tiled_unavailable(device: str) -> str | None:
    return "it needs CUDA tensors" if device == "cpu" else backend_unavailable(OP, "triton", device)


def _liger(module: Any, inputs: LinearInputs) -> Step:
    features, weight, target, log_prior = _arguments(inputs)
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(weight, features, target, log_prior)


def _cut(name: str, **options: str) -> Provider:
    def make(module: Any, inputs: LinearInputs) -> Step:
        features, weight, target, log_prior = _arguments(inputs)
        function = module.linear_cross_entropy
        return lambda: function(features, weight, target, bias=log_prior, **options)

    provider = peer(name, "cut_cross_entropy", make)

    def unavailable(device: str) -> str | None:
        if (reason := provider.unavailable(device)) is not None:
            return reason
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        if "bias" in inspect.signature(function).parameters:
            return None
        return "the installed linear_cross_entropy takes no bias, so it cannot add the log prior"

    return replace(provider, unavailable=unavailable)


def _quack(module: Any, inputs: LinearInputs) -> Step:
    features, weight, target, log_prior = _arguments(inputs)
    function = module.linear_cross_entropy_func  # its chunked form takes no bias
    inplace = "inplace_backward" in inspect.signature(function).parameters
    options = {"reduction": "mean", **({"inplace_backward": True} if inplace else {})}
    return lambda: function(features, weight, log_prior, target, **options)


PROVIDERS = named(
    Provider("gemms", _Products, is_loss=False),
    eager("eager", eager_loss, _arguments),
    replace(compiled("compile", eager_loss, _arguments), left_out=_headlines_on_cpu),
    Provider("torch-linear-ce", _torch_linear(dict), _before_torch_2_13, left_out=_headlines_on_cpu),
    Provider(
        "torch-linear-ce-chunked",
        _torch_linear(lambda: {"options": torch.nn.LinearCrossEntropyOptions()}),
        _before_torch_2_13,
        left_out=_slow_on_cpu,
    ),
    ours(OP, "reference", _our_loss),
    ours(OP, "native", _our_loss),
    ours(OP, "triton", _our_loss),
    _strategy("materialize", _ours_unavailable),
    _strategy("chunked", _ours_unavailable),
    _strategy("tiled", _tiled_unavailable),
    peer("liger", "liger_kernel.transformers", _liger),
    _cut("cut-cross-entropy"),
    _cut("cut-cross-entropy-exact", impl="cce_exact"),
    peer("quack", "quack.linear_cross_entropy", _quack),
)
