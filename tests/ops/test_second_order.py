"""Second derivatives, forward mode and ``torch.func`` transforms of the reference backend, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _cases.operators import OPERATORS, Operator, with_input
from torch import Tensor

import lt_kernels
from lt_kernels import functional as LF
from lt_kernels.testing import ContrastiveSample

CASES = [
    pytest.param(operator, case, id=f"{operator.name}-{case.id}")
    for operator in OPERATORS
    if operator.differentiable
    for case in operator.cases
]


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with lt_kernels.use_backend("reference"):
        yield


def input_of(sample: Any) -> Tensor:
    return sample.query if isinstance(sample, ContrastiveSample) else sample.input


def loss_of(operator: Operator, sample: Any) -> Tensor:
    """A sum of all results, to various extents; those that are not differentiable are constants."""
    # a mean that is a constant to the gradient is one to its slope as well, though not to finite differences
    options = {"detach_mean": False} if operator.name.startswith("expert_divergence") else {}
    total = torch.zeros((), dtype=torch.float64)
    for value in operator.results(sample, **options):
        if value.is_floating_point():
            factor = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
            total = total + (value.nan_to_num(0.0, 0.0, 0.0) * factor).sum()
    return total


def gradients(operator: Operator, sample: Any, again: bool) -> tuple[Tensor, ...]:
    leaves = list(sample.differentiable.values())
    return torch.autograd.grad(loss_of(operator, sample), leaves, create_graph=again)


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_gradients_of_a_graph_are_the_same(operator, case):
    sample = case.sample(torch.float64)
    for first, second in zip(gradients(operator, sample, False), gradients(operator, sample, True), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_second_derivatives_are_slopes_of_the_gradient(operator, case):
    sample = case.sample(torch.float64)
    leaves = list(sample.differentiable.values())
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    first = gradients(operator, sample, True)
    onto = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    inner = sum((each * direction).sum() for each, direction in zip(first, onto, strict=True) if each.requires_grad)
    second = torch.autograd.grad(inner, leaves, allow_unused=True)
    actual = sum((each * direction).sum() for each, direction in zip(second, along, strict=True) if each is not None)
    step, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for leaf, direction in zip(leaves, along, strict=True):
                leaf += sign * step * direction
        moved = gradients(operator, sample, False)
        with torch.no_grad():
            for leaf, direction in zip(leaves, along, strict=True):
                leaf -= sign * step * direction
        ends.append(sum((each * direction).sum() for each, direction in zip(moved, onto, strict=True)))
    torch.testing.assert_close(actual, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)
    assert actual != 0


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_transforms(operator, case):
    """func.grad and forward mode against backward."""
    sample = case.sample(torch.float64)
    x = input_of(sample).detach()
    (expected,) = torch.autograd.grad(loss_of(operator, sample), [input_of(sample)])

    def call(z: Tensor) -> Tensor:
        return loss_of(operator, with_input(sample, z))

    torch.testing.assert_close(torch.func.grad(call)(x), expected, rtol=1e-9, atol=1e-11)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, slope = torch.func.jvp(call, (x,), (direction,))
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-8, atol=1e-10)


# ----------------------------------------------------------------------------------------------- vmap, per sample, meta

N, C, D = 5, 7, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGET = torch.tensor([0, 6, -100, 3, 3])
BIAS = draw(C, seed=9)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adjusted": {"class_bias": BIAS, "scale": 2.0, "label_smoothing": 0.1, "weight": BIAS.abs()},
    "margins": {"margin": BIAS.abs()},
    "angular": {"margin": 0.3, "margin_type": "angular", "scale": 8.0},
    "sum": {"reduction": "sum"},
    "zero": {"empty_mean": "zero"},
}


def each_option(function: Any) -> Any:
    return pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())(function)


@each_option
def test_per_sample_gradients_of_rows(options):
    x = draw(N, C).tanh()

    def loss(row: Tensor, y: Tensor) -> Tensor:
        return LF.margin_cross_entropy(row[None], y[None], **options)

    actual = torch.func.vmap(torch.func.grad(loss))(x, TARGET)
    for row, y, gradient in zip(x, TARGET, actual, strict=True):
        leaf = row.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, y), leaf)[0])


@each_option
@pytest.mark.parametrize("normalize", [False, True])
def test_per_sample_gradients_of_a_head(normalize, options):
    """By functional_call, as in the per-sample gradients of torch.func's tutorial."""
    head = lt_kernels.LinearHead(D, C, bias=not normalize, normalize=normalize, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in head.named_parameters()}
    features = draw(N, D, seed=1)

    def loss(parameters: dict[str, Tensor], f: Tensor, y: Tensor) -> Tensor:
        return LF.linear_margin_cross_entropy(
            f[None], parameters["weight"], y[None], linear_bias=parameters.get("bias"), normalize=normalize, **options
        )

    def of_module(parameters: dict[str, Tensor], f: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(head, parameters, (f[None], y[None]))

    for function in (loss, of_module):
        actual = torch.func.vmap(torch.func.grad(function), in_dims=(None, 0, 0))(parameters, features, TARGET)
        for row, (f, y) in enumerate(zip(features, TARGET, strict=True)):
            leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
            expected = torch.autograd.grad(function(leaves, f, y), list(leaves.values()))
            for name, gradient in zip(leaves, expected, strict=True):
                torch.testing.assert_close(actual[name][row], gradient)


def test_per_sample_gradients_of_experts():
    z, prior = draw(N, 3, C), BIAS.log_softmax(0)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        out = LF.expert_cross_entropy(
            logits[:, None], y[None], log_prior=prior, taus=(0.0, 1.0, 2.0), return_ensemble=True, empty_mean="zero"
        )
        diversity = LF.expert_divergence(logits[:, None], "to_mean", 1.5)
        return out.loss + diversity + LF.expert_divergence(list(logits[:, None]), "pairwise") + out.ensemble_loss

    actual = torch.func.vmap(torch.func.grad(loss))(z, TARGET)
    for logits, y, gradient in zip(z, TARGET, actual, strict=True):
        leaf = logits.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, y), leaf)[0])


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_many_upstream_gradients_at_once(operator, case):
    sample = case.sample(torch.float64)
    leaves = list(sample.differentiable.values())
    loss = loss_of(operator, sample)
    upstream = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
    many = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for each, once in zip(many, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(each, torch.stack([factor * once for factor in upstream]), rtol=1e-9, atol=1e-11)


def test_jacobian():
    z = draw(2, N, C)

    def rows(z: Tensor) -> Tensor:
        return LF.expert_cross_entropy(z, TARGET.clamp_min(0), reduction="none") + LF.expert_divergence(
            z, detach_mean=False, reduction="none"
        )

    slow, fast = (torch.autograd.functional.jacobian(rows, z, vectorize=each) for each in (False, True))
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.func.jacrev(rows)(z), slow)


