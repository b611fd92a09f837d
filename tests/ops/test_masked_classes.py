"""Classes that class_bias masks (-inf) take no part: as if they were not there. Logits of +-inf and NaN are torch's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases.linear import BY_ID as LINEAR
from _cases.rows import BY_ID, SOFT, Case
from _engines import of_backends
from _strategies import LINEAR_MODES, linear_mode, tiled_linear_reason
from torch import Tensor

import lt_kernels
from lt_kernels.functional import (
    expert_cross_entropy,
    experts,
    linear_margin_cross_entropy,
    margin_cross_entropy,
    rows,
)
from lt_kernels.testing import (
    Sample,
    check_linear_margin_cross_entropy,
    check_margin_cross_entropy,
    dense_linear_margin_cross_entropy,
    dense_margin_cross_entropy,
)

SMOOTHED = {"label_smoothing": 0.2}


def mask(sample: Sample, classes: int) -> Tensor:
    """Mask every third class and the last in place; move targets elsewhere. Return which classes are left, [C]."""
    masked = torch.arange(classes, device=sample.input.device) % 3 == 1
    masked[-1] = classes > 2
    with torch.no_grad():
        sample.options["class_bias"][masked] = -math.inf
        for name in ("target", "mixed_target"):
            target = sample.named.get(name)
            if target is None:
                continue
            if target.is_floating_point():
                target[:, masked] = 0.0
                target /= target.sum(1, keepdim=True)
            else:
                target[(target >= 0) & masked[target.clamp_min(0)]] = 0
    return ~masked


def of_others(dense: Callable[..., Tensor], kept: Tensor) -> Callable[..., Tensor]:
    """Return the loss of the classes that are left, as if there were no others."""
    columns = kept.nonzero().flatten()
    position = torch.full(kept.shape, -1, device=kept.device).index_copy_(
        0, columns, torch.arange(len(columns), device=kept.device)
    )

    def among(value: Any, ignore_index: int) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.is_floating_point():
            return value.index_select(0, columns) if value.shape[0] == len(kept) else value
        return torch.where(value == ignore_index, value, position[value.clamp_min(0)])

    def loss(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor:
        ignored = options.get("ignore_index", -100)
        share = {name: options.pop(name) for name in ("mix_lambda",) if name in options}
        options = {name: among(value, ignored) for name, value in options.items()}
        args = tuple(among(value, ignored) for value in args)
        if dense is dense_margin_cross_entropy:
            input = input.index_select(1, columns)
        target = target.index_select(1, columns) if target.is_floating_point() else among(target, ignored)
        return dense(input, target, *args, **options, **share)

    return loss


CASES = {
    case.id: case
    for case in (
        *(BY_ID[name] for name in ("logit adjustment", "smoothing", "weighted smoothing", "probabilities")),
        *(BY_ID[name] for name in ("probabilities with everything", "mixup with everything", "segmentation")),
        *(BY_ID[name] for name in ("segmentation with everything", "transposed with everything")),
        Case("segmentation, probabilities", 2, 9, positions=(3, 5), options=("class_bias",), **SOFT),
        Case("transposed probabilities", 37, 29, layout="transposed", options=("class_bias",), **SOFT),
        Case("smoothed segmentation", 2, 19, positions=(5, 7), keywords=SMOOTHED, ignored=0.3, options=("class_bias",)),
        Case("inat18 width, smoothed", 3, 8142, keywords=SMOOTHED, options=("class_bias",)),
        Case("inat18 width, probabilities", 3, 8142, soft=True, keywords=SMOOTHED, options=("class_bias", "weight")),
        Case("few rows, many columns", 2, 40_001, keywords=SMOOTHED, options=("class_bias",)),
        Case("two classes left", 5, 4, keywords=SMOOTHED, options=("class_bias", "mixed_target")),
    )
}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_rows(case, kind, backend, device):
    sample = case.sample(kind, device)
    check_margin_cross_entropy(
        margin_cross_entropy, sample, dense=of_others(dense_margin_cross_entropy, mask(sample, case.classes))
    )


NAMES = ("logit adjustment", "smoothed", "mixup with everything", "probabilities", "positions")


@pytest.mark.parametrize("mode", [*LINEAR_MODES, *of_backends(triton=("tiled",))])
@pytest.mark.parametrize("name", NAMES)
def test_linear(name, mode, backend, device):
    case = LINEAR[name] if name != "smoothed" else dataclasses.replace(LINEAR["logit adjustment"], keywords=SMOOTHED)
    if mode == "tiled" and (reason := tiled_linear_reason(case.width, case.positions, case.soft)):
        pytest.skip(reason)
    sample = case.sample(torch.float32, device)
    sample.options.setdefault("class_bias", torch.zeros(case.classes, device=device))
    kept = mask(sample, case.classes)
    with linear_mode(mode) as strategy:

        def loss(*args: Any, **options: Any) -> Tensor:
            return linear_margin_cross_entropy(*args, strategy=strategy, **options)

        check_linear_margin_cross_entropy(loss, sample, dense=of_others(dense_linear_margin_cross_entropy, kept))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per expert"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_experts(soft, own, backend, device):
    """As one loss each, whose masks may differ."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 7, 11, generator=generator).to(device).requires_grad_()
    prior = torch.rand(11, generator=generator).log().to(device)
    bias = torch.zeros(3, 11, device=device)
    bias[:, 4] = -math.inf
    if own:
        bias[1, 6] = -math.inf
    target = torch.tensor([0, 1, 2, 3, 5, 7, 10], device=device)
    given: Tensor = F.one_hot(target, 11).to(z.dtype) if soft else target
    taus = (0.0, 1.0, -2.0)
    loss = expert_cross_entropy(
        z, given, log_prior=prior, taus=taus, class_bias=bias if own else bias[0], label_smoothing=0.1
    )
    each = [
        margin_cross_entropy(x, given, class_bias=tau * prior + b, label_smoothing=0.1)
        for x, tau, b in zip(z, taus, bias, strict=True)
    ]
    truth = torch.stack(each).mean()
    assert truth.isfinite()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(truth, z)[0])


