"""Accelerate: cross-entropy and logit adjustment on chess endings, in bfloat16 with accumulated gradients.

python examples/guides/with_accelerate.py        or: accelerate launch examples/guides/with_accelerate.py
"""

from __future__ import annotations

import argparse
import tempfile

import chess_endings
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lt_kernels


# --8<-- [start:model]
class Classifier(nn.Module):
    """Body and head in one module, so that ``prepare`` wraps both: ``model(x, y)`` is the loss, ``model(x)`` logits."""

    def __init__(self, criterion: nn.Module | None) -> None:
        super().__init__()
        self.body = chess_endings.body()
        self.head = lt_kernels.LinearHead(256, len(chess_endings.CLASSES), criterion)

    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        return self.head(self.body(features), target)


# --8<-- [end:model]


def train(criterion: nn.Module | None, split: chess_endings.Split, epochs: int) -> tuple[Accelerator, nn.Module]:
    set_seed(0)
    # --8<-- [start:loop]
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = Classifier(criterion)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(split.features, split.moves), batch_size=256, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * len(loader) // 2 + epochs)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for _ in range(epochs):
        for features, target in loader:
            with accelerator.accumulate(model):
                loss = model(features, target)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    # --8<-- [end:loop]
    return accelerator, model


def resumed(accelerator: Accelerator, model: nn.Module, features: Tensor) -> Tensor:
    """Return logits after the state went through a checkpoint, the loss's class tensors with it."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        accelerator.load_state(folder)
    # --8<-- [start:predict]
    model.eval()
    with torch.inference_mode():
        return accelerator.unwrap_model(model)(features)  # logits; .head.predict(...) has classes and confidences
    # --8<-- [end:predict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    split, test = chess_endings.load()
    counts = chess_endings.class_counts(split)
    scores = {}
    for name, criterion in {
        "cross-entropy": None,
        "logit adjustment": lt_kernels.LogitAdjustmentLoss(counts),
    }.items():
        accelerator, model = train(criterion, split, args.epochs)
        scores[name] = chess_endings.score(resumed(accelerator, model, test.features), test, counts)
    chess_endings.show(scores)


if __name__ == "__main__":
    main()
