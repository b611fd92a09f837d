"""Rows on a device: very large tensors, streams, graphs, memory, training loops, bad targets, very many classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases.rows import BY_ID, Case
from _device import (
    BAD_TARGETS,
    DTYPES,
    HALF_AND_SINGLE,
    POLICIES,
    REDUCTIONS,
    assert_index_error,
    assert_same_bits,
    capture,
    checks_on,
    need_free_memory,
    parametrized,
    peak_memory_beside,
    poisoned_memory,
    run_late,
    synchronisation_is_an_error,
)
from _strategies import gradient_policy
from torch import Tensor

from lt_kernels.functional import margin_cross_entropy
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_margin_cross_entropy,
    dense_margin_cross_entropy,
)

# ----------------------------------------------------------------------------------------------------------- vocabulary

BIAS: dict[str, Any] = {"options": ("class_bias",)}

#: One case of every way through the kernels.
WAYS = {
    name: BY_ID[name]
    for name in (
        "inat18 width",
        "inat18 width, probabilities",
        "wide rows",
        "class weights",
        "weighted smoothing",
        "number margin",
        "angular",
        "learnable vectors",
        "mixup per row",
        "mixup with everything",
        "probabilities with everything",
        "segmentation with everything",
        "transposed with everything",
    )
}
LARGE_ELEMENTS = 2**32 + 2**26  # offsets overflow signed and unsigned 32 bits


def step(sample: Sample, upstream: float | Tensor = 1.0, **options: Any) -> list[Tensor]:
    """Return the loss, then the gradient of everything that requires one."""
    loss = margin_cross_entropy(sample.input, sample.target, **{**sample.options, **options})
    return [loss.detach(), *torch.autograd.grad((upstream * loss).sum(), list(sample.differentiable.values()))]


# ------------------------------------------------------------------------------------- more elements than 32 bits count


def check_some_rows(x: Tensor, target: Tensor, bias: Tensor, places: list[Any]) -> None:
    """Losses and gradients at a few ``places`` (indices of rows) of x, under every policy; that no row was left out."""

    def some(tensor: Tensor) -> Tensor:
        return torch.stack([tensor[place] for place in places])

    few = Sample(some(x.detach()).requires_grad_(), some(target), {"class_bias": bias, "reduction": "none"})
    results = []
    for dtype in (x.dtype, torch.float64):
        sample = few.converted(dtype)
        loss = dense_margin_cross_entropy(sample.input, sample.target, **sample.options)
        results.append((loss, torch.autograd.grad(loss.sum(), sample.input)[0]))
    (eager_loss, eager_grad), (true_loss, true_grad) = results

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
def test_large_tensor(device: str, classes: int) -> None:
    rows = LARGE_ELEMENTS // classes + 1
    need_free_memory(4 * LARGE_ELEMENTS * 2)
    x = torch.empty((rows, classes), dtype=torch.bfloat16, device=device)
    for part in x.split(max(1, 2**28 // classes)):
        part.normal_()
    target = torch.randint(classes, (rows,), device=device)
    bias = torch.linspace(-3, 0, classes, device=device)
    passing = [offset // classes + near for offset in (2**31, 2**32) for near in (-1, 0, 1)]
    places = sorted({0, 1, rows - 2, rows - 1, *(row for row in passing if row < rows)})
    check_some_rows(x.requires_grad_(), target, bias, places)


@parametrized(large=True)
def test_large_tensor_of_pixels(device: str) -> None:
    classes = 19
    height = LARGE_ELEMENTS // (2 * classes * 4096) + 1
    need_free_memory(8 * LARGE_ELEMENTS * 2)
    x = torch.empty((2, classes, height, 4096), dtype=torch.bfloat16, device=device)
    for plane in x.flatten(0, 1):
        plane.normal_()
    target = torch.randint(classes, (2, height, 4096), device=device)
    bias = torch.linspace(-3, 0, classes, device=device)
    corners = [(0, 0, 0), (0, height - 1, 4095), (1, 0, 0), (1, height // 2, 17), (1, height - 1, 4095)]
    check_some_rows(x.requires_grad_(), target, bias, [(n, ..., h, w) for n, h, w in corners])


@parametrized(
    large=True,
    shape={"rows": (3, 8142, 2**31 + 11, 1), "columns": (64, 129, 1, 2**25 + 35)},
    reduction=REDUCTIONS,
)
def test_large_strides(device: str, shape: tuple[int, int, int, int], reduction: str) -> None:
    rows, classes, row_stride, class_stride = shape
    elements = 3 + (rows - 1) * row_stride + (classes - 1) * class_stride + 1
    need_free_memory(elements * 2 + 2**30)
    sample = Case("far apart", rows, classes, **BIAS).sample(torch.bfloat16, device, reduction=reduction)
    storage = torch.empty(elements, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((rows, classes), (row_stride, class_stride), 3)
    far.copy_(sample.input.detach())
    sample.input = far.requires_grad_()
    for policy in POLICIES:
        with gradient_policy(policy):
            check_margin_cross_entropy(margin_cross_entropy, sample)


# ---------------------------------------------------------------------------------- streams, graphs, synchronisation


@parametrized(case=WAYS, reduction=REDUCTIONS, policy=POLICIES)
def test_no_synchronisation(device: str, case: Case, reduction: str, policy: str) -> None:
    sample = case.sample(torch.bfloat16, device, reduction=reduction)
    with gradient_policy(policy):
        step(sample, upstream=0.5)  # compiles, and loads modules
        with synchronisation_is_an_error():
            step(sample, upstream=0.5)


@parametrized(case=WAYS, reduction=REDUCTIONS, policy=POLICIES)
def test_graph_replay(device: str, case: Case, reduction: str, policy: str) -> None:
    """Captured once, replayed over other values in the same memory: the bits of a call on those values."""
    static, *others = (case.sample(torch.bfloat16, device, seed=seed, reduction=reduction) for seed in range(3))
    with gradient_policy(policy):
        graph, captured = capture(lambda: step(static, upstream=-0.5))
        for other in others:
            for name, value in static.tensors.items():
                value.detach().copy_(other.tensors[name].detach())
            expected = step(other, upstream=-0.5)
            for _ in range(2):
                graph.replay()
                assert_same_bits(captured, expected, "replay")


@parametrized(case=WAYS, reduction=REDUCTIONS)
def test_side_stream(device: str, case: Case, reduction: str) -> None:
    """Logits that a stream makes late are read after they are made: every launch is on the current stream."""
    sample = case.sample(torch.bfloat16, device, reduction=reduction)
    expected = step(sample, upstream=0.5)
    actual = run_late(sample.input, lambda: step(sample, upstream=0.5))
    assert_same_bits(actual, expected, "side stream")


@parametrized(case=WAYS)
def test_second_device(device: str, case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    assert torch.cuda.current_device() == 0
    sample = case.sample(torch.float32, "cuda:1")
    check_margin_cross_entropy(margin_cross_entropy, sample, upstream=0.7)
    assert torch.cuda.current_device() == 0


# ------------------------------------------------------------------------------------------------- training loops


@parametrized(policy=POLICIES)
def test_autocast(device: str, policy: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, device=device, requires_grad=True)
    w = torch.randn(33, 16, device=device, requires_grad=True)
    y = torch.tensor([0, 5, 32, 7], device=device)
    with gradient_policy(policy), torch.autocast(device, dtype=torch.bfloat16):
        logits = F.linear(x, w)
        loss = margin_cross_entropy(logits, y)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert {leaf.grad.dtype for leaf in (x, w) if leaf.grad is not None} == {torch.float32}
    assert torch.equal(loss, margin_cross_entropy(logits, y)), "autocast changed the loss"


@parametrized(anywhere=True, policy=POLICIES)
def test_grad_scaler(device: str, policy: str) -> None:
    """A float16 step with loss scaling is as close to float64 as the eager one, and no step is dropped."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 64, device=device), torch.randint(8142, (32,), device=device)
    weight = torch.randn(8142, 64, device=device) / 8
    exact = weight.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(F.linear(x.double(), exact), y), exact)
    grads = []
    for loss_function in (margin_cross_entropy, F.cross_entropy):
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
        with gradient_policy(policy), torch.autocast(device, dtype=torch.float16):
            logits = F.linear(x, parameter)
            assert logits.dtype == torch.float16
            loss = loss_function(logits, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**12, "an overflow was found"
        grads.append(parameter.grad)
    ours, eager = grads
    assert ours is not None
    assert eager is not None
    assert_within_budget(ours, eager, truth, "gradient of the weight")


@parametrized(dtype=HALF_AND_SINGLE, policy=POLICIES)
def test_retained_graph(device: str, dtype: torch.dtype, policy: str) -> None:
    sample = WAYS["inat18 width"].sample(dtype, device)
    x = sample.input
    with gradient_policy(policy):
        once = step(sample)[1].float()
        loss = margin_cross_entropy(x, sample.target, **sample.options)
    for factor in (2.0, -0.25, 1.0, 0.0):
        (grad,) = torch.autograd.grad(factor * loss, x, retain_graph=True)
        assert_within_budget(grad, (factor * once).to(dtype), factor * once.double(), f"{factor} * loss", roundings=2.0)


@parametrized(anywhere=True, dtype=HALF_AND_SINGLE, policy=POLICIES)
def test_gradient_accumulation(device: str, dtype: torch.dtype, policy: str) -> None:
    samples = [WAYS["inat18 width"].sample(dtype, device, seed=seed) for seed in range(4)]
    x = samples[0].input.detach().requires_grad_()
    expected = torch.zeros_like(x)
    with gradient_policy(policy):
        for sample in samples:
            loss = margin_cross_entropy(x, sample.target, **sample.options) / len(samples)
            (alone,) = torch.autograd.grad(loss, x, retain_graph=True)
            expected += alone
            loss.backward()
    torch.testing.assert_close(x.grad, expected)


@parametrized(
    policy=POLICIES, upstream={str(value): value for value in (1.0, 0.5, -3.7, 0.0, 65536.0)}, dtype=HALF_AND_SINGLE
)
def test_every_upstream_gradient(device: str, policy: str, upstream: float, dtype: torch.dtype) -> None:
    for name in ("inat18 width", "mixup with everything", "segmentation with everything"):
        with gradient_policy(policy):
            check_margin_cross_entropy(margin_cross_entropy, WAYS[name].sample(dtype, device), upstream=upstream)


@parametrized(
    dtype=DTYPES,
    classes={str(c): c for c in (8142, 8192, 65_536, 100_003)},
    policy=POLICIES,
)
def test_peak_memory(device: str, dtype: torch.dtype, classes: int, policy: str) -> None:
    """A step allocates the gradient and some numbers per row and per class."""
    rows = 2**26 // classes
    x = torch.randn((rows, classes), dtype=dtype, device=device).requires_grad_()
    target = torch.randint(classes, (rows,), device=device)
    sample = Sample(x, target, {"class_bias": torch.randn(classes, device=device)})
    with gradient_policy(policy):
        extra = peak_memory_beside(lambda: step(sample, upstream=0.5), x.numel() * x.element_size())
    allowed = 64 * rows + 16 * classes + 2**20
    assert extra <= allowed, f"{extra} bytes beside the gradient, at most {allowed}"


# ------------------------------------------------------------------------------------------------------------ bad input

BAD_CASES = {
    "rows": Case("rows", 5, 1203, **BIAS),
    "wide rows": Case("wide rows", 3, 100_003, **BIAS),
    "few classes": Case("few classes", 5, 33, **BIAS),
    "pixels": Case("pixels", 2, 19, (5, 7), **BIAS),
    "mixed": Case("mixed", 5, 1203, options=("class_bias", "mixed_target")),
    "angular": Case("angular", 5, 1203, options=("margin",), keywords={"margin_type": "angular", "scale": 16.0}),
}


@parametrized(anywhere=True, case=BAD_CASES, value=BAD_TARGETS)
def test_bad_targets(device: str, case: Case, value: int | None) -> None:
    """A class out of range: a NaN row and nothing else, or with checks on (and on the CPU) an error."""
    value = case.classes if value is None else value
    sample = case.sample(torch.float32, device, reduction="none")
    good = {reduction: step(sample, reduction=reduction) for reduction in ("none", "mean")}
    target = sample.options.get("mixed_target", sample.target)
    target.view(-1)[1] = value
    with checks_on():
        assert_index_error(lambda: step(sample), "row 1 has class")
    if device == "cpu":
        assert_index_error(lambda: step(sample), "row 1 has class")
        return
    bad = torch.zeros_like(target, dtype=torch.bool)
    bad.view(-1)[1] = True
    loss, grad = step(sample)
    assert torch.equal(loss.isnan(), bad), "the rows whose loss is NaN are not the bad ones"
    for reduction, policy in (("none", "auto"), ("mean", "one_pass"), ("mean", "recompute")):
        with gradient_policy(policy):
            loss, grad = step(sample, reduction=reduction)
        assert bool(loss.isnan().any())
        assert torch.equal(grad.isnan(), bad.unsqueeze(1).expand_as(grad)), f"{reduction}, {policy}: wrong rows are NaN"
        clean = grad.masked_fill(bad.unsqueeze(1), 0.0)
        before = good[reduction][1].masked_fill(bad.unsqueeze(1), 0.0)
        torch.testing.assert_close(clean, before, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------------------------- values


@parametrized(
    classes={str(c): c for c in (65_536, 100_003, 1_000_000)},
    dtype=DTYPES,
    options={
        "bias": BIAS,
        "learned": {"options": ("class_bias",), "requires_grad": ("input", "class_bias")},
        "mixed": {"options": ("weight", "class_bias", "mixed_target")},
        "smoothed": {"options": ("weight", "class_bias"), "keywords": {"label_smoothing": 0.1}},
    },
)
def test_very_many_classes(device: str, classes: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    sample = Case("many", 3, classes, **options).sample(dtype, device)
    check_margin_cross_entropy(margin_cross_entropy, sample, upstream=0.7)


@parametrized(
    shape={
        "8142": (1024, 8142, ()),
        "65536": (64, 65_536, ()),
        "1000003": (4, 1_000_003, ()),
        "pixels": (4, 150, (96, 96)),
    },
    learned={"": ("input",), "learned": ("input", "class_bias")},
    dtype=HALF_AND_SINGLE,
)
def test_determinism(
    device: str, shape: tuple[int, int, tuple[int, ...]], learned: tuple[str, ...], dtype: torch.dtype
) -> None:
    case = Case("many rows", *shape, **BIAS, requires_grad=learned)
    sample = case.sample(dtype, device)
    first = step(sample)
    for _ in range(3):
        assert_same_bits(step(sample), first, "another run")


@parametrized(case=BY_ID, reduction=REDUCTIONS)
def test_every_element_is_written(device: str, case: Case, reduction: str) -> None:
    """The same bits where all fresh memory is NaN, and again in a second run."""
    sample = case.sample(torch.float32, device, reduction=reduction)
    expected = step(sample)
    with poisoned_memory():
        assert_same_bits(step(sample), expected, "poisoned memory")
    assert_same_bits(step(sample), expected, "second run")


@parametrized(case=WAYS, dtype=DTYPES)
def test_every_output(device: str, case: Case, dtype: torch.dtype) -> None:
    sample = case.sample(dtype, device)
    output = margin_cross_entropy(
        sample.input, sample.target, return_prediction=True, return_lse=True, **sample.options
    )
    assert torch.equal(output.prediction.cpu(), sample.input.cpu().argmax(1)), "the prediction is not the argmax"
    assert output.lse.shape == output.prediction.shape
    assert bool(output.lse.isfinite().all())
    alone = margin_cross_entropy(sample.input, sample.target, **sample.options)
    torch.testing.assert_close(output.loss, alone)
