"""SupCon, BCL and PaCo: each against its published definition with dense masks, and what is its own."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import COUNTS, C, D, M, N
from _loss_dense import INAT, Leaves, check, counts_like, every_dtype, exact_dtypes, random_labels, run, unit
from _refused import refused
from torch import Tensor, nn

import lt_kernels
from lt_kernels import _checks
from lt_kernels.losses import BalancedContrastiveLoss, ELMLoss, PaCoLoss, SupConLoss


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

    @refused(
        "arguments",
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a number > 0"),
        ({"temperature": "1"}, TypeError, "temperature: got str, expected a number"),
        ({"base_temperature": -1}, ValueError, "base_temperature: got -1, expected a number > 0"),
        ({"contrast_mode": "two"}, ValueError, "contrast_mode: got 'two', expected one of 'all', 'one'"),
        ({"form": "mid"}, ValueError, "form: got 'mid', expected one of 'out', 'in'"),
        ({"normalize": 1}, TypeError, "normalize: got int, expected a bool"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg', expected one of 'none', 'mean', 'sum', 'mean_pos"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: got float, expected an int or None"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature: got shape (2,), expected a 0-dim tensor"),
        ({"temperature": torch.tensor(1)}, TypeError, "temperature: got dtype torch.int64"),
        ({"temperature": torch.tensor(0.5, requires_grad=True)}, ValueError, "temperature: got a tensor that requires"),
        ({"temperature": torch.tensor(-0.5)}, ValueError, "temperature: got -0.5, expected a number > 0"),
    )
    def test_bad_construction(self, arguments, refusal):
        with refusal:
            SupConLoss(**arguments)

    @exact_dtypes
    @pytest.mark.parametrize("form", ["out", "in"])
    @pytest.mark.parametrize("contrast_mode", ["all", "one"])
    def test_a_mask_of_positives(self, backend, dtype, form, contrast_mode):
        z, y = unit(N, 2, D, seed=14), random_labels(N, C, 15)
        options = {"form": form, "contrast_mode": contrast_mode, "reduction": "none"}
        loss = SupConLoss(0.1, **options)
        given = (y[:, None] == y).to(torch.uint8)
        value, gradients = run(lambda z: loss(z, mask=given), {"z": z.to(dtype)})
        expected, others = run(lambda z: loss(z, y), {"z": z.to(dtype)})
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients["z"], others["z"])
        identity, of_pairs = torch.eye(N, dtype=torch.bool), SupConLoss(0.1, **options)
        torch.testing.assert_close(of_pairs(z, mask=identity), of_pairs(z))

    @pytest.mark.parametrize("form", ["out", "in"])
    def test_a_mask_of_weights(self, form):
        z, weight = unit(7, D, seed=16), torch.rand(7, 7, generator=torch.Generator().manual_seed(17)).double()
        weight[weight < 0.3] = 0
        weight[2] = 0  # no positives
        s = (z @ z.T / 0.1).masked_fill(torch.eye(7, dtype=torch.bool), -math.inf)
        log_p = (s - s.logsumexp(1, keepdim=True)).masked_fill(torch.eye(7, dtype=torch.bool), 0)
        share = weight.masked_fill(torch.eye(7, dtype=torch.bool), 0)
        share = share / share.sum(1, keepdim=True).clamp_min(1e-9)
        rows = -(share * log_p).sum(1) if form == "out" else -(share * log_p.exp()).sum(1).log()
        rows[2] = 0
        loss = SupConLoss(0.1, form=form, reduction="mean_positives")
        torch.testing.assert_close(loss(z, mask=weight), rows.sum() / 6)
        value, gradients = run(lambda z: loss(z, mask=torch.zeros(7, 7)), {"z": z})
        assert value == 0
        assert not gradients["z"].any()
        assert run(lambda z: loss(z, mask=weight), {"z": z})[1]["z"].isfinite().all()

    @refused(
        "mask",
        (torch.ones(3, 3).tolist(), TypeError, "mask: got list, expected a Tensor [N, N]"),
        (torch.ones(6, 6), ValueError, "mask: got shape (6, 6), expected (3, 3)"),
        (torch.ones(3, 3, dtype=torch.complex64), TypeError, "mask: got dtype torch.complex64, expected bool or real"),
        (-torch.ones(3, 3), ValueError, "mask: got a weight that is negative or not finite, expected finite weights"),
        (torch.ones(3, 3, device="meta"), ValueError, "mask: got device meta, expected cpu as features"),
    )
    def test_bad_masks(self, mask, refusal):
        with refusal:
            SupConLoss()(torch.zeros(3, 2, 4), mask=mask)

    def test_labels_and_a_mask(self):
        with pytest.raises(ValueError, match="mask: got both labels and mask, expected one of them"):
            SupConLoss()(torch.zeros(3, 4), torch.zeros(3).long(), torch.ones(3, 3))

    @pytest.mark.parametrize("batch", ["some-without", "none-with"])
    def test_the_mean_over_anchors_with_positives_is_pytorch_metric_learning(self, backend, batch):
        theirs = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=0.1)
        z = 3 * unit(N, D, seed=18)
        y = random_labels(N, 30, 19) if batch == "some-without" else torch.arange(N)
        assert y.bincount().min() < 2
        loss = SupConLoss(0.1, normalize=True, reduction="mean_positives")
        value, gradients = run(lambda z: loss(z, y), {"z": z})
        expected, others = run(lambda z: theirs(z, y), {"z": z})
        torch.testing.assert_close(value, expected.view(()))
        torch.testing.assert_close(gradients["z"], others["z"])
        assert (value == 0) == (batch == "none-with")

    @refused(
        "features, labels",
        (None, None, TypeError, "features: got NoneType, expected a Tensor [N, V, D]"),
        (torch.zeros(3), None, ValueError, "features: got shape (3,), expected [N, V, D]"),
        (torch.zeros(3, 2, 2, 2), None, ValueError, "features: got shape (3, 2, 2, 2), expected [N, V, D]"),
        (torch.zeros(3, 2).long(), None, TypeError, "features: got dtype torch.int64"),
        (torch.zeros(3, 2, 4), torch.zeros(6).long(), ValueError, "labels: got shape (6,), expected (3,)"),
        (torch.zeros(3, 2, 4), torch.zeros(3), TypeError, "labels: got dtype torch.float32, expected an integer"),
        (torch.zeros(3, 2, 4), [0, 1, 2], TypeError, "labels: got list, expected a Tensor of integers"),
        (torch.zeros(3, 4, device="meta"), torch.zeros(3).long(), ValueError, "labels: got device cpu, expected me"),
    )
    def test_bad_calls(self, features, labels, refusal):
        with refusal:
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

    @refused(
        "change",
        ({"features": torch.zeros(3, D)}, ValueError, "features: got shape (3, 19), expected [N, V, D]"),
        ({"features": None}, TypeError, "features: got NoneType"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "labels: got shape (2,), expected (3,)"),
        ({"labels": torch.tensor([0, 1, C])}, IndexError, "labels: row 2 has class 10, expected 0 <= class < 10"),
        ({"labels": torch.tensor([0, -1, 1])}, IndexError, "labels: row 1 has class -1, expected 0 <= class < 10"),
        ({"labels": torch.zeros(3)}, TypeError, "labels: got dtype torch.float32, expected an integer dtype"),
        ({"centers": torch.zeros(C, D + 1)}, ValueError, "centers: got shape (10, 20), expected (10, 19)"),
        ({"centers": torch.zeros(C - 1, D)}, ValueError, "class_counts: got 10 classes, expected 9 as centers"),
        ({"centers": torch.zeros(C, D, device="meta")}, ValueError, "centers: got device meta, expected cpu"),
        ({"centers": torch.zeros(C, D).long()}, TypeError, "centers: got dtype torch.int64"),
    )
    def test_bad_calls(self, change, refusal):
        given = {"features": torch.zeros(3, 2, D), "labels": torch.zeros(3).long(), "centers": torch.zeros(C, D)}
        with refusal:
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

    @refused(
        "change",
        ({"temperature": 0}, ValueError, "temperature: got 0, expected a number > 0"),
        ({"supt": -1.0}, ValueError, "supt: got -1.0, expected a number > 0"),
        ({"alpha": -0.1}, ValueError, "alpha: got -0.1, expected a number >= 0"),
        ({"beta": math.nan}, ValueError, "beta: got nan, expected a number >= 0"),
        ({"gamma": "1"}, TypeError, "gamma: got str, expected a number"),
        ({"eps": -1}, ValueError, "eps: got -1, expected a number >= 0"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing: got 1.0, expected a number in [0, 1)"),
        ({"class_counts": [1, 0]}, ValueError, "class_counts: got 0 for 1 of 2 classes"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
    )
    def test_bad_construction(self, change, refusal):
        with refusal:
            PaCoLoss(**{"class_counts": COUNTS, "alpha": 0.05, **change})

    @refused(
        "change",
        ({"query": None}, TypeError, "query: got NoneType, expected a Tensor [N, D]"),
        ({"query": torch.zeros(3, 2, D)}, ValueError, "query: got shape (3, 2, 19), expected [N, D]"),
        ({"key": torch.zeros(5, D + 1)}, ValueError, "key: got 20 features (shape (5, 20)), expected 19 as query"),
        ({"key": torch.zeros(5, D).long()}, TypeError, "key: got dtype torch.int64"),
        ({"logits": torch.zeros(2, C)}, ValueError, "logits: got shape (2, 10), expected [3, C]"),
        ({"logits": torch.zeros(3, C + 1)}, ValueError, "class_counts: got 10 classes, expected 11 as logits"),
        ({"query_label": torch.zeros(4).long()}, ValueError, "query_label: got shape (4,), expected (3,)"),
        ({"query_label": torch.tensor([0, 1, C])}, IndexError, "query_label: row 2 has class 10"),
        ({"key_label": torch.zeros(4).long()}, ValueError, "key_label: got shape (4,), expected (5,)"),
        ({"key_label": torch.zeros(5)}, TypeError, "key_label: got dtype torch.float32"),
        ({"key_label": torch.full((5,), -2)}, IndexError, "key_label: row 0 has class -2, expected 0 <= class < 10"),
        ({"exclude": torch.tensor([0, 1, 5])}, IndexError, "exclude: got 5 in row 2, expected a key from 0 to 4"),
        ({"exclude": torch.tensor([0])}, ValueError, "exclude: got shape (1,), expected [3]"),
        ({"key_label": torch.zeros(5, device="meta").long()}, ValueError, "key_label: got device meta"),
    )
    def test_bad_calls(self, change, refusal):
        given = {"query": torch.zeros(3, D), "query_label": torch.zeros(3).long(), "logits": torch.zeros(3, C)}
        given |= {"key": torch.zeros(5, D), "key_label": torch.zeros(5).long()}
        with refusal:
            PaCoLoss(COUNTS, 0.05)(**{**given, **change})

    @refused(
        "change",
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
    )
    def test_bad_views(self, change, refusal):
        given = {"features": torch.zeros(3, 2, D), "labels": torch.zeros(3).long(), "logits": torch.zeros(3, C)}
        with refusal:
            PaCoLoss(COUNTS, 0.05).two_views(**{**given, **change})


def test_bcl_without_checks_leaves_a_class_out_of_range_to_its_own_rows(monkeypatch):
    loss = BalancedContrastiveLoss([5, 4, 3], reduction="none")
    features = F.normalize(torch.randn(4, 2, 6, dtype=torch.float64), dim=-1)
    centers = F.normalize(torch.randn(3, 6, dtype=torch.float64), dim=-1)
    expected = loss(features[:3], torch.tensor([0, 1, 2]), centers)
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    rows = loss(features, torch.tensor([0, 1, 2, 7]), centers)
    torch.testing.assert_close(rows[:3], expected)
    assert bool(rows[3].isnan().all())


def test_paco_refuses_logits_of_other_classes_and_too_much_smoothing():
    query, key = F.normalize(torch.randn(2, 4), dim=1), F.normalize(torch.randn(3, 4), dim=1)
    labels, of_keys = torch.tensor([0, 1]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"class_counts: got 3 classes, expected 2 as logits"):
        PaCoLoss([5, 4, 3], alpha=0.1)(query, labels, key, of_keys, torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"label_smoothing: got 0.8 with 2 classes, expected at most 0.5"):
        PaCoLoss([5, 4], alpha=0.1, label_smoothing=0.8)(query, labels, key, of_keys, torch.randn(2, 2))


# ----------------------------------------------------------------------------------- what is left out, and temperatures


def supcon_of(**options):
    return lambda z, y, centers, **more: SupConLoss(0.1, **options, **more)(z, y)


LEAVING_OUT = {
    "supcon": supcon_of(),
    "supcon-in": supcon_of(form="in"),
    "supcon-one": supcon_of(contrast_mode="one"),
    "supcon-normalize": supcon_of(normalize=True),
    "bcl": lambda z, y, centers, **more: BalancedContrastiveLoss(COUNTS, 0.1, **more)(z, y, centers),
}


@pytest.mark.parametrize("ignored", [-1, 3, -100])
@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        (name, reduction)
        for name in LEAVING_OUT
        for reduction in ("mean", "sum", "mean_positives")
        if (name, reduction) != ("bcl", "mean_positives")  # every view has its centre
    ],
)
def test_ignoring_samples_is_dropping_them(backend, name, reduction, ignored):
    y = random_labels(N, C, 1)
    y[::3] = ignored
    kept = y != ignored
    leaves = {"z": 2 * unit(N, 2, D, seed=0) if "normalize" in name else unit(N, 2, D, seed=0)}
    leaves["centers"] = unit(C, D, seed=2)
    call = LEAVING_OUT[name]
    options = {"reduction": reduction}
    value, gradients = run(lambda z, centers: call(z, y, centers, ignore_index=ignored, **options), leaves)
    expected, others = run(lambda z, centers: call(z[kept], y[kept], centers, **options), leaves)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, others)
    assert not gradients["z"][~kept].any()
    rows = call(leaves["z"], y, leaves["centers"], ignore_index=ignored, reduction="none")
    assert not rows[~kept].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_of_an_ignored_sample_is_zero_whatever_it_holds(normalize, bad, backend):
    y = random_labels(N, C, 1)
    y[::3] = -1
    z = unit(N, 2, D, seed=0)
    z[y == -1] = bad
    _, gradients = run(lambda z: SupConLoss(normalize=normalize, ignore_index=-1)(z, y), {"z": z})
    assert not gradients["z"][y == -1].any()  # NaN would be "any"
    assert gradients["z"].any()


def test_without_an_ignore_index_supcon_takes_minus_one_and_minus_hundred_as_labels():
    z, y = unit(6, D, seed=0), torch.tensor([-1, -100, -1, -100, 2, 2])
    torch.testing.assert_close(SupConLoss()(z, y), SupConLoss()(z, torch.tensor([0, 1, 0, 1, 2, 2])), rtol=0, atol=0)


def test_bcl_takes_minus_one_as_out_of_range_unless_it_is_the_ignore_index():
    given = unit(2, 2, D, seed=0), torch.tensor([0, -1]), unit(C, D, seed=1)
    with pytest.raises(IndexError, match="labels: row 1 has class -1, expected 0 <= class < 10, or -100 for none"):
        BalancedContrastiveLoss(COUNTS)(*given)
    assert BalancedContrastiveLoss(COUNTS, ignore_index=-1)(*given).isfinite()


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.clone], ids=["parameter", "buffer"])
@pytest.mark.parametrize("name", ["supcon", "supcon-base", "supcon-mask", "bcl", "paco", "elm-pairwise", "elm-spread"])
def test_a_temperature_may_be_learned(backend, name, kind):
    z, y = unit(N, 2, D, seed=0), random_labels(N, C, 1)
    key, l, logits = unit(M, D, seed=2), random_labels(M, C, 3), unit(N, C, seed=4)  # noqa: E741

    def make(temperature: float | Tensor) -> nn.Module:
        if name.startswith("elm"):
            return ELMLoss(COUNTS, temperature=temperature, regularizer=name.removeprefix("elm-"), dtype=torch.float64)
        if name == "paco":
            return PaCoLoss(COUNTS, 0.05, temperature=temperature, dtype=torch.float64)
        if name == "bcl":
            return BalancedContrastiveLoss(COUNTS, temperature)
        return SupConLoss(temperature, 0.07 if name == "supcon-base" else None)

    def value(loss: nn.Module) -> Tensor:
        if name.startswith("elm"):
            return loss(logits, z[:, 0], y)
        if name == "paco":
            return loss(z[:, 0], y, key, l, logits)
        if name == "bcl":
            return loss(z, y, key[:C])
        return loss(z, mask=y[:, None] == y) if name == "supcon-mask" else loss(z, y)

    start = torch.tensor(0.2, dtype=torch.float64)
    loss = make(kind(start))
    torch.testing.assert_close(value(loss), value(make(0.2)))
    assert "temperature" in loss.state_dict()
    assert [*dict(loss.named_parameters())] == (["temperature"] if kind is nn.Parameter else [])
    assert f"temperature={'learned' if kind is nn.Parameter else 'tensor'}" in repr(loss)
    assert copy.deepcopy(loss).bfloat16().temperature.dtype == torch.float64  # as class tensors
    assert make(start.half()).temperature.dtype in (torch.float32, torch.float64)  # a buffer
    if kind is nn.Parameter:
        (slope,) = torch.autograd.grad(value(loss), [loss.temperature])
        step = 1e-6
        expected = (value(make(0.2 + step)) - value(make(0.2 - step))) / (2 * step)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)