@pytest.mark.parametrize("positions", [(), (3,)], ids=["rows", "pixels"])
def test_probability_on_a_masked_class(positions, backend, device):
    """As timm's Mixup gives it, smoothed over all classes: left out, or an error with checks on."""
    x = torch.randn(2, 5, *positions, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    bias = torch.tensor([0.0, 1.0, -math.inf, 0.5, 0.0], device=device)
    column = [1, 5, *[1] * len(positions)]
    q = torch.tensor([0.02, 0.7, 0.02, 0.24, 0.02], device=device).reshape(column).expand(x.shape).contiguous()
    without = q.clone()
    without[:, 2] = 0.0
    losses = [margin_cross_entropy(x, target, class_bias=bias) for target in (q, without)]
    assert losses[0].isfinite()
    for one, other in zip(*([loss, torch.autograd.grad(loss, x)[0]] for loss in losses), strict=True):
        torch.testing.assert_close(one, other)
    lt_kernels.set_checks(True)
    try:
        margin_cross_entropy(x, without, class_bias=bias, label_smoothing=0.1)
        with pytest.raises(ValueError, match=r"target: row 0 has probability 0.02 of class 2, expected 0 where"):
            margin_cross_entropy(x, q, class_bias=bias)
    finally:
        lt_kernels.set_checks(False)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_target_is_infinite(smoothing, backend, device):
    x = torch.randn(3, 5, device=device)
    bias = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0], device=device)
    y = torch.tensor([0, 2, -100], device=device)
    loss = margin_cross_entropy(x, y, class_bias=bias, label_smoothing=smoothing, reduction="none")
    assert loss[0].isfinite()
    assert loss[1] == math.inf
    assert loss[2] == 0
    lt_kernels.set_checks(True)
    try:
        for name, targets in (("target", (y, None)), ("mixed_target", (y.clamp_max(1), y))):
            mixed = {} if targets[1] is None else {"mixed_target": targets[1], "mix_lambda": 0.5}
            with pytest.raises(ValueError, match=f"{name}: row 1 has class 2, expected one that class_bias does not"):
                margin_cross_entropy(x, targets[0], class_bias=bias, **mixed)
    finally:
        lt_kernels.set_checks(False)


