"""linear_margin_cross_entropy: every strategy, backend, dtype and case, against float64."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases.linear import CASES, OWN, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lt_kernels
from lt_kernels import _settings, functional
from lt_kernels.functional import linear_margin_cross_entropy, margin_cross_entropy
from lt_kernels.ops._registry import flatten
from lt_kernels.ops._rows.options import RowOptions
from lt_kernels.ops.linear_margin_cross_entropy import op, plan
from lt_kernels.ops.linear_margin_cross_entropy.arguments import DIFFERENTIABLE, Arguments
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_linear_margin_cross_entropy,
    dense_linear_margin_cross_entropy,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BACKENDS = ("reference", "native")


#: How each mode cuts: by name, so that a test can ask for a cut that no budget of these small sizes would give.
MODES = ("materialize", "rows", "classes", "recompute", "materialize, recompute")


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """A strategy, with small chunks; "recompute": forward leaves all gradients to backward."""
    if "recompute" in request.param:
        monkeypatch.setattr(_settings, "gradient_policy", "recompute")

    def cut(sizes: plan.Sizes, memory_budget: int) -> plan.LinearPlan:
        if request.param == "classes" and sizes.divisible:
            return plan._by_classes(sizes, 16 if sizes.classes > 16 else 4)
        return plan._by_rows(sizes, max(1, -(-sizes.rows // 3)))

    monkeypatch.setattr(op, "chunk_plan", cut)
    return "materialize" if "materialize" in request.param else "chunked"


def by_id(name: str) -> Case:
    return next(case for case in CASES if case.id == name)


def upstream_of(sample: Sample, reduction: str, device: str) -> float | Tensor:
    if reduction != "none":
        return 0.7
    shape = sample.options["linear_weight"].shape[1:-1]
    shape = (sample.input.shape[0], *shape)
    return torch.linspace(-1, 2, math.prod(shape), device=device).reshape(shape)


def with_strategy(strategy: str):
    return lambda *args, **options: linear_margin_cross_entropy(*args, strategy=strategy, **options)


# ------------------------------------------------------------------------------------------------- value and gradients


def _kinds() -> list:
    """Every case in float32 and bfloat16; a few in float16, and per row, where the upstream gradient is a vector."""
    kinds = [(case, kind, "mean") for case in CASES for kind in ("fp32", "bf16")]
    few = ("logit adjustment", "mixup with everything", "probabilities", "positions", "cosine", "frozen weight")
    kinds += [(by_id(name), "fp16", "mean") for name in few] + [(by_id(name), "fp32", "none") for name in few]
    return [pytest.param(case, DTYPES[kind], how, id=f"{case.id}-{kind}-{how}") for case, kind, how in kinds]


@pytest.mark.parametrize(("case", "dtype", "reduction"), _kinds())
def test_value_and_every_gradient(case, dtype, reduction, mode, backend, device):
    sample = case.sample(dtype, device, reduction=reduction)
    check_linear_margin_cross_entropy(
        with_strategy(mode), sample, upstream=upstream_of(sample, reduction, device), factor=2.0
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sum_on_auto(case, backend, device):
    check_linear_margin_cross_entropy(linear_margin_cross_entropy, case.sample(torch.float32, device, reduction="sum"))


@pytest.mark.parametrize("case", [c for c in CASES if c.classes <= 40 and c.spread < 100], ids=lambda case: case.id)
@pytest.mark.parametrize("backend_name", CPU_BACKENDS)
def test_gradcheck(case, mode, backend_name):
    small = dataclasses.replace(case, rows=min(case.rows, 4), width=2, classes=min(case.classes, 7))
    sample = small.sample(torch.float64)
    names = list(sample.differentiable)

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        given = {
            "input": sample.input,
            "target": sample.target,
            **sample.options,
            **dict(zip(names, leaves, strict=True)),
        }
        values = [given.pop(name) for name in ("input", "linear_weight", "target")]
        output = linear_margin_cross_entropy(*values, return_lse=True, strategy=mode, **given)
        return output.loss, output.lse

    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in sample.differentiable.values())
    with lt_kernels.use_backend(backend_name):
        assert torch.autograd.gradcheck(call, leaves)


linear_cross_entropy = getattr(F, "linear_cross_entropy", None)


@pytest.mark.skipif(linear_cross_entropy is None, reason="torch has no linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("batch", "positions"),
    [((), ()), ((4,), ()), ((4,), (3,)), ((2,), (3, 2))],
    ids=["unbatched", "batched", "1d", "2d"],
)
def test_is_a_superset_of_torch(batch, positions, bias, weighted, soft, smoothing, reduction, backend, device):
    torch.manual_seed(0)
    x, w = torch.randn(*batch, 5, device=device), torch.randn(7, *positions, 5, device=device)
    b = torch.randn(7, *positions, device=device) if bias else None
    target = torch.randint(7, (*batch, *positions), device=device)
    if soft:
        target = torch.randn(*batch, 7, *positions, device=device).softmax(len(batch))
    elif batch:
        target.view(-1)[0] = 6
    weight = torch.rand(7, device=device) + 0.1 if weighted else None
    results = []
    for function, kind in (
        (linear_margin_cross_entropy, torch.float32),
        (linear_cross_entropy, torch.float32),
        (linear_cross_entropy, torch.float64),
    ):
        leaves = [t.to(kind).requires_grad_() for t in (x, w, b) if t is not None]
        loss = function(
            leaves[0],
            leaves[1],
            target.to(kind) if soft else target,
            linear_bias=leaves[2] if bias else None,
            weight=None if weight is None else weight.to(kind),
            reduction=reduction,
            label_smoothing=smoothing,
            ignore_index=6 if not soft and batch else None,
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for name, ours, eager, truth in zip(("loss", *OWN), *results, strict=False):
        assert ours.shape == truth.shape
        assert_within_budget(ours, eager, truth, name)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int8, torch.uint8], ids=str)
def test_any_integer_dtype(index_dtype, backend, device):
    sample = by_id("logit adjustment").sample(torch.float32, device)
    options = dict(sample.options)
    weight = options.pop("linear_weight")
    losses = [
        linear_margin_cross_entropy(sample.input, weight, target, **options)
        for target in (sample.target, sample.target.to(index_dtype))
    ]
    assert torch.equal(*losses)


def test_real_sizes(mode, backend, device):
    """Chunks of real widths: 16-byte groups, padded rows, several blocks of classes."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("real", rows=300, width=64, classes=1203, ignored=0.1)
        check_linear_margin_cross_entropy(with_strategy(mode), case.sample(dtype, device))


