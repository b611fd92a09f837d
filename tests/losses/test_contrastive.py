"""Contrastive losses: each against its published definition with dense masks, and what is its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import COUNTS, OTHER, C, D, M, N
from torch import Tensor, nn

import lt_kernels
from lt_kernels.losses import (
    BalancedContrastiveLoss,
    ELMLoss,
    GMLLoss,
    PaCoLoss,
    SupConLoss,
    elm,
    sample_pixels,
)
from lt_kernels.queues import ClassQueue
from lt_kernels.testing import assert_within_budget

INAT = [1000.0 / (c + 1) + 2 for c in range(8142)]

Leaves = dict[str, Tensor]


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def random_labels(size: int, classes: int, seed: int) -> Tensor:
    return torch.randint(0, classes, (size,), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ published definitions, with masks


def supcon(z: Tensor, y: Tensor, temperature: float = 0.07, form: str = "out") -> Tensor:
    """[N V]: views in order of samples; 0 without positives."""
    k, label = z.flatten(0, 1), y.repeat_interleave(z.shape[1])
    s = k @ k.T / temperature
    own = torch.eye(len(k), dtype=torch.bool)
    positive = (label[:, None] == label) & ~own
    log_p = s - s.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    if form == "out":
        row = -(positive * log_p).sum(1) / count.clamp_min(1)
    else:
        row = count.clamp_min(1).to(z).log() - log_p.masked_fill(~positive, -1e4).logsumexp(1)
    return torch.where(count > 0, row, 0.0)


def balanced(z: Tensor, y: Tensor, centers: Tensor, temperature: float = 0.07) -> Tensor:
    views = z.flatten(0, 1)
    label = torch.cat([y.repeat_interleave(z.shape[1]), torch.arange(len(centers))])
    s = views @ torch.cat([views, centers]).T / temperature
    other = ~torch.eye(len(views), len(label), dtype=torch.bool)
    peak = s.amax(1, keepdim=True).detach()
    none = z.new_zeros(len(views), len(centers))
    mean = none.index_add(1, label, (s - peak).exp() * other) / none.index_add(1, label, other.to(z))
    positive = (label[: len(views), None] == label) & other
    return mean.sum(1).log() + peak[:, 0] - (positive * s).sum(1) / positive.sum(1)


def paco(
    query: Tensor,
    key: Tensor,
    logits: Tensor,
    y: Tensor,
    l: Tensor,  # noqa: E741
    n: Tensor | None,
    alpha: float,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 0.2,
    supt: float = 1.0,
    own: Tensor | None = None,
    smooth: float = 0.0,
) -> Tensor:
    classes = logits.shape[1]
    v = (logits if n is None else logits + (n / n.sum() + 1e-9).log()) / supt
    u = torch.cat([v, query @ key.T / temperature], 1)
    allowed = (l >= 0).expand(len(query), -1)
    if own is not None:
        allowed = allowed & (torch.arange(len(key)) != own[:, None])
    target = F.one_hot(y, classes).to(u)
    target = smooth / (classes - 1) * (1 - target) + (1 - smooth) * target
    mask = torch.cat([beta * target, alpha * ((y[:, None] == l) & allowed).to(u)], 1)
    peak = u.amax(1, keepdim=True).detach()
    weight = torch.cat([torch.ones_like(v), gamma * allowed.to(u)], 1)
    log_p = u - peak - ((u - peak).exp() * weight).sum(1, keepdim=True).log()
    return -(mask * log_p).sum(1) / mask.sum(1)


def class_means(s: Tensor, keep: Tensor, l: Tensor, classes: int) -> tuple[Tensor, Tensor]:  # noqa: E741
    """log of the mean of exp(s) over the kept keys of each class, -inf where there are none; and how many."""
    member = F.one_hot(l.clamp_min(0), classes).to(s) * (l >= 0)[:, None]
    peak = s.amax(1, keepdim=True).detach()
    total, count = ((s - peak).exp() * keep) @ member, keep.to(s) @ member
    mean = total / count.clamp_min(1)
    return torch.where(count > 0, torch.where(count > 0, mean, 1.0).log() + peak, -math.inf), count


def of_class_means(s: Tensor, keep: Tensor, y: Tensor, l: Tensor, log_prior: Tensor) -> Tensor:  # noqa: E741
    mean, count = class_means(s, keep, l, len(log_prior))
    has = count.gather(1, y[:, None])[:, 0] > 0
    logits = mean + log_prior
    logits = torch.where(has[:, None], logits, 0.0)
    return torch.where(has, F.cross_entropy(logits, y, reduction="none"), 0.0)


def gml_terms(
    query: Tensor,
    key: Tensor,
    log_t: Tensor,
    cosines: Tensor,
    y: Tensor,
    l: Tensor,  # noqa: E741
    n: Tensor,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    log_prior = (n / n.sum()).log()
    every = torch.ones(len(query), len(key), dtype=torch.bool)
    others = every if own is None else torch.arange(len(key)) != own[:, None]
    s = query @ key.T
    con = of_class_means(s / log_t.exp().detach(), every, y, l, log_prior)
    con_temperature = of_class_means(s.detach() / log_t.exp(), others, y, l, log_prior)
    return F.cross_entropy(30 * cosines + log_prior, y, reduction="none"), con, con_temperature


def gml(beta: float = 1.0, gamma: float = 1.0, **k: Any) -> Tensor:
    sup, con, con_temperature = gml_terms(**k)
    return gamma * sup + beta * (con + con_temperature)


def regularizer(
    name: str,
    z: Tensor,
    key: Tensor,
    y: Tensor,
    l: Tensor,  # noqa: E741
    own: Tensor | None,
    delta: Tensor,
    bias: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    z, key = F.normalize(z, dim=1), F.normalize(key, dim=1)
    s = z @ key.T / temperature
    allowed = (l >= 0).expand(len(z), -1)
    if own is not None:
        allowed = allowed & (torch.arange(len(key)) != own[:, None])
    positive, negative = (y[:, None] == l) & allowed, (y[:, None] != l) & allowed
    count = positive.sum(1)
    if name == "pairwise":
        apart = s[:, :, None] - s[:, None, :] + delta[y][:, None, None]  # row, negative, positive
        apart = apart.masked_fill(~negative[:, :, None], -math.inf)
        each = torch.cat([torch.zeros_like(apart[:, :1]), apart], 1).logsumexp(1)
        row = torch.where(positive, each, 0.0).sum(1)
    elif name == "contrastive":
        shift = bias[l.clamp_min(0)] - bias[y][:, None] + delta[y][:, None]
        u = torch.where(negative, s + shift, s).masked_fill(~allowed, -math.inf)
        row = torch.where(positive, u.logsumexp(1, keepdim=True) - s, 0.0).sum(1)
    else:
        row = delta[y] * ((z[:, None] - key).square().sum(2) * positive).sum(1)
    return torch.where(count > 0, row / count.clamp_min(1), 0.0)


def ldam(n: Tensor, largest: float = 0.5) -> Tensor:
    return largest * n**-0.25 / (n**-0.25).max()


# ------------------------------------------------------------------------------------------------------------ the check


def run(function: Callable[..., Tensor], leaves: Leaves) -> tuple[Tensor, Leaves]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    value = function(**leaves)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    gradients = torch.autograd.grad((value * upstream).sum(), list(leaves.values()), allow_unused=True)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return value.detach(), {k: zeros[k] if g is None else g for k, g in zip(leaves, gradients, strict=True)}


def check(loss: Callable[..., Tensor], dense: Callable[..., Tensor], dtype: torch.dtype, **leaves: Tensor) -> None:
    """Value and every gradient against the dense definition in float64; its own error in ``dtype`` beside.

    Similarities of half-precision vectors are products in that dtype, whose roundings the value may show too.
    """
    given = {name: value.to(dtype) for name, value in leaves.items()}
    value, gradients = run(loss, given)
    eager, of_eager = run(dense, given)
    truth, exact = run(dense, {name: leaf.double() for name, leaf in given.items()})
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype in (torch.bfloat16, torch.float16)
    roundings = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if half else None
    assert_within_budget(value, eager, truth, "value", roundings=roundings)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_within_budget(gradient, of_eager[name], exact[name], f"gradient of {name}")


every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["fp64", "fp32", "bf16", "fp16"]
)
exact_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def counts_like(values: Any, x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(x)


# --------------------------------------------------------------------------------------------------------------- SupCon


class TestSupCon:
    @every_dtype
    @pytest.mark.parametrize("form", ["out", "in"])
    def test_two_views(self, backend, dtype, form):
        z, y = unit(N, 2, D, seed=0), random_labels(N, C, 1)
        loss = SupConLoss(0.1, form=form)
        check(lambda z: loss(z, y), lambda z: supcon(z, y, 0.1, form).mean(), dtype, z=z)

    @exact_dtypes
    @pytest.mark.parametrize("views", [1, 3])
    def test_rows(self, backend, dtype, views):
        z, y = unit(N, views, D, seed=2), random_labels(N, 30, 3)
        loss = SupConLoss(reduction="none")
        check(lambda z: loss(z, y), lambda z: supcon(z, y).view(N, views), dtype, z=z)

    @exact_dtypes
    def test_flat_features(self, backend, dtype):
        z, y = unit(N, D, seed=4), random_labels(N, C, 5)
        check(lambda z: SupConLoss()(z, y), lambda z: supcon(z[:, None], y).mean(), dtype, z=z)
        rows = SupConLoss(reduction="none")(z, y)
        torch.testing.assert_close(rows, supcon(z[:, None], y))

    @exact_dtypes
    def test_one_view_of_each_sample_as_anchor(self, backend, dtype):
        z, y = unit(N, 3, D, seed=6), random_labels(N, C, 7)
        loss = SupConLoss(contrast_mode="one", reduction="none")
        check(lambda z: loss(z, y), lambda z: supcon(z, y).view(N, 3)[:, 0], dtype, z=z)
        single = SupConLoss(contrast_mode="one")(z[:, :1], y)
        torch.testing.assert_close(single, supcon(z[:, :1], y).mean())

    @exact_dtypes
    def test_without_labels_it_is_simclr(self, backend, dtype):
        z = unit(N, 2, D, seed=8)

        def simclr(z: Tensor) -> Tensor:
            first, second = z.unbind(1)
            both = torch.cat([first, second]) @ torch.cat([first, second]).T / 0.5
            both = both.masked_fill(torch.eye(2 * N, dtype=torch.bool), -math.inf)
            return F.cross_entropy(both, torch.arange(2 * N).roll(N))

        check(lambda z: SupConLoss(0.5)(z), simclr, dtype, z=z)

    def test_anchors_without_positives_are_zero_and_count(self, backend):
        z = unit(5, 1, D, seed=9)
        y = torch.tensor([0, 1, 2, 1, 3])
        rows = SupConLoss(reduction="none")(z, y)[:, 0]
        assert (rows != 0).tolist() == [False, True, False, True, False]
        torch.testing.assert_close(SupConLoss()(z, y), rows.sum() / 5)
        value, gradients = run(lambda z: SupConLoss()(z, torch.arange(5)), {"z": z})
        assert value == 0
        assert not gradients["z"].any()
        for form in ("out", "in"):
            value, gradients = run(lambda z, form=form: SupConLoss(form=form)(z, y[:1]), {"z": z[:1]})
            assert value == 0
            assert not gradients["z"].any()

    def test_base_temperature_and_normalize(self, backend):
        z, y = 3 * unit(N, 2, D, seed=10), random_labels(N, C, 11)
        plain = SupConLoss(0.1)(F.normalize(z, dim=-1), y)
        torch.testing.assert_close(SupConLoss(0.1, 0.07, normalize=True)(z, y), plain * (0.1 / 0.07))
        torch.testing.assert_close(SupConLoss(0.07, 0.07)(z, y), SupConLoss(0.07)(z, y), rtol=0, atol=0)

    def test_repr(self):
        assert repr(SupConLoss(form="in", reduction="sum")) == "SupConLoss(temperature=0.07, form=in, reduction=sum)"

    def test_checks_pass_normalized_bfloat16(self):
        lt_kernels.set_checks(True)
        try:
            z = 3 * unit(N, 2, D, seed=105).bfloat16()
            assert SupConLoss(normalize=True)(z, random_labels(N, C, 102)).isfinite()
        finally:
            lt_kernels.set_checks(False)

    def test_sum(self, backend):
        z, y = unit(N, 2, D, seed=12), random_labels(N, C, 13)
        torch.testing.assert_close(SupConLoss(reduction="sum")(z, y), supcon(z, y).sum())

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a number > 0"),
            ({"temperature": "1"}, TypeError, "temperature: got str, expected a number"),
            ({"base_temperature": -1}, ValueError, "base_temperature: got -1, expected a number > 0"),
            ({"contrast_mode": "two"}, ValueError, "contrast_mode: got 'two', expected one of 'all', 'one'"),
            ({"form": "mid"}, ValueError, "form: got 'mid', expected one of 'out', 'in'"),
            ({"normalize": 1}, TypeError, "normalize: got int, expected a bool"),
            ({"reduction": "avg"}, ValueError, "reduction: got 'avg', expected one of 'none', 'mean', 'sum'"),
        ],
        ids=["zero", "str", "base", "mode", "form", "normalize", "reduction"],
    )
    def test_bad_construction(self, arguments, error, message):
        with pytest.raises(error, match=re.escape(message)):
            SupConLoss(**arguments)

    @pytest.mark.parametrize(
        ("features", "labels", "error", "message"),
        [
            (None, None, TypeError, "features: got NoneType, expected a Tensor [N, V, D]"),
            (torch.zeros(3), None, ValueError, "features: got shape (3,), expected [N, V, D]"),
            (torch.zeros(3, 2, 2, 2), None, ValueError, "features: got shape (3, 2, 2, 2), expected [N, V, D]"),
            (torch.zeros(3, 2).long(), None, TypeError, "features: got dtype torch.int64"),
            (torch.zeros(3, 2, 4), torch.zeros(6).long(), ValueError, "labels: got shape (6,), expected (3,)"),
            (torch.zeros(3, 2, 4), torch.zeros(3), TypeError, "labels: got dtype torch.float32, expected an integer"),
            (torch.zeros(3, 2, 4), [0, 1, 2], TypeError, "labels: got list, expected a Tensor of integers"),
            (
                torch.zeros(3, 4, device="meta"),
                torch.zeros(3).long(),
                ValueError,
                "labels: got device cpu, expected me",
            ),
        ],
        ids=["none", "1d", "4d", "integers", "length", "float-labels", "list", "device"],
    )
    def test_bad_calls(self, features, labels, error, message):
        with pytest.raises(error, match=re.escape(message)):
            SupConLoss()(features, labels)


# ------------------------------------------------------------------------------------------------------------------ BCL


class TestBalancedContrastive:
    @every_dtype
    def test_mean(self, backend, dtype):
        z, y, centers = unit(N, 2, D, seed=0), random_labels(N, 6, 1), unit(C, D, seed=2)  # 4 classes by centres alone
        loss = BalancedContrastiveLoss(COUNTS, 0.1)
        check(
            lambda z, centers: loss(z, y, centers),
            lambda z, centers: balanced(z, y, centers, 0.1).mean(),
            dtype,
            z=z,
            centers=centers,
        )

    @exact_dtypes
    @pytest.mark.parametrize("views", [1, 3])
    def test_rows(self, backend, dtype, views):
        z, y, centers = unit(N, views, D, seed=3), random_labels(N, C, 4), unit(C, D, seed=5)
        loss = BalancedContrastiveLoss(COUNTS, reduction="none")
        check(
            lambda z, centers: loss(z, y, centers),
            lambda z, centers: balanced(z, y, centers).view(N, views),
            dtype,
            z=z,
            centers=centers,
        )

    @exact_dtypes
    def test_as_many_classes_as_inaturalist(self, backend, dtype):
        z, y, centers = unit(7, 2, D, seed=6), random_labels(7, 8142, 7), unit(8142, D, seed=8)
        loss = BalancedContrastiveLoss(INAT)
        check(
            lambda z, centers: loss(z, y, centers),
            lambda z, centers: balanced(z, y, centers).mean(),
            dtype,
            z=z,
            centers=centers,
        )

    @pytest.mark.parametrize("classes", [1, 3])
    def test_a_single_sample(self, backend, classes):
        z, y, centers = unit(1, 2, D, seed=9), torch.tensor([0]), unit(classes, D, seed=10)
        check(
            lambda z, centers: BalancedContrastiveLoss([5] * classes)(z, y, centers),
            lambda z, centers: balanced(z, y, centers).mean(),
            torch.float64,
            z=z,
            centers=centers,
        )

    def test_sum_and_learned_centers_in_another_dtype(self, backend):
        z, y, centers = unit(N, 2, D, seed=11).bfloat16(), random_labels(N, C, 12), unit(C, D, seed=13).float()
        centers.requires_grad_()
        value = BalancedContrastiveLoss(COUNTS, reduction="sum")(z, y, centers)
        truth = balanced(z.double(), y, centers.bfloat16().double()).sum()
        torch.testing.assert_close(value.double(), truth, rtol=2e-2, atol=0)
        value.backward()
        assert centers.grad.dtype == torch.float32

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"features": torch.zeros(3, D)}, ValueError, "features: got shape (3, 19), expected [N, V, D]"),
            ({"features": None}, TypeError, "features: got NoneType"),
            ({"labels": torch.tensor([0, 1])}, ValueError, "labels: got shape (2,), expected (3,)"),
            ({"labels": torch.tensor([0, 1, C])}, IndexError, "labels: row 2 has class 10, expected 0 <= class < 10"),
            ({"labels": torch.tensor([0, -1, 1])}, IndexError, "labels: row 1 has class -1, expected 0 <= class < 10"),
            ({"labels": torch.zeros(3)}, TypeError, "labels: got dtype torch.float32, expected an integer dtype"),
            ({"centers": torch.zeros(C, D + 1)}, ValueError, "centers: got shape (10, 20), expected (10, 19)"),
            ({"centers": torch.zeros(C - 1, D)}, ValueError, "centers: got shape (9, 19), expected (10, 19)"),
            ({"centers": torch.zeros(C, D, device="meta")}, ValueError, "centers: got device meta, expected cpu"),
            ({"centers": torch.zeros(C, D).long()}, TypeError, "centers: got dtype torch.int64"),
        ],
        ids=["2d", "none", "length", "class", "minus-one", "float", "width", "classes", "device", "integers"],
    )
    def test_bad_calls(self, change, error, message):
        given = {"features": torch.zeros(3, 2, D), "labels": torch.zeros(3).long(), "centers": torch.zeros(C, D)}
        with pytest.raises(error, match=re.escape(message)):
            BalancedContrastiveLoss(COUNTS)(**{**given, **change})

    def test_bad_construction(self):
        for arguments, message in (
            ({"class_counts": [1, -1]}, "class_counts: got -1"),
            ({"class_counts": COUNTS, "temperature": -0.1}, "temperature: got -0.1, expected a number > 0"),
            ({"class_counts": COUNTS, "reduction": "avg"}, "reduction: got 'avg'"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                BalancedContrastiveLoss(**arguments)


# ----------------------------------------------------------------------------------------------------------------- PaCo


def paco_inputs(rows: int = N, keys: int = M, classes: int = C, seed: int = 0) -> tuple[Leaves, Tensor, Tensor]:
    leaves = {
        "query": unit(rows, D, seed=seed),
        "key": unit(keys, D, seed=seed + 1),
        "logits": 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).double(),
    }
    y, l = random_labels(rows, classes, seed + 2), random_labels(keys, classes, seed + 3)  # noqa: E741
    l[: min(rows, keys)] = y[: min(rows, keys)]
    return leaves, y, l


PACO_OPTIONS = {
    "imagenet": {"alpha": 0.05},
    "other-numbers": {"alpha": 0.3, "beta": 0.7, "gamma": 0.4, "temperature": 0.07, "supt": 2.0},
    "no-keys-in-the-denominator": {"alpha": 0.1, "gamma": 0.0},
    "no-positives-weighed": {"alpha": 0.0},
}


class TestPaCo:
    @every_dtype
    @pytest.mark.parametrize("options", PACO_OPTIONS.values(), ids=PACO_OPTIONS.keys())
    def test_mean(self, backend, dtype, options):
        leaves, y, l = paco_inputs()  # noqa: E741
        l[-9:] = -1  # empty slots
        own = torch.arange(N)
        own[3] = -1
        loss = PaCoLoss(COUNTS, **options, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        check(
            lambda query, key, logits: loss(query, y, key, l, logits, exclude=own),
            lambda query, key, logits: paco(
                query, key, logits, y, l, counts_like(COUNTS, query), own=own, **options
            ).mean(),
            dtype,
            **leaves,
        )

    @exact_dtypes
    def test_rows_without_exclusion(self, backend, dtype):
        leaves, y, l = paco_inputs(seed=5)  # noqa: E741
        loss = PaCoLoss(COUNTS, 0.05, reduction="none", dtype=dtype)
        check(
            lambda query, key, logits: loss(query, y, key, l, logits),
            lambda query, key, logits: paco(query, key, logits, y, l, counts_like(COUNTS, query), 0.05),
            dtype,
            **leaves,
        )

    @exact_dtypes
    @pytest.mark.parametrize("smooth", [0.1, 0.9])
    def test_label_smoothing_and_no_prior_are_gpaco(self, backend, dtype, smooth):
        leaves, y, l = paco_inputs(seed=6)  # noqa: E741
        loss = PaCoLoss(None, 0.05, supt=0.5, label_smoothing=smooth, reduction="sum", dtype=dtype)
        check(
            lambda query, key, logits: loss(query, y, key, l, logits, exclude="self"),
            lambda query, key, logits: paco(
                query, key, logits, y, l, None, 0.05, supt=0.5, own=torch.arange(N), smooth=smooth
            ).sum(),
            dtype,
            **leaves,
        )

    @exact_dtypes
    def test_as_many_classes_as_inaturalist(self, backend, dtype):
        leaves, y, l = paco_inputs(7, 40, 8142)  # noqa: E741
        loss = PaCoLoss(INAT, 0.05, dtype=dtype)
        check(
            lambda query, key, logits: loss(query, y, key, l, logits, exclude="self"),
            lambda query, key, logits: paco(
                query, key, logits, y, l, counts_like(INAT, query), 0.05, own=torch.arange(7)
            ).mean(),
            dtype,
            **leaves,
        )

    @exact_dtypes
    @pytest.mark.parametrize("all_views", [False, True], ids=["paco", "gpaco"])
    def test_two_views_with_a_queue(self, backend, dtype, all_views):
        z, y = unit(N, 2, D, seed=7), random_labels(N, C, 8)
        logits = torch.randn(N, 2, C, generator=torch.Generator().manual_seed(9)).double()
        queue, l = unit(M, D, seed=10), random_labels(M, C, 11)  # noqa: E741
        l[:20] = -1
        loss = PaCoLoss(COUNTS, 0.05, dtype=dtype)

        def published(z: Tensor, logits: Tensor) -> Tensor:
            first, second = z.unbind(1)
            key, label = torch.cat([first, second, queue.to(z)]), torch.cat([y, y, l])
            n = counts_like(COUNTS, z)
            if not all_views:
                return paco(first, key, logits, y, label, n, 0.05, own=torch.arange(N)).mean()
            both = torch.cat(logits.unbind(1))
            return paco(key[: 2 * N], key, both, label[: 2 * N], label, n, 0.05, own=torch.arange(2 * N)).mean()

        check(
            lambda z, logits: loss.two_views(z, y, logits, queue.to(z), l),
            published,
            dtype,
            z=z,
            logits=logits if all_views else logits[:, 0],
        )

    def test_queue_receives_no_gradient(self, backend):
        z, queue = unit(4, 2, D, seed=0), unit(M, D, seed=1).requires_grad_()
        loss = PaCoLoss(COUNTS, 0.05)
        value = loss.two_views(
            z.requires_grad_(), torch.zeros(4).long(), torch.zeros(4, C), queue, torch.zeros(M).long()
        )
        value.backward()
        assert queue.grad is None
        assert z.grad.abs().sum() > 0

    def test_one_sample_and_no_keys(self, backend):
        leaves, y, _ = paco_inputs(1, 1)
        none = torch.tensor([-1])
        loss = PaCoLoss(COUNTS, 0.05, dtype=torch.float64)
        value, gradients = run(lambda query, key, logits: loss(query, y, key, none, logits), leaves)
        n = torch.tensor(COUNTS).double()
        torch.testing.assert_close(value, F.cross_entropy(leaves["logits"] + (n / n.sum() + 1e-9).log(), y))
        assert gradients["logits"].isfinite().all()
        assert not gradients["key"].any()
        empty = loss(leaves["query"], y, leaves["key"][:0], y[:0], leaves["logits"])
        torch.testing.assert_close(empty, value)

    def test_nothing_to_attract_is_zero(self, backend):
        leaves, y, _ = paco_inputs(1, 3)
        l = (y + 1).expand(3) % C  # noqa: E741
        value, gradients = run(
            lambda query, key, logits: PaCoLoss(COUNTS, 0.05, beta=0.0)(query, y, key, l, logits), leaves
        )
        assert value == 0
        assert not any(gradient.any() for gradient in gradients.values())

    def test_ignored_queries(self, backend):
        leaves, y, l = paco_inputs()  # noqa: E741
        y[::3] = -100
        kept = y != -100
        loss, rows = PaCoLoss(COUNTS, 0.05, dtype=torch.float64), PaCoLoss(COUNTS, 0.05, reduction="none").double()
        value, gradients = run(lambda query, key, logits: loss(query, y, key, l, logits), leaves)
        subset = loss(leaves["query"][kept], y[kept], leaves["key"], l, leaves["logits"][kept])
        torch.testing.assert_close(value, subset)
        assert not gradients["query"][~kept].any()
        assert not gradients["logits"][~kept].any()
        assert not rows(leaves["query"], y, leaves["key"], l, leaves["logits"])[~kept].any()

    def test_repr(self):
        numbers = "alpha=0.05, beta=1.0, gamma=1.0, temperature=0.2"
        assert repr(PaCoLoss(COUNTS, 0.05, reduction="sum")) == f"PaCoLoss(num_classes=10, reduction=sum, {numbers})"
        assert repr(PaCoLoss(None, 0.05)) == f"PaCoLoss({numbers})"

    def test_key_grad_rows(self, backend):
        leaves, y, l = paco_inputs()  # noqa: E741
        loss = PaCoLoss(COUNTS, 0.05)
        _, whole = run(lambda query, key, logits: loss(query, y, key, l, logits), leaves)
        _, part = run(lambda query, key, logits: loss(query, y, key, l, logits, key_grad_rows=(0, 10)), leaves)
        torch.testing.assert_close(part["key"][:10], whole["key"][:10])
        assert not part["key"][10:].any()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"temperature": 0}, ValueError, "temperature: got 0, expected a number > 0"),
            ({"supt": -1.0}, ValueError, "supt: got -1.0, expected a number > 0"),
            ({"alpha": -0.1}, ValueError, "alpha: got -0.1, expected a number >= 0"),
            ({"beta": math.nan}, ValueError, "beta: got nan, expected a number >= 0"),
            ({"gamma": "1"}, TypeError, "gamma: got str, expected a number"),
            ({"eps": -1}, ValueError, "eps: got -1, expected a number >= 0"),
            ({"label_smoothing": 1.0}, ValueError, "label_smoothing: got 1.0, expected a number in [0, 1)"),
            ({"class_counts": [1, 0]}, ValueError, "class_counts: got 0 for 1 of 2 classes"),
            ({"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_bad_construction(self, change, error, message):
        with pytest.raises(error, match=re.escape(message)):
            PaCoLoss(**{"class_counts": COUNTS, "alpha": 0.05, **change})

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"query": None}, TypeError, "query: got NoneType, expected a Tensor [N, D]"),
            ({"query": torch.zeros(3, 2, D)}, ValueError, "query: got shape (3, 2, 19), expected [N, D]"),
            ({"key": torch.zeros(5, D + 1)}, ValueError, "key: got 20 features (shape (5, 20)), expected 19 as query"),
            ({"key": torch.zeros(5, D).long()}, TypeError, "key: got dtype torch.int64"),
            ({"logits": torch.zeros(2, C)}, ValueError, "logits: got shape (2, 10), expected [3, C]"),
            ({"logits": torch.zeros(3, C + 1)}, ValueError, "logits: got 11 classes, expected 10 as class_counts"),
            ({"query_label": torch.zeros(4).long()}, ValueError, "query_label: got shape (4,), expected (3,)"),
            ({"query_label": torch.tensor([0, 1, C])}, IndexError, "query_label: row 2 has class 10"),
            ({"key_label": torch.zeros(4).long()}, ValueError, "key_label: got shape (4,), expected (5,)"),
            ({"key_label": torch.zeros(5)}, TypeError, "key_label: got dtype torch.float32"),
            (
                {"key_label": torch.full((5,), -2)},
                IndexError,
                "key_label: row 0 has class -2, expected 0 <= class < 10",
            ),
            ({"exclude": torch.tensor([0, 1, 5])}, IndexError, "exclude: got 5 in row 2, expected a key from 0 to 4"),
            ({"exclude": torch.tensor([0])}, ValueError, "exclude: got shape (1,), expected [3]"),
            ({"key_label": torch.zeros(5, device="meta").long()}, ValueError, "key_label: got device meta"),
        ],
        ids=[
            *(
                "none",
                "3d",
                "width",
                "integers",
                "rows",
                "classes",
                "length",
                "class",
                "key-length",
                "float",
                "minus-two",
            ),
            *("exclude", "exclude-length", "device"),
        ],
    )
    def test_bad_calls(self, change, error, message):
        given = {"query": torch.zeros(3, D), "query_label": torch.zeros(3).long(), "logits": torch.zeros(3, C)}
        given |= {"key": torch.zeros(5, D), "key_label": torch.zeros(5).long()}
        with pytest.raises(error, match=re.escape(message)):
            PaCoLoss(COUNTS, 0.05)(**{**given, **change})

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"features": torch.zeros(3, D)}, ValueError, "features: got shape (3, 19), expected [N, V, D]"),
            ({"logits": torch.zeros(3, 3, C)}, ValueError, "logits: got shape (3, 3, 10), expected [3, 2, 'C']"),
            ({"logits": torch.zeros(6, C)}, ValueError, "logits: got shape (6, 10), expected [3, 'C']"),
            ({"labels": torch.zeros(6).long()}, ValueError, "labels: got shape (6,), expected (3,)"),
            ({"queue_features": torch.zeros(5, D)}, ValueError, "queue_labels: got one of queue_features and"),
            (
                {"queue_features": torch.zeros(5, D + 1), "queue_labels": torch.zeros(5).long()},
                ValueError,
                "queue_features: got 20 features, expected 19",
            ),
        ],
        ids=["2d", "views", "rows", "labels", "one-of-two", "width"],
    )
    def test_bad_views(self, change, error, message):
        given = {"features": torch.zeros(3, 2, D), "labels": torch.zeros(3).long(), "logits": torch.zeros(3, C)}
        with pytest.raises(error, match=re.escape(message)):
            PaCoLoss(COUNTS, 0.05).two_views(**{**given, **change})


# ------------------------------------------------------------------------------------------------------------------ GML


def gml_inputs(rows: int = N, keys: int = M, classes: int = C, seed: int = 0) -> tuple[Leaves, Tensor, Tensor, Tensor]:
    """Class 4 has no key, class 5 one key, every third key is empty; queries of all classes."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        "query": unit(rows, D, seed=seed),
        "key": unit(keys, D, seed=seed + 1),
        "cosines": 2 * torch.rand(rows, classes, generator=generator).double() - 1,
        "log_t": torch.tensor(0.1).double().log(),
    }
    y, l = random_labels(rows, classes, seed + 2), random_labels(keys, classes, seed + 3)  # noqa: E741
    y[: min(6, rows)] = torch.arange(min(6, rows)) % classes
    l[l == 4] = 0
    l[l == 5] = 1
    l[::3] = -1
    own = torch.full((rows,), -1)
    fit = min(rows, keys) // 2
    own[:fit] = 2 * torch.arange(fit)
    placed = own[:fit][own[:fit] % 3 != 0]
    l[placed] = y[:fit][own[:fit] % 3 != 0]  # own keys have the queries' labels; those of empty slots do not
    l[l == 4] = 3
    own[:fit] = torch.where(l[own[:fit]] == y[:fit], own[:fit], -1)
    return leaves, y, l, own


