"""NCL: experts that learn from each other, on all classes and on each sample's hardest ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional as LF
from .._checks import ClassVector, check_int, check_number
from ..priors import ClassPrior
from ._base import LossOptions
from ._experts_base import ExpertLossBase, check_indices

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..functional.experts import ExpertLogits


class NCLLoss(ExpertLossBase):
    """The supervised part of nested collaborative learning.

    Li, Tan, Wan, Lei, Guo, *Nested Collaborative Learning for Long-Tailed Visual Recognition*, CVPR 2022. With l_e =
    scale z_e + log n and h_e = l_e on the hard classes of the sample, 0 elsewhere:

        loss  = ce_factor sum_e CE(l_e, y) + hard_factor sum_e CE(h_e, y)
              + divergence_factor D(l) + hard_divergence_factor D(h)
        D(x)  = 1 / (E - 1) sum over ordered pairs e != f of KL(softmax(x_f) || softmax(x_e))

    The hard classes are the same for all experts: the ``hard_classes`` largest of z_0, the first expert's logits
    without log n, the target always among them. As published, the other classes get the logit 0, not -inf: together
    they add C - K to the sum of exponentials. The published code has log(softmax(x_e) + 1e-9) in D: ``eps=1e-9``,
    computed pair by pair in eager PyTorch. By default D is exact and fused. The several views of each image are for
    the caller to add up.

    Sets ``class_bias`` = log n, float32 [C]. At test time use
    [`expert_fusion`][lt_kernels.functional.expert_fusion] of the plain logits.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        hard_classes: K; default 30% of C, rounded down, at least 1: the published 30 of 100, 300 of 1000 and 2442 of
            8142.
        scale: multiplies the logits; for heads that hand over cosines. An ``nn.Parameter``, 0-dim, is learned.
        ce_factor: of the cross-entropies over all classes.
        hard_factor: of the cross-entropies over the hard classes.
        divergence_factor: of the divergence over all classes.
        hard_divergence_factor: of the divergence over the hard classes.
        eps: added to softmax(x_e) inside the logarithm of D; published: 1e-9.
        options: ``weight``, ``ignore_index``, ``reduction`` (over rows), ``empty_mean``, ``label_smoothing``,
            ``zero_counts``, ``device``, ``dtype``, ``persistent``;
            [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them, shapes and errors. Weights
            and smoothing act on the cross-entropies alone; ignored rows take no part in the divergences either, whose
            means are over the other rows. A masked class (``zero_counts="mask"``) takes no part, hard or not.

    A single expert has no divergence. With mixup both classes of a pair are hard; the paper has none.

    Example:
        >>> import torch
        >>> loss = NCLLoss([900, 90, 10], hard_classes=1)
        >>> loss(torch.zeros(2, 1, 3), torch.tensor([2]))  # 2 (-log .01 - log (10 / 12)); no divergence
        tensor(9.5750)
    """

    expert_reduction = "sum"

    def __init__(
        self,
        class_counts: ClassVector,
        hard_classes: int | None = None,
        scale: float | Tensor = 1.0,
        ce_factor: float = 1.0,
        hard_factor: float = 1.0,
        divergence_factor: float = 0.6,
        hard_divergence_factor: float = 0.6,
        eps: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.ce_factor = check_number("ce_factor", ce_factor)
        self.hard_factor = check_number("hard_factor", hard_factor)
        self.divergence_factor = check_number("divergence_factor", divergence_factor)
        self.hard_divergence_factor = check_number("hard_divergence_factor", hard_divergence_factor)
        self.eps = check_number("eps", eps, 0.0)
        self._set_counts(class_counts)
        assert self.class_counts is not None
        classes = len(self.class_counts)
        if hard_classes is None:
            hard_classes = max(1, 3 * classes // 10)
        expected = f"1 to {classes}, the number of classes"
        self.hard_classes = check_int(
            "hard_classes", hard_classes, 1, classes, kind="an int or None", expected=expected
        )

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"class_bias": prior.log_counts()}

    def loss(self, logits: ExpertLogits, target: Tensor, **mixed: Any) -> Tensor:
        check_indices(target, "NCL's hard classes are those of a class")
        loss = _times(self.ce_factor, super().loss(logits, target, **mixed))  # checks the arguments
        assert self.class_bias is not None
        bias = self.class_bias.to(loss.dtype).view(-1, *[1] * (logits[0].dim() - 2))  # beside [N, C, d1, ..., dk]
        experts = len(logits)
        pairs = max(experts - 1, 1)
        shifted = _each(lambda z: _shifted(bias, z, self.scale), logits)
        if experts > 1 and self.divergence_factor != 0:
            loss = loss + self._divergence(shifted, self.divergence_factor / pairs, target, **mixed)
        if self.hard_factor == 0 and (experts == 1 or self.hard_divergence_factor == 0):
            return loss
        masked = bias == -math.inf
        easy = self._easy(logits[0], masked, target, mixed["mixed_target"])
        hard = _each(lambda z: z.masked_fill(easy, 0.0), shifted)
        if self.hard_factor != 0:
            own = self.class_bias
            if self.masked_classes:  # from smoothing too
                masks = torch.zeros_like(own).masked_fill(own == -math.inf, -math.inf)
            else:
                masks = None
            keywords = {**self.keywords(), "class_bias": masks, "scale": 1.0}
            loss = loss + _times(self.hard_factor, LF.expert_cross_entropy(hard, target, **mixed, **keywords))
        if experts > 1 and self.hard_divergence_factor != 0:
            loss = loss + self._divergence(hard, self.hard_divergence_factor / pairs, target, **mixed)
        return loss

    def _divergence(self, logits: ExpertLogits, factor: float, target: Tensor, **mixed: Any) -> Tensor:
        """Return factor times the sum over ordered pairs of KL(softmax(x_f) || softmax(x_e)), reduced over rows."""
        if self.eps == 0:
            return self.divergence(logits, "pairwise", 1.0, factor, target, **mixed)
        exact = [z.log_softmax(1) for z in logits]
        probabilities = [log_p.exp() for log_p in exact]
        softened = [(p + self.eps).log() for p in probabilities]
        rows = torch.zeros_like(exact[0][:, 0])
        for f, p in enumerate(probabilities):
            log_p = exact[f].clamp_min(torch.finfo(p.dtype).min)  # of a masked class: 0 times a finite number
            for e, log_q in enumerate(softened):
                if e != f:
                    rows = rows + (p * (log_p - log_q)).sum(1)
        return factor * self.over_rows(rows, target, **mixed)

    @torch.no_grad()
    def _easy(self, first: Tensor, masked: Tensor, target: Tensor, mixed_target: Tensor | None) -> Tensor:
        """Return whether a class is neither hard nor masked, like ``first``.

        Hard are the first expert's K largest logits, the targets among them.
        """
        ranked = first.detach().masked_fill(masked, -math.inf)
        if mixed_target is None:  # nothing comes of the hard classes of a row that is ignored
            labels = target.long()[:, None].clamp(0, first.shape[1] - 1)
            ranked = ranked.scatter(1, labels, math.inf)
        else:
            ranked = self._raised(self._raised(ranked, target), mixed_target)
        hardest = ranked.topk(self.hard_classes, 1, sorted=False).indices
        easy = (~masked).expand_as(first).scatter(1, hardest, False)
        return easy if mixed_target is None else easy & (ranked != math.inf)  # a pair's are two, even where K is 1

    def _raised(self, ranked: Tensor, target: Tensor) -> Tensor:
        """Return the logits with an infinite one for each target that is a class, and is not ignored."""
        labels = target.long()[:, None]
        known = (labels >= 0) & (labels < ranked.shape[1]) & (labels != self.ignore_index)
        labels = labels.clamp(0, ranked.shape[1] - 1)
        return ranked.scatter(1, labels, torch.where(known, math.inf, ranked.gather(1, labels)))


def _times(factor: float, loss: Tensor) -> Tensor:
    return loss if factor == 1.0 else factor * loss


def _shifted(bias: Tensor, z: Tensor, scale: float | Tensor) -> Tensor:
    """Return bias + scale z, in the bias's precision."""
    if isinstance(scale, Tensor):
        return bias + scale.to(bias.dtype) * z.to(bias.dtype)
    return torch.add(bias, z, alpha=scale)


def _each(function: Callable[[Tensor], Tensor], logits: ExpertLogits) -> ExpertLogits:
    return function(logits) if isinstance(logits, Tensor) else [function(z) for z in logits]
