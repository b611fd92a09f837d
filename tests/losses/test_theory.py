"""The theory as a test: training on a long-tailed mixture is optimal for the balanced error, where it should be.

The data: 24 Gaussian classes in 12 dimensions with unit covariance, so that the optimal logits are linear in x, and
priors proportional to 200^(-i/23), i = 0..23. The Bayes-optimal balanced classifier is argmax_y log p(x | y), known
exactly. For a logit bias tau * log pi the trained logits tend to log p(x | y) + (1 - tau) log pi (Menon et al., 2021);
so the mean of experts is unbiased if and only if the mean of their taus is 1 (Aimar et al., 2023).

Tolerances, in points of balanced error over 48,000 test samples (standard error 0.2): what should be optimal comes
within 1.0 of the Bayes-optimal classifier (24 x 13 parameters are fitted to 30,000 samples, 31 of them of the rarest
class), what should be biased is at least 10.0 away.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lt_kernels import BalPoELoss, LogitAdjustmentLoss
from lt_kernels.functional import expert_fusion

CLASSES, WIDTH, TRAIN, TEST_PER_CLASS, IMBALANCE = 24, 12, 30_000, 2_000, 200.0
OPTIMAL, BIASED = 1.0, 10.0


class Mixture:
    def __init__(self, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(CLASSES, WIDTH, generator=generator) * 0.75
        prior = IMBALANCE ** -(torch.arange(CLASSES) / (CLASSES - 1))
        self.counts = (prior / prior.sum() * TRAIN).round().long()
        self.train_y = torch.repeat_interleave(torch.arange(CLASSES), self.counts)
        self.train_x = self.draw(self.train_y, generator)
        self.test_y = torch.arange(CLASSES).repeat_interleave(TEST_PER_CLASS)
        self.test_x = self.draw(self.test_y, generator)

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        return self.centers[labels] + torch.randn(len(labels), WIDTH, generator=generator)

    def error(self, logits: Tensor) -> float:
        """Balanced error of the test samples, %: classes are equally many there."""
        return 100 * float((logits.argmax(1) != self.test_y).double().mean())

    def bayes(self) -> float:
        return self.error(-torch.cdist(self.test_x, self.centers))


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture()


def fit(mixture: Mixture, model: nn.Module, loss: nn.Module) -> nn.Module:
    """To convergence: the problem is convex."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(mixture.train_x), mixture.train_y)
        value.backward()
        return value

    optimizer.step(closure)
    return model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The problem is so small that a second thread only costs synchronisation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class LinearExperts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(experts))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self.heads]


@pytest.mark.filterwarnings("ignore:.*taus.*")
@pytest.mark.parametrize("taus", [(0.0, 1.0, 2.0), (-1.0, 1.0, 3.0), (-1.0, 0.0, 1.0)], ids=str)
def test_experts_are_optimal_if_and_only_if_their_mean_tau_is_one(taus, mixture):
    torch.manual_seed(0)
    model = fit(mixture, LinearExperts(len(taus)), BalPoELoss(mixture.counts, taus=taus))
    with torch.no_grad():
        logits = model(mixture.test_x)
    gap = 100 * float((expert_fusion(logits).prediction != mixture.test_y).double().mean()) - mixture.bayes()
    if sum(taus) == len(taus):
        assert abs(gap) < OPTIMAL
    else:
        assert gap > BIASED
        # a known prior makes the biased product of experts optimal: what is missing is (1 - mean tau) log pi
        log_prior = (mixture.counts / mixture.counts.sum()).log()
        corrected = expert_fusion(logits, log_prior_shift=-(1 - sum(taus) / len(taus)) * log_prior)
        error = 100 * float((corrected.prediction != mixture.test_y).double().mean())
        assert abs(error - mixture.bayes()) < OPTIMAL


@pytest.mark.parametrize("tau", [1.0, 0.0])
def test_logit_adjustment_is_optimal_if_and_only_if_tau_is_one(tau, mixture):
    torch.manual_seed(0)
    model = fit(mixture, nn.Linear(WIDTH, CLASSES), LogitAdjustmentLoss(mixture.counts, tau=tau))
    with torch.no_grad():
        gap = mixture.error(model(mixture.test_x)) - mixture.bayes()
    assert abs(gap) < OPTIMAL if tau == 1.0 else gap > BIASED


def test_the_problem_is_neither_easy_nor_hopeless(mixture):
    assert 15 < mixture.bayes() < 60
