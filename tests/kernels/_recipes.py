"""Training steps of contrastive losses, with their queues and centers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lt_kernels import losses
from lt_kernels.functional import supervised_contrastive
from lt_kernels.queues import ClassQueue


@dataclass(frozen=True)
class Batch:
    """What a training step is given; counts of 200 classes fall from 512 to 2."""

    query: Tensor  # [N, D], unit vectors, requires grad
    label: Tensor  # [N]
    key: Tensor  # [M, D], unit vectors, requires grad
    logits: Tensor  # [N, C], cosines, requires grad
    centers: Tensor  # [C, D], requires grad
    loss: Callable[[Batch], Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "loss"}

    @property
    def differentiable(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.tensors.items() if value.requires_grad}

    def converted(self, dtype: torch.dtype) -> Batch:
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in self.differentiable.items()}
        return replace(self, **leaves)


Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Recipe:
    """A work's operator and case: ``make`` takes class counts and a device, and returns the loss of a batch."""

    make: Callable[[Tensor, str], Loss]

    def sample(self, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        classes = 200
        counts = (512 * 256 ** -torch.linspace(0, 1, classes)).round()

        def unit(*shape: int) -> Tensor:
            x = F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
            return x.to(device, dtype).requires_grad_()

        label = torch.multinomial(counts, 96, replacement=True, generator=generator).to(device)
        cosines = torch.rand(96, classes, generator=generator, dtype=torch.float64) * 2 - 1
        logits = cosines.to(device, dtype).requires_grad_()
        query, key, centers = unit(96, 128), unit(2048, 128), unit(classes, 128)
        return Batch(query, label, key, logits, centers, self.make(counts, device))

    def results(self, batch: Batch) -> Iterable[Tensor]:
        return [batch.loss(batch)]

    def around(self) -> AbstractContextManager[None]:
        return nullcontext()


def _supcon(counts: Tensor, device: str) -> Loss:
    loss = losses.SupConLoss()
    return lambda b: loss(b.query.view(-1, 2, 128), b.label[::2])


def _bcl(counts: Tensor, device: str) -> Loss:
    loss = losses.BalancedContrastiveLoss(counts)
    return lambda b: loss(b.query.view(-1, 2, 128), b.label[::2], b.centers)


def _paco(counts: Tensor, device: str) -> Loss:
    loss = losses.PaCoLoss(counts, alpha=0.05, device=device)
    own = torch.arange(96, device=device)
    labels = torch.arange(2048, device=device) % 200
    return lambda b: loss(
        b.query, b.label, torch.cat([b.query, b.key]), torch.cat([b.label, labels]), b.logits, exclude=own
    )


def _gml(counts: Tensor, device: str) -> Loss:
    """With the enqueue of the batch, into a queue that is filled except for the rarest classes."""
    loss = losses.GMLLoss(counts, device=device)
    queue = ClassQueue(counts, 2048, 128, device=device)
    owners = torch.arange(200, device=device).repeat_interleave(queue.sizes)
    queue.labels.copy_(owners.masked_fill(owners >= 180, -1))
    ids = torch.arange(96, device=device)
    start = {name: value.clone() for name, value in queue.state_dict().items()}

    def run(b: Batch) -> Tensor:
        for name, value in queue.named_buffers():
            value.copy_(start[name])  # the same every time
        slots = queue.enqueue(b.query, b.label, ids)
        result: Tensor = loss(b.query, b.label, b.key, queue.labels, b.logits, own_key=slots)
        return result + loss(b.query, b.label, b.key, queue.labels, b.logits, query_id=ids, key_id=queue.ids)

    return run


def _supervised(counts: Tensor, device: str) -> Loss:
    labels = torch.arange(2048, device=device) % 200
    return lambda b: supervised_contrastive(b.query, b.key, b.label, labels, temperature=0.1, form="in")


RECIPES = {
    "SupConLoss": Recipe(_supcon),
    "BalancedContrastiveLoss": Recipe(_bcl),
    "PaCoLoss": Recipe(_paco),
    "GMLLoss": Recipe(_gml),
    "supervised_contrastive": Recipe(_supervised),
}
