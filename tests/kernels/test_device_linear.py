"""Linear heads on a device: real widths, memory, graphs, very many logits, bad targets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from _cases.linear import BY_ID, Case
from _device import (
    DTYPES,
    HALF_AND_SINGLE,
    POLICIES,
    REDUCTIONS,
    assert_all_close,
    assert_index_error,
    assert_same_bits,
    capture,
    checks_on,
    need_free_memory,
    parametrized,
    peak_memory_beside,
    poisoned_memory,
    synchronisation_is_an_error,
)
from _strategies import gradient_policy, linear_mode, tiled_linear_reason
from torch import Tensor

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import linear_margin_cross_entropy, linear_topk
from lt_kernels.ops.linear_margin_cross_entropy import op, plan
from lt_kernels.testing import Sample, assert_within_budget, check_linear_margin_cross_entropy

#: How logits are made: strategies, and both ways to cut.
MODES = {name: name for name in ("materialize", "rows", "classes", "tiled")}
#: Real widths, in which products take the library's fast paths and rows start at odd addresses unless padded.
REAL = {
    "inat18": Case("inat18", 256, 512, 8142),
    "narrow": Case("narrow", 300, 128, 20_011),
    "cosine": Case("cosine", 256, 256, 8142, normalize=True, keywords={"scale": 16.0}),
    "mixed": Case("mixed", 256, 64, 8142, options=("weight", "class_bias", "mixed_target")),
    "learned": Case("learned", 256, 64, 8142, requires_grad=("input", "linear_weight", "linear_bias", "class_bias")),
    "frozen": Case("frozen", 256, 64, 8142, requires_grad=("input",)),
}


@contextmanager
def cut(mode: str, case: Case) -> Iterator[str]:
    """Yield the strategy of a mode; skip a case that it cannot run."""
    if mode == "tiled" and (reason := tiled_linear_reason(case.width, case.positions, case.soft)):
        pytest.skip(reason)
    with linear_mode(mode) as strategy:
        yield strategy


def run(sample: Sample, strategy: str, upstream: float | Tensor = 1.0, **options: Any) -> list[Tensor]:
    """The loss, then the gradient of everything that requires one."""
    given = {**sample.options, **options}
    weight = given.pop("linear_weight")
    loss = linear_margin_cross_entropy(sample.input, weight, sample.target, strategy=strategy, **given)
    return [loss.detach(), *torch.autograd.grad((upstream * loss).sum(), list(sample.differentiable.values()))]


def check_value_and_gradients(case: Case, mode: str, dtype: torch.dtype, device: str, reduction: str = "mean") -> None:
    with cut(mode, case) as strategy:
        sample = case.sample(dtype, device, reduction=reduction)
        upstream: float | Tensor = 0.7
        if reduction == "none":
            shape = (case.rows, *case.positions)
            upstream = torch.linspace(-1, 2, math.prod(shape), device=device).reshape(shape)
        check_linear_margin_cross_entropy(
            lambda *arguments, **options: linear_margin_cross_entropy(*arguments, strategy=strategy, **options),
            sample,
            upstream=upstream,
        )


@parametrized(case=BY_ID, mode=MODES, dtype=HALF_AND_SINGLE)
def test_value_and_every_gradient(device: str, case: Case, mode: str, dtype: torch.dtype) -> None:
    check_value_and_gradients(case, mode, dtype, device)


@parametrized(case=REAL, mode=MODES, dtype=DTYPES, reduction=REDUCTIONS)
def test_real_widths(device: str, case: Case, mode: str, dtype: torch.dtype, reduction: str) -> None:
    check_value_and_gradients(case, mode, dtype, device, reduction)


@parametrized(case=REAL, mode=MODES, policy=POLICIES)
def test_no_synchronisation(device: str, case: Case, mode: str, policy: str) -> None:
    sample = case.sample(torch.bfloat16, device)
    with cut(mode, case) as strategy, gradient_policy(policy):
        run(sample, strategy, 0.5)  # compiles, and loads modules
        with synchronisation_is_an_error():
            run(sample, strategy, 0.5)


@parametrized(case=REAL, mode=MODES)
def test_graph_replay(device: str, case: Case, mode: str) -> None:
    static, other = (case.sample(torch.bfloat16, device, seed=seed) for seed in range(2))
    with cut(mode, case) as strategy:
        graph, captured = capture(lambda: run(static, strategy, -0.5))
        for name, value in static.tensors.items():
            value.detach().copy_(other.tensors[name].detach())
        expected = run(other, strategy, -0.5)
        graph.replay()
        names = ["loss", *(f"gradient of {name}" for name in static.differentiable)]
        assert_all_close(captured, expected, names, rtol=1e-2, atol=1e-4)  # the library may choose another product


@parametrized(case=REAL, mode=MODES, dtype=HALF_AND_SINGLE)
def test_determinism(device: str, case: Case, mode: str, dtype: torch.dtype) -> None:
    sample = case.sample(dtype, device)
    with cut(mode, case) as strategy:
        first = run(sample, strategy)
        for _ in range(2):
            assert_same_bits(run(sample, strategy), first, "another run")
        with poisoned_memory():
            assert_same_bits(run(sample, strategy), first, "poisoned memory")


@parametrized(mode=MODES, dtype=HALF_AND_SINGLE, policy=POLICIES)
def test_retained_graph(device: str, mode: str, dtype: torch.dtype, policy: str) -> None:
    case = REAL["inat18"]
    sample = case.sample(dtype, device)
    options = dict(sample.options)
    weight = options.pop("linear_weight")
    with cut(mode, case) as strategy, gradient_policy(policy):
        once = run(sample, strategy)[1].double()
        loss = linear_margin_cross_entropy(sample.input, weight, sample.target, strategy=strategy, **options)
        for factor in (2.0, -0.25, 1.0, 0.0):
            (grad,) = torch.autograd.grad(factor * loss, sample.input, retain_graph=True)
            same_dtype = (factor * once).to(dtype)
            assert_within_budget(grad, same_dtype, factor * once, f"{factor} * loss", roundings=4.0)


@parametrized(mode=MODES, normalize={"": False, "cosine": True})
def test_autocast(device: str, mode: str, normalize: bool) -> None:
    """float32 features and weight, products in bfloat16: as F.linear under autocast."""
    case = dataclasses.replace(REAL["cosine"] if normalize else REAL["mixed"], width=256)
    sample = case.sample(torch.float32, device)
    with cut(mode, case) as strategy, torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss, *grads = run(sample, strategy)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in grads)
    copy = sample.converted(torch.bfloat16)
    low = run(copy, "materialize")
    truth = run(sample, "materialize")
    for a, b, t in zip([loss, *grads], low, truth, strict=True):
        assert_within_budget(a, b, t.double(), "autocast")


@parametrized(case={name: REAL[name] for name in ("inat18", "mixed")}, mode=MODES)
def test_bad_targets(device: str, case: Case, mode: str) -> None:
    """A class out of range makes its row NaN; with checks on (and on the CPU) it is an error."""
    sample = case.sample(torch.float32, device, reduction="none")
    sample.target[1] = case.classes
    with cut(mode, case) as strategy:
        with checks_on():
            assert_index_error(lambda: run(sample, strategy), "row 1 has class")
        if device == "cpu":
            return
        loss, grad, *_ = run(sample, strategy)
    bad = torch.zeros_like(loss, dtype=torch.bool)
    bad[1] = True
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(grad.isnan().any(1), bad)


@parametrized(mode=MODES, dtype=HALF_AND_SINGLE)
def test_peak_memory(device: str, mode: str, dtype: torch.dtype) -> None:
    """What the plan predicts, within a few numbers per row and class."""
    case = Case("memory", 4096, 256, 20_000, bias=False)
    sample = case.sample(dtype, device)
    with cut(mode, case) as strategy:
        gradients = sum(t.numel() * t.element_size() for t in sample.differentiable.values())
        extra = peak_memory_beside(lambda: run(sample, strategy, 0.5), gradients)
        sizes = plan.Sizes(4096, 256, 20_000, 1, dtype, dtype, "cuda", True, True, True)
        predicted = (
            op.chunk_plan(sizes, 0) if strategy == "chunked" else plan.make_plan(sizes, strategy, 0)
        ).peak_memory
    partial_sums = 16 * sample.input.numel() if mode == "tiled" else 0
    allowed = (
        predicted + partial_sums + 4 * sample.input.numel() + 64 * (4096 + 20_000) + 2**25
    )  # workspaces of products
    assert extra <= allowed, f"{extra} bytes beside the gradients, at most {allowed}"


@parametrized(large=True)
def test_offsets_beyond_32_bits(device: str) -> None:
    """More than 2^31 logits in one buffer; a few rows and classes against float64."""
    rows, width, classes = 32_800, 16, 65_536
    need_free_memory(6 * rows * classes)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, device=device, generator=generator).bfloat16().requires_grad_()
    w = torch.randn(classes, width, device=device, generator=generator).bfloat16().requires_grad_()
    y = torch.randint(classes, (rows,), device=device, generator=generator)
    before = _settings.memory_budget
    lt_kernels.set_memory_budget(2**33)
    try:
        loss = linear_margin_cross_entropy(x, w, y, reduction="none", strategy="materialize")
        (grad,) = torch.autograd.grad(loss.sum(), x)
    finally:
        lt_kernels.set_memory_budget(before)
    last = slice(rows - 64, rows)
    z = x[last].detach().clone().requires_grad_()
    expected = linear_margin_cross_entropy(z, w.detach(), y[last], reduction="none", strategy="materialize")
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(loss[last], expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad[last], expected_grad, rtol=2e-2, atol=2e-2)


@parametrized(dtype=HALF_AND_SINGLE, normalize={"": False, "cosine": True})
def test_top_classes(device: str, dtype: torch.dtype, normalize: bool) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(200, 64, device=device, generator=generator).to(dtype)
    w = torch.randn(20_011, 64, device=device, generator=generator).to(dtype)
    shift = torch.randn(20_011, device=device, generator=generator)
    found = linear_topk(x, w, 5, class_shift=shift, scale=4.0 if normalize else 0.3, normalize=normalize)
    z = x.double() @ w.double().t()
    if normalize:
        z = z / x.double().norm(dim=1, keepdim=True) / w.double().norm(dim=1)
    u = (4.0 if normalize else 0.3) * z + shift.double()
    tolerance = 2e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.lse.double(), u.logsumexp(1), rtol=0, atol=tolerance)
    best = u.topk(5, dim=1).values
    torch.testing.assert_close(u.gather(1, found.classes), best, rtol=0, atol=2 * tolerance)
