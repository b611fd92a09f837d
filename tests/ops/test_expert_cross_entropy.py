"""expert_cross_entropy on every backend, dtype and case, against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases.experts import BY_ID, CASES, LAYOUTS, Case
from _gradients import check_rows_apart, gradcheck
from torch import Tensor

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import expert_cross_entropy, margin_cross_entropy
from lt_kernels.testing import Sample, assert_within_budget, check_expert_cross_entropy, expert_sample_inputs


def as_list(logits: Tensor, target: Tensor, **options):
    """The same loss of a list of E tensors with storages of their own."""
    return expert_cross_entropy([each.clone() for each in logits.unbind(0)], target, **options)


def by_name(input: Tensor, **options):
    return expert_cross_entropy(input, **options)


# ------------------------------------------------------------------------------------------------- value and gradients


REDUCTIONS = [("mean", "mean"), ("sum", "none"), ("none", "none")]


@pytest.mark.parametrize(
    ("case", "reduction", "expert_reduction"),
    [(case, *each) for case in CASES for each in (REDUCTIONS if case.classes < 2000 else REDUCTIONS[::2])],
    ids=lambda value: getattr(value, "id", value),
)
def test_value_and_every_gradient(case, dtype, reduction, expert_reduction, backend, device):
    sample = case.sample(dtype, device, reduction=reduction, expert_reduction=expert_reduction)
    upstream: float | Tensor = 0.7
    shape = [case.experts] * (expert_reduction == "none") + [case.rows] * (reduction == "none")
    if shape:
        upstream = torch.linspace(-1, 2, math.prod(shape), device=device).reshape(shape)
    check_expert_cross_entropy(expert_cross_entropy, sample, upstream=upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["balpoe", "inat18 width", "mixup with everything", "one expert", "nine experts"])
def test_a_list_is_not_stacked(name, reduction, backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        check_expert_cross_entropy(as_list, BY_ID[name].sample(dtype, device, reduction=reduction), upstream=0.7)


@pytest.mark.parametrize(("rows", "classes"), [(140, 8142), (40, 33_001)])
def test_gradients_too_large_for_the_caches(rows, classes, device):
    """More than 12 MiB: the CPU kernels write these past the caches: the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        rows_here = rows * (2 if dtype == torch.bfloat16 else 1)
        case = Case("large", 3, rows_here, classes, options=("log_prior", "mixed_target"))
        if device == "cpu":
            check_rows_apart(by_name, case.sample(dtype, device), dim=1, rows=20)
        else:
            check_expert_cross_entropy(expert_cross_entropy, case.sample(dtype, device))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.classes <= 40 and case.spread < 100], ids=lambda case: case.id
)
def test_gradcheck(case, backend):
    case = dataclasses.replace(case, rows=min(case.rows, 4), classes=min(case.classes, 9))
    sample = case.sample(torch.float64, reduction="none", expert_reduction="none")
    gradcheck(by_name, sample, every_element=case.id == "mixup with everything")


