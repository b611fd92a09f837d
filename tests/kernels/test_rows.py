"""The kernels of margin_cross_entropy: shapes, layouts, neighbouring memory, special values, gradients in place."""

from __future__ import annotations

import math
from itertools import product

import _forced_launches as forced
import _in_place
import pytest
import torch
from _cases.rows import CASES, LAYOUTS, Case
from _engines import DTYPES, ENGINE, of_backends
from _layouts import MATRICES, guarded, window
from _orders import ORDERS, REVERSED, check_same_bits_in_any_order
from torch import Tensor

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import margin_cross_entropy
from lt_kernels.ops._backend import load
from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.margin_cross_entropy.op import mean_coefficient, row_weights
from lt_kernels.testing import Sample, check_margin_cross_entropy, sample_inputs

VECTORS = ("class_bias", "class_scale", "margin", "scale")
LEARNED = {"options": VECTORS, "requires_grad": ("input", *VECTORS)}
OPTIONS = {
    "plain": {},
    "bias": {"options": ("class_bias",)},
    "vectors": LEARNED,
    "weight": {"options": ("weight",)},
    "smoothing": {"options": ("weight", *VECTORS), "label_smoothing": 0.2},
    "mixed": {**LEARNED, "options": ("mixed_target", "weight", *VECTORS)},
    "weighted smoothing, mixed": {
        **LEARNED, "options": ("weight", "mixed_target", *VECTORS), "label_smoothing": 0.2,
    },
    "mixed rows, smoothing": {"options": ("mixed_target", "mix_lambda", "class_bias"), "label_smoothing": 0.1},
    "angular": {"options": ("margin", "class_scale"), "margin_type": "angular", "scale": 16.0},
    "angular number": {"margin": 0.5, "margin_type": "angular", "scale": 16.0},
    "probabilities": {"soft": True},
    "smoothed probabilities": {"soft": True, "requires_grad": ("input", "target"), "label_smoothing": 0.1},
    "all probabilities": {
        "soft": True,
        "options": ("weight", "class_bias", "class_scale", "scale"),
        "requires_grad": ("input", "target", "class_bias", "class_scale", "scale"),
        "label_smoothing": 0.1,
    },
}  # fmt: skip
TRITON_OPTIONS = [name for name in OPTIONS if name not in ("weighted smoothing, mixed", "smoothed probabilities")]
CUDA_OPTIONS = ("plain", "bias", "vectors", "weighted smoothing, mixed", "smoothed probabilities")
SHAPES = {
    # rows, classes, positions: what Triton's launches differ by
    "1x1": (1, 1, ()),
    "4x2": (4, 2, ()),
    "5x7": (5, 7, ()),
    "3x33": (3, 33, ()),
    "5x129": (5, 129, ()),
    "2x1000": (2, 1000, ()),
    "2x7 pixels": (2, 7, (3, 5)),
    "1x150 pixels": (1, 150, (131,)),
    "2x8142": (2, 8142, ()),
    # rows of CUDA: one warp, blocks of several sizes, a cluster or two passes, by the number of classes and the chip
    **{f"5x{classes}": (5, classes, ()) for classes in (1, 7, 130, 1023, 1025, 4100, 8142, 8199)},
    # panels of CUDA: 8 bytes a thread for 256 positions, one element each for the others; on the chip or read twice
    "2x1 panel": (2, 1, (3,)),
    "2x9 panel": (2, 9, (5, 7)),
    "1x19 panel": (1, 19, (4, 64)),
    "1x150 panel": (1, 150, (130,)),
    "1x8142 panel": (1, 8142, (9,)),
}
HALF_AND_SINGLE = ("fp32", "bf16")
KINDS = of_backends(
    triton=[
        *product(TRITON_OPTIONS, ("1x1", "4x2", "5x7", "3x33", "5x129", "2x1000", "2x7 pixels", "1x150 pixels"),
                 ("fp32", "bf16", "fp16")),
        *product(("plain", "vectors", "smoothing", "mixed", "all probabilities"), ("2x8142",), HALF_AND_SINGLE),
    ],
    native=[
        *product(CUDA_OPTIONS, [f"5x{c}" for c in (1, 7, 130, 1023, 1025, 4100, 8142, 8199)], DTYPES),
        *product(CUDA_OPTIONS, [name for name in SHAPES if "panel" in name], HALF_AND_SINGLE),
    ],
)  # fmt: skip


def check(sample: Sample, **keywords) -> None:
    check_margin_cross_entropy(margin_cross_entropy, sample, roundings=ENGINE.roundings(sample.input.dtype), **keywords)