@pytest.mark.parametrize(
    "function",
    [LF.expert_fusion, LF.expert_divergence, lambda z: LF.expert_cross_entropy(z, TARGET)],
    ids=["expert_fusion", "expert_divergence", "expert_cross_entropy"],
)
def test_vmap_of_experts_on_other_backends_is_a_clear_error(function):
    with lt_kernels.use_backend("native"), pytest.raises(NotImplementedError, match=r"takes no part in torch.func.vma"):
        torch.func.vmap(lambda z: tuple(function(z))[:1] if function is LF.expert_fusion else function(z))(
            draw(2, 3, N, C)
        )


def test_vmap_of_predictions():
    z = draw(4, 3, N, C)
    actual = torch.func.vmap(lambda logits: tuple(LF.expert_fusion(logits, topk=2, return_log_probs=True)))(z)
    for field, value in zip(LF.ExpertFusion._fields, actual, strict=True):
        expected = torch.stack([getattr(LF.expert_fusion(x, topk=2, return_log_probs=True), field) for x in z])
        torch.testing.assert_close(value, expected)


def test_vmap_of_contrastive_batches():
    z, labels = draw(3, N, D), torch.tensor([[0, 1, 0, 1, 2], [0, 0, 0, 1, 1], [3, 1, 2, 0, 4]])

    def loss(features: Tensor, label: Tensor) -> Tensor:
        return LF.supervised_contrastive(features, features, label, temperature=0.5, exclude="self")

    actual = torch.func.vmap(torch.func.grad(loss))(z, labels)
    for features, label, gradient in zip(z, labels, actual, strict=True):
        leaf = features.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, label), leaf)[0])


def test_a_bad_class_under_vmap_is_nan():
    """Its value cannot be read; without vmap it is the IndexError that it always is."""
    x, y = draw(N, C), torch.tensor([0, C, 1, -1, 2])
    rows = torch.func.vmap(lambda row, y: LF.margin_cross_entropy(row[None], y[None]))(x, y)
    assert rows.isnan().tolist() == [False, True, False, True, False]
    with pytest.raises(IndexError, match="target: row 1 has class 7"):
        torch.func.grad(lambda x: LF.margin_cross_entropy(x, y))(x)


@each_option
def test_hessian(options):
    x = draw(2, C).tanh()
    y = torch.tensor([1, 4])

    def loss(x: Tensor) -> Tensor:
        return LF.margin_cross_entropy(x, y, **options)

    expected = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), expected)
    if options == {}:
        torch.testing.assert_close(expected, torch.func.hessian(lambda x: torch.nn.functional.cross_entropy(x, y))(x))


def test_third_derivatives():
    x = draw(1, C).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: torch.autograd.grad(
            LF.margin_cross_entropy(x, torch.tensor([2]), class_bias=BIAS, margin=0.2), x, create_graph=True
        )[0],
        x,
    )


