"""Shared by the cases of every op: a named shape, and its inputs on one device.

The named shapes of an op stand in its own module under ``ops/``. Their sizes are taken from real classification heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .. import datasets

CPU, GPU, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")


@dataclass
class Inputs:
    """One case on one device in one dtype; ``leaves`` receive gradients."""

    target: Tensor  # [N] or [N, d1, ..., dk], int64
    log_prior: Tensor  # [C], float32
    counts: Tensor  # [C], float32, training images per class

    @property
    def leaves(self) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def in_memory(self) -> Tensor:
        """The tensor whose copy is the floor of an op that is held against one."""
        raise NotImplementedError

    def drop_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


@dataclass(frozen=True)
class Case:
    """Rows of logits, the number of classes, and the source of the class counts."""

    name: str
    rows: int
    classes: int
    counts: str | None = None  # a name of lt_kernels.datasets.class_counts; None: exponential profile, imbalance 256
    devices: tuple[str, ...] = BOTH  # devices on which a run without --case includes it
    headline: tuple[str, ...] = ()  # devices on which it is measured first and stands in the summary
    sweep: tuple[str, ...] = ()  # devices on which it is a point of the plots over the number of classes
    note: str = ""
    cpu_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")  # of a run without --dtype on a CPU

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "C": self.classes}

    @property
    def logits(self) -> int:
        """The number of logits."""
        return self.rows * self.classes

    @property
    def uncounted(self) -> int:
        """The number of elements of gradients that peak memory does not count."""
        return 0

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

    def inputs(self, dtype: torch.dtype, device: str) -> Any:
        """Make the same ``Inputs`` every time."""
        raise NotImplementedError

    def _draw_labels(self, generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fields of ``Inputs``; targets are drawn from the class frequencies."""
        device, counts = generator.device, self.class_counts()
        frequencies = counts.to(device, torch.float32)
        target = torch.multinomial(frequencies, math.prod(shape), replacement=True, generator=generator)
        return target.reshape(shape), self.log_prior().to(device, torch.float32), frequencies


def exponential_counts(classes: int, largest: float, imbalance: float) -> Tensor:
    """The profile of long-tailed CIFAR: largest * imbalance^(-j / (classes - 1)), rounded, float64 [classes]."""
    position = torch.linspace(0, 1, classes, dtype=torch.float64)
    return (largest * imbalance**-position).round().clamp_min(1)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


def by_name(*things: T) -> dict[str, T]:
    return {thing.name: thing for thing in things}


def spread(size: int, checked: int, device: torch.device) -> Tensor:
    """At most ``checked`` indices, evenly from the first to the last of ``size``."""
    return torch.linspace(0, size - 1, max(1, min(size, checked)), dtype=torch.float64, device=device).long()
