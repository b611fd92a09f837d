"""linear_margin_cross_entropy: every strategy, backend, dtype and case, against float64."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases.linear import BY_ID, CASES, OWN, Case
from _engines import of_backends
from _gradients import gradcheck
from _strategies import LINEAR_MODES, linear_mode, tiled_linear_reason
from torch import Tensor

import lt_kernels
from lt_kernels import _settings
from lt_kernels.functional import linear_margin_cross_entropy, margin_cross_entropy
from lt_kernels.ops.linear_margin_cross_entropy import op, plan
from lt_kernels.testing import (
    Sample,
    assert_within_budget,
    check_linear_margin_cross_entropy,
    dense_linear_margin_cross_entropy,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=LINEAR_MODES)
def mode(request):
    """A strategy, with small chunks."""
    with linear_mode(request.param) as strategy:
        yield strategy


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
    kinds += [(BY_ID[name], "fp16", "mean") for name in few] + [(BY_ID[name], "fp32", "none") for name in few]
    return [pytest.param(case, DTYPES[kind], how, id=f"{case.id}-{kind}-{how}") for case, kind, how in kinds]


@pytest.mark.parametrize("mode", [*LINEAR_MODES, *of_backends(triton=("tiled",))], indirect=True)
@pytest.mark.parametrize(("case", "dtype", "reduction"), _kinds())
def test_value_and_every_gradient(case, dtype, reduction, mode, backend, device):
    if mode == "tiled" and (reason := tiled_linear_reason(case.width, case.positions, case.soft)):
        pytest.skip(reason)
    sample = case.sample(dtype, device, reduction=reduction)
    check_linear_margin_cross_entropy(
        with_strategy(mode), sample, upstream=upstream_of(sample, reduction, device), factor=2.0
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sum_on_auto(case, backend, device):
    check_linear_margin_cross_entropy(linear_margin_cross_entropy, case.sample(torch.float32, device, reduction="sum"))


@pytest.mark.parametrize("case", [c for c in CASES if c.classes <= 40 and c.spread < 100], ids=lambda case: case.id)
def test_gradcheck(case, mode, backend):
    def call(**arguments) -> tuple[Tensor, ...]:
        return linear_margin_cross_entropy(return_lse=True, strategy=mode, **arguments)[:2]

    case = dataclasses.replace(case, rows=min(case.rows, 4), width=2, classes=min(case.classes, 7))
    gradcheck(call, case.sample(torch.float64), every_element=case.id == "mixup with everything")


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
    sample = BY_ID["logit adjustment"].sample(torch.float32, device)
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
        sample = BY_ID[name].sample(dtype, device)
        check_linear_margin_cross_entropy(with_strategy(mode), sample, upstream=upstream)


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
    sample = BY_ID[name].sample(torch.float32, device)
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

    sample = BY_ID[name].sample(torch.float32, device)
    check_linear_margin_cross_entropy(z_loss(ours), sample, dense=z_loss(dense))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["logit adjustment", "class weights", "cosine"])
def test_all_rows_ignored(name, reduction, mode, backend, device):
    sample = dataclasses.replace(BY_ID[name], ignored=1.1).sample(torch.float32, device, reduction=reduction)
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
    assert all((g == 0).all() for g in grads)
    assert all(g.shape == t.shape for g, t in zip(grads, (x, w, b), strict=True))


@pytest.mark.parametrize("name", ["logit adjustment", "mixup"])
def test_masked_classes(name, mode, backend, device):
    sample = BY_ID[name].sample(torch.float32, device)
    with torch.no_grad():
        sample.options["class_bias"][4:30] = -math.inf
        for t in (sample.target, sample.options.get("mixed_target", sample.target)):
            t[(t >= 4) & (t < 30)] = 1
    check_linear_margin_cross_entropy(with_strategy(mode), sample)


def test_smoothing_with_a_masked_target_is_infinite(mode, backend, device):
    x, w = torch.randn(3, 4, device=device), torch.randn(40, 4, device=device)
    bias = torch.zeros(40, device=device).index_fill_(0, torch.tensor([20], device=device), -math.inf)
    y = torch.tensor([0, 20, 39], device=device)
    loss = linear_margin_cross_entropy(x, w, y, class_bias=bias, label_smoothing=0.1, strategy=mode, reduction="none")
    assert loss.isinf().tolist() == [False, True, False]


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
    sample = BY_ID[name].sample(torch.float32, device)
    (sample.options["mixed_target"] if name == "mixup" else sample.target)[17] = bad
    arguments, options = own(sample)
    argument = "mixed_target" if name == "mixup" else "target"
    with pytest.raises(IndexError, match=f"^{argument}: row 17 has class {bad}, expected 0 <= class < 37"):
        linear_margin_cross_entropy(*arguments, strategy=mode, **options)


@pytest.mark.parametrize("where", ["weight", "features"])
def test_vectors_of_zero_length(where, mode, backend, device):
    sample = BY_ID["cosine"].sample(torch.float32, device)
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
    sample = BY_ID["odd"].sample(torch.float32, device)
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
    sample = dataclasses.replace(BY_ID[name], rows=64).sample(torch.float32, device)
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
    sample = BY_ID["logit adjustment"].sample(torch.float64, device)
    arguments, options = own(sample)
    with lt_kernels.use_backend("reference"), torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        loss = linear_margin_cross_entropy(*arguments, strategy=mode, **options)
    assert loss.dtype == torch.float64
    with lt_kernels.use_backend("reference"):
        assert torch.equal(loss, linear_margin_cross_entropy(*arguments, strategy=mode, **options))


# --------------------------------------------------------------------------------------------------------------- plans


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
            with_strategy("tiled"), BY_ID[name].sample(torch.float32, device), upstream=0.7
        )


def test_tiled_asked_for_by_name_says_why_it_cannot_run():
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(lt_kernels.BackendUnavailableError, match="'tiled' cannot run .* needs the backend 'triton'"):
        linear_margin_cross_entropy(x, w, y, strategy="tiled")
    with pytest.raises(ValueError, match="strategy: got 'tiled', expected another one: it takes at most 512 features"):
        lt_kernels.plan_linear(3, 1024, 5, strategy="tiled")


# ----------------------------------------------------------------------------------------------------------- bad input

X, W, B, Y = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5), torch.tensor([0, 1, 2, 3])
BAD = {
    "input is a list": (([1.0], W, Y), {}, TypeError, "input: got list"),
    "integer features": ((X.long(), W, Y), {}, TypeError, "input: got dtype torch.int64"),
    "features of three dimensions": ((X[None], W, Y), {}, ValueError, r"target: .* \(4,\), expected \(1, 4\)"),
    "no features": ((X[0, 0], W, Y), {}, ValueError, r"input: got a 0-dim tensor, expected features \[..., D\]"),
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


def test_class_gradients_of_very_many_chunks(backend, device, monkeypatch):
    """Thousands of chunks' sums lose no digits."""
    rows = 2**16
    monkeypatch.setattr(op, "chunk_plan", lambda sizes, budget: plan._by_rows(sizes, 16 if device == "cpu" else 64))
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 2, generator=generator).to(device) for n in (rows, 3))
    vectors = [torch.randn(3, generator=generator).to(device) for _ in range(3)]
    y = torch.randint(0, 3, (rows,), generator=generator).to(device)
    grads = []
    for kind, strategy in ((torch.float32, "chunked"), (torch.float64, "materialize")):
        bias, class_bias, margin = leaves = [v.to(kind).requires_grad_() for v in vectors]
        loss = linear_margin_cross_entropy(
            x.to(kind), w.to(kind), y, linear_bias=bias, class_bias=class_bias, margin=margin, strategy=strategy
        )
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, truth in zip(*grads, strict=True):  # of a mean over rows, whose terms are at most 1
        assert float((ours.double() - truth).abs().max()) < 4e-8
