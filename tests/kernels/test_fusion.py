"""The kernels of expert_fusion; the truth is float64, eager is the compute dtype, both on the same rounded logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import _forced_launches as forced
import pytest
import torch
from _arguments import converted
from _engines import DTYPES, ENGINE, of_backends
from _expert_logits import LAYOUTS, SHAPES, check_most_experts, drawn, repeated, vector, with_barriers
from _layouts import guarded, window
from _orders import check_same_bits_in_any_order
from torch import Tensor

from lt_kernels.ops._backend import load
from lt_kernels.ops.expert_fusion import reference
from lt_kernels.ops.expert_fusion.arguments import Arguments
from lt_kernels.ops.expert_fusion.fused import fused, normalized
from lt_kernels.testing import assert_within_budget


def arguments(logits: list[Tensor], everything: bool = True) -> Arguments:
    experts, _, classes = logits[0].shape if logits[0].dim() == 3 else (len(logits), *logits[0].shape)
    weights = [0.5 + 0.25 * e for e in range(experts)]
    if not everything:
        return Arguments(logits, None, None, None, weights, 1.0)
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    shift = torch.linspace(-2, 1, classes, dtype=dtype)
    shift[classes // 2] = -math.inf if classes > 1 else 0.0
    weight = torch.linspace(1, 2, experts, dtype=dtype)
    scale = torch.tensor(0.75, dtype=dtype, device=ENGINE.device)
    return Arguments(logits, vector(weight), vector(shift), scale, weights, 0.5)


def check(a: Arguments, k: int, with_log_probs: bool = True, *, backend: str) -> None:
    values, classes, mass, log_probs = load("expert_fusion", backend).forward(a, k, with_log_probs)
    truth, eager = (fused(converted(a, dtype)) for dtype in (torch.float64, a.compute_dtype))
    assert values.dtype == mass.dtype == log_probs.dtype == a.compute_dtype
    assert classes.dtype == torch.int64
    assert all(len(set(row)) == k for row in classes.tolist())
    assert_within_budget(mass, *((u - u.amax(1, keepdim=True)).exp().sum(1) for u in (eager, truth)), "mass")
    assert_within_budget(values, eager.gather(1, classes), truth.gather(1, classes), "values of the classes")
    assert_within_budget(values, eager.topk(k, 1).values, truth.topk(k, 1).values, "the largest")
    if with_log_probs:
        assert_within_budget(log_probs, eager.log_softmax(1), truth.log_softmax(1), "log-probabilities")
    else:
        assert log_probs.shape == (0,)


@pytest.mark.backends("native")
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, everything, backend, chip):
    for k in (1, 3, 5, 20, 70):  # 70: sorted
        if k <= shape[2]:
            check(arguments([drawn(shape, DTYPES[dtype], backend)], everything), k, k != 5, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, chip):
    dtypes = ("bf16",) if layout in ("list", "samples first", "odd window") else ("fp32",)
    sizes = ((3, 2, 1, 1), (3, 2, 33, 3), (1, 2, 129, 20), (3, 2, 600, 1))
    if backend == "native":
        dtypes, sizes = ("fp32", "bf16"), ((3, 3, 130, 3), (9, 2, 33, 3))
    for dtype in dtypes:
        for *shape, k in sizes:
            x = repeated(drawn(tuple(shape), DTYPES[dtype], backend), layout)
            check(arguments(LAYOUTS[layout](x), shape[2] != 129), k, backend=backend)


@pytest.mark.parametrize("experts", [2, 6, 9])
def test_other_numbers_of_experts(experts, backend, chip):
    for layout in ("stacked", "list"):
        check(arguments(LAYOUTS[layout](drawn((experts, 2, 300), torch.float16, backend))), 1, False, backend=backend)


@pytest.mark.parametrize(
    ("classes", "k", "dtype"),
    [(8142, 1, "bf16"), (8142, 5, "fp32"), (8199, 3, "fp32"), (16_391, 3, "bf16"), (24_001, 20, "bf16")],
)
def test_wide_rows(classes, k, dtype, backend, chip):
    """In one part, and in several."""
    check(arguments(LAYOUTS["stacked"](drawn((2, 2, classes), DTYPES[dtype], backend))), k, backend=backend)


@pytest.fixture(params=of_backends(triton=("one part", "parts"), native=("one part",)))
def parts(request, monkeypatch):
    """Cut rows as the launch table has it, or into parts of two tiles of 32 lanes."""
    if request.param == "parts":
        forced.fusion_parts(monkeypatch)


@pytest.mark.parametrize("k", [1, 3, 9, 70])
def test_probabilities(k, parts, backend, chip):
    """With normalize: probabilities in place of values, the log-sum-exp in place of the sum."""
    x = drawn((2, 5, 1203), DTYPES["fp32"], backend)
    x[:, 0] = -math.inf
    x[:, 1, 7] = math.inf
    x[:, 2, 1200] = math.nan
    x[:, 3, :1200] = -math.inf
    a = arguments([x])._replace(normalize=True)
    values, classes, lse, log_probs = load("expert_fusion", backend).forward(a, k, True)
    plain = load("expert_fusion", backend).forward(a._replace(normalize=False), k, True)
    expected = normalized(plain[0], plain[2])
    assert torch.equal(classes, plain[1])
    torch.testing.assert_close(values, expected[0], rtol=3e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(lse, expected[1], rtol=3e-7, atol=3e-7, equal_nan=True)
    torch.testing.assert_close(log_probs, plain[3], rtol=0, atol=0, equal_nan=True)
    assert lse[0] == -math.inf
    assert bool(values[4].sum() < 1.0)
    assert bool(values[4].sum() > 0.0)


@pytest.mark.parametrize(("before", "dtype"), [(0, "bf16"), (1, "bf16"), (4, "fp32")])
def test_no_neighbouring_memory_is_read(before, dtype, parts, backend, chip):
    check(arguments([window(drawn((2, 2, 1203), DTYPES[dtype], backend), before, 3, dim=2)]), 2, backend=backend)


@pytest.mark.backends("native")
@pytest.mark.parametrize("before", range(1, 9))
def test_rows_at_any_address(before, backend, chip):
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 17, 1001):
            check(arguments([guarded(drawn((3, 3, classes), dtype, backend), before)]), 2, backend=backend)


def check_order(x: Tensor, k: int, weights: list[float], backend: str) -> None:
    """Equal values are in the order of a stable sort; a row with NaN or an infinite maximum has NaN for its sum."""
    a = Arguments([guarded(x)], None, None, None, weights, 1.0)
    expected = reference.forward(a, k, True)
    for with_log_probs in (False, True):
        values, classes, mass, log_probs = load("expert_fusion", backend).forward(a, k, with_log_probs)
        assert torch.equal(classes, expected[1])
        torch.testing.assert_close(values, expected[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(mass, expected[2], rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(log_probs, expected[3], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_first_of_equals(k, parts, backend, chip):
    """Sums of small integers, equal at both ends, in every tile and part, and next to NaN."""
    x = torch.randint(-2, 2, (2, 8, 1203), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 0.0
    x[:, 0, ::2] = -0.0
    x[:, 1, [5, 511, 512, 700, 1202]] = 9.0
    x[:, 2, [1200, 1201, 1202]] = 9.0
    x[:, 3] = -math.inf
    x[:, 4, :1200] = -math.inf
    x[0, 5, [650, 3, 1202]] = math.nan
    x[1, 6, 1202] = math.nan
    x[:, 7, [600, 601]] = math.inf
    check_order(x.to(ENGINE.device, torch.bfloat16), k, [1.0, 2.0], backend)


@pytest.mark.backends("native")
@pytest.mark.parametrize("classes", [50, 1000, 8142])
def test_order_of_equals_nan_and_infinities(classes, backend, chip):
    x = drawn((3, 6, classes), torch.bfloat16, backend).round()
    x[:, 0] = 0.0
    x[1, 1, [20, 9]] = math.nan
    x[0, 2, 31] = math.inf
    x[2, 3] = -math.inf
    x[1, 4, : classes - 3] = -math.inf
    for weights in ([1.0, 1.0, 1.0], [0.0, 1.0, 0.0]):  # 0 times infinity is NaN
        for k in (1, 5, 50):
            check_order(x, k, weights, backend)


@pytest.mark.backends("triton")
def test_masked_classes(parts, backend, chip):
    """Whole tiles and parts of -inf; rows far from zero."""
    x = drawn((2, 3, 1403), torch.float32, backend)
    x[:, 0, :700] = -math.inf
    x[0, 1, 300:] = -math.inf
    x[:, 2] += 1e4
    check(arguments([guarded(x)], everything=False), 2, backend=backend)


@pytest.mark.parametrize("k", [3, 9])
def test_no_rows_and_the_same_bits_every_time(k, parts, backend, chip):
    a = arguments([guarded(drawn((3, 2, 1200), torch.bfloat16, backend))])
    forward = load("expert_fusion", backend).forward
    for first, second in zip(forward(a, k, True), forward(a, k, True), strict=True):
        assert torch.equal(first, second)
    shapes = [tuple(value.shape) for value in forward(a._replace(logits=[a.logits[0][:, :0]]), k, True)]
    assert shapes == [(0, k), (0, k), (0,), (0, 1200)]


@pytest.mark.backends("native")
def test_the_same_bits_in_any_order_of_threads(backend, chip):
    def everything() -> Iterator[Tensor]:
        for logits, k in product(with_barriers(backend), (1, 5)):
            yield from load("expert_fusion", backend).forward(arguments(logits), k, True)

    check_same_bits_in_any_order(everything)


@pytest.mark.backends("native")
def test_more_experts_than_shared_memory_holds(backend, chip, monkeypatch):
    forward = load("expert_fusion", backend).forward
    check_most_experts(lambda logits: forward(arguments(logits, everything=False), 1, False), monkeypatch)
