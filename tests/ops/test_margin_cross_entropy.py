"""margin_cross_entropy on every backend, dtype and case, against float64."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
import torch.nn.functional as F
from _cases.rows import ALL_VECTORS, BY_ID, CASES, LAYOUTS, Case
from _engines import ENGINE
from _gradients import check_rows_apart, gradcheck
from torch import Tensor

import lt_kernels
from lt_kernels import _checks, _settings
from lt_kernels.functional import margin_cross_entropy
from lt_kernels.testing import assert_within_budget, check_margin_cross_entropy, dense_margin_cross_entropy

CPU_BACKENDS = ("reference", "native")


# ------------------------------------------------------------------------------------------------- value and gradients


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_every_gradient(case, dtype, reduction, backend, device):
    if dtype == torch.float16 and case.spread > 100:
        case = dataclasses.replace(case, spread=1e3)  # 1e4 standard deviations overflow float16
    sample = case.sample(dtype, device, reduction=reduction)
    upstream: float | Tensor = 0.7
    if reduction == "none":
        shape = sample.target.shape if not case.soft else sample.input.select(1, 0).shape
        upstream = torch.linspace(-1, 2, math.prod(shape), device=device).reshape(shape)
    if case.layout == "expanded rows":  # eager sums an expanded leaf's gradient like any other here: it is the leaf
        assert sample.input.stride(0) == 0
    check_margin_cross_entropy(margin_cross_entropy, sample, upstream=upstream)


@pytest.mark.parametrize("mixed", [(), ("mixed_target",)], ids=["", "mixed"])
@pytest.mark.parametrize(("rows", "classes"), [(410, 8142), (100, 33_001)])
def test_gradients_too_large_for_the_caches(rows, classes, mixed, device):
    """More than 12 MiB: the CPU kernels write these past the caches, from rows at every alignment: the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("large", rows * (2 if dtype == torch.bfloat16 else 1), classes, options=("class_bias", *mixed))
        if device == "cpu":
            check_rows_apart(margin_cross_entropy, case.sample(dtype, device))
        else:
            check_margin_cross_entropy(margin_cross_entropy, case.sample(dtype, device), upstream=1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 7, 3), (2, 5, 3, 2)], ids=str)
def test_is_a_superset_of_torch(shape, weighted, soft, smoothing, reduction, backend, device):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    index_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    classes = shape[1] if len(shape) > 1 else shape[0]
    target = (
        torch.randn(shape, device=device).softmax(min(1, x.dim() - 1))
        if soft
        else torch.randint(classes, index_shape, device=device)
    )
    weight = torch.rand(classes, device=device) + 0.1 if weighted else None
    results = []
    for function, kind in (
        (margin_cross_entropy, torch.float32),
        (F.cross_entropy, torch.float32),
        (F.cross_entropy, torch.float64),
    ):
        leaf = x.to(kind).requires_grad_()
        loss = function(
            leaf,
            target.to(kind) if soft else target,
            None if weight is None else weight.to(kind),
            reduction=reduction,
            label_smoothing=smoothing,
        )
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    ours, eager, truth = results
    assert ours[0].shape == truth[0].shape
    assert_within_budget(ours[0], eager[0], truth[0], "loss")
    assert_within_budget(ours[1], eager[1], truth[1], "gradient")


@pytest.mark.parametrize("index_dtype", _checks.INDEX_DTYPES, ids=str)
def test_any_integer_dtype(index_dtype, backend, device):
    sample = BY_ID["logit adjustment"].sample(torch.float32, device)
    expected = margin_cross_entropy(sample.input, sample.target, **sample.options)
    actual = margin_cross_entropy(sample.input, sample.target.to(index_dtype), **sample.options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.classes <= 40 and case.rows * math.prod(case.positions) <= 40 and case.spread < 100
    ],
    ids=lambda case: case.id,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(case, reduction, backend):
    case = dataclasses.replace(case, rows=min(case.rows, 5), classes=min(case.classes, 11))
    if case.id == "nearly right":
        case = Case("gentler", options=("margin",), keywords={"scale": 3.0})

    def call(**arguments) -> tuple[Tensor, ...]:
        return margin_cross_entropy(return_lse=True, **arguments)[:2]

    sample = case.sample(torch.float64, reduction=reduction)
    gradcheck(call, sample, every_element=case.id == "mixup with everything")