# -------------------------------------------------------------------------------------------------- upstream and graphs


def own(sample: Sample) -> tuple[list[Tensor], dict[str, Any]]:
    options = dict(sample.options)
    return [sample.input, options.pop("linear_weight"), sample.target], options


@pytest.mark.parametrize("upstream", [1.0, -3.7, 0.0, 65536.0])
@pytest.mark.parametrize("name", ["logit adjustment", "mixup with everything", "cosine"])
def test_exact_for_every_upstream_gradient(name, upstream, mode, backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        sample = by_id(name).sample(dtype, device)
        check_linear_margin_cross_entropy(with_strategy(mode), sample, upstream=upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["logit adjustment", "cosine", "learnable vectors"])
def test_retained_graphs_and_accumulation(name, reduction, mode, backend, device):
    sample = by_id(name).sample(torch.float32, device, reduction=reduction)
    arguments, options = own(sample)
    leaves = list(sample.differentiable.values())
    call = lambda: linear_margin_cross_entropy(*arguments, strategy=mode, **options).sum()  # noqa: E731
    once = [g.clone() for g in torch.autograd.grad(call(), leaves)]
    loss = call()
    for factor, total in ((2.0, 2.0), (-0.25, 1.75), (0.0, 1.75)):
        (factor * loss).backward(retain_graph=factor != 0)
        for leaf, g in zip(leaves, once, strict=True):
            torch.testing.assert_close(leaf.grad, total * g)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_stay_after_the_graph_is_gone(mode, backend, device):
    """A gradient that left the graph is the caller's: later calls must not write into its memory."""
    x = torch.randn(64, 700, device=device, requires_grad=True)
    w = torch.randn(3000, 700, device=device, requires_grad=True)
    y = torch.arange(64, device=device)
    linear_margin_cross_entropy(x, w, y, strategy=mode).backward()
    held, copies = (x.grad, w.grad), (x.grad.clone(), w.grad.clone())
    for _ in range(3):
        z, v = torch.randn_like(x).requires_grad_(), torch.randn_like(w).requires_grad_()
        linear_margin_cross_entropy(z, v, y, strategy=mode).backward()
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_a_clear_error(reduction, mode, backend, device):
    sample = by_id("plain").sample(torch.float32, device, reduction=reduction)
    arguments, options = own(sample)
    loss = linear_margin_cross_entropy(*arguments, strategy=mode, **options).sum()
    (grad,) = torch.autograd.grad(loss, sample.input, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


def test_transforms_are_a_clear_error(mode, backend, device):
    x, w, y = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device), torch.tensor([0, 1, 2], device=device)
    call = lambda z: linear_margin_cross_entropy(z, w, y, strategy=mode)  # noqa: E731
    for transform in (lambda: torch.func.jvp(call, (x,), (x,)), lambda: torch.func.grad(call)(x)):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            transform()


def test_inputs_are_left_alone(mode, backend, device):
    for name in ("mixup with everything", "probabilities", "cosine, learnable vectors", "positions"):
        sample = by_id(name).sample(torch.float32, device)
        arguments, options = own(sample)
        tensors = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor)]
        before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
        linear_margin_cross_entropy(*arguments, strategy=mode, **options).backward()
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        assert versions == [t._version for t in tensors]


