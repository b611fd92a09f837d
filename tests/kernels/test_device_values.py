"""Values and gradients at real sizes, against float64: what tests/ops checks with small shapes, and training loops."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import _cases.rows as row_cases
import pytest
import torch
import torch.nn.functional as F
from _cases.experts import LAYOUTS
from _device import DTYPES, HALF_AND_SINGLE, POLICIES, REDUCTIONS, assert_same_bits, parametrized
from _strategies import gradient_policy
from _works import (
    BIAS,
    EXPERTS,
    HEADS,
    LEARNED,
    MIXED,
    PAIRS,
    WAYS,
    Work,
    contrastive,
    each,
    linear,
    recipes,
    rows,
)
from torch import Tensor

import lt_kernels
from lt_kernels.functional import (
    expert_cross_entropy,
    expert_divergence,
    expert_fusion,
    linear_margin_cross_entropy,
    linear_topk,
    margin_cross_entropy,
    partitioned_logsumexp,
)
from lt_kernels.testing import (
    ContrastiveSample,
    assert_within_budget,
    check_expert_cross_entropy,
    check_linear_margin_cross_entropy,
    check_margin_cross_entropy,
    check_partitioned_logsumexp,
    dense_expert_cross_entropy,
    dense_expert_divergence,
    dense_partitioned_logsumexp,
)

pytestmark = pytest.mark.usefixtures("backend")


def upstream_of(work: Work, device: str) -> float | Tensor:
    per_row = work.keywords.get("reduction") == "none"
    return torch.linspace(-1, 2, work.case.rows, device=device) if per_row else 0.7


# ---------------------------------------------------------------------------------------------------------------- rows

VERY_MANY = {
    f"{classes} {name}": row_cases.Case("many", 3, classes, **options)
    for classes in (65_536, 100_003, 1_000_000)
    for name, options in {
        "bias": BIAS,
        "learned": {**BIAS, "requires_grad": ("input", "class_bias")},
        "mixed": {"options": ("weight", "class_bias", "mixed_target")},
        "smoothed": {"options": ("weight", "class_bias"), "keywords": {"label_smoothing": 0.1}},
    }.items()
}
LARGE_WAYS = {name: WAYS[name] for name in ("inat18 width", "mixup with everything", "segmentation with everything")}


@pytest.mark.gpu
@each(rows(VERY_MANY, DTYPES, ["mean"]))
def test_very_many_classes(work, device):
    check_margin_cross_entropy(margin_cross_entropy, work.sample(device), upstream=0.7)


@pytest.mark.gpu
@pytest.mark.parametrize("upstream", [1.0, 0.5, -3.7, 0.0, 65536.0])
@each(rows(LARGE_WAYS, HALF_AND_SINGLE, ["mean"], POLICIES))
def test_every_upstream_gradient(work, upstream, device):
    with work.around():
        check_margin_cross_entropy(margin_cross_entropy, work.sample(device), upstream=upstream)


@pytest.mark.gpu
@each(rows(WAYS, DTYPES, ["mean"]))
def test_every_output(work, device):
    sample = work.sample(device)
    output = margin_cross_entropy(
        sample.input, sample.target, return_prediction=True, return_lse=True, **sample.options
    )
    assert torch.equal(output.prediction.cpu(), sample.input.cpu().argmax(1)), "the prediction is not the argmax"
    assert output.lse.shape == output.prediction.shape
    assert bool(output.lse.isfinite().all())
    torch.testing.assert_close(output.loss, *work.values(sample))


@parametrized(policy=POLICIES)
def test_autocast_of_rows(policy, device):
    torch.manual_seed(0)
    x = torch.randn(4, 16, device=device, requires_grad=True)
    w = torch.randn(33, 16, device=device, requires_grad=True)
    y = torch.tensor([0, 5, 32, 7], device=device)
    with gradient_policy(policy), torch.autocast(device, dtype=torch.bfloat16):
        logits = F.linear(x, w)
        loss = margin_cross_entropy(logits, y)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert {leaf.grad.dtype for leaf in (x, w)} == {torch.float32}
    assert torch.equal(loss, margin_cross_entropy(logits, y)), "autocast changed the loss"


@parametrized(anywhere=True, policy=POLICIES)
def test_grad_scaler(policy, device):
    """A float16 step with loss scaling is as close to float64 as the eager one, and no step is dropped."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 64, device=device), torch.randint(8142, (32,), device=device)
    weight = torch.randn(8142, 64, device=device) / 8
    exact = weight.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(F.linear(x.double(), exact), y), exact)
    grads = []
    for loss_function in (margin_cross_entropy, F.cross_entropy):
        parameter = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
        with gradient_policy(policy), torch.autocast(device, dtype=torch.float16):
            logits = F.linear(x, parameter)
            assert logits.dtype == torch.float16
            loss = loss_function(logits, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**12, "an overflow was found"
        grads.append(parameter.grad)
    assert_within_budget(*grads, truth, "gradient of the weight")


# -------------------------------------------------------------------------------------------------- linear heads, pairs


@pytest.mark.gpu
@each(linear(HEADS, DTYPES, reductions=REDUCTIONS))
def test_real_widths(work, device):
    with work.around():
        call = partial(linear_margin_cross_entropy, strategy=work.operator.strategy)
        check_linear_margin_cross_entropy(call, work.sample(device), upstream=upstream_of(work, device))


@pytest.mark.gpu
@each(contrastive(PAIRS, DTYPES))
def test_real_sizes(work, device):
    with work.around():
        call = partial(partitioned_logsumexp, strategy=work.operator.strategy)
        check_partitioned_logsumexp(call, work.sample(device))


@pytest.mark.gpu
@each(
    linear({"mixed": replace(HEADS["mixed"], width=256), "cosine": HEADS["cosine"]}, ["fp32"]),
    contrastive({"memory": PAIRS["memory"]}, ["fp32"]),
)
def test_autocast(work, device):
    """float32 features and weights, products in bfloat16: as F.linear under autocast."""
    sample = work.sample(device)
    with work.around(), torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        values = work.step(sample, 1.0)
    assert {value.dtype for value in values} == {torch.float32}
    low, truth = (work.plain.step(sample.converted(dtype), 1.0) for dtype in (torch.bfloat16, torch.float32))
    for position, (a, b, t) in enumerate(zip(values, low, truth, strict=True)):
        assert_within_budget(a, b, t.double(), f"result {position}")


@parametrized(dtype=HALF_AND_SINGLE, normalize={"": False, "cosine": True})
def test_top_classes(dtype, normalize, device):
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(200, 64, device=device, generator=generator).to(dtype)
    w = torch.randn(20_011, 64, device=device, generator=generator).to(dtype)
    shift = torch.randn(20_011, device=device, generator=generator)
    scale = 4.0 if normalize else 0.3
    found = linear_topk(x, w, 5, class_shift=shift, scale=scale, normalize=normalize)
    z = x.double() @ w.double().t()
    if normalize:
        z = z / x.double().norm(dim=1, keepdim=True) / w.double().norm(dim=1)
    u = scale * z + shift.double()
    tolerance = 2e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.lse.double(), u.logsumexp(1), rtol=0, atol=tolerance)
    best = u.topk(5, dim=1).values
    torch.testing.assert_close(u.gather(1, found.classes), best, rtol=0, atol=2 * tolerance)


