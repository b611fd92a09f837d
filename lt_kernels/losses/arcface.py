"""ArcFace: an additive margin on the target's angle, the same for all classes or larger for rarer ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._checks import ClassVector
from ..priors import ClassPrior, angles
from ._base import LossOptions, MarginCrossEntropyBase

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class ArcFaceLoss(MarginCrossEntropyBase):
    """Additive angular margin loss.

    Deng, Guo, Xue, Zafeiriou, *ArcFace: Additive Angular Margin Loss for Deep Face Recognition*, CVPR 2019:

        loss = -log[ exp(s phi_y) / (exp(s phi_y) + sum over j != y of exp(s cos_j)) ]
        phi  = cos(theta + m), or cos(theta) - m sin(m) once theta > pi - m

    ``input`` are the cosines [N, C]. Sets ``margin``, ``scale`` and ``margin_type="angular"``. The gradient is that
    of the formula. The reference face-recognition code (insightface) changes the angle outside autograd and passes the
    gradient straight through, so its gradient on the target column differs; and it takes cos(theta + m) beyond pi - m
    too, where its value differs.

    Args:
        margin: m in radians, a number, a 0-dim tensor or one per class [C] (then a buffer; an ``nn.Parameter``
            stays one and is learned).
        scale: s, a number or a 0-dim tensor (then a buffer; an ``nn.Parameter`` stays one and is learned).
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``device``,
            ``dtype``, ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase] has them,
            shapes and errors.

    Example:
        >>> import torch
        >>> loss = ArcFaceLoss.from_counts([900, 90, 10], margin_bounds=(0.05, 0.5))
        >>> loss.margin
        tensor([0.0500, 0.2184, 0.5000])
        >>> loss(torch.tensor([[0.1, 0.2, 0.6]]), torch.tensor([2]))
        tensor(3.6748)
    """

    cosine = True
    margin_bounds: tuple[float, float]
    power: float

    def __init__(
        self, margin: float | ClassVector = 0.5, scale: float | Tensor = 64.0, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(margin=margin, scale=scale, margin_type="angular", **options)

    @classmethod
    def from_counts(
        cls,
        class_counts: ClassVector,
        margin_bounds: tuple[float, float] = (0.05, 0.5),
        power: float = 0.25,
        scale: float | Tensor = 64.0,
        **options: Unpack[LossOptions],
    ) -> Self:
        """Make a loss with a margin per class, m_c = a n_c^-power + b.

        The largest class has the lower bound, the smallest class the upper bound.

        Args:
            class_counts: training samples per class: [C], or a mapping or Series by class.
            margin_bounds: (lower, upper), in radians.
            power: how fast the margin falls with the count, > 0.
            scale: s, as the constructor's.
            options: as the constructor's, and ``zero_counts``.
        """
        loss = cls(scale=scale, **options)
        loss.margin_bounds, loss.power = angles("margin_bounds", margin_bounds), power
        loss._set_counts(class_counts)
        return loss

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        return {"margin": prior.arcface_margins(self.margin_bounds, self.power)}
