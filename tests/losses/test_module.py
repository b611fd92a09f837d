"""What every recipe owes torch.nn: buffers, state_dict, copies, devices, dtypes, online counts, bad input, examples."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lt_kernels import losses
from lt_kernels.losses import (
    ArcFaceLoss,
    BalancedSoftmaxLoss,
    CosFaceLoss,
    LDAMLoss,
    LogitAdjustmentLoss,
    MarginCrossEntropyBase,
    VSLoss,
)

COUNTS = [500, 120, 47, 19, 2]
OTHER = [3, 30, 300, 30, 3]
C = len(COUNTS)
FROM_COUNTS = {
    "logit-adjustment": LogitAdjustmentLoss,
    "balanced-softmax": BalancedSoftmaxLoss,
    "ldam": LDAMLoss,
    "vs": VSLoss,
    "arcface-from-counts": ArcFaceLoss.from_counts,
}
WITHOUT_COUNTS = {
    "cosface": lambda **k: CosFaceLoss(**k),
    "cosface-per-class": lambda **k: CosFaceLoss([0.1, 0.2, 0.3, 0.4, 0.5], **k),
    "arcface": lambda **k: ArcFaceLoss(**k),
}
ALL = {
    **{name: partial(make, COUNTS) for name, make in FROM_COUNTS.items()},
    **WITHOUT_COUNTS,
}
every_loss = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
every_loss_from_counts = pytest.mark.parametrize("make", FROM_COUNTS.values(), ids=FROM_COUNTS.keys())

generator = torch.Generator().manual_seed(0)
X = torch.rand(8, C, generator=generator, dtype=torch.float64) * 1.8 - 0.9
Y = torch.randint(0, C, (8,), generator=generator)


def through_torch_save(loss):
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "torch.save": through_torch_save,
}


@every_loss
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_compute_the_same_and_share_nothing(make, duplicate):
    loss = make(weight=[1.0, 2.0, 3.0, 4.0, 5.0], label_smoothing=0.1)
    twin = duplicate(loss)
    assert type(twin) is type(loss)
    before = loss(X, Y)
    assert torch.equal(twin(X, Y), before)
    assert twin.state_dict().keys() == loss.state_dict().keys()
    for buffer in twin.buffers():
        buffer.fill_(0.25)
    assert torch.equal(loss(X, Y), before)


@every_loss_from_counts
def test_state_dict_round_trip(make):
    source, loss = make(COUNTS), make(OTHER)
    assert "class_counts" in source.state_dict()
    assert len(source.state_dict()) >= 2
    assert not torch.equal(loss(X, Y), source(X, Y))
    loss.load_state_dict(source.state_dict())
    assert torch.equal(loss(X, Y), source(X, Y))
    assert loss.class_counts.tolist() == COUNTS


def test_state_dict_names_the_class_tensors():
    assert set(VSLoss(COUNTS, weight=[1.0] * C).state_dict()) == {"class_counts", "class_scale", "class_bias", "weight"}
    assert set(LDAMLoss(COUNTS).state_dict()) == {"class_counts", "margin"}
    assert not list(VSLoss(COUNTS).parameters())


@every_loss
def test_to_float64(make):
    loss = make().to(torch.float64)
    assert {buffer.dtype for buffer in loss.buffers()} <= {torch.float64}
    torch.testing.assert_close(loss(X, Y), make(dtype=torch.float64)(X, Y), rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_modules_keep_float32_priors(make, dtype):
    loss = make(weight=[0.1] * C)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    nn.Sequential(loss).to(dtype)
    for name, value in loss.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert loss(X.to(dtype), Y).dtype == torch.float32


@every_loss
def test_to_device(make):
    loss = make(weight=[0.1] * C).to("meta")
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}


@every_loss_from_counts
def test_weights_follow_the_device_of_the_counts(make):
    loss = make(COUNTS, weight=[1.0] * C, device="meta")
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}
    assert make(torch.tensor(COUNTS), weight=[1.0] * C).weight.device.type == "cpu"


@every_loss_from_counts
class TestUpdateCounts:
    def test_equals_a_new_loss_and_keeps_its_tensors(self, make):
        loss = make(COUNTS)
        held = {name: buffer.data_ptr() for name, buffer in loss.named_buffers()}
        loss.update_counts(torch.tensor(OTHER))
        assert {name: buffer.data_ptr() for name, buffer in loss.named_buffers()} == held
        assert torch.equal(loss(X, Y), make(OTHER)(X, Y))
        for name, value in make(OTHER).state_dict().items():
            assert torch.equal(loss.state_dict()[name], value)

    def test_after_double_the_priors_are_exact(self, make):
        loss = make(COUNTS).double()
        loss.update_counts(OTHER)
        assert torch.equal(loss(X, Y), make(OTHER, dtype=torch.float64)(X, Y))

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ([1, 2, 3], "class_counts: got 3 classes, expected 5"),
            ([1, 2, 3, 4, -5], "class_counts: got -5 at class 4, expected counts >= 0"),
            ([1, 2, 0, 4, 5], r"class_counts: got 0 for 1 of 5 classes \(2\)"),
        ],
        ids=["length", "negative", "zero"],
    )
    def test_bad_counts_change_nothing(self, make, counts, message):
        loss = make(COUNTS)
        before = copy.deepcopy(loss.state_dict())
        with pytest.raises(ValueError, match=message):
            loss.update_counts(counts)
        assert all(torch.equal(loss.state_dict()[name], value) for name, value in before.items())

    def test_keeps_the_policy_for_zero_counts(self, make):
        loss = make(COUNTS, zero_counts=1)
        loss.update_counts([0, *OTHER[1:]])
        assert torch.equal(loss(X, Y), make([1, *OTHER[1:]])(X, Y))


@every_loss_from_counts
def test_compiled_losses_see_updated_counts_without_recompiling(make):
    torch._dynamo.reset()
    loss = make(COUNTS)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(X, Y), loss(X, Y))
    loss.update_counts(OTHER)
    torch.testing.assert_close(compiled(X, Y), make(OTHER)(X, Y))
    assert len(graphs) == 1


def test_losses_with_different_numbers_compile_in_one_process():
    torch._dynamo.reset()  # from the second value on, torch.compile takes a number as symbolic
    for loss in (LogitAdjustmentLoss(COUNTS), CosFaceLoss(0.3, 20.0), CosFaceLoss(0.2, 9.0, label_smoothing=0.1)):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X, Y), loss(X, Y))


@pytest.mark.parametrize("make", WITHOUT_COUNTS.values(), ids=WITHOUT_COUNTS.keys())
def test_update_counts_needs_a_loss_built_from_counts(make):
    with pytest.raises(RuntimeError, match=r"update_counts: got a (CosFace|ArcFace)Loss that was built without"):
        make().update_counts(COUNTS)


@pytest.mark.parametrize(
    "counts",
    [
        COUNTS,
        tuple(COUNTS),
        np.array(COUNTS),
        np.array(COUNTS, np.float32),
        torch.tensor(COUNTS),
        torch.tensor(COUNTS).int(),
    ],
    ids=["list", "tuple", "numpy-int64", "numpy-float32", "tensor-int64", "tensor-int32"],
)
@every_loss_from_counts
def test_any_kind_of_counts(make, counts):
    assert torch.equal(make(counts)(X, Y), make(COUNTS)(X, Y))


@pytest.mark.parametrize("cls", [CosFaceLoss, ArcFaceLoss], ids=["cosface", "arcface"])
def test_a_margin_given_as_a_parameter_is_learned(cls):
    margin = nn.Parameter(torch.full((C,), 0.2))
    loss = cls(margin, scale=4.0)
    assert [name for name, _ in loss.named_parameters()] == ["margin"]
    loss(X.float(), Y).backward()
    assert margin.grad is not None
    assert (margin.grad[Y] > 0).all()  # a larger margin is a larger loss, for every class that is a target
    assert torch.equal(cls(margin.tolist(), scale=4.0)(X.float(), Y), loss(X.float(), Y))


def test_the_default_dtype_is_followed():
    torch.set_default_dtype(torch.float64)
    try:
        assert LogitAdjustmentLoss(COUNTS).class_bias.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_repr_names_what_differs_from_the_default():
    assert repr(LDAMLoss(COUNTS, reduction="sum")) == "LDAMLoss(num_classes=5, scale=30.0, reduction=sum)"
    assert repr(CosFaceLoss()) == "CosFaceLoss(scale=64.0, margin=0.4)"


def test_a_recipe_without_counts_to_derive_from_says_so():
    with pytest.raises(NotImplementedError, match="MarginCrossEntropyBase derives nothing from class counts"):
        MarginCrossEntropyBase()._set_counts(COUNTS)


BAD_OPTIONS = {
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: got 'avg', expected 'none', 'mean' or 'sum'"),
    "smoothing-range": ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5, expected a number in [0, 1]"),
    "smoothing-type": ({"label_smoothing": "a"}, TypeError, "label_smoothing: got str, expected a number"),
    "ignore-index": ({"ignore_index": 1.0}, TypeError, "ignore_index: got float, expected an int"),
    "weight-nan": ({"weight": [1, 1, float("nan"), 1, 1]}, ValueError, "weight: got nan at class 2, expected finite"),
    "weight-2d": ({"weight": torch.ones(C, 1)}, ValueError, "weight: got shape (5, 1), expected a 1-D vector [C]"),
    "weight-type": ({"weight": 3}, TypeError, "weight: got int, expected a 1-D sequence, array or tensor of numbers"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, expected a floating"),
    "unknown": ({"smoothing": 0.1}, TypeError, "smoothing"),
}


@every_loss
@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(make, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(**options)


BAD_COUNTS = {
    "negative": ([1, -2, 3], ValueError, "class_counts: got -2 at class 1, expected counts >= 0"),
    "nan": ([1, float("nan"), 3], ValueError, "class_counts: got nan at class 1, expected finite numbers"),
    "zero": ([1, 0, 3], ValueError, "class_counts: got 0 for 1 of 3 classes (1), expected counts > 0"),
    "empty": ([], ValueError, "class_counts: got no elements"),
    "2d": (np.ones((2, 3)), ValueError, "class_counts: got shape (2, 3), expected a 1-D vector [C]"),
    "strings": (["a", "b"], TypeError, "class_counts: got list"),
    "none": (None, TypeError, "class_counts: got NoneType, expected a 1-D sequence"),
}


@every_loss_from_counts
@pytest.mark.parametrize(("counts", "error", "message"), BAD_COUNTS.values(), ids=BAD_COUNTS.keys())
def test_bad_counts(make, counts, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(counts)


@every_loss_from_counts
def test_weight_of_another_length(make):
    with pytest.raises(ValueError, match="weight: got 3 classes, expected 5"):
        make(COUNTS, weight=[1, 2, 3])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LogitAdjustmentLoss(COUNTS, tau=float("nan")), ValueError, "tau: got nan, expected a finite number"),
        (lambda: LogitAdjustmentLoss(COUNTS, tau="1"), TypeError, "tau: got str, expected a number"),
        (lambda: LogitAdjustmentLoss(COUNTS, eps=-1.0), ValueError, "eps: got -1.0, expected a number >= 0"),
        (lambda: LDAMLoss(COUNTS, max_margin=-0.5), ValueError, "max_margin: got -0.5, expected a number >= 0"),
        (lambda: LDAMLoss(COUNTS, scale=0.0), ValueError, "scale: got 0.0, expected a number > 0"),
        (lambda: VSLoss(COUNTS, gamma=float("inf")), ValueError, "gamma: got inf, expected a finite number"),
        (lambda: CosFaceLoss(margin=float("nan")), ValueError, "margin: got nan, expected a finite number"),
        (lambda: CosFaceLoss(margin=[0.1, float("inf")]), ValueError, "margin: got inf at class 1, expected finite"),
        (lambda: CosFaceLoss(margin="big"), TypeError, "margin: got str, expected a 1-D sequence"),
        (
            lambda: ArcFaceLoss.from_counts(COUNTS, (0.5, 0.1)),
            ValueError,
            "margin_bounds: got (0.5, 0.1), expected lower",
        ),
        (lambda: ArcFaceLoss.from_counts(COUNTS, 0.5), ValueError, "margin_bounds: got 0.5, expected (lower, upper)"),
        (lambda: ArcFaceLoss.from_counts(COUNTS, power=0.0), ValueError, "power: got 0.0, expected a number > 0"),
        (
            lambda: VSLoss(COUNTS, zero_counts="skip"),
            ValueError,
            "zero_counts: got 'skip', expected 'error', 'mask' or",
        ),
        (
            lambda: VSLoss(COUNTS, zero_counts=0),
            ValueError,
            "zero_counts: got 0, expected 'error', 'mask' or a positive",
        ),
    ],
    ids=lambda value: value.split(", expected")[0].replace(": got ", "=") if isinstance(value, str) else "",
)
def test_bad_hyperparameters(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@every_loss_from_counts
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X[:, :3], Y, ValueError, "expected [3], one value per class"),
        (X, Y + C, IndexError, "target: row 0 has class"),
        (X, Y[:3], ValueError, "target: got class indices of shape (3,), expected (8,)"),
        (X.long(), Y, TypeError, "input: got dtype torch.int64"),
    ],
    ids=["other-number-of-classes", "class-out-of-range", "target-length", "integer-logits"],
)
def test_bad_calls(make, x, y, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(COUNTS)(x, y)


@pytest.mark.parametrize("name", ["arcface", "balanced_softmax", "cosface", "ldam", "logit_adjustment", "vs"])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"{losses.__name__}.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
