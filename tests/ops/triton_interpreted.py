"""Triton kernels in Triton's interpreter, on CPU tensors. Run by ``test_triton.py`` with TRITON_INTERPRET=1.

Under interpretation a float32 result is truncated to bfloat16, not rounded: such gradients get two roundings.
"""

from __future__ import annotations

import math

import pytest
import test_in_place
import torch
from poison import nan_allocations
from torch import Tensor
from triton.runtime import interpreter

import lt_kernels
from lt_kernels.functional import margin_cross_entropy
from lt_kernels.ops.margin_cross_entropy import triton as backend
from lt_kernels.ops.margin_cross_entropy.op import mean_coefficient
from lt_kernels.testing import Sample, check_margin_cross_entropy, sample_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VECTORS = ("class_bias", "class_scale", "margin", "scale")
OPTIONS = {
    "plain": {},
    "bias": {"options": ("class_bias",)},
    "vectors": {"options": VECTORS, "requires_grad": ("input", *VECTORS)},
    "weight": {"options": ("weight",)},
    "smoothing": {"options": ("weight", *VECTORS), "label_smoothing": 0.2},
    "mixed": {"options": ("mixed_target", "weight", *VECTORS), "requires_grad": ("input", *VECTORS)},
    "mixed rows, smoothing": {"options": ("mixed_target", "mix_lambda", "class_bias"), "label_smoothing": 0.1},
    "angular": {"options": ("margin", "class_scale"), "margin_type": "angular", "scale": 16.0},
    "angular number": {"margin": 0.5, "margin_type": "angular", "scale": 16.0},
    "probabilities": {"soft": True},
    "all probabilities": {
        "soft": True,
        "options": ("weight", "class_bias", "class_scale", "scale"),
        "requires_grad": ("input", "target", "class_bias", "class_scale", "scale"),
        "label_smoothing": 0.1,
    },
}  # fmt: skip
SHAPES = {
    "1x1": (1, 1, ()),
    "4x2": (4, 2, ()),
    "5x7": (5, 7, ()),
    "3x33": (3, 33, ()),
    "5x129": (5, 129, ()),
    "2x1000": (2, 1000, ()),
    "2x7 pixels": (2, 7, (3, 5)),
    "2x150 pixels": (2, 150, (131,)),
}


@pytest.fixture(autouse=True)
def poisoned():
    with nan_allocations() as guards:
        yield guards
    assert guards, "no launcher allocated anything"


def on_triton(*args, **keywords):
    with lt_kernels.use_backend("triton"):
        return margin_cross_entropy(*args, **keywords)


def check(sample: Sample, **keywords) -> None:
    check_margin_cross_entropy(
        on_triton, sample, roundings=2.0 if sample.input.dtype == torch.bfloat16 else None, **keywords
    )


def window(x: Tensor, before: int, after: int) -> Tensor:
    """The same values inside a larger allocation of NaN, rows ``before + after`` elements apart."""
    room = torch.full((x.shape[0] + 2, x.shape[1] + before + after, *x.shape[2:]), math.nan, dtype=x.dtype)
    inside = room[1:-1, before : before + x.shape[1]]
    inside.copy_(x.detach())
    return inside.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_value_and_gradients(option, shape, dtype):
    rows, classes, positions = SHAPES[shape]
    sample = sample_inputs(
        rows, classes, positions, dtype=DTYPES[dtype], ignored=0.3 if rows > 3 else 0.0, seed=1, **OPTIONS[option]
    )
    check(sample)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("option", ["plain", "vectors", "smoothing", "mixed", "all probabilities"])
def test_inat18_rows(option, dtype):
    sample = sample_inputs(3, 8142, dtype=DTYPES[dtype], seed=2, **OPTIONS[option])
    check(sample)


@pytest.fixture(params=["loop", "parts"])
def several_tiles(request, monkeypatch):
    """Rows too wide for one tile: tiles of 512 columns, where in parts of 640 columns."""

    def launch(rows, classes, itemsize, aligned, *others, **named):
        group = 16 // itemsize if aligned else 1
        return backend._RowsLaunch(
            request.param, group, 16 // group, 1, part_groups=640 // group, parts=-(-classes // 640)
        )

    monkeypatch.setattr(backend, "_rows_launch", launch)


