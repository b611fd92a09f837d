"""Every loss of the package with an input: what the contract is tested on, and what tests of one loss start from."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt_kernels.losses import (
    ArcFaceLoss,
    BalancedContrastiveLoss,
    BalancedSoftmaxLoss,
    BalPoELoss,
    CosFaceLoss,
    ELMLoss,
    GMLLoss,
    LDAMLoss,
    LogitAdjustmentLoss,
    NCLLoss,
    PaCoLoss,
    RIDELoss,
    SADELoss,
    SupConLoss,
    VSLoss,
)

COUNTS = [500, 377, 120, 101, 100, 47, 20, 19, 7, 2]
OTHER = [3, 30, 300, 30, 3, 44, 5, 6, 1000, 8]
C = len(COUNTS)
N, M, D = 37, 61, 19


class Batch(NamedTuple):
    """Inputs of every kind, float64 and int64; ``names`` of them that are floating are differentiated."""

    logits: Tensor  # [N, C], cosines
    experts: Tensor  # [3, N, C]
    embeddings: Tensor  # [N, D], unit vectors
    views: Tensor  # [N, 2, D]
    centers: Tensor  # [C, D]
    key: Tensor  # [M, D]
    target: Tensor  # [N]
    key_label: Tensor  # [M]

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(*(x.to(dtype) if x.is_floating_point() else x for x in self))

    def rows(self, which: Any) -> Batch:
        """Some of the N rows."""
        experts = self.experts[:, which]
        return self._replace(
            logits=self.logits[which], experts=experts, embeddings=self.embeddings[which], views=self.views[which],
            target=self.target[which],
        )  # fmt: skip


def make_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    return Batch(
        logits=torch.rand(N, C, generator=generator, dtype=torch.float64) * 1.8 - 0.9,
        experts=3 * torch.randn(3, N, C, generator=generator, dtype=torch.float64),
        embeddings=unit(N, D),
        views=unit(N, 2, D),
        centers=unit(C, D),
        key=unit(M, D),
        target=torch.randint(0, C, (N,), generator=generator),
        key_label=torch.randint(0, C, (M,), generator=generator),
    )


class Case(NamedTuple):
    """One loss: how to make it from counts and options, and how to call it on a batch."""

    make: Callable[..., nn.Module]
    call: Callable[[nn.Module, Batch], Tensor]
    from_counts: bool = True  # class tensors that are derived from counts
    weighted: bool = False  # takes class weights and label smoothing
    ignores: bool = True  # has an ignore_index

    @property
    def options(self) -> dict[str, Any]:
        """Options under which nothing is at its default that could be."""
        return {"weight": list(range(1, C + 1)), "label_smoothing": 0.1} if self.weighted else {}


def of_logits(loss: nn.Module, batch: Batch) -> Tensor:
    return loss(batch.logits, batch.target)


def of_experts(loss: nn.Module, batch: Batch) -> Tensor:
    return loss(batch.experts, batch.target)


def without_counts(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda counts, **options: make(**options)


classifier = partial(Case, call=of_logits, weighted=True)
experts = partial(Case, call=of_experts, weighted=True)
views = partial(Case, from_counts=False)

CLASSIFIERS = {
    "logit-adjustment": classifier(LogitAdjustmentLoss),
    "balanced-softmax": classifier(BalancedSoftmaxLoss),
    "ldam": classifier(LDAMLoss),
    "vs": classifier(VSLoss),
    "arcface-from-counts": classifier(ArcFaceLoss.from_counts),
    "cosface": classifier(without_counts(CosFaceLoss), from_counts=False),
    "cosface-per-class": classifier(
        without_counts(partial(CosFaceLoss, [0.1 * (c + 1) / C for c in range(C)])), from_counts=False
    ),
    "arcface": classifier(without_counts(ArcFaceLoss), from_counts=False),
}
EXPERTS = {
    "balpoe": experts(BalPoELoss),
    "sade": experts(SADELoss),
    "ride": experts(RIDELoss),
    "ncl": experts(NCLLoss),
}
CONTRASTIVE = {
    "supcon": views(without_counts(SupConLoss), lambda loss, b: loss(b.views, b.target)),
    "bcl": views(BalancedContrastiveLoss, lambda loss, b: loss(b.views, b.target, b.centers)),
    "paco": Case(
        partial(PaCoLoss, alpha=0.05),
        lambda loss, b: loss(b.embeddings, b.target, b.key, b.key_label, b.logits, exclude="self"),
    ),
    "gml": Case(
        GMLLoss,
        lambda loss, b: loss(
            b.embeddings, b.target, b.key, b.key_label, b.logits, query_id=b.target, key_id=b.key_label
        ),
    ),
    "elm-pairwise": Case(ELMLoss, lambda loss, b: loss(b.logits, b.embeddings, b.target)),
    "elm-contrastive": Case(
        partial(ELMLoss, regularizer="contrastive"), lambda loss, b: loss(b.logits, b.embeddings, b.target)
    ),
}
CASES = {**CLASSIFIERS, **EXPERTS, **CONTRASTIVE}


def through_torch_save(loss: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "torch.save": through_torch_save,
}
