"""Benchmark of ``linear_margin_cross_entropy`` as logit adjustment of a linear head: cross-entropy of
``features @ weight.T`` shifted by a log prior, and the gradients of features [N, D] and weight [C, D].

The least work that the result needs, whatever a provider does:

    fwd      1 product,  2 N D C operations   reads features and weight once
    bwd      2 products, 4 N D C operations   reads them, writes their gradients once
    fwd_bwd  3 products, 6 N D C operations   reads them once, writes their gradients once

and one exponential per logit. Logits are no part of the bytes: they need not exist in memory. The
provider ``gemms`` is measured in turns with the others. It computes no loss: it makes logits, gradient of features and
gradient of weight by ``torch.mm``, into outputs that exist already. Its time is what can be reached.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, plan_linear
from ...ops.linear_margin_cross_entropy.plan import LARGEST_TILED_WIDTH
from ..agreement import LossAgreement
from ..cases import CPU, GPU, Case, Inputs, by_name, spread
from ..op import GEMMS, Cost, Op, Target
from ..providers import Products, Provider, Step, backends, compiled, eager, headlines_on_cpu, peer, strategy

NAME = "linear_margin_cross_entropy"


@dataclass(frozen=True)
class LinearCase(Case):
    """Features [rows, width] and a weight [classes, width], whose product are the logits."""

    width: int = 2048

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "D": self.width, "C": self.classes}

    @property
    def uncounted(self) -> int:
        """The gradients of features and weight."""
        return (self.rows + self.classes) * self.width

    def inputs(self, dtype: torch.dtype, device: str) -> LinearInputs:
        """Make features with standard deviation 1 and a weight that makes logits with standard deviation 3."""
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(self.rows, self.width, generator=generator, device=device).to(dtype)
        weight = torch.randn(self.classes, self.width, generator=generator, device=device)
        weight = weight.mul_(3 / math.sqrt(self.width)).to(dtype)
        labels = self._draw_labels(generator, self.rows)
        return LinearInputs(*labels, features.requires_grad_(), weight.requires_grad_())


@dataclass
class LinearInputs(Inputs):
    """Features and the weight of a linear head, in one dtype."""

    features: Tensor  # [N, D], requires grad
    weight: Tensor  # [C, D], requires grad

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"features": self.features, "weight": self.weight}


def _head(name: str, rows: int, classes: int, width: int, counts: str | None = None, **options: Any) -> LinearCase:
    return LinearCase(name, rows, classes, counts, width=width, **options)


#: Linear heads, [N, D] features and [C, D] weights.
CASES = by_name(
    _head("inat18-n512-d2048", 512, 8142, 2048, "inat18_like", headline=CPU, sweep=CPU, note="iNaturalist 2018"),
    _head(
        "inat18-n8192-d2048",
        8192,
        8142,
        2048,
        "inat18_like",
        devices=GPU,
        headline=GPU,
        sweep=GPU,
        note="iNaturalist 2018, a large batch",
    ),
    _head("c100k-n512-d512", 512, 100_000, 512, devices=CPU, headline=CPU, sweep=CPU, note="very many classes"),
    _head("c100k-n4096-d512", 4096, 100_000, 512, devices=GPU, headline=GPU, sweep=GPU, note="very many classes"),
    _head("c100k-n256-d128", 256, 100_000, 128, devices=CPU, sweep=CPU, note="a narrow head"),
    _head("c100k-n8192-d128", 8192, 100_000, 128, devices=GPU, headline=GPU, sweep=GPU, note="a narrow head"),
    _head("c1m-n64-d256", 64, 1_000_000, 256, devices=CPU, sweep=CPU, note="few rows, a million classes"),
    _head("c1m-n1024-d256", 1024, 1_000_000, 256, devices=GPU, sweep=GPU, note="many rows, a million classes"),
    _head("inat21-n512-d2048", 512, 10_000, 2048, sweep=CPU, note="iNaturalist 2021"),
    _head("inat21-n8192-d2048", 8192, 10_000, 2048, devices=GPU, sweep=GPU, note="iNaturalist 2021"),
    _head("inat18-n256-d2048", 256, 8142, 2048, "inat18_like", note="iNaturalist 2018, a small batch"),
    _head(
        "inat18-n1024-d2048", 1024, 8142, 2048, "inat18_like", devices=GPU, note="iNaturalist 2018, a middling batch"
    ),
)

#: Small heads for tests and for trying the command.
SMALL = by_name(
    _head("tiny-3x4x5", 3, 5, 4, devices=()),
    _head("odd-7x19x123", 7, 123, 19, devices=()),
    _head("odd-33x45x507", 33, 507, 45, devices=()),
    _head("even-16x64x1024", 16, 1024, 64, devices=()),
)

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
#: The number of rows whose features' gradient is compared.
CHECKED_ROWS = 16


def cost(case: LinearCase, dtype: torch.dtype, direction: str) -> Cost:
    """Count the work as the module's docstring says."""
    products, passes = {"fwd": (1, 1), "bwd": (2, 2), "fwd_bwd": (3, 2)}[direction]
    operands = (case.rows + case.classes) * case.width * dtype.itemsize
    return Cost(passes * operands, 2 * products * case.logits * case.width, case.logits)


