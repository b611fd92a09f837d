"""How calls of every operator, strategy and loss run on a device: streams, graphs, repeated runs, bad targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import _cases.contrastive as contrastive_cases
import _cases.rows as row_cases
import pytest
import torch
from _device import (
    HALF_AND_SINGLE,
    POLICIES,
    assert_same_bits,
    capture,
    checks_on,
    poisoned_memory,
    run_late,
    synchronisation_is_an_error,
)
from _works import (
    BIAS,
    FEW_PAIRS,
    HEADS,
    MANY,
    PAIRS,
    WAYS,
    Work,
    contrastive,
    each,
    experts,
    gradients,
    linear,
    recipes,
    rows,
)
from torch import Tensor

from lt_kernels.functional import margin_cross_entropy
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_margin_cross_entropy,
    dense_expert_cross_entropy,
    dense_partitioned_logsumexp,
)

pytestmark = pytest.mark.usefixtures("backend")


def assert_same(work: Work, actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Compare bit for bit, or closely where the library may choose another matrix product."""
    if work.exact:
        assert_same_bits(actual, expected, what)
        return
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4, msg=lambda message: f"{what}: {message}")


# ------------------------------------------------------------------------------------- streams, graphs, synchronisation


@pytest.mark.gpu
@each(
    rows(WAYS, policies=POLICIES),
    linear(HEADS, policies=POLICIES),
    experts(policies=POLICIES),
    contrastive(PAIRS),
    recipes(),
)
def test_no_synchronisation(work, device):
    sample = work.sample(device)
    with work.around():
        work.step(sample)  # compiles, and loads modules
        with synchronisation_is_an_error():
            work.step(sample)


@pytest.mark.gpu
@each(rows(WAYS, policies=POLICIES), linear(HEADS), experts(policies=POLICIES), contrastive(FEW_PAIRS), recipes())
def test_graph_replay(work, device):
    """Captured once, replayed over other values in the same memory: the results of a call on those values."""
    static, *others = (work.sample(device, seed=seed) for seed in range(3))
    with work.around():
        graph, captured = capture(lambda: work.step(static, -0.5))
        for other in others:
            for name, value in static.tensors.items():
                value.detach().copy_(other.tensors[name].detach())
            expected = work.step(other, -0.5)
            for _ in range(2):
                graph.replay()
                assert_same(work, captured, expected, "replay")


@pytest.mark.gpu
@each(rows(WAYS), contrastive({"memory": PAIRS["memory"]}))
def test_side_stream(work, device):
    """Logits or queries that a stream makes late are read after they are made: launches are on the current stream."""
    sample = work.sample(device)
    late = sample.input if isinstance(sample, Sample) else sample.query
    with work.around():
        expected = work.step(sample)
        assert_same(work, run_late(late, lambda: work.step(sample)), expected, "side stream")


@pytest.mark.gpu
@each(rows(WAYS, ["fp32"], ["mean"]))
def test_second_device(work):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    assert torch.cuda.current_device() == 0
    check_margin_cross_entropy(margin_cross_entropy, work.sample("cuda:1"), upstream=0.7)
    assert torch.cuda.current_device() == 0


# ------------------------------------------------------------------------------------------------------- repeated runs


@pytest.mark.gpu
@each(
    rows(MANY, HALF_AND_SINGLE, ["mean"]),
    linear(HEADS, HALF_AND_SINGLE),
    experts(dtypes=HALF_AND_SINGLE),
    contrastive(FEW_PAIRS, HALF_AND_SINGLE),
    recipes(),
)
def test_determinism(work, device):
    sample = work.sample(device)
    with work.around():
        first = work.step(sample)
        for _ in range(3):
            assert_same_bits(work.step(sample), first, "another run")


POISONED = (
    "odd",
    "everything",
    "everything with itself",
    "one row",
    "one key",
    "one feature",
    "wide",
    "8142 keys",
    "few rows, many keys",
    "many rows, few keys",
    "no positives",
    "every key masked",
    "rows of keys",
    "rows of keys with itself",
    "no rows of keys",
    "only vectors learn",
)