def with_temperature(loss: GMLLoss, call: Callable[[], Tensor], log_t: Tensor) -> Tensor:
    """The loss with a tensor of ours in the place of its parameter."""
    del loss.log_temperature
    loss.log_temperature = log_t
    return call()


def make_gml(dtype: torch.dtype, counts: Any = COUNTS, **options: Any) -> GMLLoss:
    return GMLLoss(counts, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options)


class TestGML:
    @every_dtype
    @pytest.mark.parametrize("weights", [{}, {"beta": 0.5, "gamma": 2.0}, {"gamma": 0.0}], ids=["1", "other", "con"])
    def test_mean(self, backend, dtype, weights):
        leaves, y, l, own = gml_inputs()  # noqa: E741

        def ours(query: Tensor, key: Tensor, cosines: Tensor, log_t: Tensor) -> Tensor:
            loss = make_gml(dtype, **weights)
            return with_temperature(loss, lambda: loss(query, y, key, l, cosines, own_key=own), log_t)

        check(
            ours,
            lambda **k: gml(**weights, **k, y=y, l=l, own=own, n=counts_like(COUNTS, k["query"])).mean(),
            dtype,
            **leaves,
        )

    @exact_dtypes
    @pytest.mark.parametrize("with_own", [False, True], ids=["no-own-keys", "own-keys"])
    def test_each_term_of_each_row(self, backend, dtype, with_own):
        leaves, y, l, own = gml_inputs(seed=10)  # noqa: E741
        for which in range(3):

            def ours(query, key, cosines, log_t, which=which):
                loss = make_gml(dtype, reduction="none")
                keys = {"own_key": own} if with_own else {}
                call = partial(loss, query, y, key, l, cosines, return_terms=True, **keys)
                return with_temperature(loss, call, log_t)[1 + which]

            check(
                ours,
                lambda which=which, **k: gml_terms(
                    **k, y=y, l=l, own=own if with_own else None, n=counts_like(COUNTS, k["query"])
                )[which],
                dtype,
                **leaves,
            )

    @exact_dtypes
    def test_as_many_classes_as_inaturalist(self, backend, dtype):
        leaves, y, l, own = gml_inputs(9, 64, 8142)  # noqa: E741

        def ours(query: Tensor, key: Tensor, cosines: Tensor, log_t: Tensor) -> Tensor:
            loss = make_gml(dtype, INAT)
            return with_temperature(loss, lambda: loss(query, y, key, l, cosines, own_key=own), log_t)

        check(ours, lambda **k: gml(**k, y=y, l=l, own=own, n=counts_like(INAT, k["query"])).mean(), dtype, **leaves)

    def test_ids_find_own_keys(self, backend):
        leaves, y, l, own = gml_inputs(seed=20)  # noqa: E741
        leaves.pop("log_t")
        query_id = 1000 + 7 * torch.arange(N).flip(0)
        query_id[2] = -1
        own[2] = -1
        key_id = torch.full((M,), -1)
        rows = (own >= 0).nonzero().flatten()
        key_id[own[rows]] = query_id[rows]
        loss = make_gml(torch.float64)
        given = (leaves["query"], y, leaves["key"], l, leaves["cosines"])
        by_id = loss(*given, query_id=query_id.int(), key_id=key_id)
        torch.testing.assert_close(by_id, loss(*given, own_key=own), rtol=0, atol=0)
        assert loss(*given) != by_id
        # an id of another label is nobody's own key, and the last of several is
        wrong = torch.full((M,), -1)
        other = int((l == (y[0] + 1) % C).nonzero()[0])
        wrong[other] = query_id[0]
        torch.testing.assert_close(loss(*given, query_id=query_id, key_id=wrong), loss(*given), rtol=0, atol=0)
        same = (l == y[0]).nonzero().flatten()
        assert len(same) >= 2
        twice = torch.full((M,), -1)
        twice[same] = query_id[0]
        last = torch.full((N,), -1)
        last[0] = same[-1]
        torch.testing.assert_close(
            loss(*given, query_id=query_id, key_id=twice), loss(*given, own_key=last), rtol=0, atol=0
        )

    def test_only_the_temperature_learns_from_the_term_without_the_own_key(self, backend):
        leaves, y, l, own = gml_inputs()  # noqa: E741
        leaves.pop("log_t")
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        loss = make_gml(torch.float64)
        terms = loss(leaves["query"], y, leaves["key"], l, leaves["cosines"], own_key=own, return_terms=True)
        inputs = [*leaves.values(), loss.log_temperature]
        grads = torch.autograd.grad(terms.con_temperature, inputs, retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in grads[:-1])
        assert grads[-1] != 0
        grads = torch.autograd.grad(terms.con, inputs, allow_unused=True)
        assert grads[-1] is None or not grads[-1].any()
        assert terms.div is None
        torch.testing.assert_close(terms.total, terms.sup + terms.con + terms.con_temperature)

    @pytest.mark.parametrize("keys", ["none", "empty", "other-class", "own-only"])
    @pytest.mark.parametrize("rows", [1, 2])
    def test_queries_without_keys_of_their_class(self, backend, keys, rows):
        leaves, y, _, _ = gml_inputs(rows, 3)
        leaves.pop("log_t")
        l = {"none": y[:0], "empty": torch.full((3,), -1), "own-only": torch.full((3,), -1)}.get(keys, (y[0] + 7) % C)  # noqa: E741
        own = torch.full((rows,), -1)
        if keys == "none":
            leaves["key"] = leaves["key"][:0]
        elif keys == "other-class":
            l = l.expand(3)  # noqa: E741
        elif keys == "own-only":
            l[:rows] = y
            own = torch.arange(rows)
        loss = make_gml(torch.float64)
        value, gradients = run(
            lambda query, key, cosines: loss(query, y, key, l, cosines, own_key=own, return_terms=True).total, leaves
        )
        terms = loss(leaves["query"], y, leaves["key"], l, leaves["cosines"], own_key=own, return_terms=True)
        assert terms.con_temperature == 0
        assert (terms.con == 0) == (keys != "own-only" or rows == 1)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        value = loss(leaves["query"], y, leaves["key"], l, leaves["cosines"], own_key=own)
        value.backward()
        assert loss.log_temperature.grad == 0

    def test_distillation(self, backend):
        leaves, y, l, own = gml_inputs()  # noqa: E741
        teacher = 2 * torch.rand(N, C, generator=torch.Generator().manual_seed(3)).double() - 1

        def dense(query: Tensor, key: Tensor, cosines: Tensor, log_t: Tensor) -> Tensor:
            n = counts_like(COUNTS, query)
            rest = gml(query=query, key=key, cosines=cosines, log_t=log_t, y=y, l=l, own=own, n=n).mean()
            p, q = (30 / 4 * teacher.to(cosines)).softmax(1), (30 / 4 * cosines).log_softmax(1)
            return rest + 0.7 * 16 * F.kl_div(q, p, reduction="batchmean")

        for dtype in (torch.float64, torch.float32):

            def ours(query, key, cosines, log_t, dtype=dtype):
                loss = make_gml(dtype, alpha=0.7)
                call = partial(loss, query, y, key, l, cosines, own_key=own, teacher_logits=teacher.to(dtype))
                return with_temperature(loss, call, log_t)

            check(ours, dense, dtype, **leaves)

    def test_ignored_queries(self, backend):
        leaves, y, l, own = gml_inputs()  # noqa: E741
        leaves.pop("log_t")
        ignored = y.clone()
        ignored[::3] = 255
        kept = ignored != 255
        loss = make_gml(torch.float64, ignore_index=255)
        value, gradients = run(lambda query, key, cosines: loss(query, ignored, key, l, cosines, own_key=own), leaves)
        some = loss(leaves["query"][kept], y[kept], leaves["key"], l, leaves["cosines"][kept], own_key=own[kept])
        torch.testing.assert_close(value, some)
        assert not gradients["query"][~kept].any()
        rows = make_gml(torch.float64, ignore_index=255, reduction="none")
        each = rows(leaves["query"], ignored, leaves["key"], l, leaves["cosines"], own_key=own)
        assert not each[~kept].any()
        torch.testing.assert_close(each.sum() / kept.sum(), value)

    def test_without_contrastive_parts(self, backend):
        leaves, y, l, _ = gml_inputs()  # noqa: E741
        n = torch.tensor(COUNTS).double()
        value = make_gml(torch.float64, beta=0.0)(leaves["query"], y, leaves["key"], l, leaves["cosines"])
        torch.testing.assert_close(value, F.cross_entropy(30 * leaves["cosines"] + (n / n.sum()).log(), y))

    def test_with_a_queue_and_a_network_of_keys(self, backend):
        torch.manual_seed(0)
        queue, network = ClassQueue(COUNTS, 64, 8), nn.Linear(8, D)
        loss = GMLLoss(COUNTS)
        optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], 0.1)
        before = loss.log_temperature.detach().clone()
        for step in range(3):
            y = random_labels(N, C, step)
            ids = step * N + torch.arange(N)
            slots = queue.enqueue(torch.randn(N, 8), y, ids)
            key = F.normalize(network(queue.features), dim=1)
            query = F.normalize(torch.randn(N, D), dim=1)
            given = (query, y, key, queue.labels, torch.rand(N, C))
            value = loss(*given, query_id=ids, key_id=queue.ids)
            torch.testing.assert_close(value, loss(*given, own_key=slots), rtol=0, atol=0)
            optimizer.zero_grad()
            value.backward()
            assert network.weight.grad.abs().sum() > 0
            optimizer.step()
        assert loss.log_temperature != before
        assert loss.log_temperature.isfinite()

    def test_parameters_and_state(self):
        loss = GMLLoss(COUNTS, temperature=0.05)
        assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
        assert set(loss.state_dict()) == {"log_temperature", "class_counts", "class_bias"}
        torch.testing.assert_close(loss.temperature, torch.tensor(0.05))
        assert loss.log_temperature.shape == ()
        assert loss.half().log_temperature.dtype == torch.float32
        twin = GMLLoss(OTHER)
        twin.load_state_dict(loss.state_dict())
        torch.testing.assert_close(twin.temperature, torch.tensor(0.05))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"temperature": 0}, ValueError, "temperature: got 0, expected a number > 0"),
            ({"beta": -1}, ValueError, "beta: got -1, expected a number >= 0"),
            ({"gamma": "1"}, TypeError, "gamma: got str, expected a number"),
            ({"alpha": math.inf}, ValueError, "alpha: got inf, expected a number >= 0"),
            ({"scale": 0}, ValueError, "scale: got 0, expected a number > 0"),
            ({"pixels_per_class": 0}, ValueError, "pixels_per_class: got 0, expected an int >= 1"),
            ({"pixels_per_class": 1.5}, TypeError, "pixels_per_class: got float, expected an int or None"),
            ({"class_counts": [1, 0]}, ValueError, "class_counts: got 0 for 1 of 2 classes"),
            ({"label_smoothing": 0.1}, TypeError, "label_smoothing"),
            ({"weight": COUNTS}, TypeError, "weight"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_bad_construction(self, change, error, message):
        with pytest.raises(error, match=re.escape(message)):
            GMLLoss(**{"class_counts": COUNTS, **change})

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"query": torch.zeros(3)}, ValueError, "query: got shape (3,), expected [N, D]"),
            ({"query": torch.zeros(3, D, 2, 2)}, ValueError, "or pixels_per_class in the constructor"),
            ({"key": torch.zeros(5, D + 1)}, ValueError, "key: got 20 features (shape (5, 20)), expected 19"),
            ({"key": None}, TypeError, "key: got NoneType, expected a Tensor [M, D]"),
            ({"logits": torch.zeros(2, C)}, ValueError, "target: got class indices of shape (3,), expected (2,)"),
            ({"logits": torch.zeros(3, C + 1)}, ValueError, "class_bias: got shape (10,), expected [11]"),
            ({"query_label": torch.tensor([0, 1, C])}, IndexError, "target: row 2 has class 10"),
            ({"key_label": torch.full((5,), C)}, IndexError, "key_label: row 0 has class 10, expected 0 <= class < 10"),
            ({"key_label": torch.zeros(4).long()}, ValueError, "key_label: got shape (4,), expected (5,)"),
            ({"query_id": torch.zeros(3).long()}, ValueError, "key_id: got None with query_id, expected both or"),
            ({"key_id": torch.zeros(5).long()}, ValueError, "query_id: got None with key_id, expected both or"),
            (
                {"query_id": torch.zeros(3).long(), "key_id": torch.zeros(4).long()},
                ValueError,
                "key_id: got shape (4,), expected (5,)",
            ),
            ({"own_key": torch.tensor([0, 1, 5])}, IndexError, "own_key: row 2 has key 5, expected 0 <= key < 5"),
            ({"own_key": torch.zeros(3)}, TypeError, "own_key: got dtype torch.float32, expected an integer dtype"),
            (
                {"own_key": torch.zeros(3).long(), "query_id": torch.zeros(3).long(), "key_id": torch.zeros(5).long()},
                ValueError,
                "own_key: got both own_key and ids, expected one of them",
            ),
            ({"teacher_logits": torch.zeros(3, C)}, ValueError, "teacher_logits: got logits with alpha 0.0"),
            ({"generator": torch.Generator()}, ValueError, "generator: got one with query [N, D], expected None"),
            ({"key_label": torch.zeros(5, device="meta").long()}, ValueError, "key_label: got device meta"),
        ],
        ids=[
            *("1d", "4d", "width", "none", "rows", "classes", "class", "key-class", "key-length", "query-id", "key-id"),
            *("id-length", "own-key", "own-float", "own-and-ids", "teacher", "generator", "device"),
        ],
    )
    def test_bad_calls(self, change, error, message):
        given = {"query": torch.zeros(3, D), "query_label": torch.zeros(3).long(), "logits": torch.zeros(3, C)}
        given |= {"key": torch.zeros(5, D), "key_label": torch.zeros(5).long()}
        with pytest.raises(error, match=re.escape(message)):
            GMLLoss(COUNTS)(**{**given, **change})

    def test_bad_teacher_logits(self):
        given = (torch.zeros(3, D), torch.zeros(3).long(), torch.zeros(5, D), torch.zeros(5).long(), torch.zeros(3, C))
        loss = GMLLoss(COUNTS, alpha=1.0)
        with pytest.raises(ValueError, match=r"teacher_logits: got None with alpha 1.0, expected them if and only if"):
            loss(*given)
        with pytest.raises(ValueError, match=r"teacher_logits: got shape \(3, 9\), expected \(3, 10\) as logits"):
            loss(*given, teacher_logits=torch.zeros(3, C - 1))