def test_each_expert_is_margin_cross_entropy(backend, device):
    sample = BY_ID["mixup with everything"].sample(torch.float32, device, expert_reduction="none")
    options = {k: v.detach() if isinstance(v, Tensor) else v for k, v in sample.options.items()}
    losses = expert_cross_entropy(sample.input.detach(), sample.target, **options)
    prior, taus, bias = (options.pop(name) for name in ("log_prior", "taus", "class_bias"))
    del options["expert_reduction"]
    for e, loss in enumerate(losses):
        expected = margin_cross_entropy(
            sample.input[e].detach(), sample.target, class_bias=taus[e] * prior + bias[e], **options
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ ensemble


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "balpoe", "one expert", "nine experts", "one class", "inat18 width", "few rows, many columns"),
        *("ignored rows", "class weights", "cosines", "angular", "mixup", "mixup per row", "mixup with everything"),
        *("samples first", "classes first", "window", "one for all", "huge logits"),
    ],
)
def test_ensemble(name, reduction, dtype, backend, device):
    sample = BY_ID[name].sample(dtype, device, reduction=reduction)
    output = expert_cross_entropy(sample.input, sample.target, return_ensemble=True, **sample.options)
    alone = expert_cross_entropy(sample.input, sample.target, **sample.options)
    torch.testing.assert_close(output.loss, alone, rtol=1e-6, atol=0)
    assert not output.ensemble_loss.requires_grad

    def mean_loss(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        converted = sample.converted(kind)
        options = converted.options
        z = converted.input.detach().mean(0) * options.get("scale", 1.0)
        pairs = [(sample.target, 1.0)]
        if "mixed_target" in options:
            share = options["mix_lambda"]
            pairs = [(sample.target, share), (options["mixed_target"], 1 - share)]
        total: Tensor = z.new_zeros(())
        for target, share in pairs:
            each = share * F.cross_entropy(z, target, reduction="none")
            if reduction == "mean":
                each = each.sum() / (target != -100).sum()
            total = total + (each.sum() if reduction == "sum" else each)
        return total.detach(), z

    truth, z = mean_loss(torch.float64)
    eager, _ = mean_loss(dtype)
    assert_within_budget(output.ensemble_loss, eager, truth, "ensemble loss")
    chosen = z.gather(1, output.ensemble_prediction[:, None])[:, 0]
    spread = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps * 8 * z.abs().amax(1)
    assert bool((chosen >= z.amax(1) - spread).all())


def test_ensemble_prediction_takes_the_first_of_equals(backend, device):
    logits = torch.zeros(3, 4, 50, device=device)
    logits[:, 1, 7] = logits[:, 1, 31] = 1.0
    logits[:, 2, 49] = 1.0
    logits[1, 3, 20] = math.nan
    output = expert_cross_entropy(
        logits, torch.zeros(4, dtype=torch.int64, device=device), reduction="none", return_ensemble=True
    )
    assert output.ensemble_prediction.tolist() == [0, 7, 49, 20]
    assert output.ensemble_loss.isnan().tolist() == [False, False, False, True]


# ----------------------------------------------------------------------------------------------------- upstream, modes


@pytest.mark.parametrize("policy", ["one_pass", "recompute"])
@pytest.mark.parametrize("upstream", [1.0, -3.7, 0.0, 65536.0])
@pytest.mark.parametrize("expert_reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["inat18 width", "mixup", "samples first"])
def test_every_policy_is_exact(name, expert_reduction, upstream, policy, backend, device, monkeypatch):
    monkeypatch.setattr(_settings, "gradient_policy", policy)
    given = torch.tensor([upstream, 1.0, 0.3], device=device) if expert_reduction == "none" else upstream
    for dtype in (torch.float32, torch.bfloat16):
        sample = BY_ID[name].sample(dtype, device, expert_reduction=expert_reduction)
        check_expert_cross_entropy(expert_cross_entropy, sample, upstream=given)


def test_only_some_experts_learn(backend, device):
    sample = BY_ID["balpoe"].sample(torch.float32, device)
    experts = [x.detach().clone() for x in sample.input]
    experts[1].requires_grad_()
    for reduction in ("mean", "none"):
        loss = expert_cross_entropy(experts, sample.target, reduction=reduction, **sample.options).sum()
        (grad,) = torch.autograd.grad(loss, experts[1])
        (expected,) = torch.autograd.grad(
            expert_cross_entropy(sample.input, sample.target, reduction=reduction, **sample.options).sum(), sample.input
        )
        torch.testing.assert_close(grad, expected[1])


# ---------------------------------------------------------------------------------------- maps and class probabilities

EXPERTS, ROWS, CLASSES = 3, 6, 40
PROBABILITIES = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
OF_PROBABILITIES: dict[str, dict] = {
    "plain": {},
    "prior": {"options": ["log_prior"]},
    "everything": {
        "options": ["log_prior", "taus", "expert_bias", "class_scale", "scale", "weight"],
        "label_smoothing": 0.1,
        "requires_grad": ["input", "log_prior", "taus", "class_bias", "class_scale", "scale"],
    },
}


def a_sample(options: Sequence[str] = (), **keywords: Any) -> Sample:
    return expert_sample_inputs(EXPERTS, ROWS, CLASSES, dtype=torch.float64, options=options, **keywords)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_class_probabilities(name, reduction, dtype, backend, device):
    drawn = a_sample(**OF_PROBABILITIES[name])
    target = PROBABILITIES.clone().requires_grad_(name == "everything")
    sample = Sample(drawn.input, target, {**drawn.options, "reduction": reduction}).converted(dtype, device)
    check_expert_cross_entropy(expert_cross_entropy, sample, upstream=0.7)


MAPS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((2, 3), lambda x: x.contiguous()),
    "channels last": ((2, 3), lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2)),
    "one axis": ((6,), lambda x: x.contiguous()),
    "list": ((2, 3), lambda x: [each.clone() for each in x.unbind(0)]),
}


