"""``fit_expert_weights`` against plain PyTorch: SADE's test-time aggregation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from _loss_cases import C
from _refused import refused
from torch import Tensor

import lt_kernels
from lt_kernels.losses import fit_expert_weights
from lt_kernels.losses.sade import EXPERT_WEIGHTS_PRESETS

E = 3


def two_views(rows: int = 200, stable: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two views' logits [E, rows, C]: the expert ``stable`` says nearly the same of both."""
    generator = torch.Generator().manual_seed(3)
    first, second = 2 * torch.randn(2, E, rows, C, generator=generator, dtype=torch.float64)
    second[stable] = first[stable] + 0.1 * second[stable]
    return first.to(dtype), second.to(dtype)


class Settings(NamedTuple):
    """What a published script sets, or our default."""

    lr: float = 0.025
    decay: float = 5e-4
    of_weights: float = 0.01
    of_predictions: float = 0.0


DEFAULT = Settings()


def fitted_in_plain_torch(
    first: Tensor, second: Tensor, steps: list[Any], min_weight: float = 0.05, settings: Settings = DEFAULT
) -> Tensor:
    """SGD with Nesterov momentum and weight decay, written out."""
    a, velocity = torch.full((len(first),), 1 / len(first), dtype=first.dtype), None
    for rows in steps:
        a.requires_grad_()
        w = a.softmax(0)
        p, q = ((w[:, None, None] * z[:, rows]).sum(0).softmax(1) for z in (first, second))
        cosine = (p * q).sum(1) / (p.norm(dim=1) * q.norm(dim=1))
        entropy = -torch.mean(p * torch.log(p)) - torch.mean(q * torch.log(q))
        aim = cosine.mean() - settings.of_weights * (w * w.log()).sum() + settings.of_predictions * entropy
        (gradient,) = torch.autograd.grad(-aim, a)
        gradient = gradient + settings.decay * a.detach()
        velocity = gradient if velocity is None else 0.9 * velocity + gradient
        a = (a - settings.lr * (gradient + 0.9 * velocity)).detach()
        if (a.softmax(0) < min_weight).any():
            break
    return a.softmax(0)


#: Of the authors' test-time scripts and configurations.
PUBLISHED = {
    "cifar100-lt": Settings(0.1, 5e-4, 0.0),
    "imagenet-lt": Settings(0.025, 5e-4, 0.0),
    "places-lt": Settings(0.01, 4e-4, 0.0),
    "inat2018": Settings(0.2, 2e-4, 0.0, 0.01),
}


