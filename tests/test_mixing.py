"""Mixup and CutMix against their formulas, and their losses against losses of mixed probabilities."""

from __future__ import annotations

import doctest
import math
import re

import pytest
import torch
import torch.nn.functional as F
from _refused import refused

from lt_kernels import BalPoELoss, LogitAdjustmentLoss, mixing
from lt_kernels.mixing import MixedBatch, cutmix, mixup

N, CHANNELS, H, W = 8, 3, 12, 9
both = pytest.mark.parametrize("mix", [mixup, cutmix], ids=["mixup", "cutmix"])


def images(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Every value of every image differs, so that a pixel says where it comes from."""
    x = torch.arange(N * CHANNELS * H * W, dtype=torch.float64).reshape(N, CHANNELS, H, W)
    return x.to(dtype), torch.arange(N)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_mixup_is_a_convex_combination(dtype):
    x, y = images(dtype)
    for seed in range(5):
        mixed = mixup(x, y, 0.7, generator=seeded(seed))
        partner = mixed.mixed_target  # the classes are the positions
        assert sorted(partner.tolist()) == list(range(N))
        assert torch.equal(mixed.target, y)
        assert 0 <= mixed.mix_lambda <= 1
        expected = mixed.mix_lambda * x.double() + (1 - mixed.mix_lambda) * x[partner].double()
        torch.testing.assert_close(mixed.input.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert mixed.input.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_cutmix_pastes_a_rectangle_and_lambda_is_its_exact_share(dtype):
    x, y = images(dtype)
    shares = []
    for seed in range(50):
        mixed = cutmix(x, y, 1.0, generator=seeded(seed))
        partner = mixed.mixed_target
        stays = mixed.input == x
        assert torch.equal(mixed.input, torch.where(stays, x, x[partner]))
        moved = partner != y
        if moved.any():
            outside = stays[moved][:, :1]
            assert torch.equal(stays[moved], outside.expand(-1, CHANNELS, -1, -1)[:, :])
            assert (outside == outside[:1]).all()  # one rectangle for the batch
            rectangle = ~outside[0, 0]
            assert torch.equal(rectangle, rectangle.any(1)[:, None] & rectangle.any(0)[None])
            assert mixed.mix_lambda == pytest.approx(1 - rectangle.double().mean().item(), abs=1e-12)
            for side in (rectangle.any(1), rectangle.any(0)):
                assert side.long().diff().abs().sum() <= 2  # one stretch
        shares.append(mixed.mix_lambda)
    assert min(shares) < 0.3
    assert max(shares) > 0.9


@both
@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_is_beta_distributed(mix, alpha):
    x, y = torch.zeros(1, 1, 64, 64), torch.zeros(1, dtype=torch.int64)
    generator = seeded(1)
    shares = torch.tensor([mix(x, y, alpha, generator=generator).mix_lambda for _ in range(3000)], dtype=torch.float64)
    if mix is cutmix:  # the border cuts rectangles off, so that more stays
        assert 0.5 < shares.mean() < 1
        return
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 3000))
    assert shares.var().item() == pytest.approx(variance, rel=0.1)


@both
class TestBoth:
    def test_the_batch_given_is_not_changed(self, mix):
        x, y = images()
        before, labels = x.clone(), y.clone()
        mixed = mix(x, y, 1.0, generator=seeded())
        mixed.input.zero_()
        assert torch.equal(x, before)
        assert torch.equal(y, labels)

    def test_alpha_0_mixes_nothing(self, mix):
        x, y = images()
        mixed = mix(x, y, 0.0, generator=seeded())
        assert torch.equal(mixed.input, x)
        assert mixed.input.data_ptr() != x.data_ptr()
        assert mixed.mix_lambda == 1.0

    def test_the_generator_decides(self, mix):
        x, y = images()
        first, again, other = (mix(x, y, 1.0, generator=seeded(seed)) for seed in (3, 3, 4))
        assert torch.equal(first.input, again.input)
        assert first.mix_lambda == again.mix_lambda
        assert first.mix_lambda != other.mix_lambda
        torch.manual_seed(3)
        assert mix(x, y, 1.0).mix_lambda == first.mix_lambda

    def test_is_what_losses_take(self, mix):
        x, y = images()
        mixed = mix(x, y, 1.0, generator=seeded())
        assert isinstance(mixed, MixedBatch)
        assert isinstance(mixed.mix_lambda, float)
        logits = torch.randn(3, N, N, generator=seeded(), dtype=torch.float64)
        counts = list(range(1, N + 1))
        q = mixed.mix_lambda * F.one_hot(mixed.target, N) + (1 - mixed.mix_lambda) * F.one_hot(mixed.mixed_target, N)
        adjusted = LogitAdjustmentLoss(counts, dtype=torch.float64)
        torch.testing.assert_close(adjusted(logits[0], *mixed[1:]), adjusted(logits[0], q.double()))
        experts = BalPoELoss(counts, (1.0, 1.0, 1.0), eps=0.0, dtype=torch.float64)
        expected = torch.stack([adjusted(each, q.double()) for each in logits]).mean()
        torch.testing.assert_close(experts(logits, *mixed[1:]), expected)

    def test_no_samples(self, mix):
        mixed = mix(torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64), 1.0)
        assert mixed.input.shape == (0, 3, 4, 4)

    def test_gradients_pass(self, mix):
        x, y = images()
        x.requires_grad_()
        mix(x, y, 1.0, generator=seeded()).input.sum().backward()
        assert x.grad.sum().item() == pytest.approx(x.numel(), rel=1e-5)

    @refused(
        "change",
        ({"x": [1.0]}, TypeError, "x: got list, expected a Tensor"),
        ({"y": [1]}, TypeError, "y: got list, expected a Tensor"),
        ({"x": torch.zeros(())}, ValueError, "x: got shape ()"),
        ({"y": torch.zeros(N)}, TypeError, "y: got dtype torch.float32, expected class indices of an integer"),
        ({"y": torch.zeros(3).long()}, ValueError, "y: got shape (3,), expected (8,), one class for each sample"),
        ({"y": torch.zeros(N, 2).long()}, ValueError, "y: got shape (8, 2), expected (8,)"),
        ({"y": torch.zeros(N, device="meta").long()}, ValueError, "y: got device meta, expected cpu as x"),
        ({"alpha": -0.1}, ValueError, "alpha: got -0.1, expected a number >= 0"),
        ({"alpha": math.nan}, ValueError, "alpha: got nan, expected a number >= 0"),
        ({"alpha": "1"}, TypeError, "alpha: got str, expected a number"),
        ({"generator": 3}, TypeError, "generator: got int, expected a torch.Generator or None"),
    )
    def test_bad_arguments(self, mix, change, refusal):
        x, y = images()
        with refusal:
            mix(**{"x": x, "y": y, "alpha": 1.0, **change})


def test_mixup_needs_floating_samples_of_any_shape():
    x, y = images(torch.int32)
    with pytest.raises(TypeError, match=r"x: got dtype torch.int32, expected a floating-point dtype"):
        mixup(x, y, 1.0)
    assert mixup(torch.zeros(N, 5), y, 1.0).input.shape == (N, 5)


@pytest.mark.parametrize("shape", [(N, 5), (N, 3, 8), (N, 3, 0, 8)], ids=str)
def test_cutmix_needs_images(shape):
    with pytest.raises(ValueError, match=re.escape(f"x: got shape {shape}, expected images [N, channels, H, W]")):
        cutmix(torch.zeros(shape), torch.arange(N), 1.0)


def test_examples_in_docstrings():
    result = doctest.testmod(mixing)
    assert result.attempted > 0
    assert result.failed == 0