def drawn(rows: int, classes: int, positions: tuple[int, ...] = (), dtype: str = "fp32", **keywords) -> Sample:
    return sample_inputs(rows, classes, positions, dtype=DTYPES[dtype], device=ENGINE.device, **keywords)


@pytest.mark.parametrize(("option", "shape", "dtype"), KINDS)
def test_value_and_gradients(option, shape, dtype, backend, chip):
    rows, classes, positions = SHAPES[shape]
    sample = drawn(rows, classes, positions, dtype, ignored=0.3 if rows > 3 else 0.0, seed=1, **OPTIONS[option])
    if classes > 1 or backend != "native" or (ENGINE.name == "emulator" and option != "weighted smoothing, mixed"):
        check(sample)
        return
    # truly 0, and eager has no error at all: the budget is nothing, and the products of smoothing miss it by 1e-9
    # where a compiler fuses them with the subtraction of their sum
    for result in results_of(sample):
        assert float(result.abs().max()) < 1e-6


# ------------------------------------------------------------------------------------------- rows wider than one tile


@pytest.fixture(params=["loop", "parts"])
def several_tiles(request, monkeypatch):
    forced.wide_rows(monkeypatch, request.param)


@pytest.mark.backends("triton")
@pytest.mark.usefixtures("several_tiles", "backend")
class TestRowsWiderThanOneTile:
    @pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("option", TRITON_OPTIONS)
    def test_value_and_gradients(self, option, dtype):
        check(drawn(3, 1400, (), dtype, seed=3, ignored=0.3, **OPTIONS[option]))

    @pytest.mark.parametrize("classes", [640, 1280, 1281, 1535, 2049])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_odd_sizes(self, classes, reduction):
        check(drawn(2, classes, (), "bf16", options=("class_bias",), seed=3, reduction=reduction))

    @pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
    @pytest.mark.parametrize("before", [0, 1, 3, 8])
    def test_neighbouring_memory_is_not_read(self, before, dtype):
        for option in ("bias", "probabilities"):
            sample = drawn(2, 1203, (), dtype, seed=5, **OPTIONS[option])
            sample.input = window(sample.input, before, 5)
            check(sample)

    def test_channels_last(self):
        sample = drawn(2, 700, (3,), seed=7, **OPTIONS["bias"])
        sample.input = LAYOUTS["channels last"](sample.input.detach()).requires_grad_()
        check(sample)

    @pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
    def test_prediction(self, dtype, device):
        """The first column of the maximum, or of a NaN, in every tile."""
        torch.manual_seed(4)
        x = torch.randn(12, 1403).to(DTYPES[dtype])
        x[1] = 0.0
        x[2, [5, 700, 1402]] = 9.0
        x[3, [639, 640]] = 9.0
        x[4, [1280, 1281, 1402]] = 9.0
        x[5] = -math.inf
        x[6, :1300] = -math.inf
        x[7, [650, 3, 1402]] = math.nan
        x[8, 1402] = math.nan
        x[9, [600, 601]] = math.inf
        x[10, 1402] = 9.0
        x[11, :9] = 9.0
        target = torch.tensor([3, 3, 700, 639, 0, 3, 1400, 0, 0, 0, 1402, 0], device=device)
        for grad in (False, True):
            logits = x.to(device, copy=True).requires_grad_(grad)
            output = margin_cross_entropy(logits, target, return_prediction=True)
            assert torch.equal(output.prediction.cpu(), x.argmax(1))

    def test_masked_classes(self):
        """Whole tiles and parts of -inf, among them every column except the target's."""
        sample = drawn(4, 1403, seed=11)
        with torch.no_grad():
            sample.input[0, :700] = -math.inf
            sample.input[1, 100:] = -math.inf
            sample.input[2, 512:1300] = -math.inf
            sample.input[3, :] = -math.inf
            sample.input[3, 1000] = 3.0
        sample.target[:] = torch.tensor([1402, 4, 1, 1000])
        check(sample)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("target", [-1, 1400, 2**40])
    def test_a_bad_target_makes_its_row_nan_and_no_other(self, target, reduction):
        check_bad_target(drawn(3, 1400, seed=8), target, (reduction,), ("auto",))

    @pytest.mark.parametrize("option", ["vectors", "mixed", "all probabilities"])
    def test_the_same_bits_every_time(self, option):
        check_same_bits(lambda: drawn(2, 1300, seed=9, **OPTIONS[option]))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_launches_of_wide_rows(rows, dtype, backend):
    """As the launch table has them."""
    check(drawn(rows, 40_003, (), dtype, seed=12, options=("class_bias",)))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("option", ["vectors", "all probabilities"])