@pytest.mark.parametrize("name", ["logit adjustment", "cosine, mixup", "learnable vectors"])
def test_deterministic(name, mode, backend, device):
    runs = []
    for _ in range(2):
        sample = by_id(name).sample(torch.float32, device)
        arguments, options = own(sample)
        loss = linear_margin_cross_entropy(*arguments, strategy=mode, **options)
        runs.append([loss, *torch.autograd.grad(loss, list(sample.differentiable.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_graph_no_gradient(mode, backend, device):
    sample = by_id("logit adjustment").sample(torch.float32, device)
    arguments, options = own(sample)
    with torch.no_grad():
        loss = linear_margin_cross_entropy(*arguments, strategy=mode, **options)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_margin_cross_entropy(*arguments, strategy=mode, **options))


@pytest.mark.parametrize(("frozen", "products"), [("input", 2), ("linear_weight", 2), (None, 3)])
def test_products_for_what_is_frozen_are_left_out(frozen, products, mode, monkeypatch):
    sample = Case("products", rows=30, width=8, classes=50, bias=False).sample(torch.float32)
    arguments, options = own(sample)
    if frozen is not None:
        sample.differentiable[frozen].requires_grad_(False)
    operations = []

    def counting(product):
        def counted(*operands, **options):
            left, right = operands[-2:]
            operations.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
            return product(*operands, **options)

        return counted

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counting(getattr(torch, name)))
    linear_margin_cross_entropy(*arguments, strategy=mode, **options).backward()
    computed_again = mode == "chunked" and (
        _settings.gradient_policy == "recompute" or op.chunk_plan(plan_sizes(30, 8, 50), 0).by == "classes"
    )
    assert sum(operations) == (products + computed_again) * 2 * 30 * 8 * 50


def plan_sizes(rows: int, width: int, classes: int) -> plan.Sizes:
    return plan.Sizes(rows, width, classes, 1, torch.float32, torch.float32, "cpu", True, True, True)


# --------------------------------------------------------------------------------------------------- outputs, extremes


@pytest.mark.parametrize("name", ["logit adjustment", "mixup with everything", "cosine", "positions", "probabilities"])
def test_every_output_at_once(name, mode, backend, device):
    sample = by_id(name).sample(torch.float32, device)
    arguments, options = own(sample)
    given = {k: v for k, v in options.items() if k not in ("linear_bias", "normalize")}
    x, w, y = arguments
    if options["normalize"]:
        x, w = F.normalize(x, dim=1), F.normalize(w, dim=-1)
    bias = options["linear_bias"]
    logits = F.linear(x, w.flatten(0, -2), None if bias is None else bias.flatten()).unflatten(1, w.shape[:-1])
    expected = margin_cross_entropy(logits, y, return_lse=True, return_prediction=True, **given)
    actual = linear_margin_cross_entropy(*arguments, strategy=mode, return_lse=True, return_prediction=True, **options)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.lse, expected.lse, rtol=1e-5, atol=1e-4)
    assert torch.equal(actual.prediction, expected.prediction)
    assert actual.lse.shape == actual.prediction.shape == expected.lse.shape
    only = linear_margin_cross_entropy(*arguments, strategy=mode, return_prediction=True, **options)
    assert only.lse is None
    leaves = list(sample.differentiable.values())
    for a, b in zip(torch.autograd.grad(only.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["logit adjustment", "cosine"])
def test_lse_is_differentiable(name, mode, backend, device):
    def z_loss(function):
        def call(*arguments, **options):
            loss, lse = function(*arguments, **options)
            return loss + 0.01 * lse.square().sum()

        return call

    def dense(*arguments, **options):
        loss = dense_linear_margin_cross_entropy(*arguments, **options)
        x, _, w = arguments[:2], None, options["linear_weight"]
        features = x[0]
        if options["normalize"]:
            features, w = F.normalize(features, dim=1), F.normalize(w, dim=1)
        logits = F.linear(features, w, options["linear_bias"])
        return loss, torch.logsumexp(options.get("scale", 1.0) * logits + options["class_bias"], 1)

    def ours(*arguments, **options):
        output = linear_margin_cross_entropy(*arguments, return_lse=True, strategy=mode, **options)
        return output.loss, output.lse

    sample = by_id(name).sample(torch.float32, device)
    check_linear_margin_cross_entropy(z_loss(ours), sample, dense=z_loss(dense))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["logit adjustment", "class weights", "cosine"])
def test_all_rows_ignored(name, reduction, mode, backend, device):
    sample = dataclasses.replace(by_id(name), ignored=1.1).sample(torch.float32, device, reduction=reduction)
    assert (sample.target == -100).all()
    arguments, options = own(sample)
    loss = linear_margin_cross_entropy(*arguments, strategy=mode, **options)
    assert bool(loss.isnan().all()) == (reduction == "mean")
    for g in torch.autograd.grad(loss.sum(), list(sample.differentiable.values())):
        assert (g == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction, mode, backend, device):
    x = torch.randn(0, 6, device=device, requires_grad=True)
    w = torch.randn(5, 6, device=device, requires_grad=True)
    b = torch.randn(5, device=device, requires_grad=True)
    y = torch.empty(0, dtype=torch.int64, device=device)
    output = linear_margin_cross_entropy(
        x, w, y, linear_bias=b, reduction=reduction, strategy=mode, return_prediction=True
    )
    assert output.prediction.shape == (0,)
    expected = F.cross_entropy(F.linear(x, w, b), y, reduction=reduction)
    assert output.loss.shape == expected.shape
    assert torch.equal(output.loss.isnan(), expected.isnan())
    grads = torch.autograd.grad(output.loss.sum(), (x, w, b))
    assert grads[0].shape == x.shape
    assert all((g == 0).all() or reduction == "mean" for g in grads)
    assert all(g.shape == t.shape for g, t in zip(grads, (x, w, b), strict=True))


@pytest.mark.parametrize("name", ["logit adjustment", "mixup"])
def test_masked_classes(name, mode, backend, device):
    sample = by_id(name).sample(torch.float32, device)
    with torch.no_grad():
        sample.options["class_bias"][4:30] = -math.inf
        for t in (sample.target, sample.options.get("mixed_target", sample.target)):
            t[(t >= 4) & (t < 30)] = 1
    check_linear_margin_cross_entropy(with_strategy(mode), sample)


def test_smoothing_over_a_masked_class_is_infinite(mode, backend, device):
    x, w = torch.randn(3, 4, device=device), torch.randn(40, 4, device=device)
    bias = torch.zeros(40, device=device).index_fill_(0, torch.tensor([7], device=device), -math.inf)
    y = torch.tensor([0, 20, 39], device=device)
    loss = linear_margin_cross_entropy(x, w, y, class_bias=bias, label_smoothing=0.1, strategy=mode)
    assert loss == math.inf


def test_smoothing_with_a_masked_target_is_infinite(mode, backend, device):
    x, w = torch.randn(3, 4, device=device), torch.randn(40, 4, device=device)
    bias = torch.zeros(40, device=device).index_fill_(0, torch.tensor([20], device=device), -math.inf)
    y = torch.tensor([0, 20, 39], device=device)
    loss = linear_margin_cross_entropy(x, w, y, class_bias=bias, label_smoothing=0.1, strategy=mode, reduction="none")
    assert loss.tolist() == [math.inf] * 3


def test_any_nan_is_a_nan(mode, backend, device):
    x, w = torch.randn(3, 4, device=device), torch.randn(40, 4, device=device, requires_grad=True)
    x[1, 2] = math.nan
    x.requires_grad_()
    y = torch.tensor([0, 20, 39], device=device)
    loss = linear_margin_cross_entropy(x, w, y, reduction="none", strategy=mode)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(loss.sum(), x)[0].isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [-1, 37, 2**40])