class Agreement(LossAgreement[LinearInputs]):
    """Compares the loss, and parts of both gradients, which are exact: their sums run over everything.

    The parts are ``CHECKED_ROWS`` rows of the features' gradient, spread evenly, and up to twice as many classes of the
    weight's: some spread evenly, the others the targets of those rows.
    """

    def _choose_parts(self) -> None:
        inputs, device = self._inputs, self._inputs.target.device
        self._rows = spread(len(inputs.features), CHECKED_ROWS, device)
        classes = spread(len(inputs.weight), CHECKED_ROWS, device)
        self._classes = torch.cat([classes, inputs.target[self._rows]]).unique()

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


# Providers


def eager_loss(features: Tensor, weight: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """The code that the library replaces; everything in one dtype."""
    return F.cross_entropy(F.linear(features, weight) + log_prior, target)


def _arguments(inputs: LinearInputs) -> tuple[Tensor, ...]:
    return inputs.features, inputs.weight, inputs.target, inputs.log_prior.to(inputs.features.dtype)


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


def _slow_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    if device == "cpu" and case.classes >= 100_000 and (case.name, dtype) != (_CPU_WIDE, "float32"):
        return f"with {case.classes:,} classes on a CPU a step takes many seconds"
    return None


def _our_loss(inputs: LinearInputs, **options: Any) -> Tensor:
    loss: Tensor = functional.linear_margin_cross_entropy(
        inputs.features, inputs.weight, inputs.target, class_bias=inputs.log_prior, **options
    )
    return loss


def _strategy(name: str) -> Provider:
    def left_out(case: Case, dtype: str, device: str) -> str | None:
        assert isinstance(case, LinearCase)
        if name == "tiled" and case.width > LARGEST_TILED_WIDTH:
            return f"it takes narrow heads, D <= {LARGEST_TILED_WIDTH}"
        sizes = (case.rows, case.width, case.classes, getattr(torch, dtype), device)
        if plan_linear(*sizes, one_pass=dtype != "float16").strategy == name:
            return "it is what the library chooses here by itself"
        plan = plan_linear(*sizes, one_pass=dtype != "float16", strategy=name)  # type: ignore[arg-type]
        return "one chunk holds all rows" if plan.by == "rows" and plan.chunk >= case.rows else None

    return strategy(NAME, name, _our_loss, left_out)


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


PROVIDERS = by_name(
    Provider("gemms", lambda inputs: Products(inputs.features, inputs.weight), is_loss=False),
    eager("eager", eager_loss, _arguments),
    compiled("compile", eager_loss, _arguments, left_out=headlines_on_cpu),
    Provider("torch-linear-ce", _torch_linear(dict), _before_torch_2_13, left_out=headlines_on_cpu),
    Provider(
        "torch-linear-ce-chunked",
        _torch_linear(lambda: {"options": torch.nn.LinearCrossEntropyOptions()}),
        _before_torch_2_13,
        left_out=_slow_on_cpu,
    ),
    *backends(NAME, lambda inputs: partial(_our_loss, inputs)),
    *map(_strategy, ("materialize", "chunked", "tiled")),
    peer("liger", "liger_kernel.transformers", _liger),
    _cut("cut-cross-entropy"),
    _cut("cut-cross-entropy-exact", impl="cce_exact"),
    peer("quack", "quack.linear_cross_entropy", _quack),
)


OP = Op(
    NAME,
    cases=CASES | SMALL,
    providers=PROVIDERS,
    cost=cost,
    agreement=Agreement,
    floor=GEMMS,
    rank=1,
    shape="N x D x C",
    compare_cases=("inat18-n512-d2048", "c100k-n256-d128"),
    references=("eager", "gemms"),
    targets=TARGETS,
    plots=("floor", "memory", "rows"),
)
