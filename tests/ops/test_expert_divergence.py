"""expert_divergence on every backend, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from _cases.experts import LAYOUTS
from torch import Tensor

import lt_kernels
from lt_kernels.functional import expert_divergence
from lt_kernels.testing import assert_within_budget, dense_expert_divergence

KINDS = [("to_mean", True), ("to_mean", False), ("pairwise", True)]


def draw(shape: tuple[int, int, int], dtype: torch.dtype, device: str, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    common = torch.randn(shape[1:], generator=generator, dtype=torch.float64) * spread
    own = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (common + own).to(device, dtype)


def run(function, logits: Tensor, upstream: Tensor | float, *args, **options) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(leaf, *args, **options)
    factor = torch.as_tensor(upstream, dtype=value.dtype, device=value.device)
    return value.detach(), torch.autograd.grad((value * factor).sum(), leaf)[0]


def check(logits: Tensor, kind: str, detach: bool, given=None, temperature: float | Tensor = 1.0, **options) -> None:
    """Value and gradient within the budget; ``given``: makes the argument from a leaf [E, N, C]."""
    shape = (logits.shape[0],) * (options.get("expert_reduction") == "none")
    shape += (logits.shape[1],) * (options.get("reduction") == "none")
    upstream = torch.linspace(-1, 2, math.prod(shape), device=logits.device).reshape(shape) if shape else 0.7
    function = expert_divergence if given is None else lambda x, *a, **o: expert_divergence(given(x), *a, **o)
    actual = run(function, logits, upstream, kind, temperature, detach_mean=detach, **options)
    truth, eager = (
        run(dense_expert_divergence, logits.to(to), upstream, kind, temperature, detach_mean=detach, **options)
        for to in (torch.float64, logits.dtype)
    )
    for what, one, two, three in zip(("value", "gradient"), actual, eager, truth, strict=True):
        assert_within_budget(one, two, three, what)


SHAPES = [
    *[(e, 7, 33) for e in (2, 3, 6, 9)],
    *((3, 5, 1), (3, 5, 2), (3, 4, 129), (2, 3, 1000)),
]
WIDE_SHAPES = [(3, 9, 8142), (2, 3, 8192), (2, 2, 40_001)]


@pytest.mark.parametrize(("reduction", "expert_reduction"), [("mean", "sum"), ("none", "none")])
@pytest.mark.parametrize(("kind", "detach"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, kind, detach, reduction, expert_reduction, dtype, backend, device):
    logits = draw(shape, dtype, device)
    check(logits, kind, detach, reduction=reduction, expert_reduction=expert_reduction)


@pytest.mark.parametrize(("reduction", "expert_reduction"), [("mean", "sum"), ("none", "none")])
@pytest.mark.parametrize(("kind", "detach"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
def test_value_and_gradient_of_wide_rows(shape, dtype, kind, detach, reduction, expert_reduction, backend, device):
    """Not in float64: two such sums over thousands of classes are no truth for one another."""
    logits = draw(shape, dtype, device)
    check(logits, kind, detach, reduction=reduction, expert_reduction=expert_reduction)


@pytest.mark.parametrize(("reduction", "expert_reduction"), [("sum", "none"), ("none", "sum")])
@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_other_reductions(kind, reduction, expert_reduction, backend, device):
    logits = draw((3, 7, 33), torch.float32, device)
    check(logits, kind, True, reduction=reduction, expert_reduction=expert_reduction)


@pytest.mark.parametrize("classes", [33, 8142])
@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_temperatures(dtype, kind, classes, backend, device):
    logits = draw((3, 9, classes), dtype, device)
    vector = torch.linspace(0.3, 3.0, classes, device=device)
    for temperature in (4.0, 1.7, vector, torch.tensor(0.7, device=device)):
        check(logits, kind, False, temperature=temperature, reduction="none", expert_reduction="none")


@pytest.mark.parametrize("classes", [33, 8142])
@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
@pytest.mark.parametrize("layout", [*(name for name in LAYOUTS if name != "one for all"), "list", "odd list"])
def test_layouts(layout, kind, classes, backend, device):
    given = {
        "list": lambda x: [each.clone() for each in x.unbind(0)],
        "odd list": lambda x: [torch.nn.functional.pad(z, (e, 3))[:, e : e + classes] for e, z in enumerate(x)],
    }.get(layout)
    for dtype in (torch.float32, torch.bfloat16):
        logits = LAYOUTS.get(layout, LAYOUTS["stacked"])(draw((3, 7, classes), dtype, device))
        check(logits, kind, True, given)


def test_only_some_experts_learn(backend, device):
    logits = draw((3, 4, 33), torch.float32, device)
    experts = [x.clone() for x in logits]
    experts[1].requires_grad_()
    (grad,) = torch.autograd.grad(expert_divergence(experts, "pairwise"), experts[1])
    _, expected = run(expert_divergence, logits, 1.0, "pairwise")
    torch.testing.assert_close(grad, expected[1])


def test_detaching_the_mean_changes_nothing_in_the_sum(backend, device):
    logits = draw((3, 7, 129), torch.float32, device)
    gradients = [run(expert_divergence, logits, 1.0, "to_mean", detach_mean=detach)[1] for detach in (True, False)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
@pytest.mark.parametrize("experts", [1, 3])
def test_one_expert_or_copies_of_one(experts, kind, backend, device):
    logits = draw((1, 7, 129), torch.float32, device).expand(experts, -1, -1)
    value, grad = run(expert_divergence, logits, 1.0, kind, reduction="none", expert_reduction="none")
    assert float(value.abs().max()) < 1e-6
    assert float(grad.abs().max()) < 1e-7


def test_equal_experts_do_not_diverge(backend, device):
    logits = draw((1, 7, 8142), torch.float32, device).expand(4, -1, -1)
    shifted = logits + torch.tensor([0.0, 1.0, -30.0, 8.0], device=device)[:, None, None]
    for kind in ("to_mean", "pairwise"):
        value, grad = run(expert_divergence, shifted.contiguous(), 1.0, kind, reduction="none")
        assert float(value.abs().max()) < 1e-4
        assert float(grad.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_classes_masked_in_every_expert(kind, backend, device):
    logits = draw((3, 7, 129), torch.float32, device)
    masked = logits.clone()
    masked[:, :, 100:] = -math.inf
    value, grad = run(expert_divergence, masked, 1.0, kind, reduction="none")
    expected, expected_grad = run(expert_divergence, logits[:, :, :100], 1.0, kind, reduction="none")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[:, :, :100], expected_grad, rtol=1e-4, atol=1e-6)
    assert not grad[:, :, 100:].any()


def test_a_class_masked_in_one_expert_is_infinitely_far(backend, device):
    logits = draw((3, 4, 33), torch.float32, device)
    logits[1, 2, 5] = -math.inf
    value = expert_divergence(logits, "pairwise", reduction="none")
    assert value.isinf().tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_a_nan_row_stays_alone(kind, backend, device):
    logits = draw((3, 5, 8142), torch.float32, device)
    logits[1, 2, 77] = math.nan
    value, grad = run(expert_divergence, logits, 1.0, kind, reduction="none")
    assert value.isnan().tolist() == [False, False, True, False, False]
    assert grad.isnan().any(2).any(0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
@pytest.mark.parametrize("lead", [0.5, 2.0, 6.0])
def test_one_class_is_likely(kind, lead, backend, device):
    """Sums of one large term and thousands of small ones."""
    logits = draw((3, 48, 8142), torch.float32, device)
    logits[:, :, 320] += lead + logits.amax(-1)
    check(logits, kind, False, temperature=0.6, reduction="none", expert_reduction="none")


@pytest.mark.parametrize("spread", [0.01, 100.0])
@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_near_and_far_experts(kind, spread, backend, device):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(64, 300, generator=generator) * 5
    logits = (common + torch.randn(3, 64, 300, generator=generator) * spread).to(device)
    check(logits, kind, True, reduction="none", expert_reduction="none")


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_no_rows(kind, backend, device):
    for reduction in ("mean", "sum", "none"):
        value, grad = run(expert_divergence, torch.zeros(3, 0, 5, device=device), 1.0, kind, reduction=reduction)
        assert grad.shape == (3, 0, 5)
        assert value.isnan() if reduction == "mean" else not value.any()


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_gradcheck(kind, backend):
    logits = draw((3, 3, 7), torch.float64, "cpu").requires_grad_()
    temperature = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return expert_divergence(x, kind, temperature, detach_mean=False, reduction="none", expert_reduction="none")

    assert torch.autograd.gradcheck(call, logits)


@pytest.mark.parametrize("inner", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_maps_are_rows_at_every_position(kind, reduction, inner, backend, device):
    rows = draw((3, 24, 50), torch.float32, device)

    def of_maps(x: Tensor, kind: str, temperature: float, **options) -> Tensor:
        maps = x.unflatten(1, (2, 3, 4)).movedim(-1, 2)
        return expert_divergence(maps if inner else maps.contiguous(), kind, temperature, **options)

    options = {"reduction": reduction, "expert_reduction": "none"}
    value, grad = run(of_maps, rows, 0.7, kind, 2.0, **options)
    expected, of_rows = run(expert_divergence, rows, 0.7, kind, 2.0, **options)
    assert value.shape == ((3, 2, 3, 4) if reduction == "none" else (3,))
    assert torch.equal(value.flatten(), expected.flatten())
    assert torch.equal(grad, of_rows)


X = torch.randn(3, 4, 5)
BAD = {
    "logits": ({"logits": X[0]}, ValueError, r"logits: got shape \(4, 5\), expected \[E, N, C\]"),
    "kind": ({"kind": "js"}, ValueError, r"kind: got 'js', expected one of 'to_mean', 'pairwise'"),
    "temperature": ({"temperature": -1.0}, ValueError, r"temperature: got -1.0, expected a number > 0"),
    "vector": ({"temperature": torch.ones(4)}, ValueError, r"temperature: got shape \(4,\), expected \[5\]"),
    "learning": ({"temperature": torch.ones(5, requires_grad=True)}, ValueError, r"temperature: got a tensor that req"),
    "detach": ({"detach_mean": 1}, TypeError, r"detach_mean: got int, expected a bool"),
    "reduction": ({"reduction": "batchmean"}, ValueError, r"reduction: got 'batchmean', expected one of"),
    "experts": ({"expert_reduction": "mean"}, ValueError, r"expert_reduction: got 'mean', expected one of 'none', 's"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        expert_divergence(**{"logits": X, **changes})


def test_temperatures_are_checked_with_checks_on():
    lt_kernels.set_checks(True)
    try:
        with pytest.raises(ValueError, match="temperature: got values that are not positive"):
            expert_divergence(X, temperature=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
    finally:
        lt_kernels.set_checks(False)
