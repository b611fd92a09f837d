"""How many launches a call makes on a GPU: the table of maxima."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from _launch_counts import count_launches
from _loss_cases import CASES, Batch
from _loss_cases import COUNTS as CLASS_COUNTS
from torch import Tensor

from lt_kernels import functional as LF
from lt_kernels import losses, queues
from lt_kernels.ops.linear_margin_cross_entropy import op as linear_op

pytestmark = [pytest.mark.backends("triton"), pytest.mark.usefixtures("backend")]

COUNTS = torch.arange(100, 0, -1) * 3.0
RIDE, SHARE = losses.RIDELoss(COUNTS), torch.tensor(0.3)
INPUT, WEIGHT = torch.zeros(64, 32), torch.zeros(100, 32)
FEATURE_QUEUE, CLASS_QUEUE = queues.FeatureQueue(256, 32), queues.ClassQueue(COUNTS, 256, 32)


class Call(NamedTuple):
    call: Callable[[Tensor, Tensor], object]  #: of the experts' logits [E, N, C] and targets
    forward: int  #: launches, at most
    backward: int = 0  #: with autograd's own


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def rows(**options: object) -> Callable[[Tensor, Tensor], object]:
    return lambda logits, target: LF.margin_cross_entropy(leaf(logits[0]), target, **options)


def linear(dtype: torch.dtype = torch.float32, **options: object) -> Callable[[Tensor, Tensor], object]:
    head = leaf(INPUT.to(dtype)), leaf(WEIGHT.to(dtype))
    return lambda _, target: LF.linear_margin_cross_entropy(*head, target, strategy="materialize", **options)


CALLS = {
    "margin CE": Call(lambda logits, target: LF.margin_cross_entropy(leaf(logits[0]), target), 3, 2),
    "logit adjustment": Call(rows(class_bias=COUNTS.log()), 3, 2),
    "LDAM": Call(rows(margin=COUNTS / 600, scale=30.0), 3, 2),
    "a weight": Call(rows(weight=COUNTS), 3, 2),
    "mixup": Call(rows(mixed_target=torch.arange(64), mix_lambda=0.3), 4, 2),
    "angular": Call(rows(margin=0.5, margin_type="angular"), 3, 2),
    "a learned bias": Call(rows(class_bias=leaf(COUNTS)), 3, 4),
    "linear": Call(linear(), 4, 4),
    "linear of bfloat16": Call(linear(torch.bfloat16), 4, 4),
    "linear, class_bias": Call(linear(class_bias=-COUNTS), 4, 4),
    "linear, a frozen weight": Call(lambda _, y: LF.linear_margin_cross_entropy(leaf(INPUT), WEIGHT, y), 4, 3),
    "bias of float64": Call(rows(class_bias=COUNTS.double()), 4, 2),
    "int32 target": Call(lambda z, y: rows()(z, y.int()), 5, 2),
    "probabilities": Call(lambda z, _: rows()(z, z[1].detach()), 3, 2),
    "margins": Call(rows(margin=COUNTS), 4, 2),
    "angles": Call(rows(margin=COUNTS / 100, margin_type="angular"), 7, 2),
    "weight and smoothing": Call(rows(weight=COUNTS, label_smoothing=0.1), 4, 2),
    "a learned scale": Call(rows(scale=leaf(SHARE)), 3, 6),
    "log-sum-exp": Call(lambda z, y: rows(return_lse=True)(z, y).loss, 3, 3),
    "BalPoE": Call(losses.BalPoELoss(COUNTS), 3, 2),
    "RIDE": Call(RIDE, 7, 4),
    "NCL": Call(losses.NCLLoss(COUNTS), 24, 9),
    "RIDE, mixup": Call(lambda z, y: RIDE(z, y, y, SHARE), 8, 4),
    "fusion": Call(lambda logits, _: LF.expert_fusion(logits), 1),
    "fusion, top 5": Call(lambda logits, _: LF.expert_fusion(logits, topk=5), 1),
    "linear_topk": Call(lambda *_: LF.linear_topk(INPUT, WEIGHT, 1), 3),
    "linear_topk, cosines": Call(lambda *_: LF.linear_topk(INPUT, WEIGHT, 5, normalize=True, scale=16.0), 10),
    "linear_topk of bfloat16": Call(lambda *_: LF.linear_topk(INPUT.bfloat16(), WEIGHT.bfloat16(), 5), 5),
    "FeatureQueue.enqueue": Call(lambda _, y: FEATURE_QUEUE.enqueue(INPUT, y), 6),
    "ClassQueue.enqueue": Call(lambda _, y: CLASS_QUEUE.enqueue(INPUT, y), 52),
}

#: Of every loss in ``_loss_cases.py``, in float32 and in bfloat16: launches forward and backward, at most.
LOSSES = {
    "logit-adjustment": (3, 2),
    "balanced-softmax": (3, 2),
    "ldam": (3, 2),
    "vs": (3, 2),
    "arcface-from-counts": (6, 2),
    "cosface": (3, 2),
    "cosface-per-class": (3, 2),
    "arcface": (3, 2),
    "balpoe": (3, 2),
    "sade": (3, 2),
    "ride": (7, 4),
    "ncl": (24, 10),
    "supcon": (5, 4),
    "bcl": (46, 25),
    "paco": (47, 47),
    "gml": (105, 58),
    "elm-pairwise": (52, 53),
    "elm-contrastive": (47, 41),
}


class SupCon:
    """A call of ``supervised_contrastive``."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, width: int = 128, **options: object) -> None:
        self.vectors = [torch.zeros(size, width, dtype=dtype, requires_grad=True) for size in (512, 4096)]
        self.labels = [torch.zeros(size, dtype=torch.int32) for size in (512, 4096)]  # a CPU checks values of int64
        self.options = options

    def __call__(self) -> Tensor:
        return LF.supervised_contrastive(
            *self.vectors, *self.labels, temperature=0.1, exclude="self", normalized=True, **self.options
        )


