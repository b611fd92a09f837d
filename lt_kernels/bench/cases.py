"""The named shapes that benchmarks measure and tests may reuse. Sizes are those of real classification heads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import datasets
from ..queues import ClassQueue

BOTH = ("cpu", "cuda")


@dataclass(frozen=True)
class Case:
    """Logits [rows, classes, *positions] and where the class counts come from."""

    name: str
    rows: int
    classes: int
    counts: str | None = None  # a name of lt_kernels.datasets.class_counts; None: exponential profile, imbalance 256
    positions: tuple[int, ...] = ()  # e.g. height and width of a segmentation map
    devices: tuple[str, ...] = BOTH  # where a run without --case includes it
    headline: tuple[str, ...] = ()  # devices on which it is measured first and stands in the summary
    sweep: tuple[str, ...] = ()  # devices on which it is a point of the plots over the number of classes
    note: str = ""
    cpu_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")  # what a run without --dtype takes on a CPU

    @property
    def sizes(self) -> dict[str, int]:
        names = ("H", "W") if len(self.positions) == 2 else tuple(f"d{i + 1}" for i in range(len(self.positions)))
        return {"N": self.rows, "C": self.classes, **dict(zip(names, self.positions, strict=True))}

    @property
    def logits(self) -> int:
        """How many there are."""
        return self.rows * self.classes * math.prod(self.positions)

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

    def inputs(self, dtype: torch.dtype, device: str) -> RowInputs:
        """Logits with standard deviation 3 and targets drawn from the class frequencies, the same ones every time."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.rows, self.classes, *self.positions)
        logits = torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)
        return RowInputs(*self._labels(generator), logits.requires_grad_())

    def _labels(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of ``Inputs``."""
        device = generator.device
        counts = self.class_counts()
        vectors = self.rows * math.prod(self.positions)
        target = torch.multinomial(counts.to(device, torch.float32), vectors, replacement=True, generator=generator)
        return (
            target.reshape(self.rows, *self.positions),
            self.log_prior().to(device, torch.float32),
            counts.to(device, torch.float32),
        )


@dataclass(frozen=True)
class LinearCase(Case):
    """Features [rows, width] and a weight [classes, width], whose product are the logits."""

    width: int = 2048

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "D": self.width, "C": self.classes}

    def inputs(self, dtype: torch.dtype, device: str) -> LinearInputs:  # type: ignore[override]
        """Features with standard deviation 1 and a weight that makes logits with standard deviation 3."""
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(self.rows, self.width, generator=generator, device=device).to(dtype)
        weight = torch.randn(self.classes, self.width, generator=generator, device=device)
        weight = weight.mul_(3 / math.sqrt(self.width)).to(dtype)
        return LinearInputs(*self._labels(generator), features.requires_grad_(), weight.requires_grad_())


@dataclass(frozen=True)
class ExpertCase(Case):
    """Logits of several experts, [rows, classes] each."""

    experts: int = 3
    variant: str = ""  # what sets it apart from the case with the same sizes and none: for the op to say

    @property
    def sizes(self) -> dict[str, int]:
        return {"E": self.experts, "N": self.rows, "C": self.classes}

    @property
    def logits(self) -> int:
        return self.experts * self.rows * self.classes

    @property
    def taus(self) -> list[float]:
        """Evenly from -1 to 3, which BalPoE publishes for three experts on iNaturalist 2018; 1 for one expert."""
        return [1 + 2 * (2 * e - self.experts + 1) / max(self.experts - 1, 1) for e in range(self.experts)]

    def log_prior(self) -> Tensor:
        """As published: 1e-9 is added to the frequencies."""
        counts = self.class_counts()
        return (counts / counts.sum() + 1e-9).log()

    def inputs(self, dtype: torch.dtype, device: str) -> ExpertInputs:  # type: ignore[override]
        """Logits with standard deviation 3, and a second target for each sample, drawn like the first."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.experts, self.rows, self.classes)
        stacked = torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)
        labels, (mixed_target, _, _) = self._labels(generator), self._labels(generator)
        return ExpertInputs(*labels, self, stacked, [x.requires_grad_() for x in stacked.unbind()], mixed_target)


