"""What only the CUDA kernels of experts do: run by ``test_cuda_experts.py`` with the plugin ``emulated_cuda``."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from _cases.rows import DTYPES
from torch import Tensor

from lt_kernels.ops.expert_divergence import native as divergence
from lt_kernels.ops.expert_divergence import reference as divergence_reference
from lt_kernels.ops.expert_fusion import native as fusion
from lt_kernels.ops.expert_fusion import reference as fusion_reference
from lt_kernels.ops.expert_fusion.arguments import Arguments
from lt_kernels.ops.expert_fusion.fused import fused
from lt_kernels.testing import assert_within_budget

LARGE = os.environ["LTK_EMULATED_DEVICE"].split()[1] == "232448"
#: Experts, rows, classes: on the small chips of several tiles, and of rows that do not stay in shared memory.
SHAPES = [(1, 3, 33), (3, 3, 1), (3, 4, 129), (8, 2, 1000), (9, 2, 1000), (3, 3, 8142), (20, 2, 65)]
KINDS = {"to_mean": ("to_mean", True), "through the mean": ("to_mean", False), "pairwise": ("pairwise", True)}


@pytest.fixture(autouse=True)
def emulated():
    assert fusion.forward.__module__ == divergence.forward.__module__ == "emulated_cuda"


def transposed(x: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1).contiguous().transpose(0, 1)]


def guarded(x: Tensor, before: int) -> Tensor:
    """x inside a larger allocation of NaN, beginning ``before`` elements after an aligned address."""
    room = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype)
    inside = room[32 + before : 32 + before + x.numel()].view(x.shape)
    return inside.copy_(x)


LAYOUTS = {
    "stacked": lambda x: [x],
    "samples first": transposed,
    "classes first": lambda x: [x.permute(0, 2, 1).contiguous().permute(0, 2, 1)],
    "list": lambda x: list(x.clone()),
    "list at any address": lambda x: [guarded(each, e) for e, each in enumerate(x)],
    "one for all": lambda x: [x[:1].expand(x.shape)],
}


def draw(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def converted(logits: list[Tensor], vector: Tensor | None, dtype: torch.dtype):
    return [x.to(dtype) for x in logits], None if vector is None else vector.to(dtype)


# -------------------------------------------------------------------------------------------------------------- fusion


def fusion_arguments(logits: list[Tensor], options: str) -> Arguments:
    experts, _, classes = logits[0].shape if logits[0].dim() == 3 else (len(logits), *logits[0].shape)
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    weights = [0.5 + 0.25 * e for e in range(experts)]
    if options == "plain":
        return Arguments(logits, None, None, None, weights, 1.0)
    shift = torch.linspace(-2, 1, classes, dtype=dtype)
    shift[classes // 2] = -math.inf if classes > 1 else 0.0
    weight = torch.linspace(1, 2, experts, dtype=dtype)
    return Arguments(logits, weight, shift, torch.tensor(0.75, dtype=dtype), weights, 0.5)


def check_fusion(a: Arguments, k: int, with_log_probs: bool) -> None:
    def to(dtype: torch.dtype) -> Arguments:
        return Arguments(*(v.to(dtype) if isinstance(v, Tensor) else v for v in a))._replace(
            logits=[x.to(dtype) for x in a.logits]
        )

    values, classes, mass, log_probs = fusion.forward(a, k, with_log_probs)
    truth, eager = (fused(to(dtype)) for dtype in (torch.float64, a.compute_dtype))
    assert values.dtype == mass.dtype == log_probs.dtype == a.compute_dtype
    assert classes.dtype == torch.int64
    assert all(len(set(row)) == k for row in classes.tolist())
    assert_within_budget(mass, *((u - u.amax(1, keepdim=True)).exp().sum(1) for u in (eager, truth)), "mass")
    assert_within_budget(values, eager.gather(1, classes), truth.gather(1, classes), "values")
    assert_within_budget(values, eager.topk(k, 1).values, truth.topk(k, 1).values, "the largest")
    if with_log_probs:
        assert_within_budget(log_probs, eager.log_softmax(1), truth.log_softmax(1), "log-probabilities")
    else:
        assert log_probs.shape == (0,)


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fusion(shape, dtype, options):
    for k in (1, 3, 5, 20, 70):  # 70: sorted
        if k <= shape[2]:
            a = fusion_arguments([draw(shape, DTYPES[dtype])], options)
            check_fusion(a, k, with_log_probs=k != 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fusion_of_every_layout(layout):
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((3, 3, 130), (9, 2, 33)):
            check_fusion(fusion_arguments(LAYOUTS[layout](draw(shape, dtype)), "all"), 3, True)


@pytest.mark.parametrize("before", range(1, 9))
def test_rows_at_any_address(before):
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 17, 1001):
            logits = [guarded(draw((3, 3, classes), dtype), before)]
            check_fusion(fusion_arguments(logits, "all"), 2, True)
            check_divergence(logits, None, "pairwise", True)


@pytest.mark.parametrize("classes", [50, 1000, 8142])
def test_order_of_equals_nan_and_infinities(classes):
    """As a stable sort has it; a row with NaN or an infinite maximum has NaN for its log-sum-exp."""
    x = draw((3, 6, classes), torch.bfloat16).round()
    x[:, 0] = 0.0
    x[1, 1, [20, 9]] = math.nan
    x[0, 2, 31] = math.inf
    x[2, 3] = -math.inf
    x[1, 4, : classes - 3] = -math.inf
    for weights in ([1.0, 1.0, 1.0], [0.0, 1.0, 0.0]):  # 0 times infinity is NaN
        a = Arguments([x], None, None, None, weights, 1.0)
        for k in (1, 5, 50):
            expected = fusion_reference.forward(a, k, True)
            for with_log_probs in (False, True):
                values, chosen, mass, log_probs = fusion.forward(a, k, with_log_probs)
                assert torch.equal(chosen, expected[1])
                torch.testing.assert_close(values, expected[0], rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(mass, expected[2], rtol=1e-6, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(log_probs, expected[3], rtol=1e-5, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------- divergence


def check_divergence(logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool) -> None:
    experts, rows = (len(logits), len(logits[0])) if logits[0].dim() == 2 else logits[0].shape[:2]
    exact, single = torch.float64, torch.promote_types(logits[0].dtype, torch.float32)
    value, saved = divergence.forward(logits, temperature, kind)
    upstream = torch.linspace(-1, 2, experts * rows).reshape(experts, rows)
    grad = divergence.backward(upstream.to(single), saved, logits, temperature, kind, detach)
    truth, eager = [], []
    for found, dtype in ((truth, exact), (eager, single)):
        x, divisor = converted(logits, temperature, dtype)
        one, kept = divergence_reference.forward(x, divisor, kind)
        found += [one, kept, divergence_reference.backward(upstream.to(dtype), kept, x, divisor, kind, detach)]
    rows_saved = {
        "maxima": slice(0, experts),
        "sums": slice(experts, 2 * experts),
        "A": slice(2 * experts, 3 * experts),
    }
    if kind == "to_mean":
        rows_saved |= {"maximum of the mean": slice(-2, -1), "sum of the mean": slice(-1, None)}
    assert_within_budget(value, eager[0], truth[0], "divergence")
    finite = ~truth[1][experts : 2 * experts].isnan().any(0)  # the maximum beside a NaN is never used
    for what, part in rows_saved.items():
        assert_within_budget(saved[part, finite], eager[1][part, finite], truth[1][part, finite], what)
    assert grad.dtype == logits[0].dtype
    assert_within_budget(grad, eager[2].to(grad.dtype), truth[2], "gradient")


# two float64 sums over thousands of classes are no truth for one another
DIVERGENCES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype != "fp64" or shape[2] < 1000]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), DIVERGENCES, ids=str)
def test_divergence(shape, dtype, kind):
    logits = draw(shape, DTYPES[dtype])
    single = torch.promote_types(logits.dtype, torch.float32)
    for temperature in (None, torch.linspace(0.3, 3.0, shape[2], dtype=single)):
        check_divergence([logits], temperature, *KINDS[kind])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one for all"])  # truly 0: eager has no error
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_every_layout(kind, layout):
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((3, 3, 130), (9, 2, 33)):
            check_divergence(LAYOUTS[layout](draw(shape, dtype)), None, *KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [3, 9])
def test_masked_classes_far_experts_and_nan(experts, kind):
    x = draw((experts, 5, 300), torch.float32)
    x[:, 0, 100:] = -math.inf
    x[0, 1] += 500.0
    x[1, 2, 7] = math.nan
    if KINDS[kind][0] == "pairwise":
        x[1, 3, 7] = -math.inf  # one expert's: infinitely far from it
    check_divergence([x], None, *KINDS[kind])


# ---------------------------------------------------------------------------------------------------------------- both


def test_the_same_bits_in_any_order_of_threads(monkeypatch):
    """A missing barrier shows as a difference."""

    def run() -> list[Tensor]:
        found = []
        for shape in ((3, 3, 129), (9, 2, 1000), (3, 2, 8142)):
            for dtype in (torch.float32, torch.bfloat16):
                for layout in ("stacked", "list at any address"):
                    logits = LAYOUTS[layout](draw(shape, dtype))
                    for k in (1, 5):
                        found += fusion.forward(fusion_arguments(logits, "all"), k, True)
                    for kind, detach in KINDS.values():
                        value, saved = divergence.forward(logits, None, kind)
                        grad = divergence.backward(torch.ones_like(value), saved, logits, None, kind, detach)
                        found += [value, saved, grad]
        return found

    monkeypatch.setenv("LTK_EMULATED_ORDER", "forward")
    forward = run()
    monkeypatch.setenv("LTK_EMULATED_ORDER", "reversed")
    for first, second in zip(forward, run(), strict=True):
        assert torch.equal(first, second)


def test_more_experts_than_shared_memory_holds():
    if LARGE:
        return
    logits = [F.pad(draw((300, 1, 40), torch.float32), (0, 1))]
    with pytest.raises(ValueError, match="logits: got 300 experts, more than a block's shared memory holds"):
        fusion.forward(fusion_arguments(logits, "plain"), 1, False)
    with pytest.raises(ValueError, match="logits: got 300 experts, more than a block's shared memory holds"):
        divergence.forward(logits, None, "pairwise")


def test_no_rows():
    logits = [torch.zeros(3, 0, 5)]
    assert [tuple(t.shape) for t in fusion.forward(fusion_arguments(logits, "all"), 2, True)] == [
        (0, 2),
        (0, 2),
        (0,),
        (0, 5),
    ]
    value, saved = divergence.forward(logits, None, "to_mean")
    assert (tuple(value.shape), tuple(saved.shape)) == ((3, 0), (11, 0))
    assert divergence.backward(value, saved, logits, None, "to_mean", True).shape == (3, 0, 5)
