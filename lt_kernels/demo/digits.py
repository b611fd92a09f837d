"""Handwritten digits made long-tailed, and small networks that are trained on them with different losses.

The data are scikit-learn's digits (1,797 real images of 8 x 8 pixels). For each seed the ten digits are put in
a random order and given 150 ... 3 training images (imbalance 50, exponential profile); 24 other images of each digit
are the balanced test split. Network, optimiser, schedule, batches and seeds are the same for every loss. The last layer
is a cosine classifier for LDAM and GML, and BalPoE has three experts of two layers each. Every loss keeps its defaults,
mixup BalPoE's published alpha, GML its temperature published for CIFAR; GML's queue and momentum are smaller than
published, as the data set is. Nothing was tuned on the test split.

SupCon compares two views of each image, which are shifted by up to a pixel and a little noisy; it trains for half the
epochs, so that its network sees as many images as the others. Afterwards a linear layer is trained on the frozen
embeddings of the training images, with cross-entropy and with logit adjustment. "views" is logit adjustment of one such
view, which tells apart what the views do and what the loss does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses as L
from ..functional import expert_fusion
from ..mixing import mixup
from ..queues import ClassQueue, momentum_update
from ..schedules import DeferredReweighting

CLASSES = 10
LARGEST, IMBALANCE, TEST_PER_CLASS = 150, 50, 24
MANY_ABOVE, FEW_BELOW = 50, 10
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 1e-3
EXPERTS, WIDTH, PROJECTION = 3, 64, 32
NOISE, QUEUE, MOMENTUM, PROBE_STEPS = 0.1, 256, 0.99, 300
#: Losses of one classifier, by the name of their network.
CLASSIFIERS: dict[str, Callable[[Tensor], L.MarginCrossEntropyBase]] = {
    "cross-entropy": lambda counts: L.MarginCrossEntropyBase(),
    "logit adjustment": L.LogitAdjustmentLoss,
    "balanced softmax": L.BalancedSoftmaxLoss,
    "LDAM + DRW": L.LDAMLoss,
    "VS": L.VSLoss,
    "logit adj. + views": L.LogitAdjustmentLoss,
    "GML": lambda counts: L.MarginCrossEntropyBase(scale=30.0),  # of its cosines; GMLLoss is what it is trained for
}
BALPOE = ("BalPoE (3 experts)", "BalPoE + mixup")
#: SupCon's network gives two rows of the table.
PROBES = {"SupCon + probe": CLASSIFIERS["cross-entropy"], "SupCon + adj. probe": CLASSIFIERS["logit adjustment"]}
NETWORKS = (*list(CLASSIFIERS)[:5], *BALPOE, "logit adj. + views", "SupCon", "GML", "ELM")
LOSSES = tuple(row for network in NETWORKS for row in (PROBES if network == "SupCon" else (network,)))


def class_counts() -> Tensor:
    """Return the training images per class, most frequent first, int64 [10]."""
    position = torch.arange(CLASSES) / (CLASSES - 1)
    return (LARGEST * float(IMBALANCE) ** -position).round().long()


class Split(NamedTuple):
    """One long-tailed train split and its balanced test split; class c is the c-th most frequent."""

    images: Tensor  # [423, 1, 8, 8]
    labels: Tensor  # [423]
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def make(cls, seed: int) -> Split:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.as_tensor(digits.target)
        generator = torch.Generator().manual_seed(seed)
        train, test = [], []
        for digit, count in zip(torch.randperm(CLASSES, generator=generator), class_counts(), strict=True):
            found = (labels == digit).nonzero()[:, 0]
            found = found[torch.randperm(len(found), generator=generator)]
            test.append(found[:TEST_PER_CLASS])
            train.append(found[TEST_PER_CLASS : TEST_PER_CLASS + int(count)])
        ranks = [
            torch.arange(CLASSES).repeat_interleave(torch.tensor([len(p) for p in parts])) for parts in (train, test)
        ]
        return cls(images[torch.cat(train)], ranks[0], images[torch.cat(test)], ranks[1])


class Batch(NamedTuple):
    """Some training images; ``which`` says which ones."""

    images: Tensor
    labels: Tensor
    which: Tensor


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to a pixel each way, and add a little noise."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1))
    shift = torch.randint(3, (2, len(images), 1), generator=generator)
    down, across = shift + torch.arange(size)
    shifted = padded[torch.arange(len(images))[:, None, None], 0, down[:, :, None], across[:, None, :]][:, None]
    return shifted + NOISE * torch.randn(images.shape, generator=generator)


class Experts(nn.Module):
    """Two layers of its own for each expert; logits [E, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(32 * 16, WIDTH) for _ in range(EXPERTS))
        self.head = L.ExpertHead(WIDTH, CLASSES, EXPERTS)

    def forward(self, input: Tensor) -> Tensor:
        return self.head.forward([hidden(input).relu() for hidden in self.hidden])


