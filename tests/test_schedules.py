"""Deferred re-weighting: weights by epoch, on any loss with a weight buffer, resumable."""

from __future__ import annotations

import copy
import doctest
import json
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from _refused import refused
from torch import nn

from lt_kernels import schedules
from lt_kernels.losses import LDAMLoss, VSLoss
from lt_kernels.schedules import DeferredReweighting

COUNTS = [5000, 500, 50, 5]
C = len(COUNTS)


def class_balanced(beta: float) -> torch.Tensor:
    n = torch.tensor(COUNTS, dtype=torch.float64)
    w = (1 - beta) / (1 - beta**n)
    return (w / w.sum() * C).float()


LOSSES = {
    "ldam": lambda: LDAMLoss(COUNTS),
    "vs": lambda: VSLoss(COUNTS),
    "vs-weighted": lambda: VSLoss(COUNTS, weight=[1, 2, 3, 4]),
    "nn.CrossEntropyLoss": nn.CrossEntropyLoss,
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_ones_before_the_switch_and_class_balanced_from_it_on(make):
    loss = make()
    schedule = DeferredReweighting(loss, COUNTS, switch_epoch=3)
    for epoch in range(5):
        schedule.step(epoch)
        expected = torch.ones(C) if epoch < 3 else class_balanced(0.9999)
        torch.testing.assert_close(loss.weight, expected)
        torch.testing.assert_close(schedule.weight(epoch), expected)


def test_ones_are_exact_and_set_at_construction():
    loss = LDAMLoss(COUNTS)
    DeferredReweighting(loss, COUNTS, switch_epoch=1)
    assert torch.equal(loss.weight, torch.ones(C))


def test_weights_that_start_at_epoch_0():
    loss = nn.CrossEntropyLoss()
    DeferredReweighting(loss, COUNTS, switch_epoch=0, beta=0.9)
    torch.testing.assert_close(loss.weight, class_balanced(0.9))


@every_loss
def test_the_buffer_is_changed_in_place(make):
    loss = make()
    schedule = DeferredReweighting(loss, COUNTS, switch_epoch=1)
    held = loss.weight
    schedule.step(1)
    assert loss.weight is held
    loss.double()
    schedule.step(0)
    schedule.step(1)
    assert loss.weight.dtype == torch.float64
    torch.testing.assert_close(loss.weight.float(), class_balanced(0.9999))


def test_the_weighted_loss_is_the_papers():
    loss = LDAMLoss(COUNTS)
    DeferredReweighting(loss, COUNTS, switch_epoch=5).step(5)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, C, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    m = torch.tensor(COUNTS, dtype=torch.float64) ** -0.25
    shifted = torch.where(F.one_hot(y, C).bool(), x - 0.5 * m / m.max(), x)
    expected = F.cross_entropy(30 * shifted, y, weight=class_balanced(0.9999).double())
    torch.testing.assert_close(loss(x, y), expected, rtol=1e-6, atol=1e-7)


def test_a_class_without_samples():
    loss = nn.CrossEntropyLoss()
    schedule = DeferredReweighting(loss, [10, 0, 2], switch_epoch=1, zero_counts="mask")
    schedule.step(1)
    assert loss.weight[1] == 0
    assert loss.weight.sum().item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match=re.escape("class_counts: got 0 for 1 of 3 classes (1)")):
        DeferredReweighting(loss, [10, 0, 2], switch_epoch=1)