@pytest.mark.parametrize(
    "options", [[], ["log_prior", "expert_bias", "margin", "weight", "mixed_target"]], ids=["plain", "all"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("expert_reduction", ["mean", "none"])
@pytest.mark.parametrize("name", MAPS)
def test_maps_are_rows_at_every_position(name, options, reduction, expert_reduction, backend, device):
    """[E, 2, C, 3] and the like have the loss of the [E, 6, C] whose rows they hold."""
    positions, layout = MAPS[name]
    sample = a_sample(options).converted(torch.float64, device)
    shape = (1, *positions) if name == "one axis" else positions

    def as_map(values: Tensor) -> Tensor:
        return values.unflatten(0, shape)

    given = dict(sample.options)
    for key in ("mixed_target", "mix_lambda"):
        if isinstance(given.get(key), Tensor) and given[key].dim() == 1:
            given[key] = as_map(given[key])
    rows = sample.input.detach().requires_grad_()
    keywords = {"reduction": reduction, "expert_reduction": expert_reduction, "return_ensemble": True}
    expected = expert_cross_entropy(rows, sample.target, **sample.options, **keywords)
    flat = sample.input.detach().requires_grad_()
    maps = layout(flat.unflatten(1, shape).movedim(-1, 2))
    actual = expert_cross_entropy(maps, as_map(sample.target), **given, **keywords)
    assert torch.equal(actual.ensemble_prediction.flatten(), expected.ensemble_prediction)
    for one, other in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(one.flatten(), other.flatten())
    one, other = (torch.autograd.grad(out.loss.square().sum(), x)[0] for out, x in ((actual, flat), (expected, rows)))
    torch.testing.assert_close(one, other)


def test_maps_of_probabilities(backend, device):
    x = torch.randn(EXPERTS, 2, CLASSES, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, CLASSES, 3, 4, device=device, dtype=torch.float64).softmax(1)
    taus = (0.0, 1.0, 2.0)
    prior = torch.randn(CLASSES, device=device, dtype=torch.float64).log_softmax(0)
    each = [F.cross_entropy(2.5 * z + tau * prior[:, None, None], q) for z, tau in zip(x, taus, strict=True)]
    actual = expert_cross_entropy(x, q, log_prior=prior, taus=taus, scale=2.5, return_ensemble=True)
    torch.testing.assert_close(actual.loss, sum(each) / 3)
    torch.testing.assert_close(actual.ensemble_loss, F.cross_entropy(2.5 * x.mean(0), q))
    assert torch.equal(actual.ensemble_prediction, x.mean(0).argmax(1))


# ------------------------------------------------------------------------------------------------------ extreme inputs


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction, backend, device):
    x = torch.randn(3, 0, 5, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    output = expert_cross_entropy(x, target, reduction=reduction, return_ensemble=True)
    expected = F.cross_entropy(x[0], target, reduction=reduction)
    torch.testing.assert_close(output.loss, expected, equal_nan=True)
    torch.testing.assert_close(output.ensemble_loss, expected, equal_nan=True)
    assert output.ensemble_prediction.shape == (0,)
    output.loss.sum().backward()
    assert x.grad.shape == x.shape


def test_nothing_to_average(backend, device):
    x = torch.randn(3, 4, 60, device=device, requires_grad=True)
    target = torch.full((4,), -100, device=device)
    options = {"log_prior": torch.linspace(-3, 0, 60, device=device), "taus": [0.0, 1.0, 2.0]}
    for reduction, expected in (("sum", 0.0), ("mean", math.nan)):
        output = expert_cross_entropy(x, target, reduction=reduction, return_ensemble=True, **options)
        for loss in (output.loss, output.ensemble_loss):
            torch.testing.assert_close(loss.detach().cpu(), torch.tensor(expected), equal_nan=True)
        assert torch.equal(torch.autograd.grad(output.loss, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("name", ["balpoe", "class bias", "mixup", "odd"])
def test_masked_classes(name, backend, device):
    sample = BY_ID[name].sample(torch.float32, device)
    mask = torch.zeros(sample.input.shape[2], device=device)
    mask[4:30] = -math.inf
    sample.target[(sample.target >= 4) & (sample.target < 30)] = 0
    if "mixed_target" in sample.options:
        other = sample.options["mixed_target"]
        other[(other >= 4) & (other < 30)] = 1
    sample.options["class_bias"] = sample.options.get("class_bias", torch.zeros_like(mask)) + mask
    check_expert_cross_entropy(expert_cross_entropy, sample)


def test_a_nan_row_stays_alone(backend, device):
    x = torch.randn(3, 5, 8142, device=device)
    x[1, 2] = x[0, 4, 40] = math.nan
    x[2, 3, 17] = math.inf
    x.requires_grad_()
    options = {"log_prior": torch.linspace(-3, 0, 8142, device=device), "taus": [0.0, 1.0, 2.0]}
    per_row = {"reduction": "none", "expert_reduction": "none"}
    losses = expert_cross_entropy(x, torch.arange(5, device=device), return_ensemble=True, **options, **per_row)
    losses.loss.nan_to_num().sum().backward()
    bad = torch.zeros(3, 5, dtype=torch.bool, device=device)
    bad[1, 2] = bad[0, 4] = bad[2, 3] = True
    assert torch.equal(losses.loss.isnan(), bad)
    assert torch.equal(x.grad.isnan().any(2), bad)
    assert torch.equal(losses.ensemble_loss.isnan(), bad.any(0))


@pytest.mark.parametrize("which", ["target", "mixed_target"])
@pytest.mark.parametrize("bad", [-1, 33, 2**40])
def test_a_bad_target_is_an_index_error_that_names_the_row(bad, which, backend, device):
    sample = BY_ID["mixup"].sample(torch.float32, device)
    labels = sample.target if which == "target" else sample.options["mixed_target"]
    labels[3] = bad
    if device != "cpu":
        losses = expert_cross_entropy(sample.input, sample.target, reduction="none", **sample.options)
        assert losses.isnan().nonzero().flatten().tolist() == [3]
        lt_kernels.set_checks(True)
    try:
        with pytest.raises(IndexError, match=rf"{which}: row 3 has class {bad}, expected 0 <= class < 33"):
            expert_cross_entropy(sample.input, sample.target, return_ensemble=True, **sample.options)
    finally:
        lt_kernels.set_checks(False)


def test_offsets_beyond_32_bits(backend, device):
    """Experts more than 2^31 elements apart; only their own pages are touched."""
    storage = torch.empty(2**31 + 20_000, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((2, 1, 8142), (2**31 + 11, 8142, 1), 3)
    torch.manual_seed(0)
    x.copy_(torch.randn(2, 1, 8142))
    y = torch.tensor([17], device=device)
    output = expert_cross_entropy(x, y, return_ensemble=True)
    expected = expert_cross_entropy(x.float(), y, return_ensemble=True)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.ensemble_loss, expected.ensemble_loss)


# ------------------------------------------------------------------------------------------------- compile and opcheck


# ---------------------------------------------------------------------------------------------------------- properties


# ----------------------------------------------------------------------------------------------------------- bad input

X, Y, P = torch.randn(3, 4, 5), torch.tensor([0, 1, 4, 2]), torch.zeros(5)
META = torch.device("meta")
BAD = {
    "number": ({"logits": 3.0}, TypeError, r"logits: got float, expected a Tensor \[E, N, C\] or a list"),
    "matrix": ({"logits": X[0]}, ValueError, r"logits: got shape \(4, 5\), expected \[E, N, C\]"),
    "no experts": ({"logits": X[:0]}, ValueError, r"logits: got shape \(0, 4, 5\), expected .* at least one expert"),
    "no tensors": ({"logits": []}, ValueError, r"logits: got no tensors, expected one \[N, C\] for each expert"),
    "integers": ({"logits": X.long()}, TypeError, r"logits: got dtype torch.int64, expected one of"),
    "item": ({"logits": [X[0], None]}, TypeError, r"logits\[1\]: got NoneType, expected a Tensor \[N, C\]"),
    "item's shape": ({"logits": [X[0], X[1, :3]]}, ValueError, r"logits\[1\]: got shape \(3, 5\), expected \(4, 5\)"),
    "item's dtype": ({"logits": [X[0], X[1].double()]}, ValueError, r"logits\[1\]: got dtype torch.float64, expected"),
    "item's device": ({"logits": [X[0], X[1].to(META)]}, ValueError, r"logits\[1\]: got device meta, expected cpu"),
    "item's axes": ({"logits": [P, P]}, ValueError, r"logits\[0\]: got shape \(5,\), expected \[N, C\]"),
    "maps' targets": ({"logits": [X, X]}, ValueError, r"target: got class indices of shape \(4,\), expected \(3, 5\)"),
    "probabilities": ({"target": X.softmax(2)}, ValueError, r"target: got class probabilities .* of shape \(3, 4, 5\)"),
    "probabilities and a margin": (
        {"target": X[0].softmax(1), "margin": 0.1},
        ValueError,
        r"margin: got a margin with class-probability targets, expected class indices",
    ),
    "maps' bias": (
        {"logits": X[..., None], "target": Y[:, None], "class_bias": torch.zeros(2, 5)},
        ValueError,
        r"class_bias: got shape \(2, 5\), expected \[5\] or \[3, 5",
    ),
    "target": ({"target": Y[:2]}, ValueError, r"target: got class indices of shape \(2,\), expected \(4,\)"),
    "prior alone": ({"log_prior": P}, ValueError, r"taus: got None with log_prior, expected both or neither"),
    "taus alone": ({"taus": (0, 1, 2)}, ValueError, r"log_prior: got None with taus, expected both or neither"),
    "prior's shape": ({"log_prior": P[:4], "taus": (0, 1, 2)}, ValueError, r"log_prior: got shape \(4,\), expected"),
    "number of taus": ({"log_prior": P, "taus": (0, 1)}, ValueError, r"taus: got 2 values, expected 3, one for each"),
    "a tau": ({"log_prior": P, "taus": (0, "1", 2)}, TypeError, r"taus\[1\]: got str, expected a number"),
    "nan tau": ({"log_prior": P, "taus": (0, math.nan, 2)}, ValueError, r"taus\[1\]: got nan, expected a finite"),
    "taus' type": ({"log_prior": P, "taus": 1.0}, TypeError, r"taus: got float, expected a sequence of 3 numbers"),
    "taus' shape": ({"log_prior": P, "taus": torch.ones(3, 4)}, ValueError, r"taus: got shape \(3, 4\), expected \[3"),
    "taus' dtype": ({"log_prior": P, "taus": torch.ones(3).long()}, TypeError, r"taus: got dtype torch.int64"),
    "bias": (
        {"class_bias": torch.zeros(2, 5)},
        ValueError,
        r"class_bias: got shape \(2, 5\), expected \[5\] or \[3, 5",
    ),
    "bias's device": ({"class_bias": torch.zeros(3, 5).to(META)}, ValueError, r"class_bias: got device meta"),
    "reduction": ({"reduction": "batch"}, ValueError, r"reduction: got 'batch', expected one of 'none', 'mean', 'sum'"),
    "experts": ({"expert_reduction": "all"}, ValueError, r"expert_reduction: got 'all', expected one of 'none'"),
    "mixed": ({"mixed_target": Y}, ValueError, r"mix_lambda: got None with mixed_target, expected both or neither"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        expert_cross_entropy(**{"logits": X, "target": Y, **changes})


def test_an_infinite_prior_is_found_with_checks_on():
    prior = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0])
    lt_kernels.set_checks(True)
    try:
        with pytest.raises(ValueError, match=r"log_prior: got values that are not finite"):
            expert_cross_entropy(X, Y, log_prior=prior, taus=(0, 1, 2))
    finally:
        lt_kernels.set_checks(False)


def test_layouts_are_what_they_say():
    x = torch.randn(2, 3, 4)
    assert LAYOUTS["samples first"](x).stride() == (4, 8, 1)
    assert LAYOUTS["one for all"](x).stride(0) == 0