def test_meta_weights():
    """Meta-Weight-Net: a step of the model is differentiated with respect to the weights of its samples."""
    weight, features, held_out = draw(C, D), draw(N, D, seed=1), draw(N, D, seed=2)
    target, other = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([6, 5, 4, 3, 2])

    def meta(of_samples: Tensor, cross_entropy: Any) -> Tensor:
        model = weight.clone().requires_grad_()
        loss = (of_samples * cross_entropy(features @ model.T, target)).sum()
        (step,) = torch.autograd.grad(loss, model, create_graph=True)
        return cross_entropy(held_out @ (model - 0.1 * step).T, other).mean()

    of_samples = torch.full((N,), 0.2, dtype=torch.float64, requires_grad=True)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return LF.margin_cross_entropy(x, y, class_bias=BIAS, reduction="none")

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x + BIAS, y, reduction="none")

    (actual,) = torch.autograd.grad(meta(of_samples, ours), of_samples)
    (expected,) = torch.autograd.grad(meta(of_samples, plain), of_samples)
    torch.testing.assert_close(actual, expected)
    assert actual.any()


def test_an_argument_made_of_another_keeps_its_own_gradient():
    """The gradient of the logits has no part that goes through a class bias made of them."""
    x, y = draw(N, C).requires_grad_(), torch.tensor([0, 1, 2, 3, 3])

    def loss(cross_entropy: Any) -> Tensor:
        bias = x.sin().mean(0)
        (gradient,) = torch.autograd.grad(cross_entropy(x, bias), x, create_graph=True)
        return gradient.square().sum()

    (actual,) = torch.autograd.grad(loss(lambda x, bias: LF.margin_cross_entropy(x, y, class_bias=bias)), x)
    (expected,) = torch.autograd.grad(loss(lambda x, bias: torch.nn.functional.cross_entropy(x + bias, y)), x)
    torch.testing.assert_close(actual, expected)


def test_ignored_rows_and_masked_classes_have_no_slope():
    x = draw(N, C).requires_grad_()
    mask = torch.zeros(C, dtype=torch.float64)
    mask[5] = -torch.inf
    for target in (torch.tensor([0, 6, -100, 3, 3]), torch.full((N,), -100)):
        loss = LF.margin_cross_entropy(x, target, class_bias=mask)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        for each in (gradient, second):
            assert each.isfinite().all()
            assert not each[target == -100].any()
            assert not each[:, 5].any()


def test_one_class_and_one_key():
    """Nothing beside the target, no negatives or no positives: losses of 0, whose slopes are 0."""
    x = draw(3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(LF.margin_cross_entropy(x, torch.zeros(3).long()), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert not gradient.any()
    assert not second.any()
    z = draw(3, D).requires_grad_()
    for labels in (torch.arange(3), torch.zeros(3, dtype=torch.int64)):
        loss = LF.supervised_contrastive(z, z, labels, temperature=1.0, exclude="self")
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), z)
        assert gradient.isfinite().all()
        assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("far", [100.0, 1000.0])
def test_certain_rows_do_not_overflow(far, dtype):
    """exp(100) is infinite in float32: a slope of log(exp(a) + exp(b)) that divides by it is NaN."""
    x = (draw(N, C) + far * torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 4]), C)).to(dtype).requires_grad_()
    for target in (torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 5])):
        (gradient,) = torch.autograd.grad(LF.margin_cross_entropy(x, target), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        (plain,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x, target), x, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(plain.square().sum(), x)[0])
    z = torch.nn.functional.normalize(draw(N, D), dim=1).to(dtype).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = LF.supervised_contrastive(z, z, labels, temperature=1 / far, exclude="self")
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    assert second.isfinite().all()


def test_the_backward_pass_need_not_be_inside():
    x = draw(N, C).requires_grad_()
    loss = LF.margin_cross_entropy(x, TARGET, class_bias=BIAS)
    with lt_kernels.use_backend("native"):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_masked_classes_are_as_if_they_were_not_there(soft, smoothing):
    mask = torch.zeros(C, dtype=torch.float64)
    mask[5] = -torch.inf
    kept = [c for c in range(C) if c != 5]
    target = (draw(N, C, seed=3) + mask).softmax(1) if soft else torch.tensor([0, 6, 2, 3, 3])
    left = target[:, kept] if soft else target - (target > 5).long()

    def slope(loss: Tensor, leaf: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    x = draw(N, C).requires_grad_()
    y = x.detach()[:, kept].clone().requires_grad_()
    actual = slope(LF.margin_cross_entropy(x, target, class_bias=mask, label_smoothing=smoothing), x)
    expected = slope(torch.nn.functional.cross_entropy(y, left, label_smoothing=smoothing), y)
    torch.testing.assert_close(actual[:, kept], expected)
    assert not actual[:, 5].any()
