"""Dense prediction with rare classes: synthetic scenes whose shapes cover fewer and fewer pixels.

    python examples/segmentation.py
    python examples/segmentation.py --steps 50 --images 32

Scenes of 64 x 64 pixels hold shapes on a noisy background; the rarer a class, the fewer images it is in and the smaller
it is. The same small network with a cosine classifier is trained by

    cross-entropy      F.cross_entropy of logits [N, C, H, W]
    logit adjustment   lt_kernels.LogitAdjustmentLoss of the same logits, with the classes' pixel counts
    GML                lt_kernels.GMLLoss: the same with beta = 0; with its default beta also the embeddings of up to
                       ``pixels_per_class`` pixels of each class against a queue of those of a momentum encoder

Printed are accuracy (recall) and intersection over union on other scenes of the same kind. A loss that finds more of
the rare pixels takes them from the frequent ones: read both. The example shows how the calls go together in less than a
minute; how good a loss is on real scenes with a network of real size is another question.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lt_kernels

CLASSES = ("background", "disc", "square", "diamond", "ring", "cross")
#: Of the shapes: in which share of the images it is, and its radius in pixels.
SHARES = (0.9, 0.6, 0.35, 0.15, 0.06)
RADII = (14, 11, 9, 7, 5)
SIZE, WIDTH, BATCH = 64, 32, 8
SCALE = 30.0
LEARNING_RATE, MOMENTUM = 1e-2, 0.99
PIXELS_PER_CLASS, QUEUE, BASE = 32, 768, 64


class Scenes(NamedTuple):
    images: Tensor  # [N, 3, 64, 64]
    target: Tensor  # [N, 64, 64]


def shape_mask(name: str, down: Tensor, across: Tensor, radius: int) -> Tensor:
    """Pixels of a shape; down and across: distances from its centre."""
    distance = (down.square() + across.square()).sqrt()
    return {
        "disc": distance <= radius,
        "square": torch.maximum(down.abs(), across.abs()) <= 0.8 * radius,
        "diamond": down.abs() + across.abs() <= radius,
        "ring": (distance <= radius) & (distance >= 0.5 * radius),
        "cross": (torch.minimum(down.abs(), across.abs()) <= 1) & (distance <= radius),
    }[name]


def make_scenes(count: int, shares: tuple[float, ...], generator: torch.Generator) -> Scenes:
    """Shapes are drawn from the most to the least frequent, all of one shade, so that form and size tell them apart."""
    target = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    places = torch.arange(SIZE, dtype=torch.float32)
    for row in range(count):
        for label, (name, share, radius) in enumerate(zip(CLASSES[1:], shares, RADII, strict=True), start=1):
            centre = torch.randint(radius, SIZE - radius, (2,), generator=generator)
            # the first images hold every class, so that none is without pixels
            if float(torch.rand((), generator=generator)) < share or row < 2:
                mask = shape_mask(name, places[:, None] - centre[0], places[None] - centre[1], radius)
                target[row][mask] = label
    shade = torch.tensor([0.0, 0.8, 0.8, 0.8, 0.8, 0.8])[target][:, None]
    light = 0.2 * torch.randn(count, 3, 1, 1, generator=generator)
    return Scenes(shade + light + 0.15 * torch.randn(count, 3, SIZE, SIZE, generator=generator), target)


class Encoder(nn.Module):
    """Features [N, 32, H/2, W/2] of images [N, 3, H, W]: fine ones joined with coarse ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, WIDTH, 3, stride=2, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(
            *(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()),
        )
        self.join = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        coarse = F.interpolate(self.coarse(fine), size=fine.shape[2:], mode="bilinear")
        joined: Tensor = self.join(torch.cat([fine, coarse], 1))
        return joined.relu()