# --------------------------------------------------------------------------------------------------------- segmentation


def scene(seed: int = 0, height: int = 6, width: int = 5, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Features [2, D, H, W] and classes [2, H, W], with ignored pixels and without class 3."""
    features = unit(2, height, width, D, seed=seed).movedim(3, 1)
    target = torch.randint(0, classes - 1, (2, height, width), generator=torch.Generator().manual_seed(seed))
    target[:, 0] = 255
    return features, target


class TestSamplePixels:
    def test_draws_pixels_of_each_class_without_replacement(self):
        features, target = scene()
        generator = torch.Generator().manual_seed(1)
        sample = sample_pixels(features, target, 7, 255, num_classes=4, generator=generator)
        assert sample.features.shape == (28, D)
        drawn = sample.position >= 0
        counts = torch.bincount(target[target != 255], minlength=4)
        assert torch.equal(torch.bincount(sample.labels[drawn], minlength=4), counts.clamp_max(7))
        assert len(sample.position[drawn].unique()) == int(drawn.sum())
        assert torch.equal(target.flatten()[sample.position[drawn]], sample.labels[drawn])
        assert torch.equal(features.movedim(1, 3).reshape(-1, D)[sample.position[drawn]], sample.features[drawn])
        assert (sample.labels[~drawn] == -1).all()
        assert not sample.features[~drawn].any()
        assert torch.equal(sample.take(target), sample.labels)
        again = sample_pixels(features, target, 7, 255, num_classes=4, generator=generator.manual_seed(1))
        assert torch.equal(again.position, sample.position)
        assert not torch.equal(sample_pixels(features, target, 7, 255, num_classes=4).position, sample.position)

    def test_every_pixel_is_as_likely(self):
        features, target = torch.zeros(1, 1, 1, 6), torch.tensor([[[0, 0, 0, 0, 1, 1]]])
        generator, hits = torch.Generator().manual_seed(0), torch.zeros(6)
        for _ in range(2000):
            position = sample_pixels(features, target, 2, num_classes=2, generator=generator).position
            hits[position] += 1
        torch.testing.assert_close(hits / 2000, torch.tensor([0.5, 0.5, 0.5, 0.5, 1, 1]), rtol=0, atol=0.05)

    def test_gradients_reach_the_pixels_drawn(self):
        features, target = scene()
        features.requires_grad_()
        sample = sample_pixels(features, target.byte(), 3, 255, num_classes=4)
        sample.features.sum().backward()
        got = features.grad.movedim(1, 3).reshape(-1, D)[:, 0]
        expected = torch.zeros(len(got)).double().index_fill(0, sample.position[sample.position >= 0], 1.0)
        assert torch.equal(got, expected)

    def test_a_target_of_another_size(self):
        features, target = scene()
        large = target.repeat_interleave(3, 1).repeat_interleave(2, 2)
        assert torch.equal(
            sample_pixels(features, large, 100, 255, num_classes=4).labels.sort().values,
            sample_pixels(features, target, 100, 255, num_classes=4).labels.sort().values,
        )

    def test_ignored_and_no_pixels(self):
        features, target = scene()
        assert (sample_pixels(features, torch.full_like(target, 255), 2, 255, num_classes=4).labels == -1).all()
        assert (sample_pixels(features, target, 2, 1, num_classes=256).labels != 1).all()  # a class that is ignored
        none = sample_pixels(features[:0], target[:0], 2, 255, num_classes=4)
        assert none.features.shape == (8, D)
        assert (none.position == -1).all()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"features": torch.zeros(2, D)}, ValueError, "features: got shape (2, 19), expected [N, D, H, W]"),
            ({"target": torch.zeros(3, 4, 4).long()}, ValueError, "target: got shape (3, 4, 4), expected (2, 4, 4)"),
            ({"target": torch.zeros(2, 4, 4)}, TypeError, "target: got dtype torch.float32, expected an integer dtype"),
            ({"target": torch.full((2, 4, 4), 9)}, IndexError, "target: row 0 has class 9, expected 0 <= class < 4"),
            ({"target": None}, TypeError, "target: got NoneType"),
            ({"per_class": 0}, ValueError, "per_class: got 0, expected an int >= 1"),
            ({"num_classes": 2.0}, TypeError, "num_classes: got float, expected an int"),
        ],
        ids=["2d", "images", "float", "class", "none", "per-class", "num-classes"],
    )
    def test_bad_arguments(self, change, error, message):
        given = {"features": torch.zeros(2, D, 4, 4), "target": torch.zeros(2, 4, 4).long(), "per_class": 2}
        with pytest.raises(error, match=re.escape(message)):
            sample_pixels(**{**given, "num_classes": 4, **change})


class TestSegmentation:
    def test_gml_draws_its_queries(self, backend):
        features, target = scene()
        logits = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(2)).double()
        key, l = unit(20, D, seed=3), random_labels(20, 4, 4)  # noqa: E741
        n = [100, 50, 20, 5]
        loss = GMLLoss(n, pixels_per_class=100, ignore_index=255, dtype=torch.float64)  # all pixels
        generator = torch.Generator().manual_seed(0)
        value = loss(features, target, key, l, logits, generator=generator)
        kept = target.flatten() != 255
        flat = logits.movedim(1, 3).reshape(-1, 4)[kept], target.flatten()[kept]
        pixels = features.movedim(1, 3).reshape(-1, D)[kept]
        expected = gml(
            query=pixels,
            key=key,
            log_t=loss.log_temperature,
            cosines=flat[0],
            y=flat[1],
            l=l,
            n=torch.tensor(n).double(),
        )
        torch.testing.assert_close(value, expected.mean())
        # the same, drawn beforehand
        sample = sample_pixels(features, target, 100, 255, num_classes=4)
        drawn = loss(sample.features, sample.labels, key, l, logits, target=target)
        torch.testing.assert_close(drawn, value)

    def test_own_keys_of_drawn_pixels(self, backend):
        features, target = scene()
        sample = sample_pixels(features, target, 4, 255, num_classes=4)
        queue = ClassQueue([100, 50, 20, 5], 40, D, dtype=torch.float64)
        ids = torch.arange(target.numel()).view(target.shape)
        queue.enqueue(sample.features, sample.labels, sample.take(ids))
        logits = torch.rand(2, 4, 6, 5).double()
        loss = GMLLoss([100, 50, 20, 5], pixels_per_class=100, ignore_index=255, dtype=torch.float64)
        slots = torch.full_like(ids, -1).flatten()
        filled = queue.ids >= 0
        slots[queue.ids[filled]] = filled.nonzero().flatten()
        given = (features, target, queue.features, queue.labels, logits)
        by_id = loss(*given, query_id=ids, key_id=queue.ids)
        torch.testing.assert_close(loss(*given, own_key=slots.view(ids.shape)), by_id)
        assert loss(*given) != by_id

    def test_rows_cannot_be_returned(self):
        features, target = scene()
        given = (torch.zeros(3, D), torch.zeros(3).long(), torch.zeros(2, 4, 6, 5))
        loss = GMLLoss([1, 2, 3, 4], pixels_per_class=2, ignore_index=255, reduction="none")
        with pytest.raises(ValueError, match=r"reduction: got 'none' with query \[N, D, H, W\]"):
            loss(features.float(), target, *given)
        with pytest.raises(ValueError, match="target: got one with reduction 'none'"):
            loss(torch.zeros(3, D), torch.zeros(3).long(), *given, target=target)


# ------------------------------------------------------------------------------------------------------------------ ELM


def elm_inputs(seed: int = 0) -> tuple[Leaves, Tensor, Tensor]:
    leaves = {
        "z": 2 * unit(N, D, seed=seed),
        "key": 2 * unit(M, D, seed=seed + 1),
        "logits": 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(seed)).double(),
    }
    l = random_labels(M, C, seed + 3)  # noqa: E741
    l[::5] = -1
    return leaves, random_labels(N, C, seed + 2), l


def elm_of_batch(name: str, z: Tensor, logits: Tensor, y: Tensor, weight: float = 0.1) -> Tensor:
    n = counts_like(COUNTS, z)
    log_prior = (n / n.sum()).log()
    own = torch.arange(len(z))
    row = regularizer(name, z, z, y, y, own, ldam(n), log_prior)
    return F.cross_entropy(logits + log_prior, y, reduction="none") + weight * row


class TestELM:
    @every_dtype
    @pytest.mark.parametrize("name", elm.REGULARIZERS)
    def test_in_batch(self, backend, dtype, name):
        leaves, y, _ = elm_inputs()
        leaves.pop("key")
        loss = ELMLoss(COUNTS, 1.0, 0.7, name, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        check(
            lambda z, logits: loss(logits, z, y),
            lambda z, logits: elm_of_batch(name, z, logits, y, 0.7).mean(),
            dtype,
            **leaves,
        )

    @exact_dtypes
    @pytest.mark.parametrize("name", elm.REGULARIZERS)
    def test_rows_with_ldam_keys_and_other_numbers(self, backend, dtype, name, monkeypatch):
        monkeypatch.setattr(elm, "_CHUNK", 5 * M + 1)  # several chunks of rows, the last a smaller one
        leaves, y, l = elm_inputs(seed=5)  # noqa: E741
        own = torch.arange(N)
        own[::4] = -1
        delta = torch.linspace(0.1, 0.9, C).double()
        loss = ELMLoss(
            COUNTS, 1.0, 0.3, name, embedding_margin=delta, temperature=0.2, logit_margin="ldam", scale=30.0,
            reduction="none", dtype=dtype,
        )  # fmt: skip

        def dense(z: Tensor, key: Tensor, logits: Tensor) -> Tensor:
            n = counts_like(COUNTS, z)
            shifted = torch.where(F.one_hot(y, C).bool(), logits - ldam(n), logits)
            row = regularizer(name, z, key, y, l, own, delta.to(z), torch.zeros_like(n), 0.2)
            return F.cross_entropy(30 * shifted, y, reduction="none") + 0.3 * row

        check(
            lambda z, key, logits: loss(logits, z, y, key=key, key_label=l, exclude=own),
            dense,
            dtype,
            **{**leaves, "logits": leaves["logits"] / 10},
        )

    @pytest.mark.parametrize("name", elm.REGULARIZERS)
    @pytest.mark.parametrize("rows", [1, 4])
    def test_without_positives_or_negatives(self, backend, name, rows):
        leaves, _, _ = elm_inputs()
        z, logits = leaves["z"][:rows], leaves["logits"][:rows]
        loss = ELMLoss(COUNTS, 1.0, 1.0, name, dtype=torch.float64)
        for y in (torch.arange(rows), torch.zeros(rows).long()):
            value, gradients = run(lambda z, logits, y=y: loss(logits, z, y), {"z": z, "logits": logits})
            torch.testing.assert_close(value, elm_of_batch(name, z, logits, y, 1.0).mean())
            assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert loss(logits, z, torch.arange(rows), return_terms=True).embedding == 0

    @pytest.mark.parametrize("name", elm.REGULARIZERS)
    def test_ignored_samples(self, backend, name):
        leaves, y, _ = elm_inputs()
        y[::3] = -100
        kept = y != -100
        loss = ELMLoss(COUNTS, 1.0, 1.0, name, dtype=torch.float64)
        value, gradients = run(lambda z, logits: loss(logits, z, y), {"z": leaves["z"], "logits": leaves["logits"]})
        torch.testing.assert_close(value, loss(leaves["logits"][kept], leaves["z"][kept], y[kept]))
        assert not gradients["z"][~kept].any()

    def test_terms_and_unnormalized_embeddings(self, backend):
        leaves, y, _ = elm_inputs()
        z, logits = F.normalize(leaves["z"], dim=1), leaves["logits"]
        terms = ELMLoss(COUNTS, normalize=False, dtype=torch.float64)(logits, z, y, return_terms=True)
        torch.testing.assert_close(terms.total, ELMLoss(COUNTS, dtype=torch.float64)(logits, leaves["z"], y))
        torch.testing.assert_close(terms.total, terms.logit + 0.1 * terms.embedding)

    def test_spread_is_the_weighted_scatter(self, backend):
        leaves, y, _ = elm_inputs()
        z = F.normalize(leaves["z"], dim=1)
        delta = [1.0] * C
        terms = ELMLoss(COUNTS, 1.0, 1.0, "spread", embedding_margin=delta, dtype=torch.float64)(
            leaves["logits"], z, y, return_terms=True
        )
        total = torch.zeros((), dtype=torch.float64)
        for c in range(C):
            members = z[y == c]
            if len(members) > 1:  # n (n - 1) ordered pairs, each mean over n - 1
                total += 2 * len(members) / (len(members) - 1) * (members - members.mean(0)).square().sum()
        torch.testing.assert_close(terms.embedding, total / N)

    def test_margins_follow_the_counts_unless_given(self):
        loss, fixed = ELMLoss(COUNTS), ELMLoss(COUNTS, embedding_margin=[0.5] * C)
        torch.testing.assert_close(loss.embedding_margin, ldam(torch.tensor(COUNTS).float()))
        for each in (loss, fixed):
            each.update_counts(OTHER)
        torch.testing.assert_close(loss.embedding_margin, ldam(torch.tensor(OTHER).float()))
        assert fixed.embedding_margin.tolist() == [0.5] * C
        assert set(fixed.state_dict()) == {"class_counts", "class_bias", "embedding_margin"}

    def test_masked_classes(self, backend):
        leaves, y, _ = elm_inputs()
        y = y.clamp_max(C - 2)
        counts = [*COUNTS[:-1], 0]
        for name in elm.REGULARIZERS:
            loss = ELMLoss(counts, 1.0, 1.0, name, zero_counts="mask", dtype=torch.float64)
            assert loss(leaves["logits"], leaves["z"], y).isfinite()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"tau": math.inf}, ValueError, "tau: got inf, expected a finite number"),
            ({"embedding_weight": -1}, ValueError, "embedding_weight: got -1, expected a number >= 0"),
            (
                {"regularizer": "center"},
                ValueError,
                "regularizer: got 'center', expected one of 'pairwise', 'contrasti",
            ),
            ({"embedding_margin": -0.5}, ValueError, "embedding_margin: got -0.5, expected a number >= 0"),
            ({"embedding_margin": [1, 2]}, ValueError, "embedding_margin: got 2 values, expected 10"),
            ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a number > 0"),
            (
                {"logit_margin": "none"},
                ValueError,
                "logit_margin: got 'none', expected one of 'logit_adjustment', 'lda",
            ),
            ({"normalize": None}, TypeError, "normalize: got NoneType, expected a bool"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_bad_construction(self, change, error, message):
        with pytest.raises(error, match=re.escape(message)):
            ELMLoss(COUNTS, **change)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"logits": torch.zeros(3, C + 1)}, ValueError, "logits: got shape (3, 11), expected (3, 10)"),
            ({"embeddings": torch.zeros(3)}, ValueError, "embeddings: got shape (3,), expected [N, D]"),
            ({"target": torch.tensor([0, 1, C])}, IndexError, "target: row 2 has class 10"),
            ({"key": torch.zeros(5, D)}, ValueError, "key_label: got None with key, expected both or neither"),
            (
                {"key_label": torch.zeros(5).long()},
                ValueError,
                "key: got None with key_label, expected both or neither",
            ),
            ({"exclude": "self"}, ValueError, "exclude: got one without key, expected None"),
            (
                {"key": torch.ones(5, D + 1), "key_label": torch.zeros(5).long()},
                ValueError,
                "key: got 20 features (shape (5, 20)), expected 19",
            ),
            (
                {"key": torch.ones(5, D), "key_label": torch.zeros(5).long(), "exclude": torch.tensor([0, 1, 5])},
                IndexError,
                "exclude: got 5 in row 2",
            ),
        ],
        ids=["classes", "1d", "class", "key", "key-label", "exclude-self", "width", "exclude"],
    )
    def test_bad_calls(self, change, error, message):
        given = {"logits": torch.zeros(3, C), "embeddings": torch.ones(3, D), "target": torch.zeros(3).long()}
        with pytest.raises(error, match=re.escape(message)):
            ELMLoss(COUNTS)(**{**given, **change})


# ----------------------------------------------------------------------------------------------------- labels' corners


def test_pixels_of_a_class_that_wraps_to_ignore_index_are_drawn():
    target = torch.full((1, 2, 2), 156, dtype=torch.uint8)  # -100 as uint8
    sample = sample_pixels(torch.randn(1, 3, 2, 2), target, per_class=3, num_classes=160)
    assert int((sample.labels == 156).sum()) == 3


def test_gml_of_a_masked_class_has_no_nan_gradient(backend):
    loss = GMLLoss([10, 0, 5], zero_counts="mask", gamma=0.0)
    query, key = (F.normalize(torch.randn(n, 4), dim=1).requires_grad_() for n in (2, 4))
    value = loss(
        query, torch.tensor([1, 0]), key, torch.tensor([1, 1, 0, 2]), torch.rand(2, 3), own_key=torch.tensor([0, -1])
    )
    for grad in torch.autograd.grad(value, (query, key)):
        assert bool(grad.isfinite().all())


def test_bcl_without_checks_leaves_a_class_out_of_range_to_its_own_rows():
    loss = BalancedContrastiveLoss([5, 4, 3], reduction="none")
    features = F.normalize(torch.randn(4, 2, 6, dtype=torch.float64), dim=-1)
    centers = F.normalize(torch.randn(3, 6, dtype=torch.float64), dim=-1)
    expected = loss(features[:3], torch.tensor([0, 1, 2]), centers)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)  # traced code reads no values
    rows = compiled(features, torch.tensor([0, 1, 2, 7]), centers)
    torch.testing.assert_close(rows[:3], expected)
    assert bool(rows[3].isnan().all())


def test_paco_refuses_logits_of_other_classes_and_too_much_smoothing():
    query, key = F.normalize(torch.randn(2, 4), dim=1), F.normalize(torch.randn(3, 4), dim=1)
    labels, of_keys = torch.tensor([0, 1]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"logits: got 2 classes, expected 3 as class_counts"):
        PaCoLoss([5, 4, 3], alpha=0.1)(query, labels, key, of_keys, torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"label_smoothing: got 0.8 with 2 classes, expected at most 0.5"):
        PaCoLoss([5, 4], alpha=0.1, label_smoothing=0.8)(query, labels, key, of_keys, torch.randn(2, 2))
