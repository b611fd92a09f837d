"""Benchmark of ``margin_cross_entropy`` as logit adjustment: cross-entropy of logits shifted by a log prior.

Bytes and operations are counted per logit, for the least work that the result needs:

    fwd      reads each logit once                            itemsize bytes,     4 operations, 1 exponential
    bwd      reads each logit and writes its gradient         2 * itemsize bytes, 4 operations, 1 exponential
    fwd_bwd  reads each logit once, writes its gradient once  2 * itemsize bytes, 8 operations, 1 exponential

The operations of a pass are a multiply-add, an exponential and an addition or multiplication. ``bytes_moved`` is a
floor, and "gbps" is useful bytes over time, whatever a provider really moves.

Each provider computes the mean cross-entropy of logits shifted by a log prior, from logits in memory. Other libraries
have no prior: they get the shifted copy that a user would have to make, which is part of their time. The copy is
theirs alone, so they may write gradients over it, and those with a switch for that have it on. They take [N, C] only:
segmentation maps are transposed for them, also within their time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ..agreement import LossAgreement
from ..cases import CPU, GPU, Case, Inputs, by_name, spread
from ..op import COPY, DTYPES, Cost, Op, Target
from ..providers import Provider, Step, backends, compiled, eager, peer

NAME = "margin_cross_entropy"


@dataclass(frozen=True)
class RowCase(Case):
    """Logits [rows, classes, *positions]."""

    positions: tuple[int, ...] = ()  # e.g. height and width of a segmentation map

    @property
    def sizes(self) -> dict[str, int]:
        names = ("H", "W") if len(self.positions) == 2 else tuple(f"d{i + 1}" for i in range(len(self.positions)))
        return {"N": self.rows, "C": self.classes, **dict(zip(names, self.positions, strict=True))}

    @property
    def logits(self) -> int:
        return self.rows * self.classes * math.prod(self.positions)

    def inputs(self, dtype: torch.dtype, device: str) -> RowInputs:
        """Make logits with standard deviation 3, and targets, the same ones every time."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.rows, self.classes, *self.positions)
        logits = torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)
        labels = self._draw_labels(generator, self.rows, *self.positions)
        return RowInputs(*labels, logits.requires_grad_())


@dataclass
class RowInputs(Inputs):
    """Logits in memory."""

    logits: Tensor  # [N, C] or [N, C, d1, ..., dk], requires grad

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"logits": self.logits}

    @property
    def in_memory(self) -> Tensor:
        return self.logits

    def per_class(self, vector: Tensor) -> Tensor:
        """Reshape ``vector`` [C] so that it broadcasts against the logits."""
        return vector.reshape(-1, *[1] * (self.logits.dim() - 2))


#: Logits in memory, [N, C] or [N, C, H, W]. A CPU measures few rows, a GPU many: each point of a plot over C holds
#: about as many bytes as the device needs to reach its bandwidth.
CASES = by_name(
    RowCase("inat18-n512", 512, 8142, "inat18_like", headline=CPU, sweep=CPU, note="iNaturalist 2018"),
    RowCase("inat18-n8192", 8192, 8142, "inat18_like", headline=GPU, sweep=GPU, note="iNaturalist 2018, a large batch"),
    RowCase("c65536-n256", 256, 65_536, headline=CPU, sweep=CPU, note="few rows, many classes"),
    RowCase("c65536-n4096", 4096, 65_536, devices=GPU, headline=GPU, sweep=GPU, note="many rows, many classes"),
    RowCase("c100k-n4096", 4096, 100_000, devices=GPU, headline=GPU, sweep=GPU, note="many rows, very many classes"),
    RowCase("c100k-n256", 256, 100_000, sweep=CPU, note="few rows, very many classes"),
    RowCase("seg-n16", 16, 150, positions=(512, 512), note="segmentation maps with the classes of ADE20K"),
    RowCase("c1m-n512", 512, 1_000_000, devices=GPU, sweep=GPU, note="many rows, a million classes"),
    RowCase("c1m-n64", 64, 1_000_000, sweep=CPU, note="few rows, a million classes"),
    RowCase("imagenet21k-n8192", 8192, 21_841, devices=GPU, sweep=GPU, note="ImageNet-21k"),
    RowCase("imagenet21k-n512", 512, 21_841, sweep=CPU, note="ImageNet-21k"),
    RowCase("inat21-n8192", 8192, 10_000, devices=GPU, sweep=GPU, note="iNaturalist 2021"),
    RowCase("inat21-n512", 512, 10_000, sweep=CPU, note="iNaturalist 2021"),
    RowCase("aligned-n8192", 8192, 8192, devices=GPU, sweep=GPU, note="a power of two, to compare with inat18-n8192"),
    RowCase("aligned-n512", 512, 8192, sweep=CPU, note="a power of two, to compare with inat18-n512"),
    RowCase("imagenet-lt-n8192", 8192, 1000, "imagenet_lt", devices=GPU, sweep=GPU, note="ImageNet-LT"),
    RowCase("imagenet-lt-n512", 512, 1000, "imagenet_lt", sweep=CPU, note="ImageNet-LT"),
    RowCase("lvis-n8192", 8192, 1203, "lvis_v1_images", devices=GPU, sweep=GPU, note="LVIS v1"),
    RowCase("lvis-n512", 512, 1203, "lvis_v1_images", sweep=CPU, note="LVIS v1"),
    RowCase("inat18-n64", 64, 8142, "inat18_like", note="iNaturalist 2018, a small batch"),
    RowCase("inat18-n256", 256, 8142, "inat18_like", note="iNaturalist 2018, a small batch"),
    RowCase("inat18-n2048", 2048, 8142, "inat18_like", note="iNaturalist 2018, a middling batch"),
)