class TestFitExpertWeights:
    def test_against_plain_torch(self):
        first, second = two_views(dtype=torch.float64)
        steps = [slice(start, start + 64) for start in range(0, 200, 64)] * 2
        ours = fit_expert_weights(first, second, epochs=2, batch_size=64)
        torch.testing.assert_close(ours, fitted_in_plain_torch(first, second, steps))
        assert ours.dtype == torch.float64
        assert not ours.requires_grad

    @pytest.mark.parametrize("preset", PUBLISHED)
    def test_presets_are_the_published_settings(self, preset):
        views = two_views(dtype=torch.float64)
        steps = [slice(0, 128), slice(128, 200)] * 3
        ours = fit_expert_weights(*views, preset=preset, epochs=3)
        expected = fitted_in_plain_torch(*views, steps, min_weight=0.0, settings=PUBLISHED[preset])
        torch.testing.assert_close(ours, expected)
        other = fitted_in_plain_torch(*views, steps, min_weight=0.0, settings=PUBLISHED[preset]._replace(lr=0.3))
        torch.testing.assert_close(fit_expert_weights(*views, preset=preset, epochs=3, lr=0.3), other)

    def test_every_preset_is_listed(self):
        assert set(PUBLISHED) == set(EXPERT_WEIGHTS_PRESETS)

    def test_presets_stop_after_an_epoch_whose_weights_are_small(self):
        views = two_views(dtype=torch.float64)
        steps = [slice(0, 128), slice(128, 200)]
        for epochs in range(1, 1000):
            whole = fitted_in_plain_torch(*views, steps * epochs, min_weight=0.0, settings=PUBLISHED["inat2018"])
            if whole.min() < 0.045:
                break
        assert 1 < epochs < 999
        torch.testing.assert_close(fit_expert_weights(*views, preset="inat2018", epochs=1000), whole)
        early = fit_expert_weights(*views, preset="inat2018", epochs=1000, min_weight=1.0, stop_after="step")
        first_step = fitted_in_plain_torch(*views, steps[:1], settings=PUBLISHED["inat2018"])
        torch.testing.assert_close(early, first_step)
        late = fit_expert_weights(*views, preset="inat2018", epochs=1000, min_weight=1.0)
        first_epoch = fitted_in_plain_torch(*views, steps, min_weight=0.0, settings=PUBLISHED["inat2018"])
        torch.testing.assert_close(late, first_epoch)

    def test_prefers_the_expert_that_is_stable(self):
        weight = fit_expert_weights(*two_views(stable=2), epochs=20)
        assert weight.argmax() == 2
        assert weight.sum().item() == pytest.approx(1.0)
        assert weight.dtype == torch.float32

    def test_stops_at_the_smallest_weight(self):
        views = two_views(dtype=torch.float64)
        weight = fit_expert_weights(*views, epochs=1000)
        assert 0.04 < weight.min().item() < 0.05
        early = fit_expert_weights(*views, epochs=1000, min_weight=0.3)
        steps = [slice(0, 128), slice(128, 200)] * 1000
        torch.testing.assert_close(early, fitted_in_plain_torch(*views, steps, min_weight=0.3))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_masked_classes_take_no_part(self, dtype):
        views = two_views(dtype=dtype)
        masked = [
            torch.cat([view[..., :3], torch.full_like(view[..., :1], -math.inf), view[..., 3:]], 2) for view in views
        ]
        torch.testing.assert_close(fit_expert_weights(*masked), fit_expert_weights(*views))
        ours = fit_expert_weights(*masked, preset="inat2018")
        of_predictions = 0.01 * C / (C + 1)  # the mean is over the masked class too
        expected = fit_expert_weights(*views, preset="inat2018", prediction_entropy_weight=of_predictions)
        torch.testing.assert_close(ours, expected)

    def test_no_epochs_weigh_equally(self):
        assert fit_expert_weights(*two_views(), epochs=0).tolist() == pytest.approx([1 / 3] * 3)

    def test_the_same_generator_gives_the_same_weights(self):
        views = two_views()
        ours = [
            fit_expert_weights(*views, batch_size=32, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        ]
        assert torch.equal(ours[0], ours[1])
        assert not torch.equal(ours[0], ours[2])
        assert not torch.equal(ours[0], fit_expert_weights(*views, batch_size=32))
        order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        whole = fit_expert_weights(*views, epochs=1, batch_size=32, generator=torch.Generator().manual_seed(0))
        sorted_views = (view[:, order] for view in views)
        assert torch.equal(whole, fit_expert_weights(*sorted_views, epochs=1, batch_size=32))

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_without_gradients(self, mode):
        expected = fit_expert_weights(*two_views())
        with mode():
            assert torch.equal(fit_expert_weights(*two_views()), expected)

    def test_lists_and_half_precision(self):
        first, second = (view.bfloat16() for view in two_views())
        expected = fit_expert_weights(first.float(), second.float())
        assert torch.equal(fit_expert_weights(list(first), list(second)), expected)

    def test_feeds_expert_fusion(self):
        first, second = two_views()
        weight = fit_expert_weights(first, second)
        fused = lt_kernels.functional.expert_fusion(first, expert_weight=weight)
        assert torch.equal(fused.prediction, torch.einsum("e,enc->nc", weight, first).argmax(1))

    @refused(
        "change",
        ({"view1_logits": torch.zeros(2, 3)}, ValueError, "view1_logits: got shape (2, 3), expected [E, N, C]"),
        ({"view1_logits": 3}, TypeError, "view1_logits: got int, expected a Tensor [E, N, C]"),
        ({"view2_logits": torch.zeros(3, 2, 5).long()}, TypeError, "view2_logits: got dtype torch.int64"),
        (
            {"view2_logits": [torch.zeros(2, 5), torch.zeros(3, 5)]},
            ValueError,
            "view2_logits[1]: got shape (3, 5), expected (2, 5)",
        ),
        (
            {"view2_logits": torch.zeros(3, 4, 6)},
            ValueError,
            "view2_logits: got shape (3, 4, 6), expected (3, 4, 5) as view1_logits",
        ),
        (
            {"view2_logits": torch.zeros(3, 4, 5).double()},
            ValueError,
            "view2_logits: got dtype torch.float64, expected torch.float32 as view1_logits",
        ),
        ({"epochs": -1}, ValueError, "epochs: got -1, expected an int >= 0"),
        ({"epochs": 1.0}, TypeError, "epochs: got float, expected an int"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, expected an int >= 1"),
        ({"lr": -1.0}, ValueError, "lr: got -1.0, expected a number >= 0"),
        ({"momentum": "0"}, TypeError, "momentum: got str, expected a number"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay: got nan, expected a number >= 0"),
        ({"entropy_weight": -0.1}, ValueError, "entropy_weight: got -0.1, expected a number >= 0"),
        ({"min_weight": math.inf}, ValueError, "min_weight: got inf, expected a number >= 0"),
        ({"prediction_entropy_weight": -1}, ValueError, "prediction_entropy_weight: got -1, expected a number >= 0"),
        ({"preset": "inat"}, ValueError, "preset: got 'inat', expected one of 'cifar100-lt', 'imagenet-lt'"),
        ({"stop_after": "batch"}, ValueError, "stop_after: got 'batch', expected one of 'step', 'epoch'"),
        ({"generator": 3}, TypeError, "generator: got 3, expected a torch.Generator of the CPU or None"),
    )
    def test_bad_arguments(self, change, refusal):
        arguments: dict[str, Any] = {
            "view1_logits": torch.zeros(3, 4, 5),
            "view2_logits": torch.zeros(3, 4, 5),
            **change,
        }
        with refusal:
            fit_expert_weights(**arguments)