# ---------------------------------------------------------------------------------------- the promise that none is


def in_class_blocks(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    with linear_mode("classes") as strategy:
        return linear_margin_cross_entropy(x, torch.eye(5, device=x.device), y, strategy=strategy, **options)


FORMS: dict[str, Callable[..., Tensor]] = {
    "rows": margin_cross_entropy,
    "linear": lambda x, y, **options: linear_margin_cross_entropy(x, torch.eye(5, device=x.device), y, **options),
    "linear, classes": in_class_blocks,
    "experts": lambda x, y, class_bias, **options: expert_cross_entropy(
        x.expand(2, *x.shape), y, class_bias=class_bias, **options
    ),
    "own": lambda x, y, class_bias, **options: expert_cross_entropy(
        x.expand(2, *x.shape), y, class_bias=class_bias.expand(2, 5), **options
    ),
}
TARGETS = {"indices": torch.tensor([0, 1, 4]), "probabilities": F.one_hot(torch.tensor([0, 1, 4]), 5).float()}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@every_form
@every_target
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_promise_spares_the_vector(weighted, target, form, backend, device, monkeypatch):
    """As on a GPU, whose values nothing waits for: the same loss, without a vector of smoothing or a call more."""
    made: list[Any] = []
    whole, by_rows = rows._without_masked, experts._by_rows
    monkeypatch.setattr(rows, "reads_values", lambda tensor: False)
    monkeypatch.setattr(experts, "reads_values", lambda tensor: False)
    monkeypatch.setattr(rows, "_without_masked", lambda *args: made.append(whole(*args)) or made[-1])
    monkeypatch.setattr(experts, "_by_rows", lambda *args: made.append("by rows") or by_rows(*args))
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    options: dict[str, Any] = {"class_bias": torch.tensor([0.0, -1.0, 0.5, 2.0, 0.0], device=device)}
    options["label_smoothing"] = 0.1
    if weighted:
        options["weight"] = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0], device=device)
    soft = target.is_floating_point()
    results = []
    for promised in (False, True):
        made.clear()
        loss = form(x, target.to(device), masked_classes=not promised, **options)
        results.append([loss, torch.autograd.grad(loss, x)[0]])
        calls = [each for each in made if not isinstance(each, str)]
        if promised and not (soft and weighted):  # there, a broken promise would be a wrong, finite number
            assert all(each.smooth_weight is None and each.weight is options.get("weight") for each in calls)
            assert soft or "by rows" not in made
        elif not promised and form is not FORMS["own"]:
            assert all(each.smooth_weight is not None for each in calls)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@every_form
@every_target
@pytest.mark.parametrize("weight", [None, 1.0, 0.0], ids=["plain", "weighted", "no weight"])
def test_a_broken_promise_is_never_a_wrong_number(weight, target, form, backend, device):
    x = torch.randn(3, 5, device=device)
    options: dict[str, Any] = {"class_bias": torch.tensor([0.0, 1.0, -math.inf, 2.0, 0.0], device=device)}
    if weight is not None:
        options["weight"] = torch.tensor([1.0, 2.0, weight, 1.0, 0.5], device=device)
    for smoothing in (0.1, 0.0):
        options["label_smoothing"] = smoothing
        truth = form(x, target.to(device), **options)
        loss = form(x, target.to(device), masked_classes=False, **options)
        assert truth.isfinite()
        assert not loss.isfinite() or torch.allclose(loss, truth)
    if not target.is_floating_point():
        assert not form(x, target.to(device), masked_classes=False, **options | SMOOTHED).isfinite()


