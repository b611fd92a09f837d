"""Losses of several experts: each against its formula in plain PyTorch, and what is its own."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _loss_cases import COUNTS, OTHER, C
from _loss_dense import check_formula, exact_dtypes, run
from _refused import refused
from torch import Tensor, nn

from lt_kernels.losses import (
    BalPoELoss,
    LDAMLoss,
    LogitAdjustmentLoss,
    NCLLoss,
    RIDELoss,
    SADELoss,
)
from lt_kernels.schedules import DeferredReweighting

E, N = 3, 60  # enough rows for the largest error of one to be typical


def experts_and_target(dtype: torch.dtype = torch.float64, seed: int = 0, experts: int = E) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(experts, N, C, generator=generator, dtype=torch.float64)
    target = torch.randint(0, C, (N,), generator=generator)
    target[:C] = torch.arange(C)  # every class is somebody's target
    return z.to(dtype), target


# ------------------------------------------------------------------------------------------- formulas: [N], one per row


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of each row."""
    return F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)


def balpoe(z: Tensor, y: Tensor, n: Tensor, taus: Any = (0.0, 1.0, 2.0), scale: float = 1.0) -> Tensor:
    log_prior = (n / n.sum() + 1e-9).log()
    return sum(cross_entropy(scale * x + tau * log_prior, y) for x, tau in zip(z, taus, strict=True)) / len(z)