@pytest.mark.gpu
@each(contrastive({name: PAIRS[name] for name in ("supcon", "with itself")}, HALF_AND_SINGLE))
def test_queries_as_keys(work, device):
    """One tensor as queries and keys is as good as two of the same values, whose gradients add up."""
    one = work.sample(device)
    two, double = one.apart(), one.converted(torch.float64)

    def gradient(sample: ContrastiveSample, sums: Any) -> Tensor:
        leaves = [sample.query] if sample.key is sample.query else [sample.query, sample.key]
        total = (0.7 * sums[0] - 1.3 * sums[1] + 0.4 * sums[2]).sum()
        return torch.stack(torch.autograd.grad(total, leaves)).sum(0)

    truth = gradient(double, dense_partitioned_logsumexp(*double.arguments, **double.options))
    with work.around():
        assert_within_budget(*(gradient(each, work.values(each)) for each in (one, two)), truth, "gradient")


@pytest.mark.gpu
@each(recipes(("SupConLoss", "GMLLoss", "PaCoLoss"), HALF_AND_SINGLE))
def test_recipes(work, device):
    """Value and gradients as close to the reference in float64 as that in the same dtype is."""
    batch = work.sample(device)
    actual = work.step(batch)
    with lt_kernels.use_backend("reference"):
        eager, truth = (work.step(each) for each in (batch, batch.converted(torch.float64)))
    for position, values in enumerate(zip(actual, eager, truth, strict=True)):
        assert_within_budget(*values, f"result {position}")


