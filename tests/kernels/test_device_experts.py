"""Experts on a device: their loss at real widths, fusion and divergence, memory, graphs, very many logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from _cases.experts import LAYOUTS, Case
from _device import (
    BAD_TARGETS,
    DTYPES,
    HALF_AND_SINGLE,
    POLICIES,
    REDUCTIONS,
    assert_index_error,
    assert_same_bits,
    capture,
    checks_on,
    need_free_memory,
    parametrized,
    peak_memory_beside,
    poisoned_memory,
    synchronisation_is_an_error,
)
from _strategies import gradient_policy
from torch import Tensor

from lt_kernels.functional import expert_cross_entropy, expert_divergence, expert_fusion
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_expert_cross_entropy,
    dense_expert_cross_entropy,
    dense_expert_divergence,
)

#: Real widths, whose rows start at odd addresses; rows enough for eager's error to mean something.
SHAPES = {
    "8142": Case("8142", 3, 200, 8142),
    "six experts": Case("six experts", 6, 100, 8142),
    "nine experts": Case("nine experts", 9, 300, 1203),
    "few classes": Case("few classes", 3, 1000, 33),
    "100003": Case("100003", 3, 8, 100_003),
    "samples first": Case("samples first", 3, 100, 8142, layout="samples first"),
}
KINDS = {"to_mean": "to_mean", "pairwise": "pairwise"}

# ---------------------------------------------------------------------------------------------------------- what is run


def step(sample: Sample, upstream: float | Tensor = 0.5, as_list: bool = False, **options: Any) -> list[Tensor]:
    """The loss, what of the ensemble was asked for, and the gradient of everything that requires one."""
    logits = list(sample.input.unbind(0)) if as_list else sample.input
    result = expert_cross_entropy(logits, sample.target, **{**sample.options, **options})
    loss, *ensemble = result if isinstance(result, tuple) else (result,)
    grads = torch.autograd.grad((upstream * loss).sum(), list(sample.differentiable.values()))
    return [loss.detach(), *ensemble, *grads]


def fused(sample: Sample, k: int = 5, **options: Any) -> list[Tensor]:
    result = expert_fusion(
        sample.input, log_prior_shift=sample.options["log_prior"], topk=k, return_log_probs=True, **options
    )
    return [value for value in result if value is not None]


def diverged(sample: Sample, kind: str, **options: Any) -> list[Tensor]:
    """The value, and the gradient of the logits."""
    temperature = 1.5 - sample.options["log_prior"].detach().exp()
    value = expert_divergence(sample.input, kind, temperature, **options)  # type: ignore[arg-type]
    return [value.detach(), *torch.autograd.grad(0.5 * value.sum(), sample.input)]


@dataclass(frozen=True)
class Work:
    case: Case
    run: Callable[[Sample], list[Tensor]]


_MIXED = {"options": ("log_prior", "mixed_target", "mix_lambda")}
_LEARNED = {"options": ("log_prior", "weight"), "requires_grad": ("input", "log_prior")}
#: One of every way through the operators.
WORKS = {
    f"{name}: {shape}": Work(replace(SHAPES[shape], **changes), run)
    for name, changes, run in (
        ("loss", {}, step),
        ("losses", _MIXED, lambda sample: step(sample, reduction="none", expert_reduction="none")),
        ("loss of a list", _MIXED, lambda sample: step(sample, as_list=True)),
        ("loss and ensemble", _MIXED, lambda sample: step(sample, return_ensemble=True)),
        ("prior that learns", _LEARNED, step),
        ("fusion", {}, fused),
        ("prediction", {}, lambda sample: fused(sample, 1)),
        ("to_mean", {}, lambda sample: diverged(sample, "to_mean", detach_mean=False)),
        ("pairwise", {}, lambda sample: diverged(sample, "pairwise", reduction="none", expert_reduction="none")),
    )
    for shape in ("8142", "few classes", "100003")
}

# ------------------------------------------------------------------------------------------------------------- the loss


def check_loss(device: str, case: Case, dtype: torch.dtype, reduction: str) -> None:
    sample = case.sample(dtype, device, reduction=reduction)
    upstream: float | Tensor = 0.7
    if reduction == "none":
        upstream = torch.linspace(-1, 2, case.rows, device=device)
    check_expert_cross_entropy(expert_cross_entropy, sample, upstream=upstream)


@parametrized(case=SHAPES, dtype=DTYPES, reduction=REDUCTIONS, mixed={"": {}, "mixed": _MIXED, "learned": _LEARNED})
def test_real_widths(device: str, case: Case, dtype: torch.dtype, reduction: str, mixed: dict[str, Any]) -> None:
    check_loss(device, replace(case, **mixed), dtype, reduction)


@parametrized(case=SHAPES, dtype=HALF_AND_SINGLE, policy=POLICIES, reduction=REDUCTIONS)
def test_lists(device: str, case: Case, dtype: torch.dtype, policy: str, reduction: str) -> None:
    """Tensors one by one, each where it likes to be, give the bits of one tensor."""
    sample = replace(case, **_MIXED).sample(dtype, device, reduction=reduction)
    with gradient_policy(policy):
        expected = step(sample, return_ensemble=True)
        assert_same_bits(step(sample, as_list=True, return_ensemble=True), expected, "a list")
        plain = step(sample)  # another kernel than that with the ensemble, whose last bits may differ
        apart = [x.detach().clone().requires_grad_() for x in sample.input]
        result = expert_cross_entropy(apart, sample.target, **sample.options)
        grads = torch.autograd.grad(0.5 * result.sum(), apart)
    assert_same_bits([result.detach(), torch.stack(grads)], [plain[0], plain[-1]], "separate tensors")


@parametrized(case=SHAPES, dtype=DTYPES, mixed={"": {}, "mixed": {"options": ("log_prior", "mixed_target")}})
def test_ensemble(device: str, case: Case, dtype: torch.dtype, mixed: dict[str, Any]) -> None:
    sample = replace(case, **mixed).sample(dtype, device, reduction="none", scale=1.25)
    _, loss, prediction, *_ = step(sample, return_ensemble=True)
    names = ("mixed_target", "mix_lambda", "reduction", "scale")
    options = {name: sample.options[name] for name in names if name in sample.options}
    with torch.no_grad():
        plain = [
            dense_expert_cross_entropy(x.mean(0, keepdim=True), sample.target, **options)
            for x in (sample.input, sample.input.double())
        ]
        means = sample.input.double().mean(0)
    assert_within_budget(loss, *plain, "loss of the ensemble")
    assert_within_budget(
        means.gather(1, prediction[:, None])[:, 0].float(), means.amax(1), means.amax(1), "predictions' logits"
    )


@parametrized(case=SHAPES, dtype=HALF_AND_SINGLE)
def test_peak_memory(device: str, case: Case, dtype: torch.dtype) -> None:
    """A step allocates the gradients and some numbers per row and per class."""
    if case.layout != "stacked":
        pytest.skip("the stacked layout is enough")
    sample = replace(case, options=("log_prior", "mixed_target")).sample(dtype, device)
    apart = [x.detach().clone().requires_grad_() for x in sample.input]
    for logits in (sample.input, apart):

        def run(logits: Any = logits) -> Any:
            leaves = logits if isinstance(logits, list) else [logits]
            loss = expert_cross_entropy(logits, sample.target, **sample.options)
            return torch.autograd.grad(loss, leaves)

        extra = peak_memory_beside(run, sample.input.numel() * dtype.itemsize)
        allowed = case.experts * (64 * case.rows + 16 * case.classes) + 2**20
        assert extra <= allowed, f"{extra} bytes beside the gradients, at most {allowed}"


@parametrized(large=True)
def test_offsets_beyond_32_bits(device: str) -> None:
    """More than 2^32 logits in one tensor; the first and last rows of every expert against float64."""
    experts, classes = 3, 8142
    rows = (2**32 + 2**26) // (experts * classes) + 1
    need_free_memory(6 * experts * rows * classes)
    x = torch.empty((experts, rows, classes), dtype=torch.bfloat16, device=device)
    for part in x.view(-1, classes).split(2**15):
        part.normal_()
    x.requires_grad_()
    target = torch.randint(classes, (rows,), device=device)
    prior = torch.linspace(-3, 0, classes, device=device)
    taus = [0.0, 1.0, 2.0]
    places = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=device)
    few = Sample(
        x.detach()[:, places].requires_grad_(),
        target[places],
        {"log_prior": prior, "taus": taus, "reduction": "none", "expert_reduction": "none"},
    )
    expected = []
    for dtype in (torch.bfloat16, torch.float64):
        sample = few.converted(dtype)
        loss = dense_expert_cross_entropy(sample.input, sample.target, **sample.options)
        expected.append((loss, torch.autograd.grad(loss.sum(), sample.input)[0]))
    for policy in POLICIES:
        with gradient_policy(policy):
            loss = expert_cross_entropy(x, target, log_prior=prior, taus=taus, reduction="sum", expert_reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), x)
        assert_within_budget(grad[:, places], expected[0][1], expected[1][1], f"gradient, {policy}")
        for part in grad.view(-1, classes).split(2**15):
            assert bool(part.ne(0).any(1).all()), f"gradient, {policy}: a row was not written"
        del grad
    with torch.no_grad():
        losses = expert_cross_entropy(x, target, log_prior=prior, taus=taus, reduction="none", expert_reduction="none")
        found = expert_fusion(x, topk=2)
        divergence = expert_divergence(x, reduction="none", expert_reduction="none")
        some = few.input.detach()
        budgets = [dense_expert_divergence(s, reduction="none", expert_reduction="none") for s in (some, some.double())]
        top = some.double().mean(0).topk(2).values
    assert_within_budget(losses[:, places], expected[0][0], expected[1][0], "losses")
    assert_within_budget(divergence[:, places], *budgets, "divergence")
    classes_found = found.topk_indices[places]
    assert_within_budget(some.double().mean(0).gather(1, classes_found).float(), top, top, "fusion")


# ------------------------------------------------------------------------------------------------ fusion and divergence


@parametrized(
    case={name: SHAPES[name] for name in ("8142", "few classes")}, layout=LAYOUTS, dtype=DTYPES, k={"1": 1, "5": 5}
)
def test_fusion_values(device: str, case: Case, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, k: int) -> None:
    """Probabilities and log-probabilities within the budget; classes as likely as the likeliest."""
    sample = case.sample(dtype, device)
    x, shift = layout(sample.input.detach().contiguous()), sample.options["log_prior"]
    weight = torch.linspace(0.5, 1.5, case.experts, device=device) / case.experts
    found = expert_fusion(
        x, expert_weight=weight, log_prior_shift=shift, temperature=0.8, topk=k, return_log_probs=True
    )

    def dense(x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x * weight.to(x.dtype)[:, None, None]).sum(0) / 0.8 + shift.to(x.dtype)
        return u, u.log_softmax(1)

    (_, eager), (u, truth) = dense(x), dense(x.double())
    assert found.log_probs is not None
    assert_within_budget(found.log_probs, eager, truth, "log-probabilities")
    top = truth.topk(k).values
    assert_within_budget(found.topk_values, eager.exp().topk(k).values, top.exp(), "probabilities")
    best = dense(x.float())[0].double()
    likely = u.gather(1, found.topk_indices).float()
    assert_within_budget(likely, u.gather(1, best.topk(k).indices), u.topk(k).values, "classes")
    assert torch.equal(found.prediction, found.topk_indices[:, 0])
    assert torch.equal(found.confidence, found.topk_values[:, 0])


@parametrized(anywhere=True)
def test_fusion_ties(device: str) -> None:
    """Of equal logits the lowest class comes first, -inf is never among the likely ones, a NaN row stays alone."""
    x = torch.zeros(2, 4, 8142, device=device)
    x[:, 1, 5000] = x[:, 1, 77] = 3.0
    x[:, 2] = -math.inf
    x[:, 2, 8141] = x[:, 2, 4000] = -50.0
    x[1, 3, 6] = math.nan
    found = expert_fusion(x, topk=2)
    assert found.topk_indices[:3].tolist() == [[0, 1], [77, 5000], [4000, 8141]]
    assert int(found.prediction[3]) == 6
    assert found.topk_values.isnan().any(1).tolist() == [False, False, False, True]


@parametrized(case=SHAPES, kind=KINDS, detach={"detached": True, "": False}, dtype=DTYPES)
def test_divergence_values(device: str, case: Case, kind: str, detach: bool, dtype: torch.dtype) -> None:
    sample = case.sample(dtype, device)
    temperature = 1.5 - sample.options["log_prior"].exp()
    upstream = torch.linspace(-1, 2, case.experts, device=device)
    results = []
    for function, x in (
        (expert_divergence, sample.input),
        (dense_expert_divergence, sample.input.detach().requires_grad_()),
        (dense_expert_divergence, sample.input.detach().double().requires_grad_()),
    ):
        value = function(x, kind, temperature.to(x.dtype), detach_mean=detach, expert_reduction="none")
        (grad,) = torch.autograd.grad((upstream.to(value.dtype) * value).sum(), x)
        results.append((value, grad))
    for what, values in zip(("value", "gradient"), zip(*results, strict=True), strict=True):
        assert_within_budget(*values, what)


# ---------------------------------------------------------------------------------------------------- all of them alike


@parametrized(work=WORKS, policy=POLICIES)
def test_no_synchronisation(device: str, work: Work, policy: str) -> None:
    sample = work.case.sample(torch.bfloat16, device)
    with gradient_policy(policy):
        work.run(sample)  # compiles, and loads modules
        with synchronisation_is_an_error():
            work.run(sample)


@parametrized(work=WORKS, policy=POLICIES)
def test_graph_replay(device: str, work: Work, policy: str) -> None:
    """Captured once, replayed over other values in the same memory: the bits of a call on those values."""
    static, *others = (work.case.sample(torch.bfloat16, device, seed=seed) for seed in range(3))
    with gradient_policy(policy):
        graph, captured = capture(lambda: work.run(static))
        for other in others:
            for name, value in static.tensors.items():
                value.detach().copy_(other.tensors[name].detach())
            expected = work.run(other)
            graph.replay()
            assert_same_bits(captured, expected, "replay")


@parametrized(work=WORKS, dtype=HALF_AND_SINGLE)
def test_determinism(device: str, work: Work, dtype: torch.dtype) -> None:
    sample = work.case.sample(dtype, device)
    first = work.run(sample)
    for _ in range(2):
        assert_same_bits(work.run(sample), first, "another run")


@parametrized(work=WORKS)
def test_every_element_is_written(device: str, work: Work) -> None:
    """The same bits where all fresh memory is NaN."""
    sample = replace(work.case, rows=min(work.case.rows, 16)).sample(torch.float32, device)
    expected = work.run(sample)
    with poisoned_memory():
        assert_same_bits(work.run(sample), expected, "poisoned memory")


@parametrized(dtype=HALF_AND_SINGLE, policy=POLICIES)
def test_retained_graph(device: str, dtype: torch.dtype, policy: str) -> None:
    sample = SHAPES["8142"].sample(dtype, device)
    expected = []
    for copy in (sample.converted(dtype), sample.converted(torch.float64)):
        loss = dense_expert_cross_entropy(copy.input, copy.target, **copy.options)
        expected.append(torch.autograd.grad(loss, copy.input)[0])
    with gradient_policy(policy):
        loss = expert_cross_entropy(sample.input, sample.target, **sample.options)
    for factor in (2.0, -0.25, 1.0, 0.0):
        (grad,) = torch.autograd.grad(factor * loss, sample.input, retain_graph=True)
        assert_within_budget(grad, *(factor * each for each in expected), f"{factor} * loss")


@parametrized(
    anywhere=True,
    shape={name: SHAPES[name] for name in ("8142", "few classes")},
    mixed={"": {}, "mixed": {"options": ("log_prior", "mixed_target")}},
    value={name: BAD_TARGETS[name] for name in ("classes", "2^40")},
)
def test_bad_targets(device: str, shape: Case, mixed: dict[str, Any], value: int | None) -> None:
    """A class out of range: a NaN row of every expert and nothing else, or with checks on (and on the CPU) an error."""
    case = replace(shape, rows=5, **mixed)
    sample = case.sample(torch.float32, device, reduction="none", expert_reduction="none", return_ensemble=True)
    target = sample.options.get("mixed_target", sample.target)
    good = step(sample, 1.0)
    target[1] = case.classes if value is None else value
    with checks_on():
        assert_index_error(lambda: step(sample), "row 1 has class")
    if device == "cpu":
        assert_index_error(lambda: step(sample), "row 1 has class")
        return
    bad = torch.zeros(case.rows, dtype=torch.bool, device=device)
    bad[1] = True
    loss, ensemble_loss, prediction, grad = step(sample, 1.0)
    assert torch.equal(loss.isnan(), bad.expand_as(loss)), "the losses that are NaN are not those of the bad row"
    assert torch.equal(ensemble_loss.isnan(), bad), "the ensemble's losses that are NaN are not that of the bad row"
    assert torch.equal(grad.isnan(), bad[:, None].expand_as(grad)), "the gradients that are NaN are not the bad row's"
    assert torch.equal(prediction, good[2]), "predictions know no targets"
    clean = ~bad
    assert_same_bits(
        [loss[:, clean], ensemble_loss[clean], grad[:, clean]],
        [good[0][:, clean], good[1][clean], good[3][:, clean]],
        "the other rows",
    )