@pytest.mark.parametrize("name", ["logit adjustment", "mixup"])
def test_a_bad_target_is_an_index_error_that_names_the_row(name, bad, mode, backend, device):
    if device != "cpu":
        pytest.skip("a GPU makes it NaN")
    sample = by_id(name).sample(torch.float32, device)
    (sample.options["mixed_target"] if name == "mixup" else sample.target)[17] = bad
    arguments, options = own(sample)
    argument = "mixed_target" if name == "mixup" else "target"
    with pytest.raises(IndexError, match=f"^{argument}: row 17 has class {bad}, expected 0 <= class < 37"):
        linear_margin_cross_entropy(*arguments, strategy=mode, **options)


@pytest.mark.parametrize("where", ["weight", "features"])
def test_vectors_of_zero_length(where, mode, backend, device):
    sample = by_id("cosine").sample(torch.float32, device)
    with torch.no_grad():
        (sample.input if where == "features" else sample.options["linear_weight"])[2] = 0
    check_linear_margin_cross_entropy(with_strategy(mode), sample)


@pytest.mark.parametrize("with_prediction", [False, True], ids=["", "prediction"])
@pytest.mark.parametrize("master", [torch.float32, torch.float16], ids=str)
def test_short_weights_in_float16(master, with_prediction, mode, backend, device):
    """1 / |w| leaves float16's range; the gradients of the features and of long weights do not."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, device=device).half().requires_grad_()
    w = torch.randn(40, 8, device=device)
    w[3], w[4:8] = 0, w[4:8] * 1e-3
    w = w.to(master).requires_grad_()
    y = torch.randint(8, 40, (64,), device=device)
    grads = {}
    for kind in ("ours", "truth"):
        leaves = [t.detach().to(torch.float16 if kind == "ours" and t is x else t.dtype) for t in (x, w)]
        leaves = [(t if kind == "ours" else t.double()).requires_grad_() for t in leaves]
        if kind == "ours":
            output = linear_margin_cross_entropy(
                *leaves, y, normalize=True, scale=30.0, return_prediction=with_prediction, strategy=mode
            )
            loss = output.loss if with_prediction else output
        else:
            loss = dense_linear_margin_cross_entropy(leaves[0], y, leaves[1], normalize=True, scale=30.0)
        grads[kind] = [loss, *(g / 1024 for g in torch.autograd.grad(1024 * loss, leaves))]
    torch.testing.assert_close(grads["ours"][0].double(), grads["truth"][0], rtol=1e-2, atol=0)
    torch.testing.assert_close(grads["ours"][1].double(), grads["truth"][1], rtol=0.05, atol=2e-3)
    long = torch.arange(40, device=device) >= 8
    torch.testing.assert_close(grads["ours"][2].double()[long], grads["truth"][2][long], rtol=0.05, atol=2e-3)
    if master == torch.float32:
        assert grads["ours"][2].isfinite().all()


@pytest.mark.parametrize("policy", ["one_pass", "recompute"])
def test_loss_scaling_in_float16(policy, backend, device, monkeypatch):
    monkeypatch.setattr(_settings, "gradient_policy", policy)
    torch.manual_seed(0)
    x = (3 * torch.randn(256, 16, device=device)).half().requires_grad_()
    w = torch.randn(300, 16, device=device).half().requires_grad_()
    y = torch.randint(300, (256,), device=device)
    for strategy in ("materialize", "chunked"):
        loss = linear_margin_cross_entropy(x, w, y, strategy=strategy)
        exact = [t.detach().float().requires_grad_() for t in (x, w)]
        truth = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].t(), y), exact)
        for g, t in zip(torch.autograd.grad(4096 * loss, (x, w)), truth, strict=True):
            torch.testing.assert_close(g.float() / 4096, t, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_operands_of_any_strides(layout, mode, backend, device):
    sample = by_id("odd").sample(torch.float32, device)
    arguments, options = own(sample)

    def strided(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.t().contiguous().t()
        room = t.new_full((t.shape[0] + 2, t.shape[1] + 3), math.nan)
        return room[1:-1, 2:-1].copy_(t)

    x, w, y = (t.detach() for t in arguments)
    x, w = (x[:1].expand_as(x), w[:1].expand_as(w)) if layout == "expanded" else (strided(x), strided(w))
    x, w = x.requires_grad_(), w.requires_grad_()
    results = []
    for a, b in ((x, w), (x.detach().contiguous().requires_grad_(), w.detach().contiguous().requires_grad_())):
        loss = linear_margin_cross_entropy(a, b, y, strategy=mode, **options)
        results.append((loss, *torch.autograd.grad(loss, (a, b))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["logit adjustment", "cosine", "mixup, smoothed"])
@pytest.mark.parametrize("way", ["autocast", "low-precision features", "low-precision weight"])
def test_float32_master_weights(way, name, low, mode, backend, device):
    """As F.linear under autocast: products in the narrow dtype; gradients in each tensor's own."""
    sample = dataclasses.replace(by_id(name), rows=64).sample(torch.float32, device)
    if way == "low-precision features":
        sample.input = sample.input.detach().to(low).requires_grad_()
    if way == "low-precision weight":
        sample.options["linear_weight"] = sample.options["linear_weight"].detach().to(low).requires_grad_()
    arguments, options = own(sample)
    leaves = sample.differentiable
    with torch.autocast(torch.device(device).type, dtype=low, enabled=way == "autocast"):
        loss = linear_margin_cross_entropy(*arguments, strategy=mode, **options)
    assert loss.dtype == torch.float32
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    results = []
    for kind in (torch.float64, low):
        copy = sample.converted(torch.float32).converted(kind)
        dense = dense_linear_margin_cross_entropy(copy.input, copy.target, **copy.options)
        values = dict(copy.differentiable)
        results.append((dense, dict(zip(values, torch.autograd.grad(dense, list(values.values())), strict=True))))
    (truth, true_grads), (eager, eager_grads) = results
    assert_within_budget(loss, eager, truth, "loss")
    for grad_name, g in grads.items():
        assert g.dtype == leaves[grad_name].dtype
        assert_within_budget(g, eager_grads[grad_name], true_grads[grad_name], f"gradient of {grad_name}")