#: Small shapes for tests and for trying the command: every alignment of a row, and both ends of the size range.
SMALL = by_name(
    RowCase("tiny-3x5", 3, 5, devices=()),
    RowCase("odd-7x123", 7, 123, devices=()),
    RowCase("odd-5x507", 5, 507, devices=()),
    RowCase("places-lt-16x365", 16, 365, "places_lt", devices=()),
    RowCase("even-16x1024", 16, 1024, devices=()),
    RowCase("map-2x19x6x7", 2, 19, positions=(6, 7), devices=()),
)

TARGETS = (
    Target("cpu", "inat18-n512", "float32", "eager", 4.0),
    Target("cpu", "inat18-n512", "float32", "compile", 2.0),
    Target("cpu", "inat18-n512", "bfloat16", "eager", 3.0),
    Target("cpu", "c65536-n256", "float32", "eager", 3.0),
    Target("cuda", "inat18-n8192", "float32", "eager", 4.0),
    Target("cuda", "inat18-n8192", "float32", "compile", 2.0),
    Target("cuda", "inat18-n8192", "float32", "copy", 0.85),
    Target("cuda", "inat18-n8192", "bfloat16", "eager", 4.0),
    Target("cuda", "inat18-n8192", "bfloat16", "compile", 2.0),
    Target("cuda", "inat18-n8192", "bfloat16", "copy", 0.85),
    Target("cuda", "c65536-n4096", "bfloat16", "copy", 0.80),
    Target("cuda", "c100k-n4096", "bfloat16", "copy", 0.80),
)

#: At most this many logits have their gradients compared with float64 (at least one row does). The float64 loss is
#: computed in pieces of about this size.
CHECKED_LOGITS = 2**22


def cost(case: Case, dtype: torch.dtype, direction: str) -> Cost:
    """Count the work as the module's docstring says."""
    passes, operations = {"fwd": (1, 4), "bwd": (2, 4), "fwd_bwd": (2, 8)}[direction]
    return Cost(passes * case.logits * dtype.itemsize, operations * case.logits, case.logits)


