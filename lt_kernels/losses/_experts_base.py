"""What the recipes for several experts share: one call of ``expert_cross_entropy`` in place of one per expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import functional as LF
from .._checks import check_classes_last, check_floating, check_tensor
from ..functional.experts import divergence_over_rows
from ._base import MarginCrossEntropyBase

if TYPE_CHECKING:
    from ..functional.experts import ExpertLogits


class ExpertLossBase(MarginCrossEntropyBase):
    """A module over [`expert_cross_entropy`][lt_kernels.functional.expert_cross_entropy] with fixed class tensors.

    Every recipe for experts takes the keywords of
    [`MarginCrossEntropyBase`][lt_kernels.losses.MarginCrossEntropyBase]: ``weight``, ``ignore_index``, ``reduction``,
    ``empty_mean``, ``label_smoothing``, ``zero_counts``, ``device``, ``dtype`` and ``persistent``. Its class
    tensors are buffers in the same way, and ``update_counts`` derives them anew.
    """

    #: How the experts' cross-entropies are combined.
    expert_reduction: ClassVar[Literal["mean", "sum"]] = "mean"

    _CLASS_TENSORS: tuple[str, ...] = (*MarginCrossEntropyBase._CLASS_TENSORS, "log_prior", "taus")

    log_prior: Tensor | None
    taus: tuple[float, ...] | Tensor | None

    def forward(
        self,
        logits: ExpertLogits,
        target: Tensor,
        mixed_target: Tensor | None = None,
        mix_lambda: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the experts' ``logits``, float16, bfloat16, float32 or float64.

        Args:
            logits: [E, N, C] with any strides, or a list or tuple of E tensors [N, C]; or maps [E, N, C, d1, ..., dk].
            target: class indices [N] or [N, d1, ..., dk] of any integer dtype; for BalPoE and SADE also class
                probabilities shaped like one expert's logits. RIDE's margins and NCL's hard classes need indices.
            mixed_target: second class indices of mixup or CutMix pairs, like ``target``.
            mix_lambda: share of ``target``: a number in [0, 1], or a tensor, 0-dim or like ``target``.

        Returns:
            0-dim, or like class indices with ``reduction="none"``; float32 (float64 for float64 logits).
        """
        if isinstance(logits, Tensor):
            check_tensor("logits", logits)
        batch, shape = 1, getattr(logits, "shape", ())
        if isinstance(logits, (list, tuple)):
            batch, shape = 0, getattr(next(iter(logits), None), "shape", ())
        if len(shape) > batch + 1:  # anything else is refused below
            check_classes_last("target", target, shape, batch)
            self._check_counted(shape[batch + 1], "logits")
        return self.loss(logits, target, mixed_target=mixed_target, mix_lambda=mix_lambda)

    def loss(self, logits: ExpertLogits, target: Tensor, **mixed: Any) -> Tensor:
        """Compute the recipe for ``forward``; ``mixed`` are its ``mixed_target`` and ``mix_lambda``."""
        value: Tensor = LF.expert_cross_entropy(logits, target, **mixed, **self.keywords())
        return value

    def keywords(self) -> dict[str, Any]:
        """Return class tensors and options as keywords of ``expert_cross_entropy``."""
        own = {"log_prior": self.log_prior, "taus": self.taus, "expert_reduction": self.expert_reduction}
        return {**super().keywords(), **own}

    def divergence(
        self,
        logits: ExpertLogits,
        kind: str,
        temperature: float | Tensor,
        factor: float,
        target: Tensor,
        mixed_target: Tensor | None = None,
        mix_lambda: float | Tensor | None = None,
    ) -> Tensor:
        """Return ``factor`` times the experts' divergences, reduced as ``over_rows`` does; over no row a mean of 0."""
        pair = (target, mixed_target, mix_lambda, self.ignore_index)
        return divergence_over_rows(logits, kind, temperature, *pair, self.reduction, factor)

    def over_rows(
        self,
        rows: Tensor,
        target: Tensor,
        mixed_target: Tensor | None = None,
        mix_lambda: float | Tensor | None = None,
    ) -> Tensor:
        """Reduce a term of each row, shaped like class indices, as the cross-entropies are: ignored rows take no part.

        Class weights do not act on it: the mean is over the rows that are not ignored. Of mixed targets, each has its
        share of the term, and its own mean.
        """
        if mixed_target is None or mix_lambda is None:
            return self._over_kept(rows, target)
        return self._over_kept(mix_lambda * rows, target) + self._over_kept((1 - mix_lambda) * rows, mixed_target)

    def _over_kept(self, rows: Tensor, target: Tensor) -> Tensor:
        kept = target.to(torch.int64) != self.ignore_index
        return self._reduce(rows.masked_fill(~kept, 0.0), kept)

    @property
    def class_sizes(self) -> dict[str, int]:
        """Refused: only the loss of one classifier joins a head."""
        raise TypeError(
            f"loss: got a {type(self).__name__}, which takes the logits of several experts, expected the loss of one "
            "classifier (experts: ExpertHead)"
        )

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        if self.taus is None:
            return shown
        taus = f"{list(self.taus.shape)}" if isinstance(self.taus, Tensor) else self.taus
        return f"{shown}, taus={taus}"


def stacked(name: str, logits: ExpertLogits, maps: bool = False) -> Tensor:
    """Return the experts' logits as one tensor [E, N, C], or [E, N, C, d1, ..., dk] if ``maps``.

    TypeError or ValueError if they are no such logits.
    """
    if isinstance(logits, (list, tuple)) and logits and all(isinstance(each, Tensor) for each in logits):
        for e, each in enumerate(logits):
            if each.shape != logits[0].shape:
                raise ValueError(f"{name}[{e}]: got shape {tuple(each.shape)}, expected {tuple(logits[0].shape)}")
        logits = torch.stack(list(logits))
    logits = check_floating(name, logits, "a Tensor [E, N, C] or a list of E [N, C]", "a floating-point dtype")
    if logits.dim() < 3 or (logits.dim() > 3 and not maps) or 0 in logits.shape[:3:2]:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, expected [E, N, C]")
    return logits


def check_indices(target: Tensor, why: str) -> None:
    """Refuse class probabilities."""
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            f"target: got dtype {target.dtype}, expected class indices of an integer dtype, as {why} (pairs of "
            "classes: mixed_target and mix_lambda)"
        )