def test_several_chunks_of_low_precision_add_up_in_float32(backend, device, monkeypatch):
    """64 equal chunks: added up in bfloat16, the gradient would stop growing."""
    monkeypatch.setattr(op, "chunk_plan", lambda sizes, budget: plan._by_rows(sizes, 4))
    x = torch.randn(4, 8, device=device).repeat(64, 1).bfloat16()
    w = torch.randn(6, 8, device=device).bfloat16().requires_grad_()
    y = torch.tensor([0, 1, 2, 3], device=device).repeat(64)
    loss = linear_margin_cross_entropy(x, w, y, strategy="chunked", reduction="sum")
    (grad,) = torch.autograd.grad(loss, w)
    part = linear_margin_cross_entropy(x[:4], w, y[:4], strategy="materialize", reduction="sum")
    (one,) = torch.autograd.grad(part, w)
    torch.testing.assert_close(grad.float(), 64 * one.float(), rtol=0.01, atol=0.01)


def test_autocast_leaves_float64_alone(mode, device):
    sample = by_id("logit adjustment").sample(torch.float64, device)
    arguments, options = own(sample)
    with lt_kernels.use_backend("reference"), torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss = linear_margin_cross_entropy(*arguments, strategy=mode, **options)
    assert loss.dtype == torch.float64
    with lt_kernels.use_backend("reference"):
        assert torch.equal(loss, linear_margin_cross_entropy(*arguments, strategy=mode, **options))