# ----------------------------------------------------------------------------------------------------- upstream, modes


@pytest.mark.parametrize("policy", ["one_pass", "recompute", "auto"])
@pytest.mark.parametrize("upstream", [1.0, 0.5, -3.7, 0.0, 65536.0])
@pytest.mark.parametrize("name", ["inat18 width", "mixup with everything", "segmentation"])
def test_every_policy_is_exact_for_every_upstream_gradient(name, upstream, policy, backend, device, monkeypatch):
    monkeypatch.setattr(_settings, "gradient_policy", policy)
    for dtype in (torch.float32, torch.bfloat16):
        check_margin_cross_entropy(margin_cross_entropy, BY_ID[name].sample(dtype, device), upstream=upstream)


def test_one_pass_computes_the_gradient_in_forward(device):
    def kept(policy: str) -> int:
        saved: list[Tensor] = []
        sample = BY_ID["logit adjustment"].sample(torch.float32, device)
        lt_kernels.set_gradient_policy(policy)
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                margin_cross_entropy(sample.input, sample.target, **sample.options)
        finally:
            lt_kernels.set_gradient_policy("auto")
        return sum(t.shape == (5, 33, 1) for t in saved)

    assert (kept("auto"), kept("recompute")) == (2, 1)  # logits, gradient


def test_class_vectors_stay_float32_beside_half_precision_logits(backend, device):
    for name in ("learnable vectors", "mixup with everything", "probabilities with everything", "segmentation"):
        exact = BY_ID[name].sample(torch.float32, device)
        for dtype in (torch.bfloat16, torch.float16):
            sample = exact.converted(torch.float32)
            sample.input = sample.input.detach().to(dtype).requires_grad_()  # weights, vectors, probabilities: float32
            check_margin_cross_entropy(margin_cross_entropy, sample)


@pytest.mark.parametrize("name", ["logit adjustment", "mixup per row", "segmentation", "probabilities"])
def test_targets_of_any_strides(name, backend, device):
    def scattered(t: Tensor) -> Tensor:
        room = torch.stack([t, torch.zeros_like(t)], -1)
        return room[..., 0]

    sample = BY_ID[name].sample(torch.float32, device)
    expected = margin_cross_entropy(sample.input, sample.target, **sample.options)
    options = {k: scattered(v) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in sample.options.items()}
    target = scattered(sample.target)
    assert not target.is_contiguous()
    assert torch.equal(margin_cross_entropy(sample.input, target, **options), expected)


@pytest.mark.parametrize(
    "name", ["mixup with everything", "inat18 width", "segmentation", "transposed", "probabilities"]
)
def test_every_output_at_once(name, backend, device):
    """The prediction changes neither the loss nor its gradient, and the log-sum-exp is the loss's own."""
    sample = BY_ID[name].sample(torch.float32, device)

    def with_prediction(*arguments, **options) -> Tensor:
        output = margin_cross_entropy(*arguments, return_prediction=True, **options)
        assert torch.equal(output.prediction, sample.input.argmax(1))
        return output.loss

    check_margin_cross_entropy(with_prediction, sample)
    output = margin_cross_entropy(
        sample.input, sample.target, return_lse=True, return_prediction=True, **sample.options
    )
    shape = sample.input.select(1, 0).shape
    assert output.lse.shape == output.prediction.shape == shape
    if name == "mixup with everything":
        return
    bias = sample.options["class_bias"].reshape(-1, *[1] * (sample.input.dim() - 2))
    torch.testing.assert_close(output.lse, torch.logsumexp(sample.input + bias, 1))


