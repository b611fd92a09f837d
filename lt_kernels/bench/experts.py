"""Shared by the benchmarks of experts: cases, inputs, agreement of losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .agreement import LossAgreement
from .cases import CPU, GPU, Case, Inputs, by_name, spread


@dataclass(frozen=True)
class ExpertCase(Case):
    """Logits of several experts, [rows, classes] each."""

    experts: int = 3
    variant: str = ""  # names the option that sets it apart from the case with the same sizes; the op knows it

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

    def inputs(self, dtype: torch.dtype, device: str) -> ExpertInputs:
        """Make logits with standard deviation 3, and a second target for each sample, drawn like the first."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.experts, self.rows, self.classes)
        stacked = torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype)
        labels = self._draw_labels(generator, self.rows)
        mixed_target, _, _ = self._draw_labels(generator, self.rows)
        return ExpertInputs(*labels, self, stacked, [x.requires_grad_() for x in stacked.unbind()], mixed_target)


@dataclass
class ExpertInputs(Inputs):
    """Logits of experts in memory, and the second target of mixup."""

    case: ExpertCase
    stacked: Tensor  # [E, N, C]
    experts: list[Tensor]  # E views of it, [N, C], which require grad
    mixed_target: Tensor  # [N]
    mix_lambda: float = 0.7  # share of `target`

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {f"logits of expert {e}": x for e, x in enumerate(self.experts)}

    @property
    def in_memory(self) -> Tensor:
        return self.stacked


#: Logits of experts, [E, N, C].
EXPERTS = by_name(
    ExpertCase("inat18-e3-n512", 512, 8142, "inat18_like", headline=CPU, sweep=CPU, note="iNaturalist 2018"),
    ExpertCase(
        "inat18-e3-n8192",
        8192,
        8142,
        "inat18_like",
        devices=GPU,
        headline=GPU,
        sweep=GPU,
        note="iNaturalist 2018, a large batch",
    ),
    ExpertCase("inat18-e6-n512", 512, 8142, "inat18_like", experts=6, note="iNaturalist 2018, six experts"),
    ExpertCase("c100k-e3-n64", 64, 100_000, devices=CPU, sweep=CPU, note="few rows, very many classes"),
    ExpertCase("c100k-e3-n256", 256, 100_000, devices=GPU, sweep=GPU, note="very many classes"),
    ExpertCase("imagenet-lt-e3-n512", 512, 1000, "imagenet_lt", devices=CPU, sweep=CPU, note="ImageNet-LT"),
    ExpertCase("imagenet-lt-e3-n8192", 8192, 1000, "imagenet_lt", devices=GPU, sweep=GPU, note="ImageNet-LT"),
)

#: Small ones for tests and for trying the command.
SMALL_EXPERTS = by_name(
    ExpertCase("tiny-2x3x5", 3, 5, experts=2, devices=()),
    ExpertCase("odd-3x7x123", 7, 123, devices=()),
    ExpertCase("odd-6x5x507", 5, 507, experts=6, devices=()),
)


def variants(variant: str, names: Iterable[str], note: str) -> dict[str, ExpertCase]:
    """Repeat the named cases as ``variant``; they are never headlines, nor points of a plot."""
    known = EXPERTS | SMALL_EXPERTS
    changes: dict[str, Any] = {"variant": variant, "headline": (), "sweep": (), "note": note}
    return by_name(*(replace(known[name], name=f"{name}-{variant}", **changes) for name in names))


#: The cases of the targets, one for each device.
CPU_CASE, GPU_CASE = "inat18-e3-n512", "inat18-e3-n8192"
#: Float64 results are made in pieces of about this many logits. Gradients of at most so many, or of one sample, are
#: compared.
CHECKED_LOGITS = 2**22


def samples_at_once(inputs: ExpertInputs) -> int:
    """The number of samples with ``CHECKED_LOGITS`` logits."""
    experts, _, classes = inputs.stacked.shape
    return max(1, CHECKED_LOGITS // (experts * classes))


class Agreement(LossAgreement[ExpertInputs]):
    """Compares the loss, and all experts' gradients of samples that are spread evenly from the first to the last."""

    def _choose_parts(self) -> None:
        samples = len(self._inputs.target)
        self._samples = spread(samples, samples_at_once(self._inputs), self._inputs.target.device)

    @abstractmethod
    def _losses(self, logits: Tensor, samples: Tensor) -> Tensor:
        """Return float64 losses of some samples; their sum over all is the number of samples times the loss.

        Args:
            logits: theirs, float64 [E, n, C].
            samples: which they are.
        """

    def _parts(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"gradient": torch.stack([gradient[self._samples] for gradient in gradients.values()])}

    def _true_values(self) -> dict[str, Tensor]:
        logits, count = self._inputs.stacked.detach(), len(self._inputs.target)
        pieces = torch.arange(count, device=logits.device).split(samples_at_once(self._inputs))
        total = torch.stack([self._losses(logits[:, piece].double(), piece).sum() for piece in pieces]).sum()
        with torch.enable_grad():
            some = logits[:, self._samples].double().requires_grad_()
            (gradient,) = torch.autograd.grad(self._losses(some, self._samples).sum(), some)
        return {"loss": total / count, "gradient": gradient / count}