def balpoe_per_class(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return balpoe(z, y, n, per_class_taus().to(z))


def per_class_taus() -> Tensor:
    around = torch.linspace(-1, 1, C, dtype=torch.float64)
    return torch.stack([1 - around, 1 + around, torch.ones(C, dtype=torch.float64)])


def reversed_ranks(prior: Tensor) -> Tensor:
    value, order = prior.sort(stable=True)
    rank = order.argsort()
    return value[len(prior) - 1 - rank]


def sade(z: Tensor, y: Tensor, n: Tensor, tau: float = 2.0) -> Tensor:
    prior = n / n.sum()
    log_prior = (prior + 1e-9).log()
    away = log_prior - tau * (reversed_ranks(prior) + 1e-9).log()
    return cross_entropy(z[0], y) + cross_entropy(z[1] + log_prior, y) + cross_entropy(z[2] + away, y)


def ldam_of_scaled(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    m = n**-0.25
    m = 30 * m * (0.5 / m.max())
    return cross_entropy(torch.where(F.one_hot(y, C).bool(), z - m, z), y)


def ride_diversity(z: Tensor, temperature: Any = 1.0) -> Tensor:
    mean = z.mean(0).detach()
    of_mean = temperature.mean() if isinstance(temperature, Tensor) else temperature
    return of_mean**2 * sum(kl(mean / temperature, x / temperature) for x in z)


def ride(z: Tensor, y: Tensor, n: Tensor, factor: float = -0.2, temperature: Any = 1.0) -> Tensor:
    return sum(ldam_of_scaled(x, y, n) for x in z) + factor * ride_diversity(z, temperature)


def ride_of_the_ensemble(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    return sum(ldam_of_scaled(z.mean(0), y, n) for _ in z)


def nbod(x: Tensor | list[Tensor], eps: float = 0.0) -> Tensor:
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    if eps == 0:
        return sum(kl(x[j], x[i]) for i, j in pairs) / (len(x) - 1)
    p = [each.softmax(1) for each in x]  # the published code
    return sum(F.kl_div((p[i] + eps).log(), p[j], reduction="none").sum(1) for i, j in pairs) / (len(x) - 1)


def ncl_parts(z: Tensor, y: Tensor, n: Tensor, k: int = 3, scale: float = 1.0, eps: float = 0.0) -> list[Tensor]:
    x = [scale * each + n.log() for each in z]
    chosen = z[0].detach().scatter(1, y[:, None], 999999.0).topk(k).indices
    mask = torch.zeros_like(z[0]).scatter(1, chosen, 1.0)
    hard = [each * mask for each in x]
    return [
        sum(cross_entropy(each, y) for each in x),
        sum(cross_entropy(each, y) for each in hard),
        nbod(x, eps),
        nbod(hard, eps),
    ]


def ncl(z: Tensor, y: Tensor, n: Tensor, factors=(1.0, 1.0, 0.6, 0.6), **k: Any) -> Tensor:
    return sum(factor * part for factor, part in zip(factors, ncl_parts(z, y, n, **k), strict=True))


RECIPES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "balpoe": (lambda **k: BalPoELoss(COUNTS, **k), balpoe),
    "balpoe-inat": (lambda **k: BalPoELoss.preset("inat2018", COUNTS, **k), partial(balpoe, taus=(-1.0, 1.0, 3.0))),
    "balpoe-scale": (lambda **k: BalPoELoss(COUNTS, scale=2.5, **k), partial(balpoe, scale=2.5)),
    "balpoe-per-class": (lambda **k: BalPoELoss(COUNTS, per_class_taus(), **k), balpoe_per_class),
    "sade": (lambda **k: SADELoss(COUNTS, **k), sade),
    "sade-inat": (lambda **k: SADELoss(COUNTS, 1.0, **k), partial(sade, tau=1.0)),
    "ride": (lambda **k: RIDELoss(COUNTS, **k), ride),
    "ride-other-numbers": (
        lambda **k: RIDELoss(COUNTS, diversity=-0.45, temperature=2.0, **k),
        partial(ride, factor=-0.45, temperature=2.0),
    ),
    "ride-without-diversity": (lambda **k: RIDELoss(COUNTS, diversity=0.0, **k), ride_of_the_ensemble),
    "ncl": (lambda **k: NCLLoss(COUNTS, **k), ncl),
    "ncl-other-numbers": (
        lambda **k: NCLLoss(COUNTS, 5, 1.5, 0.9, 0.8, 0.7, 0.5, **k),
        partial(ncl, factors=(0.9, 0.8, 0.7, 0.5), k=5, scale=1.5),
    ),
    "ncl-published-eps": (lambda **k: NCLLoss(COUNTS, eps=1e-9, **k), partial(ncl, eps=1e-9)),
    "ncl-large-eps": (lambda **k: NCLLoss(COUNTS, eps=0.1, **k), partial(ncl, eps=0.1)),
    "ncl-cross-entropies": (
        lambda **k: NCLLoss(COUNTS, divergence_factor=0.0, hard_divergence_factor=0.0, **k),
        partial(ncl, factors=(1.0, 1.0, 0.0, 0.0)),
    ),
    "ncl-all-classes": (
        lambda **k: NCLLoss(COUNTS, hard_factor=0.0, hard_divergence_factor=0.0, **k),
        partial(ncl, factors=(1.0, 0.0, 0.6, 0.0)),
    ),
    "ncl-hard-divergence": (
        lambda **k: NCLLoss(COUNTS, ce_factor=0.0, hard_factor=0.0, divergence_factor=0.0, **k),
        partial(ncl, factors=(0.0, 0.0, 0.0, 0.6)),
    ),
}
every_recipe = pytest.mark.parametrize(("make", "formula"), RECIPES.values(), ids=RECIPES.keys())
CLASSES = {"balpoe": BalPoELoss, "sade": SADELoss, "ride": RIDELoss, "ncl": NCLLoss}
every_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES.keys())
LAYOUTS: dict[str, Callable[[Tensor], Tensor | list[Tensor]]] = {
    "stacked": lambda z: z,
    "list": lambda z: list(z.unbind(0)),
    "transposed": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
}


def value_and_gradient(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    value, gradients = run(lambda x: function(x), {"x": z})
    return value, gradients["x"]


@every_recipe
@exact_dtypes
class TestFormula:
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
    def test_mean(self, make, formula, dtype, layout):
        z, y = experts_and_target(dtype)
        loss = make(dtype=dtype)
        check_formula(lambda x: loss(layout(x), y), lambda x, n: formula(x, y, n).mean(), z)

    def test_each_row(self, make, formula, dtype):
        z, y = experts_and_target(dtype, seed=1)
        loss = make(dtype=dtype, reduction="none")
        check_formula(lambda x: loss(x, y), lambda x, n: formula(x, y, n), z)

    def test_sum(self, make, formula, dtype):
        z, y = experts_and_target(dtype, seed=2)
        loss = make(dtype=dtype, reduction="sum")
        check_formula(lambda x: loss(x, y), lambda x, n: formula(x, y, n).sum(), z)


def mixed(formula: Callable[..., Tensor], z: Tensor, y: Tensor, other: Tensor, share: Any, n: Tensor) -> Tensor:
    return share * formula(z, y, n) + (1 - share) * formula(z, other, n)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("ncl")])
