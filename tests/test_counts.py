"""Every public function that takes class counts reads them alike: vectors in order, mappings and Series by class."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import lt_kernels
from lt_kernels import datasets, losses, metrics, priors, queues, schedules

COUNTS = [7, 300, 2, 40, 1]
C = len(COUNTS)
LABELS = [c for c, n in enumerate(COUNTS) for _ in range(n)]
Z, Y = torch.linspace(-1, 1, 6 * C).view(6, C), torch.tensor([0, 1, 2, 3, 4, 0])


def drw(counts: Any) -> Tensor:
    loss = nn.CrossEntropyLoss()
    schedules.DeferredReweighting(loss, counts, switch_epoch=0)
    return loss.weight


def updated(module: Any, counts: Any) -> nn.Module:
    module.update_counts(counts)
    return module


#: What is made of the counts, by the function that takes them.
CALLS: dict[str, Callable[[Any], Any]] = {
    **{
        f"priors.{name}": getattr(priors, name)
        for name in (
            *("log_prior", "reversed_log_prior", "log_counts", "effective_numbers", "class_balanced_weight"),
            *("ldam_margins", "vs_scales", "arcface_margins", "ride_temperatures", "shot_groups"),
        )
    },
    "priors.ClassPrior": lambda counts: priors.ClassPrior(counts).prior,
    "schedules.DeferredReweighting": drw,
    "queues.ClassQueue": lambda counts: queues.ClassQueue(counts, 64, 3),
    "queues.ClassQueue.update_counts": lambda counts: updated(queues.ClassQueue([1] * C, 64, 3), counts),
    "metrics.ShotGroupAccuracy": lambda counts: metrics.ShotGroupAccuracy(counts).shot_group,
    "metrics.WithinClassSpread": lambda counts: metrics.WithinClassSpread(counts, 3).shot_group,
    "metrics.within_class_spread": lambda counts: list(metrics.within_class_spread(Z, Y, counts).values()),
    **{
        f"losses.{name}": getattr(losses, name)
        for name in (
            *("LogitAdjustmentLoss", "BalancedSoftmaxLoss", "LDAMLoss", "VSLoss", "BalPoELoss", "SADELoss"),
            *("RIDELoss", "NCLLoss", "GMLLoss", "ELMLoss"),
        )
    },
    "losses.PaCoLoss": lambda counts: losses.PaCoLoss(counts, 0.05),
    "losses.BalancedContrastiveLoss": lambda counts: torch.tensor(losses.BalancedContrastiveLoss(counts).num_classes),
    "losses.ArcFaceLoss.from_counts": losses.ArcFaceLoss.from_counts,
    "losses.BalPoELoss.preset": lambda counts: losses.BalPoELoss.preset("inat2018", counts),
    "losses.LinearHead.update_counts": lambda counts: (
        updated(losses.LinearHead(3, C, losses.VSLoss([1] * C)), counts).loss
    ),
    "losses.post_hoc_logit_adjustment": lambda counts: losses.post_hoc_logit_adjustment(Z, counts),
}


def takers() -> set[str]:
    """Every public function, class or method with an argument ``class_counts``; of a class, its constructor."""
    found = set()
    for module in (losses, priors, schedules, queues, metrics, datasets, lt_kernels.functional):
        for name, value in vars(module).items():
            if name[0] == "_" or not str(getattr(value, "__module__", "")).startswith("lt_kernels"):
                continue
            owner = value.__module__.removeprefix("lt_kernels.").partition(".")[0].lstrip("_")
            named = {f"{owner}.{name}": value} if callable(value) else {}
            if inspect.isclass(value):
                for key, method in vars(value).items():
                    method = getattr(method, "__func__", method)
                    if key[0] != "_" and inspect.isfunction(method):
                        named[f"{owner}.{name}.{key}"] = method
            found |= {name for name, f in named.items() if "class_counts" in inspect.signature(f).parameters}
    return found


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, nn.Module):
        return list(value.state_dict().values())
    return value if isinstance(value, list) else [value]


def test_every_taker_has_a_call():
    assert takers() == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_counts_are_read_by_class(name):
    expected = tensors(CALLS[name](COUNTS))
    assert expected
    for counts in (
        torch.tensor(COUNTS),
        {c: COUNTS[c] for c in (3, 1, 4, 0, 2)},
        Counter(reversed(LABELS)),
        pd.Series(LABELS).value_counts(),
        pd.Series(LABELS, dtype="category").value_counts(),
    ):
        for actual, value in zip(tensors(CALLS[name](counts)), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_classes_that_are_not_ints_are_an_error(name):
    for counts in ({"cat": 3, "dog": 2}, pd.Series(["b", "a", "b"]).value_counts()):
        with pytest.raises(TypeError, match=r"class_counts: got '(cat|b)' \(str\) as a class, expected ints 0, 1, ..."):
            CALLS[name](counts)
