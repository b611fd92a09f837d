"""BalPoE: experts that see different shares of the log prior, and whose product is balanced."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import ClassVector, check_choice, check_number, with_values
from ..priors import ClassPrior
from ._base import LossOptions
from ._experts_base import ExpertLossBase

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self, Unpack


class BalPoEPreset(NamedTuple):
    """Published settings of one data set."""

    taus: tuple[float, ...]
    mixup_alpha: float  #: of the Beta distribution that mixup and CutMix draw from
    batch_size: int


class BalPoELoss(ExpertLossBase):
    """The training loss of a balanced product of experts.

    Aimar, Jonnarth, Felsberg, Kuhlmann, *Balanced Product of Calibrated Experts for Long-Tailed Recognition*, CVPR
    2023:

        loss = 1/E sum over experts e of CE(z_e + tau_e log(pi + eps), y),    pi = n / sum(n)

    ``logits`` are those of E experts, z_e = 30 cos in the published heads (such as
    [`ExpertHead`][lt_kernels.losses.ExpertHead]'s). Sets ``log_prior`` = log(pi + eps), float32 [C], and ``taus``;
    ``zero_counts="mask"`` sets ``class_bias`` too, -inf for classes without samples. Predict with
    [`expert_fusion`][lt_kernels.functional.expert_fusion]: the plain mean of the experts' logits, without any prior.

    That product is Fisher-consistent for the balanced error where the taus have mean 1 (the paper writes lambda = 1 -
    tau, of mean 0). Other taus are legal and warned of: the published ones for ImageNet-LT have mean 1.25.

    Args:
        class_counts: training samples per class: [C], or a mapping or Series by class.
        taus: one number for each expert; or an array or tensor [E], or [E, C] for an exponent per expert and class
            (then a buffer; an ``nn.Parameter`` stays one and is learned).
        eps: the published code adds 1e-9 to the prior.
        scale: multiplies the logits; for heads that hand over cosines. An ``nn.Parameter``, 0-dim, is learned.
        options: ``weight``, ``ignore_index``, ``reduction``, ``empty_mean``, ``label_smoothing``, ``zero_counts``,
            ``device``, ``dtype``, ``persistent``; [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase]
            has them, shapes and errors.

    Warns:
        UserWarning: once, at construction: the taus' mean (of some class) is not 1.

    Example:
        >>> import torch
        >>> loss = BalPoELoss([900, 90, 10], taus=(0.0, 1.0, 2.0))
        >>> loss(torch.zeros(3, 2, 3), torch.tensor([0, 2]))  # experts: 1.0986, 2.3553, 4.5099
        tensor(2.6546)
        >>> BalPoELoss.preset("inat2018", [900, 90, 10])
        BalPoELoss(num_classes=3, taus=(-1.0, 1.0, 3.0))
    """

    #: Published settings by data set.
    PRESETS: ClassVar[Mapping[str, BalPoEPreset]] = MappingProxyType(
        {
            "cifar100-lt": BalPoEPreset((0.0, 1.0, 2.0), mixup_alpha=0.4, batch_size=128),
            "imagenet-lt": BalPoEPreset((0.0, 1.25, 2.5), mixup_alpha=0.3, batch_size=64),
            "inat2018": BalPoEPreset((-1.0, 1.0, 3.0), mixup_alpha=0.2, batch_size=512),
        }
    )

    taus: tuple[float, ...] | Tensor

    def __init__(
        self,
        class_counts: ClassVector,
        taus: Sequence[float] | Tensor | np.ndarray[Any, Any] = (0.0, 1.0, 2.0),
        eps: float = 1e-9,
        *,
        scale: float | Tensor = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(scale=scale, **options)
        self.eps = check_number("eps", eps, 0.0)
        self._set_counts(class_counts)
        self._set_taus(taus)

    @classmethod
    def preset(cls, name: str, class_counts: ClassVector, **options: Any) -> Self:
        """Make a loss with the published taus of a data set.

        Args:
            name: a key of ``BalPoELoss.PRESETS``: ``"cifar100-lt"``, ``"imagenet-lt"`` (which warns: its taus have mean
                1.25) or ``"inat2018"``. Mixup's alpha and the batch size there are for the caller to use.
            class_counts: training samples per class: [C], or a mapping or Series by class; of any data set.
            options: as the constructor's, except ``taus``.

        Raises:
            ValueError: an unknown name.
        """
        check_choice("name", name, tuple(cls.PRESETS))
        return cls(class_counts, cls.PRESETS[name].taus, **options)

    def derive(self, prior: ClassPrior) -> dict[str, Tensor]:
        log_prior = prior.log_prior(eps=self.eps)
        if self.zero_counts != "mask":
            return {"log_prior": log_prior}
        # -inf times a tau of 0, or a negative one, would not mask
        masked = log_prior == -math.inf
        return {
            "log_prior": log_prior.masked_fill(masked, 0.0),
            "class_bias": torch.zeros_like(log_prior).masked_fill(masked, -math.inf),
        }

    def _set_taus(self, taus: Any) -> None:
        assert self.log_prior is not None
        classes = len(self.log_prior)
        if isinstance(taus, (list, tuple)) and not any(isinstance(tau, (list, tuple)) for tau in taus):
            held = torch.tensor(
                [check_number(f"taus[{e}]", tau) for e, tau in enumerate(taus)], dtype=torch.float64, device="cpu"
            )
        else:
            if isinstance(taus, Tensor):
                with_values("taus", taus)
            try:
                held = taus.detach() if isinstance(taus, Tensor) else torch.as_tensor(taus, device="cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"taus: got {type(taus).__name__} ({error}), expected numbers [E] or [E, C]") from error
            if held.is_complex() or held.dtype == torch.bool:
                raise TypeError(f"taus: got dtype {held.dtype}, expected integers or real floating-point numbers")
            held = held.to("cpu", torch.float64)
        if held.dim() not in (1, 2) or len(held) == 0 or (held.dim() == 2 and held.shape[1] != classes):
            raise ValueError(f"taus: got shape {tuple(held.shape)}, expected [E] or [E, {classes}]")
        if not bool(held.isfinite().all()):
            raise ValueError("taus: got values that are not finite, expected finite numbers")
        mean = held.mean(0).flatten()
        worst = mean[(mean - 1).abs().argmax()].item()
        if abs(worst - 1) > 1e-6:
            warnings.warn(
                f"taus: got a mean of {worst:g} over the experts, expected 1: their product is biased as a prediction "
                "for balanced data",
                UserWarning,
                stacklevel=3,
            )
        self._keep_start("taus", held)
        if isinstance(taus, nn.Parameter):
            self._set("taus", taus)
        elif held.dim() == 2:
            self._set("taus", held.to(self.log_prior.device, self.log_prior.dtype))
        else:
            delattr(self, "taus")
            self.taus = tuple(held.tolist())
