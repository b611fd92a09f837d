"""LDAM: a margin on the target that grows for rarer classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._checks import ClassVector, check_number
from ..priors import ClassPrior
from ._base import LossOptions, MarginCrossEntropyBase

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LDAMLoss(MarginCrossEntropyBase):
    """Label-distribution-aware margin loss.

    Cao, Wei, Gaidon, Arechiga, Ma, *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS
    2019:

        loss = -log[ exp(s (x_y - m_y)) / (exp(s (x_y - m_y)) + sum over j != y of exp(s x_j)) ]
        m_c  = max_margin * n_c^-1/4 / max(n^-1/4)

    ``input`` are the cosines x of a normalised linear head, without the scale s. Sets ``margin`` = m, float32 [C], and
    ``scale`` = s. For LDAM-DRW let [`DeferredReweighting`][lt_kernels.schedules.DeferredReweighting] set ``weight``.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        max_margin: margin of the rarest class.
        scale: s, the inverse temperature of the cosines: a number or a 0-dim tensor (then a buffer; an
            ``nn.Parameter`` stays one and is learned).
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``zero_counts``,
            ``device``, ``dtype``, ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase]
            has them, shapes and errors.

    Example:
        >>> import torch
        >>> loss = LDAMLoss([900, 90, 10])
        >>> loss.margin
        tensor([0.1623, 0.2887, 0.5000])
        >>> loss(torch.tensor([[0.1, 0.2, 0.6]]), torch.tensor([2]))  # s (0.2 - (0.6 - 0.5)) is about 3
        tensor(3.0949)
    """

    cosine = True

    def __init__(
        self,
        class_counts: ClassVector,
        max_margin: float = 0.5,
        scale: float | Tensor = 30.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.max_margin = check_number("max_margin", max_margin, 0.0)
        self._set_counts(class_counts)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"margin": prior.ldam_margins(self.max_margin)}