class Agreement(LossAgreement[RowInputs]):
    """Compares the loss, and the gradient of rows spread evenly from the first to the last.

    A row is the C logits of one sample or pixel. The compared rows have at most ``CHECKED_LOGITS`` logits together.
    """

    def _choose_parts(self) -> None:
        rows, classes = self._inputs.target.numel(), self._inputs.logits.shape[1]
        self._rows = spread(rows, CHECKED_LOGITS // classes, self._inputs.target.device)

    def _parts(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"gradient": self._checked_rows(gradients["logits"])}

    def _true_values(self) -> dict[str, Tensor]:
        return {"loss": self._true_loss(), "gradient": self._true_gradient()}

    def _checked_rows(self, values: Tensor) -> Tensor:
        """[checked, C] of [N, C, ...]."""
        values = values.flatten(2) if values.dim() > 2 else values[:, :, None]
        return values[self._rows // values.shape[2], :, self._rows % values.shape[2]]

    def _true_loss(self) -> Tensor:
        inputs = self._inputs
        log_prior = inputs.per_class(inputs.log_prior.double())
        samples = max(1, CHECKED_LOGITS // inputs.logits[0].numel())
        parts = [
            F.cross_entropy(logits.double() + log_prior, target, reduction="sum")
            for logits, target in zip(inputs.logits.split(samples), inputs.target.split(samples), strict=True)
        ]
        return torch.stack(parts).sum() / inputs.target.numel()

    def _true_gradient(self) -> Tensor:
        inputs = self._inputs
        logits = self._checked_rows(inputs.logits).double()
        gradient = torch.softmax(logits + inputs.log_prior.double(), dim=1)
        target = inputs.target.flatten()[self._rows]
        gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
        return gradient / inputs.target.numel()


# Providers


def eager_loss(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """The code that the library replaces; ``log_prior`` broadcasts against ``logits``."""
    return F.cross_entropy(logits + log_prior.to(logits.dtype), target)


def _arguments(inputs: RowInputs) -> tuple[Tensor, ...]:
    return inputs.logits, inputs.target, inputs.per_class(inputs.log_prior)


def _autotune_unasked(device: str) -> str | None:
    return "on a CPU the code is that of compile (only matrix products are autotuned)" if device == "cpu" else None


def _loop_loss(logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """The step of published code for balanced softmax: counts expanded over the rows, their log taken every time.

    In float32 for every dtype of the logits, as autocast runs it.
    """
    return F.nll_loss(F.log_softmax(logits + counts.expand(logits.shape).log(), dim=1), target)


def _ours(inputs: RowInputs) -> Step:
    return partial(functional.margin_cross_entropy, inputs.logits, inputs.target, class_bias=inputs.log_prior)


def _peer(name: str, module: str, make_loss: Callable[[Any], Callable[[Tensor, Tensor], Tensor]]) -> Provider:
    """A library whose cross-entropy takes logits [N, C] and targets [N]."""

    def make(module: Any, inputs: RowInputs) -> Step:
        loss = make_loss(module)
        log_prior = inputs.per_class(inputs.log_prior).to(inputs.logits.dtype)
        target = inputs.target.flatten()
        return lambda: loss((inputs.logits + log_prior).movedim(1, -1).flatten(0, -2), target)

    return peer(name, module, make)


def _with_inplace_backward(loss: Callable[..., Tensor]) -> dict[str, bool]:
    return {"inplace_backward": True} if "inplace_backward" in inspect.signature(loss).parameters else {}


def _liger(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    loss: Callable[[Tensor, Tensor], Tensor] = module.LigerCrossEntropyLoss()
    return loss


def _flash_attn(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    kind = module.CrossEntropyLoss
    loss: Callable[[Tensor, Tensor], Tensor] = kind(**_with_inplace_backward(kind))
    return loss


def _quack(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    function: Callable[..., Tensor] = module.cross_entropy
    options = _with_inplace_backward(function)
    return lambda logits, target: function(logits, target, reduction="mean", **options)


def _no_such_op(inputs: RowInputs) -> Step:
    raise NotImplementedError("cut-cross-entropy takes embeddings and a classifier")


PROVIDERS = by_name(
    eager("eager", eager_loss, _arguments),
    eager("loop", _loop_loss, lambda inputs: (inputs.logits, inputs.target, inputs.per_class(inputs.counts))),
    compiled("compile", eager_loss, _arguments),
    compiled("compile-max-autotune", eager_loss, _arguments, "max-autotune-no-cudagraphs", _autotune_unasked),
    *backends(NAME, _ours),
    _peer("liger", "liger_kernel.transformers", _liger),
    _peer("flash-attn", "flash_attn.losses.cross_entropy", _flash_attn),
    _peer("quack", "quack.cross_entropy", _quack),
    Provider(
        "cut-cross-entropy",
        _no_such_op,
        lambda device: "it computes logits from embeddings and a classifier; this op is given logits in memory",
    ),
)


OP = Op(
    NAME,
    cases=CASES | SMALL,
    providers=PROVIDERS,
    cost=cost,
    agreement=Agreement,
    floor=COPY,
    rank=0,
    shape="logits",
    compare_cases=("lvis-n512", "inat18-n512", "c65536-n256"),  # narrow, middling and wide rows
    references=("eager", "compile"),
    targets=TARGETS,
    plots=("throughput", "floor", "memory", "rows"),
    dtypes={"cpu": DTYPES, "cuda": DTYPES},
)
