"""What must hold on a device, as plain functions: they need torch and this package, no test framework.

``CHECKS`` maps a readable name to a ``Check``. ``test_device.py`` hands them to pytest; where there is none,
``tools/run_device_checks.py`` runs them, in several processes. A check passes by returning, fails by raising, and is
skipped by raising ``unittest.SkipTest``; it runs with the backend under test selected.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from cases import CASES, Case
from torch import Tensor

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import margin_cross_entropy
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_margin_cross_entropy,
    dense_margin_cross_entropy,
)


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    body: Callable[..., None]
    arguments: dict[str, Any]
    needs_cuda: bool
    large: bool  # takes so much of the device's memory that no other large one runs beside it

    def run(self, backend: str, device: str) -> None:
        if self.needs_cuda and not device.startswith("cuda"):
            raise SkipTest("needs a CUDA device")
        try:
            with lt_kernels.use_backend(backend):
                self.body(device, **self.arguments)
        finally:
            if self.large:
                torch.cuda.empty_cache()  # the device is shared with other processes


CHECKS: dict[str, Check] = {}


def check(
    *, needs_cuda: bool = False, large: bool = False, **parameters: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function once for every combination of ``parameters`` (argument name -> readable id -> value)."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        for combination in itertools.product(*(choices.items() for choices in parameters.values())):
            ids = "-".join(identifier for identifier, _ in combination)
            name = f"{body.__name__}[{ids}]" if ids else body.__name__
            arguments = dict(zip(parameters, (value for _, value in combination), strict=True))
            assert name not in CHECKS
            CHECKS[name] = Check(name, body, arguments, needs_cuda, large)
        return body

    return register


# ----------------------------------------------------------------------------------------------------------- vocabulary

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
HALF_AND_SINGLE = {name: DTYPES[name] for name in ("bf16", "fp32")}
REDUCTIONS = {"mean": "mean", "none": "none"}
POLICIES = {"one_pass": "one_pass", "recompute": "recompute"}
BY_ID = {case.id: case for case in CASES}
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


@contextmanager
def gradient_policy(policy: str) -> Iterator[None]:
    before = _settings.gradient_policy
    lt_kernels.set_gradient_policy(policy)
    try:
        yield
    finally:
        lt_kernels.set_gradient_policy(before)


@contextmanager
def checks_on() -> Iterator[None]:
    lt_kernels.set_checks(True)
    try:
        yield
    finally:
        lt_kernels.set_checks(False)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor starts as NaN, and torch operators whose bits vary from run to run raise."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def step(sample: Sample, upstream: float | Tensor = 1.0, **options: Any) -> list[Tensor]:
    """The loss, then the gradient of everything that requires one."""
    loss = margin_cross_entropy(sample.input, sample.target, **{**sample.options, **options})
    return [loss.detach(), *torch.autograd.grad((upstream * loss).sum(), list(sample.differentiable.values()))]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())):
            differ = int((a != b).sum())
            raise AssertionError(f"{what}: {differ} of {a.numel()} elements of result {position} differ")


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    """Torch warns once that the mode does not detect everything."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_all_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], names: Iterable[str], **tolerances: float
) -> None:
    """torch.testing.assert_close of each, whose message says which."""
    for name, a, b in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda message, name=name: f"{name}: {message}", **tolerances)


