"""transformers: a small BERT reads chess endings; Trainer with our loss, and a model with a LinearHead.

python examples/guides/with_transformers.py
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import chess_endings
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import lt_kernels


class Positions(Dataset[dict[str, Tensor]]):
    """A position is a sentence of six words, one for each coordinate and value."""

    def __init__(self, split: chess_endings.Split) -> None:
        self.split = split
        self.words = split.positions + torch.arange(chess_endings.COORDINATES) * chess_endings.VALUES

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[i], "labels": self.split.moves[i]}


# --8<-- [start:compute_loss]
def compute_loss_with(criterion: torch.nn.Module) -> Any:
    """Return a ``compute_loss_func`` for Trainer; the criterion's reduction is "sum"."""

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch  # of all accumulated batches
        return criterion(outputs["logits"], labels) / items

    return compute_loss


# --8<-- [end:compute_loss]


# --8<-- [start:model]
class BertWithHead(BertPreTrainedModel):
    """``BertForSequenceClassification`` whose classifier is a LinearHead; the class counts stand in the config."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        criterion = lt_kernels.LogitAdjustmentLoss(config.class_counts, reduction="sum")
        self.classifier = lt_kernels.LinearHead(config.hidden_size, config.num_labels, criterion)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        features = self.bert(input_ids, **kwargs).pooler_output
        if labels is None:
            return SequenceClassifierOutput(logits=self.classifier(features))
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        loss = self.classifier(features, labels) / items
        logits = None if self.training else self.classifier(features)  # Trainer's evaluation wants both
        return SequenceClassifierOutput(loss=loss, logits=logits)


# --8<-- [end:model]


def train(model: torch.nn.Module, data: Positions, epochs: float, **options: Any) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=256,
            per_device_eval_batch_size=1024,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            warmup_steps=10,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, **options)
        trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=2)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    split, test = chess_endings.load()
    data, held_out, counts = Positions(split), Positions(test), chess_endings.class_counts(split)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=chess_endings.FEATURES, max_position_embeddings=8, num_labels=len(counts),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip
    config.class_counts = counts.tolist()
    adjusted = lt_kernels.LogitAdjustmentLoss(counts, reduction="sum")
    scores = {}
    for name, kind, options in [
        ("cross-entropy", BertForSequenceClassification, {}),
        ("compute_loss_func", BertForSequenceClassification, {"compute_loss_func": compute_loss_with(adjusted)}),
        ("LinearHead", BertWithHead, {}),
    ]:
        set_seed(0)
        trainer = train(kind(config), data, args.epochs, **options)
        print(f"{name}: loss of the test split {trainer.evaluate(held_out)['eval_loss']:.3f}")
        model = trainer.model
        with tempfile.TemporaryDirectory() as folder:
            # --8<-- [start:checkpoint]
            model.save_pretrained(folder)
            model = kind.from_pretrained(folder)  # the loss is made from the config, whatever the checkpoint has
            # --8<-- [end:checkpoint]
        with torch.inference_mode():
            logits = model.eval()(input_ids=held_out.words).logits
        scores[name] = chess_endings.score(logits, test, counts)
    chess_endings.show(scores)


if __name__ == "__main__":
    main()