# --------------------------------------------------------------------------------------------- outputs beside the loss


def test_lse_is_that_of_the_shifted_logits(dtype, backend, device):
    sample = BY_ID["learnable vectors"].sample(dtype, device)
    output = margin_cross_entropy(sample.input, sample.target, return_lse=True, **sample.options)
    assert output.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.lse.shape == sample.target.shape
    options = {k: v.detach().double() for k, v in sample.options.items()}
    x = sample.input.detach().double()
    cosine = x * options["class_scale"]
    is_target = F.one_hot(sample.target.clamp(min=0), 33).bool() & (sample.target >= 0)[:, None]
    moved = torch.where(is_target, cosine - options["margin"], cosine)
    truth = torch.logsumexp(options["scale"] * moved + options["class_bias"], 1)
    torch.testing.assert_close(output.lse.double(), truth, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)


def test_lse_is_differentiable(backend, device):
    sample = BY_ID["ignored rows"].sample(torch.float32, device)
    bias = sample.options["class_bias"]

    def z_loss(x: Tensor, function) -> Tensor:
        loss, lse = function(x)
        return loss + (lse.square() * torch.linspace(0, 1, 9, device=device)).sum()

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        output = margin_cross_entropy(x, sample.target, class_bias=bias.to(x.dtype), return_lse=True)
        return output.loss, output.lse

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        u = x + bias.to(x.dtype)
        return F.cross_entropy(u, sample.target), torch.logsumexp(u, 1)

    results = []
    for function, kind in ((ours, torch.float32), (eager, torch.float32), (eager, torch.float64)):
        leaf = sample.input.detach().to(kind).requires_grad_()
        results.append(torch.autograd.grad(z_loss(leaf, function), leaf)[0])
    assert_within_budget(*results, "gradient")


@pytest.mark.parametrize("layout", ["rows", "columns", "pixels"])
@pytest.mark.parametrize("classes", [1, 5, 1000, 40_001])
def test_prediction_is_the_argmax_of_the_raw_logits(classes, layout, dtype, backend, device):
    torch.manual_seed(1)
    x = torch.randn(6, classes, device=device).mul(4).round().to(dtype)  # many ties: the first one counts
    if classes > 3:
        x[1] = -math.inf
        x[2, classes // 2] = math.nan
        x[3, -1] = math.inf
    bias = torch.linspace(-50, 50, classes, device=device)
    target = torch.zeros(6, dtype=torch.int64, device=device)
    expected = x.argmax(1) if device == "cpu" else x.cpu().argmax(1).to(device)
    if layout == "columns":
        x = x.t().contiguous().t()
    if layout == "pixels":
        x, target, expected = x.t()[None].contiguous(), target[None], expected[None]
    output = margin_cross_entropy(x, target, class_bias=bias, return_prediction=True)
    assert output.prediction.dtype == torch.int64
    assert torch.equal(output.prediction, expected)
    assert output.lse is None


# ---------------------------------------------------------------------------------------------------- sums over rows


@pytest.mark.parametrize("layout", ["rows", "columns", "pixels"])
@pytest.mark.parametrize("learns", ["scale", "scale and class_scale"])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
def test_the_scale_beside_an_angle_that_is_zero(mixed, learns, layout, dtype, backend, device):
    """The angle's slope is cut off at 3000 there: a part of the cosine's gradient alone."""
    x = torch.tensor([[1.0, 0.9, 0.2]], dtype=dtype, device=device).expand(5, 3).contiguous()
    y = torch.zeros(5, dtype=torch.int64, device=device)
    moved = x[0].to(torch.float64, copy=True)
    moved[0] = math.cos(0.5)
    truth = ((7.5 * moved).softmax(0) * moved).sum() - moved[0]
    if layout != "rows":
        x = x.t().contiguous().t() if layout == "columns" else x.t()[None].contiguous()
        y = y if layout == "columns" else y[None]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(7.5, dtype=kind, device=device, requires_grad=True)
    class_scale = torch.ones(3, dtype=kind, device=device, requires_grad=True)
    options = {"class_scale": class_scale} if "class" in learns else {}
    options |= {"mixed_target": y, "mix_lambda": 0.25} if mixed else {}
    loss = margin_cross_entropy(x, y, scale=scale, margin=0.5, margin_type="angular", **options)
    leaves = [scale, *([class_scale] if "class" in learns else [])]
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves)[0].double(), truth, rtol=1e-12 if dtype == torch.float64 else 3e-5, atol=0
    )