class Network(nn.Module):
    """Cosines of features and class vectors, times 30 as logits [N, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = Encoder(), nn.Conv2d(WIDTH, len(CLASSES), 1, bias=False)

    def cosines(self, features: Tensor) -> Tensor:
        small = F.conv2d(F.normalize(features), F.normalize(self.classifier.weight))
        return F.interpolate(small, scale_factor=2, mode="bilinear")

    def logits(self, images: Tensor) -> Tensor:
        return SCALE * self.cosines(self.encoder(images))


class OfLogits(nn.Module):
    """A loss of the logits of every pixel."""

    def __init__(self, network: Network, loss: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, images: Tensor, target: Tensor, index: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.network.logits(images), target)
        return loss


class OfEmbeddings(nn.Module):
    """GML: cosines of every pixel; embeddings of some pixels of each class against the queue."""

    def __init__(self, network: Network, class_counts: Tensor) -> None:
        super().__init__()
        self.network = network
        self.loss = lt_kernels.GMLLoss(class_counts, temperature=0.1, scale=SCALE, pixels_per_class=PIXELS_PER_CLASS)
        self.queue = lt_kernels.ClassQueue(class_counts, QUEUE, WIDTH, base=BASE)
        self.teacher = copy.deepcopy(network.encoder).requires_grad_(False)
        self.query = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1))
        self.key = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, images: Tensor, target: Tensor, index: Tensor) -> Tensor:
        # which place of the training set each feature is: a query finds its own keys by it, and leaves them out
        places = (SIZE // 2) ** 2
        ids = index[:, None, None] * places + torch.arange(places).view(SIZE // 2, SIZE // 2)
        lt_kernels.momentum_update(self.teacher, self.network.encoder, MOMENTUM)
        drawn = lt_kernels.sample_pixels(self.teacher(images), target, PIXELS_PER_CLASS, num_classes=len(CLASSES))
        self.queue.enqueue(drawn.features, drawn.labels, drawn.take(ids))
        features = self.network.encoder(images)
        query, key = F.normalize(self.query(features)), F.normalize(self.key(self.queue.features))
        cosines = self.network.cosines(features)
        loss: Tensor = self.loss(query, target, key, self.queue.labels, cosines, query_id=ids, key_id=self.queue.ids)
        return loss


def train(objective: nn.Module, scenes: Scenes, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randperm(len(scenes.images), generator=generator)[:BATCH]
        optimizer.zero_grad()
        objective(scenes.images[index], scenes.target[index], index).backward()
        optimizer.step()
        decay.step()


@torch.no_grad()
def evaluate(network: Network, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Accuracy and intersection over union of each class, [C]."""
    network.eval()
    predicted = torch.cat([network.logits(images).argmax(1) for images in scenes.images.split(BATCH)])
    classes = len(CLASSES)
    confusion = (scenes.target * classes + predicted).flatten().bincount(minlength=classes**2)
    confusion = confusion.view(classes, classes).double()
    right = confusion.diag()
    return right / confusion.sum(1), right / (confusion.sum(0) + confusion.sum(1) - right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96, help="training scenes")
    parser.add_argument("--steps", type=int, default=200, help="steps of 8 scenes for each loss")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # layers this small gain nothing from more
    generator = torch.Generator().manual_seed(args.seed)
    scenes = make_scenes(args.images, SHARES, generator)
    test = make_scenes(48, (0.5,) * len(SHARES), generator)
    counts = scenes.target.flatten().bincount(minlength=len(CLASSES))
    shares = (100 * counts / counts.sum()).tolist()
    print(
        f"{args.images} scenes of {SIZE} x {SIZE} pixels; test: {len(test.images)} scenes, each shape in half of them"
    )
    objectives: dict[str, Callable[[Network], nn.Module]] = {
        "cross-entropy": lambda network: OfLogits(network, nn.CrossEntropyLoss()),
        "logit adjustment": lambda network: OfLogits(network, lt_kernels.LogitAdjustmentLoss(counts)),
        "GML": lambda network: OfEmbeddings(network, counts),
    }
    results = {}
    for name, objective in objectives.items():
        torch.manual_seed(args.seed)
        begin = time.perf_counter()
        network = Network()
        train(objective(network), scenes, args.steps, args.seed)
        results[name] = evaluate(network, test)
        print(f"{name}: trained in {time.perf_counter() - begin:.1f} s", flush=True)
    rare = counts <= counts.median()
    for which, title in enumerate(("accuracy, %", "intersection over union, %")):
        print(f"\n{title:28}" + "".join(f"{name:>12}" for name in CLASSES) + f"{'frequent':>12}{'rare':>12}")
        if which == 0:
            print(f"{'pixels in training, %':28}" + "".join(f"{share:12.2f}" for share in shares))
        for name, found in results.items():
            values = found[which]
            row = [*values.tolist(), float(values[~rare].mean()), float(values[rare].mean())]
            print(f"{name:28}" + "".join(f"{100 * value:12.1f}" for value in row))


if __name__ == "__main__":
    main()
