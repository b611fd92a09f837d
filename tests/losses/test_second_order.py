"""Every loss on the reference backend: second derivatives, forward mode and ``torch.func``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _loss_cases import CASES, CLASSIFIERS, COUNTS, EXPERTS, Batch, Case, make_batch
from torch import Tensor, nn

import lt_kernels
from lt_kernels import LinearHead, LogitAdjustmentLoss

BATCH = make_batch().rows(slice(0, 11))
FLOATING = [name for name, value in zip(Batch._fields, BATCH, strict=True) if value.is_floating_point()]
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with lt_kernels.use_backend("reference"):
        yield


def make(case: Case) -> nn.Module:
    """A loss in float64; RIDE's mean is a constant to its slope, which finite differences do not know."""
    loss = case.make(COUNTS, reduction="sum", **case.options).double()
    if isinstance(loss, lt_kernels.RIDELoss):
        loss.diversity = 1e-30
    return loss


def of_inputs(case: Case, loss: nn.Module, inputs: list[Tensor]) -> Tensor:
    return case.call(loss, BATCH._replace(**dict(zip(FLOATING, inputs, strict=True))))


def inputs() -> list[Tensor]:
    return [getattr(BATCH, name).clone() for name in FLOATING]


def directions(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs()]


def dot(values: Any, along: list[Tensor]) -> Tensor:
    parts = [(v * d).sum() for v, d in zip(values, along, strict=True) if v is not None]
    return sum(parts, torch.zeros((), dtype=torch.float64))


@every_loss
def test_second_derivatives(case):
    loss, along, onto = make(case), directions(1), directions(2)

    def slope(at: list[Tensor], again: bool) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().requires_grad_() for x in at]
        found = torch.autograd.grad(of_inputs(case, loss, leaves), leaves, create_graph=again, allow_unused=True)
        return dot(found, onto), leaves

    value, leaves = slope(inputs(), True)
    actual = dot(torch.autograd.grad(value, leaves, allow_unused=True), along)
    step = 1e-6
    ends = [slope([x + sign * step * d for x, d in zip(inputs(), along, strict=True)], False)[0] for sign in (1, -1)]
    torch.testing.assert_close(actual, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-4)
    assert actual != 0


@every_loss
def test_transforms(case):
    loss, along = make(case), directions(3)
    leaves = [x.requires_grad_() for x in inputs()]
    expected = torch.autograd.grad(of_inputs(case, loss, leaves), leaves, allow_unused=True)

    def call(*given: Tensor) -> Tensor:
        return of_inputs(case, loss, list(given))

    actual = torch.func.grad(call, argnums=tuple(range(len(FLOATING))))(*inputs())
    for name, ours, theirs in zip(FLOATING, actual, expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, msg=name)
    _, slope = torch.func.jvp(call, tuple(inputs()), tuple(along))
    torch.testing.assert_close(slope, dot(expected, along))


@every_loss
def test_many_batches_at_once(case):
    loss = make(case)
    both = [torch.stack([x, x.roll(1, 0)]) for x in BATCH]
    actual = torch.func.vmap(lambda *fields: case.call(loss, Batch(*fields)))(*both)
    expected = [case.call(loss, Batch(*fields)) for fields in zip(*both, strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("case", {**CLASSIFIERS, **EXPERTS}.values(), ids={**CLASSIFIERS, **EXPERTS}.keys())
def test_per_sample_gradients(case):
    loss = make(case)
    given, axis = (BATCH.experts, 1) if case in EXPERTS.values() else (BATCH.logits, 0)

    def of_sample(logits: Tensor, y: Tensor) -> Tensor:
        return loss(logits.unsqueeze(axis), y[None])

    actual = torch.func.vmap(torch.func.grad(of_sample), in_dims=(axis, 0), out_dims=axis)(given, BATCH.target)
    leaf = given.clone().requires_grad_()
    torch.testing.assert_close(actual, torch.autograd.grad(loss(leaf, BATCH.target), leaf)[0])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("supcon", "bcl", "paco", "elm"))])
def test_a_functional_temperature_has_second_derivatives(name):
    """``functional_call`` has its own only during the call: what backward computes again is to have it too."""
    case, log_t = CASES[name], torch.tensor(0.3, dtype=torch.float64).log().requires_grad_()
    given = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = case.make(COUNTS, **{**case.options, "temperature": given}).double()

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = loss

        def forward(self) -> Tensor:
            return case.call(self.loss, BATCH)

    def slope(at: Tensor, again: bool = False) -> Tensor:
        value = torch.func.functional_call(Call(), {"loss.temperature": at.exp()}, ())
        return torch.autograd.grad(value, at, create_graph=again)[0]

    (actual,) = torch.autograd.grad(slope(log_t, True), log_t)
    step = 1e-5
    ends = [slope((log_t.detach() + sign * step).requires_grad_()) for sign in (1, -1)]
    torch.testing.assert_close(actual, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)
    assert actual != 0


def test_the_gradient_penalty_of_a_head():
    features, target = BATCH.embeddings.clone().requires_grad_(), BATCH.target
    head = LinearHead(features.shape[1], len(COUNTS), LogitAdjustmentLoss(COUNTS)).double()
    (gradient,) = torch.autograd.grad(head(features, target), features, create_graph=True)
    (actual,) = torch.autograd.grad(gradient.square().sum(), head.weight)
    logits = nn.functional.linear(features, head.weight, head.bias) + head.loss.class_bias
    (plain,) = torch.autograd.grad(nn.functional.cross_entropy(logits, target), features, create_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(plain.square().sum(), head.weight)[0])


@pytest.mark.parametrize("backend", ["native"])
def test_the_errors_of_other_backends_name_the_reference(backend):
    x, y = BATCH.logits.clone().requires_grad_(), BATCH.target
    loss = LogitAdjustmentLoss(COUNTS)
    message = r"the reference backend, asked for by name: with lt_kernels.use_backend\('reference'\)"
    with lt_kernels.use_backend(backend):
        (gradient,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=message):
            gradient.sum().backward()
        with pytest.raises(NotImplementedError, match=message):
            torch.func.grad(loss)(x.detach(), y)


def test_losses_built_inside_a_transform():
    loss = LogitAdjustmentLoss(COUNTS)
    for make in (lambda: loss, lambda: LogitAdjustmentLoss(COUNTS)):
        slope = torch.func.grad(lambda z, make=make: make()(z, BATCH.target))(BATCH.logits)
        torch.testing.assert_close(slope, torch.func.grad(loss)(BATCH.logits, BATCH.target))
