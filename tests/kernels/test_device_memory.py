"""Memory on a device: what a step allocates at most, and tensors with more elements than 32 bits count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import _cases.contrastive as contrastive_cases
import _cases.linear as linear_cases
import _cases.rows as row_cases
import pytest
import torch
import torch.nn.functional as F
from _device import DTYPES, HALF_AND_SINGLE, POLICIES, REDUCTIONS, need_free_memory, parametrized, peak_memory_beside
from _strategies import gradient_policy
from _works import BIAS, EXPERTS, contrastive, each, linear
from torch import Tensor

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import (
    expert_cross_entropy,
    expert_divergence,
    expert_fusion,
    linear_margin_cross_entropy,
    margin_cross_entropy,
    partitioned_logsumexp,
)
from lt_kernels.ops.linear_margin_cross_entropy import op, plan
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_margin_cross_entropy,
    dense_expert_cross_entropy,
    dense_expert_divergence,
    dense_margin_cross_entropy,
    dense_partitioned_logsumexp,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

LARGE_ELEMENTS = 2**32 + 2**26  # offsets overflow signed and unsigned 32 bits

# --------------------------------------------------------------------------------------------------------- peak memory


def check_peak_memory(run: Callable[[], Any], leaves: list[Tensor], allowed: int) -> None:
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    extra = peak_memory_beside(run, gradients)
    assert extra <= allowed, f"{extra} bytes beside the gradients, at most {allowed}"


@parametrized(dtype=DTYPES, classes={str(c): c for c in (8142, 8192, 65_536, 100_003)}, policy=POLICIES)
def test_peak_memory_of_rows(dtype, classes, policy, device):
    """A step allocates the gradient and some numbers per row and per class."""
    rows = 2**26 // classes
    x = torch.randn((rows, classes), dtype=dtype, device=device).requires_grad_()
    target, bias = torch.randint(classes, (rows,), device=device), torch.randn(classes, device=device)

    def run() -> Any:
        return torch.autograd.grad(0.5 * margin_cross_entropy(x, target, class_bias=bias), x)

    with gradient_policy(policy):
        check_peak_memory(run, [x], 64 * rows + 16 * classes + 2**20)


@each(linear({"memory": linear_cases.Case("memory", 4096, 256, 20_000, bias=False)}, HALF_AND_SINGLE))
def test_peak_memory_of_linear_heads(work, device):
    """A step allocates what the plan predicts, within a few numbers per row and class."""
    sample, strategy = work.sample(device), work.operator.strategy
    sizes = plan.Sizes(4096, 256, 20_000, 1, work.dtype, work.dtype, "cuda", True, True, True)
    with work.around():
        chosen = op.chunk_plan(sizes, 0) if strategy == "chunked" else plan.make_plan(sizes, strategy, 0)
        partial_sums = 16 * sample.input.numel() if strategy == "tiled" else 0
        workspaces = 4 * sample.input.numel() + 64 * (4096 + 20_000) + 2**25
        allowed = chosen.peak_memory + partial_sums + workspaces
        check_peak_memory(lambda: work.step(sample), list(sample.differentiable.values()), allowed)


@parametrized(
    case={name: case for name, case in EXPERTS.items() if case.layout == "stacked"},
    dtype=HALF_AND_SINGLE,
    separate={"": False, "list": True},
)
def test_peak_memory_of_experts(case, dtype, separate, device):
    """A step allocates the gradients and some numbers per row and per class."""
    sample = replace(case, options=("log_prior", "mixed_target")).sample(dtype, device)
    apart = [x.detach().clone().requires_grad_() for x in sample.input]
    logits, leaves = (apart, apart) if separate else (sample.input, [sample.input])

    def run() -> Any:
        return torch.autograd.grad(expert_cross_entropy(logits, sample.target, **sample.options), leaves)

    check_peak_memory(run, leaves, case.experts * (64 * case.rows + 16 * case.classes) + 2**20)


PAIRS = {
    "": contrastive_cases.Case("memory", 2048, 64, 2**18, classes=1000, **contrastive_cases.COSINES),
    "with itself": contrastive_cases.Case("memory", 16_384, 64, None, classes=1000, **contrastive_cases.COSINES),
}


@each([work for work in contrastive(PAIRS) if work.operator.strategy != "materialize"])
def test_peak_memory_of_pairs(work, device):
    """Besides the gradients far less than all similarities: a few blocks, or with tiles numbers per row and key."""
    sample = work.sample(device)
    similarities = 2 * work.case.rows * (work.case.keys or work.case.rows)
    allowed = similarities // (2 if work.operator.strategy == "chunked" else 8)
    check_peak_memory(lambda: work.step(sample), list(sample.differentiable.values()), allowed)


# ------------------------------------------------------------------------------------- more elements than 32 bits count


def normal(*shape: int, device: str) -> Tensor:
    """Draw bfloat16 numbers in parts: there may be no room for all of them in float32."""
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for part in x.view(-1).split(2**28):
        part.normal_()
    return x.requires_grad_()


def loss_and_gradient(sample: Sample, dense: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sample = sample.converted(dtype)
    loss = dense(sample.input, sample.target, **sample.options)
    return loss, torch.autograd.grad(loss.sum(), sample.input)[0]


@contextmanager
def large_budget() -> Iterator[None]:
    before = _settings.memory_budget
    lt_kernels.set_memory_budget(2**33)
    try:
        yield
    finally:
        lt_kernels.set_memory_budget(before)


def check_some_rows(x: Tensor, target: Tensor, bias: Tensor, places: list[Any]) -> None:
    """Losses and gradients at a few ``places`` (indices of rows) of x, under every policy; that no row was left out."""

    def some(tensor: Tensor) -> Tensor:
        return torch.stack([tensor[place] for place in places])

    few = Sample(some(x.detach()).requires_grad_(), some(target), {"class_bias": bias, "reduction": "none"})
    (eager_loss, eager_grad), (true_loss, true_grad) = (
        loss_and_gradient(few, dense_margin_cross_entropy, dtype) for dtype in (x.dtype, torch.float64)
    )
    with torch.no_grad():
        losses = margin_cross_entropy(x, target, class_bias=bias, reduction="none")
    assert_within_budget(some(losses), eager_loss, true_loss, "losses")
    for policy in POLICIES:
        with gradient_policy(policy):
            total = margin_cross_entropy(x, target, class_bias=bias, reduction="sum")
        torch.testing.assert_close(total.double(), losses.double().sum(), rtol=1e-4, atol=0.0)
        (grad,) = torch.autograd.grad(total, x)
        assert_within_budget(some(grad), eager_grad, true_grad, f"gradient, {policy}")
        for part in grad.split(max(1, 2**28 * x.shape[0] // x.numel())):
            part = part.float()
            assert bool((part.sum(1).abs() < 0.05).all()), f"gradient, {policy}: a row does not sum to zero"
            assert bool(part.ne(0).any(1).all()), f"gradient, {policy}: a row was not written"
        del grad, part


@parametrized(large=True, classes={"8142": 8142, "1000003": 1_000_003})
def test_large_tensor(classes, device):
    rows = LARGE_ELEMENTS // classes + 1
    need_free_memory(4 * LARGE_ELEMENTS * 2)
    x = normal(rows, classes, device=device)
    target = torch.randint(classes, (rows,), device=device)
    bias = torch.linspace(-3, 0, classes, device=device)
    passing = [offset // classes + near for offset in (2**31, 2**32) for near in (-1, 0, 1)]
    places = sorted({0, 1, rows - 2, rows - 1, *(row for row in passing if row < rows)})
    check_some_rows(x, target, bias, places)


@parametrized(large=True)
def test_large_tensor_of_pixels(device):
    classes = 19
    height = LARGE_ELEMENTS // (2 * classes * 4096) + 1
    need_free_memory(8 * LARGE_ELEMENTS * 2)
    x = normal(2, classes, height, 4096, device=device)
    target = torch.randint(classes, (2, height, 4096), device=device)
    bias = torch.linspace(-3, 0, classes, device=device)
    corners = [(0, 0, 0), (0, height - 1, 4095), (1, 0, 0), (1, height // 2, 17), (1, height - 1, 4095)]
    check_some_rows(x, target, bias, [(n, ..., h, w) for n, h, w in corners])


@parametrized(
    large=True,
    shape={"rows": (3, 8142, 2**31 + 11, 1), "columns": (64, 129, 1, 2**25 + 35)},
    reduction=REDUCTIONS,
)
def test_large_strides(shape, reduction, device):
    rows, classes, row_stride, class_stride = shape
    elements = 3 + (rows - 1) * row_stride + (classes - 1) * class_stride + 1
    need_free_memory(elements * 2 + 2**30)
    sample = row_cases.Case("far apart", rows, classes, **BIAS).sample(torch.bfloat16, device, reduction=reduction)
    storage = torch.empty(elements, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((rows, classes), (row_stride, class_stride), 3)
    far.copy_(sample.input.detach())
    sample.input = far.requires_grad_()
    for policy in POLICIES:
        with gradient_policy(policy):
            check_margin_cross_entropy(margin_cross_entropy, sample)


@parametrized(large=True)
def test_large_logits_of_linear_heads(device):
    """More than 2^31 logits in one buffer; a few rows and classes against a small call."""
    rows, width, classes = 32_800, 16, 65_536
    need_free_memory(6 * rows * classes)
    generator = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(n, width, device=device, generator=generator).bfloat16() for n in (rows, classes))
    y = torch.randint(classes, (rows,), device=device, generator=generator)

    def run(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        loss = linear_margin_cross_entropy(x, w, y, reduction="none", strategy="materialize")
        return loss, torch.autograd.grad(loss.sum(), x)[0]

    with large_budget():
        loss, grad = run(x, y, w.requires_grad_())
    last = slice(rows - 64, rows)
    expected, expected_grad = run(x[last], y[last], w.detach())
    torch.testing.assert_close(loss[last], expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad[last], expected_grad, rtol=2e-2, atol=2e-2)


@parametrized(large=True)
def test_large_logits_of_experts(device):
    """More than 2^32 logits in one tensor; the first and last rows of every expert against float64."""
    experts, classes = 3, 8142
    rows = LARGE_ELEMENTS // (experts * classes) + 1
    need_free_memory(6 * experts * rows * classes)
    x = normal(experts, rows, classes, device=device)
    target = torch.randint(classes, (rows,), device=device)
    options = {"log_prior": torch.linspace(-3, 0, classes, device=device), "taus": [0.0, 1.0, 2.0]}
    per_row = {"reduction": "none", "expert_reduction": "none"}
    places = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=device)
    some = x.detach()[:, places]
    few = Sample(some.requires_grad_(), target[places], {**options, **per_row})
    eager, truth = (loss_and_gradient(few, dense_expert_cross_entropy, dtype) for dtype in (x.dtype, torch.float64))
    for policy in POLICIES:
        with gradient_policy(policy):
            loss = expert_cross_entropy(x, target, **options, reduction="sum", expert_reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), x)
        assert_within_budget(grad[:, places], eager[1], truth[1], f"gradient, {policy}")
        for part in grad.view(-1, classes).split(2**15):
            assert bool(part.ne(0).any(1).all()), f"gradient, {policy}: a row was not written"
        del grad
    with torch.no_grad():
        losses = expert_cross_entropy(x, target, **options, **per_row)
        found = expert_fusion(x, topk=2)
        divergence = expert_divergence(x, **per_row)
        budgets = [dense_expert_divergence(s, **per_row) for s in (some, some.double())]
        top = some.double().mean(0).topk(2).values
    assert_within_budget(losses[:, places], eager[0], truth[0], "losses")
    assert_within_budget(divergence[:, places], *budgets, "divergence")
    likely = some.detach().double().mean(0).gather(1, found.topk_indices[places]).float()
    assert_within_budget(likely, top, top, "fusion")


LARGE_PAIRS = {"": contrastive_cases.Case("large", 32_800, 16, 65_536, **contrastive_cases.COSINES)}


@pytest.mark.xdist_group("large")
@pytest.mark.usefixtures("emptied")
@each(contrastive(LARGE_PAIRS))
def test_large_similarities(work, device):
    """More than 2^31 similarities; the last queries against float64."""
    rows, keys, width = work.case.rows, work.case.keys, work.case.width
    mode = work.operator.strategy
    need_free_memory((6 if mode == "materialize" else 1) * rows * keys)
    generator = torch.Generator(device).manual_seed(0)

    def unit(size: int) -> Tensor:
        return F.normalize(torch.randn(size, width, device=device, generator=generator), dim=1).bfloat16()

    query, key = unit(rows).requires_grad_(), unit(keys)
    labels = [torch.randint(1000, (size,), device=device, generator=generator) for size in (rows, keys)]
    options: dict[str, Any] = {"scale": 10.0, "exclude": torch.arange(rows, device=device) + 2**15}
    with large_budget():
        sums = partitioned_logsumexp(query, key, *labels, strategy=mode, **options)
        (grad,) = torch.autograd.grad((sums.neg - sums.pos).sum(), query)
    last = slice(rows - 64, rows)
    expected = []
    for dtype in (torch.bfloat16, torch.float64):
        few = query.detach()[last].to(dtype).requires_grad_()
        of_few = {**options, "exclude": options["exclude"][last]}
        part = dense_partitioned_logsumexp(few, key.to(dtype), labels[0][last], labels[1], **of_few)
        expected.append((part[0], part[1], torch.autograd.grad((part[0] - part[1]).sum(), few)[0]))
    actual = sums.neg[last], sums.pos[last], grad[last]
    for what, *values in zip(("neg", "pos", "gradient"), actual, *expected, strict=True):
        assert_within_budget(*values, what)
    assert bool(grad.ne(0).any(1).all()), "a row was not written"