@every_form
@every_target
def test_a_broken_promise_is_found_with_checks_on(target, form, backend, device):
    bias = torch.tensor([0.0, 1.0, -math.inf, 2.0, 0.0], device=device)
    x, y = torch.randn(3, 5, device=device), target.to(device)
    lt_kernels.set_checks(True)
    try:
        form(x, y, class_bias=bias.clamp_min(-9), masked_classes=False, **SMOOTHED)
        form(x, y, class_bias=bias, **SMOOTHED)
        form(x, TARGETS["indices"].to(device), class_bias=bias, masked_classes=False)  # nothing leaves it out here
        with pytest.raises(ValueError, match="class_bias: got -inf for class 2 with masked_classes=False, expected"):
            form(x, y, class_bias=bias, masked_classes=False, **SMOOTHED)
    finally:
        lt_kernels.set_checks(False)


# ---------------------------------------------------------------------------------------- infinite logits and NaN


def kinds(values: Tensor) -> list[str]:
    """Say which values are NaN, infinite, zero and other."""
    names = {True: "nan", False: "finite"}
    return [f"{v:g}" if math.isinf(v) or v == 0 else names[math.isnan(v)] for v in values.flatten().tolist()]


@pytest.mark.parametrize("layout", ["rows", "columns", "pixels"])
@pytest.mark.parametrize("where", ["target", "another", "everywhere"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("target", ["index", "ignored", "smoothed", "probabilities"])
def test_a_logit_that_is_not_finite(target, value, where, layout, backend, device):
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(device)
    x[0, slice(None) if where == "everywhere" else 1 if where == "target" else 3] = value
    y = torch.tensor([-100 if target == "ignored" else 1, 2], device=device)
    given: Tensor = 0.5 * F.one_hot(y, 40) + 0.0125 if target == "probabilities" else y
    smoothing = 0.1 if target == "smoothed" else 0.0
    results = []
    for function in (F.cross_entropy, margin_cross_entropy):
        leaf, q = x.clone(), given
        if layout == "columns":
            leaf = leaf.t().contiguous().t()
        elif layout == "pixels":
            leaf, q = leaf.t()[None].contiguous(), given.t()[None] if given.dim() == 2 else given[None]
        leaf.requires_grad_()
        loss = function(leaf, q, reduction="none", label_smoothing=smoothing)
        results.append(kinds(loss) + kinds(torch.autograd.grad(loss.sum(), leaf)[0]))
    assert results[0] == results[1]


@pytest.mark.parametrize("mode", [*LINEAR_MODES, *of_backends(triton=("tiled",))])
@pytest.mark.parametrize("column", [1, 30], ids=["target", "another"])
def test_a_linear_layer_that_overflows(column, mode, backend, device):
    """Every gradient that F.linear and F.cross_entropy lose is lost."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator).to(device) for shape in ((6, 4), (40, 4), (40,))]
    leaves[2][column] = math.inf
    y = torch.tensor([1, 5, 7, 9, 20, 1], device=device)
    with linear_mode(mode) as strategy:
        x, w, b = (leaf.clone().requires_grad_() for leaf in leaves)
        ours = linear_margin_cross_entropy(x, w, y, linear_bias=b, strategy=strategy)
        assert ours.isnan()
        for gradient in torch.autograd.grad(ours, (x, w, b)):
            assert gradient.isnan().all()


@pytest.mark.parametrize("column", [1, 3], ids=["target", "another"])
def test_an_expert_that_overflows(column, backend, device):
    z = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    z[1, 0, column] = math.inf
    z.requires_grad_()
    output = expert_cross_entropy(
        z, torch.tensor([1, 2, 4], device=device), reduction="none", expert_reduction="none", return_ensemble=True
    )
    bad = torch.zeros(2, 3, dtype=torch.bool, device=device)
    bad[1, 0] = True
    assert torch.equal(output.loss.isnan(), bad)
    assert output.ensemble_loss.isnan().tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(output.loss.sum(), z)
    assert torch.equal(gradient.isnan(), bad[..., None].expand_as(gradient))