def test_checkpointing(mode, backend, device):
    sample = by_id("logit adjustment").sample(torch.float32, device)
    arguments, options = own(sample)
    x, w, y = arguments
    call = lambda x, w: linear_margin_cross_entropy(x.sin(), w, y, strategy=mode, **options)  # noqa: E731
    plain = torch.autograd.grad(call(x, w), (x, w))
    for reentrant in (False, True):
        again = torch.autograd.grad(checkpoint(call, x, w, use_reentrant=False), (x, w))
        if reentrant:
            for leaf in (x, w):
                leaf.grad = None
            checkpoint(call, x, w, use_reentrant=True).backward()
            again = (x.grad, w.grad)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("logit adjustment", True), ("mixup with everything", False), ("cosine", False), ("positions", False)],
)
def test_compile_fullgraph(name, dynamic, mode, device):
    torch._dynamo.reset()
    sample = by_id(name).sample(torch.float32, device)
    arguments, options = own(sample)

    def call(x: Tensor, w: Tensor, y: Tensor, **options) -> Tensor:
        return 2 * linear_margin_cross_entropy(x.sin(), w, y, strategy=mode, **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, actual = (f(*arguments, **options) for f in (call, compiled))
    torch.testing.assert_close(actual, expected)
    leaves = list(sample.differentiable.values())
    for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strategy", ["auto", "chunked"])
def test_compile_with_inductor(strategy, device):
    torch._dynamo.reset()
    sample = by_id("logit adjustment").sample(torch.float32, device)
    arguments, options = own(sample)
    call = lambda *a, **o: linear_margin_cross_entropy(*a, strategy=strategy, **o) * 3  # noqa: E731
    compiled = torch.compile(call, fullgraph=True)
    for _ in range(2):
        grads = [torch.autograd.grad(f(*arguments, **options), arguments[:2]) for f in (call, compiled)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def op_arguments(name: str, device: str) -> list:
    sample = by_id(name).sample(torch.float32, device)
    o = sample.options
    given = {k: o.get(k) for k in ("weight", "class_bias", "class_scale")}
    options = RowOptions.plain(sample.target[..., None])._replace(**given)
    a = Arguments(sample.input, o["linear_weight"], None, o.get("linear_bias"), options, o["normalize"])
    return [*flatten(a)]


@pytest.mark.parametrize("name", ["logit adjustment", "probabilities", "cosine"])
def test_opcheck_forward(name, mode, device):
    for reduce, with_prediction, with_grad in ((True, True, False), (False, False, False), (True, False, True)):
        needs = [with_grad] * 2 + [with_grad and name != "cosine"]
        arguments = (*op_arguments(name, device), mode, 2**20, reduce, with_prediction, with_grad, needs, "reference")
        if mode == "materialize" and not with_grad:  # backward turns the kept logits into their gradient
            arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(op.forward, arguments)


@pytest.mark.parametrize("name", ["logit adjustment", "probabilities", "cosine"])
def test_opcheck_backward(name, mode, device):
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in op_arguments(name, device)]
    forward = op.forward(*arguments, mode, 2**20, False, False, False, [False] * 3, "reference")
    rest, logits = forward[3], forward[4] if mode == "materialize" else None
    needs = [True, True, name != "cosine", name == "probabilities", True, False, False, False]
    assert len(needs) == len(DIFFERENTIABLE)
    torch.library.opcheck(
        torch.ops.lt_kernels.linear_margin_cross_entropy_bwd.default,
        (rest.new_ones(()), None, rest, logits, False, *arguments, mode, 2**20, False, needs, "reference"),
    )


# ---------------------------------------------------------------------------------------------------------- properties

shapes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 40))
seeds = st.integers(0, 2**16)