def test_more_class_tiles_than_a_grid_has(option, backend, monkeypatch):
    """Transposed logits, whose tiles have few classes until a grid has too many of them."""
    forced.class_tiles(monkeypatch, 3)
    sample = drawn(37, 150, seed=14, **OPTIONS[option])
    sample.input = sample.input.t().contiguous().t()
    check(sample)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("before", [0, 1, 3, 8])
def test_neighbouring_memory_is_not_read(before, reduction, dtype, backend):
    for classes, option, after in ((5, "bias", 5), (130, "bias", 5), (201, "bias", 5), (132, "vectors", 4),
                                   (201, "vectors", 4)):  # fmt: skip
        sample = drawn(2, classes, (), dtype, seed=5, reduction=reduction, **OPTIONS[option])
        sample.input = window(sample.input, before, after)
        check(sample)
    sample = drawn(1, 40, (9,), dtype, seed=5, reduction=reduction)
    sample.input = window(sample.input, before, 5)
    check(sample)


@pytest.mark.backends("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", range(9))
def test_rows_at_any_address(before, dtype, backend, chip):
    for classes in (3, 17, 1001, 8142):
        sample = drawn(3, classes, (), dtype, seed=5, options=("class_bias",))
        sample.input = guarded(sample.input, before)
        check(sample)


@pytest.mark.parametrize("before", range(5))
def test_class_vectors_at_any_address(before, backend, chip):
    dtype = "bf16" if backend == "native" else "fp32"
    sample = drawn(3, 1001, (), dtype, seed=6, options=("weight", *VECTORS), label_smoothing=0.1)
    for name in ("weight", "class_bias", "class_scale", "margin"):
        sample.options[name] = guarded(sample.options[name], before)
    check(sample)


@pytest.mark.parametrize("layout", dict.fromkeys([*MATRICES, *LAYOUTS]))
@pytest.mark.parametrize("classes", of_backends(triton=(6, 140), native=(6, 8142)))
def test_layouts(layout, classes, backend, chip):
    native = backend == "native"
    for option in ("bias", "weighted smoothing, mixed" if native else "vectors"):
        for dtype in HALF_AND_SINGLE if native else HALF_AND_SINGLE[:1]:
            sample = drawn(5, classes, (), dtype, seed=4, **OPTIONS[option])
            change = {**MATRICES, **LAYOUTS}[layout]
            sample.input = change(sample.input.detach()).requires_grad_()
            check(sample)


def test_channels_last(backend, chip):
    for option in ("bias", "all probabilities"):
        sample = drawn(2, 150, (3, 3), seed=7, **OPTIONS[option])
        sample.input = sample.input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        check(sample)


# ------------------------------------------------------------------------------------------------------ special values


def check_bad_target(
    sample: Sample, value: int, reductions: tuple[str, ...], policies: tuple[str, ...], name: str = "target"
) -> None:
    """Without checks a class out of range makes its row NaN and no other; nothing outside is read."""
    labels = sample.target if name == "target" else sample.options[name]
    labels.view(-1)[1] = value
    expected = torch.arange(labels.numel()) == 1
    for reduction, policy in product(reductions, policies):
        lt_kernels.set_gradient_policy(policy)
        try:
            loss = margin_cross_entropy(sample.input, sample.target, **{**sample.options, "reduction": reduction})
            (grad,) = torch.autograd.grad(loss.sum(), sample.input)
        finally:
            lt_kernels.set_gradient_policy("auto")
        if reduction == "none":
            assert torch.equal(loss.view(-1).isnan().cpu(), expected)
        else:
            assert loss.isnan()
        of_row = grad.movedim(1, -1).flatten(0, -2).cpu()
        assert torch.equal(of_row.isnan().all(1), expected)
        assert torch.equal(of_row.isnan().any(1), expected)


BAD_SHAPES = {"10": (10, ()), "200": (200, ()), "8142": (8142, ()), "10 pixels": (10, (3, 2)), "panel": (10, (4, 32))}


@pytest.mark.parametrize("target", [-1, 200, 2**40])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    of_backends(triton=product(("10", "200"), ("fp32",)), native=product(BAD_SHAPES, HALF_AND_SINGLE)),
)
def test_a_bad_target_makes_its_row_nan_and_no_other(shape, target, dtype, backend, chip):
    classes, positions = BAD_SHAPES[shape]
    target = classes if target == 200 < classes else target
    policies = ("one_pass", "recompute") if backend == "native" else ("auto",)
    for name in ("target", "mixed_target")[: 1 + (backend == "native")]:
        sample = drawn(3, classes, positions, dtype, seed=3, options=(name,) if name == "mixed_target" else ())
        check_bad_target(sample, target, ("none", "sum") if backend == "native" else ("none",), policies, name)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("classes", [130, 201])
