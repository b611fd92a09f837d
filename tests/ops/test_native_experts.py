"""The experts' native CPU kernels as operators: layouts, sizes, special values, threads, instruction sets.

What users see is in test_expert_*.py, for every backend.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from _arguments import converted
from torch import Tensor

from lt_kernels._checks import compute_dtype
from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.expert_cross_entropy.arguments import Arguments
from lt_kernels.ops.expert_fusion.arguments import Arguments as FusionArguments
from lt_kernels.ops.expert_fusion.fused import fused
from lt_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ("to_mean", "pairwise")
# (experts, rows, classes): vectors, blocks and ranges that end early; rows that are split; many experts
SIZES = [(1, 8, 1), (2, 9, 17), (8, 16, 300), (5, 9, 2049), (11, 8, 65), (3, 0, 40)]
LARGE = [(3, 9, 8142), (2, 2, 100_003)]
LAYOUTS = {
    "one": lambda x: [x],
    "list": lambda x: [each.clone() for each in x.unbind(0)],
    "samples first": lambda x: [x.transpose(0, 1).contiguous().transpose(0, 1)],
    "classes first": lambda x: [x.transpose(1, 2).contiguous().transpose(1, 2)],
    "experts last": lambda x: [x.permute(1, 2, 0).contiguous().permute(2, 0, 1)],
    "window": lambda x: [torch.nn.functional.pad(x, (3, 2, 1, 0), value=math.nan)[:, 1:, 3 : 3 + x.shape[2]]],
    "one for all": lambda x: [x[:1].expand_as(x)],
    "list of windows": lambda x: [torch.nn.functional.pad(each, (e, 1))[:, e:-1] for e, each in enumerate(x)],
}
EVERY = [(size, dtype, "one") for size in SIZES for dtype in DTYPES]
EVERY += [(size, dtype, "one") for size in LARGE for dtype in DTYPES[:2]]
EVERY += [((3, 16, 200), torch.bfloat16 if i % 2 else torch.float32, layout) for i, layout in enumerate(LAYOUTS)]
IDS = {"ids": lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value)}


@pytest.fixture(autouse=True)
def one_thread():
    """Waking threads takes longer than these sizes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def native(op: str):
    return importlib.import_module(f"lt_kernels.ops.{op}.native")


def reference(op: str):
    return importlib.import_module(f"lt_kernels.ops.{op}.reference")


def drawn(size: tuple[int, int, int], dtype: torch.dtype, layout: str = "one", spread: float = 4.0) -> list[Tensor]:
    torch.default_generator.manual_seed(sum(size))
    x = (torch.randn(size, dtype=torch.float64) * spread).to(dtype)
    made = LAYOUTS[layout](x)
    assert layout == "one for all" or torch.equal(torch.stack([*made]).reshape(size), x)
    return made


def assert_like_eager(op: str, names: tuple[str, ...], arguments: tuple, *flags) -> tuple[Tensor, ...]:
    """Holds the operator's floating outputs to the error budget; returns the outputs."""
    results = native(op).forward(*arguments, *flags)
    eager = reference(op).forward(*arguments, *flags)
    exact = tuple(converted(a, torch.float64) for a in arguments)
    truth = reference(op).forward(*exact, *flags)
    for name, r, e, t in zip(names, results, eager, truth, strict=True):
        if name:
            assert_within_budget(r, e, t, name)
        assert (r.dtype, r.shape) == (e.dtype, e.shape)
    return results


# --------------------------------------------------------------------------------------------------------------- fusion


def fusion(logits: list[Tensor], every_option: bool = False) -> FusionArguments:
    experts, classes = (logits[0].shape[0] if logits[0].dim() == 3 else len(logits)), logits[0].shape[-1]
    dtype = compute_dtype(logits[0].dtype)
    if not every_option:
        return FusionArguments(logits, None, None, None, [1 / experts] * experts, 1.0)
    vectors = torch.rand(experts, dtype=dtype), torch.randn(classes, dtype=dtype), torch.tensor(1.3, dtype=dtype)
    return FusionArguments(logits, *vectors, [1.0] * experts, 1.7)


@pytest.mark.parametrize(("size", "dtype", "layout"), EVERY, **IDS)
def test_values_of_fusion(size, dtype, layout):
    for every_option in (False, True):
        a = fusion(drawn(size, dtype, layout), every_option)
        classes = size[2]
        for k in {1, min(5, classes), classes if classes < 3000 else 40}:
            for log_probs in {k == 1, True}:
                values, found, *_ = assert_like_eager(
                    "expert_fusion", ("values", "", "mass", "log_probs"), (a,), k, log_probs
                )
                u = fused(a)
                if size[1]:
                    assert_within_budget(u.gather(1, found), values, values.double(), roundings=16)
                assert all(len(set(row)) == k for row in found.tolist())


