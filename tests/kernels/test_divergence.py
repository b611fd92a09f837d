"""The kernels of expert_divergence; the truth is float64, eager is the compute dtype, on the same rounded logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from _arguments import converted
from _engines import DTYPES, ENGINE
from _expert_logits import LAYOUTS, SHAPES, check_most_experts, drawn, repeated, vector, with_barriers
from _layouts import guarded, window
from _orders import check_same_bits_in_any_order
from torch import Tensor

from lt_kernels.ops._backend import load
from lt_kernels.ops.expert_divergence import reference
from lt_kernels.testing import assert_within_budget, dense_expert_divergence

KINDS = {"to_mean": ("to_mean", True), "through the mean": ("to_mean", False), "pairwise": ("pairwise", True)}
Result = tuple[Tensor, Tensor]


def upstream_of(logits: list[Tensor], dtype: torch.dtype) -> Tensor:
    experts, rows = (len(logits), len(logits[0])) if logits[0].dim() == 2 else logits[0].shape[:2]
    return torch.linspace(-1, 2, experts * rows, device=ENGINE.device).reshape(experts, rows).to(dtype)


def dense(logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool, dtype: torch.dtype) -> Result:
    """Compute the value and the gradient with masks and autograd."""
    x = logits[0] if logits[0].dim() == 3 else torch.stack(logits)
    leaf = x.detach().to(dtype).requires_grad_()
    u = leaf if temperature is None else leaf / temperature.to(dtype)
    value = dense_expert_divergence(u, kind, detach_mean=detach, reduction="none", expert_reduction="none")
    return value.detach(), torch.autograd.grad((value * upstream_of(logits, dtype)).sum(), leaf)[0]


def of_reference(
    logits: list[Tensor], temperature: Tensor | None, kind: str, detach: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the value, the gradient and what forward leaves to backward with the reference."""
    logits, temperature = converted(logits, dtype), converted(temperature, dtype)
    value, saved = reference.forward(logits, temperature, kind)
    grad = reference.backward(upstream_of(logits, dtype), saved, logits, temperature, kind, detach)
    return value, grad, saved


def check_saved(saved: Tensor, eager: Tensor, truth: Tensor, kind: str) -> None:
    """Hold what forward leaves to backward to the reference."""
    experts = (len(truth) - 2) // 3
    rows = {
        "maxima": slice(0, experts),
        "sums": slice(experts, 2 * experts),
        "A": slice(2 * experts, 3 * experts),
    }
    if kind == "to_mean":
        rows |= {"maximum of the mean": slice(-2, -1), "sum of the mean": slice(-1, None)}
    finite = ~truth[experts : 2 * experts].isnan().any(0)  # the maximum of a row with NaN is never used
    for what, part in rows.items():
        assert_within_budget(saved[part, finite], eager[part, finite], truth[part, finite], what)


