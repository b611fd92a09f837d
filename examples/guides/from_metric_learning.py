"""From pytorch-metric-learning: each loss there, the same loss here, and their values on one batch.

python examples/guides/from_metric_learning.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from torch import Tensor

import lt_kernels

CLASSES, WIDTH, ROWS = 12, 32, 64


def cosine_heads(embeddings: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    # --8<-- [start:heads_before]
    arcface = losses.ArcFaceLoss(num_classes=CLASSES, embedding_size=WIDTH, margin=28.6, scale=64)  # degrees
    cosface = losses.CosFaceLoss(num_classes=CLASSES, embedding_size=WIDTH, margin=0.35, scale=64)
    softmax = losses.NormalizedSoftmaxLoss(num_classes=CLASSES, embedding_size=WIDTH, temperature=0.05)
    # --8<-- [end:heads_before]
    # --8<-- [start:heads_after]
    margin = torch.deg2rad(torch.tensor(28.6)).item()  # radians
    arcface_head = lt_kernels.LinearHead(WIDTH, CLASSES, lt_kernels.ArcFaceLoss(margin, scale=64))
    cosface_head = lt_kernels.LinearHead(WIDTH, CLASSES, lt_kernels.CosFaceLoss(margin=0.35, scale=64))
    plain = lt_kernels.CosFaceLoss(margin=0.0, scale=1 / 0.05)
    softmax_head = lt_kernels.LinearHead(WIDTH, CLASSES, plain)
    # --8<-- [end:heads_after]
    values = {}
    for name, before, head in [
        ("ArcFaceLoss", arcface, arcface_head),
        ("CosFaceLoss", cosface, cosface_head),
        ("NormalizedSoftmaxLoss", softmax, softmax_head),
    ]:
        # --8<-- [start:weights]
        head.load_state_dict({"weight": before.W.detach().T})  # W is [D, C] there, the weight [C, D] here
        # --8<-- [end:weights]
        values[name] = before(embeddings, labels), head(embeddings, labels)
    return values


def sup_con(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # --8<-- [start:supcon]
    before = losses.SupConLoss(temperature=0.1)
    after = lt_kernels.SupConLoss(temperature=0.1, normalize=True, reduction="mean_positives")
    # --8<-- [end:supcon]
    return before(embeddings, labels), after(embeddings, labels)


def self_supervised(embeddings: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    # --8<-- [start:self_supervised]
    before = losses.SelfSupervisedLoss(losses.SupConLoss(temperature=0.1))(embeddings, views)
    after = lt_kernels.SupConLoss(temperature=0.1, normalize=True)(torch.stack([embeddings, views], 1))
    # --8<-- [end:self_supervised]
    return before, after


def against_references(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    references, reference_labels = torch.randn(100, WIDTH), torch.randint(CLASSES, (100,))
    # --8<-- [start:references]
    before = losses.SupConLoss(temperature=0.1)(embeddings, labels, ref_emb=references, ref_labels=reference_labels)
    after = lt_kernels.functional.supervised_contrastive(
        F.normalize(embeddings, dim=1),
        F.normalize(references, dim=1),
        labels,
        reference_labels,
        temperature=0.1,
        normalized=True,
        reduction="mean_positives",
    )
    # --8<-- [end:references]
    return before, after


def memory(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    # --8<-- [start:memory]
    before = losses.CrossBatchMemory(losses.SupConLoss(temperature=0.1), WIDTH, memory_size=256)
    queue = lt_kernels.FeatureQueue(256, WIDTH)

    def after(embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = F.normalize(embeddings, dim=1)
        own = queue.enqueue(embeddings, labels)  # the slots of this batch: no embedding is compared with itself
        return lt_kernels.functional.supervised_contrastive(
            embeddings,
            queue.features,
            labels,
            queue.labels,
            temperature=0.1,
            exclude=own,
            normalized=True,
            reduction="mean_positives",
        )

    # --8<-- [end:memory]
    values = [(before(embeddings, labels), after(embeddings, labels)) for embeddings, labels in batches]
    return values[-1]


def main() -> None:
    torch.manual_seed(0)
    batches = [
        (torch.randn(ROWS, WIDTH, requires_grad=True), torch.randint(CLASSES, (ROWS,))) for _ in range(6)
    ]  # the memory of 256 has turned over
    embeddings, labels = batches[0]
    values = {
        **cosine_heads(embeddings, labels),
        "SupConLoss": sup_con(embeddings, labels),
        "SelfSupervisedLoss": self_supervised(embeddings, torch.randn(ROWS, WIDTH)),
        "SupConLoss(ref_emb=)": against_references(embeddings, labels),
        "CrossBatchMemory": memory(batches),
    }
    print(f"{'':24}{'value there':>12}{'value here':>12}{'gradients differ by':>22}")
    for name, (before, after) in values.items():
        of = batches[-1][0] if name == "CrossBatchMemory" else embeddings
        gradients = [torch.autograd.grad(value, of)[0] for value in (before, after)]
        apart = ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()
        print(f"{name:24}{before.item():12.6f}{after.item():12.6f}{apart:22.1e}")


if __name__ == "__main__":
    main()
