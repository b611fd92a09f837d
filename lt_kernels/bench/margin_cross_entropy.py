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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from . import agreement, cases
from .cases import Case, RowInputs
from .providers import Provider, Step, compiled, eager, named, ours, peer
from .records import COPY, Cost, Record, Target

OP = "margin_cross_entropy"
CASES = cases.ROWS | cases.SMALL
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")  # the last is that of targets, summaries and plots
DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "cuda": ("float32", "bfloat16", "float16")}
#: What ``lt-kernels bench compare`` measures: narrow, middling and wide rows; and what it divides our time by.
COMPARE_CASES = ("lvis-n512", "inat18-n512", "c65536-n256")
REFERENCES = ("eager", "compile")

FLOOR = COPY
PLOTS = ("throughput", "floor", "memory", "rows")
SHAPE = "logits"  # what the sizes of a case are
MEMORY = "Peak memory"  # what ``memory`` is

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

#: At most this many logits have their gradients compared with float64 (at least one row does); and the float64 loss is
#: computed in pieces of about this size.
CHECKED_LOGITS = 2**22


def cost(case: Case, dtype: torch.dtype, direction: str) -> Cost:
    """Counted as in the module's docstring."""
    passes, operations = {"fwd": (1, 4), "bwd": (2, 4), "fwd_bwd": (2, 8)}[direction]
    return Cost(passes * case.logits * dtype.itemsize, operations * case.logits, case.logits)


def memory(record: Record) -> float | None:
    """Peak memory of forward and backward in multiples of the logits' bytes."""
    # the bytes of forward and backward are those of the logits and their gradient
    return None if record.peak_bytes is None else 2 * record.peak_bytes / record.bytes_moved


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> RowInputs:
    return case.inputs(dtype, device)


def make_step(provider: str, inputs: RowInputs) -> Step:
    """A call without arguments that computes the loss of ``inputs``."""
    return PROVIDERS[provider].make(inputs)


def make_copy(inputs: RowInputs) -> tuple[Callable[[], object], int]:
    """A copy of the logits into an existing buffer, and the bytes it reads and writes."""
    source = inputs.logits.detach()
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source), 2 * source.numel() * source.element_size()


class Agreement(agreement.LossAgreement[RowInputs]):
    """Compares the loss, and the gradient of rows spread evenly from the first to the last: all of them as long as that
    is at most ``CHECKED_LOGITS`` logits. (A row is the C logits of one sample, or of one pixel.)
    """

    def __init__(self, inputs: RowInputs) -> None:
        rows = inputs.target.numel()
        checked = max(1, min(rows, CHECKED_LOGITS // inputs.logits.shape[1]))
        self._rows = torch.linspace(0, rows - 1, checked, dtype=torch.float64, device=inputs.target.device).long()
        super().__init__(OP, inputs, make_step("eager", inputs))

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


def check_agreement(provider: str, inputs: RowInputs) -> None:
    """AssertionError unless ``provider`` agrees with float64 on ``inputs``; see ``Agreement``."""
    Agreement(inputs).check(provider, make_step(provider, inputs))


# Providers


def eager_loss(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """What the library replaces; ``log_prior`` broadcasts against ``logits``."""
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


def _our_loss(inputs: RowInputs) -> Tensor:
    loss: Tensor = functional.margin_cross_entropy(inputs.logits, inputs.target, class_bias=inputs.log_prior)
    return loss


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


PROVIDERS = named(
    eager("eager", eager_loss, _arguments),
    eager("loop", _loop_loss, lambda inputs: (inputs.logits, inputs.target, inputs.per_class(inputs.counts))),
    compiled("compile", eager_loss, _arguments),
    compiled("compile-max-autotune", eager_loss, _arguments, "max-autotune-no-cudagraphs", _autotune_unasked),
    ours(OP, "reference", _our_loss),
    ours(OP, "native", _our_loss),
    ours(OP, "triton", _our_loss),
    _peer("liger", "liger_kernel.transformers", _liger),
    _peer("flash-attn", "flash_attn.losses.cross_entropy", _flash_attn),
    _peer("quack", "quack.cross_entropy", _quack),
    Provider(
        "cut-cross-entropy",
        _no_such_op,
        lambda device: "it computes logits from embeddings and a classifier; this op is given logits in memory",
    ),
)