@pytest.mark.gpu
@each(
    rows(row_cases.BY_ID, ["fp32"]),
    linear(HEADS, HALF_AND_SINGLE),
    experts(dtypes=["fp32"], most_rows=16),
    contrastive({name: contrastive_cases.BY_ID[name] for name in POISONED}, ["fp32"]),
)
def test_every_element_is_written(work, device):
    """The same bits where all fresh memory is NaN, and again in a second run."""
    sample = work.sample(device)
    with work.around():
        expected = work.step(sample)
        with poisoned_memory():
            assert_same_bits(work.step(sample), expected, "poisoned memory")
        assert_same_bits(work.step(sample), expected, "second run")


DENSE: dict[str, Callable[[Any], Iterable[Tensor]]] = {
    "experts": lambda sample: [dense_expert_cross_entropy(sample.input, sample.target, **sample.options)],
    "contrastive": lambda sample: dense_partitioned_logsumexp(*sample.arguments, **sample.options),
}


@pytest.mark.gpu
@each(
    rows({"inat18 width": WAYS["inat18 width"]}, HALF_AND_SINGLE, ["mean"], POLICIES),
    linear({"inat18": HEADS["inat18"]}, HALF_AND_SINGLE, POLICIES),
    experts(["loss"], HALF_AND_SINGLE, POLICIES, ["8142"]),
    contrastive({"8142 keys": PAIRS["8142 keys"]}, HALF_AND_SINGLE),
)
def test_retained_graph(work, device):
    """Each backward pass over one graph: like another graph's, or like float64 where two kernels may have run."""
    sample = work.sample(device)
    with work.around():
        once = gradients(work.values(sample), sample, 1.0)
        values = work.values(sample)
        found = {factor: gradients(values, sample, factor, retain_graph=True) for factor in (2.0, -0.25, 1.0, 0.0)}
    eager, truth, roundings = once, [grad.double() for grad in once], {"rows": 2.0, "linear": 4.0}.get(work.family)
    if roundings is None:
        converted = (sample.converted(dtype) for dtype in (work.dtype, torch.float64))
        eager, truth = (gradients(DENSE[work.family](each), each, 1.0) for each in converted)
    for factor, grads in found.items():
        for grad, e, t in zip(grads, eager, truth, strict=True):
            plain = (factor * t).to(grad.dtype) if roundings else factor * e
            assert_within_budget(grad, plain, factor * t, f"{factor} * loss", roundings=roundings)


@each(rows({"inat18 width": WAYS["inat18 width"]}, HALF_AND_SINGLE, ["mean"], POLICIES))
def test_gradient_accumulation(work, device):
    samples = [work.sample(device, seed=seed) for seed in range(4)]
    x = samples[0].input.detach().requires_grad_()
    expected = torch.zeros_like(x)
    with work.around():
        for sample in samples:
            loss = work.values(replace(sample, input=x))[0] / len(samples)
            (alone,) = torch.autograd.grad(loss, x, retain_graph=True)
            expected += alone
            loss.backward()
    torch.testing.assert_close(x.grad, expected)


# ----------------------------------------------------------------------------------------------------------- bad input

BAD_ROWS = {
    "rows": row_cases.Case("rows", 5, 1203, **BIAS),
    "wide rows": row_cases.Case("wide rows", 3, 100_003, **BIAS),
    "few classes": row_cases.Case("few classes", 5, 33, **BIAS),
    "pixels": row_cases.Case("pixels", 2, 19, (5, 7), **BIAS),
    "mixed": row_cases.Case("mixed", 5, 1203, options=("class_bias", "mixed_target")),
    "angular": row_cases.Case(
        "angular", 5, 1203, options=("margin",), keywords={"margin_type": "angular", "scale": 16.0}
    ),
}


