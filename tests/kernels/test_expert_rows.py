"""The Triton kernel of expert_cross_entropy: all experts' rows in one launch."""

from __future__ import annotations

import math

import _forced_launches as forced
import pytest
import torch
from _engines import DTYPES, ENGINE
from _layouts import every_other, window
from torch import Tensor

from lt_kernels.functional import expert_cross_entropy
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_expert_cross_entropy,
    dense_expert_cross_entropy,
    expert_sample_inputs,
)

pytestmark = [pytest.mark.backends("triton"), pytest.mark.usefixtures("backend")]

HALF_AND_SINGLE = ("fp32", "bf16")
VECTORS = ("class_scale", "margin", "scale")
OPTIONS = {
    "plain": {},
    "prior": {"options": ("log_prior",)},
    "bias": {"options": ("class_bias",)},
    "bias, prior": {"options": ("class_bias", "log_prior")},
    "own bias": {"options": ("expert_bias",)},
    "own bias, prior, weight": {"options": ("expert_bias", "log_prior", "weight")},
    "cosines": {"options": ("log_prior",), "scale": 30.0, "margin": 0.3, "spread": 0.3},
    "vectors": {"options": (*VECTORS, "log_prior"), "requires_grad": ("input", *VECTORS, "log_prior")},
    "smoothing": {"options": ("log_prior",), "label_smoothing": 0.2},
    "weighted smoothing": {"options": ("weight", "log_prior"), "label_smoothing": 0.2},
    "mixed": {"options": ("mixed_target", "weight", "log_prior")},
    "mixed rows, smoothing": {"options": ("mixed_target", "mix_lambda", "expert_bias"), "label_smoothing": 0.1},
    "angular": {"options": ("margin", "log_prior"), "margin_type": "angular", "scale": 16.0},
    "angular, mixed": {
        "options": ("mixed_target", "log_prior"), "margin": 0.5, "margin_type": "angular", "scale": 16.0,
    },
}  # fmt: skip
#: E, N, C and dtype
SIZES = {
    "1x2x1": (1, 2, 1, torch.float32),
    "2x4x33": (2, 4, 33, torch.float16),
    "3x3x129": (3, 3, 129, torch.float32),
    "6x2x1000": (6, 2, 1000, torch.bfloat16),
}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The number of experts of every launch."""
    return forced.record_expert_launches(monkeypatch)


def drawn(*sizes: int, **keywords) -> Sample:
    return expert_sample_inputs(*sizes, device=ENGINE.device, **keywords)


def as_list(logits, *args, **keywords):
    return expert_cross_entropy([x.clone() for x in logits], *args, **keywords)


def check(sample: Sample, function=expert_cross_entropy, **keywords) -> None:
    check_expert_cross_entropy(function, sample, roundings=ENGINE.roundings(sample.input.dtype), **keywords)


def sample_of(size: tuple[int, int, int, torch.dtype], option: str) -> Sample:
    *sizes, dtype = size
    return drawn(*sizes, dtype=dtype, ignored=0.3 if sizes[1] > 2 else 0.0, seed=1, **OPTIONS[option])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("option", OPTIONS)
def test_value_and_gradients(option, size, launches):
    check(sample_of(SIZES[size], option))
    assert launches


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("option", ["plain", "bias, prior", "own bias", "vectors", "smoothing", "mixed"])
def test_inat18_rows(option, dtype, launches):
    check(drawn(3, 2, 8142, dtype=DTYPES[dtype], seed=2, **OPTIONS[option]))
    assert launches == [3]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("expert_reduction", ["mean", "sum", "none"])
def test_reductions(expert_reduction, reduction):
    sample = drawn(
        2, 3, 40, options=("log_prior", "weight"), seed=3, reduction=reduction, expert_reduction=expert_reduction
    )
    check(sample)
    check(sample, as_list)


@pytest.mark.parametrize("experts", [7, 9])
def test_more_experts_than_a_launch_takes(experts, launches):
    sample = drawn(experts, 2, 50, options=("log_prior", "expert_bias"), seed=4)
    check(sample)
    assert launches == [experts - experts // 2, experts // 2]
    check_ensemble(sample)
    launches.clear()
    check(drawn(experts, 2, 52, options=("log_prior",), seed=4))  # loaded ahead
    assert launches == ([3, 3, 1] if experts == 7 else [3, 3, 3])


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "samples first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "experts side by side": lambda x: torch.cat(list(x), 1).unflatten(1, (x.shape[0], -1)).transpose(0, 1),
    "one for all": lambda x: x[:1].expand(x.shape),
    "every other row": lambda x: every_other(x, 1),
}


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [7, 130, 140])
def test_layouts(classes, layout, dtype, launches):
    sample = drawn(2, 3, classes, dtype=DTYPES[dtype], seed=6, **OPTIONS["own bias, prior, weight"])
    sample.input = LAYOUTS[layout](sample.input.detach()).requires_grad_()
    check(sample)
    check(sample, as_list)
    assert launches


def test_classes_that_are_not_contiguous(launches):
    sample = drawn(3, 5, 40, seed=6, **OPTIONS["prior"])
    sample.input = sample.input.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    check(sample)
    assert not launches


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize(("before", "classes"), [(0, 130), (1, 201), (3, 5), (8, 201)])
def test_neighbouring_memory_is_not_read(before, classes, dtype, launches):
    sample = drawn(2, 3, classes, dtype=DTYPES[dtype], seed=5, **OPTIONS["own bias, prior, weight"])
    sample.input = window(sample.input, before, 5, dim=2)
    check(sample)
    check_ensemble(sample)
    logits = [window(x.detach(), before, 5).requires_grad_() for x in sample.input]
    one = expert_cross_entropy(sample.input, sample.target, **sample.options)
    torch.testing.assert_close(expert_cross_entropy(logits, sample.target, **sample.options), one, rtol=1e-6, atol=0)
    assert set(launches) == {2}


def test_rows_of_different_lengths_apart():
    sample = drawn(2, 4, 30, seed=5, **OPTIONS["prior"])
    logits = [window(x.detach(), 0, after).requires_grad_() for after, x in zip((5, 6), sample.input, strict=True)]
    one = expert_cross_entropy(sample.input, sample.target, **sample.options)
    torch.testing.assert_close(expert_cross_entropy(logits, sample.target, **sample.options), one, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------ ensemble


def check_ensemble(sample: Sample) -> None:
    """Check the loss and the prediction of the mean of the experts."""
    with torch.no_grad():
        output = expert_cross_entropy(sample.input, sample.target, return_ensemble=True, **sample.options)
    names = ("mixed_target", "mix_lambda", "reduction", "ignore_index")
    options = {name: sample.options[name] for name in names if name in sample.options}

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        converted = sample.converted(dtype)
        z = (converted.input.mean(0) * converted.options.get("scale", 1.0)).detach()
        mixed = {k: v for k, v in converted.options.items() if k in options}
        return dense_expert_cross_entropy(z[None], converted.target, **mixed), z

    truth, z = plain(torch.float64)
    eager, _ = plain(sample.input.dtype)
    assert_within_budget(output.ensemble_loss, eager, truth, "ensemble loss")
    chosen = z.gather(1, output.ensemble_prediction[:, None])[:, 0]
    spread = torch.finfo(torch.float32).eps * 8 * z.abs().amax(1)
    assert bool((chosen >= z.amax(1) - spread).all())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("option", ["prior", "cosines", "vectors", "mixed", "mixed rows, smoothing"])
def test_ensemble(option, size, reduction, launches):
    sample = sample_of(SIZES[size], option)
    sample.options["reduction"] = reduction
    check_ensemble(sample)
    assert len(launches) == (2 if size == "6x2x1000" and option in ("prior", "cosines", "mixed") else 1)


@pytest.mark.parametrize("option", ["prior", "mixed"])
def test_ensemble_of_inat18_rows(option):
    check_ensemble(drawn(3, 2, 8142, dtype=torch.bfloat16, seed=2, **OPTIONS[option]))


@pytest.mark.parametrize("option", ["own bias, prior, weight", "mixed"])
def test_the_ensemble_changes_nothing_else(option):
    sample = drawn(3, 3, 150, seed=2, **OPTIONS[option])

    def run(**keywords) -> tuple[Tensor, Tensor]:
        loss = expert_cross_entropy(sample.input, sample.target, **keywords, **sample.options)
        loss = loss.loss if keywords else loss
        return loss, torch.autograd.grad(loss, sample.input)[0]

    for with_it, without in zip(run(return_ensemble=True), run(), strict=True):
        assert torch.equal(with_it, without)


@pytest.mark.parametrize("classes", [200, 1403])
def test_prediction_of_ties_and_nan(classes, device):
    """The first column of the maximum, or of a NaN."""
    torch.manual_seed(4)
    last = classes - 1
    x = torch.randn(3, 10, classes).to(torch.bfloat16)
    x[:, 1] = 0.0
    x[:, 2, [5, 100, last]] = 9.0
    x[:, 3, [127, 128]] = 9.0
    x[0, 4, [190, 3, last]] = math.nan
    x[2, 5, last] = math.nan
    x[:, 6] = -math.inf
    x[1, 7, :150] = -math.inf
    x[1, 8, [60, 61]] = math.inf
    x[:, 9, :9] = 9.0
    target = torch.tensor([0, 3, 100, 127, 0, last, 1, last, 0, 1])
    output = expert_cross_entropy(x.to(device), target.to(device), reduction="none", return_ensemble=True)
    assert torch.equal(output.ensemble_prediction.cpu(), (x[0].float() + x[1].float() + x[2].float()).argmax(1))
    expected = torch.nn.functional.cross_entropy(x.float().mean(0), target, reduction="none")
    torch.testing.assert_close(output.ensemble_loss.cpu(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# ------------------------------------------------------------------------------------------------ values of all kinds


def test_masked_classes():
    """-inf logits of single experts, and classes that a bias masks for all experts or for one."""
    sample = drawn(3, 5, 333, options=("log_prior", "class_bias"), seed=11)
    with torch.no_grad():
        sample.input[0, 0, :100] = -math.inf
        sample.input[1, 1, 200:] = -math.inf
        sample.input[2, 2, :] = -math.inf
        sample.input[2, 2, 10] = 3.0
        sample.options["class_bias"][300:] = -math.inf
    sample.target[:] = torch.tensor([150, 4, 10, 100, 9])
    check(sample)
    sample.options["class_bias"] = torch.stack([sample.options["class_bias"].roll(40 * e) for e in range(3)]).detach()
    check(sample)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target", [-1, 200, 2**40])
def test_a_bad_target_makes_its_row_nan_and_no_other(target, reduction):
    sample = drawn(3, 3, 200, options=("log_prior",), seed=8)
    sample.target[1] = target
    options = {**sample.options, "reduction": reduction}
    output = expert_cross_entropy(sample.input, sample.target, return_ensemble=True, **options)
    (grad,) = torch.autograd.grad(output.loss.sum(), sample.input)
    for loss in (output.loss, output.ensemble_loss):
        assert loss.isnan().tolist() == ([False, True, False] if reduction == "none" else True)
    assert grad.isnan().all(2).tolist() == [[False, True, False]] * 3
    assert grad.isnan().any(2).tolist() == [[False, True, False]] * 3


@pytest.mark.parametrize("option", ["own bias, prior, weight", "mixed", "vectors"])
def test_the_same_bits_every_time(option):
    def run() -> list[Tensor]:
        sample = drawn(3, 3, 300, seed=9, **OPTIONS[option])
        output = expert_cross_entropy(sample.input, sample.target, return_ensemble=True, **sample.options)
        return [*output, *torch.autograd.grad(output.loss, list(sample.differentiable.values()))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first.detach(), second.detach())


def test_wide_rows_are_the_rows_kernels(launches):
    check(drawn(2, 2, 40_001, options=("log_prior",), seed=12))
    assert not launches
