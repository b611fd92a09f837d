"""What only the CUDA kernels do: run by ``test_cuda.py`` with the plugin ``emulated_cuda``."""

from __future__ import annotations

import math

import pytest
import test_in_place
import torch
from _cases.rows import CASES, DTYPES, LAYOUTS, Case
from torch import Tensor

import lt_kernels
from lt_kernels.functional import margin_cross_entropy
from lt_kernels.ops.margin_cross_entropy import native
from lt_kernels.testing import check_margin_cross_entropy, sample_inputs

VECTORS = ("class_bias", "class_scale", "margin", "scale")
OPTIONS = {
    "plain": {},
    "bias": {"options": ("class_bias",)},
    "vectors": {"options": VECTORS, "requires_grad": ("input", *VECTORS)},
    "weighted smoothing, mixed": {
        "options": ("weight", "mixed_target", *VECTORS),
        "requires_grad": ("input", *VECTORS),
        "label_smoothing": 0.2,
    },
    "probabilities": {"soft": True, "requires_grad": ("input", "target"), "label_smoothing": 0.1},
}


@pytest.fixture(autouse=True)
def emulated():
    assert "lt_kernels_emulated" in str(native.scale_gradient_), "the plugin emulated_cuda is not installed"
    with lt_kernels.use_backend("native"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("classes", [1, 7, 130, 1023, 1025, 4100, 8142, 8199])
def test_every_shape_of_a_row(classes, option, dtype):
    """One warp, blocks of several sizes, a cluster or two passes, by the number of classes and the device."""
    check_margin_cross_entropy(
        margin_cross_entropy, sample_inputs(5, classes, dtype=DTYPES[dtype], seed=1, ignored=0.2, **OPTIONS[option])
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("classes", "positions"), [(1, (3,)), (9, (5, 7)), (19, (4, 64)), (150, (130,)), (8142, (33,))]
)
def test_panels(classes, positions, option, dtype):
    """Contiguous positions: 8 bytes per thread for (4, 64), one each for the others; on the chip or read twice."""
    samples = 2 if math.prod(positions) < 100 else 1
    sample = sample_inputs(samples, classes, positions, dtype=DTYPES[dtype], seed=2, ignored=0.2, **OPTIONS[option])
    check_margin_cross_entropy(margin_cross_entropy, sample)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("target", [-1, 200, 2**40])
@pytest.mark.parametrize(("classes", "positions"), [(10, ()), (200, ()), (8142, ()), (10, (3, 2)), (10, (4, 32))])
def test_a_bad_target_makes_its_row_nan_and_no_other(classes, positions, target, dtype):
    """What a GPU does without checks: no access out of bounds (guarded below), no error, NaN."""
    if target == 200 and classes > 200:
        target = classes
    for mixed in (False, True):
        options = ("mixed_target",) if mixed else ()
        sample = sample_inputs(3, classes, positions, dtype=DTYPES[dtype], seed=3, reduction="none", options=options)
        (sample.options["mixed_target"] if mixed else sample.target).view(-1)[1] = target
        for policy in ("one_pass", "recompute"):
            lt_kernels.set_gradient_policy(policy)
            try:
                loss = margin_cross_entropy(sample.input, sample.target, **sample.options)
                (grad,) = torch.autograd.grad(loss.sum(), sample.input)
                summed = margin_cross_entropy(sample.input, sample.target, **{**sample.options, "reduction": "sum"})
                (grad_of_sum,) = torch.autograd.grad(summed, sample.input)
            finally:
                lt_kernels.set_gradient_policy("auto")
            expected = torch.zeros(loss.numel(), dtype=torch.bool)
            expected[1] = True
            assert torch.equal(loss.view(-1).isnan(), expected)
            assert summed.isnan()
            for g in (grad, grad_of_sum):
                of_row = g.flatten(2).movedim(1, 2).flatten(0, 1) if positions else g
                assert torch.equal(of_row.isnan().all(1), expected)
                assert torch.equal(of_row.isnan().any(1), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("option", ["bias", "weighted smoothing, mixed"])
def test_layouts(option, dtype, layout):
    for classes in (6, 8142):
        sample = sample_inputs(5, classes, dtype=DTYPES[dtype], seed=4, **OPTIONS[option])
        sample.input = LAYOUTS[layout](sample.input.detach()).requires_grad_()
        check_margin_cross_entropy(margin_cross_entropy, sample)


def guarded(x: Tensor, before: int) -> Tensor:
    """x inside a larger allocation of NaN, beginning ``before`` elements after an aligned address."""
    room = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype)
    inside = room[32 + before : 32 + before + x.numel()].view(x.shape)
    inside.copy_(x.detach())
    return inside.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", range(9))
def test_rows_at_any_address(before, dtype):
    for classes in (3, 17, 1001, 8142):
        sample = sample_inputs(3, classes, dtype=DTYPES[dtype], seed=5, options=("class_bias",))
        sample.input = guarded(sample.input, before)
        check_margin_cross_entropy(margin_cross_entropy, sample)


@pytest.mark.parametrize("before", range(5))
def test_class_vectors_at_any_address(before):
    sample = sample_inputs(3, 1001, dtype=torch.bfloat16, seed=6, options=("weight", *VECTORS), label_smoothing=0.1)
    for name in ("weight", "class_bias", "class_scale", "margin"):
        vector = sample.options[name]
        sample.options[name] = torch.cat([vector.new_full((before,), math.nan), vector.detach()])[before:]
    check_margin_cross_entropy(margin_cross_entropy, sample)


@pytest.mark.parametrize("classes", [9, 300, 8142])
@pytest.mark.parametrize("positions", [(), (33,)])
def test_prediction_is_torchs(classes, positions):
    sample = sample_inputs(4, classes, positions, dtype=torch.bfloat16, seed=7)  # bfloat16 has ties
    with torch.no_grad():
        x = sample.input.detach()
        x.view(-1)[: classes // 2] = -math.inf
        x[1].view(-1)[classes // 3] = math.nan
        output = margin_cross_entropy(x, sample.target, return_prediction=True, reduction="none")
    assert torch.equal(output.prediction, x.float().argmax(1))


@pytest.mark.parametrize("classes", [9, 300, 8142])
def test_gradient_of_the_log_sum_exp(classes):
    sample = sample_inputs(4, classes, seed=8, options=("class_bias",), ignored=0.4)
    output = margin_cross_entropy(sample.input, sample.target, reduction="none", return_lse=True, **sample.options)
    (grad,) = torch.autograd.grad(output.lse.sum(), sample.input)
    expected = (sample.input + sample.options["class_bias"]).softmax(1)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [150, 8142])
def test_a_row_with_one_finite_logit(classes):
    x = torch.full((2, classes), -math.inf)
    x[:, 3] = torch.tensor([-120.0, 5.0])
    x.requires_grad_()
    loss = margin_cross_entropy(x, torch.tensor([3, 3]))
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scale_gradient(factor, dtype):
    for elements in (1, 7, 15_001):
        grad = torch.randn(elements).to(DTYPES[dtype])
        expected = grad * factor
        native.scale_gradient_(grad, torch.tensor(factor))
        assert torch.equal(grad, expected)


def test_sums_over_rows_do_not_depend_on_how_rows_are_cut():
    """More than one chunk of rows and an odd number of columns, of pairs too."""
    for classes in (130, 131):
        sample = sample_inputs(200, classes, dtype=torch.bfloat16, seed=9, ignored=0.1, **OPTIONS["vectors"])
        check_margin_cross_entropy(margin_cross_entropy, sample)


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize("option", ["class_bias", "mixed, smoothing, vectors", "angular, vectors", "probabilities"])
class TestInPlace:
    """The gradient over the logits, in any order of threads and blocks: a logit read too late is a gradient."""

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("classes", [7, 130, 1025, 4100, 8199])
    def test_rows(self, classes, dtype, option, order, monkeypatch):
        monkeypatch.setenv("LTK_EMULATED_ORDER", order)
        a = test_in_place.arguments((5, classes, 1), option, DTYPES[dtype])
        for layout in ("contiguous", "window") if classes < 2000 else ("contiguous",):
            test_in_place.check_in_place(native, a, layout)

    @pytest.mark.parametrize("shape", [(2, 9, 35), (1, 19, 64), (1, 150, 130), (40, 20, 1)], ids=str)
    def test_panels(self, shape, option, order, monkeypatch):
        monkeypatch.setenv("LTK_EMULATED_ORDER", order)
        a = test_in_place.arguments(shape, option, torch.bfloat16)
        for layout in ("contiguous", "channels last", "samples contiguous", "every other"):
            test_in_place.check_in_place(native, a, layout)

    def test_other_dtypes(self, option, order, monkeypatch):
        monkeypatch.setenv("LTK_EMULATED_ORDER", order)
        for dtype in ("fp64", "fp16"):
            for shape in ((3, 1201, 1), (2, 9, 35)):
                test_in_place.check_in_place(
                    native, test_in_place.arguments(shape, option, DTYPES[dtype]), "contiguous"
                )


@pytest.mark.parametrize("case", [c for c in CASES if "everything" in c.id], ids=lambda case: case.id)
def test_the_same_bits_in_any_order_of_threads(case: Case, monkeypatch):
    """A missing barrier shows as a difference."""

    def run() -> list[Tensor]:
        sample = case.sample(torch.float32)
        loss = margin_cross_entropy(sample.input, sample.target, **sample.options)
        return [loss.detach(), *torch.autograd.grad(loss, list(sample.differentiable.values()))]

    monkeypatch.setenv("LTK_EMULATED_ORDER", "forward")
    forward = run()
    monkeypatch.setenv("LTK_EMULATED_ORDER", "reversed")
    for first, second in zip(forward, run(), strict=True):
        assert torch.equal(first, second)
