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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, plan_linear
from ...ops.linear_margin_cross_entropy.configs import SHAPES
from ...ops.linear_margin_cross_entropy.plan import LARGEST_TILED_WIDTH
from ..agreement import LossAgreement, spread
from ..cases import CPU, GPU, Case, Inputs, by_name, cases_of, normal
from ..op import GEMMS, Cost, Op, Target
from ..providers import Products, Provider, Step, backends, compiled, eager, headlines_on_cpu, peer, strategies

NAME = "linear_margin_cross_entropy"


@dataclass(frozen=True)
class LinearCase(Case):
    """Features [rows, width] and a weight [classes, width], whose product are the logits."""

    width: int = 2048
    letters = (("N", "rows"), ("D", "width"), ("C", "classes"))

    @property
    def uncounted(self) -> int:
        """The gradients of features and weight."""
        return (self.rows + self.classes) * self.width

    def _draw(self, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Make features with standard deviation 1 and a weight that makes logits with standard deviation 3."""
        features = normal(generator, self.rows, self.width).to(dtype)
        weight = normal(generator, self.classes, self.width).mul_(3 / math.sqrt(self.width)).to(dtype)
        leaves = {"features": features.requires_grad_(), "weight": weight.requires_grad_()}
        return self._draw_labels(generator, self.rows), leaves


_real = cases_of(LinearCase, SHAPES)
#: Linear heads, [N, D] features and [C, D] weights.
CASES = by_name(
    _real("inat18-n512-d2048", headline=CPU, sweep=CPU, note="iNaturalist 2018"),
    _real("inat18-n8192-d2048", devices=GPU, headline=GPU, sweep=GPU, note="iNaturalist 2018, a large batch"),
    _real("c100k-n512-d512", devices=CPU, headline=CPU, sweep=CPU, note="very many classes"),
    _real("c100k-n4096-d512", devices=GPU, headline=GPU, sweep=GPU, note="very many classes"),
    _real("c100k-n256-d128", devices=CPU, sweep=CPU, note="a narrow head"),
    _real("c100k-n8192-d128", devices=GPU, headline=GPU, sweep=GPU, note="a narrow head"),
    _real("c1m-n64-d256", devices=CPU, sweep=CPU, note="few rows, a million classes"),
    _real("c1m-n1024-d256", devices=GPU, sweep=GPU, note="many rows, a million classes"),
    _real("inat21-n512-d2048", sweep=CPU, note="iNaturalist 2021"),
    _real("inat21-n8192-d2048", devices=GPU, sweep=GPU, note="iNaturalist 2021"),
    _real("inat18-n256-d2048", note="iNaturalist 2018, a small batch"),
    _real("inat18-n1024-d2048", devices=GPU, note="iNaturalist 2018, a middling batch"),
)

#: Small heads for tests and for trying the command.
SMALL = by_name(
    LinearCase("tiny-3x4x5", 3, 5, width=4, devices=()),
    LinearCase("odd-7x19x123", 7, 123, width=19, devices=()),
    LinearCase("odd-33x45x507", 33, 507, width=45, devices=()),
    LinearCase("even-16x64x1024", 16, 1024, width=64, devices=()),
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


def cost(case: LinearCase, dtype: torch.dtype, direction: str) -> Cost:
    """Count the work as the module's docstring says."""
    products, passes = {"fwd": (1, 1), "bwd": (2, 2), "fwd_bwd": (3, 2)}[direction]
    operands = (case.rows + case.classes) * case.width * dtype.itemsize
    return Cost(passes * operands, 2 * products * case.logits * case.width, case.logits)


#: The number of rows whose features' gradient is compared.
CHECKED_ROWS = 16


class Agreement(LossAgreement):
    """Compares parts of both gradients, since copies of the whole take long.

    They are ``CHECKED_ROWS`` rows of the features' gradient, spread evenly, and up to twice as many classes of the
    weight's: some spread evenly, the others the targets of those rows.
    """

    def _compared(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        target = self._inputs.target
        rows, classes = (spread(size, CHECKED_ROWS, target.device) for size in map(len, gradients.values()))
        classes = torch.cat([classes, target[rows]]).unique()
        return super()._compared({"features": gradients["features"][rows], "weight": gradients["weight"][classes]})

    def _losses(self, inputs: Inputs, rows: Tensor) -> Tensor:
        logits = torch.addmm(inputs.log_prior, inputs["features"][rows], inputs["weight"].T)
        return F.cross_entropy(logits, inputs.target[rows], reduction="none")


# Providers


def eager_loss(features: Tensor, weight: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """The code that the library replaces; everything in one dtype."""
    return F.cross_entropy(F.linear(features, weight) + log_prior, target)


def _arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    features = inputs["features"]
    return features, inputs["weight"], inputs.target, inputs.log_prior.to(features.dtype)


def _torch_linear(inputs: Inputs, chunked: bool = False) -> Step:
    """Return a step of torch's own fused head, whole or in chunks; it needs torch 2.13."""
    features, weight, target, log_prior = _arguments(inputs)
    options: dict[str, Any] = {}
    if chunked:
        options["options"] = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined, unused-ignore]
    function: Callable[..., Tensor] = F.linear_cross_entropy  # type: ignore[attr-defined, unused-ignore]
    return partial(function, features, weight, target, linear_bias=log_prior, **options)


def _before_torch_2_13(device: str) -> str | None:
    found = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if found else f"torch {torch.__version__} has no linear_cross_entropy with options (2.13 has)"


def _slow_on_cpu(case: Case, dtype: str, device: str) -> str | None:
    if device == "cpu" and case.classes >= 100_000 and (case.name, dtype) != (_CPU_WIDE, "float32"):
        return f"with {case.classes:,} classes on a CPU a step takes many seconds"
    return None


def _our_loss(inputs: Inputs, **options: Any) -> Tensor:
    operands = inputs["features"], inputs["weight"], inputs.target
    loss: Tensor = functional.linear_margin_cross_entropy(*operands, class_bias=inputs.log_prior, **options)
    return loss


def _strategy_left_out(name: str, case: Case, dtype: str, device: str) -> str | None:
    assert isinstance(case, LinearCase)
    if name == "tiled" and case.width > LARGEST_TILED_WIDTH:
        return f"it takes narrow heads, D <= {LARGEST_TILED_WIDTH}"
    plan = partial(plan_linear, case.rows, case.width, case.classes, getattr(torch, dtype), device)
    one_pass = dtype != "float16"
    if plan(one_pass=one_pass).strategy == name:
        return "it is what the library chooses here by itself"
    asked = plan(one_pass=one_pass, strategy=name)  # type: ignore[arg-type]
    return "one chunk holds all rows" if asked.by == "rows" and asked.chunk >= case.rows else None


def _weight_first(loss: Callable[..., Tensor], inputs: Inputs) -> Step:
    features, weight, target, log_prior = _arguments(inputs)
    return partial(loss, weight, features, target, log_prior)


def _bias_third(loss: Callable[..., Tensor], inputs: Inputs) -> Step:
    features, weight, target, log_prior = _arguments(inputs)
    return partial(loss, features, weight, log_prior, target)


def _bias_by_name(loss: Callable[..., Tensor], inputs: Inputs) -> Step:
    *operands, log_prior = _arguments(inputs)
    return partial(loss, *operands, bias=log_prior)


_CUT = "cut_cross_entropy", "linear_cross_entropy", _bias_by_name, "bias"
PROVIDERS = by_name(
    Provider("gemms", lambda inputs: Products(inputs["features"], inputs["weight"]), is_loss=False),
    eager("eager", eager_loss, _arguments),
    compiled(eager_loss, _arguments, left_out=headlines_on_cpu),
    Provider("torch-linear-ce", _torch_linear, _before_torch_2_13, left_out=headlines_on_cpu),
    Provider(
        "torch-linear-ce-chunked", partial(_torch_linear, chunked=True), _before_torch_2_13, left_out=_slow_on_cpu
    ),
    *backends(NAME, lambda inputs: partial(_our_loss, inputs)),
    *strategies(NAME, _our_loss, _strategy_left_out),
    peer("liger", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", _weight_first),
    peer("cut-cross-entropy", *_CUT),
    peer("cut-cross-entropy-exact", *_CUT, impl="cce_exact"),
    # its chunked form takes no bias
    peer("quack", "quack.linear_cross_entropy", "linear_cross_entropy_func", _bias_third, reduction="mean"),
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