@dataclass(frozen=True)
class ContrastiveCase(Case):
    """A contrastive loss of queries [rows, width] against keys [keys, width]; what else it has depends on ``method``.

    views    two views of rows / 2 samples against each other: SupCon in a batch
    supcon   queries against keys whose first rows are the queries' own, which are left out
    moco     queries against the batch's keys and a queue that learns nothing: supervised momentum contrast
    bcl      two views of rows / 2 samples against each other and the centre of each class
    paco     queries against each other and a queue that learns nothing, beside logits of a classifier
    gml      queries against keys that all learn, some of each class, beside logits of a cosine classifier
    """

    method: str = "supcon"
    keys: int = 0
    width: int = 128
    frozen: bool = False  # of supcon: keys that learn nothing

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "M": self.keys, "D": self.width}

    @property
    def logits(self) -> int:
        """How many similarities there are."""
        return self.rows * self.keys

    def inputs(self, dtype: torch.dtype, device: str) -> ContrastiveInputs:  # type: ignore[override]
        """Vectors of norm 1; labels of queries and of keys drawn from the class frequencies."""
        generator = torch.Generator(device).manual_seed(0)
        n, m, c, counts = self.rows, self.keys, self.classes, self.class_counts()

        def vectors(*shape: int, learn: bool = True) -> Tensor:
            x = torch.randn(*shape, self.width, generator=generator, device=device)
            return F.normalize(x, dim=-1).to(dtype).requires_grad_(learn)

        def cosines() -> Tensor:
            x = torch.rand(n, c, generator=generator, device=device)
            return x.mul_(2).sub_(1).to(dtype).requires_grad_()

        def labels(size: int) -> Tensor:
            frequencies = counts.to(device, torch.float32)
            return torch.multinomial(frequencies, size, replacement=True, generator=generator)

        query_label = labels(n // 2).repeat(2) if self.method in ("views", "bcl") else labels(n)
        more: dict[str, Tensor] = {}
        if self.method == "views":
            key_label, more = query_label, {"features": vectors(n // 2, 2)}
        elif self.method == "bcl":
            key_label = torch.cat([query_label, torch.arange(c, device=device)])
            more = {"features": vectors(n // 2, 2), "centers": vectors(c)}
        elif self.method == "gml":
            sizes = ClassQueue(counts, m, 1, base=2).sizes.to(device)
            key_label = torch.arange(c, device=device).repeat_interleave(sizes)
            key_id = torch.randperm(4 * m, generator=generator, device=device)[:m]
            own = (sizes.cumsum(0) - 1)[query_label]  # the slot that a class wrote last
            more = {"query": vectors(n), "key": vectors(m), "logits": cosines()}
            more |= {"key_id": key_id, "query_id": key_id[own]}
            more |= {"log_temperature": torch.full((), math.log(0.07), device=device).requires_grad_()}
        else:
            key_label = torch.cat([query_label, labels(m - n)])
            more = {"query": vectors(n)}
            if self.method == "supcon":
                more |= {"key": vectors(m, learn=not self.frozen)}
            else:
                more |= {"batch": vectors(n)} if self.method == "moco" else {"logits": cosines()}
                more |= {"queue": vectors(m - n, learn=False)}
        log_prior = self.log_prior().to(device, torch.float32)
        return ContrastiveInputs(query_label, log_prior, counts.to(device, torch.float32), self, key_label, more)


@dataclass
class Inputs:
    """One case on one device in one dtype; ``leaves`` receive gradients."""

    target: Tensor  # [N] or [N, d1, ..., dk], int64
    log_prior: Tensor  # [C], float32
    counts: Tensor  # [C], float32, training images per class

    @property
    def leaves(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def drop_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


@dataclass
class RowInputs(Inputs):
    """Logits in memory."""

    logits: Tensor  # [N, C] or [N, C, d1, ..., dk], requires grad

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"logits": self.logits}

    def per_class(self, vector: Tensor) -> Tensor:
        """``vector`` [C] in a shape that broadcasts against the logits."""
        return vector.reshape(-1, *[1] * (self.logits.dim() - 2))


@dataclass
class LinearInputs(Inputs):
    """Features and the weight of a linear head, in one dtype."""

    features: Tensor  # [N, D], requires grad
    weight: Tensor  # [C, D], requires grad

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"features": self.features, "weight": self.weight}


@dataclass
class ExpertInputs(Inputs):
    """Logits of experts in memory, and what mixup needs beside one target."""

    case: ExpertCase
    stacked: Tensor  # [E, N, C]
    experts: list[Tensor]  # E views of it, [N, C], which require grad
    mixed_target: Tensor  # [N]
    mix_lambda: float = 0.7  # share of `target`

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {f"logits of expert {e}": x for e, x in enumerate(self.experts)}


@dataclass
class ContrastiveInputs(Inputs):
    """Vectors and logits by the names that ``ContrastiveCase.inputs`` gives them; ``target`` [N]: queries' labels."""

    case: ContrastiveCase
    key_label: Tensor  # [M]
    tensors: dict[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def converted(self, dtype: torch.dtype) -> ContrastiveInputs:
        """Fresh leaves in another dtype."""
        tensors = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors, log_prior=self.log_prior.to(dtype))


def exponential_counts(classes: int, largest: float, imbalance: float) -> Tensor:
    """The profile of long-tailed CIFAR: largest * imbalance^(-j / (classes - 1)), rounded, float64 [classes]."""
    position = torch.linspace(0, 1, classes, dtype=torch.float64)
    return (largest * imbalance**-position).round().clamp_min(1)


C = TypeVar("C", bound=Case)


def _cases(*cases: C) -> dict[str, C]:
    return {case.name: case for case in cases}


_CPU, _GPU = ("cpu",), ("cuda",)

#: Logits in memory, [N, C] or [N, C, H, W]. Few rows where one CPU measures, many where a GPU does: each point of a
#: plot over C holds about as many bytes as the device needs to reach its bandwidth.
ROWS = _cases(
    Case("inat18-n512", 512, 8142, "inat18_like", headline=_CPU, sweep=_CPU, note="iNaturalist 2018, no multiple of 8"),
    Case("inat18-n8192", 8192, 8142, "inat18_like", headline=_GPU, sweep=_GPU, note="iNaturalist 2018, a large batch"),
    Case("c65536-n256", 256, 65_536, headline=_CPU, sweep=_CPU, note="few rows, many classes"),
    Case("c65536-n4096", 4096, 65_536, devices=_GPU, headline=_GPU, sweep=_GPU, note="many rows, many classes"),
    Case("c100k-n4096", 4096, 100_000, devices=_GPU, headline=_GPU, sweep=_GPU, note="many rows, very many classes"),
    Case("c100k-n256", 256, 100_000, sweep=_CPU, note="few rows, very many classes"),
    Case("seg-n16", 16, 150, positions=(512, 512), note="segmentation maps with the classes of ADE20K"),
    Case("c1m-n512", 512, 1_000_000, devices=_GPU, sweep=_GPU, note="many rows, a million classes"),
    Case("c1m-n64", 64, 1_000_000, sweep=_CPU, note="few rows, a million classes"),
    Case("imagenet21k-n8192", 8192, 21_841, devices=_GPU, sweep=_GPU, note="ImageNet-21k"),
    Case("imagenet21k-n512", 512, 21_841, sweep=_CPU, note="ImageNet-21k"),
    Case("inat21-n8192", 8192, 10_000, devices=_GPU, sweep=_GPU, note="iNaturalist 2021"),
    Case("inat21-n512", 512, 10_000, sweep=_CPU, note="iNaturalist 2021"),
    Case("aligned-n8192", 8192, 8192, devices=_GPU, sweep=_GPU, note="a power of two, to compare with inat18-n8192"),
    Case("aligned-n512", 512, 8192, sweep=_CPU, note="a power of two, to compare with inat18-n512"),
    Case("imagenet-lt-n8192", 8192, 1000, "imagenet_lt", devices=_GPU, sweep=_GPU, note="ImageNet-LT"),
    Case("imagenet-lt-n512", 512, 1000, "imagenet_lt", sweep=_CPU, note="ImageNet-LT"),
    Case("lvis-n8192", 8192, 1203, "lvis_v1_images", devices=_GPU, sweep=_GPU, note="LVIS v1"),
    Case("lvis-n512", 512, 1203, "lvis_v1_images", sweep=_CPU, note="LVIS v1"),
    Case("inat18-n64", 64, 8142, "inat18_like", note="iNaturalist 2018, a small batch"),
    Case("inat18-n256", 256, 8142, "inat18_like", note="iNaturalist 2018, a small batch"),
    Case("inat18-n2048", 2048, 8142, "inat18_like", note="iNaturalist 2018, a middling batch"),
)

#: Small shapes for tests and for trying the command: every alignment of a row, and both ends of the size range.
SMALL = _cases(
    Case("tiny-3x5", 3, 5, devices=()),
    Case("odd-7x123", 7, 123, devices=()),
    Case("odd-5x507", 5, 507, devices=()),
    Case("places-lt-16x365", 16, 365, "places_lt", devices=()),
    Case("even-16x1024", 16, 1024, devices=()),
    Case("map-2x19x6x7", 2, 19, positions=(6, 7), devices=()),
)


def _head(name: str, rows: int, classes: int, width: int, counts: str | None = None, **options: Any) -> LinearCase:
    return LinearCase(name, rows, classes, counts, width=width, **options)


#: Linear heads, [N, D] features and [C, D] weights.
HEADS = _cases(
    _head("inat18-n512-d2048", 512, 8142, 2048, "inat18_like", headline=_CPU, sweep=_CPU, note="iNaturalist 2018"),
    _head(
        "inat18-n8192-d2048",
        8192,
        8142,
        2048,
        "inat18_like",
        devices=_GPU,
        headline=_GPU,
        sweep=_GPU,
        note="iNaturalist 2018, a large batch",
    ),
    _head("c100k-n512-d512", 512, 100_000, 512, devices=_CPU, headline=_CPU, sweep=_CPU, note="very many classes"),
    _head("c100k-n4096-d512", 4096, 100_000, 512, devices=_GPU, headline=_GPU, sweep=_GPU, note="very many classes"),
    _head("c100k-n256-d128", 256, 100_000, 128, devices=_CPU, sweep=_CPU, note="a narrow head"),
    _head("c100k-n8192-d128", 8192, 100_000, 128, devices=_GPU, headline=_GPU, sweep=_GPU, note="a narrow head"),
    _head("c1m-n64-d256", 64, 1_000_000, 256, devices=_CPU, sweep=_CPU, note="few rows, a million classes"),
    _head("c1m-n1024-d256", 1024, 1_000_000, 256, devices=_GPU, sweep=_GPU, note="many rows, a million classes"),
    _head("inat21-n512-d2048", 512, 10_000, 2048, sweep=_CPU, note="iNaturalist 2021"),
    _head("inat21-n8192-d2048", 8192, 10_000, 2048, devices=_GPU, sweep=_GPU, note="iNaturalist 2021"),
    _head("inat18-n256-d2048", 256, 8142, 2048, "inat18_like", note="iNaturalist 2018, a small batch"),
    _head(
        "inat18-n1024-d2048", 1024, 8142, 2048, "inat18_like", devices=_GPU, note="iNaturalist 2018, a middling batch"
    ),
)

#: Small heads for tests and for trying the command.
SMALL_HEADS = _cases(
    _head("tiny-3x4x5", 3, 5, 4, devices=()),
    _head("odd-7x19x123", 7, 123, 19, devices=()),
    _head("odd-33x45x507", 33, 507, 45, devices=()),
    _head("even-16x64x1024", 16, 1024, 64, devices=()),
)


#: Logits of experts, [E, N, C].
EXPERTS = _cases(
    ExpertCase("inat18-e3-n512", 512, 8142, "inat18_like", headline=_CPU, sweep=_CPU, note="iNaturalist 2018"),
    ExpertCase(
        "inat18-e3-n8192",
        8192,
        8142,
        "inat18_like",
        devices=_GPU,
        headline=_GPU,
        sweep=_GPU,
        note="iNaturalist 2018, a large batch",
    ),
    ExpertCase("inat18-e6-n512", 512, 8142, "inat18_like", experts=6, note="iNaturalist 2018, six experts"),
    ExpertCase("c100k-e3-n64", 64, 100_000, devices=_CPU, sweep=_CPU, note="few rows, very many classes"),
    ExpertCase("c100k-e3-n256", 256, 100_000, devices=_GPU, sweep=_GPU, note="very many classes"),
    ExpertCase("imagenet-lt-e3-n512", 512, 1000, "imagenet_lt", devices=_CPU, sweep=_CPU, note="ImageNet-LT"),
    ExpertCase("imagenet-lt-e3-n8192", 8192, 1000, "imagenet_lt", devices=_GPU, sweep=_GPU, note="ImageNet-LT"),
)

#: Small ones for tests and for trying the command.
SMALL_EXPERTS = _cases(
    ExpertCase("tiny-2x3x5", 3, 5, experts=2, devices=()),
    ExpertCase("odd-3x7x123", 7, 123, devices=()),
    ExpertCase("odd-6x5x507", 5, 507, experts=6, devices=()),
)


def variants(variant: str, names: Iterable[str], note: str) -> dict[str, ExpertCase]:
    """The named cases of experts once more, as ``variant``; never headlines, nor points of a plot."""
    known = EXPERTS | SMALL_EXPERTS
    return _cases(
        *(
            replace(known[name], name=f"{name}-{variant}", variant=variant, headline=(), sweep=(), note=note)
            for name in names
        )
    )


def _contrast(
    name: str, method: str, rows: int, keys: int, width: int, classes: int, **options: Any
) -> ContrastiveCase:
    options = {"cpu_dtypes": ("float32",), **options}
    return ContrastiveCase(name, rows, classes, method=method, keys=keys, width=width, **options)


_INAT18: dict[str, Any] = {"classes": 8142, "counts": "inat18_like"}
_WITH_BFLOAT16: dict[str, Any] = {"cpu_dtypes": ("float32", "bfloat16")}

#: Contrastive losses, [N, D] queries and [M, D] keys.
CONTRASTS = _cases(
    _contrast(
        "supcon-512x16384x128",
        "supcon",
        512,
        16_384,
        128,
        headline=BOTH,
        note="SupCon with a memory of keys that learn",
        **_INAT18,
        **_WITH_BFLOAT16,
    ),
    _contrast(
        "gml-128x16384x1024-c8142",
        "gml",
        128,
        16_384,
        1024,
        headline=BOTH,
        note="GML, all keys of the queue learn",
        **_INAT18,
    ),
    _contrast(
        "supcon-512x16384x128-frozen",
        "supcon",
        512,
        16_384,
        128,
        frozen=True,
        note="the same with keys that learn nothing",
        **_INAT18,
    ),
    _contrast(
        "supcon-2x256x128", "views", 512, 512, 128, 1000, counts="imagenet_lt", note="SupCon, two views of a batch"
    ),
    _contrast("moco-256x65536x128", "moco", 256, 65_536, 128, note="SupCon with momentum contrast's queue", **_INAT18),
    _contrast("bcl-512x8654x1024", "bcl", 512, 8654, 1024, note="BCL, two views and the class centres", **_INAT18),
    _contrast("paco-64x16398x128", "paco", 64, 8256, 128, note="PaCo, 8,142 logits beside 8,256 keys", **_INAT18),
)

#: Small ones for tests and for trying the command.
SMALL_CONTRASTS = _cases(
    _contrast("views-10x10x5", "views", 10, 10, 5, 4, devices=()),
    _contrast("supcon-7x33x5", "supcon", 7, 33, 5, 6, devices=()),
    _contrast("supcon-7x33x5-frozen", "supcon", 7, 33, 5, 6, frozen=True, devices=()),
    _contrast("moco-5x41x6", "moco", 5, 41, 6, 7, devices=()),
    _contrast("bcl-12x17x6", "bcl", 12, 17, 6, 5, devices=()),
    _contrast("paco-5x32x6", "paco", 5, 21, 6, 11, devices=()),
    _contrast("gml-9x40x6-c11", "gml", 9, 40, 6, 11, devices=()),
)
