"""Benchmark of ``expert_cross_entropy`` as the training loss of BalPoE.

The loss is the mean over experts of the cross-entropy of their logits, each shifted by its own multiple of one log
prior.

Cases are steps with mixup, as published: two targets for each sample, ``lambda`` times the loss of one and ``1 -
lambda`` times that of the other. The variant ``plain`` has one target. The logits of the experts are a list of tensors,
as networks return them, and so are their gradients.
Work is counted by ``op.cost_of_logits``, as for rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional
from ...losses import BalPoELoss
from ..agreement import LogitsAgreement
from ..cases import BOTH, CPU, Inputs, by_name
from ..experts import CPU_CASE, GPU_CASE, MIX_LAMBDA, ExpertCase, cases_with, expert_op, experts_of
from ..op import Target, cost_of_logits
from ..providers import Provider, Step, backends, compiled, eager, headlines_on_cpu, kernels_unavailable, module

NAME = "expert_cross_entropy"
PLAIN = "plain"
CALL_CASE = "e3-n64-c100-plain"
CASES = cases_with(PLAIN, "one target for each sample: no mixup") | by_name(
    ExpertCase(
        CALL_CASE, 64, 100, CPU, calls=BOTH, note="a small call, no mixup", cpu_dtypes=("float32",), variant=PLAIN
    )
)

TARGETS = (
    Target("cpu", CPU_CASE, "float32", "published", 4.0),
    Target("cpu", CPU_CASE, "float32", "compile", 2.0),
    Target("cpu", CALL_CASE, "float32", "eager", at_most=1.2, ours="lt-module"),
    Target("cuda", GPU_CASE, "float32", "published", 4.0),
    Target("cuda", GPU_CASE, "float32", "compile", 2.0),
    Target("cuda", GPU_CASE, "float32", "copy", 0.85),
    Target("cuda", GPU_CASE, "bfloat16", "copy", 0.85),
)


class Agreement(LogitsAgreement):
    def _losses_of(self, logits: Tensor, rows: Tensor) -> Tensor:
        inputs = self._inputs
        shifts = torch.outer(logits.new_tensor(inputs.case.taus), inputs.log_prior.double())
        # F.cross_entropy wants the classes second
        shifted = (logits + shifts[:, None]).movedim(0, -1)
        total = torch.zeros_like(shifted[:, 0])
        for target, share in _targets(inputs):
            labels = target[rows, None].expand(-1, len(logits))
            total += share * F.cross_entropy(shifted, labels, reduction="none")
        return total.mean(1)


# Providers

Targets = Sequence[tuple[Tensor, float]]


def _targets(inputs: Inputs) -> Targets:
    """Each target of the samples, and its share of the loss."""
    if inputs.case.variant == PLAIN:
        return [(inputs.target, 1.0)]
    return [(inputs.target, MIX_LAMBDA), (inputs["mixed_target"], 1 - MIX_LAMBDA)]


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


def _published_arguments(inputs: Inputs) -> tuple[object, ...]:
    return experts_of(inputs), _targets(inputs), inputs.counts, inputs.case.taus


def _arguments(inputs: Inputs) -> tuple[object, ...]:
    shifts = [(tau * inputs.log_prior).to(inputs["stacked"].dtype) for tau in inputs.case.taus]
    return experts_of(inputs), _targets(inputs), shifts


def _mixup(inputs: Inputs) -> dict[str, Any]:
    return {} if inputs.case.variant == PLAIN else {"mixed_target": inputs["mixed_target"], "mix_lambda": MIX_LAMBDA}


def _ours(inputs: Inputs) -> Step:
    options = {"log_prior": inputs.log_prior, "taus": inputs.case.taus, **_mixup(inputs)}
    return partial(functional.expert_cross_entropy, experts_of(inputs), inputs.target, **options)


def _our_module(inputs: Inputs) -> Step:
    loss = BalPoELoss(inputs.counts, inputs.case.taus)
    return partial(loss, experts_of(inputs), inputs.target, **_mixup(inputs))


def _our_loop(inputs: Inputs) -> Step:
    """One call for each expert of the op that knows nothing of experts."""
    shifts, options = [tau * inputs.log_prior for tau in inputs.case.taus], _mixup(inputs)

    def step() -> Tensor:
        losses = [
            functional.margin_cross_entropy(logits, inputs.target, class_bias=shift, **options)
            for logits, shift in zip(experts_of(inputs), shifts, strict=True)
        ]
        return torch.stack(losses).mean()

    return step


PROVIDERS = by_name(
    eager("published", published_loss, _published_arguments),
    eager("eager", eager_loss, _arguments),
    compiled(eager_loss, _arguments, left_out=headlines_on_cpu),
    *backends(NAME, _ours),
    module(_our_module),
    Provider("lt-loop", _our_loop, lambda device: kernels_unavailable(NAME, device)),
)


OP = expert_op(
    NAME,
    cases=CASES,
    providers=PROVIDERS,
    cost=cost_of_logits,
    agreement=Agreement,
    references=("published", "compile"),
    targets=TARGETS,
    plots=("floor", "memory"),
)