@pytest.mark.usefixtures("several_tiles")
class TestRowsWiderThanOneTile:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("option", OPTIONS)
    def test_value_and_gradients(self, option, dtype):
        check(sample_inputs(3, 1400, dtype=DTYPES[dtype], seed=3, ignored=0.3, **OPTIONS[option]))

    @pytest.mark.parametrize("classes", [640, 1280, 1281, 1535, 2049])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_odd_sizes(self, classes, reduction):
        check(sample_inputs(3, classes, dtype=torch.bfloat16, options=("class_bias",), seed=3, reduction=reduction))

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("before", [0, 1, 3, 8])
    def test_neighbouring_memory_is_not_read(self, before, dtype):
        for option in ("bias", "probabilities"):
            sample = sample_inputs(3, 1203, dtype=DTYPES[dtype], seed=5, **OPTIONS[option])
            sample.input = window(sample.input, before, 5)
            check(sample)

    def test_channels_last(self):
        sample = sample_inputs(2, 700, (3,), seed=7, **OPTIONS["bias"])
        sample.input = sample.input.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        check(sample)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_prediction(self, dtype):
        """The first column of the maximum, and of a NaN, wherever it is and however often."""
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
        target = torch.tensor([3, 3, 700, 639, 0, 3, 1400, 0, 0, 0, 1402, 0])
        for grad in (False, True):
            output = on_triton(x.clone().requires_grad_(grad), target, return_prediction=True)
            assert torch.equal(output.prediction, x.argmax(1))

    def test_masked_classes(self):
        """Whole tiles and parts of -inf, among them all columns but the target's."""
        sample = sample_inputs(5, 1403, seed=11)
        with torch.no_grad():
            sample.input[0, :700] = -math.inf
            sample.input[1, 100:] = -math.inf
            sample.input[2, 512:1300] = -math.inf
            sample.input[3, :] = -math.inf
            sample.input[3, 1000] = 3.0
        sample.target[:] = torch.tensor([1402, 4, 1, 1000, 9])
        check(sample)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("target", [-1, 1400, 2**40])
    def test_a_bad_target_makes_its_row_nan_and_no_other(self, target, reduction):
        sample = sample_inputs(3, 1400, seed=8)
        sample.target[1] = target
        loss = on_triton(sample.input, sample.target, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), sample.input)
        assert loss.isnan().tolist() == ([False, True, False] if reduction == "none" else True)
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, False]

    @pytest.mark.parametrize("option", ["vectors", "mixed", "all probabilities"])
    def test_the_same_bits_every_time(self, option):
        def run() -> list[Tensor]:
            sample = sample_inputs(3, 1300, seed=9, **OPTIONS[option])
            loss = on_triton(sample.input, sample.target, **sample.options)
            return [loss.detach(), *torch.autograd.grad(loss, list(sample.differentiable.values()))]

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)