@pytest.mark.parametrize("classes", [40, 40_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fusion_of_ties_and_values_that_are_not_finite(dtype, classes):
    x = torch.zeros(2, 8 if classes < 100 else 3, classes, dtype=dtype)
    x[:, 0] = torch.arange(classes).remainder(7).to(dtype)  # many equal ones
    x[:, 1] = -math.inf
    x[0, 2, 5] = math.nan
    x[1, 2, 3] = math.nan
    if classes < 100:
        x[:, 3, 10:] = -math.inf
        x[0, 4, 17] = math.inf
        x[:, 5] = -math.inf
        x[:, 5, 39] = 1.0
        x[0, 6] = math.nan
    a = fusion([x])
    for k in (1, 3, min(classes, 100)):
        result = native("expert_fusion").forward(a, k, True)
        expected = reference("expert_fusion").forward(a, k, True)
        assert torch.equal(result[1], expected[1])
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------- divergence


def divergence(kind: str, detach: bool, logits: list[Tensor], temperature: Tensor | None, layout: str) -> None:
    experts, rows = (logits[0].shape[0] if logits[0].dim() == 3 else len(logits)), logits[0].shape[-2]
    names = ("value", "saved")
    value, saved = native("expert_divergence").forward(logits, temperature, kind)
    eager = reference("expert_divergence").forward(logits, temperature, kind)
    truth = reference("expert_divergence").forward(
        converted(logits, torch.float64), None if temperature is None else temperature.double(), kind
    )
    equal = layout == "one for all"  # the divergence is 0: terms p u cancel, and what is left are their roundings
    if equal:
        u = converted(logits[0], torch.float64)
        noise = 4 * torch.finfo(value.dtype).eps * (u.softmax(-1) * u.abs()).sum(-1).max()
    defined = 3 * experts if kind == "pairwise" else 3 * experts + 2
    for name, r, e, t in zip(names, (value, saved[:defined]), (eager[0], eager[1][:defined]), truth, strict=True):
        assert (r.dtype, r.shape) == (e.dtype, e.shape)
        if rows and equal and name == "value":
            assert r.abs().max() <= noise, f"{kind} value"
        elif rows:
            assert_within_budget(r, e, t[: len(r)], f"{kind} {name}")
    grad = torch.linspace(-1, 2, experts * rows, dtype=value.dtype).reshape(experts, rows)
    for g in (grad, torch.ones((), dtype=value.dtype).expand(experts, rows)):
        ours = native("expert_divergence").backward(g, saved, logits, temperature, kind, detach)
        theirs = reference("expert_divergence").backward(g, eager[1], logits, temperature, kind, detach)
        exact = reference("expert_divergence").backward(
            g.double(),
            truth[1],
            converted(logits, torch.float64),
            None if temperature is None else temperature.double(),
            kind,
            detach,
        )
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        if rows and equal:
            assert ours.abs().max() <= noise * g.abs().max(), f"{kind} gradient"
        elif rows:
            assert_within_budget(ours, theirs, exact, f"{kind} gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "dtype", "layout"), EVERY, **IDS)
def test_values_of_divergence(size, dtype, layout, kind):
    logits = drawn(size, dtype, layout, spread=2.0)
    temperature = torch.rand(size[2], dtype=compute_dtype(logits[0].dtype)) + 0.5
    divergence(kind, True, logits, None, layout)
    divergence(kind, False, logits, temperature, layout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [40, 40_001])
def test_divergence_of_values_that_are_not_finite(classes, kind):
    torch.manual_seed(0)
    x = torch.randn(3, 6, classes)
    x[:, 1, classes // 2 :] = -math.inf  # classes that no expert allows
    x[0, 2, 7] = math.nan
    x[0, 3, :2] = -math.inf  # what one expert rules out and others do not
    x[1, 4] = -math.inf
    for pick in ([x], [x[:, :2]]):
        value, saved = native("expert_divergence").forward(pick, None, kind)
        expected, theirs = reference("expert_divergence").forward(pick, None, kind)
        torch.testing.assert_close(value, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
        grad = torch.ones_like(value)
        ours = native("expert_divergence").backward(grad, saved, pick, None, kind, False)
        torch.testing.assert_close(
            ours, reference("expert_divergence").backward(grad, theirs, pick, None, kind, False), equal_nan=True
        )
        assert ours[:, :2].isfinite().all()
        assert value[:, :2].isfinite().all()


# -------------------------------------------------------------------------------------------------------- cross-entropy


def cross_entropy(logits: list[Tensor], mixed: bool) -> Arguments:
    experts, (rows, classes) = (logits[0].shape[0] if logits[0].dim() == 3 else len(logits)), logits[0].shape[-2:]
    dtype = compute_dtype(logits[0].dtype)
    first, second = torch.randint(classes, (2, rows))
    first[1::5] = -100
    options = RowOptions(first[:, None])._replace(scale=1.5)
    prior = torch.randn(classes, dtype=dtype).log_softmax(0)
    ensemble_coefficient = None
    if mixed:
        options = options._replace(
            mixed_target=second[:, None],
            mix_lambda=torch.rand(rows, 1, dtype=dtype),
            weight=torch.rand(classes, dtype=dtype) + 0.5,
            class_bias=torch.randn(experts, classes, dtype=dtype),
            class_scale=torch.rand(classes, dtype=dtype) + 0.5,
            learned_scale=torch.tensor(0.8, dtype=dtype),
            coefficient=torch.tensor([0.3, 0.2], dtype=dtype),
            label_smoothing=0.1,
        )
        ensemble_coefficient = torch.tensor([0.1, 0.2], dtype=dtype)
    return Arguments(logits, options, prior, ensemble_coefficient, [float(e) - 1 for e in range(experts)])


# of one class there is nothing to compare with every option
PLAIN_AND_MIXED = [(*of, mixed) for of in EVERY for mixed in (False, True) if not (mixed and of[0][2] == 1)]


@pytest.mark.parametrize(("size", "dtype", "layout", "mixed"), PLAIN_AND_MIXED, **IDS)
def test_values_of_cross_entropy(size, dtype, layout, mixed):
    a = cross_entropy(drawn(size, dtype, layout), mixed)
    names = ("loss", "rest", "ensemble loss", "", "gradient") if size[1] else ("",) * 5
    for with_ensemble in (False, True):
        for with_grad in (False, True):
            _, _, _, prediction, grad = assert_like_eager("expert_cross_entropy", names, (a,), with_ensemble, with_grad)
            if with_ensemble:
                alone = fusion(a.logits)._replace(learned_scale=a.options.learned_scale, scale=a.options.scale)
                assert torch.equal(prediction, native("expert_fusion").forward(alone, 1, False)[1][:, 0])
            if with_grad:
                assert grad.stride() == reference("expert_cross_entropy").forward(a, False, True)[4].stride()


def test_cross_entropy_of_values_that_are_not_finite():
    x = torch.randn(3, 6, 50)
    x[:, 1, 20:] = -math.inf
    x[0, 2, 7] = math.nan
    x[1, 3] = -math.inf
    a = cross_entropy([x], False)
    a = a._replace(options=a.options._replace(target=torch.arange(6)[:, None]))
    ours = native("expert_cross_entropy").forward(a, True, True)
    theirs = reference("expert_cross_entropy").forward(a, True, True)
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(ours[i], theirs[i], equal_nan=True)


@pytest.mark.parametrize("name", ["target", "mixed_target"])
@pytest.mark.parametrize("value", [40, -1, 2**40])
def test_bad_targets(name, value):
    a = cross_entropy(drawn((3, 9, 40), torch.float32), True)
    getattr(a.options, name)[4] = value
    with pytest.raises(IndexError, match=f"^{name}: row 4 has class {value}, expected 0 <= class < 40"):
        native("expert_cross_entropy").forward(a, True, True)


# ----------------------------------------------------------------------------------------- threads and instruction sets


def everything(size: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    logits = drawn(size, dtype)
    torch.default_generator.manual_seed(1)
    results = [*native("expert_fusion").forward(fusion(logits, True), min(4, size[2]), True)]
    for kind in KINDS:
        value, saved = native("expert_divergence").forward(logits, None, kind)
        grad = torch.randn(value.shape, dtype=value.dtype)
        results += [value, saved, native("expert_divergence").backward(grad, saved, logits, None, kind, False)]
    for mixed in (False, True):
        results += native("expert_cross_entropy").forward(cross_entropy(logits, mixed), True, True)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 2, 100_003), (2, 31, 999), (3, 140, 8142)], **IDS)
def test_same_bits_for_any_number_of_threads(size, dtype):
    alone = everything(size, dtype)
    torch.set_num_threads(2)
    together = everything(size, dtype)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