@pytest.mark.backends("reference", "native")
@pytest.mark.parametrize("positions", [(), (2,)], ids=["rows", "pixels"])
def test_class_gradients_of_very_many_rows(positions, backend, device):
    rows = 2**14 if ENGINE.name == "emulator" else 2**19
    sample = Case("", rows, 3, positions, options=ALL_VECTORS, requires_grad=ALL_VECTORS).sample(torch.float32, device)
    truth = sample.converted(torch.float64)
    grads = []
    for each in (sample, truth):
        loss = margin_cross_entropy(each.input, each.target, reduction="sum", **each.options)
        grads.append(torch.autograd.grad(loss, list(each.differentiable.values())))
    for name, ours, exact in zip(ALL_VECTORS, *grads, strict=True):
        # of the sum of magnitudes, which is at most that of the rows: what cancels is the formula's own
        assert float((ours.double() - exact).abs().max()) < 1e-6 * rows, name


def test_a_scalar_in_half_precision_has_a_gradient_that_is_rounded_once(backend, device):
    x = torch.zeros(5, 5, device=device).fill_diagonal_(-200.0)  # d/d(v) is -1 in every row
    margin = torch.tensor(0.5, dtype=torch.bfloat16, device=device, requires_grad=True)
    loss = 1.0038 * margin_cross_entropy(x, torch.arange(5, device=device), reduction="sum", margin=margin)
    (gradient,) = torch.autograd.grad(loss, margin)
    assert float(gradient) == 5.03125  # 5.019; each class by itself would be 1


# ------------------------------------------------------------------------------------------------------ extreme inputs


@pytest.mark.parametrize("masked", [slice(4, 9), slice(1, 28)], ids=["some", "most"])
@pytest.mark.parametrize("name", ["plain", "logit adjustment", "smoothing", "transposed", "odd"])
def test_masked_classes(name, masked, backend, device):
    sample = BY_ID[name].sample(torch.float32, device)
    if name == "odd":
        masked = slice(0, 100)  # all of the first columns
    with torch.no_grad():
        sample.input[:, masked] = -math.inf
        outside = sample.input.shape[1] - 1 if masked.start == 0 else 0
        sample.target[(sample.target >= masked.start) & (sample.target < masked.stop)] = outside
    check_margin_cross_entropy(margin_cross_entropy, sample)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_a_target_that_is_the_only_finite_logit(value, layout, backend, device):
    """There is no other column whose maximum could be the reference, and exp(100) overflows."""
    x = torch.full((3, 6), -math.inf, device=device)
    x[:2, 2], x[2] = value, 0.0
    bias = torch.zeros(6, device=device, requires_grad=True)
    results = []
    for function, kind in ((margin_cross_entropy, torch.float32), (F.cross_entropy, torch.float64)):
        leaf = LAYOUTS[layout](x.to(kind)).requires_grad_()
        target = torch.tensor([2, 2, 1], device=device)
        options = {"class_bias": bias} if function is margin_cross_entropy else {}
        loss = function(leaf, target, **options)
        results.append((loss, *torch.autograd.grad(loss, [leaf, *options.values()])))
    ours, truth = results
    torch.testing.assert_close(ours[0].double(), truth[0])
    torch.testing.assert_close(ours[1].double(), truth[1])
    torch.testing.assert_close(ours[2].double(), truth[1].sum(0))


