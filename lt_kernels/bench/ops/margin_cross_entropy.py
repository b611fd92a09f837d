"""Benchmark of ``margin_cross_entropy`` as logit adjustment: cross-entropy of logits shifted by a log prior.

Work is counted by ``op.cost_of_logits``. ``bytes_moved`` is a floor, and "gbps" is useful bytes over time, whatever a
provider really moves.

Each provider computes the mean cross-entropy of logits shifted by a log prior, from logits in memory. Other libraries
have no prior: they get the shifted copy that a user would have to make, which is part of their time. The copy is
theirs alone, so they may write gradients over it, and those with a switch for that have it on. They take [N, C] only:
segmentation maps are transposed for them, also within their time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ...losses import LogitAdjustmentLoss
from ...ops.margin_cross_entropy.configs import SHAPES
from ..agreement import LogitsAgreement
from ..cases import BOTH, CPU, GPU, Case, Inputs, by_name, cases_of, normal
from ..op import COPY, DTYPES, Op, Target, cost_of_logits
from ..providers import Provider, Step, backends, compiled, eager, module, peer

NAME = "margin_cross_entropy"


@dataclass(frozen=True)
class RowCase(Case):
    """Logits [rows, classes, *positions]."""

    positions: tuple[int, ...] = ()  # e.g. height and width of a segmentation map

    @property
    def sizes(self) -> dict[str, int]:
        names = ("H", "W") if len(self.positions) == 2 else tuple(f"d{i + 1}" for i in range(len(self.positions)))
        return super().sizes | dict(zip(names, self.positions, strict=True))

    @property
    def logits(self) -> int:
        return super().logits * math.prod(self.positions)

    def _draw(self, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Make logits with standard deviation 3."""
        logits = normal(generator, self.rows, self.classes, *self.positions).mul_(3).to(dtype)
        target = self._draw_labels(generator, self.rows, *self.positions)
        return target, {"logits": logits.requires_grad_()}


_real = cases_of(RowCase, SHAPES)
#: Logits in memory, [N, C] or [N, C, H, W]. A CPU measures few rows, a GPU many: each point of a plot over C holds
#: about as many bytes as the device needs to reach its bandwidth.
CASES = by_name(
    _real("inat18-n512", headline=CPU, sweep=CPU, note="iNaturalist 2018"),
    _real("inat18-n8192", headline=GPU, sweep=GPU, note="iNaturalist 2018, a large batch"),
    _real("c65536-n256", headline=CPU, sweep=CPU, note="few rows, many classes"),
    _real("c65536-n4096", devices=GPU, headline=GPU, sweep=GPU, note="many rows, many classes"),
    _real("c100k-n4096", devices=GPU, headline=GPU, sweep=GPU, note="many rows, very many classes"),
    _real("c100k-n256", sweep=CPU, note="few rows, very many classes"),
    _real("seg-n16", note="segmentation maps with the classes of ADE20K"),
    _real("c1m-n512", devices=GPU, sweep=GPU, note="many rows, a million classes"),
    _real("c1m-n64", sweep=CPU, note="few rows, a million classes"),
    _real("imagenet21k-n8192", devices=GPU, sweep=GPU, note="ImageNet-21k"),
    _real("imagenet21k-n512", sweep=CPU, note="ImageNet-21k"),
    _real("inat21-n8192", devices=GPU, sweep=GPU, note="iNaturalist 2021"),
    _real("inat21-n512", sweep=CPU, note="iNaturalist 2021"),
    _real("aligned-n8192", devices=GPU, sweep=GPU, note="a power of two, to compare with inat18-n8192"),
    _real("aligned-n512", sweep=CPU, note="a power of two, to compare with inat18-n512"),
    _real("imagenet-lt-n8192", devices=GPU, sweep=GPU, note="ImageNet-LT"),
    _real("imagenet-lt-n512", sweep=CPU, note="ImageNet-LT"),
    _real("lvis-n8192", devices=GPU, sweep=GPU, note="LVIS v1"),
    _real("lvis-n512", sweep=CPU, note="LVIS v1"),
    _real("inat18-n64", note="iNaturalist 2018, a small batch"),
    _real("inat18-n256", note="iNaturalist 2018, a small batch"),
    _real("inat18-n2048", note="iNaturalist 2018, a middling batch"),
)

#: Batches and heads so small that the host's part of a call is what takes time.
CALLS = by_name(
    *(
        RowCase(f"n{rows}-c{classes}", rows, classes, CPU, calls=BOTH, note="a small call", cpu_dtypes=("float32",))
        for classes in (10, 100, 1000, 8142)
        for rows in (8, 64, 128, 512)
    )
)

#: Small shapes for tests and for trying the command: every alignment of a row, and both ends of the size range.
SMALL = by_name(
    RowCase("tiny-3x5", 3, 5, devices=()),
    RowCase("odd-7x123", 7, 123, devices=()),
    RowCase("odd-5x507", 5, 507, devices=()),
    RowCase("places-lt-16x365", 16, 365, devices=()),
    RowCase("even-16x1024", 16, 1024, devices=()),
    RowCase("map-2x19x6x7", 2, 19, positions=(6, 7), devices=()),
)