def test_prediction_of_ties_and_nan(classes, dtype, backend, device, chip):
    x = torch.zeros(6, classes).to(DTYPES[dtype])
    x[1, [9, 100, 129]] = 1.0
    x[2, [8, 100]] = math.nan
    x[3] = -math.inf
    x[4, 129] = 1.0
    x[5, [0, 127, 128]] = math.inf
    target = torch.tensor([0, 9, 100, 3, 129, 60], device=device)
    output = margin_cross_entropy(x.to(device), target, return_prediction=True)
    assert torch.equal(output.prediction.cpu(), x.argmax(1))


@pytest.mark.parametrize("classes", of_backends(native=(9, 300, 8142), triton=(9, 300)))
@pytest.mark.parametrize("positions", [(), (33,)])
def test_prediction_is_torchs(classes, positions, backend, device, chip):
    sample = drawn(4 if not positions or backend == "native" else 2, classes, positions, "bf16", seed=7)  # with ties
    x = sample.input.detach()
    x.view(-1)[: classes // 2] = -math.inf
    x[1].view(-1)[classes // 3] = math.nan
    output = margin_cross_entropy(x, sample.target, return_prediction=True, reduction="none")
    assert torch.equal(output.prediction.cpu(), x.cpu().float().argmax(1))


@pytest.mark.parametrize("classes", of_backends(native=(9, 300, 8142), triton=(9, 300)))
def test_gradient_of_the_log_sum_exp(classes, backend, chip):
    sample = drawn(4, classes, seed=8, options=("class_bias",), ignored=0.4)
    output = margin_cross_entropy(sample.input, sample.target, reduction="none", return_lse=True, **sample.options)
    (grad,) = torch.autograd.grad(output.lse.sum(), sample.input)
    expected = (sample.input + sample.options["class_bias"]).softmax(1)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", of_backends(triton=(150,), native=(150, 8142)))
def test_a_row_with_one_finite_logit(classes, backend, device, chip):
    """No column besides the target's is finite, and nothing may become NaN."""
    x = torch.full((2, classes), -math.inf, device=device)
    x[:, 3] = torch.tensor([-120.0, 5.0])
    x.requires_grad_()
    loss = margin_cross_entropy(x, torch.tensor([3, 3], device=device))
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(x))


# ------------------------------------------------------------------------------------------------------- small kernels


@pytest.mark.allocates_nothing
@pytest.mark.parametrize("dtype", of_backends(triton=("fp16",), native=DTYPES))
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scale_gradient(factor, dtype, backend, device, chip):
    for elements in (1, 7, 15_001):
        grad = torch.randn(elements).to(device, DTYPES[dtype])
        expected = grad * factor
        load("margin_cross_entropy", backend).scale_gradient_(grad, torch.tensor(factor, device=device))
        assert torch.equal(grad, expected)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 129, 20_000])
@pytest.mark.parametrize("option", ["plain", "weight", "mixed", "mixed, weight", "all ignored"])
def test_mean_coefficient(option, rows, dtype, backend, device, monkeypatch):
    torch.manual_seed(rows)
    ignore_index = -100 if dtype.is_signed else 255
    target, other = (torch.randint(0, 30, (rows,)).to(dtype) for _ in range(2))
    for t in (target, other):
        t[torch.rand(rows) < (1.0 if option == "all ignored" else 0.3)] = ignore_index
        t[-1:] = 200  # out of range
        t[-2:-1] = -1 if dtype.is_signed else 254
    if option == "all ignored":
        target.fill_(ignore_index)
    target, other = target.to(device), other.to(device)
    weight = torch.rand(30).to(device) if "weight" in option else None
    mixed = other if "mixed" in option else None
    second = None if mixed is None else mixed.long()
    expected = mean_coefficient(target.long(), second, weight, ignore_index, 30, torch.float32, "reference")
    for counted in (8192, 128):
        forced.counted_rows(monkeypatch, counted)
        actual = load("margin_cross_entropy", backend).mean_coefficient(target, mixed, weight, ignore_index, 30)
        if weight is None:
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0.0)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("rows", [0, 1, 129, 5000])
@pytest.mark.parametrize("option", ["plain", "mixed", "mixed rows", "all ignored"])
def test_row_weights(option, rows, backend, device):
    torch.manual_seed(rows)
    target, other = torch.randint(0, 30, (2, rows), device=device)
    for t in (target, other):
        t[torch.rand(rows) < (1.0 if option == "all ignored" else 0.3)] = -100
    share = None if "mixed" not in option else torch.tensor(0.3, device=device)
    o = RowOptions(target, None if share is None else other, torch.rand(rows).to(device) if "rows" in option else share)
    for reduction in ("mean", "sum"):
        actual, expected = (row_weights(o, reduction, -0.2, torch.float32, b) for b in (backend, "reference"))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)


