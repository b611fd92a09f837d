"""The named shapes that benchmarks measure and tests may reuse. Sizes are those of real classification heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import datasets


@dataclass(frozen=True)
class Case:
    """Logits [rows, classes] and where the class counts come from."""

    name: str
    rows: int
    classes: int
    counts: str | None = None  # a name of lt_kernels.datasets.class_counts; None: exponential profile, imbalance 256
    devices: tuple[str, ...] = ("cpu", "cuda")  # where a run without --case includes it
    note: str = ""

    def class_counts(self) -> Tensor:
        """Training images per class, float64 [classes]."""
        if self.counts is not None:
            counts = torch.as_tensor(datasets.class_counts(self.counts), dtype=torch.float64)
            if len(counts) != self.classes:
                raise ValueError(f"case {self.name}: {self.counts} has {len(counts)} classes, expected {self.classes}")
            return counts
        return exponential_counts(self.classes, largest=1280, imbalance=256)

    def log_prior(self) -> Tensor:
        """log of the class frequencies, float64 [classes]."""
        counts = self.class_counts()
        return (counts / counts.sum()).log()


def exponential_counts(classes: int, largest: float, imbalance: float) -> Tensor:
    """The profile of long-tailed CIFAR: largest * imbalance^(-j / (classes - 1)), rounded, float64 [classes]."""
    position = torch.linspace(0, 1, classes, dtype=torch.float64)
    return (largest * imbalance**-position).round().clamp_min(1)


def _cases(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


#: Logits in memory, [N, C].
ROWS = _cases(
    Case("inat18-n512", 512, 8142, "inat18_like", note="the head of iNaturalist 2018, no multiple of 8"),
    Case("c65536-n256", 256, 65_536, note="few rows, many classes"),
    Case("c100k-n256", 256, 100_000, note="beyond one on-chip row of the Triton kernel"),
    Case("imagenet21k-n512", 512, 21_841, note="the head of ImageNet-21k"),
    Case("inat21-n512", 512, 10_000, note="the head of iNaturalist 2021"),
    Case("aligned-n512", 512, 8192, note="a multiple of everything, to compare with inat18-n512"),
    Case("lvis-n512", 512, 1203, "lvis_v1_images", note="the head of LVIS v1"),
    Case("imagenet-lt-n512", 512, 1000, "imagenet_lt", note="the head of ImageNet-LT"),
    Case("inat18-n8192", 8192, 8142, "inat18_like", ("cuda",), "a large batch of the iNaturalist 2018 head"),
    Case("c65536-n4096", 4096, 65_536, None, ("cuda",), "a large batch of many classes"),
    Case("c100k-n4096", 4096, 100_000, None, ("cuda",), "a large batch of very many classes"),
)

#: Small shapes for tests and for trying the command: every alignment of a row, and both ends of the size range.
SMALL = _cases(
    Case("tiny-3x5", 3, 5, devices=()),
    Case("odd-7x123", 7, 123, devices=()),
    Case("odd-5x507", 5, 507, devices=()),
    Case("places-lt-16x365", 16, 365, "places_lt", devices=()),
    Case("even-16x1024", 16, 1024, devices=()),
)
