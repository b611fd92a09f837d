"""ELM's regularisers against dense definitions, and what is its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from _loss_cases import COUNTS, OTHER, C, D, M, N
from _loss_dense import Leaves, check, counts_like, every_dtype, exact_dtypes, random_labels, run, unit
from _refused import refused
from torch import Tensor

from lt_kernels.losses import ELMLoss, _contrastive_base, elm


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
        monkeypatch.setattr(_contrastive_base, "CHUNK", 5 * M + 1)  # several chunks of rows, the last a smaller one
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

    @refused(
        "change",
        ({"tau": math.inf}, ValueError, "tau: got inf, expected a finite number"),
        ({"embedding_weight": -1}, ValueError, "embedding_weight: got -1, expected a number >= 0"),
        ({"regularizer": "center"}, ValueError, "regularizer: got 'center', expected one of 'pairwise', 'contrasti"),
        ({"embedding_margin": -0.5}, ValueError, "embedding_margin: got -0.5, expected a number >= 0"),
        ({"embedding_margin": [1, 2]}, ValueError, "embedding_margin: got 2 values, expected 10"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a number > 0"),
        ({"logit_margin": "none"}, ValueError, "logit_margin: got 'none', expected one of 'logit_adjustment', 'lda"),
        ({"normalize": None}, TypeError, "normalize: got NoneType, expected a bool"),
    )
    def test_bad_construction(self, change, refusal):
        with refusal:
            ELMLoss(COUNTS, **change)

    @refused(
        "change",
        ({"logits": torch.zeros(3, C + 1)}, ValueError, "class_counts: got 10 classes, expected 11 as logits"),
        ({"embeddings": torch.zeros(3)}, ValueError, "embeddings: got shape (3,), expected [N, D]"),
        ({"target": torch.tensor([0, 1, C])}, IndexError, "target: row 2 has class 10"),
        ({"key": torch.zeros(5, D)}, ValueError, "key_label: got None with key, expected both or neither"),
        ({"key_label": torch.zeros(5).long()}, ValueError, "key: got None with key_label, expected both or neither"),
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
    )
    def test_bad_calls(self, change, refusal):
        given = {"logits": torch.zeros(3, C), "embeddings": torch.ones(3, D), "target": torch.zeros(3).long()}
        with refusal:
            ELMLoss(COUNTS)(**{**given, **change})