@exact_dtypes
def test_mixed_targets(name, dtype):
    make, formula = RECIPES[name]
    z, y = experts_and_target(dtype, seed=4)
    other = y.roll(1)
    loss = make(dtype=dtype)
    check_formula(lambda x: loss(x, y, other, 0.3), lambda x, n: mixed(formula, x, y, other, 0.3, n).mean(), z)
    shares = torch.rand(N, dtype=torch.float64)
    check_formula(
        lambda x: loss(list(x.unbind(0)), y, other, shares.to(dtype)),
        lambda x, n: mixed(formula, x, y, other, shares.to(x), n).mean(),
        z,
    )


@pytest.mark.parametrize("count", [1, 3])
@exact_dtypes
def test_ncl_with_mixed_targets_has_both_among_the_hard_classes(dtype, count):
    z, y = experts_and_target(dtype, seed=5)
    other = y.roll(1)

    def expected(z: Tensor, n: Tensor) -> Tensor:
        x = [each + n.log() for each in z]
        forced = z[0].detach().scatter(1, y[:, None], 1e6).scatter(1, other[:, None], 1e6)
        mask = torch.zeros_like(z[0]).scatter(1, forced.topk(count).indices, 1.0)
        mask = mask.scatter(1, torch.stack([y, other], 1), 1.0)
        hard = [each * mask for each in x]
        rows = 0.6 * nbod(x) + 0.6 * nbod(hard)
        for each in (*x, *hard):
            rows = rows + 0.3 * cross_entropy(each, y) + 0.7 * cross_entropy(each, other)
        return rows.mean()

    loss = NCLLoss(COUNTS, count, dtype=dtype)
    check_formula(lambda x: loss(x, y, other, 0.3), expected, z)


@every_class
def test_smoothing_acts_on_the_cross_entropies_and_ignored_rows_take_no_part(cls):
    z, y = experts_and_target()
    y[::3] = 255
    kept = y != 255
    options = {"ignore_index": 255, "label_smoothing": 0.1, "dtype": torch.float64}
    loss, n = cls(COUNTS, **options), torch.tensor(COUNTS, dtype=torch.float64)

    def smoothed(x: Tensor) -> Tensor:
        return F.cross_entropy(x[kept], y[kept], label_smoothing=0.1)

    log_prior = (n / n.sum() + 1e-9).log()
    if cls is BalPoELoss:
        expected = (smoothed(z[0]) + smoothed(z[1] + log_prior) + smoothed(z[2] + 2 * log_prior)) / 3
    elif cls is SADELoss:
        away = log_prior - 2 * (reversed_ranks(n / n.sum()) + 1e-9).log()
        expected = smoothed(z[0]) + smoothed(z[1] + log_prior) + smoothed(z[2] + away)
    elif cls is RIDELoss:
        m = 15 * n**-0.25 / (n**-0.25).max()
        target = F.one_hot(y.masked_fill(~kept, 0), C).bool()
        expected = sum(smoothed(torch.where(target, x - m, x)) for x in z) - 0.2 * ride_diversity(z)[kept].mean()
    else:
        x = [each + n.log() for each in z]
        forced = torch.where(F.one_hot(y.masked_fill(~kept, 0), C).bool() & kept[:, None], 1e6, z[0])
        mask = torch.zeros_like(z[0]).scatter(1, forced.topk(3).indices, 1.0)
        hard = [each * mask for each in x]
        expected = sum(smoothed(each) for each in (*x, *hard)) + 0.6 * (nbod(x) + nbod(hard))[kept].mean()
    torch.testing.assert_close(loss(z, y), expected)


