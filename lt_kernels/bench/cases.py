"""Shared by the cases of every op: a named shape, and its inputs on one device.

Real shapes stand in each op's ``configs.py``, which the machine-code gate and the GPU counters read too. A module under
``ops/`` says where each of them is measured, and adds small ones for tests and for trying the command.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from .. import datasets

CPU, GPU, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
#: The names in lt_kernels.datasets of the data sets with so many classes. Other numbers have an exponential profile.
DATA_SETS = {365: "places_lt", 1000: "imagenet_lt", 1203: "lvis_v1_images", 8142: "inat18_like"}


@dataclass
class Inputs:
    """One case on one device in one dtype."""

    case: Any
    target: Tensor  # [N] or [N, d1, ..., dk], int64
    log_prior: Tensor  # [C], float32
    counts: Tensor  # [C], float32, training images per class
    tensors: dict[str, Tensor]  # those of the op, by name; those that require gradients are leaves

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    @property
    def in_memory(self) -> Tensor:
        """The tensor whose copy is the floor of an op that is held against one."""
        return next(iter(self.tensors.values()))

    def drop_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def converted(self, dtype: torch.dtype) -> Inputs:
        """Return fresh leaves in another dtype."""
        tensors = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors, log_prior=self.log_prior.to(dtype))


@dataclass(frozen=True)
class Case:
    """Rows of logits and the number of classes."""

    name: str
    rows: int
    classes: int
    devices: tuple[str, ...] = BOTH  # devices on which a run without --case includes it
    headline: tuple[str, ...] = ()  # devices on which it is measured first and stands in the summary
    sweep: tuple[str, ...] = ()  # devices on which it is a point of the plots over the number of classes
    calls: tuple[str, ...] = ()  # devices on which it is a point of the plots of the time per call, the host's included
    note: str = ""
    cpu_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")  # of a run without --dtype on a CPU

    letters: ClassVar[tuple[tuple[str, str], ...]] = (("N", "rows"), ("C", "classes"))  # of the sizes

    @property
    def sizes(self) -> dict[str, int]:
        return {letter: getattr(self, name) for letter, name in self.letters}

    @property
    def logits(self) -> int:
        """The number of logits."""
        return self.rows * self.classes

    @property
    def uncounted(self) -> int:
        """The number of elements of gradients that peak memory does not count."""
        return 0

    @property
    def counts_name(self) -> str:
        """The name of the class counts: a data set with a digest of its counts, or the profile."""
        name = DATA_SETS.get(self.classes)
        return "exponential profile" if name is None else f"{name} {counts_digest(name)}"

    def class_counts(self) -> Tensor:
        """Training images per class, float64 [classes]."""
        if self.classes in DATA_SETS:
            return torch.as_tensor(datasets.class_counts(DATA_SETS[self.classes]), dtype=torch.float64)
        return exponential_counts(self.classes, largest=1280, imbalance=256)

    def log_prior(self) -> Tensor:
        """log of the class frequencies, float64 [classes]."""
        counts = self.class_counts()
        return (counts / counts.sum()).log()

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        """Make the same ``Inputs`` every time."""
        target, tensors = self._draw(torch.Generator(device).manual_seed(0), dtype)
        log_prior, counts = (vector.to(device, torch.float32) for vector in (self.log_prior(), self.class_counts()))
        return Inputs(self, target, log_prior, counts, tensors)

    def _draw(self, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the targets and the tensors of ``Inputs``."""
        raise NotImplementedError

    def _draw_labels(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Draw from the class frequencies."""
        frequencies = self.class_counts().to(generator.device, torch.float32)
        return torch.multinomial(frequencies, math.prod(shape), replacement=True, generator=generator).reshape(shape)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def exponential_counts(classes: int, largest: float, imbalance: float) -> Tensor:
    """The profile of long-tailed CIFAR: largest * imbalance^(-j / (classes - 1)), rounded, float64 [classes]."""
    position = torch.linspace(0, 1, classes, dtype=torch.float64)
    return (largest * imbalance**-position).round().clamp_min(1)


@cache
def counts_digest(name: str) -> str:
    """Return a digest of a data set's class counts, which tells whether those of a measurement are today's."""
    counts = datasets.class_counts(name).tolist()
    return hashlib.sha256("".join(f"{count}\n" for count in counts).encode()).hexdigest()[:12]


C = TypeVar("C", bound=Case)


def cases_of(kind: type[C], shapes: Mapping[str, Any]) -> Callable[..., C]:
    """Return a function that makes the case of a named shape: ``shapes`` has its sizes, the call everything else."""
    return lambda name, **others: kind(name, **{**shapes[name]._asdict(), **others})


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


def by_name(*things: T) -> dict[str, T]:
    return {thing.name: thing for thing in things}