def need_free_memory(size: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < size:
        raise SkipTest(f"needs {size / 2**30:.0f} GiB of free device memory, {free / 2**30:.0f} are")


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


@check(needs_cuda=True, large=True, classes={"8142": 8142, "1000003": 1_000_003})
def large_tensor(device: str, classes: int) -> None:
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


@check(needs_cuda=True, large=True)
def large_tensor_of_pixels(device: str) -> None:
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


@check(
    needs_cuda=True,
    large=True,
    shape={"rows": (3, 8142, 2**31 + 11, 1), "columns": (64, 129, 1, 2**25 + 35)},
    reduction=REDUCTIONS,
)
def large_strides(device: str, shape: tuple[int, int, int, int], reduction: str) -> None:
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


@check(needs_cuda=True, case=WAYS, reduction=REDUCTIONS, policy=POLICIES)
def no_synchronisation(device: str, case: Case, reduction: str, policy: str) -> None:
    sample = case.sample(torch.bfloat16, device, reduction=reduction)
    with gradient_policy(policy):
        step(sample, upstream=0.5)  # compiles, and loads modules
        with synchronisation_is_an_error():
            step(sample, upstream=0.5)


@check(needs_cuda=True, case=WAYS, reduction=REDUCTIONS, policy=POLICIES)
def graph_replay(device: str, case: Case, reduction: str, policy: str) -> None:
    """Captured once, replayed over other values in the same memory: the bits of a call on those values."""
    static, *others = (case.sample(torch.bfloat16, device, seed=seed, reduction=reduction) for seed in range(3))
    with gradient_policy(policy):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(static, upstream=-0.5)  # compiles, and loads modules
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(static, upstream=-0.5)
        for other in others:
            for name, value in all_tensors(static).items():
                value.detach().copy_(all_tensors(other)[name].detach())
            expected = step(other, upstream=-0.5)
            for _ in range(2):
                graph.replay()
                assert_same_bits(captured, expected, "replay")


def all_tensors(sample: Sample) -> dict[str, Tensor]:
    named = {"input": sample.input, "target": sample.target, **sample.options}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@check(needs_cuda=True, case=WAYS, reduction=REDUCTIONS)
def side_stream(device: str, case: Case, reduction: str) -> None:
    """Logits that a stream makes late are read after they are made: every launch is on the current stream."""
    sample = case.sample(torch.bfloat16, device, reduction=reduction)
    expected = step(sample, upstream=0.5)
    values = sample.input.detach().clone()
    sample.input.detach().fill_(math.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        sample.input.detach().copy_(values)
        actual = step(sample, upstream=0.5)
    stream.synchronize()
    assert_same_bits(actual, expected, "side stream")


@check(needs_cuda=True, case=WAYS)
def second_device(device: str, case: Case) -> None:
    if torch.cuda.device_count() < 2:
        raise SkipTest("there is one CUDA device")
    assert torch.cuda.current_device() == 0
    sample = case.sample(torch.float32, "cuda:1")
    check_margin_cross_entropy(margin_cross_entropy, sample, upstream=0.7)
    assert torch.cuda.current_device() == 0


# ------------------------------------------------------------------------------------------------- training loops


@check(case={name: BY_ID[name] for name in ("plain", "mixup with everything", "probabilities with everything")})
def compile_fullgraph(device: str, case: Case) -> None:
    torch._dynamo.reset()
    sample = case.sample(torch.float32, device)

    def call(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return 2 * margin_cross_entropy(x.sin(), y, **options)

    leaves = sample.differentiable
    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        loss = function(sample.input, sample.target, **sample.options)
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    eager, compiled = results
    assert_all_close(compiled, eager, ["loss", *(f"gradient of {name}" for name in leaves)])


@check(policy=POLICIES)
def autocast(device: str, policy: str) -> None:
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


@check(policy=POLICIES)
def grad_scaler(device: str, policy: str) -> None:
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


@check(dtype=HALF_AND_SINGLE, policy=POLICIES)
def retained_graph(device: str, dtype: torch.dtype, policy: str) -> None:
    sample = WAYS["inat18 width"].sample(dtype, device)
    x = sample.input
    with gradient_policy(policy):
        once = step(sample)[1].float()
        loss = margin_cross_entropy(x, sample.target, **sample.options)
    for factor in (2.0, -0.25, 1.0, 0.0):
        (grad,) = torch.autograd.grad(factor * loss, x, retain_graph=True)
        assert_within_budget(grad, (factor * once).to(dtype), factor * once.double(), f"{factor} * loss", roundings=2.0)


@check(dtype=HALF_AND_SINGLE, policy=POLICIES)
def gradient_accumulation(device: str, dtype: torch.dtype, policy: str) -> None:
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


@check(policy=POLICIES, upstream={str(value): value for value in (1.0, 0.5, -3.7, 0.0, 65536.0)}, dtype=HALF_AND_SINGLE)
def every_upstream_gradient(device: str, policy: str, upstream: float, dtype: torch.dtype) -> None:
    for name in ("inat18 width", "mixup with everything", "segmentation with everything"):
        with gradient_policy(policy):
            check_margin_cross_entropy(margin_cross_entropy, WAYS[name].sample(dtype, device), upstream=upstream)


@check(
    needs_cuda=True,
    dtype=DTYPES,
    classes={str(c): c for c in (8142, 8192, 65_536, 100_003)},
    policy=POLICIES,
)
def peak_memory(device: str, dtype: torch.dtype, classes: int, policy: str) -> None:
    """A step allocates the gradient and some numbers per row and per class."""
    rows = 2**26 // classes
    x = torch.randn((rows, classes), dtype=dtype, device=device).requires_grad_()
    target = torch.randint(classes, (rows,), device=device)
    sample = Sample(x, target, {"class_bias": torch.randn(classes, device=device)})
    with gradient_policy(policy):
        step(sample)  # compiles, and loads modules
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(sample, upstream=0.5)
        torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - x.numel() * x.element_size()
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
BAD_TARGETS = {"-1": -1, "classes": None, "2^40": 2**40, "lowest": -(2**63)}


@check(case=BAD_CASES, value=BAD_TARGETS)
def bad_targets(device: str, case: Case, value: int | None) -> None:
    """A class out of range: a NaN row and nothing else, or with checks on (and on the CPU) an error."""
    value = case.classes if value is None else value
    sample = case.sample(torch.float32, device, reduction="none")
    good = {reduction: step(sample, reduction=reduction) for reduction in ("none", "mean")}
    target = sample.options.get("mixed_target", sample.target)
    target.view(-1)[1] = value
    with checks_on():
        assert_index_error(sample)
    if device == "cpu":
        assert_index_error(sample)
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


def assert_index_error(sample: Sample) -> None:
    message = "a target out of range raised nothing"
    try:
        margin_cross_entropy(sample.input, sample.target, **sample.options)
    except IndexError as error:
        message = str(error)
    assert "row 1 has class" in message, message


# --------------------------------------------------------------------------------------------------------------- values


@check(
    classes={str(c): c for c in (65_536, 100_003, 1_000_000)},
    dtype=DTYPES,
    options={
        "bias": BIAS,
        "learned": {"options": ("class_bias",), "requires_grad": ("input", "class_bias")},
        "mixed": {"options": ("weight", "class_bias", "mixed_target")},
        "smoothed": {"options": ("weight", "class_bias"), "keywords": {"label_smoothing": 0.1}},
    },
)
def very_many_classes(device: str, classes: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    sample = Case("many", 3, classes, **options).sample(dtype, device)
    check_margin_cross_entropy(margin_cross_entropy, sample, upstream=0.7)


@check(
    shape={
        "8142": (1024, 8142, ()),
        "65536": (64, 65_536, ()),
        "1000003": (4, 1_000_003, ()),
        "pixels": (4, 150, (96, 96)),
    },
    learned={"": ("input",), "learned": ("input", "class_bias")},
    dtype=HALF_AND_SINGLE,
)
def determinism(
    device: str, shape: tuple[int, int, tuple[int, ...]], learned: tuple[str, ...], dtype: torch.dtype
) -> None:
    case = Case("many rows", *shape, **BIAS, requires_grad=learned)
    sample = case.sample(dtype, device)
    first = step(sample)
    for _ in range(3):
        assert_same_bits(step(sample), first, "another run")


@check(case=BY_ID, reduction=REDUCTIONS)
def every_element_is_written(device: str, case: Case, reduction: str) -> None:
    """The same bits where all fresh memory is NaN, and again in a second run."""
    sample = case.sample(torch.float32, device, reduction=reduction)
    expected = step(sample)
    with poisoned_memory():
        assert_same_bits(step(sample), expected, "poisoned memory")
    assert_same_bits(step(sample), expected, "second run")


@check(case=WAYS, dtype=DTYPES)
def every_output(device: str, case: Case, dtype: torch.dtype) -> None:
    sample = case.sample(dtype, device)
    output = margin_cross_entropy(
        sample.input, sample.target, return_prediction=True, return_lse=True, **sample.options
    )
    assert torch.equal(output.prediction.cpu(), sample.input.cpu().argmax(1)), "the prediction is not the argmax"
    assert output.lse.shape == output.prediction.shape
    assert bool(output.lse.isfinite().all())
    alone = margin_cross_entropy(sample.input, sample.target, **sample.options)
    torch.testing.assert_close(output.loss, alone)


@check(case=BY_ID, dtype=DTYPES, reduction={**REDUCTIONS, "sum": "sum"})
def value_and_every_gradient(device: str, case: Case, dtype: torch.dtype, reduction: str) -> None:
    if dtype == torch.float16 and case.spread > 100:
        case = dataclasses.replace(case, spread=1e3)  # 1e4 standard deviations overflow float16
    sample = case.sample(dtype, device, reduction=reduction)
    upstream: float | Tensor = 0.7
    if reduction == "none":
        shape = sample.input.select(1, 0).shape
        upstream = torch.linspace(-1, 2, math.prod(shape), device=device).reshape(shape)
    check_margin_cross_entropy(margin_cross_entropy, sample, upstream=upstream)


@check(case=BY_ID, reduction=REDUCTIONS)
def double_precision(device: str, case: Case, reduction: str) -> None:
    if _settings.backend == "triton":
        raise SkipTest("Triton kernels take no float64")
    sample = case.sample(torch.float64, device, reduction=reduction)
    check_margin_cross_entropy(margin_cross_entropy, sample, upstream=0.7)


import contrastive_checks  # noqa: E402, F401  registers the checks of contrastive losses beside these
import expert_checks  # noqa: E402, F401  those of experts
import linear_checks  # noqa: E402, F401  and those of linear heads
