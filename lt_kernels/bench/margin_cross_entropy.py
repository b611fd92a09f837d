"""Benchmark of ``margin_cross_entropy`` as logit adjustment: cross-entropy of logits shifted by a log prior.

Bytes and operations are counted per logit, for the least work that the result needs:

    fwd      reads each logit once                            itemsize bytes,     4 operations, 1 exponential
    bwd      reads each logit and writes its gradient         2 * itemsize bytes, 4 operations, 1 exponential
    fwd_bwd  reads each logit once, writes its gradient once  2 * itemsize bytes, 8 operations, 1 exponential

The operations of a pass are a multiply-add, an exponential and an addition or multiplication. ``bytes_moved`` is a
floor, and "gbps" is useful bytes over time, whatever a provider really moves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..testing import assert_within_budget
from . import cases, providers
from .cases import Case, Inputs
from .providers import PROVIDERS, Step
from .records import Target

OP = providers.OP
CASES = cases.ROWS | cases.SMALL
#: What ``lt-kernels bench compare`` measures: narrow, middling and wide rows.
COMPARE_CASES = ("lvis-n512", "inat18-n512", "c65536-n256")

TARGETS = (
    Target("cpu", "inat18-n512", "float32", "eager", 4.0),
    Target("cpu", "inat18-n512", "float32", "compile", 2.0),
    Target("cpu", "inat18-n512", "bfloat16", "eager", 3.0),
    Target("cpu", "c65536-n256", "float32", "eager", 3.0),
    Target("cuda", "inat18-n8192", "float32", "eager", 4.0),
    Target("cuda", "inat18-n8192", "float32", "compile", 2.0),
    Target("cuda", "inat18-n8192", "float32", "floor", 0.85),
    Target("cuda", "inat18-n8192", "bfloat16", "eager", 4.0),
    Target("cuda", "inat18-n8192", "bfloat16", "compile", 2.0),
    Target("cuda", "inat18-n8192", "bfloat16", "floor", 0.85),
    Target("cuda", "c65536-n4096", "bfloat16", "floor", 0.80),
    Target("cuda", "c100k-n4096", "bfloat16", "floor", 0.80),
)

#: At most this many logits have their gradients compared with float64 (at least one row does); and the float64 loss is
#: computed in pieces of about this size.
CHECKED_LOGITS = 2**22


class Cost(NamedTuple):
    """The least work for one direction."""

    bytes_moved: int
    flops: int
    exponentials: int


def cost(case: Case, dtype: torch.dtype, direction: str) -> Cost:
    """Counted as in the module's docstring."""
    passes, operations = {"fwd": (1, 4), "bwd": (2, 4), "fwd_bwd": (2, 8)}[direction]
    return Cost(passes * case.logits * dtype.itemsize, operations * case.logits, case.logits)


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    return case.inputs(dtype, device)


def make_step(provider: str, inputs: Inputs) -> Step:
    """A call without arguments that computes the loss of ``inputs``."""
    return PROVIDERS[provider].make(inputs)


class Agreement:
    """Float64 truth and same-dtype eager of one case, to which every provider is held before it is timed.

    The providers run on the whole case with ``reduction="mean"``. Their loss is compared with the float64 loss of all
    rows, their gradient with the float64 gradient of rows spread evenly from the first to the last: all of them as long
    as that is at most ``CHECKED_LOGITS`` logits. (A row is the C logits of one sample, or of one pixel.)
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        rows = inputs.target.numel()
        checked = max(1, min(rows, CHECKED_LOGITS // inputs.logits.shape[1]))
        self._rows = torch.linspace(0, rows - 1, checked, dtype=torch.float64, device=inputs.target.device).long()
        self._eager = self._run(make_step("eager", inputs))
        self._truth = self._true_loss(), self._true_gradient()

    def check(self, provider: str, step: Step) -> None:
        """AssertionError unless value and gradient are within the error budget: 2 * eager's error + eps."""
        actual = self._run(step)
        for what, a, e, t in zip(("loss", "gradient"), actual, self._eager, self._truth, strict=True):
            assert_within_budget(a, e, t, f"{OP} {provider} {what}")

    def _run(self, step: Step) -> tuple[Tensor, Tensor]:
        logits = self._inputs.logits
        logits.grad = None
        loss = step()
        loss.backward()
        gradient, logits.grad = logits.grad, None
        assert gradient is not None, "no gradient"
        assert gradient.shape == logits.shape, f"gradient: shape {tuple(gradient.shape)}"
        return loss.detach(), self._checked_rows(gradient)

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
            for logits, target in zip(inputs.logits.detach().split(samples), inputs.target.split(samples), strict=True)
        ]
        return torch.stack(parts).sum() / inputs.target.numel()

    def _true_gradient(self) -> Tensor:
        inputs = self._inputs
        logits = self._checked_rows(inputs.logits.detach()).double().requires_grad_()
        shifted = logits + inputs.log_prior.double()
        loss = F.cross_entropy(shifted, inputs.target.flatten()[self._rows], reduction="sum") / inputs.target.numel()
        (gradient,) = torch.autograd.grad(loss, logits)
        return gradient


def check_agreement(provider: str, inputs: Inputs) -> None:
    """AssertionError unless ``provider`` agrees with float64 on ``inputs``; see ``Agreement``."""
    Agreement(inputs).check(provider, make_step(provider, inputs))
