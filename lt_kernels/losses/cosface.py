"""CosFace: an additive margin on the target's cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._checks import ClassVector
from ._base import LossOptions, MarginCrossEntropyBase

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CosFaceLoss(MarginCrossEntropyBase):
    """Large-margin cosine loss.

    Wang, Wang, Zhou, Ji, Gong, Zhou, Li, Liu, *CosFace: Large Margin Cosine Loss for Deep Face Recognition*, CVPR 2018
    (also AM-Softmax):

        loss = -log[ exp(s (cos_y - m_y)) / (exp(s (cos_y - m_y)) + sum over j != y of exp(s cos_j)) ]

    ``input`` are the cosines [N, C]. Sets ``margin`` and ``scale``.

    Args:
        margin: m, a number, a 0-dim tensor or one per class [C] (then a buffer; an ``nn.Parameter`` stays one and
            is learned).
        scale: s, a number or a 0-dim tensor (then a buffer; an ``nn.Parameter`` stays one and is learned).
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``device``,
            ``dtype``, ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them,
            shapes and errors.

    Example:
        >>> import torch
        >>> loss = CosFaceLoss(margin=0.4, scale=64.0)
        >>> loss(torch.tensor([[0.3, 0.6, -0.1]]), torch.tensor([1]))  # 64 (0.3 - (0.6 - 0.4)) is 6.4
        tensor(6.4017)
    """

    cosine = True

    def __init__(
        self, margin: float | ClassVector = 0.4, scale: float | Tensor = 64.0, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(margin=margin, scale=scale, **options)