class Network(nn.Module):
    """Two convolutions and two linear layers, 40 thousand parameters (three experts: 105 thousand)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.head: L.LinearHead | Experts
        hidden: list[nn.Module] = []
        if name in BALPOE:
            self.head = Experts()
        else:
            loss = CLASSIFIERS.get(name, CLASSIFIERS["cross-entropy"])(class_counts())
            self.head = L.LinearHead(WIDTH, CLASSES, loss, normalize=True if name == "GML" else None)
            hidden = [nn.Linear(32 * 16, WIDTH), nn.ReLU()]
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
            *hidden,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits: [N, C], or [E, N, C]."""
        features = self.body(images)
        return self.head.logits(features) if isinstance(self.head, L.LinearHead) else self.head.forward(features)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return probabilities [N, C], without any prior: the test split is balanced."""
        if isinstance(self.head, L.LinearHead):
            return self(images).softmax(1)
        log_probs = expert_fusion(self(images), return_log_probs=True).log_probs
        assert log_probs is not None
        return log_probs.exp()

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return what the last layer reads, as unit vectors [N, 64]."""
        return F.normalize(self.body(images))


#: The loss of a batch, whose random choices come from the generator.
Objective = Callable[[Batch, torch.Generator], Tensor]


def projector() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTION))


def make_objective(name: str, network: Network) -> tuple[Objective, list[nn.Module]]:
    """Return what a network is trained for, and the modules with parameters that are not the network's."""
    counts, body, head = class_counts(), network.body, network.head
    if isinstance(head, Experts):
        balpoe = L.BalPoELoss(counts)
        alpha = balpoe.PRESETS["cifar100-lt"].mixup_alpha

        def of_experts(batch: Batch, generator: torch.Generator) -> Tensor:
            if name != "BalPoE + mixup":
                return balpoe.forward(network(batch.images), batch.labels)
            mixed = mixup(batch.images, batch.labels, alpha, generator=generator)
            return balpoe.forward(network(mixed.input), *mixed[1:])

        return of_experts, []
    if name == "SupCon":
        supcon, project = L.SupConLoss(), projector()

        def of_two_views(batch: Batch, generator: torch.Generator) -> Tensor:
            features = F.normalize(project(body(view(batch.images.repeat(2, 1, 1, 1), generator))))
            return supcon.forward(torch.stack(features.chunk(2), 1), batch.labels)

        return of_two_views, [project]
    if name == "GML":
        gml = L.GMLLoss(counts, temperature=0.1, scale=1.0)  # the head's logits have its scale
        project_query, project_key = projector(), projector()
        teacher, queue = copy.deepcopy(body).requires_grad_(False), ClassQueue(counts, QUEUE, WIDTH)

        def of_queue(batch: Batch, generator: torch.Generator) -> Tensor:
            momentum_update(teacher, body, MOMENTUM)
            queue.enqueue(teacher(batch.images), batch.labels, batch.which)
            features = body(batch.images)
            query, key = F.normalize(project_query(features)), F.normalize(project_key(queue.features))
            return gml.forward(
                query, batch.labels, key, queue.labels, head.logits(features), query_id=batch.which, key_id=queue.ids
            )

        return of_queue, [gml, project_query, project_key]
    if name == "ELM":
        elm = L.ELMLoss(counts)

        def of_embeddings(batch: Batch, generator: torch.Generator) -> Tensor:
            features = body(batch.images)
            return elm.forward(head.logits(features), features, batch.labels)

        return of_embeddings, []

    def of_classes(batch: Batch, generator: torch.Generator) -> Tensor:
        images = view(batch.images, generator) if name == "logit adj. + views" else batch.images
        return head.forward(body(images), batch.labels)

    return of_classes, []


def epochs_of(network: str, epochs: int) -> int:
    """Return how many epochs a network trains for: SupCon's have two views of each image."""
    return max(epochs // 2, 1) if network == "SupCon" else epochs


def train(name: str, split: Split, seed: int, epochs: int, after_epoch: Callable[[], object]) -> dict[str, Network]:
    """Train one network and return a model for each of its rows of the table."""
    torch.manual_seed(seed)
    network = Network(name)
    objective, modules = make_objective(name, network)
    epochs = epochs_of(name, epochs)
    schedule = None
    if name.endswith("DRW") and isinstance(network.head, L.LinearHead):
        schedule = DeferredReweighting(network.head.loss, class_counts(), switch_epoch=epochs * 4 // 5)
    parameters = [parameter for module in (network, *modules) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        if schedule is not None:
            schedule.step(epoch)
        for which in torch.randperm(len(split.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            objective(Batch(split.images[which], split.labels[which], which), generator).backward()
            optimizer.step()
        decay.step()
        after_epoch()
    if name != "SupCon":
        return {name: network}
    return {row: probe(network, split, make(class_counts())) for row, make in PROBES.items()}


class UnitVectors(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(input)


def probe(network: Network, split: Split, loss: L.MarginCrossEntropyBase) -> Network:
    """Return a copy of the network whose last layer is trained anew, on its embeddings of the training images."""
    embeddings, probed = network.embed(split.images), copy.deepcopy(network)
    head = L.LinearHead(WIDTH, CLASSES, loss)
    probed.head, probed.body = head, nn.Sequential(*probed.body, UnitVectors())
    optimizer = torch.optim.AdamW(head.parameters(), lr=10 * LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(PROBE_STEPS):
        optimizer.zero_grad()
        head.forward(embeddings, split.labels).backward()
        optimizer.step()
    return probed