TARGETS = (
    Target("cpu", "inat18-n512", "float32", "eager", 5.0),
    Target("cpu", "inat18-n512", "float32", "compile", 2.5),
    Target("cpu", "inat18-n512", "bfloat16", "eager", 5.0),
    Target("cpu", "c65536-n256", "float32", "eager", 3.0),
    Target("cpu", "c1m-n64", "float32", "copy", 0.6),
    *(Target("cpu", case, "float32", "eager", at_most=1.3) for case in ("n8-c10", "n64-c100")),
    *(Target("cpu", case, "float32", "eager", at_most=1.4, ours="lt-module") for case in ("n8-c10", "n64-c100")),
    *(Target("cpu", f"n{rows}-c{c}", "float32", "eager", at_most=1.0) for c in (1000, 8142) for rows in (64, 128, 512)),
    Target("cuda", "inat18-n8192", "float32", "eager", 4.0),
    Target("cuda", "inat18-n8192", "float32", "compile", 2.0),
    Target("cuda", "inat18-n8192", "float32", "copy", 0.85),
    Target("cuda", "inat18-n8192", "bfloat16", "eager", 4.0),
    Target("cuda", "inat18-n8192", "bfloat16", "compile", 2.0),
    Target("cuda", "inat18-n8192", "bfloat16", "copy", 0.85),
    Target("cuda", "c65536-n4096", "bfloat16", "copy", 0.80),
    Target("cuda", "c100k-n4096", "bfloat16", "copy", 0.80),
)


class Agreement(LogitsAgreement):
    def _losses_of(self, logits: Tensor, rows: Tensor) -> Tensor:
        shifted = logits[0] + self._inputs.log_prior.double()
        return F.cross_entropy(shifted, self._inputs.target.flatten()[rows], reduction="none")


# Providers


def eager_loss(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """The code that the library replaces; ``log_prior`` broadcasts against ``logits``."""
    return F.cross_entropy(logits + log_prior.to(logits.dtype), target)


def per_class(vector: Tensor, inputs: Inputs) -> Tensor:
    """Reshape ``vector`` [C] so that it broadcasts against the logits."""
    return vector.reshape(-1, *[1] * (inputs["logits"].dim() - 2))


def _arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs["logits"], inputs.target, per_class(inputs.log_prior, inputs)


def _arguments_of_loop(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs["logits"], inputs.target, per_class(inputs.counts, inputs)


def _autotune_unasked(device: str) -> str | None:
    return "on a CPU the code is that of compile (only matrix products are autotuned)" if device == "cpu" else None


def _loop_loss(logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """The step of published code for balanced softmax: counts expanded over the rows, their log taken every time.

    In float32 for every dtype of the logits, as autocast runs it.
    """
    return F.nll_loss(F.log_softmax(logits + counts.expand(logits.shape).log(), dim=1), target)


def _ours(inputs: Inputs) -> Step:
    return partial(functional.margin_cross_entropy, inputs["logits"], inputs.target, class_bias=inputs.log_prior)


def _our_module(inputs: Inputs) -> Step:
    loss = LogitAdjustmentLoss(inputs.counts)
    return partial(loss, inputs["logits"], inputs.target)


def _of_shifted_copy(loss: Callable[..., Tensor], inputs: Inputs) -> Step:
    """Make a step of a loss that takes logits [N, C] and targets [N]."""
    logits, target, log_prior = _arguments(inputs)
    log_prior, target = log_prior.to(logits.dtype), target.flatten()
    return lambda: loss((logits + log_prior).movedim(1, -1).flatten(0, -2), target)


def _no_such_op(inputs: Inputs) -> Step:
    raise NotImplementedError("cut-cross-entropy takes embeddings and a classifier")


PROVIDERS = by_name(
    eager("eager", eager_loss, _arguments),
    eager("loop", _loop_loss, _arguments_of_loop),
    compiled(eager_loss, _arguments),
    compiled(eager_loss, _arguments, "compile-max-autotune", "max-autotune-no-cudagraphs", unasked=_autotune_unasked),
    *backends(NAME, _ours),
    module(_our_module),
    peer("liger", "liger_kernel.transformers", "LigerCrossEntropyLoss", _of_shifted_copy),
    peer("flash-attn", "flash_attn.losses.cross_entropy", "CrossEntropyLoss", _of_shifted_copy),
    peer("quack", "quack.cross_entropy", "cross_entropy", _of_shifted_copy, reduction="mean"),
    Provider(
        "cut-cross-entropy",
        _no_such_op,
        lambda device: "it computes logits from embeddings and a classifier; this op is given logits in memory",
    ),
)


OP = Op(
    NAME,
    cases=CASES | CALLS | SMALL,
    providers=PROVIDERS,
    cost=cost_of_logits,
    agreement=Agreement,
    floor=COPY,
    rank=0,
    shape="logits",
    compare_cases=("lvis-n512", "inat18-n512", "c65536-n256"),  # narrow, middling and wide rows
    references=("eager", "compile"),
    targets=TARGETS,
    plots=("throughput", "floor", "memory", "rows", "calls"),
    dtypes={"cpu": DTYPES, "cuda": DTYPES},
)