def check(
    logits: list[Tensor],
    temperature: Tensor | None,
    kind: str,
    detach: bool,
    *,
    backend: str,
    after_reference: bool = True,
) -> None:
    """Hold value, statistics and gradient to the budget, and the gradient after the reference's forward pass too."""
    module, dtype = load("expert_divergence", backend), logits[0].dtype
    single = torch.promote_types(dtype, torch.float32)
    if len(upstream_of(logits, single)) == 1 and backend == "native":
        # Truly 0, and eager has no error at all: the budget is nothing. The gradient of "to_mean" misses it by 1e-9
        # where a compiler fuses the product in exp(u) / sum with the subtraction of the mean's probability.
        exact = ENGINE.name == "emulator"
        value, saved = module.forward(logits, temperature, kind)
        grad = module.backward(upstream_of(logits, single), saved, logits, temperature, kind, detach)
        assert value.shape == upstream_of(logits, single).shape
        assert grad.dtype == dtype
        assert float(value.abs().max()) <= (0.0 if exact else 1e-6)
        assert float(grad.abs().max()) <= (0.0 if exact and kind == "pairwise" else 1e-7)
        return
    definition = of_reference if backend == "native" else dense
    truth, eager = (definition(logits, temperature, kind, detach, to) for to in (torch.float64, single))
    value, saved = module.forward(logits, temperature, kind)
    upstream = upstream_of(logits, single)
    grad = module.backward(upstream, saved, logits, temperature, kind, detach)
    assert value.shape == upstream.shape
    assert saved.shape == (3 * len(upstream) + 2, upstream.shape[1])
    assert grad.dtype == dtype
    assert_within_budget(value, eager[0], truth[0], "value")
    roundings = ENGINE.roundings(dtype)
    assert_within_budget(grad, eager[1], truth[1], "gradient", roundings=roundings)
    if backend == "native":
        check_saved(saved, eager[2], truth[2], kind)
    elif after_reference and logits[0].shape[-1] > 1:  # the truth for one class is 0
        _, saved = reference.forward(logits, temperature, kind)
        other = module.backward(upstream, saved, logits, temperature, kind, detach)
        if dtype == torch.float32 and kind == "to_mean":
            # all exponentials of the mean share the rounding of its maximum
            roundings = 4.0 + float(saved[-2].abs().max())
        assert_within_budget(other, eager[1], truth[1], "gradient after another forward pass", roundings=roundings)


def temperatures(classes: int, dtype: torch.dtype) -> Tensor:
    return vector(torch.linspace(0.3, 3.0, classes, dtype=torch.promote_types(dtype, torch.float32)))


def random_temperatures(classes: int) -> Tensor:
    return vector(torch.rand(classes, generator=torch.Generator().manual_seed(classes)) + 0.5)


# two float64 sums over thousands of classes are no truth for one another
DIVERGENCES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype != "fp64" or shape[2] < 1000]


@pytest.mark.backends("native")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), DIVERGENCES, ids=str)
def test_values(shape, dtype, kind, backend, chip):
    logits = [drawn(shape, DTYPES[dtype], backend)]
    for temperature in (None, temperatures(shape[2], DTYPES[dtype])):
        check(logits, temperature, *KINDS[kind], backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one for all"])  # truly 0: eager has no error
def test_layouts(layout, kind, backend, chip):
    dtypes = ("bf16",) if layout in ("list", "samples first", "odd window") else ("fp32",)
    shapes: tuple[tuple[int, int, int], ...] = ((3, 2, 1), (3, 2, 33), (3, 2, 600))
    if backend == "native":
        dtypes, shapes = ("fp32", "bf16"), ((3, 3, 130), (9, 2, 33))
    for dtype in dtypes:
        for shape in shapes:
            x = repeated(drawn(shape, DTYPES[dtype], backend), layout)
            temperature = random_temperatures(shape[2]) if shape[2] in (1, 600) else None
            check(LAYOUTS[layout](x), temperature, *KINDS[kind], backend=backend)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("kind", KINDS)
def test_row_weights(kind, backend):
    """A row's weight multiplies its values and gradients; values of weight 0 are 0 whatever the logits."""
    logits = [drawn((3, 4, 130), DTYPES["fp32"], backend)]
    name, detach = KINDS[kind]
    module, upstream = load("expert_divergence", backend), upstream_of(logits, torch.float32)
    weight = vector(torch.tensor([2.0, 0.0, 1.0, 0.25]))
    plain, saved = module.forward(logits, None, name)
    gradient = module.backward(upstream, saved, logits, None, name, detach)
    torch.testing.assert_close(module.forward(logits, None, name, weight)[0], plain * weight, rtol=0, atol=0)
    weighted = module.backward(upstream, saved, logits, None, name, detach, weight)
    torch.testing.assert_close(weighted, gradient * weight[:, None], rtol=1e-6, atol=1e-9)
    logits[0][:, 1] = math.nan
    assert torch.equal(module.forward(logits, None, name, weight)[0][:, 1], torch.zeros(3, device=weight.device))


@pytest.mark.parametrize(("experts", "kind"), [*((e, kind) for e in (1, 2, 6, 9) for kind in KINDS), (17, "pairwise")])
def test_other_numbers_of_experts(experts, kind, backend, chip):
    layout = "list" if kind == "through the mean" else "stacked"
    check(LAYOUTS[layout](drawn((experts, 2, 300), torch.float16, backend)), None, *KINDS[kind], backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "classes", "dtype"), [(2, 8142, "bf16"), (1, 20_003, "fp32")])
