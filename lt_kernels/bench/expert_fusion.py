"""Benchmark of ``expert_fusion``: prediction and confidence of a product of experts, from their logits in memory.

The variant ``top5`` asks for the five most likely classes and their probabilities. There is no backward pass. Bytes and
operations, for the least work that the result needs: each logit of any expert is read once and added, 2 operations, and
each of the N C means takes an exponential and 2 operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import functional
from . import agreement, cases, experts
from .cases import ExpertCase, ExpertInputs
from .experts import CPU_CASE, GPU_CASE, make_copy, make_inputs
from .providers import Step, compiled, eager, named, ours
from .records import COPY, Cost, Record, Target

__all__ = ["make_copy", "make_inputs"]

OP = "expert_fusion"
TOP5 = "top5"
CASES = (
    cases.EXPERTS
    | cases.SMALL_EXPERTS
    | cases.variants(TOP5, [CPU_CASE, GPU_CASE, "odd-3x7x123"], "the five most likely classes")
)
DIRECTIONS = ("fwd",)
DTYPES = experts.DTYPES
#: What ``lt-kernels bench compare`` measures, and what it divides our time by.
COMPARE_CASES = (CPU_CASE,)
REFERENCES = ("eager", "compile")

FLOOR = COPY
PLOTS = ("floor", "memory")
SHAPE = "E x N x C"
MEMORY = "Peak memory"

TARGETS = (
    Target("cpu", CPU_CASE, "float32", "eager", 3.0),
    Target("cuda", GPU_CASE, "float32", "copy", 0.85),
    Target("cuda", GPU_CASE, "bfloat16", "copy", 0.85),
)

Found = tuple[Tensor, Tensor]  # probabilities and classes, [N] or [N, k]


def cost(case: ExpertCase, dtype: torch.dtype, direction: str) -> Cost:
    """Counted as in the module's docstring."""
    means = case.logits // case.experts
    return Cost(case.logits * dtype.itemsize, 2 * case.logits + 2 * means, means)


def memory(record: Record) -> float | None:
    """Peak memory in multiples of the logits' bytes."""
    return None if record.peak_bytes is None else record.peak_bytes / record.bytes_moved


def make_step(provider: str, inputs: ExpertInputs) -> Step:
    """A call without arguments that returns probabilities and classes."""
    return PROVIDERS[provider].make(inputs)


class Agreement(agreement.Agreement[ExpertInputs]):
    """Compares the probabilities of all samples, and the mean logits of the classes found with the largest mean logits:
    of classes as likely as one another within rounding, any will do.
    """

    def __init__(self, inputs: ExpertInputs) -> None:
        self._means = torch.zeros_like(inputs.stacked[0], dtype=torch.float64)
        for logits in inputs.stacked.detach():
            self._means += logits.double() / len(inputs.stacked)
        super().__init__(OP, inputs, make_step("eager", inputs))

    def _run(self, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            probabilities, classes = (each.reshape(len(self._means), -1) for each in step())
        return {"probabilities": probabilities, "logits": self._means.gather(1, classes).float()}

    def _true_values(self) -> dict[str, Tensor]:
        logits = self._means.topk(_k(self._inputs), dim=1).values
        return {"probabilities": (logits - self._means.logsumexp(1, keepdim=True)).exp(), "logits": logits}


def check_agreement(provider: str, inputs: ExpertInputs) -> None:
    """AssertionError unless ``provider`` agrees with float64 on ``inputs``; see ``Agreement``."""
    Agreement(inputs).check(provider, make_step(provider, inputs))


# Providers


def _k(inputs: ExpertInputs) -> int:
    return 5 if inputs.case.variant == TOP5 else 1


def _most_likely(means: Tensor, k: int) -> Found:
    probabilities = means.softmax(1)
    values, classes = probabilities.max(1) if k == 1 else probabilities.topk(k, dim=1)
    return values, classes


def eager_fusion(logits: Sequence[Tensor], k: int) -> Found:
    """What a network with several heads does at inference."""
    return _most_likely(torch.stack(logits).mean(0), k)  # type: ignore[arg-type]


def eager_fusion_of_one(logits: Tensor, k: int) -> Found:
    """The same of logits that are in one tensor already."""
    return _most_likely(logits.mean(0), k)


def _arguments(inputs: ExpertInputs) -> tuple[object, ...]:
    return inputs.experts, _k(inputs)


def _ours(inputs: ExpertInputs) -> Found:
    found = functional.expert_fusion(inputs.experts, topk=_k(inputs))
    return found.topk_values, found.topk_indices


PROVIDERS = named(
    eager("eager", eager_fusion, _arguments),
    eager("eager-one-tensor", eager_fusion_of_one, lambda inputs: (inputs.stacked, _k(inputs))),
    replace(compiled("compile", eager_fusion, _arguments), left_out=experts.headlines_on_cpu),
    ours(OP, "reference", _ours),
    ours(OP, "native", _ours),
    ours(OP, "triton", _ours),
)
