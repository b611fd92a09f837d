"""Properties of the operators on random sizes and values, on the CPU's backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases.contrastive import vectors
from torch import Tensor

import lt_kernels
from lt_kernels.functional import (
    expert_cross_entropy,
    linear_margin_cross_entropy,
    margin_cross_entropy,
    partitioned_logsumexp,
)

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

CPU_BACKENDS = ("reference", "native")
linear_shapes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 40))


row_shapes = st.tuples(st.integers(1, 6), st.integers(1, 40))


seeds = st.integers(0, 2**16)


def draw_rows(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    y = torch.randint(shape[1], shape[:1], generator=generator)
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y, bias


@pytest.mark.parametrize("backend_name", CPU_BACKENDS)
class TestRows:
    @settings(max_examples=20, deadline=None)
    @given(shape=row_shapes, seed=seeds, shift=st.floats(-1e3, 1e3))
    def test_adding_a_constant_to_a_row_changes_nothing(self, backend_name, shape, seed, shift):
        x, y, bias = draw_rows(shape, seed)
        with lt_kernels.use_backend(backend_name):
            a = margin_cross_entropy(x, y, class_bias=bias, margin=0.3, reduction="none")
            b = margin_cross_entropy(x + shift, y, class_bias=bias, margin=0.3, reduction="none")
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    @settings(max_examples=20, deadline=None)
    @given(shape=row_shapes, seed=seeds, smoothing=st.sampled_from([0.0, 0.2]))
    def test_gradient_rows_sum_to_zero(self, backend_name, shape, seed, smoothing):
        x, y, bias = draw_rows(shape, seed)
        with lt_kernels.use_backend(backend_name):
            margin_cross_entropy(
                x, y, class_bias=bias, margin=0.3, label_smoothing=smoothing, reduction="sum"
            ).backward()
        assert x.grad.sum(1).abs().max() < 1e-12

    @settings(max_examples=20, deadline=None)
    @given(shape=row_shapes, seed=seeds)
    def test_permuting_classes_permutes_the_gradient(self, backend_name, shape, seed):
        x, y, bias = draw_rows(shape, seed)
        order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(shape[1]))
        with lt_kernels.use_backend(backend_name):
            loss = margin_cross_entropy(x, y, class_bias=bias, margin=0.2)
            (grad,) = torch.autograd.grad(loss, x)
            moved = x.detach()[:, order].requires_grad_()
            other = margin_cross_entropy(moved, place[y], class_bias=bias[order], margin=0.2)
            (moved_grad,) = torch.autograd.grad(other, moved)
        torch.testing.assert_close(loss, other)
        torch.testing.assert_close(grad[:, order], moved_grad)

    @settings(max_examples=20, deadline=None)
    @given(shape=row_shapes, seed=seeds, share=st.floats(0, 1))
    def test_mixing_is_the_weighted_sum_of_two_calls(self, backend_name, shape, seed, share):
        x, y, bias = draw_rows(shape, seed)
        z = y.roll(1)
        with lt_kernels.use_backend(backend_name):
            mixed = margin_cross_entropy(x, y, class_bias=bias, margin=0.4, mixed_target=z, mix_lambda=share)
            parts = [margin_cross_entropy(x, t, class_bias=bias, margin=0.4) for t in (y, z)]
        torch.testing.assert_close(mixed, share * parts[0] + (1 - share) * parts[1])

    @settings(max_examples=20, deadline=None)
    @given(shape=row_shapes, seed=seeds)
    def test_one_hot_probabilities_are_indices(self, backend_name, shape, seed):
        x, y, bias = draw_rows(shape, seed)
        with lt_kernels.use_backend(backend_name):
            a = margin_cross_entropy(x, y, class_bias=bias, label_smoothing=0.1)
            b = margin_cross_entropy(x, F.one_hot(y, shape[1]).double(), class_bias=bias, label_smoothing=0.1)
        torch.testing.assert_close(a, b)


def draw_linear(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    w = torch.randn((shape[2], shape[1]), generator=generator, dtype=torch.float64)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(shape[2], shape[:1], generator=generator)


@pytest.mark.parametrize("strategy", ["materialize", "chunked"])
class TestLinear:
    @settings(max_examples=10, deadline=None)
    @given(shape=linear_shapes, seed=seeds)
    def test_adding_a_vector_to_every_class_changes_nothing(self, strategy, shape, seed):
        x, w, y = draw_linear(shape, seed)
        a = linear_margin_cross_entropy(x, w, y, strategy=strategy)
        b = linear_margin_cross_entropy(x, w + 3 * w[:1], y, strategy=strategy)
        torch.testing.assert_close(a, b)

    @settings(max_examples=10, deadline=None)
    @given(shape=linear_shapes, seed=seeds)
    def test_gradients_of_the_classes_sum_to_zero(self, strategy, shape, seed):
        x, w, y = draw_linear(shape, seed)
        (grad,) = torch.autograd.grad(linear_margin_cross_entropy(x, w, y, strategy=strategy), w)
        assert grad.sum(0).abs().max() < 1e-12

    @settings(max_examples=10, deadline=None)
    @given(shape=linear_shapes, seed=seeds, factor=st.floats(0.1, 100))
    def test_cosines_ignore_lengths_and_their_gradients_are_tangent(self, strategy, shape, seed, factor):
        x, w, y = draw_linear(shape, seed)
        options = {"normalize": True, "scale": 5.0, "strategy": strategy}
        a = linear_margin_cross_entropy(x, w, y, **options)
        b = linear_margin_cross_entropy(factor * x, w / factor, y, **options)
        torch.testing.assert_close(a, b)
        for g, v in zip(torch.autograd.grad(a, (x, w)), (x, w), strict=True):
            assert (g * v).sum(1).abs().max() < 1e-9

    @settings(max_examples=10, deadline=None)
    @given(shape=linear_shapes, seed=seeds)
    def test_permuting_classes_permutes_the_gradient(self, strategy, shape, seed):
        x, w, y = draw_linear(shape, seed)
        order = torch.randperm(shape[2], generator=torch.Generator().manual_seed(seed))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(shape[2]))
        (grad,) = torch.autograd.grad(linear_margin_cross_entropy(x, w, y, strategy=strategy), w)
        moved = w.detach()[order].requires_grad_()
        (moved_grad,) = torch.autograd.grad(linear_margin_cross_entropy(x, moved, place[y], strategy=strategy), moved)
        torch.testing.assert_close(grad[order], moved_grad)


class TestExperts:
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 40))

    @settings(deadline=None, max_examples=10)
    @given(shape=shapes, seed=st.integers(0, 99))
    def test_rows_of_the_gradient_sum_to_zero(self, shape, seed):
        torch.manual_seed(seed)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        prior = torch.randn(shape[2], dtype=torch.float64)
        y = torch.randint(shape[2], (shape[1],))
        expert_cross_entropy(x, y, log_prior=prior, taus=[0.5 * e for e in range(shape[0])]).backward()
        torch.testing.assert_close(x.grad.sum(2), torch.zeros(shape[:2], dtype=torch.float64), rtol=0, atol=1e-12)

    @settings(deadline=None, max_examples=10)
    @given(shape=shapes, seed=st.integers(0, 99))
    def test_without_a_prior_it_is_the_mean_of_cross_entropies(self, shape, seed):
        torch.manual_seed(seed)
        x, y = torch.randn(shape, dtype=torch.float64), torch.randint(shape[2], (shape[1],))
        expected = torch.stack([F.cross_entropy(z, y) for z in x]).mean()
        torch.testing.assert_close(expert_cross_entropy(x, y), expected)
        zeros = expert_cross_entropy(x, y, log_prior=torch.randn(shape[2]).double(), taus=[0.0] * shape[0])
        torch.testing.assert_close(zeros, expected)

    @settings(deadline=None, max_examples=10)
    @given(shape=shapes, seed=st.integers(0, 99))
    def test_permuting_experts_permutes_the_losses(self, shape, seed):
        torch.manual_seed(seed)
        x, y = torch.randn(shape), torch.randint(shape[2], (shape[1],))
        taus, prior = torch.randn(shape[0]).tolist(), torch.randn(shape[2])
        order = torch.randperm(shape[0])
        losses = expert_cross_entropy(x, y, log_prior=prior, taus=taus, expert_reduction="none")
        moved = expert_cross_entropy(
            x[order], y, log_prior=prior, taus=[taus[i] for i in order], expert_reduction="none"
        )
        assert torch.equal(moved, losses[order])


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 12), m=st.integers(1, 40), d=st.integers(1, 9), classes=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_partitioned_logsumexp(n, m, d, classes, seed):
    query, key, ql, kl = vectors(n, m, d, torch.float64, classes=classes, seed=seed)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    for name in CPU_BACKENDS:
        with lt_kernels.use_backend(name):
            result = partitioned_logsumexp(query, key, ql, kl, scale=3.0)
            permuted = partitioned_logsumexp(query, key[order], ql, kl[order], scale=3.0)
            shifted = partitioned_logsumexp(
                query, key, ql, kl, scale=3.0, key_bias=torch.full((m,), 0.7, dtype=torch.float64)
            )
        for a, b in zip(result, permuted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.logaddexp(result.neg, result.pos), torch.logsumexp(3 * query @ key.t(), 1))
        torch.testing.assert_close(shifted.neg, result.neg + 0.7)
        torch.testing.assert_close(shifted.pos, result.pos + 0.7)
        torch.testing.assert_close(shifted.pos_sum, result.pos_sum)


# --------------------------------------------------------------------------------------------------- means over nothing


def _of_rows(leaves: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    return margin_cross_entropy(leaves[0], target, **options)


def _of_experts(leaves: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    loss, ensemble, _ = expert_cross_entropy(leaves[:2], target, return_ensemble=True, **options)
    return loss + ensemble


def _of_linear(strategy: str) -> Callable[..., Tensor]:
    return lambda leaves, target, **options: linear_margin_cross_entropy(*leaves, target, strategy=strategy, **options)


FORMS = {
    "rows": (_of_rows, [(6, 5)]),
    "experts": (_of_experts, [(6, 5), (6, 5)]),
    "linear-materialize": (_of_linear("materialize"), [(6, 4), (5, 4)]),
    "linear-chunked": (_of_linear("chunked"), [(6, 4), (5, 4)]),
}
TARGET = torch.tensor([0, 4, 2, 1, 3, 0])
IGNORED = torch.full_like(TARGET, -100)


@pytest.mark.parametrize(("form", "shapes"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("learns", [False, True])
def test_the_mean_over_no_weight_is_nan_or_zero(form, shapes, learns, backend):
    """The gradient is 0 either way; a mean over something is as it was."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    bias = torch.randn(5, generator=generator).requires_grad_(learns)
    differentiated = [*leaves, bias] if learns else leaves
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    empty = {
        "ignored": {"target": IGNORED},
        "without weight": {"target": TARGET * 0 + 4, "weight": weight},
        "pairs": {"target": IGNORED, "mixed_target": IGNORED, "mix_lambda": 0.25},
    }
    for name, options in empty.items():
        if name != "without weight" or form is not _of_experts:  # the ensemble's mean has no weights
            assert form(leaves, class_bias=bias, **options).isnan(), name
            assert form(leaves, class_bias=bias, **options, empty_mean="zero") == 0, name
        value = form(leaves, class_bias=bias, **options, empty_mean="zero")
        for gradient in torch.autograd.grad(value, differentiated):
            assert not gradient.any(), name
    half = {"target": TARGET, "mixed_target": IGNORED, "mix_lambda": 0.25}
    expected = 0.25 * form(leaves, TARGET, class_bias=bias)
    torch.testing.assert_close(form(leaves, class_bias=bias, **half, empty_mean="zero"), expected)
    assert torch.equal(form(leaves, TARGET, empty_mean="zero"), form(leaves, TARGET))


@pytest.mark.parametrize(("form", "shapes"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("soft", [False, True])
def test_the_mean_of_no_rows_is_nan_or_zero(form, shapes, soft, backend):
    leaves = [torch.zeros(0 if shape[0] == 6 else shape[0], shape[1]) for shape in shapes]
    target = torch.zeros(0, 5) if soft else TARGET[:0]
    assert form(leaves, target).isnan()
    assert form(leaves, target, empty_mean="zero") == 0
