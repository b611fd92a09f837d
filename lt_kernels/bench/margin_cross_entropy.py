"""Benchmark of ``margin_cross_entropy`` as logit adjustment: cross-entropy of logits shifted by a log prior.

Providers: ``eager`` is what a user writes without the library, ``compile`` is ``torch.compile`` of it, ``lt[backend]``
is one call of ours. Bytes and operations are counted per logit, for the least work that the result needs:

    fwd      reads each logit once                            itemsize bytes,     4 operations
    bwd      reads each logit and writes its gradient         2 * itemsize bytes, 4 operations
    fwd_bwd  reads each logit once, writes its gradient once  2 * itemsize bytes, 8 operations

The operations of a pass are a multiply-add, an exponential and an addition or multiplication. ``bytes_moved`` is a
floor, and "gbps" is useful bytes over time, whatever a provider really moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import use_backend
from ..functional import margin_cross_entropy
from ..testing import assert_within_budget
from . import cases
from .cases import Case
from .records import Target

OP = "margin_cross_entropy"
CASES = cases.ROWS | cases.SMALL
PROVIDERS = ("eager", "compile", "lt[reference]", "lt[native]", "lt[triton]")
HEADLINE_CASES = ("inat18-n512", "c65536-n256", "inat18-n8192", "c65536-n4096")

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


@dataclass
class Inputs:
    """One case on one device in one dtype."""

    logits: Tensor  # [N, C], requires grad
    target: Tensor  # [N], drawn from the class frequencies
    log_prior: Tensor  # [C], float32

    def double(self) -> Inputs:
        return Inputs(self.logits.detach().double().requires_grad_(), self.target, self.log_prior.double())


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(case.rows, case.classes, generator=generator, device=device).mul_(3).to(dtype)
    frequency = case.class_counts().to(device, torch.float32)
    target = torch.multinomial(frequency, case.rows, replacement=True, generator=generator)
    return Inputs(logits.requires_grad_(), target, case.log_prior().to(device, torch.float32))


def logit_adjusted(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    """The eager provider: what the library replaces."""
    return F.cross_entropy(logits + log_prior.to(logits.dtype), target)


def make_step(provider: str, inputs: Inputs) -> Callable[[], Tensor]:
    """A call without arguments that computes the loss of ``inputs``."""
    logits, target, log_prior = inputs.logits, inputs.target, inputs.log_prior
    if provider == "eager":
        return lambda: logit_adjusted(logits, target, log_prior)
    if provider == "compile":
        compiled = torch.compile(logit_adjusted, fullgraph=True, dynamic=False)
        return lambda: compiled(logits, target, log_prior)
    backend = provider.removeprefix("lt[").removesuffix("]")

    def fused() -> Tensor:
        with use_backend(backend):
            return margin_cross_entropy(logits, target, class_bias=log_prior)

    return fused


def cost(case: Case, dtype: torch.dtype, direction: str) -> tuple[int, int]:
    """(bytes, operations) of the least work for one direction, as counted in the module's docstring."""
    logits = case.rows * case.classes
    passes, operations = {"fwd": (1, 4), "bwd": (2, 4), "fwd_bwd": (2, 8)}[direction]
    return passes * logits * dtype.itemsize, operations * logits


def check_agreement(provider: str, inputs: Inputs) -> None:
    """AssertionError unless value and gradient are within the error budget: 2 * eager's error against float64 + eps."""

    def run(name: str, values: Inputs) -> tuple[Tensor, Tensor]:
        values.logits.grad = None
        loss = make_step(name, values)()
        loss.backward()
        gradient, values.logits.grad = values.logits.grad, None
        assert gradient is not None
        return loss.detach(), gradient

    truth = run("eager", inputs.double())
    eager = run("eager", inputs)
    actual = run(provider, inputs)
    for what, a, e, t in zip(("loss", "gradient"), actual, eager, truth, strict=True):
        assert_within_budget(a, e, t, f"{OP} {provider} {what}")
