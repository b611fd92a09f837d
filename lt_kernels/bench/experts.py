"""Shared by the benchmarks of experts: cases, and what their descriptions have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops._configs import EXPERT_SHAPES
from .cases import CPU, GPU, Case, Inputs, by_name, cases_of, normal
from .op import COPY, Op

#: The share of ``Inputs.target``; the second target of mixup has the rest.
MIX_LAMBDA = 0.7


@dataclass(frozen=True)
class ExpertCase(Case):
    """Logits of several experts, [rows, classes] each."""

    experts: int = 3
    variant: str = ""  # names the option that sets it apart from the case with the same sizes; the op knows it
    letters = (("E", "experts"), ("N", "rows"), ("C", "classes"))

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

    def _draw(self, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Make logits with standard deviation 3, their views of each expert, and a second target for each sample."""
        stacked = normal(generator, self.experts, self.rows, self.classes).mul_(3).to(dtype)
        views = {f"logits of expert {e}": x.requires_grad_() for e, x in enumerate(stacked.unbind())}
        target, mixed_target = (self._draw_labels(generator, self.rows) for _ in range(2))
        return target, {"stacked": stacked, **views, "mixed_target": mixed_target}


def experts_of(inputs: Inputs) -> list[Tensor]:
    """Return the logits of each expert, [N, C]."""
    return list(inputs.leaves.values())


_real = cases_of(ExpertCase, EXPERT_SHAPES)
#: Logits of experts, [E, N, C].
EXPERTS = by_name(
    _real("inat18-e3-n512", headline=CPU, sweep=CPU, note="iNaturalist 2018"),
    _real("inat18-e3-n8192", devices=GPU, headline=GPU, sweep=GPU, note="iNaturalist 2018, a large batch"),
    _real("inat18-e6-n512", note="iNaturalist 2018, six experts"),
    _real("c100k-e3-n64", devices=CPU, sweep=CPU, note="few rows, very many classes"),
    _real("c100k-e3-n256", devices=GPU, sweep=GPU, note="very many classes"),
    _real("imagenet-lt-e3-n512", devices=CPU, sweep=CPU, note="ImageNet-LT"),
    _real("imagenet-lt-e3-n8192", devices=GPU, sweep=GPU, note="ImageNet-LT"),
)

#: Small ones for tests and for trying the command.
SMALL_EXPERTS = by_name(
    ExpertCase("tiny-2x3x5", 3, 5, experts=2, devices=()),
    ExpertCase("odd-3x7x123", 7, 123, devices=()),
    ExpertCase("odd-6x5x507", 5, 507, experts=6, devices=()),
)


#: The cases of the targets, one for each device.
CPU_CASE, GPU_CASE = "inat18-e3-n512", "inat18-e3-n8192"


def cases_with(
    variant: str, note: str, repeated: Sequence[str] = (CPU_CASE, GPU_CASE), real: Iterable[str] = EXPERTS
) -> dict[str, ExpertCase]:
    """Return ``real`` and small cases, and some repeated as ``variant``: never headlines, nor points of a plot."""
    cases = {name: EXPERTS[name] for name in real} | SMALL_EXPERTS
    changes: dict[str, Any] = {"variant": variant, "headline": (), "sweep": (), "note": note}
    again = (replace(cases[name], name=f"{name}-{variant}", **changes) for name in (*repeated, "odd-3x7x123"))
    return cases | by_name(*again)


#: An op of experts.
expert_op = partial(Op, floor=COPY, rank=2, shape="E x N x C", compare_cases=(CPU_CASE,))