@pytest.fixture
def last_program_first(monkeypatch):
    """Where a program reads what another one writes, the order of the launch grid may hide it."""
    builder = interpreter.interpreter_builder
    ascending = builder.set_grid_idx

    def descending(*index: int) -> None:
        ascending(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", descending)


def check_in_place(shape: tuple[int, int, int], option: str, dtype: torch.dtype, *layouts: str) -> None:
    a = test_in_place.arguments(shape, option, dtype)
    for layout in layouts:
        test_in_place.check_in_place(backend, a, layout, exact=False)


@pytest.mark.usefixtures("last_program_first")
@pytest.mark.parametrize(
    "option",
    ["class_bias", "smoothing, weight", "mixed, smoothing, vectors", "angular, vectors", "probabilities"],
)
class TestInPlace:
    """What one program could do to another: the interpreter has no threads."""

    def test_rows(self, option):
        check_in_place((2, 201, 1), option, torch.float32, "contiguous", "window")

    def test_rows_split_in_backward(self, option):
        check_in_place((2, 8401, 1), option, torch.bfloat16, "contiguous")

    @pytest.mark.usefixtures("several_tiles")
    def test_rows_wider_than_one_tile(self, option):
        check_in_place((2, 700, 2), option, torch.bfloat16, "channels last")

    def test_tiles(self, option):
        check_in_place((3, 7, 1), option, torch.float32, "every other")
        check_in_place((2, 19, 6), option, torch.bfloat16, "contiguous")


def test_rows_split_in_backward_in_place():
    """In the order of the launch grid too."""
    check_in_place((2, 8401, 1), "mixed, smoothing, vectors", torch.bfloat16, "contiguous")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_launches_of_wide_rows(rows, dtype):
    """As the launch table has them."""
    check(sample_inputs(rows, 40_003, dtype=DTYPES[dtype], seed=12, options=("class_bias",)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("classes", [130, 201])
def test_prediction_of_ties_and_nan(classes, dtype):
    x = torch.zeros(6, classes).to(DTYPES[dtype])
    x[1, [9, 100, 129]] = 1.0
    x[2, [8, 100]] = math.nan
    x[3] = -math.inf
    x[4, 129] = 1.0
    x[5, [0, 127, 128]] = math.inf
    target = torch.tensor([0, 9, 100, 3, 129, 60])
    assert torch.equal(on_triton(x, target, return_prediction=True).prediction, x.argmax(1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("before", [0, 1, 3, 8])
def test_neighbouring_memory_is_not_read(before, reduction, dtype):
    for classes in (5, 130, 201):
        sample = sample_inputs(4, classes, dtype=DTYPES[dtype], options=("class_bias",), seed=5, reduction=reduction)
        sample.input = window(sample.input, before, 5)
        check(sample)
    sample = sample_inputs(2, 40, (9,), dtype=DTYPES[dtype], seed=5, reduction=reduction)
    sample.input = window(sample.input, before, 5)
    check(sample)
    for classes in (132, 201):  # with the gradients of class vectors
        sample = sample_inputs(4, classes, dtype=DTYPES[dtype], seed=5, reduction=reduction, **OPTIONS["vectors"])
        sample.input = window(sample.input, before, 4)
        check(sample)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(x.shape),
    "every other column": lambda x: torch.stack([x, x * math.nan], 2).flatten(1)[:, ::2],
    "every other row": lambda x: torch.stack([x, x * math.nan], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [6, 140])
def test_layouts(layout, classes):
    for option in ("bias", "vectors"):
        sample = sample_inputs(5, classes, seed=6, **OPTIONS[option])
        sample.input = LAYOUTS[layout](sample.input.detach()).requires_grad_()
        check(sample)


def test_channels_last():
    for option in ("bias", "all probabilities"):
        sample = sample_inputs(2, 150, (3, 3), seed=7, **OPTIONS[option])
        sample.input = sample.input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        check(sample)


@pytest.mark.parametrize("target", [-1, 200, 2**40])
@pytest.mark.parametrize("classes", [10, 200])
def test_a_bad_target_makes_its_row_nan_and_no_other(classes, target):
    sample = sample_inputs(3, classes, seed=8, reduction="none")
    sample.target[1] = target
    loss = on_triton(sample.input, sample.target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), sample.input)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("option", ["vectors", "mixed", "all probabilities"])
def test_the_same_bits_every_time(option):
    def run() -> list[Tensor]:
        sample = sample_inputs(5, 300, seed=9, **OPTIONS[option])
        loss = on_triton(sample.input, sample.target, **sample.options)
        return [loss.detach(), *torch.autograd.grad(loss, list(sample.differentiable.values()))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("classes", [9, 300])
def test_gradient_of_the_log_sum_exp(classes):
    sample = sample_inputs(4, classes, seed=10, options=("class_bias",), ignored=0.4)
    output = on_triton(sample.input, sample.target, reduction="none", return_lse=True, **sample.options)
    (grad,) = torch.autograd.grad(output.lse.sum(), sample.input)
    expected = (sample.input + sample.options["class_bias"]).softmax(1)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scale_gradient(factor):
    grad = torch.randn(3, 5000).to(torch.float16)
    expected = grad * factor
    backend.scale_gradient_(grad, torch.tensor(factor))
    assert torch.equal(grad, expected)
    grad.new_empty((1,))  # the fixture wants to see an allocation


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("rows", [0, 1, 129, 20_000])
@pytest.mark.parametrize("option", ["plain", "weight", "mixed", "mixed, weight", "all ignored"])
def test_mean_coefficient(option, rows, dtype, monkeypatch):
    torch.manual_seed(rows)
    ignore_index = -100 if dtype.is_signed else 255
    target, other = (torch.randint(0, 30, (rows,)).to(dtype) for _ in range(2))
    for t in (target, other):
        t[torch.rand(rows) < (1.0 if option == "all ignored" else 0.3)] = ignore_index
        t[-1:] = 200  # out of range
        t[-2:-1] = -1 if dtype.is_signed else 254
    if option == "all ignored":
        target.fill_(ignore_index)
    weight = torch.rand(30) if "weight" in option else None
    mixed = other if "mixed" in option else None
    second = None if mixed is None else mixed.long()
    expected = mean_coefficient(target.long(), second, weight, ignore_index, 30, torch.float32, "reference")
    for counted in (8192, 128):
        monkeypatch.setattr(backend, "_COUNTED", counted)
        actual = backend.mean_coefficient(target, mixed, weight, ignore_index, 30)
        if weight is None:
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0.0)


def test_a_row_with_one_finite_logit():
    """All but one logit -inf: no ordinary column is finite, and nothing may become NaN."""
    x = torch.full((2, 150), -math.inf)
    x[:, 3] = torch.tensor([-120.0, 5.0])
    x.requires_grad_()
    loss = on_triton(x, torch.tensor([3, 3]))
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(x))