def draw(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    w = torch.randn((shape[2], shape[1]), generator=generator, dtype=torch.float64)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(shape[2], shape[:1], generator=generator)


@pytest.mark.parametrize("strategy", ["materialize", "chunked"])
class TestProperties:
    @settings(max_examples=20, deadline=None)
    @given(shape=shapes, seed=seeds)
    def test_adding_a_vector_to_every_class_changes_nothing(self, strategy, shape, seed):
        x, w, y = draw(shape, seed)
        a = linear_margin_cross_entropy(x, w, y, strategy=strategy)
        b = linear_margin_cross_entropy(x, w + 3 * w[:1], y, strategy=strategy)
        torch.testing.assert_close(a, b)

    @settings(max_examples=20, deadline=None)
    @given(shape=shapes, seed=seeds)
    def test_gradients_of_the_classes_sum_to_zero(self, strategy, shape, seed):
        x, w, y = draw(shape, seed)
        (grad,) = torch.autograd.grad(linear_margin_cross_entropy(x, w, y, strategy=strategy), w)
        assert grad.sum(0).abs().max() < 1e-12

    @settings(max_examples=20, deadline=None)
    @given(shape=shapes, seed=seeds, factor=st.floats(0.1, 100))
    def test_cosines_ignore_lengths_and_their_gradients_are_tangent(self, strategy, shape, seed, factor):
        x, w, y = draw(shape, seed)
        options = {"normalize": True, "scale": 5.0, "strategy": strategy}
        a = linear_margin_cross_entropy(x, w, y, **options)
        b = linear_margin_cross_entropy(factor * x, w / factor, y, **options)
        torch.testing.assert_close(a, b)
        for g, v in zip(torch.autograd.grad(a, (x, w)), (x, w), strict=True):
            assert (g * v).sum(1).abs().max() < 1e-9

    @settings(max_examples=20, deadline=None)
    @given(shape=shapes, seed=seeds)
    def test_permuting_classes_permutes_the_gradient(self, strategy, shape, seed):
        x, w, y = draw(shape, seed)
        order = torch.randperm(shape[2], generator=torch.Generator().manual_seed(seed))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(shape[2]))
        (grad,) = torch.autograd.grad(linear_margin_cross_entropy(x, w, y, strategy=strategy), w)
        moved = w.detach()[order].requires_grad_()
        (moved_grad,) = torch.autograd.grad(linear_margin_cross_entropy(x, moved, place[y], strategy=strategy), moved)
        torch.testing.assert_close(grad[order], moved_grad)


# --------------------------------------------------------------------------------------------------------------- plans


def test_budget_decides_what_is_kept(monkeypatch):
    plans = {
        budget: lt_kernels.plan_linear(512, 64, 8142, device="cpu", memory_budget=budget)
        for budget in (2**31, 512 * 8144 * 4, 512 * 8144 * 4 - 1, 2**20, 1)
    }
    assert [p.strategy for p in plans.values()] == ["materialize", "materialize", "chunked", "chunked", "chunked"]
    for budget, p in plans.items():
        if p.by == "rows":
            assert p.chunk * 8144 * 4 <= max(budget, 8144 * 4)
            assert p.peak_memory >= p.chunk * 8142 * 4
    monkeypatch.setattr(_settings, "memory_budget", 2**20)
    assert lt_kernels.plan_linear(512, 64, 8142, device="cpu") == plans[2**20]


def test_few_rows_and_many_classes_are_cut_by_classes():
    p = lt_kernels.plan_linear(1024, 256, 4_000_000, torch.bfloat16, "cuda", strategy="chunked", memory_budget=2**28)
    assert p.by == "classes"
    assert 1024 * p.chunk * 2 <= 2**28
    assert p.flops == 8 * 1024 * 256 * 4_000_000
    p = lt_kernels.plan_linear(65_536, 2048, 100_000, torch.bfloat16, "cuda")
    assert (p.strategy, p.by) == ("chunked", "rows")
    assert p.chunk >= 4096
    assert p.chunk % 128 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plans_of_narrow_heads(dtype):
    narrow = lt_kernels.plan_linear(8192, 64, 100_000, dtype, "cuda")
    wide = lt_kernels.plan_linear(8192, 2048, 8142, dtype, "cuda")
    assert narrow.strategy == ("tiled" if dtype == torch.bfloat16 else "chunked")
    assert wide.strategy == "materialize"
    assert lt_kernels.plan_linear(8192, 64, 100_000, dtype, "cpu").strategy != "tiled"


def test_the_plan_is_what_runs(monkeypatch):
    """Chunks of the planned size, and no buffer beyond the budget."""
    seen = []
    original = functional.plans.padded
    monkeypatch.setattr(
        "lt_kernels.ops.linear_margin_cross_entropy.products.buffer",
        lambda rows, columns, dtype, device: (
            seen.append((rows, columns)) or torch.empty(rows, original(columns, dtype), dtype=dtype)[:, :columns]
        ),
    )
    x, w, y = torch.randn(300, 16, requires_grad=True), torch.randn(1000, 16), torch.randint(1000, (300,))
    for budget in (2**31, 2**19, 2**16):
        monkeypatch.setattr(_settings, "memory_budget", budget)
        seen.clear()
        linear_margin_cross_entropy(x, w, y).backward()
        p = lt_kernels.plan_linear(300, 16, 1000, device="cpu")
        rows, columns = (300, p.chunk) if p.by == "classes" else (p.chunk, 1000)
        assert seen[0] == (rows, columns)
        assert rows * columns * 4 <= budget


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4, 5), ValueError, "rows: got 0"),
        ((3, 4.0, 5), TypeError, "width: got float"),
        ((3, 4, True), TypeError, "classes: got bool"),
        ((3, 4, 5, torch.int64), TypeError, "dtype: got torch.int64"),
        ((3, 4, 5, torch.float32, "meta"), ValueError, "device: got 'meta'"),
    ],
    ids=lambda value: str(value),
)
def test_bad_sizes_of_a_plan(arguments, error, message):
    with pytest.raises(error, match=message):
        lt_kernels.plan_linear(*arguments)