#: Losses of features, with what their backward pass launches.
FEATURES = {
    "SupCon": (SupCon(), 3, 3),
    "SupCon, in": (SupCon(form="in"), 3, 3),
    "SupCon, positives": (SupCon(reduction="mean_positives"), 3, 3),
    "SupCon, float32": (SupCon(torch.float32), 4, 4),
    "SupCon, wide": (SupCon(width=1024), 4, 4),
}


@pytest.mark.parametrize("name", FEATURES)
def test_launches_of_losses_of_features(name, monkeypatch):
    call, most_forward, most_backward = FEATURES[name]
    forward, backward = count_launches(monkeypatch, call)
    assert len(forward) <= most_forward, forward
    assert len(backward) <= most_backward, backward


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Leave allocations as they are: filling them would count."""


@pytest.mark.parametrize("name", CALLS)
def test_launches(name, monkeypatch):
    call = CALLS[name]
    logits = torch.zeros(3, 64, 100, requires_grad=True)
    target = torch.arange(64)
    monkeypatch.setattr(linear_op, "_check_targets", lambda _: None)  # which the CPU's kernels need, and no GPU's
    forward, backward = count_launches(monkeypatch, lambda: call.call(logits, target))
    assert len(forward) <= call.forward, forward
    assert len(backward) <= call.backward, backward


def batch_of(dtype: torch.dtype) -> Batch:
    """Return an input of every loss, with as many keys as a queue holds."""
    n, m, d, classes = 256, 4096, 64, len(CLASS_COUNTS)
    leaves = {"logits": (n, classes), "experts": (3, n, classes), "embeddings": (n, d), "views": (n, 2, d)}
    made = {name: leaf(torch.zeros(shape, dtype=dtype)) for name, shape in leaves.items()}
    others = {"centers": leaf(torch.zeros(classes, d, dtype=dtype)), "key": torch.zeros(m, d, dtype=dtype)}
    return Batch(**made, **others, target=torch.arange(n) % classes, key_label=torch.arange(m) % classes)


def test_every_loss_is_in_the_table():
    assert set(LOSSES) == set(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_losses(name, dtype, monkeypatch):
    case, batch = CASES[name], batch_of(dtype)
    loss = case.make(CLASS_COUNTS)
    counted = count_launches(monkeypatch, lambda: case.call(loss, batch))
    for launched, most in zip(counted, LOSSES[name], strict=True):
        assert len(launched) <= most, launched
