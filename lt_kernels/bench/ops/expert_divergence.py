"""Benchmark of ``expert_divergence``, RIDE's diversity term.

It is the sum over experts of their divergence from the experts' mean. The variant ``pairwise`` sums the divergences of
all ordered pairs of experts, as in NCL.
Work is counted by ``op.cost_of_logits``, with six operations in forward. The experts' mean adds N C exponentials. The
result needs no work per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ..agreement import LogitsAgreement
from ..cases import Inputs, by_name
from ..experts import CPU_CASE, GPU_CASE, ExpertCase, cases_with, expert_op, experts_of
from ..op import Cost, cost_of_logits
from ..providers import Step, backends, compiled, eager, headlines_on_cpu

NAME = "expert_divergence"
PAIRWISE = "pairwise"
_SHAPES = (CPU_CASE, "inat18-e6-n512", GPU_CASE)
CASES = cases_with(PAIRWISE, "all pairs of experts", repeated=_SHAPES, real=_SHAPES)


def cost(case: ExpertCase, dtype: torch.dtype, direction: str) -> Cost:
    """Count the work as the module's docstring says."""
    least = cost_of_logits(case, dtype, direction, forward=6)
    means = 0 if case.variant == PAIRWISE else case.logits // case.experts
    return least._replace(exponentials=least.exponentials + means)


class Agreement(LogitsAgreement):
    def _losses_of(self, logits: Tensor, rows: Tensor) -> Tensor:
        own = logits.log_softmax(-1)
        if self._inputs.case.variant == PAIRWISE:
            others = own[:, None].expand(-1, len(own), -1, -1)
            divergences = F.kl_div(own.expand_as(others), others, reduction="none", log_target=True)
            return divergences.sum((0, 1, 3))
        mean = logits.mean(0).log_softmax(-1).detach()
        return F.kl_div(own, mean.expand_as(own), reduction="none", log_target=True).sum((0, 2))


# Providers


def published_divergence(logits: Sequence[Tensor], pairwise: bool) -> Tensor:
    """The loops of published training code: every distribution is made where it is needed."""
    total = logits[0].new_zeros(())
    if pairwise:
        for e, one in enumerate(logits):
            for f, other in enumerate(logits):
                if e != f:
                    total = total + F.kl_div(F.log_softmax(one, 1), F.softmax(other, 1), reduction="batchmean")
        return total
    mean = torch.stack(logits).mean(0).detach()  # type: ignore[arg-type]
    for one in logits:
        total = total + F.kl_div(F.log_softmax(one, 1), F.softmax(mean, 1), reduction="batchmean")
    return total


def _arguments(inputs: Inputs) -> tuple[list[Tensor], bool]:
    return experts_of(inputs), inputs.case.variant == PAIRWISE


def _ours(inputs: Inputs) -> Step:
    logits, pairwise = _arguments(inputs)
    return partial(functional.expert_divergence, logits, "pairwise" if pairwise else "to_mean")


PROVIDERS = by_name(
    eager("published", published_divergence, _arguments),
    compiled(published_divergence, _arguments, left_out=headlines_on_cpu),
    *backends(NAME, _ours),
)


OP = expert_op(
    NAME,
    cases=CASES,
    providers=PROVIDERS,
    cost=cost,
    agreement=Agreement,
    references=("published", "compile"),
    eager="published",
)