def test_wide_rows(rows, classes, dtype, kind, backend, chip):
    logits = [guarded(drawn((3, rows, classes), DTYPES[dtype], backend))]
    check(logits, random_temperatures(classes), *KINDS[kind], backend=backend)


@pytest.mark.parametrize(("before", "dtype"), [(0, "bf16"), (1, "bf16"), (4, "bf16"), (1, "fp32"), (4, "fp32")])
@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_no_neighbouring_memory_is_read(kind, before, dtype, backend, chip):
    logits = [window(drawn((2, 2, 1203), DTYPES[dtype], backend), before, 3, dim=2)]
    check(logits, random_temperatures(1203), *KINDS[kind], backend=backend)


@pytest.mark.backends("native")
@pytest.mark.parametrize("before", range(1, 9))
def test_rows_at_any_address(before, backend, chip):
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 17, 1001):
            check([guarded(drawn((3, 3, classes), dtype, backend), before)], None, "pairwise", True, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(kind, backend, chip):
    shift = torch.tensor([1e3, 1.1e3, -900.0], device=ENGINE.device)[:, None, None]
    check([guarded(drawn((3, 3, 1300), torch.float32, backend) + shift)], None, *KINDS[kind], backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_near_and_far_experts(spread, kind, backend, chip):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(6, 300, generator=generator) * 5
    x = (common + torch.randn(3, 6, 300, generator=generator) * spread).to(ENGINE.device)
    check([guarded(x)], None, *KINDS[kind], backend=backend, after_reference=False)


# ------------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes(kind, backend, chip):
    """Classes masked in all experts, in the first tile, in whole tiles, and all but one, change nothing."""
    x = drawn((3, 4, 1403), torch.float32, backend)
    kept = torch.ones(4, 1403, dtype=torch.bool, device=ENGINE.device)
    kept[0, :700] = False
    kept[1, 20:] = False
    kept[2, 512:1300] = False
    kept[3, :] = False
    kept[3, 1000] = True
    module = load("expert_divergence", backend)
    upstream = upstream_of([x], torch.float32)
    for mask in (-math.inf, -1e9):
        logits = [x.masked_fill(~kept, mask)]
        value, saved = module.forward(logits, None, KINDS[kind][0])
        grad = module.backward(upstream, saved, logits, None, *KINDS[kind])
        assert not grad[:, ~kept].any()
        for row in range(4):
            few, factor = x[:, row : row + 1, kept[row]], upstream[:, row : row + 1]
            results = []
            for dtype in (torch.float32, torch.float64):
                one, terms = reference.forward([few.to(dtype)], None, KINDS[kind][0])
                results.append((one, reference.backward(factor.to(dtype), terms, [few.to(dtype)], None, *KINDS[kind])))
            (eager, eager_grad), (truth, true_grad) = results
            assert_within_budget(value[:, row : row + 1], eager, truth, "value")
            assert_within_budget(grad[:, row : row + 1, kept[row]], eager_grad, true_grad, "gradient")


def against_reference(x: Tensor, kind: str, detach: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value and gradient for upstream gradients of 1, then those of the reference in float64."""
    found = []
    for module, logits in ((load("expert_divergence", backend), [x]), (reference, [x.double()])):
        value, saved = module.forward(logits, None, kind)
        ones = torch.ones_like(value)
        found += [value, module.backward(ones, saved, logits, None, kind, detach)]
    return tuple(found)


def test_a_class_masked_in_one_expert(backend, chip):
    x = drawn((3, 3, 1403), torch.float32, backend)
    x[1, 1, 1000] = -math.inf
    value, _ = load("expert_divergence", backend).forward([x], None, "pairwise")
    assert value.isinf().tolist() == [[False, True, False], [False] * 3, [False, True, False]]
    for detach in (True, False):
        value, grad, true_value, true_grad = against_reference(x, "to_mean", detach, backend)
        assert_within_budget(value, value, true_value, "value")
        assert_within_budget(grad, true_grad.float(), true_grad, "gradient", roundings=16.0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_nan_stay_alone(kind, backend, chip):
    x = drawn((3, 6, 1403), torch.float32, backend)
    x[1, 1, 20] = math.nan
    x[0, 2, 1402] = math.inf
    x[:, 4] = -math.inf
    x[1, 5] = -math.inf
    value, grad, expected, expected_grad = against_reference(x, *KINDS[kind], backend)
    bad = [False, True, True, False, True, True]
    assert value.isnan().any(0).tolist() == bad
    assert grad.isnan().any(2).any(0).tolist() == bad
    assert torch.equal(value.isnan(), expected.isnan())
    assert torch.equal(grad.isnan().any(2), expected_grad.isnan().any(2))


@pytest.mark.backends("native")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [3, 9])
def test_masked_classes_far_experts_and_nan(experts, kind, backend, chip):
    x = drawn((experts, 5, 300), torch.float32, backend)
    x[:, 0, 100:] = -math.inf
    x[0, 1] += 500.0
    x[1, 2, 7] = math.nan
    if kind == "pairwise":
        x[1, 3, 7] = -math.inf  # one expert is infinitely far from it
    check([x], None, *KINDS[kind], backend=backend)


# ------------------------------------------------------------------------------------------------------- repeatability


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_an_expanded_upstream_gradient_and_the_same_bits(kind, backend, device, chip):
    module = load("expert_divergence", backend)
    logits = LAYOUTS["list"](drawn((3, 3, 1203), torch.bfloat16, backend))
    value, saved = module.forward(logits, None, kind)
    assert torch.equal(value, module.forward(logits, None, kind)[0])
    rows = torch.tensor([1.0, -2.0, 0.5], device=device)
    for one in (torch.tensor(0.7, device=device).expand(3, 3), rows.expand(3, 3)):
        grads = [module.backward(each, saved, logits, None, kind, True) for each in (one, one.contiguous())]
        assert torch.equal(*grads)


@pytest.mark.backends("native")
def test_the_same_bits_in_any_order_of_threads(backend, chip):
    module = load("expert_divergence", backend)

    def everything() -> Iterator[Tensor]:
        for logits, (kind, detach) in product(with_barriers(backend), KINDS.values()):
            value, saved = module.forward(logits, None, kind)
            yield from (value, saved, module.backward(torch.ones_like(value), saved, logits, None, kind, detach))

    check_same_bits_in_any_order(everything)


@pytest.mark.parametrize("kind", ["to_mean", "pairwise"])
def test_no_rows(kind, backend, chip):
    module = load("expert_divergence", backend)
    for layout in ("stacked", "list"):
        logits = [x[..., :0, :] for x in LAYOUTS[layout](drawn((3, 3, 12), torch.float32, backend))]
        value, saved = module.forward(logits, None, kind)
        assert (tuple(value.shape), tuple(saved.shape)) == ((3, 0), (11, 0))
        assert module.backward(value, saved, logits, None, kind, True).shape == (3, 0, 12)


@pytest.mark.backends("native")
def test_more_experts_than_shared_memory_holds(backend, chip, monkeypatch):
    forward = load("expert_divergence", backend).forward
    check_most_experts(lambda logits: forward(logits, None, "pairwise"), monkeypatch)