@pytest.mark.parametrize("name", ["logit adjustment", "cosine, mixup", "learnable vectors"])
def test_tiled_runs_where_asked_for(name, device):
    """In Triton's interpreter, or on a GPU."""
    reason = lt_kernels.info()["backends"][op.OP][device]["triton"]
    if reason is not None:
        with lt_kernels.use_backend("triton"), pytest.raises(lt_kernels.BackendUnavailableError):
            linear_margin_cross_entropy(X, W, Y, strategy="tiled")
        return
    with lt_kernels.use_backend("triton"):
        check_linear_margin_cross_entropy(
            with_strategy("tiled"), by_id(name).sample(torch.float32, device), upstream=0.7
        )


def test_tiled_asked_for_by_name_says_why_it_cannot_run():
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(lt_kernels.BackendUnavailableError, match="'tiled' cannot run .* needs the backend 'triton'"):
        linear_margin_cross_entropy(x, w, y, strategy="tiled")
    with pytest.raises(ValueError, match="strategy: got 'tiled', expected another one: it takes at most 512 features"):
        lt_kernels.plan_linear(3, 1024, 5, strategy="tiled")


@pytest.mark.parametrize("given", [0, -5, 1.5, True, "2G", 2**63], ids=str)
def test_bad_memory_budget(given):
    before = _settings.memory_budget
    with pytest.raises((TypeError, ValueError), match=r"set_memory_budget\(bytes\): got"):
        lt_kernels.set_memory_budget(given)
    assert _settings.memory_budget == before


# ----------------------------------------------------------------------------------------------------------- bad input

X, W, B, Y = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5), torch.tensor([0, 1, 2, 3])
BAD = {
    "input is a list": (([1.0], W, Y), {}, TypeError, "input: got list"),
    "integer features": ((X.long(), W, Y), {}, TypeError, "input: got dtype torch.int64"),
    "features of three dimensions": ((X[None], W, Y), {}, ValueError, r"input: got shape \(1, 4, 6\)"),
    "weight of one dimension": ((X, W[0], Y), {}, ValueError, r"linear_weight: got shape \(6,\)"),
    "weight of another width": ((X, W[:, :5], Y), {}, ValueError, "linear_weight: got 5 features .* expected 6"),
    "no class": ((X, W[:0], Y), {}, ValueError, "linear_weight: .* at least one class"),
    "positions without a batch": ((X[0], W[:, None], Y), {}, ValueError, r"input: .* expected \[N, D\]"),
    "weight elsewhere": ((X, W.to("meta"), Y), {}, ValueError, "linear_weight: got device meta"),
    "two narrow dtypes": ((X.half(), W.bfloat16(), Y), {}, TypeError, "linear_weight: got dtype torch.bfloat16"),
    "float64 beside float32": ((X.double(), W, Y), {}, TypeError, "linear_weight: got dtype torch.float32"),
    "bias of another shape": ((X, W, Y), {"linear_bias": B[:4]}, ValueError, r"linear_bias: got shape \(4,\)"),
    "integer bias": ((X, W, Y), {"linear_bias": B.long()}, TypeError, "linear_bias: got dtype"),
    "bias of a cosine head": ((X, W, Y), {"linear_bias": B, "normalize": True}, ValueError, "linear_bias: .*normalize"),
    "normalize is a number": ((X, W, Y), {"normalize": 1}, TypeError, "normalize: got int"),
    "unknown strategy": ((X, W, Y), {"strategy": "fast"}, ValueError, "strategy: got 'fast'"),
    "target of another length": ((X, W, Y[:3]), {}, ValueError, r"target: got class indices of shape \(3,\)"),
    "probabilities of another shape": ((X, W, X), {}, ValueError, r"target: got class probabilities .* \(4, 5\)"),
    "ignored probabilities": (
        (X, W, torch.rand(4, 5)), {"ignore_index": -100}, ValueError, "ignore_index: got -100 with class-probability",
    ),
    "ignore_index is a float": ((X, W, Y), {"ignore_index": 1.0}, TypeError, "ignore_index: got float"),
    "class_bias of another length": ((X, W, Y), {"class_bias": B[:4]}, ValueError, r"class_bias: got shape \(4,\)"),
    "weight that learns": ((X, W, Y), {"weight": B.clone().requires_grad_()}, ValueError, "weight: .*requires grad"),
    "unknown reduction": ((X, W, Y), {"reduction": "max"}, ValueError, "reduction: got 'max'"),
    "mixed_target alone": ((X, W, Y), {"mixed_target": Y}, ValueError, "mix_lambda: got None with mixed_target"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(arguments, options, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            linear_margin_cross_entropy(*arguments, **options)


def test_a_backend_asked_for_by_name_is_never_replaced():
    with lt_kernels.use_backend("triton"), pytest.raises(lt_kernels.BackendUnavailableError, match="linear_margin"):
        linear_margin_cross_entropy(X, W, Y)
