"""SADE: three experts for long-tailed, uniform and inversely long-tailed data, and their weights at test time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import ClassVector, check_int, check_number
from ..priors import ClassPrior
from ._base import LossOptions
from ._experts_base import ExpertLossBase, stacked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..functional.experts import ExpertLogits

EXPERTS = 3


class SADELoss(ExpertLossBase):
    """The training loss of SADE's three experts, summed over them.

    Zhang, Hooi, Hong, Feng, *Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed
    Recognition*, NeurIPS 2022:

        loss = CE(z_0, y) + CE(z_1 + log(pi + eps), y) + CE(z_2 + log(pi + eps) - tau log(pi_rev + eps), y)

    pi_rev are the same priors with their ranks reversed: the largest class has the prior of the smallest. The first
    of several classes with equal counts ranks lower, so that even they may get different pi_rev. Sets ``class_bias``,
    float32 [3, C]. At test time weigh the experts by [`fit_expert_weights`][lt_kernels.losses.fit_expert_weights], or
    equally, in [`expert_fusion`][lt_kernels.functional.expert_fusion].

    Args:
        class_counts: training samples per class, [C].
        tau: of the third expert; published: 2, and 1 for iNaturalist 2018.
        eps: the published code adds 1e-9 to the priors.
        scale: multiplies the logits; for heads that hand over cosines.
        options: ``weight``, ``ignore_index``, ``reduction`` (over rows), ``label_smoothing``, ``zero_counts``,
            ``device``, ``dtype``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them, shapes
            and errors. ``zero_counts="mask"`` masks classes without samples in every expert; the others' ranks are
            reversed among themselves.

    Example:
        >>> import torch
        >>> loss = SADELoss([900, 90, 10])
        >>> loss.class_bias[2]  # log pi - 2 log pi_rev
        tensor([ 9.1050,  2.4079, -4.3944])
        >>> loss(torch.zeros(3, 2, 3), torch.tensor([0, 2]))
        tensor(10.2048)
    """

    expert_reduction = "sum"

    def __init__(
        self,
        class_counts: ClassVector,
        tau: float = 2.0,
        eps: float = 1e-9,
        *,
        scale: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.tau, self.eps = check_number("tau", tau), check_number("eps", eps, 0.0)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        log_prior = prior.log_prior(eps=self.eps)
        masked = log_prior == -math.inf
        away = log_prior - prior.reversed_log_prior(self.tau, eps=self.eps)
        bias = torch.stack([torch.zeros_like(log_prior), log_prior, away])
        return {"class_bias": bias.masked_fill(masked, -math.inf)}

    def loss(self, logits: ExpertLogits, target: Tensor, **mixed: Any) -> Tensor:
        is_experts = logits.dim() == 3 if isinstance(logits, Tensor) else isinstance(logits, (list, tuple))
        if is_experts and len(logits) != EXPERTS:
            raise ValueError(f"logits: got {len(logits)} experts, expected {EXPERTS}")
        return super().loss(logits, target, **mixed)


@torch.inference_mode(False)
@torch.enable_grad()
def fit_expert_weights(
    view1_logits: ExpertLogits,
    view2_logits: ExpertLogits,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 0.025,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    entropy_weight: float = 0.01,
    min_weight: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fit weights of experts to unlabelled test data of an unknown class distribution.

    SADE's test-time aggregation (Zhang et al., NeurIPS 2022): weights w = softmax(a), with a equal for all experts at
    first, such that two augmented views of a sample get similar predictions,

        maximise  mean over samples of cos(softmax(sum_e w_e z_e^1), softmax(sum_e w_e z_e^2)) + entropy_weight H(w)

    by SGD with Nesterov momentum over batches in order, until all epochs are done or a weight falls below
    ``min_weight``. The weights at that moment are returned.

    The objective is the published one. [unverified]: the optimiser's settings are those of the published script as far
    as we know, and where exactly it stops within a step.

    Args:
        view1_logits: the experts' logits of one view, [E, N, C] or a list of E [N, C].
        view2_logits: the same for the other view.
        epochs: passes over the samples.
        batch_size: samples per step; the last batch may be smaller.
        lr: of SGD.
        momentum: of SGD; Nesterov's unless 0.
        weight_decay: of SGD.
        entropy_weight: factor of the weights' entropy, 0.01 in the paper.
        min_weight: a weight below it ends the fit.
        generator: shuffles the samples anew for each epoch, if given; a generator of the CPU.

    Returns:
        w, [E], float32 (float64 for float64 logits), without gradient: the ``expert_weight`` of
        [`expert_fusion`][lt_kernels.functional.expert_fusion]. The same inputs give the same weights. Each step waits
        for a GPU, to see whether to stop.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message names it.

    Example:
        >>> views = torch.randn(2, 3, 64, 10, generator=torch.Generator().manual_seed(0))
        >>> fit_expert_weights(views[0], views[1], epochs=0)
        tensor([0.3333, 0.3333, 0.3333])
    """
    first, second = stacked("view1_logits", view1_logits).detach(), stacked("view2_logits", view2_logits).detach()
    for what in ("shape", "dtype", "device"):
        here, there = getattr(second, what), getattr(first, what)
        if here != there:
            shown = [tuple(value) if isinstance(value, torch.Size) else value for value in (here, there)]
            raise ValueError(f"view2_logits: got {what} {shown[0]}, expected {shown[1]} as view1_logits")
    check_int("epochs", epochs, 0)
    check_int("batch_size", batch_size, 1)
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    numbers |= {"entropy_weight": entropy_weight, "min_weight": min_weight}
    for name, value in numbers.items():
        check_number(name, value, 0.0)
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise TypeError(f"generator: got {generator!r}, expected a torch.Generator of the CPU or None")

    experts, rows, _ = first.shape
    dtype = torch.promote_types(first.dtype, torch.float32)
    a = torch.full((experts,), 1.0 / experts, dtype=dtype, device=first.device, requires_grad=True)
    optimizer = torch.optim.SGD([a], lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    for _ in range(epochs):
        order = None if generator is None else torch.randperm(rows, generator=generator).to(first.device)
        for start in range(0, rows, batch_size):
            batch = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            w = a.softmax(0)
            # copies: logits of inference mode cannot be saved for backward
            z1, z2 = (view[:, batch].to(dtype, copy=True) for view in (first, second))
            p, q = (torch.einsum("e,enc->nc", w, z).softmax(1) for z in (z1, z2))
            negentropy = (w * w.log()).sum()
            optimizer.zero_grad()
            (entropy_weight * negentropy - F.cosine_similarity(p, q, dim=1).mean()).backward()
            optimizer.step()
            if bool((a.detach().softmax(0) < min_weight).any()):
                return a.detach().softmax(0)
    return a.detach().softmax(0)