class TestResume:
    @pytest.mark.parametrize("copied", [json.loads, None], ids=["json", "as-is"])
    def test_state_dict_round_trip(self, copied):
        schedule = DeferredReweighting(LDAMLoss(COUNTS), COUNTS, switch_epoch=2, beta=0.99)
        schedule.step(7)
        state = schedule.state_dict()
        state = copied(json.dumps(state)) if copied else state
        loss = LDAMLoss(COUNTS)
        other = DeferredReweighting(loss, [1, 2, 3, 4], switch_epoch=100)
        other.load_state_dict(state)
        assert other.epoch == 7
        torch.testing.assert_close(loss.weight, class_balanced(0.99))
        assert other.state_dict() == schedule.state_dict()

    def test_masked_classes_stay_masked(self):
        schedule = DeferredReweighting(nn.CrossEntropyLoss(), [10, 0, 2], switch_epoch=0, zero_counts="mask")
        loss = nn.CrossEntropyLoss()
        DeferredReweighting(loss, [1, 1, 1], switch_epoch=9).load_state_dict(schedule.state_dict())
        assert torch.equal(loss.weight, schedule.loss.weight)

    def test_the_loss_state_dict_carries_the_weight(self):
        loss = LDAMLoss(COUNTS)
        DeferredReweighting(loss, COUNTS, switch_epoch=0)
        fresh = LDAMLoss(COUNTS)
        DeferredReweighting(fresh, COUNTS, switch_epoch=9)
        fresh.load_state_dict(loss.state_dict())
        assert torch.equal(fresh.weight, loss.weight)

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
    )
    def test_copies(self, duplicate):
        schedule = DeferredReweighting(LDAMLoss(COUNTS), COUNTS, switch_epoch=1)
        twin = duplicate(schedule)
        twin.step(1)
        torch.testing.assert_close(twin.loss.weight, class_balanced(0.9999))
        assert torch.equal(schedule.loss.weight, torch.ones(C))

    def test_bad_state(self):
        schedule = DeferredReweighting(LDAMLoss(COUNTS), COUNTS, switch_epoch=1)
        with pytest.raises(ValueError, match=re.escape("state_dict: got keys ['epoch'], expected ['beta',")):
            schedule.load_state_dict({"epoch": 1})
        state = DeferredReweighting(LDAMLoss([1, 2]), [1, 2], switch_epoch=1).state_dict()
        with pytest.raises(ValueError, match="state_dict: got 2 classes, expected 4"):
            schedule.load_state_dict(state)


@refused(
    "arguments",
    ({"loss": nn.Linear(2, 2)}, TypeError, "loss: got Linear, expected a module with a `weight` buffer"),
    ({"loss": nn.L1Loss()}, TypeError, "loss: got L1Loss, expected a module with a `weight` buffer"),
    ({"loss": F.cross_entropy}, TypeError, "loss: got function, expected a module with a `weight` buffer"),
    ({"class_counts": [1, 2]}, ValueError, "class_counts: got 2 classes, expected 4 as loss.class_counts"),
    (
        {"loss": nn.CrossEntropyLoss(torch.ones(3))},
        ValueError,
        "class_counts: got 4 classes, expected 3 as loss.weight",
    ),
    ({"switch_epoch": -1}, ValueError, "switch_epoch: got -1, expected an epoch >= 0"),
    ({"switch_epoch": 1.5}, TypeError, "switch_epoch: got float, expected an int"),
    ({"beta": 1.0}, ValueError, "beta: got 1.0, expected 0 <= beta < 1"),
    ({"class_counts": [1, 2, -3, 4]}, ValueError, "class_counts: got -3 at class 2, expected counts >= 0"),
)
def test_bad_construction(arguments, refusal):
    with refusal:
        DeferredReweighting(**{"loss": LDAMLoss(COUNTS), "class_counts": COUNTS, "switch_epoch": 1, **arguments})


@pytest.mark.parametrize("persistent", [True, False])
def test_the_weight_is_where_the_loss_is_and_in_its_dtype(persistent):
    for device, dtype in (("meta", torch.float32), ("cpu", torch.float64)):
        loss = LDAMLoss(COUNTS, device=device, dtype=dtype, persistent=persistent)
        DeferredReweighting(loss, COUNTS, switch_epoch=0)
        assert (loss.weight.device.type, loss.weight.dtype) == (device, dtype)
        assert ("weight" in loss.state_dict()) is persistent


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0, 4.0]], ids=["none", "given"])
def test_a_refused_schedule_leaves_the_loss_as_it_was(weight):
    loss = LDAMLoss(COUNTS, weight=weight)
    with pytest.raises(ValueError, match="class_counts: got 2 classes, expected 4"):
        DeferredReweighting(loss, [1, 2], switch_epoch=1)
    loss.reset_parameters()
    assert weight == (None if loss.weight is None else loss.weight.tolist())


def test_bad_epochs():
    schedule = DeferredReweighting(LDAMLoss(COUNTS), COUNTS, switch_epoch=1)
    with pytest.raises(ValueError, match="epoch: got -1, expected an epoch >= 0"):
        schedule.step(-1)
    with pytest.raises(TypeError, match="epoch: got NoneType, expected an int"):
        schedule.weight(None)


def test_examples_in_docstrings():
    assert doctest.testmod(schedules) == doctest.TestResults(failed=0, attempted=5)