# ------------------------------------------------------------------------------------------------------- repeatability


def results_of(sample: Sample) -> list[Tensor]:
    loss = margin_cross_entropy(sample.input, sample.target, **sample.options)
    return [loss.detach(), *torch.autograd.grad(loss, list(sample.differentiable.values()))]


def check_same_bits(draw) -> None:
    for first, second in zip(results_of(draw()), results_of(draw()), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("option", ["vectors", "mixed", "all probabilities"])
def test_the_same_bits_every_time(option, backend, chip):
    check_same_bits(lambda: drawn(5, 300, seed=9, **OPTIONS[option]))


@pytest.mark.backends("native")
def test_sums_over_rows_do_not_depend_on_how_rows_are_cut(backend, chip):
    """More than one chunk of rows and an odd number of columns, of pairs too."""
    for classes in (130, 131):
        check(drawn(200, classes, (), "bf16", seed=9, ignored=0.1, **OPTIONS["vectors"]))


@pytest.mark.backends("native")
@pytest.mark.parametrize("case", [c for c in CASES if "everything" in c.id], ids=lambda case: case.id)
def test_the_same_bits_in_any_order_of_threads(case: Case, backend, device, chip):
    check_same_bits_in_any_order(lambda: results_of(case.sample(torch.float32, device)))


# ------------------------------------------------------------------------------------------------------------ in place

IN_PLACE = ("class_bias", "mixed, smoothing, vectors", "angular, vectors", "probabilities")


def check_in_place(
    shape: tuple[int, int, int], option: str, dtype: str, *layouts: str, orders: tuple = (REVERSED,)
) -> None:
    a = _in_place.arguments(shape, option, DTYPES[dtype], ENGINE.device)
    exact = _settings.backend == "native" and ENGINE.device == "cpu"
    for layout in layouts:
        _in_place.check_in_place(load("margin_cross_entropy", _settings.backend), a, layout, exact, orders)


@pytest.mark.backends("native")
@pytest.mark.parametrize("option", IN_PLACE)
class TestInPlaceOfBlocks:
    """The gradient over the logits, in any order of threads and blocks: a logit read too late is a gradient."""

    @pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
    @pytest.mark.parametrize("classes", [7, 130, 1025, 4100, 8199])
    def test_rows(self, classes, dtype, option, backend, chip):
        layouts = ("contiguous", "window")[: 1 + (classes < 2000)]
        check_in_place((5, classes, 1), option, dtype, *layouts, orders=ORDERS)

    @pytest.mark.parametrize("shape", [(2, 9, 35), (1, 19, 64), (1, 150, 130), (40, 20, 1)], ids=str)
    def test_panels(self, shape, option, backend, chip):
        layouts = ("contiguous", "channels last", "samples contiguous", "every other")
        check_in_place(shape, option, "bf16", *layouts, orders=ORDERS)

    @pytest.mark.parametrize("dtype", ["fp64", "fp16"])
    def test_other_dtypes(self, dtype, option, backend, chip):
        for shape in ((3, 1201, 1), (2, 9, 35)):
            check_in_place(shape, option, dtype, "contiguous", orders=ORDERS)


@pytest.mark.backends("triton")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("option", [*IN_PLACE, "smoothing, weight"])
class TestInPlaceOfPrograms:
    """What one program could do to another, the last one first: the interpreter has no threads."""

    def test_rows(self, option):
        check_in_place((2, 201, 1), option, "fp32", "contiguous", "window")

    def test_rows_split_in_backward(self, option):
        check_in_place((1, 8401, 1), option, "bf16", "contiguous", orders=ORDERS)

    def test_rows_wider_than_one_tile(self, option, several_tiles):
        check_in_place((1, 700, 2), option, "bf16", "channels last")

    def test_tiles(self, option):
        check_in_place((3, 7, 1), option, "fp32", "every other")
        check_in_place((2, 19, 6), option, "bf16", "contiguous")
