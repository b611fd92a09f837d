"""Registration: schemas from NamedTuples, the gradient's registration, and what it refuses."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lt_kernels import functional
from lt_kernels.ops import _registry
from lt_kernels.ops._registry import ReadyGradient, Signature, flatten
from lt_kernels.ops._rows.options import DIFFERENTIABLE, RowOptions


class Inner(NamedTuple):
    label: Tensor
    bias: Tensor | None
    scale: float


class Outer(NamedTuple):
    input: Tensor
    inner: Inner
    extra: Tensor | None
    taus: list[float]
    flag: bool


SIGNATURE = Signature(Outer, ("input", "bias", "extra"))
OUTER = Outer(torch.zeros(2), Inner(torch.ones(2), None, 0.5), torch.ones(1), [1.0, 2.0], True)


def test_schema_spells_nested_arguments_out():
    assert SIGNATURE.schema == (
        "Tensor input, Tensor label, Tensor? bias, float scale, Tensor? extra, float[] taus, bool flag, Tensor? numbers"
    )
    assert SIGNATURE.names == ("input", "label", "bias", "scale", "extra", "taus", "flag", "numbers")


def test_flat_arguments_are_rebuilt_by_place():
    flat = SIGNATURE.flatten(OUTER)
    assert len(flat) == len(SIGNATURE.names)
    assert flat == (*flatten(OUTER), None)
    rebuilt = SIGNATURE.rebuild(flat)
    assert isinstance(rebuilt, Outer)
    assert isinstance(rebuilt.inner, Inner)
    assert all(a is b for a, b in zip(SIGNATURE.flatten(rebuilt), flat, strict=True))


def test_tensors_are_split_from_the_others_and_joined_again():
    flat = SIGNATURE.flatten(OUTER)
    tensors, others = SIGNATURE.split(flat)
    assert [type(value) for value in tensors] == [Tensor, Tensor, type(None), Tensor, type(None)]
    assert others == (0.5, [1.0, 2.0], True)
    assert SIGNATURE.n_tensors == 5
    assert all(a is b for a, b in zip(SIGNATURE.join(tensors, others), flat, strict=True))


def test_needs_and_gradients_go_by_name():
    assert SIGNATURE.needs([True, False, False, False, True, False, False, False]) == [True, False, True]
    assert SIGNATURE.gradients({"extra": 1, "input": 2}) == [2, None, None, None, 1, None, None, None]


def test_numbers_are_read_where_the_operator_runs():
    flat = (*SIGNATURE.flatten(OUTER)[:-1], torch.tensor([0.25, 3.0, 4.0], dtype=torch.float64))
    read = SIGNATURE.read(flat)
    assert read.inner.scale == 0.25
    assert read.taus == [3.0, 4.0]
    assert SIGNATURE.rebuild(flat).taus == OUTER.taus
    assert SIGNATURE.read(SIGNATURE.flatten(OUTER)).taus == OUTER.taus


def test_row_options_have_one_order_everywhere():
    """Python's list, each operator's schema, and the list that the C++ kernels were built with."""
    options = Signature(RowOptions, DIFFERENTIABLE).schema.removesuffix(", Tensor? numbers")
    for op in ("margin_cross_entropy", "linear_margin_cross_entropy", "expert_cross_entropy"):
        for direction in ("fwd", "bwd"):
            assert options in str(getattr(torch.ops.lt_kernels, f"{op}_{direction}").default._schema)
    from lt_kernels.ops import _native

    assert not isinstance(_native.load(), str)
    native = torch.ops.lt_kernels_native
    for operator in (
        native.margin_cross_entropy_fwd, native.margin_cross_entropy_bwd, native.expert_cross_entropy_fwd,
    ):  # fmt: skip
        assert options in str(operator.default._schema)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.fixture
def cube():
    """x^3 with both registrations of its gradient: ours and torch's own."""

    def implementation(x: Tensor, factor: float) -> Tensor:
        return factor * x**3

    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)

    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * x**2 * grad, None

    names = []
    for which, register in (("ours", _registry.register_autograd), ("torchs", torch.library.register_autograd)):
        name = f"test_cube_{which}"
        if not hasattr(torch.ops.lt_kernels, name):
            qualified = _registry.define(f"{name}(Tensor x, float factor) -> Tensor", implementation, implementation)
            if which == "ours":
                register(qualified, backward, setup_context)
            else:
                register(qualified, backward, setup_context=setup_context, lib=_registry._library)
        names.append(name)
    return [getattr(torch.ops.lt_kernels, name).default for name in names]


def test_both_registrations_give_the_same(cube):
    for needs in (True, False):
        results = []
        for operator in cube:
            x = torch.linspace(-1, 1, 5, requires_grad=needs)
            y = operator(x, 2.0)
            assert y.requires_grad == needs
            results.append([y.detach(), *(torch.autograd.grad(y.sum(), x) if needs else ())])
        for ours, torchs in zip(*results, strict=True):
            assert torch.equal(ours, torchs)


def test_both_registrations_compile_to_the_same(cube):
    results = []
    for operator in cube:
        torch._dynamo.reset()
        x = torch.linspace(-1, 1, 5, requires_grad=True)
        y = torch.compile(lambda x, operator=operator: operator(x, 2.0).sin(), fullgraph=True, backend="aot_eager")(x)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), x)])
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


def losses():
    x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
    w, e = torch.randn(10, 10, requires_grad=True), torch.randn(3, 8, 10, requires_grad=True)
    return {
        "margin_cross_entropy": (x, lambda reduction: functional.margin_cross_entropy(x, y, reduction=reduction)),
        "linear_margin_cross_entropy": (
            w, lambda reduction: functional.linear_margin_cross_entropy(x, w, y, reduction=reduction)
        ),
        "expert_cross_entropy": (e, lambda reduction: functional.expert_cross_entropy(e, y, reduction=reduction)),
        "expert_divergence": (e, lambda reduction: functional.expert_divergence(e, reduction=reduction)),
        "partitioned_logsumexp": (x, lambda _: functional.partitioned_logsumexp(x, x.detach(), y, y).neg),
    }  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("op", losses())
def test_batched_gradients_are_a_clear_error(op, reduction):
    leaf, loss_of = losses()[op]
    loss = loss_of(reduction)
    with pytest.raises(NotImplementedError, match=rf"{op}_fwd takes one upstream gradient at a time: got is_grads_bat"):
        torch.autograd.grad(loss, leaf, torch.ones(2, *loss.shape), is_grads_batched=True)


def test_a_ready_gradient_is_handed_out_once():
    ready, buffer = ReadyGradient(True), torch.ones(3)
    with torch.no_grad():
        assert ready.take([buffer], None) == []
        (first,) = ready.take([buffer], torch.tensor(2.0))
        assert first.data_ptr() == buffer.data_ptr()
        assert ready.take([buffer], torch.tensor(2.0)) == []
    assert ReadyGradient(True).take([buffer], torch.tensor(2.0)) == []  # a graph of the gradient is recorded
