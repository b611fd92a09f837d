"""timm: a small residual network on long-tailed digits, with Mixup's soft targets and with a LinearHead.

python examples/guides/with_timm.py
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import lt_kernels
from lt_kernels.demo.digits import FEW_BELOW, MANY_ABOVE, Split, class_counts
from lt_kernels.metrics import ShotGroupAccuracy


def make_model(classes: int) -> nn.Module:
    return timm.create_model("test_resnet", num_classes=classes, in_chans=1, output_stride=8)


def optimize(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)


# --8<-- [start:criterion]
def train_with(criterion: nn.Module, split: Split, steps: int) -> nn.Module:
    """Run timm's loop with another criterion, which takes Mixup's soft targets [N, C]."""
    model = make_model(len(class_counts())).train()
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=len(class_counts()))
    optimizer, schedule = optimize(model, steps)
    for _ in range(steps):
        rows = torch.randint(len(split.labels), (64,))
        images, target = mixup(split.images[rows], split.labels[rows])
        loss = criterion(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# --8<-- [end:criterion]


# --8<-- [start:head]
def train_head(split: Split, steps: int) -> nn.Module:
    """Train a LinearHead as classifier: ``model(images)`` gives logits as before, the head the loss of training."""
    model = make_model(len(class_counts())).train()
    model.fc = lt_kernels.LinearHead.from_linear(model.get_classifier(), lt_kernels.LogitAdjustmentLoss(class_counts()))
    optimizer, schedule = optimize(model, steps)
    for _ in range(steps):
        rows = torch.randint(len(split.labels), (64,))
        mixed = lt_kernels.mixing.mixup(split.images[rows], split.labels[rows], alpha=0.2)
        features = model.forward_head(model.forward_features(mixed.input), pre_logits=True)
        loss = model.fc(features, mixed.target, mixed.mixed_target, mixed.mix_lambda)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# --8<-- [end:head]


@torch.inference_mode()
def score(model: nn.Module, split: Split) -> dict[str, float]:
    metric = ShotGroupAccuracy(class_counts(), many_above=MANY_ABOVE, few_below=FEW_BELOW)
    metric.update(model(split.test_images), split.test_labels)
    return {name: 100 * value.item() for name, value in metric.compute().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    split = Split.make(seed=0)
    methods = {
        "SoftTargetCrossEntropy": lambda: train_with(SoftTargetCrossEntropy(), split, args.steps),
        "LogitAdjustmentLoss": lambda: train_with(lt_kernels.LogitAdjustmentLoss(class_counts()), split, args.steps),
        "LinearHead": lambda: train_head(split, args.steps),
    }
    print(f"{'':24}" + "".join(f"{name:>10}" for name in ("overall", "many", "medium", "few", "balanced")))
    for name, train in methods.items():
        torch.manual_seed(0)
        model = train()
        print(f"{name:24}" + "".join(f"{value:10.1f}" for value in score(model, split).values()))


if __name__ == "__main__":
    main()