@exact_dtypes
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_recipe
def test_maps(make, formula, reduction, dtype):
    """[E, 2, C, 5, 6] has the loss of its 60 positions."""
    z, y = experts_and_target(dtype, seed=7)
    loss = make(dtype=dtype, reduction=reduction)
    shape = (2, 5, 6)

    def of_maps(x: Tensor) -> Tensor:
        return loss(x.unflatten(1, shape).movedim(-1, 2), y.view(shape)).flatten()

    check_formula(of_maps, lambda x, n: formula(x, y, n).mean().view(1) if reduction == "mean" else formula(x, y, n), z)
    ignoring = make(dtype=dtype, reduction=reduction, ignore_index=3)
    maps = z.unflatten(1, shape).movedim(-1, 2)
    torch.testing.assert_close(ignoring(maps, y.view(shape)).flatten(), ignoring(z, y).flatten())
    other, share = y.roll(1), torch.linspace(0, 1, N, dtype=dtype)
    pairs = ignoring(list(maps.unbind(0)), y.view(shape), other.view(shape), share.view(shape))
    torch.testing.assert_close(pairs.flatten(), ignoring(z, y, other, share).flatten())


@exact_dtypes
@pytest.mark.parametrize("name", ["balpoe", "balpoe-scale", "balpoe-per-class", "sade"])
def test_class_probabilities(name, dtype):
    """As of timm's Mixup: two classes and a share for every class; cross-entropy is linear in them."""
    make, formula = RECIPES[name]
    z, y = experts_and_target(dtype, seed=8)
    other = y.roll(1)
    one_hot = 0.7 * F.one_hot(y, C).double() + 0.3 * F.one_hot(other, C).double()
    smooth = (0.9 * one_hot + 0.1 / C).to(dtype)

    def expected(x: Tensor, n: Tensor) -> Tensor:
        of_classes = torch.stack([formula(x, torch.full_like(y, c), n) for c in range(C)], 1)
        return (smooth.to(x) * of_classes).sum(1).mean()

    check_formula(lambda x: make(dtype=dtype)(x, smooth), expected, z)


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_other_numbers_of_experts(experts):
    z, y = experts_and_target(experts=experts)
    n = torch.tensor(COUNTS, dtype=torch.float64)
    taus = [1.0] * experts
    torch.testing.assert_close(
        BalPoELoss(COUNTS, taus, dtype=torch.float64)(z, y), balpoe(z, y, n, taus).mean(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(RIDELoss(COUNTS, dtype=torch.float64)(z, y), ride(z, y, n).mean())
    if experts > 1:
        torch.testing.assert_close(NCLLoss(COUNTS, dtype=torch.float64)(z, y), ncl(z, y, n).mean())


def test_a_single_expert_of_ncl_has_no_divergence():
    z, y = experts_and_target(experts=1)
    x = z[0] + torch.tensor(COUNTS, dtype=torch.float64).log()
    mask = torch.zeros_like(x).scatter(1, z[0].scatter(1, y[:, None], 1e6).topk(3).indices, 1.0)
    expected = F.cross_entropy(x, y) + F.cross_entropy(x * mask, y)
    torch.testing.assert_close(NCLLoss(COUNTS, dtype=torch.float64)(z, y), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_recipe
def test_half_precision_logits_lose_nothing_more(make, formula, dtype):
    z, y = experts_and_target(dtype)
    value, gradient = value_and_gradient(lambda x: make()(x, y), z)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    truth, exact = value_and_gradient(lambda x: formula(x, y, torch.tensor(COUNTS, dtype=x.dtype)).mean(), z.double())
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
    largest = exact.abs().max().item()
    tolerance = 4 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- each recipe


class TestBalPoE:
    def test_published_settings(self):
        assert {name: tuple(preset) for name, preset in BalPoELoss.PRESETS.items()} == {
            "cifar100-lt": ((0.0, 1.0, 2.0), 0.4, 128),
            "imagenet-lt": ((0.0, 1.25, 2.5), 0.3, 64),
            "inat2018": ((-1.0, 1.0, 3.0), 0.2, 512),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert BalPoELoss.preset("cifar100-lt", COUNTS).taus == (0.0, 1.0, 2.0)
            loss = BalPoELoss.preset("inat2018", COUNTS, reduction="sum", scale=30.0)
        assert (loss.taus, loss.reduction, loss.scale) == ((-1.0, 1.0, 3.0), "sum", 30.0)

    @pytest.mark.parametrize(
        ("make", "mean"),
        [
            (lambda: BalPoELoss.preset("imagenet-lt", COUNTS), "1.25"),
            (lambda: BalPoELoss(COUNTS, (0.0, 1.0)), "0.5"),
            (lambda: BalPoELoss(COUNTS, torch.cat([per_class_taus()[:, :-1], torch.zeros(E, 1)], 1)), "0"),
        ],
        ids=["imagenet-lt", "two-experts", "one-class"],
    )
    def test_warns_once_of_a_biased_product(self, make, mean):
        with pytest.warns(UserWarning, match=f"taus: got a mean of {mean} over the experts, expected 1") as record:
            loss = make()
        assert len(record) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss.update_counts(OTHER)
            loss.state_dict()

    @pytest.mark.parametrize(
        "taus",
        [[0, 1, 2], (0.0, 1.0, 2.0), np.array([0, 1, 2]), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1, 2])],
        ids=["list", "tuple", "numpy", "tensor", "integers"],
    )
    def test_one_tau_for_each_expert_is_a_number(self, taus):
        assert BalPoELoss(COUNTS, taus).taus == (0.0, 1.0, 2.0)

    @pytest.mark.parametrize("form", [lambda t: t, lambda t: t.numpy(), lambda t: t.tolist()], ids=["t", "np", "list"])
    def test_taus_per_class_are_a_buffer(self, form):
        z, y = experts_and_target(torch.float32)
        loss = BalPoELoss(COUNTS, form(per_class_taus()))
        assert loss.state_dict()["taus"].dtype == torch.float32
        twin = BalPoELoss(OTHER, torch.ones(E, C))
        twin.load_state_dict(loss.state_dict())
        assert torch.equal(twin(z, y), loss(z, y))
        assert loss.half().taus.dtype == torch.float32

    def test_taus_given_as_a_parameter_are_learned(self):
        z, y = experts_and_target(torch.float32)
        taus = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))
        loss = BalPoELoss(COUNTS, taus)
        assert [name for name, _ in loss.named_parameters()] == ["taus"]
        loss(z, y).backward()
        expected = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        balpoe(z.double(), y, torch.tensor(COUNTS, dtype=torch.float64), expected).mean().backward()
        torch.testing.assert_close(taus.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("eps", [1e-9, 0.0])
    @pytest.mark.parametrize("taus", [(0.0, 1.0, 2.0), (-1.0, 1.0, 3.0), per_class_taus()], ids=["0", "-1", "matrix"])
    def test_a_masked_class_leaves_the_softmax_of_every_expert(self, taus, eps):
        z, y = experts_and_target()
        rows = y != C - 1
        options = {"eps": eps, "zero_counts": "mask", "dtype": torch.float64}
        masked = BalPoELoss([*COUNTS[:-1], 0], taus, **options)
        fewer = taus[:, :-1] if isinstance(taus, Tensor) else taus
        without = BalPoELoss(COUNTS[:-1], fewer, **options)
        assert masked.log_prior.isfinite().all()
        torch.testing.assert_close(masked(z[:, rows], y[rows]), without(z[:, rows, :-1], y[rows]))
        assert masked(z[:, ~rows], y[~rows]).item() == math.inf
        gradient = value_and_gradient(lambda x: masked(x, y.clamp_max(C - 2)), z)[1]
        assert not gradient[:, :, -1].any()

    def test_repr_and_state_of_other_forms(self):
        summed = BalPoELoss(COUNTS, reduction="sum")
        assert repr(summed) == "BalPoELoss(num_classes=10, reduction=sum, taus=(0.0, 1.0, 2.0))"
        assert repr(BalPoELoss(COUNTS, per_class_taus())) == "BalPoELoss(num_classes=10, taus=[3, 10])"
        assert "class_bias" in BalPoELoss(COUNTS, zero_counts="mask").state_dict()

    def test_masks_follow_update_counts(self):
        z, y = experts_and_target()
        loss = BalPoELoss(COUNTS, zero_counts="mask", dtype=torch.float64)
        loss.update_counts([*COUNTS[:-1], 0])
        assert loss(z, torch.full_like(y, C - 1)).item() == math.inf
        loss.update_counts(COUNTS)
        assert torch.equal(loss(z, y), BalPoELoss(COUNTS, dtype=torch.float64)(z, y))

    def test_one_expert_with_tau_1_is_logit_adjustment(self):
        z, y = experts_and_target(experts=1)
        ours = BalPoELoss(COUNTS, (1.0,), 0.0, dtype=torch.float64)(z, y)
        torch.testing.assert_close(ours, LogitAdjustmentLoss(COUNTS, dtype=torch.float64)(z[0], y))

    @refused(
        "arguments",
        ({"taus": ()}, ValueError, "taus: got shape (0,), expected [E] or [E, 10]"),
        ({"taus": (0.0, "a")}, TypeError, "taus[1]: got str, expected a number"),
        ({"taus": (0.0, math.nan)}, ValueError, "taus[1]: got nan, expected a finite number"),
        ({"taus": torch.ones(3, 4)}, ValueError, "taus: got shape (3, 4), expected [E] or [E, 10]"),
        ({"taus": torch.ones(2, 3, C)}, ValueError, "taus: got shape (2, 3, 10), expected [E] or [E, 10]"),
        ({"taus": torch.full((2, C), math.inf)}, ValueError, "taus: got values that are not finite"),
        ({"taus": torch.ones(3, dtype=torch.bool)}, TypeError, "taus: got dtype torch.bool, expected integers"),
        ({"taus": [[1.0], [1.0, 2.0]]}, TypeError, "taus: got list"),
        ({"taus": 1.0}, ValueError, "taus: got shape (), expected [E] or [E, 10]"),
        ({"taus": "high"}, TypeError, "taus: got str"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0, expected a number >= 0"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0, expected a number > 0"),
    )
    def test_bad_construction(self, arguments, refusal):
        with refusal:
            BalPoELoss(COUNTS, **arguments)

    def test_unknown_preset(self):
        with pytest.raises(ValueError, match=r"name: got 'places', expected one of 'cifar100-lt', 'imagenet-lt', 'ina"):
            BalPoELoss.preset("places", COUNTS)

    def test_another_number_of_experts(self):
        z, y = experts_and_target()
        with pytest.raises(ValueError, match="taus: got 3 values, expected 2, one for each expert"):
            BalPoELoss(COUNTS)(z[:2], y)


class TestSADE:
    def test_ranks_of_equal_counts_are_those_of_their_order(self):
        loss = SADELoss([5, 5, 1, 9], tau=1.0, eps=0.0, dtype=torch.float64)
        n, reverse = torch.tensor([5.0, 5, 1, 9], dtype=torch.float64), torch.tensor([5.0, 5, 9, 1]).double()
        torch.testing.assert_close(loss.class_bias[2], (n / n.sum()).log() - (reverse / n.sum()).log())
        equal = SADELoss([7] * 6, dtype=torch.float64).class_bias
        torch.testing.assert_close(equal[2], -equal[1])

    def test_masked_classes_are_masked_everywhere_and_the_others_reversed_among_themselves(self):
        z, y = experts_and_target()
        rows = y != 4
        counts = [*COUNTS[:4], 0, *COUNTS[5:]]
        kept = [c for c in range(C) if c != 4]
        masked = SADELoss(counts, zero_counts="mask", dtype=torch.float64)
        without = SADELoss([counts[c] for c in kept], dtype=torch.float64)
        assert (masked.class_bias[:, 4] == -math.inf).all()
        shifted = torch.where(y[rows] > 4, y[rows] - 1, y[rows])
        torch.testing.assert_close(masked(z[:, rows], y[rows]), without(z[:, rows][:, :, kept], shifted))

    @pytest.mark.parametrize("experts", [1, 2, 4])
    def test_needs_three_experts(self, experts):
        z, y = experts_and_target(experts=experts)
        for given in (z, list(z)):
            with pytest.raises(ValueError, match=f"logits: got {experts} experts, expected 3"):
                SADELoss(COUNTS)(given, y)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tau": math.inf}, "tau: got inf, expected a finite number"),
            ({"eps": -1e-9}, "eps: got -1e-09, expected a number >= 0"),
            ({"scale": -30.0}, "scale: got -30.0, expected a number > 0"),
        ],
        ids=["tau", "eps", "scale"],
    )
    def test_bad_construction(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            SADELoss(COUNTS, **arguments)


class TestRIDE:
    @exact_dtypes
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_reweighting_changes_weights_and_temperature(self, dtype, temperature):
        z, y = experts_and_target(dtype)
        loss = RIDELoss(COUNTS, temperature=temperature, dtype=dtype)
        schedule = DeferredReweighting(loss, COUNTS, switch_epoch=160)

        def reweighted(x: Tensor, n: Tensor) -> Tensor:
            weight = (1 - 0.9999) / (1 - 0.9999 ** n.double())
            weight = (weight * (C / weight.sum())).float().to(x)  # the schedule's are float32
            w = C * n / n.sum() * 0.05 + 1 - 0.05
            base = sum((weight[y] * ldam_of_scaled(each, y, n)).sum() / weight[y].sum() for each in x)
            return base - 0.2 * ride_diversity(x, temperature * w / w.max()).mean()

        check_formula(lambda x: loss(x, y), lambda x, n: ride(x, y, n, temperature=temperature).mean(), z)
        schedule.step(160)
        check_formula(lambda x: loss(x, y), reweighted, z)
        schedule.step(0)
        check_formula(lambda x: loss(x, y), lambda x, n: ride(x, y, n, temperature=temperature).mean(), z)

    def test_a_class_without_samples_is_no_reweighting(self):
        z, y = experts_and_target()
        y = y.clamp_max(C - 2)
        loss = RIDELoss([*COUNTS[:-1], 0], zero_counts="mask", dtype=torch.float64)
        expected = loss(z, y)
        schedule = DeferredReweighting(loss, [*COUNTS[:-1], 0], switch_epoch=160, zero_counts="mask")
        schedule.step(0)
        torch.testing.assert_close(loss(z, y), expected)
        schedule.step(160)
        assert not torch.allclose(loss(z, y), expected)

    def test_published_numbers(self):
        loss = RIDELoss(COUNTS)
        assert (loss.scale, loss.diversity, loss.temperature, loss.reweight_factor) == (30.0, -0.2, 1.0, 0.05)
        assert loss.weight is None
        torch.testing.assert_close(loss.margin, 30 * LDAMLoss(COUNTS).margin)
        assert loss.class_temperature.max() == 1.0

    def test_one_expert_without_diversity_is_ldam(self):
        z, y = experts_and_target(experts=1)
        cosines = z / 30
        ours = RIDELoss(COUNTS, diversity=0.0, dtype=torch.float64)(z, y)
        torch.testing.assert_close(ours, LDAMLoss(COUNTS, dtype=torch.float64)(cosines[0], y))

    def test_equal_counts_have_one_temperature(self):
        assert torch.equal(RIDELoss([7] * 5, temperature=1.5).class_temperature, torch.full((5,), 1.5))

    def test_a_class_without_samples_counts_as_the_rarest(self):
        loss = RIDELoss([50, 0, 5], reweight_factor=1.0, zero_counts="mask")
        assert loss.class_temperature[1] == loss.class_temperature[2] > 0
        assert loss.margin[1] == loss.margin[2] == 15

    @refused(
        "logits",
        (3.0, TypeError, "logits: got float, expected a Tensor [E, N, C] or a list of E [N, C]"),
        ([], TypeError, "logits: got list, expected a Tensor [E, N, C]"),
        (torch.zeros(N, C), ValueError, "logits: got shape (60, 10), expected [E, N, C]"),
        (torch.zeros(E, N, C).long(), TypeError, "logits: got dtype torch.int64, expected a floating"),
        ([torch.zeros(N, C), torch.zeros(2, C)], ValueError, "logits[1]: got shape (2, 10), expected (60, 10)"),
    )
    def test_bad_logits_of_the_ensemble(self, logits, refusal):
        with refusal:
            RIDELoss(COUNTS, diversity=0.0)(logits, torch.zeros(N, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_margin": -0.5}, "max_margin: got -0.5, expected a number >= 0"),
            ({"scale": 0.0}, "scale: got 0.0, expected a number > 0"),
            ({"diversity": math.nan}, "diversity: got nan, expected a finite number"),
            ({"temperature": 0.0}, "temperature: got 0.0, expected a number > 0"),
            ({"reweight_factor": 1.5}, "reweight_factor: got 1.5, expected a number in [0, 1]"),
        ],
        ids=["margin", "scale", "diversity", "temperature", "reweight"],
    )
    def test_bad_construction(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            RIDELoss(COUNTS, **arguments)


class TestNCL:
    @pytest.mark.parametrize(("classes", "hard"), [(100, 30), (1000, 300), (8142, 2442), (10, 3), (3, 1), (1, 1)])
    def test_default_number_of_hard_classes(self, classes, hard):
        assert NCLLoss([1] * classes).hard_classes == hard

    def test_gradients_of_the_hard_part_are_of_the_hard_classes(self):
        z, y = experts_and_target()
        loss = NCLLoss(COUNTS, 4, ce_factor=0.0, divergence_factor=0.0, dtype=torch.float64)
        gradient = value_and_gradient(lambda x: loss(x, y), z)[1]
        assert ((gradient != 0).sum(-1) == 4).all()
        hard = (gradient != 0)[0]
        assert (hard == (gradient != 0)).all()  # the same for all experts
        assert hard[torch.arange(N), y].all()
        others = z[0].scatter(1, y[:, None], -math.inf).topk(3).indices  # of the first expert, without the prior
        assert hard.gather(1, others).all()

    @pytest.mark.parametrize("eps", [0.0, 1e-9])
    def test_a_masked_class_takes_no_part(self, eps):
        z, y = experts_and_target()
        y = y.clamp_max(C - 2)
        z[0, :, -1] = 50.0  # the hardest of all, were it not masked
        masked = NCLLoss([*COUNTS[:-1], 0], 3, eps=eps, zero_counts="mask", dtype=torch.float64)
        without = NCLLoss(COUNTS[:-1], 3, eps=eps, dtype=torch.float64)
        torch.testing.assert_close(masked(z, y), without(z[:, :, :-1], y))
        gradient = value_and_gradient(lambda x: masked(x, y), z)[1]
        assert gradient.isfinite().all()
        assert not gradient[:, :, -1].any()

    @refused(
        "arguments",
        ({"hard_classes": 0}, ValueError, "hard_classes: got 0, expected 1 to 10, the number of classes"),
        ({"hard_classes": 11}, ValueError, "hard_classes: got 11, expected 1 to 10, the number of classes"),
        ({"hard_classes": 2.0}, TypeError, "hard_classes: got float, expected an int or None"),
        ({"ce_factor": math.nan}, ValueError, "ce_factor: got nan, expected a finite number"),
        ({"eps": -1e-9}, ValueError, "eps: got -1e-09, expected a number >= 0"),
        ({"hard_factor": "1"}, TypeError, "hard_factor: got str, expected a number"),
        ({"divergence_factor": math.inf}, ValueError, "divergence_factor: got inf, expected a finite number"),
        ({"hard_divergence_factor": None}, TypeError, "hard_divergence_factor: got NoneType, expected a number"),
    )
    def test_bad_construction(self, arguments, refusal):
        with refusal:
            NCLLoss(COUNTS, **arguments)


# ------------------------------------------------------------------------------------------------------------ bad calls

X, Y = experts_and_target()


@pytest.mark.parametrize(
    ("cls", "options"),
    [(RIDELoss, {}), (RIDELoss, {"diversity": 0.0}), (NCLLoss, {})],
    ids=["ride", "ride's ensemble", "ncl"],
)
def test_probabilities_where_classes_are_needed(cls, options):
    message = "target: got dtype torch.float64, expected class indices of an integer dtype, as (RIDE|NCL)'s"
    with pytest.raises(TypeError, match=message):
        cls(COUNTS, **options)(X, X[0].softmax(1))


@every_class
@refused(
    "logits, target, mix",
    (X[:, :, :4], Y, {}, ValueError, "expected"),
    (X[0], Y, {}, ValueError, "logits: got shape (60, 10), expected [E, N, C]"),
    ([X[0], X[1, :3], X[2]], Y, {}, ValueError, "logits[1]: got shape (3, 10), expected (60, 10)"),
    (X.long(), Y, {}, TypeError, "logits: got dtype torch.int64"),
    (None, Y, {}, TypeError, "logits: got NoneType"),
    (X, Y + C, {}, IndexError, "target: row 0 has class"),
    (X, Y[:3], {}, ValueError, "target: got class indices of shape (3,)"),
    (X, Y, {"mix_lambda": 0.5}, ValueError, "mixed_target: got None with mix_lambda"),
    (X, Y, {"mixed_target": Y}, ValueError, "mix_lambda: got None with mixed_target"),
    (X, Y, {"mixed_target": Y - C, "mix_lambda": 0.5}, IndexError, "mixed_target: row 0 has class"),
)
def test_bad_calls(cls, logits, target, mix, refusal):
    with refusal:
        cls(COUNTS)(logits, target, **mix)
