"""Benchmark of ``expert_fusion``: prediction and confidence of a product of experts, from their logits in memory.

The variant ``top5`` asks for the five most likely classes and their probabilities. There is no backward pass. Bytes and
operations, for the least work that the result needs: each logit of any expert is read once and added, 2 operations, and
each of the N C means takes an exponential and 2 operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ... import functional
from .. import agreement
from ..cases import Inputs, by_name
from ..experts import CPU_CASE, GPU_CASE, ExpertCase, cases_with, expert_op, experts_of
from ..op import Cost, Target
from ..providers import Step, backends, compiled, eager, headlines_on_cpu

NAME = "expert_fusion"
TOP5 = "top5"
CASES = cases_with(TOP5, "the five most likely classes")

TARGETS = (
    Target("cpu", CPU_CASE, "float32", "eager", 3.0),
    Target("cuda", GPU_CASE, "float32", "copy", 0.85),
    Target("cuda", GPU_CASE, "bfloat16", "copy", 0.85),
)

Found = tuple[Tensor, Tensor]  # probabilities and classes, [N] or [N, k]


def cost(case: ExpertCase, dtype: torch.dtype, direction: str) -> Cost:
    """Count the work as the module's docstring says."""
    means = case.logits // case.experts
    return Cost(case.logits * dtype.itemsize, 2 * case.logits + 2 * means, means)


class Agreement(agreement.Agreement):
    """Compares the probabilities of all samples, and the mean logits of the classes found with the largest mean logits.

    Classes that are equally likely within rounding are interchangeable.
    """

    def __init__(self, op: str, inputs: Inputs, eager: Step) -> None:
        stacked = inputs["stacked"]
        self._means = torch.zeros_like(stacked[0], dtype=torch.float64)
        for logits in stacked:  # float64 of one expert at a time
            self._means += logits.double() / len(stacked)
        super().__init__(op, inputs, eager)

    def _run(self, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            probabilities, classes = (each.reshape(len(self._means), -1) for each in step())
        return {"probabilities": probabilities, "logits": self._means.gather(1, classes).float()}

    def _true_values(self) -> dict[str, Tensor]:
        logits = self._means.topk(_k(self._inputs), dim=1).values
        return {"probabilities": (logits - self._means.logsumexp(1, keepdim=True)).exp(), "logits": logits}


# Providers


def _k(inputs: Inputs) -> int:
    return 5 if inputs.case.variant == TOP5 else 1


def _most_likely(means: Tensor, k: int) -> Found:
    probabilities = means.softmax(1)
    values, classes = probabilities.max(1) if k == 1 else probabilities.topk(k, dim=1)
    return values, classes


def eager_fusion(logits: Sequence[Tensor], k: int) -> Found:
    """The step of a network with several heads at inference."""
    return _most_likely(torch.stack(logits).mean(0), k)  # type: ignore[arg-type]


def eager_fusion_of_one(logits: Tensor, k: int) -> Found:
    """The same for logits that are in one tensor already."""
    return _most_likely(logits.mean(0), k)


def _arguments(inputs: Inputs) -> tuple[list[Tensor], int]:
    return experts_of(inputs), _k(inputs)


def our_fusion(logits: Sequence[Tensor], k: int) -> Found:
    found = functional.expert_fusion(logits, topk=k)
    return found.topk_values, found.topk_indices


PROVIDERS = by_name(
    eager("eager", eager_fusion, _arguments),
    eager("eager-one-tensor", eager_fusion_of_one, lambda inputs: (inputs["stacked"], _k(inputs))),
    compiled(eager_fusion, _arguments, left_out=headlines_on_cpu),
    *backends(NAME, lambda inputs: partial(our_fusion, *_arguments(inputs))),
)


OP = expert_op(
    NAME,
    cases=CASES,
    providers=PROVIDERS,
    cost=cost,
    agreement=Agreement,
    references=("eager", "compile"),
    targets=TARGETS,
    plots=("floor", "memory"),
    directions=("fwd",),
)
