"""Benchmark of ``expert_cross_entropy`` as the training loss of BalPoE.

The loss is the mean over experts of the cross-entropy of their logits, each shifted by its own multiple of one log
prior.

Cases are steps with mixup, as published: two targets for each sample, ``lambda`` times the loss of one and ``1 -
lambda`` times that of the other. The variant ``plain`` has one target. The logits of the experts are a list of tensors,
as networks return them, and so are their gradients.

Bytes and operations per logit of any expert, for the least work that the result needs, are counted as for rows alone:

    fwd      reads each logit once                            itemsize bytes,     4 operations, 1 exponential
    bwd      reads each logit and writes its gradient         2 * itemsize bytes, 4 operations, 1 exponential
    fwd_bwd  reads each logit once, writes its gradient once  2 * itemsize bytes, 8 operations, 1 exponential
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from .. import experts
from ..cases import by_name
from ..experts import CPU_CASE, GPU_CASE, ExpertCase, ExpertInputs
from ..op import COPY, Cost, Op, Target
from ..providers import Provider, Step, backends, compiled, eager, headlines_on_cpu, kernels_unavailable

NAME = "expert_cross_entropy"
PLAIN = "plain"
CASES = (
    experts.EXPERTS
    | experts.SMALL_EXPERTS
    | experts.variants(PLAIN, [CPU_CASE, GPU_CASE, "odd-3x7x123"], "one target for each sample: no mixup")
)

TARGETS = (
    Target("cpu", CPU_CASE, "float32", "published", 4.0),
    Target("cpu", CPU_CASE, "float32", "compile", 2.0),
    Target("cuda", GPU_CASE, "float32", "published", 4.0),
    Target("cuda", GPU_CASE, "float32", "compile", 2.0),
    Target("cuda", GPU_CASE, "float32", "copy", 0.85),
    Target("cuda", GPU_CASE, "bfloat16", "copy", 0.85),
)


def cost(case: ExpertCase, dtype: torch.dtype, direction: str) -> Cost:
    """Count the work as the module's docstring says."""
    passes, operations = {"fwd": (1, 4), "bwd": (2, 4), "fwd_bwd": (2, 8)}[direction]
    return Cost(passes * case.logits * dtype.itemsize, operations * case.logits, case.logits)


class Agreement(experts.Agreement):
    def _losses(self, logits: Tensor, samples: Tensor) -> Tensor:
        inputs = self._inputs
        shifts = torch.outer(logits.new_tensor(inputs.case.taus), inputs.log_prior.double())
        # F.cross_entropy wants the classes second
        shifted = (logits + shifts[:, None]).movedim(0, -1)
        total = torch.zeros_like(shifted[:, 0])
        for target, share in _targets(inputs):
            labels = target[samples, None].expand(-1, len(logits))
            total += share * F.cross_entropy(shifted, labels, reduction="none")
        return total.mean(1)


# Providers

Targets = Sequence[tuple[Tensor, float]]


def _targets(inputs: ExpertInputs) -> Targets:
    """Each target of the samples, and its share of the loss."""
    if inputs.case.variant == PLAIN:
        return [(inputs.target, 1.0)]
    return [(inputs.target, inputs.mix_lambda), (inputs.mixed_target, 1 - inputs.mix_lambda)]


def published_loss(logits: Sequence[Tensor], targets: Targets, counts: Tensor, taus: Sequence[float]) -> Tensor:
    """The step of published training code: the criterion is called for each target of mixup, and makes the prior anew.

    In float32 for every dtype of the logits, since the prior is float32.
    """

    def criterion(target: Tensor) -> Tensor:
        total = counts.new_zeros(())
        for one, tau in zip(logits, taus, strict=True):
            prior = counts / counts.sum()
            total = total + F.cross_entropy(one + tau * torch.log(prior + 1e-9), target)
        return total / len(logits)

    losses = [criterion(target) if len(targets) == 1 else share * criterion(target) for target, share in targets]
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def eager_loss(logits: Sequence[Tensor], targets: Targets, shifts: Sequence[Tensor]) -> Tensor:
    """The same without what need not be repeated; ``shifts`` are the experts' multiples of the log prior."""
    total = shifts[0].new_zeros(())
    for one, shift in zip(logits, shifts, strict=True):
        log_probabilities = F.log_softmax(one + shift, dim=1)
        for target, share in targets:
            total = total + share * F.nll_loss(log_probabilities, target)
    return total / len(logits)


def _published_arguments(inputs: ExpertInputs) -> tuple[object, ...]:
    return inputs.experts, _targets(inputs), inputs.counts, inputs.case.taus


def _arguments(inputs: ExpertInputs) -> tuple[object, ...]:
    shifts = [(tau * inputs.log_prior).to(inputs.stacked.dtype) for tau in inputs.case.taus]
    return inputs.experts, _targets(inputs), shifts


def _mixup(inputs: ExpertInputs) -> dict[str, Any]:
    if inputs.case.variant == PLAIN:
        return {}
    return {"mixed_target": inputs.mixed_target, "mix_lambda": inputs.mix_lambda}


def _our_loss(inputs: ExpertInputs) -> Tensor:
    loss: Tensor = functional.expert_cross_entropy(
        inputs.experts, inputs.target, log_prior=inputs.log_prior, taus=inputs.case.taus, **_mixup(inputs)
    )
    return loss


def _our_loop(inputs: ExpertInputs) -> Step:
    """One call for each expert of the op that knows nothing of experts."""
    shifts, options = [tau * inputs.log_prior for tau in inputs.case.taus], _mixup(inputs)

    def step() -> Tensor:
        losses = [
            functional.margin_cross_entropy(logits, inputs.target, class_bias=shift, **options)
            for logits, shift in zip(inputs.experts, shifts, strict=True)
        ]
        return torch.stack(losses).mean()

    return step


PROVIDERS = by_name(
    eager("published", published_loss, _published_arguments),
    eager("eager", eager_loss, _arguments),
    compiled("compile", eager_loss, _arguments, left_out=headlines_on_cpu),
    *backends(NAME, lambda inputs: partial(_our_loss, inputs)),
    Provider("lt-loop", _our_loop, lambda device: kernels_unavailable(NAME, device)),
)


OP = Op(
    NAME,
    cases=CASES,
    providers=PROVIDERS,
    cost=cost,
    agreement=Agreement,
    floor=COPY,
    rank=2,
    shape="E x N x C",
    compare_cases=(CPU_CASE,),
    references=("published", "compile"),
    targets=TARGETS,
    plots=("floor", "memory"),
)