def test_any_nan_is_a_nan(backend, device):
    x = torch.randn(2, 40, device=device)
    x.view(torch.int32)[0, 17] = 0x7FC00001  # not the NaN that arithmetic makes
    x.requires_grad_()
    loss = margin_cross_entropy(x, torch.tensor([1, 2], device=device), reduction="none")
    assert loss.isnan().tolist() == [True, False]
    assert torch.autograd.grad(loss.sum(), x)[0].isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("name", ["probabilities", "smoothing"])
def test_sums_over_many_classes_in_columns(name, backend, device):
    case = dataclasses.replace(BY_ID[name], rows=64, classes=8142, ignored=0.0, layout="transposed")
    check_margin_cross_entropy(margin_cross_entropy, case.sample(torch.float32, device, reduction="none"))


def test_a_large_gradient_is_an_ordinary_tensor(backend, device):
    x = torch.randn(400, 1000, device=device, requires_grad=True)
    margin_cross_entropy(x, torch.arange(400, device=device)).backward()
    copied = x.grad.clone()
    pickled = torch.load(io.BytesIO(_saved(x.grad)))
    assert torch.equal(pickled, copied)
    x.grad.untyped_storage().resize_(0)
    assert x.grad.untyped_storage().nbytes() == 0


def _saved(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def test_compiled_autograd_over_a_retained_graph(device):
    torch._dynamo.reset()
    sample = BY_ID["logit adjustment"].sample(torch.float32, device)
    x = sample.input
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss = margin_cross_entropy(x, sample.target, **sample.options)
        (3 * loss).backward(retain_graph=True)
        first, x.grad = x.grad.clone(), None
        (3 * loss).backward()
    torch.testing.assert_close(x.grad, first)
    (expected,) = torch.autograd.grad(3 * margin_cross_entropy(x, sample.target, **sample.options), x)
    torch.testing.assert_close(first, expected)


def test_checks_do_not_break_compiled_code(device):
    torch._dynamo.reset()
    sample = BY_ID["plain"].sample(torch.float32, device)
    lt_kernels.set_checks(True)
    try:
        compiled = torch.compile(margin_cross_entropy, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(sample.input, sample.target), margin_cross_entropy(sample.input, sample.target)
        )
    finally:
        lt_kernels.set_checks(False)


@pytest.mark.parametrize("positions", [(), (3,)], ids=["rows", "pixels"])
def test_nothing_to_average(positions, backend, device):
    x = torch.randn(4, 5, *positions, device=device, requires_grad=True)
    target = torch.full((4, *positions), -100, device=device)
    loss = margin_cross_entropy(x, target)
    assert torch.isnan(loss)
    assert torch.isnan(F.cross_entropy(x, target))
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))
    assert margin_cross_entropy(x, target, reduction="sum") == 0
    assert torch.equal(margin_cross_entropy(x, target, reduction="none"), torch.zeros(4, *positions, device=device))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_no_rows(shape, soft, reduction, backend, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    target = (
        torch.rand(shape, device=device)
        if soft
        else torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    )
    loss = margin_cross_entropy(x, target, class_bias=torch.zeros(5, device=device), reduction=reduction)
    torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    loss.sum().backward()
    assert x.grad.shape == x.shape


def test_a_zero_weight_mean_is_nan_as_in_torch(backend, device):
    x = torch.randn(3, 5, device=device)
    y = torch.tensor([1, 1, 1], device=device)
    weight = torch.ones(5, device=device)
    weight[1] = 0
    assert torch.isnan(F.cross_entropy(x, y, weight))
    assert torch.isnan(margin_cross_entropy(x, y, weight))
    assert margin_cross_entropy(x, y, weight, reduction="sum") == 0


def test_a_nan_row_stays_alone(backend, device):
    x = torch.randn(5, 8142, device=device)
    x[2] = math.nan
    x[3, 17] = math.inf
    x.requires_grad_()
    loss = margin_cross_entropy(x, torch.arange(5, device=device), reduction="none")
    loss.sum().backward()
    bad = torch.tensor([False, False, True, True, False], device=device)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(x.grad.isnan().any(1), bad)


def test_offsets_beyond_32_bits(backend, device):
    """Rows more than 2^31 elements apart; only their own pages are touched."""
    storage = torch.empty(2**31 + 9000, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((2, 8142), (2**31 + 11, 1), 3)
    torch.manual_seed(0)
    x.copy_(torch.randn(2, 8142, device=device))
    target = torch.tensor([5, 8141], device=device)
    for reduction in ("none", "mean"):
        far, near = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
        losses = [margin_cross_entropy(t, target, reduction=reduction) for t in (far, near)]
        assert torch.equal(*losses)
        grads = [torch.autograd.grad(loss.sum(), t)[0] for loss, t in zip(losses, (far, near), strict=True)]
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    "case",
    [
        Case("rows", rows=70, classes=1203, options=("class_bias",)),
        Case(
            "rows, vectors learn", rows=70, classes=1203, options=("class_bias",), requires_grad=("input", "class_bias")
        ),
        Case("split columns", rows=3, classes=50_021, options=("class_bias",), keywords={"label_smoothing": 0.1}),
        Case("beyond the cache", rows=9, classes=70_001, options=("class_bias",)),
        Case(
            "pixels",
            rows=3,
            classes=50,
            positions=(37, 11),
            options=("class_bias",),
            requires_grad=("input", "class_bias"),
        ),
    ],
    ids=lambda case: case.id,
)
def test_same_bits_for_any_number_of_threads(case):
    threads = torch.get_num_threads()
    runs = []
    with lt_kernels.use_backend("native"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                sample = case.sample(torch.float64 if "fp64" in case.id else torch.float32)
                output = margin_cross_entropy(sample.input, sample.target, return_prediction=True, **sample.options)
                runs.append([*output[::2], *torch.autograd.grad(output.loss, list(sample.differentiable.values()))])
        finally:
            torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


# ---------------------------------------------------------------------------------------------------------- properties


def draw(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    y = torch.randint(shape[1], shape[:1], generator=generator)
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y, bias


# -------------------------------------------------------------------------------------------------------- registration


def test_compile_follows_the_backend_setting():
    torch._dynamo.reset()
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    seen = []

    def spy(graph, inputs):
        seen.extend(str(node.args[-1]) for node in graph.graph.nodes if "margin_cross_entropy" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda x, y: margin_cross_entropy(x, y), fullgraph=True, backend=spy)
    for name in CPU_BACKENDS:
        with lt_kernels.use_backend(name):
            compiled(x, y)
    assert seen == list(CPU_BACKENDS)


def test_autocast_reads_the_logits_as_they_are(backend, device):
    x = torch.randn(4, 16, device=device, requires_grad=True)
    w = torch.randn(33, 16, device=device, requires_grad=True)
    y = torch.tensor([0, 5, 32, 7], device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        logits = F.linear(x, w)
        assert logits.dtype == torch.bfloat16
        loss = margin_cross_entropy(logits, y)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == torch.float32
    assert torch.equal(loss, margin_cross_entropy(logits, y))


def test_dense_oracle_is_cross_entropy():
    """The oracle of lt_kernels.testing itself, against torch on what torch has."""
    x, y, bias = draw((5, 7), 0)
    torch.testing.assert_close(dense_margin_cross_entropy(x, y, class_bias=bias), F.cross_entropy(x + bias, y))
    cos = x.detach().tanh()
    theta = cos.gather(1, y[:, None])[:, 0].arccos()
    logits = (8 * cos).scatter(1, y[:, None], 8 * torch.cos(theta + 0.1)[:, None])
    keep = theta + 0.1 < math.pi
    ours = dense_margin_cross_entropy(cos, y, margin=0.1, scale=8.0, margin_type="angular", reduction="none")
    torch.testing.assert_close(ours[keep], F.cross_entropy(logits, y, reduction="none")[keep])