@pytest.mark.gpu
@each(recipes(("SupConLoss", "BalancedContrastiveLoss", "PaCoLoss"), ["fp32"]))
def test_recipes_compile(work, device):
    batch = work.sample(device)
    torch._dynamo.reset()
    expected = work.step(batch)
    compiled = torch.compile(batch.loss, fullgraph=True, dynamic=False)
    for a, b in zip(work.step(replace(batch, loss=compiled)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- experts


@parametrized(case=EXPERTS, dtype=DTYPES, reduction=REDUCTIONS, changes={"": {}, "mixed": MIXED, "learned": LEARNED})
def test_experts(case, dtype, reduction, changes, device):
    sample = replace(case, **changes).sample(dtype, device, reduction=reduction)
    upstream = torch.linspace(-1, 2, case.rows, device=device) if reduction == "none" else 0.7
    check_expert_cross_entropy(expert_cross_entropy, sample, upstream=upstream)


@parametrized(case=EXPERTS, dtype=HALF_AND_SINGLE, policy=POLICIES, reduction=REDUCTIONS)
def test_lists(case, dtype, policy, reduction, device):
    """Tensors one by one, each where it likes to be, give the bits of one tensor."""
    sample = replace(case, **MIXED).sample(dtype, device, reduction=reduction)

    def run(logits: Any, leaves: list[Tensor], **options: Any) -> list[Tensor]:
        result = expert_cross_entropy(logits, sample.target, **sample.options, **options)
        results = result if isinstance(result, tuple) else (result,)
        grads = torch.autograd.grad(0.5 * results[0].sum(), leaves)
        return [*(value.detach() for value in results), grads[0] if len(leaves) == 1 else torch.stack(grads)]

    x = sample.input
    apart = [each.detach().clone().requires_grad_() for each in x]
    with gradient_policy(policy):
        expected = run(x, [x], return_ensemble=True)
        assert_same_bits(run(list(x.unbind(0)), [x], return_ensemble=True), expected, "a list")
        # without the ensemble: another kernel, whose last bits may differ
        assert_same_bits(run(apart, apart), run(x, [x]), "separate tensors")


@parametrized(case=EXPERTS, dtype=DTYPES, mixed={"": (), "mixed": ("mixed_target",)})
def test_ensemble(case, dtype, mixed, device):
    case = replace(case, options=("log_prior", *mixed))
    sample = case.sample(dtype, device, reduction="none", scale=1.25)
    output = expert_cross_entropy(sample.input, sample.target, return_ensemble=True, **sample.options)
    names = ("mixed_target", "mix_lambda", "reduction", "scale")
    options = {name: sample.options[name] for name in names if name in sample.options}
    x = sample.input.detach()
    plain = [dense_expert_cross_entropy(z.mean(0, keepdim=True), sample.target, **options) for z in (x, x.double())]
    assert_within_budget(output.ensemble_loss, *plain, "loss of the ensemble")
    means = x.double().mean(0)
    likely = means.gather(1, output.ensemble_prediction[:, None])[:, 0].float()
    assert_within_budget(likely, means.amax(1), means.amax(1), "predictions' logits")


@parametrized(
    case={name: EXPERTS[name] for name in ("8142", "few classes")}, layout=LAYOUTS, dtype=DTYPES, k={"1": 1, "5": 5}
)
def test_fusion(case, layout, dtype, k, device):
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
def test_fusion_ties(device):
    """The lowest class of equal logits comes first, -inf is never among the likely ones, a NaN row stays alone."""
    x = torch.zeros(2, 4, 8142, device=device)
    x[:, 1, 5000] = x[:, 1, 77] = 3.0
    x[:, 2] = -math.inf
    x[:, 2, 8141] = x[:, 2, 4000] = -50.0
    x[1, 3, 6] = math.nan
    found = expert_fusion(x, topk=2)
    assert found.topk_indices[:3].tolist() == [[0, 1], [77, 5000], [4000, 8141]]
    assert int(found.prediction[3]) == 6
    assert found.topk_values.isnan().any(1).tolist() == [False, False, False, True]


@parametrized(
    case=EXPERTS,
    kind={"to_mean": "to_mean", "pairwise": "pairwise"},
    detach={"detached": True, "": False},
    dtype=DTYPES,
)
def test_divergence(case, kind, detach, dtype, device):
    sample = case.sample(dtype, device)
    temperature = 1.5 - sample.options["log_prior"].exp()
    upstream = torch.linspace(-1, 2, case.experts, device=device)
    x = sample.input
    results = []
    for function, z in (
        (expert_divergence, x),
        (dense_expert_divergence, x.detach().requires_grad_()),
        (dense_expert_divergence, x.detach().double().requires_grad_()),
    ):
        value = function(z, kind, temperature.to(z.dtype), detach_mean=detach, expert_reduction="none")
        (grad,) = torch.autograd.grad((upstream.to(value.dtype) * value).sum(), z)
        results.append((value, grad))
    for what, values in zip(("value", "gradient"), zip(*results, strict=True), strict=True):
        assert_within_budget(*values, what)
