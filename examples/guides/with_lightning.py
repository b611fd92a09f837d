"""Lightning: LDAM with deferred re-weighting on chess endings, with metrics by shot group and a checkpoint.

python examples/guides/with_lightning.py
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import chess_endings
import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lt_kernels
from lt_kernels.metrics import ShotGroupAccuracy
from lt_kernels.schedules import DeferredReweighting


# --8<-- [start:module]
class Classifier(L.LightningModule):
    """``self(x)`` gives logits, as Lightning's ``predict_step`` expects; the head gives the loss of training."""

    def __init__(self, class_counts: list[int], long_tailed: bool, epochs: int) -> None:
        super().__init__()
        self.save_hyperparameters()  # counts as a list: load_from_checkpoint builds the same loss
        criterion = lt_kernels.LDAMLoss(class_counts) if long_tailed else None  # None: cross-entropy
        self.body = chess_endings.body()
        self.head = lt_kernels.LinearHead(256, len(class_counts), criterion)
        self.accuracy = ShotGroupAccuracy(
            class_counts, many_above=chess_endings.MANY_ABOVE, few_below=chess_endings.FEW_BELOW
        )
        self.schedule = DeferredReweighting(self.head.loss, class_counts, switch_epoch=epochs * 4 // 5)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.body(features))

    def on_train_epoch_start(self) -> None:
        if self.hparams["long_tailed"]:
            self.schedule.step(self.current_epoch)  # also right after a resume: the epoch alone decides

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        features, target = batch
        loss = self.head(self.body(features), target)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        features, target = batch
        self.accuracy.update(self(features), target)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.accuracy.compute())  # gathered over processes, as every torchmetrics metric is
        self.accuracy.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# --8<-- [end:module]


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    quiet()
    split, test = chess_endings.load()
    counts = chess_endings.class_counts(split)
    training = DataLoader(TensorDataset(split.features, split.moves), 256, shuffle=True, drop_last=True)
    testing = DataLoader(TensorDataset(test.features, test.moves), 4096)
    scores = {}
    for name, long_tailed in {"cross-entropy": False, "LDAM + DRW": True}.items():
        L.seed_everything(0, verbose=False)
        # --8<-- [start:trainer]
        trainer = L.Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(Classifier(counts.tolist(), long_tailed, args.epochs), training)
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_checkpoint(f"{folder}/last.ckpt")  # the loss's class tensors are in it, DRW's weights too
            model = Classifier.load_from_checkpoint(f"{folder}/last.ckpt")
        (found,) = trainer.validate(model, testing, verbose=False)
        # --8<-- [end:trainer]
        if long_tailed:
            print(f"class weights after the switch: {model.head.loss.weight.min():.2f} ... "
                  f"{model.head.loss.weight.max():.2f}")  # fmt: skip
        scores[name] = {group: 100 * value for group, value in found.items()}
    chess_endings.show(scores)


if __name__ == "__main__":
    main()