def bad_experts() -> list[Work]:
    keywords = {"reduction": "none", "expert_reduction": "none"}
    return [
        replace(work, id=f"{work.id}{mixed}", case=replace(work.case, options=options), keywords=keywords)
        for work in experts(["loss and ensemble"], ["fp32"], shapes=("8142", "few classes"), most_rows=5)
        for mixed, options in {"": ("log_prior",), "-mixed": ("log_prior", "mixed_target")}.items()
    ]


BAD_TARGETS = {"-1": -1, "classes": None, "2^40": 2**40, "lowest": -(2**63)}
BAD_HEADS = {name: HEADS[name] for name in ("inat18", "mixed")}
BAD_KEYS = {"keys": 41, "2^31": 2**31, "-2": -2, "lowest": -(2**31)}


def with_values(works: list[Work], names: Iterable[str]) -> list:
    """Return parameters of ``test_bad_targets``: a work, and the class that its second row is given."""
    marked = [(work, work.marks, name) for work in works for name in names]
    return [pytest.param(w, BAD_TARGETS[name], id=f"{w.id}-{name}", marks=marks) for w, marks, name in marked]


def assert_refused(work: Work, sample: Any, device: str, words: str) -> None:
    """Require an error with checks on, and on the CPU in any case."""
    for checks in (True, False) if device == "cpu" else (True,):
        with checks_on() if checks else nullcontext(), work.around(), pytest.raises(IndexError, match=words):
            work.step(sample)


@pytest.mark.parametrize(
    ("work", "value"),
    [
        *with_values(rows(BAD_ROWS, ["fp32"], ["none"]), BAD_TARGETS),
        *with_values(rows(BAD_ROWS, ["fp32"], ["mean"], POLICIES), BAD_TARGETS),
        *with_values(linear(BAD_HEADS, ["fp32"], reductions=["none"]), ["classes"]),
        *with_values(bad_experts(), ["classes", "2^40"]),
    ],
)
def test_bad_targets(work, value, device):
    """A class out of range: a NaN row and nothing else, or with checks on (and on the CPU) an error."""
    sample = work.sample(device)
    with work.around():
        good = work.step(sample, 1.0)
    target = sample.options.get("mixed_target", sample.target)
    target.view(-1)[1] = work.case.classes if value is None else value
    assert_refused(work, sample, device, "row 1 has class")
    if device == "cpu":
        return
    bad = torch.zeros_like(target, dtype=torch.bool)
    bad.view(-1)[1] = True
    with work.around():
        count, found = len(work.values(sample)), work.step(sample, 1.0)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if work.family == "rows" else {"rtol": 0.0, "atol": 0.0}
    for position, (value, before) in enumerate(zip(found[: count + 1], good, strict=False)):
        if not value.is_floating_point():
            assert torch.equal(value, before), "predictions know no targets"
        elif value.dim() == 0:
            assert value.isnan()
        else:
            of_value = (bad if position < count else bad.unsqueeze(1)).expand_as(value)  # the last is the gradient
            assert torch.equal(value.isnan(), of_value), f"result {position}: wrong rows are NaN"
            if work.exact:
                clean, expected = value.masked_fill(of_value, 0.0), before.masked_fill(of_value, 0.0)
                torch.testing.assert_close(clean, expected, **tolerance)


@pytest.mark.parametrize("value", BAD_KEYS.values(), ids=BAD_KEYS)
@each(contrastive({"excluded keys": replace(contrastive_cases.BY_ID["excluded keys"], width=16)}, ["fp32"]))
def test_bad_exclude(work, value, device):
    """A key out of range excludes nothing; with checks on (and on the CPU) it is an error."""
    sample, good = work.sample(device), work.sample(device)
    sample.options["exclude"][1], good.options["exclude"][1] = value, -1
    assert_refused(work, sample, device, f"exclude: got {value} in row 1")
    if device == "cpu":
        return
    with work.around():
        for actual, expected in zip(work.step(sample), work.step(good), strict=True):
            torch.testing.assert_close(actual, expected)
